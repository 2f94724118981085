"""One live or paper run from its start to its end: see `run.live` for the story."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from backtest_kit.engine.step import Flat, Resting, State, Tick
from backtest_kit.errors import Conflict, RetryLater
from backtest_kit.events import EventBus
from backtest_kit.format import error_text
from backtest_kit.market.history import History
from backtest_kit.model.event import (
    ClockJumped,
    Event,
    Paused,
    Recovered,
    RunDone,
    RunFailed,
)
from backtest_kit.model.interval import MINUTE_MS, floor_ms, iso
from backtest_kit.model.position import Position, RestingEntry
from backtest_kit.persist.binding import Persistence
from backtest_kit.persist.contracts import CONTRACTS, LEASE
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.keys import path_of
from backtest_kit.persist.lease import Lease, acquire
from backtest_kit.persist.possession import beside, release_quietly, renew_through_lapses
from backtest_kit.persist.store import Key
from backtest_kit.persist.store_id import claim_store_id
from backtest_kit.records import RunRecords
from backtest_kit.run.cron import Cron
from backtest_kit.run.feeds import Feeds
from backtest_kit.run.live.account_lock import account_locked
from backtest_kit.run.live.alarms import Alarms
from backtest_kit.run.live.candles import POLL_MS, LiveCandles
from backtest_kit.run.live.emergency import EmergencyFile
from backtest_kit.run.live.event_recorder import EventRecorder, RecordWriter
from backtest_kit.run.live.job import LiveJob
from backtest_kit.run.live.ledger import Ledger, PositionState
from backtest_kit.run.live.missed import MissedMinutes
from backtest_kit.run.live.order_manager import OrderManager
from backtest_kit.run.live.orphans import Comparison, OrphanGuard, side_by_side
from backtest_kit.run.live.other_positions import StoredBooks
from backtest_kit.run.live.position_store import PositionStore, held_by
from backtest_kit.run.live.risk import LiveRisk
from backtest_kit.run.minute import Minute
from backtest_kit.run.run_state import RunState
from backtest_kit.run.services import Services

T = TypeVar("T")
_AGAIN_S: Final = 1.0
"""How long a start waits before it asks a store or an exchange again that was away."""
_LOOK_UP_S: Final = 5.0
"""How often who waits for the time looks whether the clock was set."""
_log = logging.getLogger("backtest_kit")


class LiveRun:
    """A live run in progress. `live` is all of it, once."""

    def __init__(
        self,
        job: LiveJob,
        feeds: Feeds,
        services: Services,
        bus: EventBus,
        cron: Cron,
        records: RunRecords,
        persistence: Persistence,
        dump: Path,
        observers: Sequence[RecordWriter],
        beside: Callable[[], Sequence[LiveRun]],
        yielded: Callable[[Event], None],
    ) -> None:
        """`beside` tells which runs of the program trade the symbol there, this one included, in the order of their
        start; `yielded` takes each event."""
        self.job = job
        self.run_state = RunState(job.rules)
        identity, scope = job.identity, job.scope
        patience = job.settings.CC_SCHEDULE_AWAIT_MINUTES
        mode = identity.mode
        risk = LiveRisk(persistence, mode, identity, job.risks, scope, patience)
        strategy, exchange, symbol = path_of(CONTRACTS["signal"], scope)
        emergency = EmergencyFile(dump / "emergency" / mode / strategy / exchange / f"{symbol}.reserve")
        alarms = Alarms(self.run_state)
        self.position_store = PositionStore(Ledger(persistence, mode, scope), risk, emergency, alarms)
        self._recorder = EventRecorder(records, observers)
        self.order_manager = OrderManager(self.run_state, self.position_store, job.broker, alarms, self._recorder)
        seat = risk if job.risks else None
        self.order_manager.minute = self._minute = Minute(
            self.run_state,
            job.strategy,
            bus,
            cron,
            seat,
            self.order_manager,
            self._history_of,
            records,
            self.order_manager,
        )
        others = StoredBooks(persistence, mode, scope)
        self.guard = OrphanGuard(self.run_state, job.broker, job.orphans, self.order_manager, others)
        self._feeds = feeds
        self._services = services
        self._bus = bus
        self._cron = cron
        self._persistence = persistence
        self._beside = beside
        self._yielded = yielded
        self._woken = asyncio.Event()
        self.candles = LiveCandles(job)
        self.missed = MissedMinutes(identity)
        self._away = ""
        self._jumps = 0
        self._resolved_ms = -1
        """The minute in which the start has asked about an order under way."""
        self._commanded = False
        """Whether the run before has come as far as the commands of the minute in which this one begins: they are given
        again, and those that were carried out are known."""
        self.began = asyncio.Event()
        """Set once what the run before has left is taken in."""
        self.lease: Lease | None = None
        self.when_ms = 0
        """The minute that is acted at; 0 until the clock is started."""
        self._acted_ms = 0
        """The minute at which the strategy was asked last."""

    async def live(self) -> None:
        """Trade until stopped, and tell the listeners how it ended.

        Raises:
            Conflict: another process has the position, from the start or since.
            UserError: bad settings, candles or credentials.
            Damaged, RetryLater: what was left by the run before cannot be read, or a service is away, at the start.
        """
        identity = self.job.identity
        try:
            async with self._possession() as lease:
                await beside(renew_through_lapses(lease), self._work())
            await self._end(RunDone(identity=identity, when_ms=self.when_ms, trades=tuple(self.order_manager.trades)))
        except asyncio.CancelledError:
            trades = tuple(self.order_manager.trades)
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
        """Open nothing more, and end once nothing is held."""
        self.order_manager.stopping = True
        self._woken.set()

    async def pause(self, paused: bool) -> None:
        """Ask the strategy no more, or again, once the run has begun. Returns when that is written down.

        Raises:
            BacktestKitError: it could not be written down.
        """
        if self.order_manager.book.paused != paused:
            await self.order_manager.pause(paused)
            await self._emit(Paused(identity=self.job.identity, when_ms=self.when_ms, paused=paused))

    # The start and the end

    @asynccontextmanager
    async def _possession(self) -> AsyncIterator[Lease]:
        """The position itself, given back in the end."""
        job, mode = self.job, self.job.identity.mode
        async with AsyncExitStack() as stack:
            await self._patiently(lambda: self._persistence.open(mode))
            if (fitness := job.fitness) is not None:
                await self._patiently(lambda: stack.enter_async_context(self._services.use(fitness)))
            await self._patiently(self._recorder.begin)
            lease = await self._patiently(
                lambda: acquire(
                    lambda row: self._persistence.store_for(row, mode),
                    job.scope,
                    ttl=job.lease_ttl_s,
                    seams=self._persistence.seams,
                )
            )
            self.lease = lease
            self.position_store.lease = lease
            stack.push_async_callback(release_quietly, lease)
            crashpoint("live.start.after_lease")
            if mode == "live":
                await self._patiently(lambda: stack.enter_async_context(self._account()))
            yield lease

    @asynccontextmanager
    async def _account(self) -> AsyncIterator[None]:
        """The right to send orders from this store: they carry its id, and no other store of this machine trades the
        symbol of the account."""
        broker, identity = self.job.broker, self.job.identity
        store = self._persistence.store_for(LEASE, "live")
        # After the lease, which is refused in a store that a migration has not completed: that one gets its id from it.
        broker.store_id = await claim_store_id(store, self._persistence.seams)
        async with account_locked(
            broker.account(),
            identity.symbol,
            store=store,
            store_id=broker.store_id,
            strategy_name=identity.strategy_name,
        ):
            yield

    async def _work(self) -> None:
        """Connect to everything that the run needs, and trade; let go of it in the reverse order."""
        job = self.job
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._services.use(job.clock))
            self._jumps = len(getattr(job.clock, "jumps", ()))
            self.when_ms = floor_ms(job.clock.now_ms(), MINUTE_MS)
            await self._patiently(lambda: stack.enter_async_context(self._services.use(job.broker)))
            self.candles.feed = await stack.enter_async_context(
                self._feeds.use(job.identity.exchange_name, job.settings, job.clock.now_ms)
            )
            self._cron.begin(job.identity)
            stack.callback(self._cron.end, job.identity)
            stack.callback(self.position_store.close)
            stack.push_async_callback(self.order_manager.end)
            await self._trade()

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """What a step of the start returns, tried again for as long as a store or the exchange is away or too slow."""
        while True:
            try:
                result = await call()
            except RetryLater as error:
                if not self._away:
                    _log.warning("the start of %s waits: %s", self.job.identity.symbol, error)
                self._away = str(error)
            else:
                self._away = ""
                return result
            await asyncio.sleep(_AGAIN_S)

    async def _trade(self) -> None:
        if not await self._recover():
            return
        while not self._finished():
            await self._act()
            if self._finished() or not await self._next_minute():
                return

    async def _recover(self) -> bool:
        """Take in what the run before has left, and finish what it had begun; False if there is nothing to do and
        the run is told to stop before it could begin."""
        owner = "" if self.lease is None else self.lease.holder.owner
        steps = list(await self._patiently(lambda: self.position_store.load(owner)))
        crashpoint("live.start.after_load")
        seen_ms, intent = self.order_manager.book.seen_ms, self.order_manager.book.intent
        self.run_state.state = self.order_manager.book.state
        await self.job.time.measure()
        away = await self._first_candles()
        if self._finished():
            return False
        if away:
            _log.warning("the start of %s waits for candles: %s", self.job.identity.symbol, away)
            steps.append("the exchange has no candles yet, so nothing is decided")
            self.run_state.tick = Tick.flat(self.when_ms, _last_price(self.order_manager.book))
            self.order_manager.unpriced = self.order_manager.blind = True
        await self.order_manager.begin()
        await self._patiently(self.order_manager.confirm)
        self.began.set()
        await self._reconcile(resending=True)
        events = await self.order_manager.resolve()
        self.order_manager.blind = False
        self._resolved_ms = began_ms = self.when_ms
        crashpoint("live.start.after_resolve")
        self._commanded = self.order_manager.rehearse()
        if intent is not None:
            order = intent.order
            left = self.order_manager.book.intent
            became = "carried out" if events else "given up" if left is None else "still open"
            steps.append(f"asked the venue about the order {order.client_order_id} to {order.kind}: {became}")
        if len(runs := self._beside()) > 1 and self.job.orphans != "alarm":
            steps.append(
                f"{side_by_side([each.run_state for each in runs])}: orphans are told of, and nothing else is done"
            )
        if intent is not None:
            await self._reconcile(resending=True)
        if self.order_manager.no_entry:
            steps.append(f"nothing is opened: {self.order_manager.no_entry}")
        await self._tell_recovered(seen_ms, steps, events)
        if away:
            await self._watch_until_candles(away)
            self._resolved_ms = -1
            self._commanded = self._commanded and self.when_ms == began_ms
        return not self.order_manager.unpriced

    async def _tell_recovered(self, seen_ms: int, steps: list[str], events: Sequence[Event]) -> None:
        told: list[Event] = []
        held = held_by(self.run_state.state)
        recovered = Recovered(
            identity=self.job.identity,
            when_ms=self.when_ms,
            position=held if isinstance(held, Position) else None,
            entry=held if isinstance(held, RestingEntry) else None,
            down_ms=max(0, self.when_ms - seen_ms) if seen_ms > 0 else 0,
            steps=tuple(steps),
        )
        _log.info("%s", _words(recovered), extra={"event": recovered})
        for event in (recovered, *events):
            await self._minute.tell(event, told)
        await self._hand_over(told)

    async def _watch_until_candles(self, reason: str) -> None:
        """Watch the venue alone, once a minute, until there are candles or nothing is left to wait for."""
        clock, watched_ms = self.job.clock, self.when_ms
        self._away = reason
        await self._watch(watched_ms)
        while not self._finished():
            await self._sleep_until(clock.now_ms() + POLL_MS)
            away, missed = await self._first_candles(), (self.when_ms - watched_ms) // MINUTE_MS
            if missed > 0:
                self.missed.add(watched_ms, missed, self._away)
            self._away = away
            if not away:
                self.order_manager.unpriced = False
                return
            if missed > 0:
                watched_ms = self.when_ms
                await self._watch(watched_ms)

    def _finished(self) -> bool:
        book = self.order_manager.book
        return self.order_manager.stopping and isinstance(book.state, Flat) and book.intent is None

    # A minute

    async def _act(self) -> None:
        """Act at the minute that has come; nothing that goes wrong in it but the loss of the position ends the run."""
        told: list[Event] = []
        cut_off = await self._cut_off()
        if cut_off:
            self.missed.add(self.when_ms, 1, cut_off)
        else:
            if (missed := self.missed.over(self.when_ms)) is not None:
                await self._emit(missed)
            try:
                await self._decide(told)
            except Exception as error:
                await self.order_manager.failed("the minute", error)
        await self._hand_over(told)
        self._commanded = False
        if self.order_manager.lost is not None:
            raise self.order_manager.lost

    async def _decide(self, told: list[Event]) -> None:
        order_manager, minute, when_ms = self.order_manager, self._minute, self.when_ms
        await self._ask_venue(told)
        if order_manager.stopping and order_manager.book.intent is None and isinstance(self.run_state.state, Resting):
            await self.run_state.apply(_given_up)
        book = order_manager.book
        if book.intent is None:
            since_ms, self._acted_ms = self._acted_ms or when_ms - MINUTE_MS, when_ms
            await minute.act(
                minute.wanted(),
                told,
                since_ms=since_ms,
                settled=book.when_ms >= when_ms or self._commanded,
            )

    async def _cut_off(self) -> str:
        """Why nothing may be done, because the store has been away for longer than the lease and another process may
        trade the position; empty where this one has it.

        Raises:
            Conflict: another process has it.
        """
        try:
            await self.order_manager.confirm()
        except RetryLater as error:
            return str(error)
        return ""

    async def _ask_venue(self, told: list[Event]) -> None:
        """Take in what has happened at the venue: to an order under way, to what is held, and beside it."""
        if self.order_manager.unsent is not self.order_manager.book:
            await self._reconcile(resending=True)
        if self._resolved_ms != self.run_state.tick.when_ms:
            for event in await self.order_manager.resolve():
                await self._minute.tell(event, told)
        for event in await self.order_manager.check_venue():
            await self._minute.tell(event, told)
        await self._look_for_orphans(told)

    async def _watch(self, when_ms: int) -> None:
        """A minute without a price: nothing is decided, and the venue is asked all the same how things stand."""
        told: list[Event] = []
        self.run_state.tick = msgspec.structs.replace(self.run_state.tick, when_ms=when_ms)
        self.order_manager.blind = True
        try:
            if not await self._cut_off():
                await self._ask_venue(told)
        except Exception as error:
            await self.order_manager.failed("the minute", error)
        finally:
            self.order_manager.blind = False
        await self._hand_over(told)
        if self.order_manager.lost is not None:
            raise self.order_manager.lost

    async def _reconcile(self, *, resending: bool = False) -> Comparison | None:
        """Compare the store with the exchange. Entries wait until that has succeeded and nothing unknown is found.

        `resending`: because an entry under way may be sent again. That happens only where the exchange has nothing of
        it, so that it explains nothing of what the exchange holds.
        """
        when_ms = self.run_state.tick.when_ms
        try:
            if resending:
                found = await self.guard.compare(
                    when_ms, lambda: {**self._books(), self.job.scope: self.order_manager.unsent}
                )
            else:
                found = await self._beside()[0].guard.compare_once(when_ms, self._books)
        except Conflict:
            raise
        except Exception as error:
            reason = f"the exchange and the store could not be compared: {error_text(error)}"
            if reason != self.order_manager.no_entry:
                _log.warning("nothing is opened for %s: %s", self.job.identity.symbol, reason)
            self.order_manager.no_entry = reason
            return None
        self.order_manager.no_entry = found.no_entry
        return found

    def _books(self) -> dict[Key, PositionState]:
        """The books of the runs that trade the symbol side by side, as far as they have been read."""
        return {each.job.scope: each.order_manager.book for each in self._beside() if each.began.is_set()}

    async def _look_for_orphans(self, told: list[Event]) -> None:
        found, runs = await self._reconcile(), list(self._beside())
        if found is None or runs[0] is not self:
            return
        event = await self.guard.report(found, [each.run_state for each in runs[1:]])
        if event is not None:
            await self._minute.tell(event, told)

    async def _hand_over(self, told: list[Event]) -> None:
        await self._minute.tell_commands(told)
        for event in told:
            self._yielded(event)
            await self._notify(event)
        await self._recorder.note(*told)

    async def _notify(self, event: Event) -> None:
        try:
            await self.job.broker.notify(event)
        except Exception as error:
            _log.warning("the broker took no notice of %s: %s", event.action, error)

    async def _next_minute(self) -> bool:
        """Wait for the next minute whose candles are there; False if the run is told to stop meanwhile."""
        clock, when_ms = self.job.clock, self.when_ms + MINUTE_MS
        while True:
            await self._sleep_until(when_ms)
            if self._finished():
                return False
            now_ms = floor_ms(clock.now_ms(), MINUTE_MS)
            if now_ms < when_ms:
                # It was ahead of the market. What was acted at was not, so that no minute comes twice.
                when_ms = max(self.when_ms + MINUTE_MS, now_ms)
                continue
            if now_ms > when_ms:
                self.missed.add(when_ms, (now_ms - when_ms) // MINUTE_MS, "the previous minute took too long")
                when_ms = now_ms
            reason = await self._published(when_ms)
            if not reason:
                break
            if self._finished():
                return False
            self.missed.add(when_ms, 1, reason)
            await self._watch(when_ms)
            when_ms += MINUTE_MS
        self.job.time.witness(when_ms)
        self.when_ms = when_ms
        self.run_state.tick = self.candles.tick(when_ms)
        return True

    async def _published(self, when_ms: int) -> str:
        """Wait for the candles up to a minute, but not into the next one: why they are not there, or nothing."""
        clock = self.job.clock
        while True:
            reason = await self.candles.missing(when_ms)
            if clock.now_ms() < when_ms + MINUTE_MS and not reason:
                return ""
            await self._watch_clock()
            if not when_ms <= clock.now_ms() < when_ms + MINUTE_MS or self._finished():
                return reason or "its candles came too late"
            await self._sleep_until(min(clock.now_ms() + POLL_MS, when_ms + MINUTE_MS))

    async def _sleep_until(self, when_ms: int) -> None:
        """Sleep, but wake up to be told to stop, and because of a clock that was set back."""
        clock = self.job.clock
        sleep = asyncio.ensure_future(clock.sleep_until(when_ms))
        woken = asyncio.ensure_future(self._woken.wait())
        try:
            while not sleep.done():
                waiting = {sleep} if woken.done() else {sleep, woken}
                await asyncio.wait(waiting, timeout=_LOOK_UP_S, return_when=asyncio.FIRST_COMPLETED)
                await self._watch_clock()
                if self._finished() or when_ms - clock.now_ms() > MINUTE_MS:
                    return
        finally:
            for each in (sleep, woken):
                each.cancel()
            await asyncio.wait({sleep, woken})
        sleep.result()

    async def _watch_clock(self) -> None:
        jumps: Sequence[Any] = getattr(self.job.clock, "jumps", ())
        for jump in jumps[self._jumps :]:
            event = ClockJumped(identity=self.job.identity, when_ms=self.when_ms, by_ms=jump.by_ms)
            _log.warning("the wall clock was moved by %d ms", jump.by_ms, extra={"event": event})
            await self._emit(event)
        if len(jumps) > self._jumps:
            self._jumps = len(jumps)
            await self.job.time.measure(at_once=True)
        await self.job.time.measure()

    async def _emit(self, event: Event) -> None:
        """Tell of something that is no part of a minute."""
        await self._bus.emit(event, self._minute.context(), failed=self._handler_failed)
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
        """Take in the candles that the minute of now takes, as the first one: why they are not there, or nothing.

        Raises:
            UserError: nothing is held, and no waiting mends it.
        """
        self.when_ms = floor_ms(self.job.clock.now_ms(), MINUTE_MS)
        book = self.order_manager.book
        patient = book.intent is not None or not isinstance(book.state, Flat)
        away = await self.candles.missing(self.when_ms, patient=patient)
        if not away:
            self.run_state.tick = self.candles.tick(self.when_ms)
            self.job.time.witness(self.when_ms)
        return away

    async def _history_of(self, symbol: str) -> History:
        """The candles of a symbol up to the minute that the run state shows."""
        return await self.candles.history_of(symbol, self.when_ms)

    @property
    def next_ms(self) -> int:
        """The minute at which it acts next."""
        return self.when_ms + MINUTE_MS

    @property
    def waiting(self) -> str:
        """Why nothing is decided at the moment; empty while minutes are acted at."""
        return self._away or self.missed.reason or self.order_manager.undecided


def _given_up(state: State) -> tuple[State, tuple[Event, ...]]:
    return (msgspec.structs.replace(state, order="cancel") if isinstance(state, Resting) else state), ()


def _last_price(book: PositionState) -> float:
    """The last price of the market that a book knows of; 0 where it knows of none."""
    if book.intent is not None:
        return book.intent.order.price
    held = held_by(book.state)
    if isinstance(held, Position):
        return held.entries[-1].price
    return 0.0 if held is None else held.price_open


def _words(found: Recovered) -> str:
    identity = found.identity
    held = "no position"
    if found.position is not None:
        held = f"a {found.position.position} position opened {iso(found.position.opened_at_ms)}"
    elif found.entry is not None:
        held = f"an entry resting since {iso(found.entry.scheduled_at_ms)}"
    down = f", after {found.down_ms // MINUTE_MS} minutes in which nobody watched" if found.down_ms else ""
    steps = "; ".join(found.steps) or "nothing was left to do"
    return f"{identity.strategy_name} for {identity.symbol} starts with {held}{down}: {steps}"
