"""Live: trade a strategy on a market in real time, with real orders or on paper.

**Start.** Open the stores. Take the position: one process trades one (strategy, exchange, symbol), a second one is
refused. Start the clock and connect the broker. Load the state of the previous run from the store and, if the store
lacks something, from the emergency file. Look up a pending order on the exchange, and complete it, send it again or
drop it. Then the first minute begins, with the `Recovered` event. While there are no candles yet, the run waits for
them and watches the exchange. A first start does the same and finds nothing: there is no other way to recover.

**Minute.** It begins when the previous minute has closed and its candle is there. A minute whose candle comes too late
is counted as missed. First a pending order is completed, and the exchange is checked for positions and orders that it
closed or filled by itself. Then the same `Minute` as in a backtest runs: time and prices, cron, the strategy. The
`OrderManager` carries out what it changes: it stores the intent, sends the order, stores the outcome, and only then
are events published.

**End.** `stop()` opens nothing more, cancels a resting entry and waits for the open position to close. `cancel()` ends
immediately and changes nothing; so does a kill. The next start resumes from either.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

import msgspec

from backtest_kit.broker.base import check_broker, sends
from backtest_kit.broker.paper import PaperBroker
from backtest_kit.engine.step import FillModel, Rules
from backtest_kit.errors import BacktestKitError, UserError
from backtest_kit.market.clock import SystemClock
from backtest_kit.market.fetch import GapRule
from backtest_kit.market.repair import DirtyRule
from backtest_kit.model.event import Event
from backtest_kit.model.identity import Identity, Mode
from backtest_kit.model.interval import interval_ms
from backtest_kit.model.position import Trade
from backtest_kit.persist.binding import Persistence
from backtest_kit.persist.lease import DEFAULT_TTL
from backtest_kit.run.blocking import run_blocking
from backtest_kit.run.live.event_recorder import EventObserver
from backtest_kit.run.live.exchange_time import VenueTime
from backtest_kit.run.live.job import LiveJob
from backtest_kit.run.live.orphans import OrphanPolicy
from backtest_kit.run.live.run import LiveRun
from backtest_kit.run.live.status import LiveStatus, status_of
from backtest_kit.run.program import Program
from backtest_kit.run.schema import ExchangeSchema, StrategySchema, check_choice, check_name
from backtest_kit.run.services import Services, StoreCheck

_TTL_S: Final = (1, 3600)
"""The shortest and the longest lease, in seconds: renewed every third of it, and waited for by another machine."""


class LiveOptions(TypedDict, total=False):
    """Options of a live run, besides its names."""

    paper: bool
    """Orders fill at the engine's price, and the state is separate from live. Default False."""
    fill: FillModel
    """"vwap" (default) touches levels by the current price; "ohlc" by the wicks, stop before take."""
    gaps: GapRule
    """"fill" (default) takes minutes without a candle as flat, and counts them; with "error" the minutes after one are
    missed."""
    dirty: DirtyRule
    """"repair" (default) fixes what is certain, counts and logs it, and takes the minute of any other bad row as
    missing; with "refuse" every minute with a bad row is missed."""
    orphans: OrphanPolicy
    """What to do about a position that the store does not know, or that has no stop on the exchange: "alarm"
    (default) reports it, "adopt" makes it the strategy's own, "protect" places a stop. With each of them nothing is
    opened while it is unknown. See `OrphanGuard`."""
    lease_ttl_s: float
    """Seconds (1 to 3600, default 15) of silence after which another machine may take the position over. For as long,
    the run goes on trading while its store does not answer; then it sends nothing until the store answers."""
    allow_weak: bool
    """Default False: with a broker that sends orders, a store that `Persistence.require_live_grade` calls weak or
    faulty is refused. True: nothing is checked, because the program has done so."""


class LiveHandle:
    """A live run in the background. `await` it for the trades of the run, once it has ended."""

    __slots__ = ("_run", "task")

    task: asyncio.Task[tuple[Trade, ...]]
    """The task that runs it."""

    def __init__(self, run: LiveRun, task: asyncio.Task[tuple[Trade, ...]]) -> None:
        self._run = run
        self.task = task

    def __await__(self) -> Generator[Any, None, tuple[Trade, ...]]:
        return self.task.__await__()

    @property
    def symbol(self) -> str:
        return self._run.job.identity.symbol

    def done(self) -> bool:
        """Whether it has ended: stopped, cancelled, or by an error."""
        return self.task.done()

    def stop(self) -> None:
        """Stop opening positions: cancel a resting entry, and wait for an open position to close."""
        self._run.stop()

    def cancel(self) -> None:
        """End it immediately. Positions and orders stay as they are and are resumed at the next start. Awaiting it
        raises `asyncio.CancelledError`."""
        self.task.cancel()

    async def pause(self) -> None:
        """Do not call `get_signal` until `resume`, also after a restart; open positions and resting entries go on.

        Raises:
            UserError: the run has ended.
            BacktestKitError: it could not be stored; the run goes on as before.
        """
        await self._pause(True)

    async def resume(self) -> None:
        """Call `get_signal` again. Raises as `pause`."""
        await self._pause(False)

    async def wait_for_init(self) -> None:
        """Wait until the start is over: position and orders are loaded and compared with the exchange, and the first
        minute is next.

        Raises:
            Exception: what ended the run before that; `asyncio.CancelledError` if it was cancelled.
        """
        await self._begun()
        if self.task.done() and not self._run.began.is_set():
            self.task.result()

    async def _begun(self) -> None:
        """Wait until the run has begun, or has ended without beginning."""
        begun = asyncio.ensure_future(self._run.began.wait())
        try:
            await asyncio.wait({begun, self.task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            begun.cancel()

    async def _pause(self, paused: bool) -> None:
        # A run that has not begun does not know yet whether it is paused.
        await self._begun()
        if self.task.done():
            raise UserError(f"{self!r} has ended: pause or resume the one that follows it")
        await self._run.pause(paused)

    @property
    def status(self) -> LiveStatus:
        """The state of the run now."""
        return status_of(self._run, ended=self.done())

    def __repr__(self) -> str:
        identity = self._run.job.identity
        return f"LiveHandle({identity.strategy_name!r}, {identity.symbol!r}, mode={identity.mode!r})"


class LiveRunner:
    """Runs strategies live and on paper. `backtest_kit.Live` is the one of the default kit."""

    def __init__(self, program: Program, persistence: Callable[[], Persistence], dump: Callable[[], Path]) -> None:
        self._program = program
        self._persistence = persistence
        self._dump = dump
        self._services = Services()
        self._fitness = StoreCheck(lambda: self._persistence().require_live_grade())
        self._running: dict[LiveRun, None] = {}
        """The runs that have not ended, in the order of their start."""
        self._times: dict[str, VenueTime] = {}
        self.observers: list[EventObserver] = []
        """Further writers of records. Each gets the events of a change once it is stored, and again, at a start or at
        the next minute, those that it may have missed."""

    def background(
        self, symbol: str, *, strategy_name: str, exchange_name: str, **options: Unpack[LiveOptions]
    ) -> LiveHandle:
        """Start a run on the running event loop, or resume the previous one, and return its handle.

        The options are those of `LiveOptions`.

        Raises:
            UserError: bad names or options, no event loop runs in this thread, or a live run has no broker.
        """
        return self._start(self.job(symbol, strategy_name, exchange_name, **options), lambda _: None)

    async def run(
        self, symbol: str, *, strategy_name: str, exchange_name: str, **options: Unpack[LiveOptions]
    ) -> AsyncIterator[Event]:
        """Trade, yielding each event as it happens. Leaving the loop cancels the run. Arguments as for `background`.

        The run never waits for the loop: unread events are queued.

        Raises:
            Conflict: another process trades this position, or took it over; the message names it.
            UserError, Damaged, RetryLater: it could not start.
        """
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        job = self.job(symbol, strategy_name, exchange_name, **options)
        handle = self._start(job, queue.put_nowait)
        handle.task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (event := await queue.get()) is not None:
                yield event
            await handle
        finally:
            if not handle.done():
                handle.cancel()
                await asyncio.wait({handle.task})

    def run_sync(
        self, symbol: str, *, strategy_name: str, exchange_name: str, **options: Unpack[LiveOptions]
    ) -> tuple[Trade, ...]:
        """Trade until SIGINT or SIGTERM, and return the trades of the run. Arguments and errors as for `background`.

        The first signal stops opening positions and waits for open ones to close. The second ends the run immediately,
        which is just as safe: positions and orders are resumed at the next start.
        """
        job = self.job(symbol, strategy_name, exchange_name, **options)

        async def main() -> tuple[Trade, ...]:
            handle = self._start(job, lambda _: None)
            try:
                with signals_stop([handle]):
                    return await handle
            except asyncio.CancelledError:
                if not handle.task.cancelled():
                    raise
                return tuple(handle._run.hooks.trades)

        async def leave() -> None:
            with suppress(BacktestKitError):  # the end of the run has reported it
                await self._program.records.leave()

        return run_blocking(main, leave)

    def job(
        self,
        symbol: str,
        strategy: str | StrategySchema,
        exchange_name: str,
        paper: bool = False,
        fill: FillModel = "vwap",
        gaps: GapRule = "fill",
        dirty: DirtyRule = "repair",
        orphans: OrphanPolicy = "alarm",
        lease_ttl_s: float = DEFAULT_TTL,
        allow_weak: bool = False,
    ) -> LiveJob:
        """Resolve one run: look up every name, check every option.

        Raises:
            UserError: bad names or options, or a live run has no broker.
        """
        check_name("symbol", symbol)
        check_choice("fill", fill, FillModel)
        check_choice("gaps", gaps, GapRule)
        check_choice("dirty", dirty, DirtyRule)
        check_choice("orphans", orphans, OrphanPolicy)
        ttl: object = lease_ttl_s
        shortest, longest = _TTL_S
        if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not shortest <= ttl <= longest:
            raise UserError(f"lease_ttl_s is {lease_ttl_s!r}: give {shortest} to {longest} seconds")
        registry = self._program.registry
        exchange, strategy = registry.exchanges.get(exchange_name), registry.strategy(strategy)
        broker = PaperBroker() if paper else exchange.broker
        if broker is None:
            raise UserError(
                f"exchange {exchange_name!r} has no broker, so no order can reach it: "
                "give add_exchange_schema a broker=, or trade with paper=True"
            )
        check_broker(broker)
        settings = self._program.settings()
        if broker.reports_fills:
            # Its fills include slippage, which must not be charged twice.
            settings = msgspec.structs.replace(settings, CC_PERCENT_SLIPPAGE=0.0)
        mode: Mode = "paper" if paper else "live"
        identity = Identity(symbol, strategy.name, exchange_name, "", mode)
        return LiveJob(
            identity=identity,
            strategy=strategy,
            risks=registry.risks_of(strategy),
            settings=settings,
            rules=Rules(identity=identity, settings=settings, fill=fill, interval_ms=interval_ms(strategy.interval)),
            broker=broker,
            time=self._time_of(exchange),
            gaps=gaps,
            dirty=dirty,
            orphans=orphans,
            lease_ttl_s=lease_ttl_s,
            fitness=None if paper or allow_weak or not sends(broker) else self._fitness,
        )

    def _time_of(self, exchange: ExchangeSchema) -> VenueTime:
        known = self._times.get(exchange.name)
        if known is None or known.source is not exchange.source or exchange.clock not in (None, known.clock):
            known = VenueTime(exchange.name, exchange.source, exchange.clock or SystemClock())
            self._times[exchange.name] = known
        return known

    def _start(self, job: LiveJob, yielded: Callable[[Event], None]) -> LiveHandle:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise UserError(
                "Live.background needs a running event loop: call it inside an async function, or use run_sync"
            ) from None
        identity, running = job.identity, self._running

        def neighbours() -> list[LiveRun]:
            return [each for each in running if each.job.place == job.place]

        run = LiveRun(
            job,
            self._program,
            self._services,
            self._persistence(),
            self._dump(),
            self.observers,
            neighbours,
            yielded,
        )

        async def main() -> tuple[Trade, ...]:
            await run.live()
            return tuple(run.hooks.trades)

        running[run] = None
        task = loop.create_task(main(), name=f"{identity.mode} {identity.strategy_name} {identity.symbol}")
        # A task that is cancelled before its first step never reaches its own clean-up.
        task.add_done_callback(lambda _: running.pop(run))
        return LiveHandle(run, task)


class signals_stop:  # noqa: N801  # used as a function
    """While the block runs, the first SIGINT or SIGTERM stops the runs, and the second cancels them.

    `on_signal` is called after each with the number of signals so far. Where signals cannot be caught (another thread
    than the main one) it does nothing.
    """

    def __init__(self, handles: Sequence[LiveHandle], on_signal: Callable[[int], object] = lambda count: None) -> None:
        self._handles = handles
        self._on_signal = on_signal
        self._caught: list[signal.Signals] = []
        self._count = 0

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        for each in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError, RuntimeError, NotImplementedError):
                loop.add_signal_handler(each, self._signalled)
                self._caught.append(each)

    def __exit__(self, *_: object) -> None:
        for each in self._caught:
            asyncio.get_running_loop().remove_signal_handler(each)

    def _signalled(self) -> None:
        self._count += 1
        for handle in self._handles:
            if self._count == 1:
                handle.stop()
            else:
                handle.cancel()
        self._on_signal(self._count)
