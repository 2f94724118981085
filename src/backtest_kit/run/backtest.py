"""Backtest: replay a strategy over candles that have already closed."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Generator
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from backtest_kit.engine.replay import Columns, coast, next_minute
from backtest_kit.engine.step import Fill, Flat, Rules, State, Tick, admit, decision_due, step
from backtest_kit.engine.validation import check_signal
from backtest_kit.errors import UserError
from backtest_kit.market.fetch import CandleFeed
from backtest_kit.market.history import History
from backtest_kit.market.price import resample
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.event import Event, Identity, PositionClosed, RiskRejected
from backtest_kit.model.interval import CANDLE_INTERVALS, DAY_MS, INTERVAL_MS, MINUTE_MS, floor_ms, interval_ms, iso
from backtest_kit.model.signal import Signal
from backtest_kit.report.result import BacktestResult
from backtest_kit.run.blocking import run_blocking
from backtest_kit.run.context import Context
from backtest_kit.run.feeds import Feeds
from backtest_kit.run.risk import RiskRequest, first_refusal
from backtest_kit.run.schema import FrameSchema, Registry, RiskSchema, StrategySchema, check_name
from backtest_kit.settings import Settings

Gaps = Literal["error", "fill"]

_FILLS: Final = ("vwap", "ohlc")
_GAPS: Final = ("error", "fill")
_CHART_BARS: Final = 1500
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


class Control:
    """What a running backtest and its handle tell each other."""

    __slots__ = ("histories", "stopping", "when_ms")

    def __init__(self, start_ms: int) -> None:
        self.stopping = False
        self.when_ms = start_ms
        self.histories: dict[str, History] = {}
        """What has been read so far, by symbol."""


class BacktestHandle:
    """A backtest that runs in the background. `await` it for its result."""

    __slots__ = ("_control", "_job", "_task")

    def __init__(self, job: Job, control: Control, task: asyncio.Task[BacktestResult]) -> None:
        self._job = job
        self._control = control
        self._task = task

    def __await__(self) -> Generator[Any, None, BacktestResult]:
        return self._task.__await__()

    @property
    def symbol(self) -> str:
        return self._job.identity.symbol

    @property
    def progress(self) -> float:
        """How much of the frame is behind it, 0 to 1."""
        if self._task.done():
            return 1.0
        frame = self._job.frame
        return (self._control.when_ms - frame.start_ms) / (frame.stop_ms - frame.start_ms)

    def done(self) -> bool:
        """Whether it has ended: by itself, stopped, or by an error."""
        return self._task.done()

    def stop(self) -> None:
        """Open nothing more; what is open or resting is carried to its end. The result has what was done."""
        self._control.stopping = True

    def __repr__(self) -> str:
        return f"BacktestHandle({self._job.identity.strategy_name!r}, {self.symbol!r}, {self.progress:.0%})"


class BacktestRunner:
    """Runs backtests. `backtest_kit.Backtest` is the one of the default kit."""

    def __init__(
        self,
        registry: Registry,
        feeds: Feeds,
        settings: Callable[[], Settings],
        now_ms: Callable[[], int],
        report_path: Callable[[], Path],
    ) -> None:
        self._registry = registry
        self._feeds = feeds
        self._settings = settings
        self._now_ms = now_ms
        self._report_path = report_path

    async def run(
        self,
        symbol: str,
        *,
        strategy_name: str,
        exchange_name: str,
        frame_name: str,
        fill: Fill = "vwap",
        gaps: Gaps = "error",
    ) -> AsyncIterator[Event]:
        """Replay, yielding each event as it happens: opened, closed, scheduled, cancelled, rejected.

        Args:
            fill: "vwap" touches levels by the current price; "ohlc" by the wicks, stop before take.
            gaps: "error" refuses candles with missing minutes; "fill" puts flat candles there.

        Raises:
            UserError: bad names, options, candles or signals.
            Exception: whatever the strategy raises, with its own traceback.
        """
        job = self._job(symbol, strategy_name, exchange_name, frame_name, fill, gaps)
        async with self._feeds.use(exchange_name, job.settings) as feed:
            async for event in replay(job, feed, Control(job.frame.start_ms)):
                yield event

    def background(
        self,
        symbol: str,
        *,
        strategy_name: str,
        exchange_name: str,
        frame_name: str,
        fill: Fill = "vwap",
        gaps: Gaps = "error",
    ) -> BacktestHandle:
        """Start a backtest on the running event loop and return its handle. Arguments as for `run`.

        Raises:
            UserError: bad names or options, or no event loop runs in this thread.
        """
        job = self._job(symbol, strategy_name, exchange_name, frame_name, fill, gaps)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise UserError(
                "Backtest.background needs a running event loop: call it inside an async function, or use run_sync"
            ) from None
        control = Control(job.frame.start_ms)
        task = loop.create_task(self._collect(job, control), name=f"backtest {strategy_name} {symbol}")
        return BacktestHandle(job, control, task)

    def run_sync(
        self,
        symbol: str,
        *,
        strategy_name: str,
        exchange_name: str,
        frame_name: str,
        fill: Fill = "vwap",
        gaps: Gaps = "error",
    ) -> BacktestResult:
        """Run a backtest to its end and return its result. Arguments and errors as for `run`."""
        job = self._job(symbol, strategy_name, exchange_name, frame_name, fill, gaps)
        return run_blocking(lambda: self._collect(job, Control(job.frame.start_ms)))

    async def _collect(self, job: Job, control: Control) -> BacktestResult:
        async with self._feeds.use(job.identity.exchange_name, job.settings) as feed:
            trades = [event.trade async for event in replay(job, feed, control) if isinstance(event, PositionClosed)]
        frame, histories = job.frame, control.histories
        candles = histories[job.identity.symbol].candles.between(frame.start_ms, frame.stop_ms)
        return BacktestResult(
            symbol=job.identity.symbol,
            strategy_name=job.identity.strategy_name,
            exchange_name=job.identity.exchange_name,
            frame_name=job.identity.frame_name,
            start_ms=frame.start_ms,
            stop_ms=frame.stop_ms,
            trades=tuple(trades),
            chart=_chart(candles),
            gaps_filled=sum(each.filled for each in histories.values()),
            candles_used=sum(len(each.candles) for each in histories.values()),
            candles_fetched=sum(each.fetched for each in histories.values()),
            report_path=self._report_path(),
            show_note=job.settings.CC_REPORT_SHOW_SIGNAL_NOTE,
        )

    def _job(self, symbol: str, strategy_name: str, exchange_name: str, frame_name: str, fill: Fill, gaps: Gaps) -> Job:
        check_name("symbol", symbol)
        if fill not in _FILLS:
            raise UserError(f"fill is {fill!r}: use one of {', '.join(_FILLS)}")
        if gaps not in _GAPS:
            raise UserError(f"gaps is {gaps!r}: use one of {', '.join(_GAPS)}")
        settings = self._settings()
        self._registry.exchanges.get(exchange_name)
        strategy = self._registry.strategies.get(strategy_name)
        frame = self._registry.frames.get(frame_name)
        newest = floor_ms(self._now_ms(), MINUTE_MS)
        if frame.start_ms >= newest:
            raise UserError(f"frame {frame.name!r} starts at {iso(frame.start_ms)}, which is yet to come")
        frame = msgspec.structs.replace(frame, stop_ms=min(frame.stop_ms, newest))
        identity = Identity(symbol, strategy_name, exchange_name, frame_name, "backtest")
        return Job(
            identity=identity,
            strategy=strategy,
            risks=tuple(self._registry.risks.get(name) for name in strategy.risk_names),
            frame=frame,
            settings=settings,
            rules=Rules(
                identity=identity,
                settings=settings,
                fill=fill,
                interval_ms=interval_ms(strategy.interval),
                start_ms=frame.start_ms,
                grid_ms=interval_ms(frame.interval),
                stop_ms=frame.stop_ms,
            ),
            gaps=gaps,
        )


async def replay(job: Job, feed: CandleFeed, control: Control) -> AsyncIterator[Event]:
    """Walk through the frame from event to event."""
    rules, frame, symbol = job.rules, job.frame, job.identity.symbol
    histories = control.histories

    async def history_of(name: str) -> History:
        if name not in histories:
            histories[name] = await History.load(
                feed,
                name,
                frame.start_ms,
                frame.stop_ms,
                gaps=job.gaps,
                price_window=job.settings.CC_AVG_PRICE_CANDLES_COUNT,
            )
        return histories[name]

    history = await history_of(symbol)
    state: State = Flat()
    when_ms = frame.start_ms - MINUTE_MS
    turn_ends = time.perf_counter() + _LONGEST_TURN_S
    while when_ms < frame.stop_ms:
        if control.stopping and isinstance(state, Flat):
            return
        columns = _columns(history)
        until_ms = next_minute(state, columns, when_ms, rules)
        state = coast(state, columns, when_ms, until_ms, rules)
        control.when_ms = when_ms = until_ms
        tick = columns.tick(when_ms)
        events: tuple[Event, ...] = ()
        if not isinstance(state, Flat):
            state, events = step(state, tick, rules)
        elif decision_due(state, when_ms, rules):
            signal, rejected = await decide(job, tick, history_of)
            state, events = admit(state, signal, tick, rules)
            events = (*rejected, *events)
        for event in events:
            yield event
        if time.perf_counter() >= turn_ends:
            await asyncio.sleep(0)
            turn_ends = time.perf_counter() + _LONGEST_TURN_S


async def decide(
    job: Job, tick: Tick, history_of: Callable[[str], Any]
) -> tuple[Signal | None, tuple[RiskRejected, ...]]:
    """Ask the strategy, check its answer and ask the risk profiles about it."""
    identity, settings = job.identity, job.settings
    signal = await _ask(job, Context(identity, tick.when_ms, tick.price, history_of))
    if signal is None:
        return None, ()
    check_signal(signal, identity, tick.price, tick.when_ms, settings)
    request = RiskRequest(identity=identity, signal=signal, price=tick.price, when_ms=tick.when_ms)
    for risk in job.risks:
        reason = await first_refusal(risk, request)
        if reason:
            rejected = RiskRejected(
                identity=identity,
                when_ms=tick.when_ms,
                price=tick.price,
                signal=signal,
                risk_name=risk.name,
                reason=reason,
            )
            return None, (rejected,)
    return signal, ()


async def _ask(job: Job, context: Context) -> Signal | None:
    seconds = job.settings.CC_MAX_SIGNAL_GENERATION_SECONDS
    answer: object = job.strategy.get_signal(context)
    if inspect.isawaitable(answer):
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                answer = await answer
        except TimeoutError:
            if not deadline.expired():
                raise
            raise UserError(
                f"get_signal of strategy {job.strategy.name!r} took longer than {seconds:g} s for "
                f"{context.symbol} at {iso(context.when_ms)}: raise CC_MAX_SIGNAL_GENERATION_SECONDS or do less"
            ) from None
    if answer is None or isinstance(answer, Signal):
        return answer
    raise UserError(
        f"get_signal of strategy {job.strategy.name!r} returned {answer!r} for {context.symbol} at "
        f"{iso(context.when_ms)}: return a backtest_kit.Signal or None"
    )


def _columns(history: History) -> Columns:
    candles = history.candles
    return Columns(history.first_ms, history.prices, candles.open, candles.high, candles.low, candles.close)


def _chart(candles: CandleSeries) -> CandleSeries:
    """The candles at the finest interval that keeps a chart readable; partial buckets at the ends are left out."""
    steps = [INTERVAL_MS[name] for name in CANDLE_INTERVALS]
    steps += [DAY_MS * days for days in (7, 28, 364)]
    step_ms = next((each for each in steps if len(candles) * MINUTE_MS <= each * _CHART_BARS), steps[-1])
    if not len(candles):
        return candles
    first, end = int(candles.timestamp[0]), int(candles.timestamp[-1]) + MINUTE_MS
    return resample(candles.between(-(-first // step_ms) * step_ms, floor_ms(end, step_ms)), step_ms)
