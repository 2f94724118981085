"""One replay: go through a frame from event to event, call the strategy, publish the events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Final

import msgspec

from backtest_kit.engine.replay import coast, next_minute
from backtest_kit.engine.step import Flat, Resting, Rules
from backtest_kit.market.fetch import CandleFeed, GapRule
from backtest_kit.market.history import History
from backtest_kit.market.repair import DirtyRule
from backtest_kit.model.decisions import Decisions
from backtest_kit.model.event import (
    EntryCancelled,
    EntryScheduled,
    Event,
    PositionClosed,
    PositionOpened,
    Progress,
)
from backtest_kit.model.identity import Identity
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.position import Trade
from backtest_kit.records import RunRecords
from backtest_kit.run.feeds import columns_of
from backtest_kit.run.minute import Minute, RunHooks
from backtest_kit.run.program import Program
from backtest_kit.run.risk import RiskSeat
from backtest_kit.run.run_state import RunState
from backtest_kit.run.schema import FrameSchema, RiskSchema, StrategySchema
from backtest_kit.settings import Settings

# A replay rarely awaits anything: without a pause of its own it would starve every other task.
_LONGEST_TURN_S: Final = 0.01


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One backtest, resolved: every name looked up, every option checked."""

    identity: Identity
    strategy: StrategySchema
    risks: tuple[RiskSchema, ...]
    frame: FrameSchema
    settings: Settings
    rules: Rules
    gaps: GapRule
    dirty: DirtyRule
    run_id: str
    """The run id of the records that it reads and writes."""
    is_named: bool
    """The caller chose the id, so another process may use the same one."""


class Control:
    """What a running backtest and its handle share."""

    __slots__ = ("decisions", "histories", "paused", "stopping", "trades", "when_ms")

    def __init__(self, start_ms: int) -> None:
        self.stopping = False
        self.paused = False
        self.when_ms = start_ms
        self.histories: dict[str, History] = {}
        """What has been read so far, by symbol."""
        self.trades: list[Trade] = []
        self.decisions = Decisions()


class Replay(RunHooks):
    """A replay in progress. `events` walks through it, once."""

    def __init__(
        self,
        job: Job,
        control: Control,
        feed: CandleFeed,
        program: Program,
        seat: RiskSeat | None,
        records: RunRecords,
    ) -> None:
        self._job = job
        self._control = control
        self._feed = feed
        self._bus = program.bus
        self._cron = program.cron
        self._seat = seat
        self._records = records
        self._run_state = RunState(job.rules)
        self._minute = Minute(self._run_state, job.strategy, program, seat, control, self._history_of, records, self)
        control.decisions = self._minute.decisions
        self._percent = -1
        self._loading = asyncio.Lock()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield every event of a position's life as it happens, after its handlers have run."""
        frame, rules, symbol = self._job.frame, self._job.rules, self._job.identity.symbol
        run_state, control, cron, minute = self._run_state, self._control, self._cron, self._minute
        history = await self._history_of(symbol)
        seen, columns = history.candles, columns_of(history)
        when_ms = frame.start_ms - MINUTE_MS
        turn_ends = time.perf_counter() + _LONGEST_TURN_S
        while when_ms < frame.stop_ms:
            if control.stopping and self._wind_up():
                return
            wanted = minute.wanted()
            if history.candles is not seen:
                seen, columns = history.candles, columns_of(history)
            until_ms = next_minute(run_state.state, columns, when_ms, rules, wanted)
            boundary_ms = cron.next_boundary(when_ms, symbol)
            if boundary_ms is not None and boundary_ms < until_ms:
                until_ms = columns.real_from(boundary_ms, until_ms)
            run_state.state = coast(run_state.state, columns, when_ms, until_ms, rules)
            run_state.tick = columns.tick(until_ms)
            since_ms, control.when_ms = when_ms, until_ms
            when_ms = until_ms
            if self._seat is not None:
                await self._seat.turn(when_ms)
            happened: list[Event] = []
            await minute.act(wanted, happened, since_ms=since_ms)
            if Progress in wanted:
                await self._publish_progress()
            if happened:
                await self._records.observe(happened)
            for event in happened:
                yield event
            if time.perf_counter() >= turn_ends:
                await self._records.take_breath()
                turn_ends = time.perf_counter() + _LONGEST_TURN_S

    def on_event(self, event: Event) -> None:
        if isinstance(event, PositionClosed):
            self._control.trades.append(event.trade)
        if self._seat is None:
            return
        if isinstance(event, PositionOpened):
            self._seat.hold(event.position)
        elif isinstance(event, EntryScheduled):
            self._seat.hold(event.entry)
        elif isinstance(event, PositionClosed | EntryCancelled):
            self._seat.release()

    async def _publish_progress(self) -> None:
        frame, when_ms = self._job.frame, self._run_state.tick.when_ms
        fraction = (when_ms - frame.start_ms) / (frame.stop_ms - frame.start_ms)
        if int(fraction * 100) > self._percent:
            self._percent = int(fraction * 100)
            progress = Progress(identity=self._job.identity, when_ms=when_ms, fraction=fraction)
            await self._bus.emit(progress, self._minute.context())

    def _wind_up(self) -> bool:
        """After a stop: cancel a resting entry, and return True once no position is open."""
        run_state = self._run_state
        if isinstance(run_state.state, Resting):
            run_state.state = msgspec.structs.replace(run_state.state, order="cancel")
        return isinstance(run_state.state, Flat)

    async def _history_of(self, symbol: str) -> History:
        histories, frame = self._control.histories, self._job.frame
        if symbol not in histories:
            async with self._loading:
                # Another reader may have loaded it while this one waited.
                if symbol not in histories:
                    histories[symbol] = await History.load(
                        self._feed,
                        symbol,
                        frame.start_ms,
                        frame.stop_ms,
                        gaps=self._job.gaps,
                        dirty=self._job.dirty,
                        price_window=self._job.settings.CC_AVG_PRICE_CANDLES_COUNT,
                    )
        return histories[symbol]
