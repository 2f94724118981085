"""Sends the orders of a live run: stores each before it is sent, and looks it up before it is sent again.

A change that needs the exchange is stored twice: first the intent, with the order that is about to be sent; then, once
the exchange has answered, the outcome without the intent. If no answer comes, because the exchange is silent or this
process died, the intent is still there at the next minute, and the order is looked up on the exchange before anything
is sent again. A restart is such a minute.
"""

from __future__ import annotations

from collections.abc import Awaitable

import msgspec

from backtest_kit.broker.base import (
    Broker,
    Fill,
    Order,
    OrderDeleted,
    OrderRejected,
    OrderReport,
    OrderTransient,
)
from backtest_kit.engine.commands import Refused
from backtest_kit.engine.step import Flat, Holding, Resting, State
from backtest_kit.engine.validation import check_signal
from backtest_kit.errors import Conflict, Outcome, RetryLater, UserError
from backtest_kit.format import error_text
from backtest_kit.model.event import Event, Lasting, RiskRejected
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.run.live.alarms import Alarms
from backtest_kit.run.live.event_recorder import EventRecorder
from backtest_kit.run.live.flags import RunFlags
from backtest_kit.run.live.hooks import LiveHooks
from backtest_kit.run.live.orders import (
    COMMANDS,
    ENTRIES,
    EXITS,
    OPENING,
    Intent,
    cancelled,
    dropped,
    fitted,
    numbered_from,
    renamed,
    renewed,
    retried,
)
from backtest_kit.run.live.position_state import Commanded, PositionState
from backtest_kit.run.live.position_store import Need, PositionStore, RiskRefused, Unsaved
from backtest_kit.run.minute import Minute
from backtest_kit.run.run_state import RunState


class OrderSender:
    """Takes one order at a time from its intent to its outcome. `minute` is set after construction."""

    minute: Minute

    def __init__(
        self,
        run_state: RunState,
        position_store: PositionStore,
        broker: Broker,
        alarms: Alarms,
        recorder: EventRecorder,
        flags: RunFlags,
        hooks: LiveHooks,
    ) -> None:
        self.run_state = run_state
        self.rules = run_state.rules
        self.position_store = position_store
        self.broker = broker
        self.alarms = alarms
        self._recorder = recorder
        self.flags = flags
        self.hooks = hooks

    @property
    def position_state(self) -> PositionState:
        return self.position_store.position_state

    async def place(self, intent: Intent) -> tuple[Event, ...]:
        """Store the intent, then send its order."""
        kind = intent.order.kind
        need: Need = "store" if kind in (*ENTRIES, "add") else "disk"
        orders = self.position_state.orders + 1
        try:
            await self.save(msgspec.structs.replace(self.position_state, intent=intent, orders=orders), need)
        except Unsaved as error:
            if kind in ENTRIES:
                self.run_state.state = self._used_up(intent)
                return ()
            self.alarms.order_failed(
                intent.order, str(error), "it was not sent, because it could not be stored anywhere", alarm=True
            )
            if kind not in COMMANDS:
                return ()
            raise Refused(f"it could not be stored: {error}") from error
        except RiskRefused as refused:
            await self.save(msgspec.structs.replace(self.position_state, state=self._used_up(intent)), "try")
            return self._risk_rejected(intent, *refused.args)
        crashpoint(f"live.{kind}.after_intent")
        return await self._send(intent)

    async def _send(self, intent: Intent) -> tuple[Event, ...]:
        try:
            await self.confirm()
        except RetryLater as error:
            unsent = OrderTransient(f"it was not sent: {error}", outcome=Outcome.NOT_DONE)
            return await self._order_failed(intent, unsent)
        try:
            fill = await self._call_broker(intent.order)
        except Exception as error:
            return await self._order_failed(intent, error)
        crashpoint(f"live.{intent.order.kind}.after_broker")
        return await self.filled(intent, fill)

    async def _call_broker(self, order: Order) -> Fill | None:
        broker = self.broker
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

    async def filled(self, intent: Intent, fill: Fill | None) -> tuple[Event, ...]:
        """The exchange has carried out an order; without a fill, as the engine decided it."""
        state, events = fitted(intent, fill, self.position_state.state, self.rules)
        return await self.record_outcome(intent.order, state, events)

    async def record_outcome(
        self, order: Order | None, state: State, events: tuple[Event, ...], refused: str = ""
    ) -> tuple[Event, ...]:
        """Store what has happened. The run goes on with it even if that fails."""
        now, when_ms = self.position_state, self.run_state.tick.when_ms if order is None else order.when_ms
        command = isinstance(now.state, Holding) and isinstance(state, Holding)
        lasting = tuple(event for event in events if isinstance(event, Lasting))
        if command and order is not None:
            now = now.with_commands(when_ms, Commanded(order.kind, refused))
        now = msgspec.structs.replace(
            now,
            state=state,
            intent=None,
            outbox=(*now.outbox, *lasting),
            when_ms=now.when_ms if command or not lasting else max(now.when_ms, when_ms),
            orders=0 if isinstance(state, Flat) else now.orders,
        )
        await self.save(now, "try")
        if order is not None and lasting:
            crashpoint(f"live.{order.kind}.after_commit")
            self.hooks.order_done(order.kind)
        await self.deliver_outbox()
        return events

    # Failed orders

    async def _order_failed(self, intent: Intent, error: Exception) -> tuple[Event, ...]:
        """Handle an order whose hook raised."""
        order, state = intent.order, self.position_state.state
        if isinstance(error, OrderRejected):
            return await self._rejected(intent, str(error))
        if isinstance(error, OrderDeleted) and order.kind in EXITS:
            return await self.filled(intent, None)
        text = error_text(error)
        nothing_there = isinstance(error, OrderTransient) and error.outcome is Outcome.NOT_DONE
        if order.kind in ENTRIES or order.kind in EXITS:
            too_often = order.kind in EXITS and order.attempt >= self.rules.settings.CC_ORDER_CLOSE_RETRY_ATTEMPTS
            self.alarms.order_failed(order, text, "it is looked up at the next minute", alarm=too_often)
            return ()
        if order.kind == "activate" and nothing_there:
            # The price was reached in the candles but not on the exchange: the entry goes on resting.
            await self.record_outcome(order, _still_resting(state), ())
            if order.reason:
                self.alarms.order_failed(order, text, "the entry still waits for its price")
            return ()
        if order.kind in COMMANDS and (nothing_there or isinstance(error, OrderDeleted)):
            await self.record_outcome(order, state, (), text)
            self.alarms.order_failed(order, text, "it was dropped")
            raise Refused(text)
        self.alarms.order_failed(order, text, "it is looked up at the next minute")
        if order.kind not in COMMANDS:
            return ()
        raise Refused(f"its outcome is unknown: {text}")

    async def _rejected(self, intent: Intent, text: str) -> tuple[Event, ...]:
        order, state = intent.order, self.position_state.state
        if order.kind in EXITS:
            refused = msgspec.structs.replace(intent, refused=True)
            await self.save(msgspec.structs.replace(self.position_state, intent=refused), "try")
            self.alarms.order_failed(
                order, text, "it is sent again every minute until the exchange confirms", alarm=True
            )
            return ()
        if order.kind in ENTRIES:
            return await self._give_up(intent, text)
        if order.kind == "activate" and isinstance(state, Resting):
            self.alarms.order_failed(order, text, "the entry is cancelled at the next minute", alarm=True)
            return await self.record_outcome(order, msgspec.structs.replace(state, order="cancel"), ())
        await self.record_outcome(order, state, (), text)
        self.alarms.order_failed(order, text, "it was dropped", alarm=True)
        raise Refused(text)

    async def _give_up(self, intent: Intent, text: str, *, alarm: bool = True) -> tuple[Event, ...]:
        await self.record_outcome(intent.order, dropped(intent), ())
        self.alarms.order_failed(intent.order, text, "it was given up", alarm=alarm)
        return ()

    async def send_again(self, intent: Intent, report: OrderReport) -> tuple[Event, ...]:
        """Handle an order that the exchange has not carried out: send it again, or drop it."""
        order, state, tick, status = intent.order, self.position_state.state, self.run_state.tick, report.status
        fresh = order.when_ms == tick.when_ms
        refused = intent.refused or status in ("cancelled", "rejected")
        if order.kind in ENTRIES:
            again = await self._entry_again(intent, status, fresh=fresh)
            if again is None:
                return ()
            intent = again
        elif order.kind in EXITS:
            number = numbered_from(state) + self.position_state.orders + 1
            intent = renamed(intent, number, report.fill) if refused else retried(intent)
            intent = intent if fresh else renewed(intent, state, tick, self.rules)
        elif order.kind == "activate" and refused and isinstance(state, Resting):
            return await self.record_outcome(None, *cancelled(state, tick, self.rules))
        elif fresh and not refused and not (self.flags.no_entry and order.kind in OPENING):
            intent = retried(intent)
        else:
            text = f"its status on the exchange is {status}"
            await self.record_outcome(order, _still_resting(state), (), text)
            if order.kind != "activate" or order.reason:
                self.alarms.order_failed(order, text, "it was dropped")
            return ()
        return await self.place(intent)

    async def _entry_again(self, intent: Intent, status: str, *, fresh: bool) -> Intent | None:
        """An order to open at its next attempt, or None if it must not be sent now."""
        order, settings, tick = intent.order, self.rules.settings, self.run_state.tick
        if self.position_store.degraded or self.flags.blind:
            return None
        if status in ("cancelled", "rejected"):
            await self._give_up(intent, f"its status on the exchange is {status}")
            return None
        if order.attempt >= settings.CC_ORDER_OPEN_RETRY_ATTEMPTS:
            await self._give_up(intent, f"it did not go through in {order.attempt + 1} attempts")
            return None
        if self.flags.stopping:
            await self._give_up(intent, "the run is stopping", alarm=False)
            return None
        if self.flags.no_entry:
            return None
        if not fresh:
            intent = renewed(intent, self.position_state.state, tick, self.rules)
            if isinstance(intent.target, Flat):
                return None
            signal = intent.target.entry.signal
            try:
                check_signal(signal, self.rules.identity, tick.price, tick.when_ms, settings)
            except UserError as error:
                await self._give_up(intent, f"the market has moved: {error}", alarm=False)
                return None
            if rejected := await self.minute.refusal(signal):
                await self._give_up(intent, "a risk profile refuses it now", alarm=False)
                self.run_state.events += rejected
                return None
        return retried(intent)

    def _used_up(self, intent: Intent) -> Flat:
        """The decision slot is used up, the signal is not."""
        before = self.position_state.state
        return Flat(intent.target.last_slot_ms, before.last_signal_id if isinstance(before, Flat) else "")

    def _risk_rejected(self, intent: Intent, risk_name: str, reason: str) -> tuple[Event, ...]:
        target = intent.target
        if isinstance(target, Flat):
            return ()
        rejected = RiskRejected(
            identity=self.rules.identity,
            when_ms=self.run_state.tick.when_ms,
            price=self.run_state.tick.price,
            signal=target.entry.signal,
            risk_name=risk_name,
            reason=reason,
        )
        return (rejected,)

    # Storing

    async def confirm(self) -> None:
        """Make sure that no other process has the position, before an order is sent.

        Raises:
            Conflict: another process has it; stop.
            RetryLater: unknown, because the store has been away for longer than the lease.
        """
        await self.guarded(self.position_store.confirm())

    async def save(self, position_state: PositionState, need: Need) -> None:
        """As `PositionStore.keep`, as of this minute; the run goes on with what was kept."""
        seen_ms = max(position_state.seen_ms, self.run_state.tick.when_ms)
        try:
            await self.guarded(self.position_store.keep(msgspec.structs.replace(position_state, seen_ms=seen_ms), need))
        finally:
            self.run_state.state = self.position_state.state

    async def guarded(self, work: Awaitable[None]) -> None:
        """Await `work`, and remember if another process has the position."""
        try:
            await work
        except Conflict as error:
            self.hooks.lost = error
            raise

    async def deliver_outbox(self) -> None:
        """Write the events of the outbox into the records; what fails is tried again at the next minute."""
        outbox = self.position_state.outbox
        if outbox and await self._recorder.take_in(outbox):
            self.position_store.position_state = msgspec.structs.replace(self.position_state, outbox=())


def _still_resting(state: State) -> State:
    return msgspec.structs.replace(state, order="") if isinstance(state, Resting) else state
