"""What of one position is on the disk, and how it gets there.

A `Book` is all of it. It lies in the records that the contracts name: the position in `signal`, the resting
entry in `schedule`, everything else in `strategy`; `partial` and `breakeven` repeat what the position says of
its levels, for who reads those. One change is one batch, ordered so that a store without atomic batches heals:
the records of an outcome first, last the `strategy` record, which takes the intent away.

Every write expects the revision that was read or written last. Whoever takes the position over moves all of
them on, so what an old owner still writes is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from backtest_kit.broker.base import Fill, Order, OrderKind
from backtest_kit.engine.position import LEVEL_STEP
from backtest_kit.engine.step import Flat, Holding, Resting, State
from backtest_kit.errors import Conflict, Damaged, OutOfSpace, RetryLater
from backtest_kit.model.event import (
    EntryCancelled,
    EntryScheduled,
    Event,
    PositionChanged,
    PositionClosed,
    PositionOpened,
)
from backtest_kit.model.position import Position, RestingEntry
from backtest_kit.persist.binding import Mode, Persistence
from backtest_kit.persist.codec import decode, encode
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.store import ABSENT, Key, Plain, Write
from backtest_kit.run.orders import Intent, signal_id_of

_ROWS: Final = (CONTRACTS["signal"], CONTRACTS["schedule"], CONTRACTS["strategy"])
_PARTIAL, _BREAKEVEN = CONTRACTS["partial"], CONTRACTS["breakeven"]
_EVENTS: Final[dict[str, type[Event]]] = {
    kind.action: kind for kind in (EntryScheduled, EntryCancelled, PositionOpened, PositionClosed, PositionChanged)
}
LASTING: Final = tuple(_EVENTS.values())
"""Events that the books keep until somebody has taken them into his records."""

_Name = tuple[str, Key]


class RiskMoved(Exception):
    """Another position has changed a risk profile since it was asked: nothing was written, ask again."""


class Commanded(msgspec.Struct, frozen=True):
    """A command that was carried out, or that the venue has refused."""

    kind: OrderKind
    refused: str = ""
    """Why; empty where it was carried out."""


class Book(msgspec.Struct, frozen=True, kw_only=True):
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
    outbox: tuple[Event, ...] = ()
    """What happened and is not in anybody's records yet."""
    owner: str = ""
    """Who wrote it: the lease's random name."""
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

    async def load(self) -> Book:
        """The book as it was written last; an empty one where there is none.

        Raises:
            Damaged: a record is no such record, or cannot be trusted; nothing was changed.
            RetryLater: a store could not be asked.
        """
        self._unsure.clear()
        for row in _ROWS:
            await self._read(row, self._scope)
        return self.book_of({row.name: self._known[row.name, self._scope][1] for row in _ROWS})

    def book_of(self, records: dict[str, Plain]) -> Book:
        """The book that three records make.

        Raises:
            Damaged: they do not.
        """
        try:
            return _book(*(decode(records[name]) for name in ("signal", "schedule", "strategy")))
        except (msgspec.ValidationError, KeyError, TypeError) as error:
            name = "/".join(map(str, self._scope))
            raise Damaged(
                f"what is stored of {name} is no position of this program ({error}): look at it with "
                f"backtest-kit store get signal {name}, and put it right before trading goes on"
            ) from error

    async def commit(self, book: Book, others: Sequence[Write] = ()) -> None:
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

    async def _changes(self, book: Book) -> list[Write]:
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
        wanted += [(row, self._scope, records[row.name]) for row in _ROWS]
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


def records_of(book: Book) -> dict[str, Plain]:
    """The three records that hold a book, by the names of their contracts."""
    state = book.state
    strategy = {
        "lastSlotMs": state.last_slot_ms,
        "lastSignalId": signal_id_of(state),
        "closing": state.closing if isinstance(state, Holding) else None,
        "order": state.order if isinstance(state, Resting) else "",
        "paused": book.paused,
        "whenMs": book.when_ms,
        "commandMs": book.command_ms,
        "commands": book.commands,
        "seenMs": book.seen_ms,
        "orders": book.orders,
        "intent": None if book.intent is None else _intent_record(book.intent),
        "outbox": [_event_record(event) for event in book.outbox],
        "owner": book.owner,
        "seq": book.seq,
    }
    return {
        "signal": encode(state.position) if isinstance(state, Holding) else None,
        "schedule": encode(state.entry) if isinstance(state, Resting) else None,
        "strategy": encode(strategy),
    }


def _book(signal: Any, schedule: Any, strategy: Any) -> Book:
    strategy = strategy or {}
    slot, last = strategy.get("lastSlotMs", -1), strategy.get("lastSignalId", "")
    state: State = Flat(slot, last)
    if signal is not None:
        # Where a torn batch has left both, the entry has become the position.
        position = msgspec.convert(signal, Position)
        state = Holding(position, slot, strategy.get("closing") if last == position.signal_id else None)
    elif schedule is not None:
        entry = msgspec.convert(schedule, RestingEntry)
        state = Resting(entry, slot, strategy.get("order", "") if last == entry.signal_id else "")
    intent = strategy.get("intent")
    return Book(
        state=state,
        paused=strategy.get("paused", False),
        when_ms=strategy.get("whenMs", -1),
        command_ms=strategy.get("commandMs", -1),
        commands=msgspec.convert(strategy.get("commands", ()), tuple[Commanded, ...]),
        seen_ms=strategy.get("seenMs", -1),
        orders=strategy.get("orders", 0),
        intent=None if intent is None else _intent(intent),
        outbox=tuple(map(_event, strategy.get("outbox", ()))),
        owner=strategy.get("owner", ""),
        seq=strategy.get("seq", 0),
    )


def _intent_record(intent: Intent) -> dict[str, object]:
    target = intent.target
    return {
        "order": intent.order,
        "target": {
            "signal": target.position if isinstance(target, Holding) else None,
            "schedule": target.entry if isinstance(target, Resting) else None,
            "lastSlotMs": target.last_slot_ms,
            "lastSignalId": signal_id_of(target),
            "closing": target.closing if isinstance(target, Holding) else None,
        },
        "events": [_event_record(event) for event in intent.events],
        "earlier": intent.earlier,
    }


def _intent(record: Any) -> Intent:
    target = record["target"]
    return Intent(
        order=msgspec.convert(record["order"], Order),
        target=_book(target["signal"], target["schedule"], target).state,
        events=tuple(map(_event, record["events"])),
        earlier=msgspec.convert(record.get("earlier"), Fill | None),
    )


def _event_record(event: Event) -> dict[str, object]:
    return {"action": event.action, "event": event}


def _event(record: Any) -> Event:
    return msgspec.convert(record["event"], _EVENTS[record["action"]])
