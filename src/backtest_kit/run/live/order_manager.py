"""One position's life on a venue: what the engine decides is written down, sent, and written down again.

A change of state that the venue must take part in goes through three states on the disk: the intent, with the
order as it is about to be sent; then, once the venue has answered, the outcome, with the intent gone. Where the
answer does not come, because the venue is silent or this process has died, the intent is still there at the next
minute, and the venue is asked what became of the order before anything is sent again. A restart is such a minute.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from contextlib import suppress
from typing import Final

import msgspec

from backtest_kit.broker.base import (
    Broker,
    Fill,
    Order,
    OrderDeleted,
    OrderKind,
    OrderRejected,
    OrderReport,
    OrderTransient,
)
from backtest_kit.engine.commands import Refused
from backtest_kit.engine.step import Flat, Holding, Resting, Rules, State
from backtest_kit.engine.validation import check_signal
from backtest_kit.errors import BacktestKitError, Conflict, Outcome, RetryLater, UserError
from backtest_kit.format import error_text
from backtest_kit.model.event import (
    Change,
    Event,
    Lasting,
    PositionClosed,
    PositionOpened,
    RiskRejected,
    StrategyFailed,
)
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.position import Trade
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.run.live.alarms import Alarms
from backtest_kit.run.live.event_recorder import EventRecorder
from backtest_kit.run.live.ledger import Commanded, PositionState
from backtest_kit.run.live.orders import (
    COMMANDS,
    ENTRIES,
    EXITS,
    KIND_OF,
    OPENING,
    Intent,
    activated,
    cancelled,
    closed,
    done_already,
    dropped,
    entry_of,
    fitted,
    intended,
    judged,
    numbered_from,
    renamed,
    renewed,
    retried,
    signal_id_of,
    told_of,
)
from backtest_kit.run.live.position_store import Need, PositionStore, RiskRefused, Unsaved
from backtest_kit.run.minute import Minute, RunHooks, as_signal
from backtest_kit.run.run_state import Act, RunState

_ONE_OUTAGE_MS: Final = 5 * MINUTE_MS
"""What a strategy misses again within this time is away still, and has been told of."""
_log = logging.getLogger("backtest_kit")


class OrderManager(RunHooks):
    """The position state of one run, and the orders that follow from them. Handed its `minute` after it is made."""

    minute: Minute

    def __init__(
        self,
        run_state: RunState,
        position_store: PositionStore,
        broker: Broker,
        alarms: Alarms,
        recorder: EventRecorder,
    ) -> None:
        self._run_state = run_state
        self._rules: Rules = run_state.rules
        self._position_store = position_store
        self._broker = broker
        self._recorder = recorder
        self._lock = asyncio.Lock()
        self._alarms = alarms
        self._sent: list[str] = []
        """Kinds of the orders whose events nobody has heard of yet."""
        self._rehearsed: list[Commanded] = []
        """What the run before has commanded in the minute in which this one begins, as long as it lasts."""
        self._telling: Event | None = None
        self._ended = False
        self._undecided = -_ONE_OUTAGE_MS - 1, ""
        """When something that the strategy needs was away, and what."""
        self.stopping = False
        self.no_entry = "the exchange was not asked yet what it holds"
        """Why nothing may be opened or added to; empty while the exchange holds nothing unknown."""
        self.blind = False
        """Whether nobody knows the price of this minute."""
        self.unpriced = False
        """Whether no price of the market is known at all, but those that the books remember."""
        self.lost: Conflict | None = None
        """Why nothing may be done any more: another process has the position."""
        self.trades: list[Trade] = []
        run_state.books = self

    @property
    def book(self) -> PositionState:
        return self._position_store.book

    @property
    def paused(self) -> bool:
        """Whether the strategy is not called: it was paused, the store could not keep its answer, or entries wait."""
        return self.book.paused or bool(self._position_store.degraded or self.no_entry)

    @property
    def unsent(self) -> PositionState:
        """The book as it would be if the entry under way, if there is one, was never sent."""
        opens = self.book.intent is not None and self.book.intent.order.kind in OPENING
        return msgspec.structs.replace(self.book, intent=None) if opens else self.book

    async def begin(self) -> None:
        """Write down that this process has the position now, as it was found.

        Raises:
            UserError: its orders were sent from a store of another id, and cannot be found from this one.
            Conflict, Damaged: as `PositionStore.keep`.
        """
        book, store_id = self.book, self._broker.store_id
        self._run_state.state = book.state
        if book.store_id != store_id and not (isinstance(book.state, Flat) and book.intent is None):
            identity = self._rules.identity
            raise UserError(
                f"the orders of {identity.symbol} on {identity.exchange_name} by {identity.strategy_name} are those of "
                f"store {book.store_id or 'without a name'}, and this is store {store_id}: it would take the position "
                "for closed. Keep all contracts in one store (kit.persistence.bind('*', store)) and start from the "
                "directory in which the position was opened; or close it by hand and begin with an empty store"
            )
        await self._keep(msgspec.structs.replace(book, store_id=store_id), "try")
        crashpoint("live.start.after_commit")
        await self._deliver()

    async def confirm(self) -> None:
        """Make sure that nobody else has the position, before the venue hears of this process.

        Raises:
            Conflict: another process has it, and this one has lost it for good.
            RetryLater: nobody knows, because the store has been away for longer than the lease.
        """
        await self._guarded(self._position_store.confirm())

    async def end(self) -> None:
        """Wait for a command that is being carried out, and refuse every other from now on."""
        async with self._lock:
            self._ended = True

    async def settle(self, act: Act, command: Change | None = None) -> tuple[Event, ...]:
        async with self._lock:
            self._stop_if_lost()
            if self._ended:
                raise Refused("the run has ended")
            if command is not None and (known := self._known(KIND_OF[command])) is not None:
                if known.refused:
                    raise Refused(known.refused)
                return ()
            written = self.book.commands
            try:
                return await self._settle(act)
            except Refused as refused:
                if command is not None and self.book.commands is written:
                    # It is on the disk with the next one that comes to something: counted, they can be told apart.
                    declined = Commanded(KIND_OF[command], str(refused))
                    self._position_store.book = _commanded(self.book, self._run_state.tick.when_ms, declined)
                raise

    async def _settle(self, act: Act) -> tuple[Event, ...]:
        if self.book.intent is not None:
            raise Refused(f"the order {self.book.intent.order.client_order_id} is under way")
        before = self._run_state.state
        after, events = act(before)
        if after == before:
            return events
        count = self.book.orders + 1 if isinstance(before, Holding) and isinstance(after, Holding) else 0
        intent = self._intended(before, after, events, numbered_from(before) + count)
        if intent is not None:
            if self.no_entry and intent.order.kind in OPENING:
                return self._entry_waits(intent)
            return await self._order(intent)
        book = msgspec.structs.replace(self.book, state=after)
        if _is_told(after) and not _is_told(before):
            book = _commanded(book, self._run_state.tick.when_ms)
        await self._keep(book, "try")
        crashpoint("live.minute.after_commit")
        return events

    def _entry_waits(self, intent: Intent) -> tuple[Event, ...]:
        """An entry that rests goes on resting: `check_entry` finds out if the exchange fills it.

        Raises:
            Refused: a command is not carried out.
        """
        if intent.order.kind == "activate":
            return ()
        raise Refused(f"nothing is opened now: {self.no_entry}")

    def rehearse(self) -> bool:
        """Have what was commanded in this very minute known when it is given again, by a strategy that is asked anew
        because the run before has died in the minute; whether there was anything."""
        if self.book.command_ms < self._run_state.tick.when_ms:
            return False
        self._rehearsed = list(self.book.commands)
        return True

    def _known(self, kind: OrderKind) -> Commanded | None:
        """What became of a command of this kind in the run before; each is told once.

        By its kind alone: its amount may follow from a price or a position that the first one has changed, and
        better is one too few, which the next minute can give again, than one twice.
        """
        if self._run_state.tick.when_ms != self.book.command_ms:
            self._rehearsed.clear()
        for known in self._rehearsed:
            if known.kind == kind:
                self._rehearsed.remove(known)
                return known
        return None

    async def resolve(self) -> tuple[Event, ...]:
        """Find out about an order whose outcome is unknown, and do what is left of it. Returns what happened."""
        async with self._lock:
            self._stop_if_lost()
            await self._guarded(self._position_store.flush())
            await self._deliver()
            intent = self.book.intent
            if intent is None:
                return ()
            if done_already(intent, self.book.state):
                return await self._conclude(intent.order, self.book.state, told_of(intent, self.book.state))
            try:
                report = await self._broker.find(intent.order)
            except Exception as error:
                self._alarms.venue_silent(intent.order.client_order_id, error)
                return ()
            self._alarms.venue_answered()
            verdict = judged(intent.order, report)
            if verdict == "done":
                return await self._done(intent, report.fill)
            if verdict == "open":
                return ()
            with suppress(Refused):
                return await self._send_again(intent, report)
            return ()

    async def check_venue(self) -> tuple[Event, ...]:
        """Ask whether the venue has closed the position or filled the entry by itself. Returns what happened."""
        async with self._lock:
            self._stop_if_lost()
            state, tick = self.book.state, self._run_state.tick
            if self.book.intent is not None or isinstance(state, Flat):
                return ()
            after: State
            try:
                if isinstance(state, Holding):
                    fill = await self._broker.check_position(state.position)
                else:
                    fill = await self._broker.check_entry(state.entry)
            except OrderDeleted:
                if isinstance(state, Holding):
                    if self.unpriced:
                        return ()  # the venue does not tell what it was closed at, and neither does the market yet
                    after, events = closed(state, "closed", tick.price, tick, self._rules)
                else:
                    after, events = cancelled(state, tick, self._rules)
                return await self._conclude(None, after, events)
            except Exception as error:
                self._alarms.venue_silent(signal_id_of(state), error)
                return ()
            self._alarms.venue_answered()
            if fill is None:
                return ()
            if isinstance(state, Holding):
                after, events = closed(state, fill.reason or "closed", fill.price, tick, self._rules, fill)
                return await self._conclude(None, after, events)
            after, events = activated(state, fill, tick, self._rules)
            intent = self._intended(state, after, events, 0, quantities=False)
            return () if intent is None else await self._order(intent)

    def _intended(
        self, before: State, after: State, events: tuple[Event, ...], number: int, *, quantities: bool | None = None
    ) -> Intent | None:
        broker = self._broker
        return intended(
            before,
            after,
            events,
            self._run_state.tick,
            self._rules,
            number,
            store_id=broker.store_id,
            quantities=broker.reports_fills if quantities is None else quantities,
        )

    async def pause(self, paused: bool) -> None:
        """Ask the strategy no more, or again; it holds after a restart as well.

        Raises:
            RetryLater: it could not be written down, and is as before.
        """
        async with self._lock:
            self._stop_if_lost()
            try:
                await self._keep(msgspec.structs.replace(self.book, paused=paused), "store")
            except Unsaved as error:
                raise BacktestKitError(f"whether to pause could not be written down: {error}") from error

    async def adopt(self, state: Holding, event: PositionOpened) -> tuple[Event, ...]:
        """Take over a position that the venue holds and nobody watches; nothing where one is held meanwhile."""
        async with self._lock:
            self._stop_if_lost()
            if self.book.intent is not None or not isinstance(self.book.state, Flat):
                return ()
            return await self._conclude(None, state, (event,))

    async def protect(self, order: Order) -> None:
        """Place a stop on the venue; the books know the position that it is for, or do not want to.

        Raises:
            Whatever the broker raises; Conflict, RetryLater: as `confirm`.
        """
        async with self._lock:
            self._stop_if_lost()
            await self.confirm()
            await self._broker.move_stop(order)

    # Orders

    async def _order(self, intent: Intent) -> tuple[Event, ...]:
        """Write the intent down, then send its order."""
        kind = intent.order.kind
        need: Need = "store" if kind in (*ENTRIES, "add") else "disk"
        book = msgspec.structs.replace(self.book, intent=intent, orders=self.book.orders + 1)
        try:
            await self._keep(book, need)
        except Unsaved as error:
            if kind in ENTRIES:
                self._run_state.state = self._used_up(intent)
                return ()
            self._alarms.order_failed(
                intent.order, str(error), "it was not sent, because nothing could keep a note of it", alarm=True
            )
            if kind not in COMMANDS:
                return ()
            raise Refused(f"it could not be written down: {error}") from error
        except RiskRefused as refused:
            await self._keep(msgspec.structs.replace(self.book, state=self._used_up(intent)), "try")
            return self._risk_rejected(intent, *refused.args)
        crashpoint(f"live.{kind}.after_intent")
        return await self._send(intent)

    async def _send(self, intent: Intent) -> tuple[Event, ...]:
        try:
            await self.confirm()
        except RetryLater as error:
            return await self._failed(intent, OrderTransient(f"it was not sent: {error}", outcome=Outcome.NOT_DONE))
        try:
            fill = await self._hook(intent.order)
        except Exception as error:
            return await self._failed(intent, error)
        crashpoint(f"live.{intent.order.kind}.after_broker")
        return await self._done(intent, fill)

    async def _hook(self, order: Order) -> Fill | None:
        broker = self._broker
        match order.kind:
            case "open" | "activate":
                return await broker.open_position(order)
            case "place":
                await broker.place_entry(order)
            case "cancel":
                return await broker.cancel_entry(order)
            case "close":
                return await broker.close_position(order)
            case "add":
                return await broker.add_to_position(order)
            case "reduce":
                return await broker.reduce_position(order)
            case "move_take":
                await broker.move_take(order)
            case "move_stop" | "breakeven":
                await broker.move_stop(order)
        return None

    async def _done(self, intent: Intent, fill: Fill | None) -> tuple[Event, ...]:
        state, events = fitted(intent, fill, self.book.state, self._rules)
        return await self._conclude(intent.order, state, events)

    async def _conclude(
        self, order: Order | None, state: State, events: tuple[Event, ...], refused: str = ""
    ) -> tuple[Event, ...]:
        """Write down what has happened; whether that succeeds changes nothing about it."""
        book, when_ms = self.book, self._run_state.tick.when_ms if order is None else order.when_ms
        command = isinstance(book.state, Holding) and isinstance(state, Holding)
        lasting = tuple(event for event in events if isinstance(event, Lasting))
        if command and order is not None:
            book = _commanded(book, when_ms, Commanded(order.kind, refused))
        book = msgspec.structs.replace(
            book,
            state=state,
            intent=None,
            outbox=(*book.outbox, *lasting),
            when_ms=book.when_ms if command or not lasting else max(book.when_ms, when_ms),
            orders=0 if isinstance(state, Flat) else book.orders,
        )
        await self._keep(book, "try")
        if order is not None and lasting:
            crashpoint(f"live.{order.kind}.after_commit")
            self._sent += [order.kind]
        await self._deliver()
        return events

    async def _failed(self, intent: Intent, error: Exception) -> tuple[Event, ...]:
        """What to do about an order whose hook has raised."""
        order, state = intent.order, self.book.state
        if isinstance(error, OrderRejected):
            return await self._rejected(intent, str(error))
        if isinstance(error, OrderDeleted) and order.kind in EXITS:
            return await self._done(intent, None)
        text = error_text(error)
        nothing_there = isinstance(error, OrderTransient) and error.outcome is Outcome.NOT_DONE
        if order.kind in ENTRIES or order.kind in EXITS:
            too_often = order.kind in EXITS and order.attempt >= self._rules.settings.CC_ORDER_CLOSE_RETRY_ATTEMPTS
            self._alarms.order_failed(order, text, "the venue is asked about it at the next minute", alarm=too_often)
            return ()
        if order.kind == "activate" and nothing_there:
            # The market was there and the venue's own book was not: the entry goes on resting.
            await self._conclude(order, _still_resting(state), ())
            if order.reason:
                self._alarms.order_failed(order, text, "the entry goes on waiting for its price")
            return ()
        if order.kind in COMMANDS and (nothing_there or isinstance(error, OrderDeleted)):
            await self._conclude(order, state, (), text)
            self._alarms.order_failed(order, text, "it was dropped")
            raise Refused(text)
        self._alarms.order_failed(order, text, "the venue is asked about it at the next minute")
        if order.kind not in COMMANDS:
            return ()
        raise Refused(f"nobody knows whether the venue did it: {text}")

    async def _rejected(self, intent: Intent, text: str) -> tuple[Event, ...]:
        order, state = intent.order, self.book.state
        if order.kind in EXITS:
            refused = msgspec.structs.replace(intent, refused=True)
            await self._keep(msgspec.structs.replace(self.book, intent=refused), "try")
            self._alarms.order_failed(
                order, text, "it is sent again at the next minute, and until the venue confirms", alarm=True
            )
            return ()
        if order.kind in ENTRIES:
            return await self._give_up(intent, text)
        if order.kind == "activate" and isinstance(state, Resting):
            self._alarms.order_failed(order, text, "the entry is cancelled at the next minute", alarm=True)
            return await self._conclude(order, msgspec.structs.replace(state, order="cancel"), ())
        await self._conclude(order, state, (), text)
        self._alarms.order_failed(order, text, "it was dropped", alarm=True)
        raise Refused(text)

    async def _give_up(self, intent: Intent, text: str, *, alarm: bool = True) -> tuple[Event, ...]:
        await self._conclude(intent.order, dropped(intent), ())
        self._alarms.order_failed(intent.order, text, "it was given up", alarm=alarm)
        return ()

    async def _send_again(self, intent: Intent, report: OrderReport) -> tuple[Event, ...]:
        """Go on with an order that the venue has not carried out."""
        order, state, tick, status = intent.order, self.book.state, self._run_state.tick, report.status
        fresh = order.when_ms == tick.when_ms
        refused = intent.refused or status in ("cancelled", "rejected")
        if order.kind in ENTRIES:
            again = await self._entry_again(intent, status, fresh=fresh)
            if again is None:
                return ()
            intent = again
        elif order.kind in EXITS:
            number = numbered_from(state) + self.book.orders + 1
            intent = renamed(intent, number, report.fill) if refused else retried(intent)
            intent = intent if fresh else renewed(intent, state, tick, self._rules)
        elif order.kind == "activate" and refused and isinstance(state, Resting):
            return await self._conclude(None, *cancelled(state, tick, self._rules))
        elif fresh and not refused and not (self.no_entry and order.kind in OPENING):
            intent = retried(intent)
        else:
            text = f"the venue knows it as {status}"
            await self._conclude(order, _still_resting(state), (), text)
            if order.kind != "activate" or order.reason:
                self._alarms.order_failed(order, text, "it was dropped")
            return ()
        return await self._order(intent)

    async def _entry_again(self, intent: Intent, status: str, *, fresh: bool) -> Intent | None:
        """An order to open at its next attempt, or None where it is not to be sent now."""
        order, settings, tick = intent.order, self._rules.settings, self._run_state.tick
        if self._position_store.degraded or self.blind:
            return None
        if status in ("cancelled", "rejected"):
            await self._give_up(intent, f"the venue knows it as {status}")
            return None
        if order.attempt >= settings.CC_ORDER_OPEN_RETRY_ATTEMPTS:
            await self._give_up(intent, f"it did not go through in {order.attempt + 1} attempts")
            return None
        if self.stopping:
            await self._give_up(intent, "the run is told to stop", alarm=False)
            return None
        if self.no_entry:
            return None
        if not fresh:
            intent = renewed(intent, self.book.state, tick, self._rules)
            target = intent.target
            entry = entry_of(target.position) if isinstance(target, Holding) else None
            entry = target.entry if isinstance(target, Resting) else entry
            if entry is None:
                return None
            signal = as_signal(entry)
            try:
                check_signal(signal, self._rules.identity, tick.price, tick.when_ms, settings)
            except UserError as error:
                await self._give_up(intent, f"the market has moved on: {error}", alarm=False)
                return None
            if rejected := await self.minute.refusal(signal):
                await self._give_up(intent, "a risk profile refuses it now", alarm=False)
                self._run_state.events += rejected
                return None
        return retried(intent)

    # Notes

    async def _keep(self, book: PositionState, need: Need) -> None:
        book = msgspec.structs.replace(book, seen_ms=max(book.seen_ms, self._run_state.tick.when_ms))
        try:
            await self._guarded(self._position_store.keep(book, need))
        finally:
            self._run_state.state = self.book.state

    async def _guarded(self, work: Awaitable[None]) -> None:
        try:
            await work
        except Conflict as error:
            self.lost = error
            raise

    def _stop_if_lost(self) -> None:
        if self.lost is not None:
            raise self.lost

    async def _deliver(self) -> None:
        """Hand what happened to who keeps records of it; what fails is handed over again at the next minute."""
        outbox = self.book.outbox
        if outbox and await self._recorder.take_in(outbox):
            self._position_store.book = msgspec.structs.replace(self.book, outbox=())

    def _used_up(self, intent: Intent) -> Flat:
        """The decision slot is used, the signal is not."""
        before = self.book.state
        return Flat(intent.target.last_slot_ms, before.last_signal_id if isinstance(before, Flat) else "")

    def _risk_rejected(self, intent: Intent, risk_name: str, reason: str) -> tuple[Event, ...]:
        target = intent.target
        if isinstance(target, Flat):
            return ()
        entry = entry_of(target.position) if isinstance(target, Holding) else target.entry
        rejected = RiskRejected(
            identity=self._rules.identity,
            when_ms=self._run_state.tick.when_ms,
            price=self._run_state.tick.price,
            signal=as_signal(entry),
            risk_name=risk_name,
            reason=reason,
        )
        return (rejected,)

    # What the minute says of its events, and of the user's code

    def account(self, event: Event) -> None:
        self._telling = event
        if isinstance(event, PositionClosed):
            self.trades.append(event.trade)

    def told(self, event: Event) -> None:
        self._telling = None
        if self._sent and isinstance(event, Lasting):
            crashpoint(f"live.{self._sent.pop(0)}.after_emit")

    @property
    def undecided(self) -> str:
        """Why the strategy could not decide at this minute, and is asked again at the next; empty where it could."""
        when_ms, reason = self._undecided
        return reason if when_ms == self._run_state.tick.when_ms else ""

    async def failed(self, what: str, error: Exception) -> None:
        self._stop_if_lost()
        if what == "get_signal" and isinstance(error, RetryLater):
            (before_ms, _), now_ms = self._undecided, self._run_state.tick.when_ms
            self._undecided = now_ms, str(error)
            if now_ms - before_ms <= _ONE_OUTAGE_MS:
                return
        # A handler that fails over the news of a failure would do so for ever.
        self._alarms.user_failed(what, error, tell=not isinstance(self._telling, StrategyFailed))


def _commanded(book: PositionState, when_ms: int, *commands: Commanded) -> PositionState:
    """The book with the commands of a minute in it, and none of an earlier one."""
    earlier = book.commands if book.command_ms >= when_ms else ()
    return msgspec.structs.replace(book, command_ms=max(book.command_ms, when_ms), commands=(*earlier, *commands))


def _is_told(state: State) -> bool:
    """Whether a command waits to be carried out at the next minute."""
    return bool(state.order) if isinstance(state, Resting) else isinstance(state, Holding) and state.closing is not None


def _still_resting(state: State) -> State:
    return msgspec.structs.replace(state, order="") if isinstance(state, Resting) else state
