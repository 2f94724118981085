"""Walker: replay several strategies, or parameter sets of one, over the same frame and rank them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product, takewhile
from pathlib import Path
from typing import Final, Unpack

import msgspec

from backtest_kit.errors import BacktestKitError, LookAhead, UserError
from backtest_kit.market.fetch import CandleFeed
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.report.comparison import Comparison
from backtest_kit.report.ranking import Contender, Failure, metric_line
from backtest_kit.report.result import BacktestResult, Results
from backtest_kit.run.blocking import run_blocking
from backtest_kit.run.replay.backtest import BacktestHandle, BacktestRunner, ReplayOptions
from backtest_kit.run.replay.replay import Job
from backtest_kit.run.schema import GetSignal, Manage, StrategySchema, strategy_schema

_REPORT_EVERY_S: Final = 0.1


_Report = Callable[..., None]


class ParameterSet(StrategySchema, frozen=True, kw_only=True):
    """A strategy made by `Walker.grid`; it is not registered."""

    parameters: Mapping[str, object]


class WalkProgress(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a walk."""

    strategy_name: str
    """The strategy that is running, or has just ended."""
    number: int
    """Its number, from 1."""
    count: int
    """The number of strategies."""
    fraction: float
    """How much of the frame has been replayed, 0 to 1, as a mean over the symbols."""
    finished: Contender | None = None
    """Its outcome, once it has ended; its `value` is set only by the ranking."""


class WalkOptions(ReplayOptions, total=False):
    """The options of `Walker.run`."""

    metric: str
    on_progress: Callable[[WalkProgress], None] | None


class Walker:
    """Compares strategies. `backtest_kit.Walker` is the one of the default kit."""

    def __init__(self, backtest: BacktestRunner, report_path: Callable[[], Path]) -> None:
        """Run everything with `backtest`; reports saved without a path go to `report_path`."""
        self._backtest = backtest
        self._report_path = report_path

    @staticmethod
    def grid(
        strategy_name: str,
        make: Callable[..., GetSignal | None],
        *,
        parameters: Mapping[str, Sequence[object]],
        manage: Manage | None = None,
        interval: str = "1m",
        risk_name: str | None = None,
        risk_names: Iterable[str] = (),
        note: str = "",
    ) -> list[ParameterSet]:
        """One strategy per combination of `parameters`, for `strategies=` of `run`.

        `make(fast=5, slow=21)` returns the `get_signal` of the strategy `name(fast=5, slow=21)`, or None
        to skip a combination. Nothing is registered. The last parameter varies first.

        Raises:
            UserError: a parameter has no values, two combinations have the same name, none is left, or `make` does not
                return a function.
            Exception: whatever `make` raises.
        """
        for name, values in parameters.items():
            given: object = values
            if isinstance(given, str) or not isinstance(given, Iterable) or not list(given):
                raise UserError(f"parameter {name!r} of {strategy_name!r} is {values!r}: give a list of values")
        made: dict[str, ParameterSet] = {}
        for combination in product(*parameters.values()):
            chosen = dict(zip(parameters, combination, strict=True))
            name = f"{strategy_name}({', '.join(f'{key}={value}' for key, value in chosen.items())})"
            get_signal = make(**chosen)
            if get_signal is None:
                continue
            if name in made:
                raise UserError(f"two combinations of the grid have the name {name!r}: give each value once")
            schema = strategy_schema(name, interval, get_signal, manage, risk_name, risk_names, note)
            made[name] = ParameterSet(**msgspec.structs.asdict(schema), parameters=chosen)
        if not made:
            raise UserError(f"the grid of {strategy_name!r} is empty: make(...) returned None for every combination")
        return list(made.values())

    async def run(
        self,
        symbols: str | Sequence[str],
        *,
        strategies: Sequence[str | StrategySchema],
        exchange_name: str,
        frame_name: str,
        metric: str = "sharpe_ratio",
        on_progress: Callable[[WalkProgress], None] | None = None,
        **options: Unpack[ReplayOptions],
    ) -> Comparison:
        """Replay each strategy over the frame and rank them by a statistic of all their trades together.

        Strategies run one after the other, the symbols of each at the same time. One whose code raises,
        or returns a signal that breaks a rule, is reported as failed, and the others go on.

        Args:
            strategies: Names of registered strategies, parameter sets of `grid`, or both.
            metric: The field of `Statistics` to rank by. Higher is better, except for std_dev, max_drawdown,
                loss_count and max_loss_streak.
            on_progress: Called about ten times a second, and once for every strategy that has ended.
            options: Those of `ReplayOptions`.

        Raises:
            UserError: bad names, options or candles; nothing has been replayed.
            RetryLater: candles could not be fetched.
            Exception: whatever `on_progress` raises.
        """
        metric_line(metric)
        wanted = (symbols,) if isinstance(symbols, str) else tuple(dict.fromkeys(symbols))
        if not wanted:
            raise UserError("symbols is empty: name at least one")
        _check_strategies(strategies)
        backtest = self._backtest
        # Every name and option is checked before the first candle is read.
        rounds = [
            [backtest.job(symbol, each, exchange_name, frame_name, **options) for symbol in wanted]
            for each in strategies
        ]
        contenders: list[Contender] = []
        # The feed stays open to the end, so no strategy has to connect again.
        async with backtest.program.feeds.use(exchange_name, rounds[0][0].settings) as feed:
            await _load(feed, rounds[0])
            for number, jobs in enumerate(rounds, 1):
                schema = jobs[0].strategy
                report = _reporter(on_progress, schema.name, number, len(rounds))
                contenders.append(await _contend(schema, [backtest.start(job) for job in jobs], report))
                report(1.0, contenders[-1])
        return Comparison(
            contenders,
            metric=metric,
            symbols=wanted,
            exchange_name=exchange_name,
            frame_name=frame_name,
            report_path=self._report_path(),
        )

    def run_sync(
        self,
        symbols: str | Sequence[str],
        *,
        strategies: Sequence[str | StrategySchema],
        exchange_name: str,
        frame_name: str,
        **options: Unpack[WalkOptions],
    ) -> Comparison:
        """Compare strategies and return when all have ended. Takes the arguments and raises the errors of `run`."""
        return run_blocking(
            lambda: self.run(
                symbols, strategies=strategies, exchange_name=exchange_name, frame_name=frame_name, **options
            ),
            self._backtest.leave_loop,
        )


def _check_strategies(strategies: Sequence[str | StrategySchema]) -> None:
    if not strategies or isinstance(strategies, str):
        raise UserError(f"strategies is {strategies!r}: give a list of names, or what Walker.grid returns")
    names = [each.name if isinstance(each, StrategySchema) else each for each in strategies]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"strategy {twice!r} is named twice: give each once")


async def _load(feed: CandleFeed, jobs: Sequence[Job]) -> None:
    """Load the candles of the frame first: a fault of theirs is an error of the walk, not of a strategy."""
    for job in jobs:
        lead_ms = job.settings.CC_AVG_PRICE_CANDLES_COUNT * MINUTE_MS
        frame = job.frame
        await feed.load(
            job.identity.symbol, frame.start_ms, frame.stop_ms, gaps=job.gaps, dirty=job.dirty, lead_ms=lead_ms
        )


def _reporter(on_progress: Callable[[WalkProgress], None] | None, name: str, number: int, count: int) -> _Report:
    def report(fraction: float, finished: Contender | None = None) -> None:
        if on_progress is not None:
            on_progress(
                WalkProgress(strategy_name=name, number=number, count=count, fraction=fraction, finished=finished)
            )

    return report


async def _contend(schema: StrategySchema, handles: Sequence[BacktestHandle], report: _Report) -> Contender:
    """Wait for one strategy on all its symbols; a failure ends the symbols named after the failed one.

    Symbols named before it go on, because one of them may fail too: the failure reported does not depend on whose
    candles came first.
    """
    runs = {handle.task: handle.symbol for handle in handles}
    try:
        while running := _undecided(runs):
            report(sum(handle.progress for handle in handles) / len(handles))
            await asyncio.wait(running, timeout=_REPORT_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
        failure = _failure({symbol: _error_of(run) for run, symbol in runs.items() if run.done()})
    finally:
        for run in runs:
            run.cancel()
        await asyncio.wait(runs)
    return Contender(
        strategy_name=schema.name,
        results=Results(() if failure else [run.result() for run in runs]),
        parameters=schema.parameters if isinstance(schema, ParameterSet) else {},
        failure=failure,
    )


def _undecided(runs: Iterable[asyncio.Task[BacktestResult]]) -> list[asyncio.Task[BacktestResult]]:
    """The runs that must end before the first failure is known."""
    before = list(takewhile(lambda run: not run.done() or _error_of(run) is None, runs))
    return [run for run in before if not run.done()]


def _error_of(run: asyncio.Task[BacktestResult]) -> BaseException | None:
    return asyncio.CancelledError() if run.cancelled() else run.exception()


def _failure(raised: Mapping[str, BaseException | None]) -> Failure | None:
    """The error that a strategy raised, if any. Errors it did not cause, such as a full disk, are raised again."""
    failure = None
    for symbol, error in raised.items():
        if isinstance(error, BacktestKitError) and not isinstance(error, UserError | LookAhead):
            raise error
        if isinstance(error, Exception):
            failure = failure or Failure(symbol, error)
    return failure
