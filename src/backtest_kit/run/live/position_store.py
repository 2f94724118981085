"""`PositionStore`: keeps the state of one position in the store, in its risk profiles, and in the emergency file.

The store comes first. A change that it rejects, because the disk is full or a server is away, goes to the emergency
file, and to the store once that works again. Until then the run is degraded: nothing new is opened.

One change is one batch, in an order from which a start recovers if a store without atomic batches was killed half-way:
see `write_order`. Every write expects the revision that was read or written last. A process that takes the position
over raises all revisions, so the store rejects what the old owner still writes.

A risk profile is one record of the `risk` contract, shared by every process on the store: its positions by name. A
check and its reservation are one step: the reservation expects the revision that the check has seen, and is written
in the same batch as the intent of the order, in all profiles or in none.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final, Literal, TypeVar

import msgspec

from backtest_kit.engine.step import Holding
from backtest_kit.errors import BacktestKitError, Conflict, Damaged, OutOfSpace, RetryLater
from backtest_kit.model.identity import Identity
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.signal import Signal
from backtest_kit.persist.binding import Persistence
from backtest_kit.persist.codec import decode_as, dump_value, encode, parse
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.keys import path_of
from backtest_kit.persist.lease import Lapsed, Lease
from backtest_kit.persist.store import Key, Plain, Write
from backtest_kit.run.live.alarms import Alarms
from backtest_kit.run.live.emergency import ROOM, EmergencyFile
from backtest_kit.run.live.known_records import KnownRecords
from backtest_kit.run.live.orders import ENTRIES, signal_id_of
from backtest_kit.run.live.position_state import (
    PositionState,
    marks_of,
    position_state_of,
    records_of,
    write_order,
)
from backtest_kit.run.risk import active, judge
from backtest_kit.run.risk_request import ActivePosition
from backtest_kit.run.schema import RiskSchema

T = TypeVar("T")
Need = Literal["store", "disk", "try"]
"""What must have taken a position state before the run continues: the store; the store or the emergency file; or
neither, because it has already happened."""

_ROWS: Final = (CONTRACTS["signal"], CONTRACTS["schedule"], CONTRACTS["strategy"])
_MARKS: Final = (CONTRACTS["partial"], CONTRACTS["breakeven"])
_RISK: Final = CONTRACTS["risk"]
_Slots = dict[str, ActivePosition]
_log = logging.getLogger("backtest_kit")


class _Aside(msgspec.Struct, frozen=True):
    """The content of the emergency file."""

    after: tuple[str, int]
    """Owner and number of the position state that the store had at that time."""
    position_state: PositionState


class Unsaved(Exception):
    """The position state could not be stored where it must be; the run continues with the previous one."""


class RiskRefused(Exception):
    """A risk profile has changed since it allowed a position, and rejects it now: (profile, reason)."""


async def read_position_state(records: KnownRecords, scope: Key) -> PositionState:
    """The position state that was written last; an empty one if there is none.

    Raises:
        Damaged: a record is damaged, or is not a position; nothing was changed.
        RetryLater: a store does not answer.
    """
    found = {row.name: await records.read(row, scope) for row in _ROWS}
    try:
        return position_state_of(found)
    except (msgspec.ValidationError, AttributeError, KeyError, TypeError) as error:
        name = "/".join(map(str, scope))
        raise Damaged(
            f"the records of {name} are not a position of this program ({error}): look at them with "
            f"backtest-kit store get signal {name}, and repair them before trading continues"
        ) from error


class PositionStore:
    """The current position state and its storage. Not for concurrent use."""

    def __init__(
        self,
        persistence: Persistence,
        identity: Identity,
        scope: Key,
        risks: Sequence[RiskSchema],
        patience_minutes: float,
        emergency: EmergencyFile,
        alarms: Alarms,
    ) -> None:
        """`patience_minutes` is added to the lifetime of a reservation: an entry may rest before its position opens."""
        self._records = KnownRecords(persistence, identity.mode)
        self._identity = identity
        self._scope = scope
        self._risks = risks
        self._patience_ms = patience_minutes * MINUTE_MS
        self._emergency = emergency
        self._alarms = alarms
        self._judged: tuple[Signal, float, int] | None = None
        """The last question to the risk profiles."""
        self._stale = True
        """Whether the risk profiles must be read before the next write."""
        self._stored = ("", 0)
        """Owner and number of the position state in the store."""
        self.position_state = PositionState()
        self.degraded = ""
        """Why the store rejects the position state; empty while it works."""
        self.written_ms = -1
        """The last minute in the store."""
        self.aside = False
        """Whether the emergency file has the writes that the store lacks."""
        self.lease: Lease | None = None
        """The lease of this process, once it has the position."""

    async def load(self, owner: str) -> tuple[str, ...]:
        """Load the state of the previous run; returns what was recovered, in words.

        Raises:
            Damaged, RetryLater: it cannot be read; nothing was changed.
        """
        steps = []
        found = await read_position_state(self._records, self._scope)
        self._stored = found.owner, found.seq
        try:
            kept = await asyncio.to_thread(self._open_emergency)
        except (OutOfSpace, RetryLater) as error:
            _log.warning("no emergency file: %s; exits need the store", error)
            kept = None
        if kept is not None and (newer := self._newer(kept)) is not None:
            found = newer
            steps.append("recovered the latest state from the emergency file")
        if found.intent is not None:
            # Attempts that crashes cut off say nothing about the exchange: together they count as one.
            order = msgspec.structs.replace(found.intent.order, attempt=min(found.intent.order.attempt, 1))
            found = msgspec.structs.replace(found, intent=msgspec.structs.replace(found.intent, order=order))
        self.position_state = msgspec.structs.replace(found, owner=owner)
        return tuple(steps)

    def close(self) -> None:
        """Close the emergency file."""
        self._emergency.close()

    async def keep(self, position_state: PositionState, need: Need) -> None:
        """Store `position_state` as needed, and continue with it. A cancellation waits for the outcome.

        Raises:
            Unsaved: it could not be stored.
            RiskRefused: a profile rejects the position that it is about to open.
            Conflict: another process has the position; stop.
        """
        await uninterrupted(self._keep(position_state, need))

    async def confirm(self) -> None:
        """Make sure that no other process has the position, right before an order is sent.

        Raises:
            Conflict: another process has it; stop.
            RetryLater: unknown, because the store has been away for too long; send nothing now.
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
        """Try again to write what the store lacks.

        Raises:
            Conflict: another process has the position; stop.
        """
        if self.degraded:
            with suppress(Unsaved):
                await self.keep(self.position_state, "store")

    async def _keep(self, position_state: PositionState, need: Need) -> None:
        position_state = msgspec.structs.replace(position_state, seq=self.position_state.seq + 1)
        try:
            await self._write(position_state)
        except (Damaged, OutOfSpace, RetryLater) as error:
            self._stale = True
            # The write may have happened: no later position state has its number.
            self.position_state = msgspec.structs.replace(self.position_state, seq=position_state.seq)
            await self._put_aside(position_state, error, need)
        else:
            self._stored = position_state.owner, position_state.seq
            self.written_ms = position_state.seen_ms
            if self.degraded:
                self.degraded, self.aside = "", False
                self._alarms.store_changed(self.degraded, kept=self.aside)
        self.position_state = position_state

    async def _write(self, position_state: PositionState) -> None:
        if self._stale:
            await self._read_profiles(position_state)
            self._stale = False
        # An earlier write that failed may have happened: that decides which revisions this one expects.
        await self._records.find_out()
        changes = await self._changes(position_state)
        while not await self._records.commit(changes, self._reservations(position_state)):
            await self._read_profiles(position_state)
        if not isinstance(position_state.state, Holding):
            # The level records of a closed position are never written again.
            self._records.forget([(row.name, self._mark_key(position_state)) for row in _MARKS])

    async def _changes(self, position_state: PositionState) -> list[Write]:
        """The writes of a position state, in an order from which a torn batch recovers."""
        when_ms, writes = position_state.seen_ms, list[Write]()
        marks, key = marks_of(position_state.state), self._mark_key(position_state)
        for row in _MARKS:
            if marks and (row.name, key) not in self._records:
                await self._records.read(row, key)
            if (row.name, key) in self._records:
                writes += self._records.change(row, key, marks.get(row.name, {}), when_ms)
        records = records_of(position_state)
        for name in write_order(self._records.value(CONTRACTS["strategy"], self._scope), records):
            writes += self._records.change(CONTRACTS[name], self._scope, records[name], when_ms)
        return writes

    def _mark_key(self, position_state: PositionState) -> Key:
        return (*self._scope, signal_id_of(position_state.state))

    # The emergency file

    async def _put_aside(self, position_state: PositionState, error: BacktestKitError, need: Need) -> None:
        before = self.degraded, self.aside
        self.degraded = str(error)
        if need != "store":
            try:
                await asyncio.to_thread(self._emergency.write, self._sealed(position_state))
                self.aside = True
            except (OutOfSpace, RetryLater) as failure:
                self.aside = False
                _log.error("the emergency file failed as well: %s", failure)
        if (bool(before[0]), before[1]) != (True, self.aside):
            self._alarms.store_changed(self.degraded, kept=self.aside)
        if need == "store" or (need == "disk" and not self.aside):
            raise Unsaved(str(error)) from error

    def _open_emergency(self) -> bytes | None:
        self._emergency.open()
        return self._emergency.read()

    def _sealed(self, position_state: PositionState) -> bytes:
        """The content for the emergency file, compressed: the outbox may have the events of hours.

        If they are too many, the older ones stay in memory only: the position comes first.
        """
        while True:
            sealed = zlib.compress(dump_value(encode(_Aside(self._stored, position_state))))
            if len(sealed) <= ROOM or not position_state.outbox:
                return sealed
            newer_half = position_state.outbox[len(position_state.outbox) // 2 + 1 :]
            position_state = msgspec.structs.replace(position_state, outbox=newer_half)

    def _newer(self, kept: bytes) -> PositionState | None:
        """The state in the emergency file, if no process has written to the store since."""
        try:
            aside = decode_as(_Aside, parse(zlib.decompress(kept)))
        except Damaged as error:
            _log.error("the emergency file is damaged and left as it is: %s", error)
            return None
        owner, seq = self._stored
        same_writer = owner == aside.position_state.owner and seq < aside.position_state.seq
        return aside.position_state if same_writer or aside.after == self._stored else None

    # Risk profiles

    async def refusal(self, signal: Signal, price: float, when_ms: int) -> tuple[str, str] | None:
        """(profile, reason) of the first validation that rejects, or None if all profiles allow.

        Raises:
            UserError: a validation returned something else than a text or None.
            Damaged, RetryLater: a profile could not be read.
        """
        self._judged = signal, price, when_ms
        for risk in self._risks:
            await self._records.read(_RISK, self._profile(risk))
            others = tuple(self._others(self._slots(risk), when_ms).values())
            reason = await judge(risk, self._identity, signal, price, when_ms, others)
            if reason:
                return risk.name, reason
        return None

    async def _read_profiles(self, position_state: PositionState) -> None:
        """Read the profiles again, and check the position that is about to be opened against them.

        Raises:
            RiskRefused: a profile rejects it.
        """
        intent = position_state.intent
        # An intent that was stored before has its reservation, and may have been filled: it is not checked again.
        opens = intent is not None and intent.order.kind in ENTRIES and intent != self.position_state.intent
        if opens and self._judged is not None:
            if refusal := await self.refusal(*self._judged):
                raise RiskRefused(*refusal)
            return
        for risk in self._risks:
            await self._records.read(_RISK, self._profile(risk))

    def _reservations(self, position_state: PositionState) -> list[Write]:
        """The writes that make the profiles count this position as it is now. They also remove expired slots; if
        nothing changes for this position, nothing is written."""
        writes, exposure, when_ms = list[Write](), position_state.exposure, position_state.seen_ms
        own = None if exposure is None else active(exposure)
        for risk in self._risks:
            slots = self._slots(risk)
            if slots.get(self._slot) != own:
                left = self._others(slots, when_ms) | ({} if own is None else {self._slot: own})
                writes += self._records.change(_RISK, self._profile(risk), encode(left), when_ms)
        return writes

    @property
    def _slot(self) -> str:
        """The name of this position in a profile."""
        return "/".join(path_of(CONTRACTS["signal"], self._scope))

    def _profile(self, risk: RiskSchema) -> Key:
        return (self._identity.exchange_name, risk.name)

    def _slots(self, risk: RiskSchema) -> _Slots:
        """The positions of a profile when it was read last.

        Raises:
            Damaged: it is not a profile.
        """
        key = self._profile(risk)
        value: Plain = self._records.value(_RISK, key)
        try:
            return decode_as(_Slots, value or {})
        except Damaged as error:
            raise Damaged(f"risk {'/'.join(map(str, key))} is not a profile of this program: {error}") from error

    def _others(self, slots: _Slots, when_ms: int) -> _Slots:
        """All slots except our own and expired ones, whose owner is gone."""
        since_ms = when_ms - self._patience_ms
        return {
            name: slot
            for name, slot in slots.items()
            if name != self._slot and since_ms < slot.opened_at_ms + slot.minutes * MINUTE_MS
        }


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Finish `work`: a cancellation meanwhile is raised afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()) is not None:
            level = logging.WARNING if isinstance(error, Conflict | Unsaved | RiskRefused) else logging.ERROR
            _log.log(level, "a write that a cancellation waited for failed: %s", error)
        raise
