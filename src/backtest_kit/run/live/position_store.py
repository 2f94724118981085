"""Keeps the book of one position: in the store, in the risk profiles, and where nothing else is left, aside.

The store comes first. What it does not take, because the disk is full or a server is away, goes to the
emergency file, and to the store once that takes it. Until then the run is degraded: nothing new is opened.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Literal, TypeVar

import msgspec

from backtest_kit.engine.step import Holding, Resting, State
from backtest_kit.errors import BacktestKitError, Conflict, Damaged, OutOfSpace, RetryLater
from backtest_kit.model.position import Position, RestingEntry
from backtest_kit.persist.codec import decode_as, dump_value, encode, parse
from backtest_kit.persist.lease import Lapsed, Lease
from backtest_kit.run.live.alarms import Alarms
from backtest_kit.run.live.emergency import ROOM, EmergencyFile
from backtest_kit.run.live.ledger import Ledger, PositionState, RiskMoved
from backtest_kit.run.live.orders import ENTRIES
from backtest_kit.run.live.risk import LiveRisk

T = TypeVar("T")
Need = Literal["store", "disk", "try"]
"""What must have a book before the run goes on: the store; the store or the emergency file; or neither, because
what the book says has happened already."""

_log = logging.getLogger("backtest_kit")


class _Aside(msgspec.Struct, frozen=True):
    """What the emergency file has."""

    after: tuple[str, int]
    """Owner and number of the book that the store had then."""
    book: PositionState


class Unsaved(Exception):
    """Nothing that was needed has taken the book; the run goes on with the one before."""


class RiskRefused(Exception):
    """A risk profile has changed since it allowed a position, and refuses it now: (profile, reason)."""


class PositionStore:
    """The book as it is, and how it is kept. Not for two tasks at once."""

    def __init__(self, ledger: Ledger, risk: LiveRisk, emergency: EmergencyFile, alarms: Alarms) -> None:
        self._ledger = ledger
        self._risk = risk
        self._emergency = emergency
        self._alarms = alarms
        self._stale = True
        """Whether the risk profiles must be read before the next write."""
        self._stored = ("", 0)
        """Owner and number of the book that the store has."""
        self.book = PositionState()
        self.degraded = ""
        """Why the store does not take the book; empty while it does."""
        self.written_ms = -1
        """The last minute that the store has."""
        self.aside = False
        """Whether the emergency file has what the store lacks."""
        self.lease: Lease | None = None
        """What this process has the position by, once it has."""

    async def load(self, owner: str) -> tuple[str, ...]:
        """Take in what the run before has left, and tell what was put right.

        Raises:
            Damaged, RetryLater: it cannot be read; nothing was changed.
        """
        steps = []
        book = await self._ledger.load()
        self._stored = book.owner, book.seq
        try:
            kept = await asyncio.to_thread(self._open_emergency)
        except (OutOfSpace, RetryLater) as error:
            _log.warning("no emergency file: %s; exits will need the store", error)
            kept = None
        if kept is not None and (newer := self._newer(kept)) is not None:
            book = newer
            steps.append("took what the store lacked from the emergency file")
        if book.intent is not None:
            # Attempts that a crash cut off say nothing about the venue: of all of them one counts.
            order = msgspec.structs.replace(book.intent.order, attempt=min(book.intent.order.attempt, 1))
            book = msgspec.structs.replace(book, intent=msgspec.structs.replace(book.intent, order=order))
        self.book = msgspec.structs.replace(book, owner=owner)
        return tuple(steps)

    def close(self) -> None:
        """Let go of the emergency file."""
        self._emergency.close()

    async def keep(self, book: PositionState, need: Need) -> None:
        """Make `book` the book, once what is needed has it. A cancellation waits until that is decided.

        Raises:
            Unsaved: what is needed did not take it.
            RiskRefused: a profile refuses what the book is about to open.
            Conflict: another process has the position; stop.
        """
        await uninterrupted(self._keep(book, need))

    async def confirm(self) -> None:
        """Make sure that nobody else has the position: the last thing before an order is sent.

        Raises:
            Conflict: another process has it; stop.
            RetryLater: nobody knows, because the store has been away for too long; send nothing now.
        """
        if self.lease is None:
            return
        try:
            await self.lease.confirm()
        except Lapsed as error:
            if not self.degraded:
                self.degraded = str(error)
                self._alarms.store_changed(self.degraded, kept=True)
            raise RetryLater(str(error)) from error

    async def flush(self) -> None:
        """Try again to bring into the store what it lacks.

        Raises:
            Conflict: another process has the position; stop.
        """
        if self.degraded:
            with suppress(Unsaved):
                await self.keep(self.book, "store")

    async def _keep(self, book: PositionState, need: Need) -> None:
        book = msgspec.structs.replace(book, seq=self.book.seq + 1)
        try:
            await self._store(book)
        except (Damaged, OutOfSpace, RetryLater) as error:
            self._stale = True
            # Whatever became of the write, no later book has its number.
            self.book = msgspec.structs.replace(self.book, seq=book.seq)
            await self._put_aside(book, error, need)
        else:
            self._stored = book.owner, book.seq
            self.written_ms = book.seen_ms
            if self.degraded:
                self.degraded, self.aside = "", False
                self._alarms.store_changed(self.degraded, kept=self.aside)
        self.book = book

    async def _store(self, book: PositionState) -> None:
        if self._stale:
            await self._ask_again(book)
            self._stale = False
        while True:
            writes = self._risk.writes(_counted(book), book.seen_ms)
            try:
                await self._ledger.commit(book, writes)
            except RiskMoved:
                await self._ask_again(book)
                continue
            self._risk.written(writes)
            return

    async def _ask_again(self, book: PositionState) -> None:
        """Read the profiles anew; what is about to be opened must be allowed by exactly what was read."""
        if book.intent is None or book.intent.order.kind not in ENTRIES:
            await self._risk.read()
        elif refusal := await self._risk.ask_again():
            raise RiskRefused(*refusal)

    async def _put_aside(self, book: PositionState, error: BacktestKitError, need: Need) -> None:
        before = self.degraded, self.aside
        self.degraded = str(error)
        if need != "store":
            try:
                await asyncio.to_thread(self._emergency.write, self._sealed(book))
                self.aside = True
            except (OutOfSpace, RetryLater) as failure:
                self.aside = False
                _log.error("the emergency file does not help: %s", failure)
        if (bool(before[0]), before[1]) != (True, self.aside):
            self._alarms.store_changed(self.degraded, kept=self.aside)
        if need == "store" or (need == "disk" and not self.aside):
            raise Unsaved(str(error)) from error

    def _open_emergency(self) -> bytes | None:
        self._emergency.open()
        return self._emergency.read()

    def _sealed(self, book: PositionState) -> bytes:
        """The book as the emergency file takes it: small, because the events of hours may wait in the outbox.

        Where they are too many even so, the older ones stay in the memory alone: what is held comes first.
        """
        while True:
            sealed = zlib.compress(dump_value(encode(_Aside(self._stored, book))))
            if len(sealed) <= ROOM or not book.outbox:
                return sealed
            book = msgspec.structs.replace(book, outbox=book.outbox[len(book.outbox) // 2 + 1 :])

    def _newer(self, kept: bytes) -> PositionState | None:
        """What was put aside, if nobody has written to the store since."""
        try:
            aside = decode_as(_Aside, parse(zlib.decompress(kept)))
        except Damaged as error:
            _log.error("what is in the emergency file is left there: %s", error)
            return None
        owner, seq = self._stored
        same_writer = owner == aside.book.owner and seq < aside.book.seq
        return aside.book if same_writer or aside.after == self._stored else None


def held_by(state: State) -> Position | RestingEntry | None:
    """The position or the resting entry of a state."""
    if isinstance(state, Holding):
        return state.position
    return state.entry if isinstance(state, Resting) else None


def _counted(book: PositionState) -> Position | RestingEntry | None:
    """What a risk profile counts: what is held, and what an order is about to open."""
    return held_by(book.state) or (None if book.intent is None else held_by(book.intent.target))


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Do `work` to its end: a cancellation that comes meanwhile is raised after it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()) is not None:
            level = logging.WARNING if isinstance(error, Conflict | Unsaved | RiskRefused) else logging.ERROR
            _log.log(level, "a write that was waited for at a cancellation failed: %s", error)
        raise
