"""What a backend implements: `Store` for records, `CandleStore` for candles.

Both are base classes. Their abstract methods are what every backend has to have; the others have a default,
which does the right thing for a store that has nothing of the kind, or refuses with the way out. `Capability`
says on which of them a caller can rely.

Values that reach a store are plain JSON trees (dict, list, str, int, finite float, bool, None): the
codec above it has already tagged what JSON has no word for. Every method may be called from several
tasks of one event loop at once; writes to one key take effect in the order in which they were issued.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from enum import Enum
from typing import Final, Literal, NoReturn

import msgspec

from backtest_kit.errors import Damaged, UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.contracts import Contract, record_contracts
from backtest_kit.persist.keys import Key as Key, KeyPart as KeyPart, check_key
from backtest_kit.persist.upkeep import SAMPLES, Finding, Quarantined, Reading

Plain = dict[str, "Plain"] | list["Plain"] | str | int | float | bool | None
"""A value that JSON can write down without loss."""

ANY: Final = "any"
"""Expectation of a write: whatever is there now."""
ABSENT: Final = "absent"
"""Expectation of a write: nothing has ever been written under this key."""
Expect = Literal["any", "absent"] | int


class Capability(Enum):
    """What a store promises beyond reading back what it was given. Declared, and verified both ways.

    A store that does not declare a capability refuses what needs it, so that no caller relies on a promise
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
    LISTING = "listing"
    """`namespaces` and `candles.series` name everything that has something in it. Otherwise `namespaces` raises
    `UserError`."""
    PRUNING = "pruning"
    """`prune`, `count` and `forget` work. Otherwise they raise `UserError`, and records are kept permanently."""
    QUARANTINE = "quarantine"
    """Damaged bytes are kept and block their key until an operator decides with `restore` or `drop`. Otherwise
    `quarantined`, `restore` and `drop` raise `UserError`."""


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


class Selection(msgspec.Struct, frozen=True):
    """What a scan is to find."""

    contract: Contract
    prefix: Key
    """With this the key begins."""
    limit: int | None
    """More than so many are not read, removed ones only counted if they are included."""
    newest_first: bool
    include_removed: bool


class SeriesKey(msgspec.Struct, frozen=True):
    """Names one candle series."""

    exchange_name: str
    symbol: str
    interval: str


class CandleStore(ABC):
    """Candles as columns over time. The first write of a candle wins permanently."""

    @abstractmethod
    async def read(self, series: SeriesKey, start_ms: int, stop_ms: int) -> CandleSeries:
        """The stored candles that open in `[start_ms, stop_ms)`, ascending; what is absent is left out."""

    @abstractmethod
    async def write(self, series: SeriesKey, candles: CandleSeries) -> int:
        """Store the candles that are not there yet and return how many those were.

        The caller passes closed candles only, ascending and without duplicates.
        """

    async def series(self) -> list[SeriesKey]:
        """Every series that has candles. Part of `Capability.LISTING`."""
        raise UserError(f"{type(self).__name__} cannot list its candles: use another store, or leave candles out")


class Store(ABC):
    """A backend for the records of every contract but `candle`, which has `candles`."""

    candles: CandleStore
    """Set by the subclass."""

    @property
    @abstractmethod
    def capabilities(self) -> frozenset[Capability]:
        """What this store promises; a class attribute where it is always the same."""

    async def open(self) -> None:  # noqa: B027 - most stores have nothing to do
        """Make ready. Idempotent; every concurrent caller waits for the same opening.

        A failed opening raises and is tried again by the next call. Every other method opens the
        store first if that has not happened.
        """

    async def close(self) -> None:  # noqa: B027 - most stores have nothing to do
        """Flush what is not durable yet and release every resource. Idempotent."""

    async def leave_loop(self) -> None:  # noqa: B027 - most stores have nothing to do
        """Close the connections of the running event loop, which is about to end; pending writes are flushed first."""

    @abstractmethod
    async def get(self, contract: Contract, key: Key) -> Record | None:
        """The record under `key`, removed ones included, or None if none was ever written.

        Raises:
            Damaged: what is stored there cannot be trusted; it is in quarantine and the key is blocked.
            RetryLater: the store could not be reached; nothing is known and nothing was changed.
        """

    @abstractmethod
    async def put(self, write: Write) -> Record:
        """Do one write and return the record as it now stands.

        Unless the contract's rule is `WriteRule.REPLACE`, a write to a key that has a record changes nothing and
        returns that record; `write.expect` is judged before that.

        Raises:
            Conflict: `write.expect` does not hold.
            Damaged: the key is blocked.
            OutOfSpace, RetryLater: with `outcome` saying whether the write may have happened.
        """

    def put_now(self, write: Write) -> Record:
        """As `put`, without waiting: only a store in the memory of this process can."""
        self.refuse("writing without waiting", "await put")

    async def put_each(self, writes: Sequence[Write]) -> list[Record | BaseException]:
        """Do each of `writes` as `put` would, in their order: what `put` returns for it, or what it raises.

        Override it where many writes at once cost less than one by one.

        Raises:
            As `put`; it is not known then which of them took place.
        """
        done: list[Record | BaseException] = []
        for write in writes:
            try:
                done.append(await self.put(write))
            except Exception as error:  # whatever it is, it is the outcome of this write alone
                done.append(error)
        return done

    async def batch(self, writes: Sequence[Write]) -> None:
        """Do all of the writes or none. Every key at most once.

        Raises:
            As `put`; nothing has changed then unless `outcome` is UNKNOWN.
        """
        if len(writes) > 1:
            self.refuse("atomic batches", "write one record at a time, or use another store")
        for write in writes:
            await self.put(write)

    async def scan(
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
        A store that has lost its place in the order raises behind all others. Writing while scanning is
        allowed; a record that is written meanwhile appears at most once.

        Raises:
            UserError: no key begins so, or `limit` is below 0.
        """
        wanted = Selection(contract, check_key(contract, prefix, prefix=True), limit, newest_first, include_removed)
        check_limit(limit)
        left = limit
        if left == 0:
            return
        async with aclosing(self.select(wanted)) as found:
            async for record in found:
                if include_removed or not record.removed:
                    yield record
                    left = None if left is None else left - 1
                    if left == 0:
                        return

    @abstractmethod
    def select(self, wanted: Selection) -> AsyncGenerator[Record, None]:
        """What `scan` reads: every record that is wanted, in order, and perhaps more behind the limit, or removed ones.

        Of what is not wanted only the prefix and the order have to be right: `scan` passes over the rest.
        """

    @abstractmethod
    def namespace(self, name: str) -> Store:
        """The same backend under a name of its own: no record of one namespace is seen in another.

        `namespace("")` is the store itself. Closing a namespace does not close its parent.
        """

    def keeps(self, contract: Contract) -> bool:
        """Whether records of `contract` can be written here. Every contract, unless the store is made for one."""
        return True

    async def identity(self) -> str | None:
        """The same for every object over this place, and for no other; None where that cannot be known, or
        nothing is there yet. Makes nothing.

        Raises:
            RetryLater, UserError: the server cannot be reached.
        """
        return None

    async def namespaces(self) -> list[tuple[str, ...]]:
        """Every namespace below this one that has something in it, as the names that lead there."""
        self.refuse("listing namespaces", "use another store")

    async def prune(self, contract: Contract, revisions: Mapping[Key, int]) -> int:
        """Forget every key that still has the revision given for it; return how many those were.

        What is forgotten was never written: the next write of the key is revision 1. What was written since, and
        what cannot be trusted, stays. A crash leaves a part of it forgotten.

        Raises:
            UserError: the contract is of money class, of which nothing is ever forgotten.
            RetryLater, OutOfSpace: not all of it was forgotten.
        """
        self.refuse("pruning", "delete old records in the backend itself")

    async def count(self, contract: Contract) -> int:
        """How many records of a contract `scan` would list, removed ones left out, without reading them."""
        self.refuse("counting", "count what scan lists")

    async def forget(self) -> None:
        """Forget all that is in this namespace and in those below it. No process may be writing there.

        Raises:
            UserError: it is not a namespace but the whole store.
        """
        self.refuse("pruning", "delete old records in the backend itself")

    async def check(self, *, deep: bool = False) -> list[Finding]:
        """Everything that is wrong in any namespace, by path. Changes nothing.

        Every record is read, and the backend's own structures are verified; with `deep`, so is every candle. By
        default only the records of this namespace are read.
        """
        found = []
        for contract in filter(self.keeps, record_contracts()):
            try:
                async for _ in self.scan(contract, include_removed=True):
                    pass
            except Damaged as error:
                found.append(Finding(contract.name, str(error)))
        return found

    async def examine(self, *, samples: int = SAMPLES) -> list[Reading]:
        """Look at the place where the records lie. Changes nothing, and makes nothing that is missing.

        What cannot be reached is a reading, not an error.
        """
        return []

    async def quarantined(self) -> list[Quarantined]:
        """What is in quarantine in any namespace, by path."""
        self.refuse("quarantine", "mend the record in the backend itself, or write it again")

    async def restore(self, path: str) -> Record | None:
        """Put what is in quarantine under `path` back as it is now, perhaps mended by hand, and free its key.

        Returns the record, or None for candles.

        Raises:
            UserError: nothing is called so, it cannot be put back, or it is still damaged.
        """
        self.refuse("quarantine", "mend the record in the backend itself, or write it again")

    async def drop(self, path: str) -> Quarantined:
        """Give up what is in quarantine under `path`, which frees its key.

        Raises:
            UserError: nothing is called so.
        """
        self.refuse("quarantine", "mend the record in the backend itself, or write it again")

    async def accept_loss(self) -> str | None:
        """Go on with what is left of a store that refuses to open because acknowledged writes are gone.

        Returns what was lost, or None if nothing is missing, and then changes nothing.

        Raises:
            Damaged, RetryLater, UserError: the store cannot be opened even so, or never refuses for that reason.
        """
        self.refuse("accepting a loss", "there is none to accept: only stores with a high-water mark notice one")

    def refuse(self, what: str, way_out: str) -> NoReturn:
        """Raise the error of a capability that is not declared."""
        raise UserError(f"{type(self).__name__} does not support {what}: {way_out}")


def check_limit(limit: int | None) -> None:
    """Raise `UserError` if `limit` is below 0: at least that many is not what anyone means."""
    if limit is not None and limit < 0:
        raise UserError(f"limit is {limit}: give how many there may be at most, or None for all")


def copy_plain(value: Plain) -> Plain:
    """A copy that shares nothing that can change."""
    if isinstance(value, dict):
        return {name: copy_plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [copy_plain(item) for item in value]
    return value
