"""One replay: walk through a frame from event to event, ask the strategy, tell who listens."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from types import CoroutineType
from typing import Final, Literal

import msgspec

from backtest_kit.engine.replay import Columns, coast, next_minute
from backtest_kit.engine.step import Flat, Resting, Rules, Wanted, activates, admit, decision_due, step
from backtest_kit.engine.validation import check_signal
from backtest_kit.errors import UserError
from backtest_kit.events import EventBus
from backtest_kit.market.fetch import CandleFeed
from backtest_kit.market.history import History
from backtest_kit.model.event import (
    BreakevenReached,
    EntryCancelled,
    EntryScheduled,
    EntryWaiting,
    Event,
    FallReached,
    Identity,
    LevelReached,
    PeakReached,
    PositionActive,
    PositionClosed,
    PositionOpened,
    Progress,
    RiskRejected,
)
from backtest_kit.model.interval import MINUTE_MS, iso
from backtest_kit.model.position import RestingEntry, Trade
from backtest_kit.model.signal import Signal
from backtest_kit.records import RunRecords
from backtest_kit.run.context import Context
from backtest_kit.run.cron import Cron
from backtest_kit.run.deadline import within
from backtest_kit.run.desk import Desk
from backtest_kit.run.risk import RiskSeat
from backtest_kit.run.schema import FrameSchema, RiskSchema, StrategySchema
from backtest_kit.settings import Settings

Gaps = Literal["error", "fill"]

_ON_DEMAND: Final = (
    PositionActive,
    EntryWaiting,
    LevelReached,
    BreakevenReached,
    PeakReached,
    FallReached,
    Progress,
)
"""Events that are only made where somebody listens: each of them stops the skip-ahead more often."""
# A replay rarely waits for anything: without a pause of its own it would starve every other task.
_LONGEST_TURN_S: Final = 0.01


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One backtest, resolved: every name looked up, every option checked."""

    identity: Identity
    strategy: StrategySchema
    risks: tuple[RiskSchema, ...]
    frame: FrameSchema
    settings: Settings
    rules: Rules
    gaps: Gaps
    run_id: str
    """Whose records it reads and writes."""


class Control:
    """What a running backtest and its handle tell each other."""

    __slots__ = ("histories", "paused", "stopping", "trades", "when_ms")

    def __init__(self, start_ms: int) -> None:
        self.stopping = False
        self.paused = False
        self.when_ms = start_ms
        self.histories: dict[str, History] = {}
        """What has been read so far, by symbol."""
        self.trades: list[Trade] = []


class Replay:
    """A replay in progress. `events` walks through it, once."""

    def __init__(
        self,
        job: Job,
        control: Control,
        feed: CandleFeed,
        bus: EventBus,
        cron: Cron,
        seat: RiskSeat | None,
        records: RunRecords,
    ) -> None:
        self._job = job
        self._control = control
        self._feed = feed
        self._bus = bus
        self._cron = cron
        self._seat = seat
        self._records = records
        self._desk = Desk(job.rules)
        self._wanted: Wanted = frozenset()
        self._bus_version = -1
        self._percent = -1
        self._loading = asyncio.Lock()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Every event of a position's life, as it happens; handlers have been told before it is yielded."""
        frame, rules, symbol = self._job.frame, self._job.rules, self._job.identity.symbol
        desk, control, cron = self._desk, self._control, self._cron
        history = await self._history_of(symbol)
        seen, columns = history.candles, _columns(history)
        when_ms = frame.start_ms - MINUTE_MS
        turn_ends = time.perf_counter() + _LONGEST_TURN_S
        while when_ms < frame.stop_ms:
            if control.stopping and self._wind_up():
                return
            wanted = self._look_who_listens()
            if history.candles is not seen:
                seen, columns = history.candles, _columns(history)
            until_ms = next_minute(desk.state, columns, when_ms, rules, wanted)
            boundary_ms = cron.next_boundary(when_ms, symbol)
            if boundary_ms is not None:
                until_ms = min(until_ms, boundary_ms)
            desk.state = coast(desk.state, columns, when_ms, until_ms, rules)
            desk.tick = columns.tick(until_ms)
            control.when_ms = when_ms = until_ms
            if self._seat is not None:
                await self._seat.turn(when_ms)
            told = await self._minute(wanted, at_boundary=when_ms == boundary_ms)
            if told:
                await self._records.observe(told)
            for event in told:
                yield event
            if time.perf_counter() >= turn_ends:
                await self._records.take_breath()
                turn_ends = time.perf_counter() + _LONGEST_TURN_S

    async def _minute(self, wanted: Wanted, *, at_boundary: bool) -> list[Event]:
        """Act at the minute that the desk shows, tell who listens, and return what happened for good.

        The market comes first: nobody's command can undo what this minute's range has touched. Then cron,
        whose work a decision of the same minute may build on, and last the strategy.
        """
        desk, told = self._desk, list[Event]()
        was_flat = isinstance(desk.state, Flat)
        if not was_flat:
            rejected = () if self._seat is None else await self._check_activation(self._seat)
            desk.state, happened = step(desk.state, desk.tick, self._job.rules, wanted)
            for event in (*rejected, *happened):
                await self._tell(event, told)
        if at_boundary:
            fire = partial(self._cron.fire, desk.tick.when_ms, self._job.identity, self._context())
            await self._by_user("a cron handler", fire)
            await self._tell_commands(told)
        if was_flat and isinstance(desk.state, Flat) and self._asks(desk.state):
            for event in await self._decide(desk.state):
                await self._tell(event, told)
        if self._job.strategy.manage is not None and not isinstance(desk.state, Flat):
            await self._by_user("manage", partial(self._job.strategy.manage, self._context()))
            await self._tell_commands(told)
        if Progress in wanted:
            await self._tell_progress()
        return told

    async def _tell(self, event: Event, told: list[Event]) -> None:
        """Count an event, hand it to its listeners, and go on with what their commands have caused."""
        self._account(event)
        if not isinstance(event, _ON_DEMAND):
            told.append(event)
        if self._bus.listened:
            await self._by_user("a handler", partial(self._bus.emit, event, self._context()))
            await self._tell_commands(told)

    async def _tell_commands(self, told: list[Event]) -> None:
        for caused in self._desk.take_events():
            await self._tell(caused, told)

    def _account(self, event: Event) -> None:
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

    async def _tell_progress(self) -> None:
        frame, when_ms = self._job.frame, self._desk.tick.when_ms
        fraction = (when_ms - frame.start_ms) / (frame.stop_ms - frame.start_ms)
        if int(fraction * 100) > self._percent:
            self._percent = int(fraction * 100)
            progress = Progress(identity=self._job.identity, when_ms=when_ms, fraction=fraction)
            await self._bus.emit(progress, self._context())

    def _wind_up(self) -> bool:
        """Told to stop: true if nothing is held; a resting entry is given up, a position goes on to its end."""
        desk = self._desk
        if isinstance(desk.state, Resting):
            desk.state = msgspec.structs.replace(desk.state, order="cancel")
        return isinstance(desk.state, Flat)

    def _look_who_listens(self) -> Wanted:
        if self._bus_version != self._bus.version:
            self._bus_version = self._bus.version
            identity = self._job.identity
            wanted = {
                kind
                for kind in _ON_DEMAND
                if self._bus.wanted(kind, symbol=identity.symbol, strategy_name=identity.strategy_name)
            }
            if self._job.strategy.manage is not None:
                wanted |= {PositionActive, EntryWaiting}
            self._wanted = frozenset(wanted)
        return self._wanted

    async def _check_activation(self, seat: RiskSeat) -> tuple[Event, ...]:
        """A resting entry that is reached asks its risk profiles once more: the world has moved on since."""
        desk = self._desk
        if not isinstance(desk.state, Resting) or not activates(desk.state, desk.tick, self._job.rules):
            return ()
        signal = _as_signal(desk.state.entry)
        refusal = await self._refusal(signal, seat)
        if refusal:
            desk.state = msgspec.structs.replace(desk.state, order="refuse")
        return refusal

    def _asks(self, state: Flat) -> bool:
        return not self._control.paused and decision_due(state, self._desk.tick.when_ms, self._job.rules)

    async def _decide(self, state: Flat) -> tuple[Event, ...]:
        """Ask the strategy, check its answer, ask the risk profiles about it, and act on it."""
        desk, job = self._desk, self._job
        signal, rejected = await self._ask(), tuple[Event, ...]()
        if self._control.stopping:
            signal = None
        if signal is not None:
            check_signal(signal, job.identity, desk.tick.price, desk.tick.when_ms, job.settings)
            rejected = () if self._seat is None else await self._refusal(signal, self._seat)
        desk.state, admitted = admit(state, None if rejected else signal, desk.tick, job.rules)
        return (*rejected, *admitted)

    async def _refusal(self, signal: Signal, seat: RiskSeat) -> tuple[Event, ...]:
        tick = self._desk.tick
        refusal = await seat.refusal(signal, tick.price, tick.when_ms)
        if refusal is None:
            return ()
        risk_name, reason = refusal
        return (
            RiskRejected(
                identity=self._job.identity,
                when_ms=tick.when_ms,
                price=tick.price,
                signal=signal,
                risk_name=risk_name,
                reason=reason,
            ),
        )

    async def _ask(self) -> Signal | None:
        strategy, context = self._job.strategy, self._context()
        seconds = self._job.settings.CC_MAX_SIGNAL_GENERATION_SECONDS
        deadline = asyncio.timeout(seconds)
        try:
            answer = await self._by_user("get_signal", partial(strategy.get_signal, context), deadline)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise UserError(
                f"{self._place('get_signal')} took longer than {seconds:g} s: "
                "raise CC_MAX_SIGNAL_GENERATION_SECONDS or do less"
            ) from None
        if answer is None or isinstance(answer, Signal):
            return answer
        raise UserError(f"{self._place('get_signal')} returned {answer!r}: return a backtest_kit.Signal or None")

    async def _by_user(self, what: str, call: Callable[[], object], deadline: asyncio.Timeout | None = None) -> object:
        """What the user's function returns, awaited if need be.

        Raises:
            UserError: it raised what would end a loop or a process that is not its own.
            Exception: what else it raised.
        """
        try:
            answer = call()
            if type(answer) is not CoroutineType and not inspect.isawaitable(answer):
                return answer
            return await (answer if deadline is None else within(deadline, answer))
        except (StopIteration, StopAsyncIteration, SystemExit) as error:
            raise UserError(f"{self._place(what)} raised {type(error).__name__}") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise UserError(f"{self._place(what)} raised CancelledError, and nobody had cancelled it") from error

    def _place(self, what: str) -> str:
        identity = self._job.identity
        return f"{what} of strategy {identity.strategy_name!r} for {identity.symbol} at {iso(self._desk.tick.when_ms)}"

    def _context(self) -> Context:
        return Context(self._job.identity, self._desk, self._history_of, self._records)

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
                        price_window=self._job.settings.CC_AVG_PRICE_CANDLES_COUNT,
                    )
        return histories[symbol]


def _as_signal(entry: RestingEntry) -> Signal:
    return Signal(
        position=entry.position,
        price_take_profit=entry.price_take_profit,
        price_stop_loss=entry.price_stop_loss,
        price_open=entry.price_open,
        minutes=entry.minutes,
        cost=entry.cost,
        note=entry.note,
        id=entry.signal_id,
    )


def _columns(history: History) -> Columns:
    candles = history.candles
    return Columns(history.first_ms, history.prices, candles.open, candles.high, candles.low, candles.close)
