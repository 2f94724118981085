"""Backtest: replay a strategy over candles that have already closed."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import aclosing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict, Unpack

import msgspec

from backtest_kit.engine.step import FillModel, Rules
from backtest_kit.errors import BacktestKitError, UserError
from backtest_kit.market.fetch import GapRule
from backtest_kit.market.price import resample
from backtest_kit.market.repair import DirtyRule, dirty_rule
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.event import Event, RunDone, RunFailed
from backtest_kit.model.identity import Identity
from backtest_kit.model.interval import (
    CANDLE_INTERVALS,
    DAY_MS,
    INTERVAL_MS,
    MINUTE_MS,
    floor_ms,
    interval_ms,
    iso,
    to_datetime,
)
from backtest_kit.records import RunRecords
from backtest_kit.records.exclusive import owned_by
from backtest_kit.run.blocking import run_blocking
from backtest_kit.run.cron import Cron
from backtest_kit.run.program import Program
from backtest_kit.run.replay.replay import Control, Job, Replay
from backtest_kit.run.risk import RiskBook, RiskSeat
from backtest_kit.run.schema import StrategySchema, check_choice, check_name

if TYPE_CHECKING:
    from backtest_kit.report.result import BacktestResult

_log = logging.getLogger(__name__)

_CHART_BARS: Final = 1500


class _Announced:
    """Registers a run with its cron scope and risk group, from before its first minute until it ends.

    Runs that start together see each other from the start, however fast the first of them is.
    """

    def __init__(self, job: Job, cron: Cron, seat: RiskSeat | None, under_way: set[tuple[str, ...]]) -> None:
        self.seat = seat
        self._identity = job.identity
        self._run = _run_of(job)
        self._under_way = under_way
        self._cron: Cron | None = cron
        cron.begin(job.identity)
        under_way.add(self._run)

    def take_back(self) -> None:
        """Unregister the run. Idempotent."""
        cron, self._cron = self._cron, None
        if cron is not None:
            cron.end(self._identity)
            self._under_way.remove(self._run)
        if self.seat is not None:
            self.seat.leave()


class ReplayOptions(TypedDict, total=False):
    """How candles are replayed: the options shared by `Backtest` and `Walker`."""

    fill: FillModel
    """"vwap" (default) touches levels by the current price; "ohlc" by the wicks, stop before take."""
    gaps: GapRule
    """"error" (default) refuses candles with missing minutes; "fill" puts flat candles there."""
    dirty: DirtyRule | None
    """What to do with bad rows of the source: "refuse" raises an error that names the first one, "repair" fixes what is
    certain, and counts and logs it. A row off the whole minute moves up to the next one, the first of several rows for
    one minute counts, rows are sorted, and the minute of any other bad row is missing. Default:
    "repair" with gaps="fill", else "refuse"."""


class BacktestOptions(ReplayOptions, total=False):
    """Options of a backtest, besides its names."""

    run_id: str | None
    """The run whose state, session, memory and interval records are used. By default a run has a new id and starts
    empty; with the id of an earlier run it continues with the records of that run."""


class BacktestHandle:
    """A backtest that runs in the background. `await` it for its result."""

    __slots__ = ("_control", "_job", "task")

    task: asyncio.Task[BacktestResult]
    """The task that runs it."""

    def __init__(self, job: Job, control: Control, task: asyncio.Task[BacktestResult]) -> None:
        self._job = job
        self._control = control
        self.task = task

    def __await__(self) -> Generator[Any, None, BacktestResult]:
        return self.task.__await__()

    @property
    def symbol(self) -> str:
        return self._job.identity.symbol

    @property
    def run_id(self) -> str:
        """The run id of the records that it reads and writes."""
        return self._job.run_id

    @property
    def progress(self) -> float:
        """How much of the frame has been replayed, 0 to 1."""
        if self.task.done():
            return 1.0
        frame = self._job.frame
        return (self._control.when_ms - frame.start_ms) / (frame.stop_ms - frame.start_ms)

    def done(self) -> bool:
        """Whether it has ended: finished, stopped or failed."""
        return self.task.done()

    def stop(self) -> None:
        """Stop opening positions: cancel a resting entry, and wait for an open position to close."""
        self._control.stopping = True

    def cancel(self) -> None:
        """End it immediately, with positions still open; awaiting it raises `asyncio.CancelledError`."""
        self.task.cancel()

    def pause(self) -> None:
        """Do not call `get_signal` until `resume`; open positions and resting entries go on."""
        self._control.paused = True

    def resume(self) -> None:
        """Call `get_signal` again."""
        self._control.paused = False

    def __repr__(self) -> str:
        return f"BacktestHandle({self._job.identity.strategy_name!r}, {self.symbol!r}, {self.progress:.0%})"


class BacktestRunner:
    """Runs backtests. `backtest_kit.Backtest` is the one of the default kit."""

    def __init__(self, program: Program, now_ms: Callable[[], int], report_path: Callable[[], Path]) -> None:
        self.program = program
        self._under_way: set[tuple[str, ...]] = set()
        self._risks = RiskBook()
        self._now_ms = now_ms
        self._report_path = report_path

    async def run(
        self,
        symbol: str,
        *,
        strategy_name: str,
        exchange_name: str,
        frame_name: str,
        **options: Unpack[BacktestOptions],
    ) -> AsyncIterator[Event]:
        """Replay, yielding each event as it happens: opened, closed, scheduled, cancelled, rejected.

        The options are those of `BacktestOptions`.

        Raises:
            UserError: bad names, options, candles or signals.
            Conflict: another process replays this strategy on this symbol under the same `run_id`.
            Exception: whatever the strategy raises, with its own traceback.

        Runs that share a risk profile or a cron job wait for each other: loop over each of them in a task
        of its own, and to its end, or close it (`contextlib.aclosing`).
        """
        job = self.job(symbol, strategy_name, exchange_name, frame_name, **options)
        async with aclosing(self._replay(job, Control(job.frame.start_ms), self._announce(job))) as events:
            async for event in events:
                yield event

    def background(
        self,
        symbol: str,
        *,
        strategy_name: str,
        exchange_name: str,
        frame_name: str,
        **options: Unpack[BacktestOptions],
    ) -> BacktestHandle:
        """Start a backtest on the running event loop and return its handle. Takes the arguments of `run`.

        Raises:
            UserError: bad names or options, no event loop runs in this thread, or the run is already running.
        """
        return self.start(self.job(symbol, strategy_name, exchange_name, frame_name, **options))

    def start(self, job: Job) -> BacktestHandle:
        """Start a resolved backtest on the running event loop, as `background` does."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise UserError(
                "Backtest.background needs a running event loop: call it inside an async function, or use run_sync"
            ) from None
        control, announced = Control(job.frame.start_ms), self._announce(job)
        name = f"backtest {job.identity.strategy_name} {job.identity.symbol}"
        task = loop.create_task(self._collect(job, control, announced), name=name)
        # A task cancelled before its first step never runs its own clean-up.
        task.add_done_callback(lambda _: announced.take_back())
        return BacktestHandle(job, control, task)

    def run_sync(
        self,
        symbol: str,
        *,
        strategy_name: str,
        exchange_name: str,
        frame_name: str,
        **options: Unpack[BacktestOptions],
    ) -> BacktestResult:
        """Run a backtest to its end and return its result. Takes the arguments and raises the errors of `run`."""
        job = self.job(symbol, strategy_name, exchange_name, frame_name, **options)

        return run_blocking(lambda: self.start(job), self.leave_loop)

    async def leave_loop(self) -> None:
        """Close what belongs to the event loop of a blocking call, which ends."""
        await self.program.records.leave_loop()

    async def _replay(self, job: Job, control: Control, announced: _Announced) -> AsyncGenerator[Event, None]:
        """Yield the events of a run, and publish how it ended."""
        records = self.program.records.of_run(job.identity, job.run_id)
        if announced.seat is not None:
            announced.seat.enter()
        try:
            async with (
                records.alone() if job.is_named else nullcontext(),
                self.program.feeds.use(job.identity.exchange_name, job.settings) as feed,
            ):
                replay = Replay(job, control, feed, self.program, announced.seat, records)
                async with aclosing(replay.events()) as events:
                    async for event in events:
                        yield event
                await records.settle()
                await _end(records)
                await self.program.bus.emit(_done(job, control))
        except asyncio.CancelledError:
            await self.program.bus.emit(_done(job, control, cancelled=True))
            raise
        except Exception as error:
            failed = RunFailed(identity=job.identity, when_ms=control.when_ms, error=error)
            await _end(records, failed)
            await self.program.bus.emit(failed)
            raise
        finally:
            announced.take_back()

    def _announce(self, job: Job) -> _Announced:
        identity = job.identity
        if _run_of(job) in self._under_way:
            raise UserError(
                f"run {job.run_id!r} of strategy {identity.strategy_name!r} for {identity.symbol} is already running, "
                "and a second run would overwrite its records: wait for it, or choose another run_id"
            )
        # A cron job runs once for all runs of a frame, so no run may be past the boundary at which it runs.
        shares = bool(job.risks) or bool(self.program.cron)
        seat = self._risks.join(identity, job.risks, job.frame.start_ms) if shares else None
        return _Announced(job, self.program.cron, seat, self._under_way)

    async def _collect(self, job: Job, control: Control, announced: _Announced) -> BacktestResult:
        async for _ in self._replay(job, control, announced):
            pass
        from backtest_kit.report.result import BacktestResult
        from backtest_kit.run.replay.setup import setup_of

        frame, histories = job.frame, control.histories
        candles = histories[job.identity.symbol].candles.between(frame.start_ms, frame.stop_ms)
        return BacktestResult(
            symbol=job.identity.symbol,
            strategy_name=job.identity.strategy_name,
            exchange_name=job.identity.exchange_name,
            frame_name=job.identity.frame_name,
            run_id=job.run_id,
            start_ms=frame.start_ms,
            stop_ms=control.when_ms,
            trades=tuple(control.trades),
            chart=_chart(candles),
            gaps_filled={name: each.filled for name, each in histories.items() if each.filled},
            repairs={name: each.repairs for name, each in histories.items() if each.repairs},
            stopped=control.when_ms < frame.stop_ms,
            candles_used=sum(len(each.candles) for each in histories.values()),
            candles_fetched=sum(each.fetched for each in histories.values()),
            report_path=self._report_path(),
            show_note=job.settings.CC_REPORT_SHOW_SIGNAL_NOTE,
            decisions=control.decisions,
            setup=setup_of(job, histories[job.identity.symbol].candles),
        )

    def job(
        self,
        symbol: str,
        strategy: str | StrategySchema,
        exchange_name: str,
        frame_name: str,
        fill: FillModel = "vwap",
        gaps: GapRule = "error",
        dirty: DirtyRule | None = None,
        run_id: str | None = None,
    ) -> Job:
        """Resolve one backtest, of a registered strategy or of an unregistered schema.

        Raises:
            UserError: bad names or options.
        """
        check_name("symbol", symbol)
        check_choice("fill", fill, FillModel)
        check_choice("gaps", gaps, GapRule)
        registry, settings = self.program.registry, self.program.settings()
        registry.exchanges.get(exchange_name)
        strategy = registry.strategy(strategy)
        frame = registry.frames.get(frame_name)
        newest = floor_ms(self._now_ms(), MINUTE_MS)
        if frame.start_ms >= newest:
            raise UserError(f"frame {frame.name!r} starts at {iso(frame.start_ms)}, which is in the future")
        frame = msgspec.structs.replace(frame, stop_ms=min(frame.stop_ms, newest))
        identity = Identity(symbol, strategy.name, exchange_name, frame_name, "backtest")
        return Job(
            identity=identity,
            strategy=strategy,
            risks=registry.risks_of(strategy),
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
            dirty=dirty_rule(dirty, gaps),
            run_id=self._new_run_id() if run_id is None else check_name("run_id", run_id),
            is_named=run_id is not None,
        )

    def _new_run_id(self) -> str:
        """A unique id that sorts by the start time of the run."""
        return f"{to_datetime(self._now_ms()):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def _run_of(job: Job) -> tuple[str, ...]:
    """What identifies a run: no two concurrent runs may have the same."""
    return job.run_id, *owned_by(job.identity)


async def _end(records: RunRecords, *events: Event) -> None:
    """Write records and log. If that fails, log it: the result, or the error that ended the run, comes first."""
    try:
        await records.observe(events)
        await records.end()
    except BacktestKitError as error:
        _log.warning("records of this run are not written yet: %s", error)


def _done(job: Job, control: Control, *, cancelled: bool = False) -> RunDone:
    return RunDone(identity=job.identity, when_ms=control.when_ms, trades=tuple(control.trades), cancelled=cancelled)


def _chart(candles: CandleSeries) -> CandleSeries:
    """The candles at the finest interval that keeps a chart readable; partial buckets at the ends are left out."""
    steps = [INTERVAL_MS[name] for name in CANDLE_INTERVALS]
    steps += [DAY_MS * days for days in (7, 28, 364)]
    step_ms = next((each for each in steps if len(candles) * MINUTE_MS <= each * _CHART_BARS), steps[-1])
    if not len(candles):
        return candles
    first, end = int(candles.timestamp[0]), int(candles.timestamp[-1]) + MINUTE_MS
    return resample(candles.between(-(-first // step_ms) * step_ms, floor_ms(end, step_ms)), step_ms)
