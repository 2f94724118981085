"""What of one position is on the disk, and how it gets there.

A `PositionState` is all of it. It lies in the records that the contracts name: the position in `signal`, the resting
entry in `schedule`, everything else in `strategy`; `partial` and `breakeven` repeat what the position says of
its levels, for who reads those. One change is one batch, in an order from which a start recovers where a store
without atomic batches was killed half-way: see `write_order`.

Every write expects the revision that was read or written last. Whoever takes the position over moves all of
them on, so what an old owner still writes is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from backtest_kit.broker.base import OrderKind
from backtest_kit.engine.position import LEVEL_STEP
from backtest_kit.engine.step import Flat, Holding, State
from backtest_kit.errors import Conflict, Damaged, OutOfSpace, RetryLater
from backtest_kit.model.event import Lasting, Mode
from backtest_kit.persist.binding import Persistence
from backtest_kit.persist.codec import decode, encode
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.store import ABSENT, Key, Plain, Write
from backtest_kit.run.live.orders import Intent, signal_id_of

_ROWS: Final = (CONTRACTS["signal"], CONTRACTS["schedule"], CONTRACTS["strategy"])
_PARTIAL, _BREAKEVEN = CONTRACTS["partial"], CONTRACTS["breakeven"]
_HELD_IN: Final = {"signal": ("holding", "position"), "schedule": ("resting", "entry")}
"""By contract: the state whose part it holds, and the name of that part. Where a torn batch has left both, the entry
has become the position."""

_Name = tuple[str, Key]


class RiskMoved(Exception):
    """Another position has changed a risk profile since it was asked: nothing was written, ask again."""


class Commanded(msgspec.Struct, frozen=True, rename="camel"):
    """A command that was carried out, or that the venue has refused."""

    kind: OrderKind
    refused: str = ""
    """Why; empty where it was carried out."""


class PositionState(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Everything that must be remembered of one position."""

    state: State = Flat()
    paused: bool = False
    when_ms: int = -1
    """The minute of the last transition; there is one per minute."""
    command_ms: int = -1
    """The minute of the last command."""
    commands: tuple[Commanded, ...] = ()
    """What became of the orders that were commanded in that minute, in their order."""
    seen_ms: int = -1
    """The last minute that was written down."""
    orders: int = 0
    """How many orders were sent in the life of what is held."""
    intent: Intent | None = None
    outbox: tuple[Lasting, ...] = ()
    """What happened and is not in anybody's records yet."""
    owner: str = ""
    """Who wrote it: the lease's random name."""
    store_id: str = ""
    """Part of the client ids of its orders, by which they are found on the exchange."""
    seq: int = 0
    """Grows by one with every change."""


class Ledger:
    """The book of one position in the stores of a mode. Not for two tasks at once."""

    def __init__(self, persistence: Persistence, mode: Mode, scope: Key) -> None:
        self._persistence = persistence
        self._mode = mode
        self._scope = scope
        self._known: dict[_Name, tuple[int, Plain]] = {}
        """Revision (0 for none) and value of each record, as read or written last."""
        self._unsure: dict[_Name, Plain] = {}
        """What a write has tried to make of records, where nobody knows whether it did."""

    async def load(self) -> PositionState:
        """The book as it was written last; an empty one where there is none.

        Raises:
            Damaged: a record is no such record, or cannot be trusted; nothing was changed.
            RetryLater: a store could not be asked.
        """
        self._unsure.clear()
        for row in _ROWS:
            await self._read(row, self._scope)
        try:
            return book_of({row.name: self._known[row.name, self._scope][1] for row in _ROWS})
        except (msgspec.ValidationError, AttributeError, KeyError, TypeError) as error:
            name = "/".join(map(str, self._scope))
            raise Damaged(
                f"what is stored of {name} is no position of this program ({error}): look at it with "
                f"backtest-kit store get signal {name}, and put it right before trading goes on"
            ) from error

    async def commit(self, book: PositionState, others: Sequence[Write] = ()) -> None:
        """Make `book` durable, with `others` (of risk) in the same batch. Not to be cancelled half-way.

        Raises:
            RiskMoved: one of `others` expected another revision; nothing was written.
            Conflict: somebody else has taken the position over; stop.
            OutOfSpace, RetryLater: as `Store.put`. A later `commit` first finds out what became of this one.
        """
        await self._find_out()
        writes = [*others, *await self._changes(book)]
        own = {(write.contract.name, write.key): write.value for write in writes[len(others) :]}
        self._unsure = dict(own)
        try:
            await self._persistence.batch(writes, mode=self._mode)
        except Conflict:
            await self._find_out()
            if not others:
                raise
            raise RiskMoved from None
        except (OutOfSpace, RetryLater):
            with suppress(OutOfSpace, RetryLater):
                await self._find_out()
            if self._unsure or not self._holds(own):
                raise
            return
        self._unsure.clear()
        for name, value in own.items():
            self._known[name] = self._known[name][0] + 1, value
        if not isinstance(book.state, Holding):
            # What is written of the levels of a position that is over is never written again.
            self._known = {name: self._known[name] for name in self._known if name[1] == self._scope}

    def _holds(self, own: dict[_Name, Plain]) -> bool:
        return all(self._known[name][1] == value for name, value in own.items())

    async def _find_out(self) -> None:
        """Learn what became of writes whose outcome is unknown.

        Raises:
            Conflict: somebody else wrote.
            RetryLater: the store does not tell.
        """
        for name in list(self._unsure):
            row, key = CONTRACTS[name[0]], name[1]
            rev, value = self._known[name]
            found = await self._persistence.store_for(row, self._mode).get(row, key)
            now = 0 if found is None else found.rev
            if found is not None and now == rev + 1 and found.value == self._unsure[name]:
                self._known[name] = now, found.value
            elif now != rev:
                raise Conflict(
                    f"{row.name} {'/'.join(map(str, key))} has revision {now} and was left with {rev}: "
                    "another process trades this position, stop this one"
                )
            else:
                self._known[name] = rev, value
            del self._unsure[name]

    async def _changes(self, book: PositionState) -> list[Write]:
        wanted: list[tuple[Contract, Key, Plain]] = []
        state = book.state
        marks = _marks(state) if isinstance(state, Holding) else None
        signal_id = signal_id_of(state)
        for row in (_PARTIAL, _BREAKEVEN):
            key = (*self._scope, signal_id)
            if marks is not None:
                if (row.name, key) not in self._known:
                    await self._read(row, key)
                wanted.append((row, key, marks[row.name]))
            elif (row.name, key) in self._known:
                wanted.append((row, key, {}))
        records = records_of(book)
        before = self._known["strategy", self._scope][1]
        wanted += [(CONTRACTS[name], self._scope, records[name]) for name in write_order(before, records)]
        writes = []
        for row, key, value in wanted:
            rev, known = self._known[row.name, key]
            empty = not rev and value in (None, {})
            if not empty and (known != value or not rev):
                writes.append(Write(row, key, value, when=book.seen_ms, expect=rev or ABSENT))
        return writes

    async def _read(self, row: Contract, key: Key) -> None:
        found = await self._persistence.store_for(row, self._mode).get(row, key)
        self._known[row.name, key] = (0, None) if found is None else (found.rev, found.value)


def _marks(state: Holding) -> dict[str, Plain]:
    position = state.position
    levels: Plain = {
        "profitLevels": list(range(LEVEL_STEP, position.profit_level + 1, LEVEL_STEP)),
        "lossLevels": list(range(LEVEL_STEP, position.loss_level + 1, LEVEL_STEP)),
    }
    return {
        "partial": {position.signal_id: levels} if position.profit_level or position.loss_level else {},
        "breakeven": {position.signal_id: {"reached": True}} if position.breakeven_reached else {},
    }


def records_of(book: PositionState) -> dict[str, Plain]:
    """The three records that hold a book, by the names of their contracts.

    What is held has a record of its own; in its place, the state in `strategy` names the signal that it belongs to.
    """
    strategy: Any = encode(book)
    records: dict[str, Plain] = dict.fromkeys(_HELD_IN)
    for name, (_, field) in _HELD_IN.items():
        if field in strategy["state"]:
            records[name] = held = strategy["state"][field]
            strategy["state"][field] = held["signalId"]
    return {**records, "strategy": strategy}


def write_order(before: Plain, records: dict[str, Plain]) -> list[str]:
    """The order in which to write `records`, where `before` is the `strategy` record that they follow.

    A position is written before `strategy`, which takes the intent away: killed in between, the intent is still there
    and its outcome is known. It is cleared after `strategy`, which alone has the trade that came of it. What `strategy`
    does not name, a torn batch has left behind; that is cleared first.
    """
    state: Any = before["state"] if isinstance(before, dict) else {}
    over = [name for name, (_, field) in _HELD_IN.items() if records[name] is None and field in state]
    return [*(name for name in _HELD_IN if name not in over), "strategy", *over]


def book_of(records: dict[str, Plain]) -> PositionState:
    """The book that `records_of` made `records` of, or as much of it as a torn batch has left."""
    found: dict[str, Any] = {name: decode(value) for name, value in records.items()}
    strategy = found["strategy"] or {}
    state: Any = strategy.get("state") or encode(Flat())
    return msgspec.convert({**strategy, "state": _joined(state, found)}, PositionState)


def _joined(state: dict[str, Any], records: dict[str, Any]) -> dict[str, Any]:
    """The state that `strategy` describes, with what is held. Where both disagree, a batch was torn: what is held is
    newer, unless `strategy` says that it is over, see `write_order`."""
    for name, (tag, field) in _HELD_IN.items():
        held = records[name]
        is_over = held is not None and state.get("lastSignalId") == held["signalId"]
        if held is not None and not is_over:
            same = state.get(field) == held["signalId"]
            rest = state if same else {"type": tag, "lastSlotMs": state["lastSlotMs"]}
            return {**rest, field: held}
    over = next((state[field] for _, field in _HELD_IN.values() if field in state), None)
    return state if over is None else {"type": "flat", "lastSlotMs": state["lastSlotMs"], "lastSignalId": over}
