"""Live: trade a strategy on a market as it goes on, with real orders or on paper.

**A start.** The stores are opened. The position is taken: one process trades one (strategy, exchange, symbol), and a
second one is told who has it. The clock is started and the broker connects. What the run before has left is read,
from the store and, if that lacked something, from the emergency file. The venue is asked what became of an order
that was under way, and the order is concluded, sent again or dropped. Only then comes the first minute, with the
`Recovered` event. A first start does all of this too, and finds nothing: there is no other way to recover.

**A minute.** It begins when the minute before has closed and its candle is there; a minute whose candle does not
come in time is counted and passed over. First an order is concluded that is still under way, and the venue is
asked whether it has closed or filled something by itself. Then the same `Minute` as in a backtest acts: time and
prices, cron, the strategy. Whatever it changes is settled by the `Trader`: the intent is written down, the order is
sent, the outcome is written down, and only then does anybody hear of it.

**An end.** `stop()` opens nothing more, cancels a resting entry and carries an open position to its end. `cancel()`
ends at once and leaves everything as it is; so does a kill. Both leave a state from which the next start goes on.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, get_args

import msgspec

from backtest_kit.broker.paper import PaperBroker
from backtest_kit.engine.pnl import effective_price, profit
from backtest_kit.engine.step import Fill, Flat, Holding, Rules
from backtest_kit.errors import BacktestKitError, UserError
from backtest_kit.events import EventBus
from backtest_kit.market.clock import SystemClock
from backtest_kit.model.event import Event, Identity, Mode
from backtest_kit.model.interval import interval_ms
from backtest_kit.model.position import Direction, Position, RestingEntry, Trade
from backtest_kit.persist.binding import Persistence
from backtest_kit.persist.lease import DEFAULT_TTL
from backtest_kit.records import Records
from backtest_kit.run.blocking import run_blocking
from backtest_kit.run.chronicle import Observer
from backtest_kit.run.cron import Cron
from backtest_kit.run.feeds import Feeds
from backtest_kit.run.live_run import LiveJob, LiveRun
from backtest_kit.run.orphans import OrphanPolicy
from backtest_kit.run.replay import Gaps
from backtest_kit.run.schema import ExchangeSchema, Registry, StrategySchema, check_name
from backtest_kit.run.services import Services
from backtest_kit.run.venue_time import VenueTime
from backtest_kit.settings import Settings

_OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "fill": get_args(Fill),
    "gaps": get_args(Gaps),
    "orphans": get_args(OrphanPolicy),
}


class LiveStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A live run at one moment. Prices are absolute, distances in percent of the current price."""

    identity: Identity
    when_ms: int
    """The minute that was acted at last."""
    next_ms: int
    """The minute at which it acts next."""
    next_decision_ms: int | None = None
    """The minute at which the strategy is asked next, if nothing is held until then; None while something is."""
    price: float
    position: Position | None = None
    entry: RestingEntry | None = None
    direction: Direction | None = None
    price_open: float | None = None
    """Effective entry price of the position, or the price that the entry waits for."""
    pnl_pct: float | None = None
    """After fees and slippage, if all were closed now."""
    pnl_cost: float | None = None
    to_take_profit_pct: float | None = None
    """How far the price is from the take profit in force; below 0 it is beyond."""
    to_stop_loss_pct: float | None = None
    under_way: str = ""
    """Client order id of an order whose outcome is not known yet."""
    paused: bool = False
    stopping: bool = False
    degraded: str = ""
    """Why the store does not take writes; empty where it does."""
    written_ms: int = -1
    """The last minute that was written down."""
    holder: str = ""
    """Who has the position, and since when."""
    held: bool = False
    """Whether this process may still think that it has."""
    ended: bool = False
    """Whether the run is over."""
    clock_drift_ms: int | None = None
    """How far the exchange's clock is ahead of this machine's, where it tells. Beyond a second the run goes by the
    exchange's, and says so in the log."""
    missed: int = 0
    """Minutes that passed without a decision."""
    gaps_filled: int = 0
    """Minutes without a candle that were taken as flat."""
    trades: int = 0
    """Positions that were closed in this run."""


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
        """Open nothing more: a resting entry is cancelled, an open position is carried to its end."""
        self._run.stop()

    def cancel(self) -> None:
        """End it at once and leave everything as it is, on the venue and on the disk; the next start goes on from
        there. Whoever awaits it gets `asyncio.CancelledError`."""
        self.task.cancel()

    async def pause(self) -> None:
        """Ask the strategy for nothing until `resume`, also after a restart; what is open or resting goes on.

        Raises:
            BacktestKitError: it could not be written down, and goes on as before.
        """
        await self._run.pause(True)

    async def resume(self) -> None:
        """Ask the strategy again. Raises as `pause`."""
        await self._run.pause(False)

    @property
    def status(self) -> LiveStatus:
        """How it stands now."""
        return _status(self._run, ended=self.done())

    def __repr__(self) -> str:
        identity = self._run.job.identity
        return f"LiveHandle({identity.strategy_name!r}, {identity.symbol!r}, mode={identity.mode!r})"


class LiveRunner:
    """Runs strategies live and on paper. `backtest_kit.Live` is the one of the default kit."""

    def __init__(
        self,
        registry: Registry,
        feeds: Feeds,
        bus: EventBus,
        cron: Cron,
        records: Records,
        persistence: Callable[[], Persistence],
        settings: Callable[[], Settings],
        dump: Callable[[], Path],
    ) -> None:
        self._registry = registry
        self._feeds = feeds
        self._bus = bus
        self._cron = cron
        self._records = records
        self._persistence = persistence
        self._settings = settings
        self._dump = dump
        self._services = Services()
        self._running: set[LiveRun] = set()
        self._times: dict[str, VenueTime] = {}
        self.observers: list[Observer] = []
        """Who keeps records of what happened, beside those of the kit: each is given the events of a change once that
        is written down, and again at a start, or at the next minute, those that it may not have taken in."""

    def background(
        self,
        symbol: str,
        *,
        strategy_name: str,
        exchange_name: str,
        paper: bool = False,
        fill: Fill = "vwap",
        gaps: Gaps = "fill",
        orphans: OrphanPolicy = "alarm",
        lease_ttl: float = DEFAULT_TTL,
    ) -> LiveHandle:
        """Start a run on the running event loop, or go on where one was left, and return its handle.

        Args:
            paper: Every order is confirmed at the engine's price, and the state is kept apart from live.
            fill: "vwap" touches levels by the current price; "ohlc" by the wicks, stop before take.
            gaps: "fill" takes minutes that the exchange has no candle of as flat, and counts them; with "error"
                the minutes after one are missed.
            orphans: What is done about a position on the venue that nobody watches, or that has no stop there:
                "alarm" tells, "adopt" makes it the strategy's own, "protect" places a stop. See `OrphanGuard`.
            lease_ttl: Seconds of silence after which another machine may take the position over. As long does the
                run go on while its store does not answer at all; then it ends with `Conflict`.

        Raises:
            UserError: bad names or options, no event loop runs in this thread, or a live run has no broker.
        """
        return self._start(
            self.job(symbol, strategy_name, exchange_name, paper, fill, gaps, orphans, lease_ttl), lambda _: None
        )

    async def run(
        self,
        symbol: str,
        *,
        strategy_name: str,
        exchange_name: str,
        paper: bool = False,
        fill: Fill = "vwap",
        gaps: Gaps = "fill",
        orphans: OrphanPolicy = "alarm",
        lease_ttl: float = DEFAULT_TTL,
    ) -> AsyncIterator[Event]:
        """Trade, yielding each event as it happens. Leaving the loop cancels the run. Arguments as for `background`.

        The run never waits for the loop: what is not read yet is kept.

        Raises:
            Conflict: another process trades this position, from the start or since; the message names it.
            UserError, Damaged, RetryLater: it could not start.
        """
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        job = self.job(symbol, strategy_name, exchange_name, paper, fill, gaps, orphans, lease_ttl)
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
        self,
        symbol: str,
        *,
        strategy_name: str,
        exchange_name: str,
        paper: bool = False,
        fill: Fill = "vwap",
        gaps: Gaps = "fill",
        orphans: OrphanPolicy = "alarm",
        lease_ttl: float = DEFAULT_TTL,
    ) -> tuple[Trade, ...]:
        """Trade until SIGINT or SIGTERM, and return the trades of the run. Arguments and errors as for `background`.

        The first signal stops it: what is open is carried to its end. The second ends it at once and leaves
        everything as it is, which is just as safe.
        """
        job = self.job(symbol, strategy_name, exchange_name, paper, fill, gaps, orphans, lease_ttl)

        async def main() -> tuple[Trade, ...]:
            handle = self._start(job, lambda _: None)
            try:
                with signals_stop([handle]):
                    return await handle
            except asyncio.CancelledError:
                if not handle.task.cancelled():
                    raise
                return tuple(handle._run.trader.trades)
            finally:
                with suppress(BacktestKitError):  # the end of the run has told of it
                    await self._records.leave()

        return run_blocking(main)

    def job(
        self,
        symbol: str,
        strategy: str | StrategySchema,
        exchange_name: str,
        paper: bool = False,
        fill: Fill = "vwap",
        gaps: Gaps = "fill",
        orphans: OrphanPolicy = "alarm",
        lease_ttl: float = DEFAULT_TTL,
    ) -> LiveJob:
        """One run, resolved.

        Raises:
            UserError: bad names or options, or a live run has no broker.
        """
        check_name("symbol", symbol)
        for name, value in (("fill", fill), ("gaps", gaps), ("orphans", orphans)):
            if value not in _OPTIONS[name]:
                raise UserError(f"{name} is {value!r}: use one of {', '.join(_OPTIONS[name])}")
        exchange = self._registry.exchanges.get(exchange_name)
        if isinstance(strategy, str):
            strategy = self._registry.strategies.get(strategy)
        broker = PaperBroker() if paper else exchange.broker
        if broker is None:
            raise UserError(
                f"exchange {exchange_name!r} has no broker, so no order can reach it: "
                "give add_exchange_schema a broker=, or trade with paper=True"
            )
        settings = self._settings()
        if broker.reports_fills:
            # Its prices are what was paid: slippage would be charged twice.
            settings = msgspec.structs.replace(settings, CC_PERCENT_SLIPPAGE=0.0)
        mode: Mode = "paper" if paper else "live"
        identity = Identity(symbol, strategy.name, exchange_name, "", mode)
        return LiveJob(
            identity=identity,
            strategy=strategy,
            risks=tuple(self._registry.risks.get(name) for name in strategy.risk_names),
            settings=settings,
            rules=Rules(identity=identity, settings=settings, fill=fill, interval_ms=interval_ms(strategy.interval)),
            broker=broker,
            time=self._time_of(exchange),
            gaps=gaps,
            orphans=orphans,
            lease_ttl=lease_ttl,
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
        run: LiveRun

        def alone() -> bool:
            same = (identity.exchange_name, identity.symbol, identity.mode)
            return not any(
                (other.exchange_name, other.symbol, other.mode) == same
                for other in (each.job.identity for each in running if each is not run)
            )

        run = LiveRun(
            job,
            self._feeds,
            self._services,
            self._bus,
            self._cron,
            self._records.of_run(identity, None),
            self._persistence(),
            self._dump(),
            self.observers,
            alone,
            yielded,
        )

        async def main() -> tuple[Trade, ...]:
            await run.live()
            return tuple(run.trader.trades)

        running.add(run)
        task = loop.create_task(main(), name=f"{identity.mode} {identity.strategy_name} {identity.symbol}")
        # A task that is cancelled before its first step never reaches its own clean-up.
        task.add_done_callback(lambda _: running.discard(run))
        return LiveHandle(run, task)


class signals_stop:  # noqa: N801  # used as a function
    """While the block runs, the first SIGINT or SIGTERM stops the runs, and the second cancels them.

    `told` is called after each with the number of signals so far. Where signals cannot be caught (another thread
    than the main one) it does nothing.
    """

    def __init__(self, handles: Sequence[LiveHandle], told: Callable[[int], object] = lambda count: None) -> None:
        self._handles = handles
        self._told = told
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
        self._told(self._count)


def _status(run: LiveRun, *, ended: bool) -> LiveStatus:
    book, state, tick = run.trader.book, run.desk.state, run.desk.tick
    job, lease = run.job, run.lease
    held: dict[str, Any] = {}
    if isinstance(state, Flat):
        slot_ends = state.last_slot_ms + job.rules.interval_ms if state.last_slot_ms >= 0 else 0
        held = {"next_decision_ms": max(run.next_ms, slot_ends)}
    elif isinstance(state, Holding):
        position = state.position
        pct, cost = profit(position.position, position.entries, position.reductions, tick.price, job.settings)
        held = {
            "position": position,
            "direction": position.position,
            "price_open": effective_price(position.entries, position.reductions),
            "pnl_pct": pct,
            "pnl_cost": cost,
            **_distances(position.position, tick.price, position.take_profit, position.stop_loss),
        }
    else:
        entry = state.entry
        held = {
            "entry": entry,
            "direction": entry.position,
            "price_open": entry.price_open,
            **_distances(entry.position, tick.price, entry.price_take_profit, entry.price_stop_loss),
        }
    return LiveStatus(
        identity=job.identity,
        when_ms=run.when_ms,
        next_ms=run.next_ms,
        price=tick.price,
        under_way="" if book.intent is None else book.intent.order.client_order_id,
        paused=book.paused,
        stopping=run.trader.stopping,
        degraded=run.keeper.degraded,
        written_ms=run.keeper.written_ms,
        holder="" if lease is None else str(lease.holder),
        held=lease is not None and lease.held,
        ended=ended,
        clock_drift_ms=run.job.time.drift_ms,
        missed=run.missed,
        gaps_filled=run.gaps_filled,
        trades=len(run.trader.trades),
        **held,
    )


def _distances(direction: Direction, price: float, take: float, stop: float) -> dict[str, float]:
    sign = 1.0 if direction == "long" else -1.0
    if not price:
        return {}
    return {
        "to_take_profit_pct": sign * (take - price) / price * 100,
        "to_stop_loss_pct": sign * (price - stop) / price * 100,
    }
