"""One live or paper run from its start to its end: see `run.live` for the story."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeVar

import msgspec

from backtest_kit.engine.step import Resting, State, Tick
from backtest_kit.errors import RetryLater
from backtest_kit.market.history import History
from backtest_kit.model.event import (
    Event,
    Paused,
    RunDone,
    RunFailed,
)
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.persist.binding import Persistence
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.keys import path_of
from backtest_kit.persist.lease import Lease
from backtest_kit.persist.possession import beside, renew_through_lapses
from backtest_kit.run.live.alarms import Alarms
from backtest_kit.run.live.candles import POLL_MS, LiveCandles
from backtest_kit.run.live.emergency import EmergencyFile
from backtest_kit.run.live.entry_guard import EntryGuard
from backtest_kit.run.live.event_recorder import EventObserver, EventRecorder
from backtest_kit.run.live.flags import RunFlags
from backtest_kit.run.live.hooks import LiveHooks
from backtest_kit.run.live.job import LiveJob
from backtest_kit.run.live.missed import MissedMinutes
from backtest_kit.run.live.next_minute import NextMinute
from backtest_kit.run.live.order_manager import OrderManager
from backtest_kit.run.live.order_sender import OrderSender
from backtest_kit.run.live.orphans import OrphanGuard, side_by_side
from backtest_kit.run.live.other_positions import OtherPositions
from backtest_kit.run.live.position_store import PositionStore
from backtest_kit.run.live.possession import Patience, possessed
from backtest_kit.run.live.recovery import last_price, recovered, what_became_of
from backtest_kit.run.minute import Minute
from backtest_kit.run.program import Program
from backtest_kit.run.run_state import RunState
from backtest_kit.run.services import Services

T = TypeVar("T")
_log = logging.getLogger("backtest_kit")


class LiveRun:
    """A live run in progress. `live` is all of it, once."""

    def __init__(
        self,
        job: LiveJob,
        program: Program,
        services: Services,
        persistence: Persistence,
        dump: Path,
        observers: Sequence[EventObserver],
        neighbours: Callable[[], Sequence[LiveRun]],
        yielded: Callable[[Event], None],
    ) -> None:
        """`neighbours` returns the runs of the program that trade the symbol, this one included, in the order of their
        start; `yielded` takes each event."""
        self.job = job
        self.run_state = RunState(job.rules)
        identity, scope = job.identity, job.scope
        mode, records = identity.mode, program.records.of_run(identity, None)
        strategy, exchange, symbol = path_of(CONTRACTS["signal"], scope)
        emergency = EmergencyFile(dump / "emergency" / mode / strategy / exchange / f"{symbol}.reserve")
        alarms = Alarms(self.run_state)
        patience = job.settings.CC_SCHEDULE_AWAIT_MINUTES
        self.position_store = PositionStore(persistence, identity, scope, job.risks, patience, emergency, alarms)
        self._recorder = EventRecorder(records, observers)
        self.flags, self.hooks = RunFlags(), LiveHooks(self.run_state, alarms)
        self._sender = OrderSender(
            self.run_state, self.position_store, job.broker, alarms, self._recorder, self.flags, self.hooks
        )
        self.order_manager = OrderManager(self._sender)
        self._sender.minute = self._minute = Minute(
            self.run_state,
            job.strategy,
            program,
            self.position_store if job.risks else None,
            self.order_manager,
            self._history_of,
            records,
            self.hooks,
        )
        others = OtherPositions(persistence, mode, scope)
        self.guard = OrphanGuard(self.run_state, job.broker, job.orphans, self.order_manager, others)
        self._entry_guard = EntryGuard(self.guard, self.order_manager, self.flags, job, neighbours)
        self._patience = Patience(identity.symbol)
        self._program = program
        self._services = services
        self._persistence = persistence
        self._neighbours = neighbours
        self._yielded = yielded
        self.candles = LiveCandles(job)
        self.missed = MissedMinutes(identity)
        self.next_minute = NextMinute(
            job, self.candles, self.missed, finished=self._finished, watch=self._watch, emit=self._emit
        )
        self._resolved_ms = -1
        """The minute in which the start looked up a pending order."""
        self._commanded = False
        """Whether the previous run had reached the commands of the minute in which this one begins: they are given
        again, and those that were carried out are known."""
        self.began = asyncio.Event()
        """Set once the state of the previous run has been loaded."""
        self.lease: Lease | None = None
        self._acted_ms = 0
        """The minute at which the strategy was called last."""

    async def live(self) -> None:
        """Trade until stopped, and publish how it ended.

        Raises:
            Conflict: another process has the position, from the start or since.
            UserError: bad settings, candles or credentials.
            Damaged, RetryLater: the state of the previous run cannot be read, or a service is away, at the start.
        """
        identity = self.job.identity
        try:
            async with AsyncExitStack() as stack:
                await self._open_stores(stack)
                lease = await stack.enter_async_context(possessed(self.job, self._persistence, self._patience))
                self.lease = self.position_store.lease = lease
                await beside(renew_through_lapses(lease), self._work())
            await self._end(RunDone(identity=identity, when_ms=self.when_ms, trades=tuple(self.hooks.trades)))
        except asyncio.CancelledError:
            trades = tuple(self.hooks.trades)
            await self._end(RunDone(identity=identity, when_ms=self.when_ms, trades=trades, cancelled=True))
            raise
        except Exception as error:
            failed = RunFailed(identity=identity, when_ms=self.when_ms, error=error)
            _log.error(
                "the run of %s for %s ends: %s", identity.strategy_name, identity.symbol, error, extra={"event": failed}
            )
            await self._end(failed)
            raise

    def stop(self) -> None:
        """Stop opening positions, and end once none is open."""
        self.flags.stopping = True
        self.next_minute.wake()

    async def pause(self, paused: bool) -> None:
        """Stop calling the strategy, or call it again. Returns when that is stored.

        Raises:
            BacktestKitError: it could not be stored.
        """
        if self.position_store.position_state.paused != paused:
            await self.order_manager.pause(paused)
            await self._emit(Paused(identity=self.job.identity, when_ms=self.when_ms, paused=paused))

    # The start and the end

    async def _open_stores(self, stack: AsyncExitStack) -> None:
        await self._patience(lambda: self._persistence.open(self.job.identity.mode))
        if (fitness := self.job.fitness) is not None:
            await self._patience(lambda: stack.enter_async_context(self._services.use(fitness)))
        await self._patience(self._recorder.begin)

    async def _work(self) -> None:
        """Connect to everything that the run needs, and trade; disconnect in the reverse order."""
        job = self.job
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._services.use(job.clock))
            self.next_minute.begin()
            await self._patience(lambda: stack.enter_async_context(self._services.use(job.broker)))
            self.candles.feed = await stack.enter_async_context(
                self._program.feeds.use(job.identity.exchange_name, job.settings, job.clock.now_ms)
            )
            self._program.cron.begin(job.identity)
            stack.callback(self._program.cron.end, job.identity)
            stack.callback(self.position_store.close)
            stack.push_async_callback(self.order_manager.end)
            await self._trade()

    async def _trade(self) -> None:
        if not await self._recover():
            return
        while not self._finished():
            await self._act()
            if self._finished() or not await self.next_minute.come():
                return
            self.run_state.tick = self.candles.tick(self.when_ms)

    async def _recover(self) -> bool:
        """Load what the previous run left, and finish what it had begun; False if the run was stopped before it could
        begin, and there is nothing to do."""
        owner = "" if self.lease is None else self.lease.holder.owner
        steps = list(await self._patience(lambda: self.position_store.load(owner)))
        crashpoint("live.start.after_load")
        found = self.position_store.position_state
        self.run_state.state = found.state
        await self.job.time.measure()
        away = await self._first_candles()
        if self._finished():
            return False
        if away:
            _log.warning("the start of %s waits for candles: %s", self.job.identity.symbol, away)
            steps.append("the exchange has no candles yet, so nothing is decided")
            self.run_state.tick = Tick.flat(self.when_ms, last_price(found))
            self.flags.unpriced = self.flags.blind = True
        await self.order_manager.take_over()
        await self._patience(self._sender.confirm)
        self.began.set()
        await self._entry_guard.compare(self.run_state.tick.when_ms, resending=True)
        events = await self.order_manager.manage_pending_order()
        self.flags.blind = False
        self._resolved_ms = began_ms = self.when_ms
        crashpoint("live.start.after_resolve")
        self._commanded = self.order_manager.rehearse()
        if found.intent is not None:
            left = self.position_store.position_state.intent
            steps.append(what_became_of(found.intent, left, done=bool(events)))
        if len(runs := self._neighbours()) > 1 and self.job.orphans != "alarm":
            steps.append(f"{side_by_side([each.run_state for each in runs])}: orphans are only reported")
        if found.intent is not None:
            await self._entry_guard.compare(self.run_state.tick.when_ms, resending=True)
        if self.flags.no_entry:
            steps.append(f"nothing is opened: {self.flags.no_entry}")
        event = recovered(self.job.identity, self.run_state.state, self.when_ms, found.seen_ms, steps)
        happened: list[Event] = []
        for each in (event, *events):
            await self._minute.publish(each, happened)
        await self._commit(happened)
        if away:
            await self._watch_until_candles(away)
            self._resolved_ms = -1
            self._commanded = self._commanded and self.when_ms == began_ms
        return not self.flags.unpriced

    async def _watch_until_candles(self, reason: str) -> None:
        """Watch the exchange once a minute, until there are candles or nothing is left to wait for."""
        clock, watched_ms = self.job.clock, self.when_ms
        self._patience.reason = reason
        await self._watch(watched_ms)
        while not self._finished():
            await self.next_minute.sleep_until(clock.now_ms() + POLL_MS)
            away, missed = await self._first_candles(), (self.when_ms - watched_ms) // MINUTE_MS
            if missed > 0:
                self.missed.add(watched_ms, missed, self._patience.reason)
            self._patience.reason = away
            if not away:
                self.flags.unpriced = False
                return
            if missed > 0:
                watched_ms = self.when_ms
                await self._watch(watched_ms)

    def _finished(self) -> bool:
        return self.flags.stopping and self.position_store.position_state.is_idle

    # A minute

    async def _act(self) -> None:
        """Run this minute. Only the loss of the position ends the run; other errors are reported."""
        happened: list[Event] = []
        cut_off = await self._cut_off()
        if cut_off:
            self.missed.add(self.when_ms, 1, cut_off)
        else:
            if (missed := self.missed.over(self.when_ms)) is not None:
                await self._emit(missed)
            try:
                await self._manage_open_orders(happened)
                await self._exit_and_enter(happened)
            except Exception as error:
                await self.hooks.on_error("the minute", error)
        await self._commit(happened)
        self._commanded = False
        self.hooks.stop_if_lost()

    async def _manage_open_orders(self, happened: list[Event]) -> None:
        """Take in what happened on the exchange: to a pending order, to the position, and by other orders."""
        if self.order_manager.unsent is not self.position_store.position_state:
            await self._entry_guard.compare(self.run_state.tick.when_ms, resending=True)
        if self._resolved_ms != self.run_state.tick.when_ms:
            for event in await self.order_manager.manage_pending_order():
                await self._minute.publish(event, happened)
        for event in await self.order_manager.check_exchange():
            await self._minute.publish(event, happened)
        if (found := await self._entry_guard.find_orphans(self.run_state.tick.when_ms)) is not None:
            await self._minute.publish(found, happened)

    async def _exit_and_enter(self, happened: list[Event]) -> None:
        """Let time, prices and the strategy act on the position, unless an order is still pending."""
        if self.flags.stopping and self.position_store.position_state.intent is None:
            await self.run_state.apply(_cancelled)
        now, when_ms = self.position_store.position_state, self.when_ms
        if now.intent is None:
            since_ms, self._acted_ms = self._acted_ms or when_ms - MINUTE_MS, when_ms
            settled = now.when_ms >= when_ms or self._commanded
            await self._minute.act(self._minute.wanted(), happened, since_ms=since_ms, settled=settled)

    async def _commit(self, happened: list[Event]) -> None:
        """Publish the events of commands, and hand all events to the broker, the stream and the records."""
        await self._minute.publish_commands(happened)
        for event in happened:
            self._yielded(event)
            await self._notify(event)
        await self._recorder.note(*happened)

    async def _cut_off(self) -> str:
        """Why this minute must be skipped: the store has been away for longer than the lease, so another process may
        trade the position. Empty while this process has it.

        Raises:
            Conflict: another process has it.
        """
        try:
            await self._sender.confirm()
        except RetryLater as error:
            return str(error)
        return ""

    async def _watch(self, when_ms: int) -> None:
        """A minute without a price: nothing is decided, but orders and position are still checked on the exchange."""
        happened: list[Event] = []
        self.run_state.tick = msgspec.structs.replace(self.run_state.tick, when_ms=when_ms)
        self.flags.blind = True
        try:
            if not await self._cut_off():
                await self._manage_open_orders(happened)
        except Exception as error:
            await self.hooks.on_error("the minute", error)
        finally:
            self.flags.blind = False
        await self._commit(happened)
        self.hooks.stop_if_lost()

    async def _notify(self, event: Event) -> None:
        try:
            await self.job.broker.notify(event)
        except Exception as error:
            _log.warning("Broker.notify failed for %s: %s", event.action, error)

    async def _emit(self, event: Event) -> None:
        """Publish an event outside of a minute."""
        await self._program.bus.emit(event, self._minute.context(), failed=self._handler_failed)
        self._yielded(event)
        await self._recorder.note(event)

    async def _end(self, event: Event) -> None:
        missed = self.missed.over(event.when_ms)
        for each in (event,) if missed is None else (missed, event):
            await self._emit(each)
        await self._recorder.end()

    async def _handler_failed(self, what: str, error: Exception) -> None:
        _log.error("%s raised %s", what, type(error).__name__, exc_info=error)

    # Candles

    async def _first_candles(self) -> str:
        """Load the candles of the first minute: why they are missing, or nothing.

        Raises:
            UserError: no position is open, and waiting does not help.
        """
        away = await self.next_minute.first(patient=not self.position_store.position_state.is_idle)
        if not away:
            self.run_state.tick = self.candles.tick(self.when_ms)
        return away

    async def _history_of(self, symbol: str) -> History:
        """The candles of a symbol up to the minute that the run state shows."""
        return await self.candles.history_of(symbol, self.when_ms)

    @property
    def when_ms(self) -> int:
        """The current minute; 0 until the clock is started."""
        return self.next_minute.when_ms

    @property
    def next_ms(self) -> int:
        """The next minute."""
        return self.when_ms + MINUTE_MS

    @property
    def waiting(self) -> str:
        """Why nothing is decided at the moment; empty while the run acts."""
        return self._patience.reason or self.missed.reason or self.hooks.undecided


def _cancelled(state: State) -> tuple[State, tuple[Event, ...]]:
    return (msgspec.structs.replace(state, order="cancel") if isinstance(state, Resting) else state), ()
