"""What a backend implements: `Store` for records, `CandleStore` for candles.

Values that reach a store are plain JSON trees (dict, list, str, int, finite float, bool, None): the
codec above it has already tagged what JSON has no word for. Every method may be called from several
tasks of one event loop at once; writes to one key take effect in the order in which they were issued.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from enum import Enum
from typing import Final, Literal, Protocol

import msgspec

from backtest_kit.errors import UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.contracts import Contract

KeyPart = str | int | bool
Key = tuple[KeyPart, ...]
"""The components of a record's name, in the order of `Contract.key_fields`."""

Plain = dict[str, "Plain"] | list["Plain"] | str | int | float | bool | None
"""A value that JSON can write down without loss."""

ANY: Final = "any"
"""Expectation of a write: whatever is there now."""
ABSENT: Final = "absent"
"""Expectation of a write: nothing has ever been written under this key."""
Expect = Literal["any", "absent"] | int


class Capability(Enum):
    """What a store promises beyond reading back what it was given. Declared, and verified both ways.

    A store that does not declare a capability refuses what needs it, so that nobody relies on a promise
    that was never made: that is the second half of each line below.
    """

    DURABLE = "durable"
    """A money write that returned survives the process and the host. Otherwise a second object over the
    same place starts empty."""
    SHARED = "shared"
    """Several processes may have the same store open and see each other's writes. Otherwise two open
    objects see nothing of each other."""
    COMPARE_AND_SET = "compare-and-set"
    """`Write.expect` is honoured, across processes where SHARED. Otherwise `UserError` for every
    expectation but `ANY`."""
    ATOMIC_BATCH = "atomic-batch"
    """`batch` is all or nothing, also when the process is killed inside it. Otherwise `UserError` for a
    batch of more than one write."""
    ORDERED_SCAN = "ordered-scan"
    """`scan` is in order of writing, and `newest_first` its exact reverse; of what processes on several machines
    write at once, as near as their clocks are. Otherwise `scan` raises `UserError`, unless the store keeps nothing
    at all."""


class Record(msgspec.Struct, frozen=True):
    """What is stored under one key."""

    key: Key
    value: Plain
    rev: int
    """1 at the first write of the key, and one more at each write after it, removals included."""
    when: int | None
    """Simulation time of the write in epoch ms, or None where the writer has no such time."""
    written_at: int
    """Wall clock of the write in epoch ms: for people, never for order or decisions."""
    removed: bool = False
    schema_version: int = 1

    def later_than(self, when_ms: int | None) -> bool:
        """Whether it belongs to the future of a simulation time; without one, nothing does."""
        return when_ms is not None and self.when is not None and self.when > when_ms


class Write(msgspec.Struct, frozen=True):
    """One intended change of one key."""

    contract: Contract
    key: Key
    value: Plain
    when: int | None = None
    expect: Expect = ANY
    """`ANY`, `ABSENT`, or the revision that the key must have now; otherwise `Conflict`."""
    removed: bool = False
    """Soft removal: the record stays, with `removed` set, and listings pass it over."""


class SeriesKey(msgspec.Struct, frozen=True):
    """Names one candle series."""

    exchange_name: str
    symbol: str
    interval: str


class CandleStore(Protocol):
    """Candles as columns over time. The first write of a candle wins for ever."""

    async def read(self, series: SeriesKey, start_ms: int, stop_ms: int) -> CandleSeries:
        """The stored candles that open in `[start_ms, stop_ms)`, ascending; what is absent is left out."""
        ...

    async def write(self, series: SeriesKey, candles: CandleSeries) -> int:
        """Store the candles that are not there yet and return how many those were.

        The caller passes closed candles only, ascending and without duplicates.
        """
        ...


class Store(Protocol):
    """A backend for the records of every contract but `candle`, which has `candles`."""

    @property
    def capabilities(self) -> frozenset[Capability]: ...

    @property
    def candles(self) -> CandleStore: ...

    async def open(self) -> None:
        """Make ready. Idempotent; every concurrent caller waits for the same opening.

        A failed opening raises and is tried again by the next call. Every other method opens the
        store first if nobody has.
        """
        ...

    async def close(self) -> None:
        """Flush what is not durable yet and let go of every resource. Idempotent."""
        ...

    async def get(self, contract: Contract, key: Key) -> Record | None:
        """The record under `key`, removed ones included, or None if none was ever written.

        Raises:
            Damaged: what is stored there cannot be trusted; it is in quarantine and the key is blocked.
            RetryLater: the store could not be asked; nothing is known and nothing was changed.
        """
        ...

    async def put(self, write: Write) -> Record:
        """Do one write and return the record as it now stands.

        Under `WriteRule.FIRST_WINS` a write to a key that has a record changes nothing and returns
        that record; `write.expect` is judged before that.

        Raises:
            Conflict: `write.expect` does not hold.
            Damaged: the key is blocked.
            OutOfSpace, RetryLater: with `outcome` saying whether the write may have happened.
        """
        ...

    async def batch(self, writes: Sequence[Write]) -> None:
        """Do all of the writes or none. Every key at most once.

        Raises:
            As `put`; nothing has changed then unless `outcome` is UNKNOWN.
        """
        ...

    def scan(
        self,
        contract: Contract,
        prefix: Key = (),
        *,
        limit: int | None = None,
        newest_first: bool = False,
        include_removed: bool = False,
    ) -> AsyncIterator[Record]:
        """The records whose key begins with `prefix`, in order of their last write; no more than `limit`, of 0 none.

        A damaged record raises `Damaged` when the scan reaches it, every scan, until an operator has decided about it.
        A store that cannot tell its place in the order any more raises behind all others. Writing while scanning is
        allowed; a record that is written meanwhile appears at most once.

        Raises:
            UserError: no key begins so, or `limit` is below 0.
        """
        ...

    def within(self, namespace: str) -> Store:
        """The same backend under a name of its own: no record of one namespace is seen in another.

        `within("")` is the store itself. Closing a namespace does not close its parent.
        """
        ...


def check_limit(limit: int | None) -> None:
    """Raise `UserError` if `limit` is below 0: at least that many is not what anyone means."""
    if limit is not None and limit < 0:
        raise UserError(f"limit is {limit}: give how many there may be at most, or None for all")
