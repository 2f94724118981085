"""Turns decisions of the engine into orders, and takes in what happens on the exchange."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import msgspec

from backtest_kit.broker.base import Order, OrderDeleted, OrderKind
from backtest_kit.engine.commands import Refused
from backtest_kit.engine.step import Flat, Holding, Resting, State
from backtest_kit.errors import BacktestKitError, UserError
from backtest_kit.model.event import Change, Event, PositionOpened
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.run.live.order_sender import OrderSender
from backtest_kit.run.live.orders import (
    KIND_OF,
    OPENING,
    Intent,
    activated,
    cancelled,
    closed,
    done_already,
    events_of,
    intended,
    judged,
    numbered_from,
    signal_id_of,
)
from backtest_kit.run.live.position_state import Commanded, PositionState
from backtest_kit.run.live.position_store import Unsaved
from backtest_kit.run.live.rehearsal import Rehearsal
from backtest_kit.run.run_state import Act


class OrderManager:
    """The position of one run and its orders: one change at a time."""

    def __init__(self, sender: OrderSender) -> None:
        self._sender = sender
        self._run_state = sender.run_state
        self._rules = sender.rules
        self._position_store = sender.position_store
        self._broker = sender.broker
        self._alarms = sender.alarms
        self._flags = sender.flags
        self._hooks = sender.hooks
        self._lock = asyncio.Lock()
        self._rehearsal = Rehearsal()
        self._ended = False
        self._run_state.executor = self

    @property
    def position_state(self) -> PositionState:
        return self._position_store.position_state

    @property
    def stopping(self) -> bool:
        return self._flags.stopping

    @property
    def paused(self) -> bool:
        """Whether the strategy is not called: it is paused, the store rejects writes, or entries wait."""
        return self.position_state.paused or bool(self._position_store.degraded or self._flags.no_entry)

    @property
    def unsent(self) -> PositionState:
        """The position state as if a pending order to open was never sent."""
        intent = self.position_state.intent
        opens = intent is not None and intent.order.kind in OPENING
        return msgspec.structs.replace(self.position_state, intent=None) if opens else self.position_state

    async def take_over(self) -> None:
        """Store that this process has the position now.

        Raises:
            UserError: its orders were sent from a store of another id, and cannot be found from this one.
            Conflict, Damaged: as `PositionStore.keep`.
        """
        found, store_id = self.position_state, self._broker.store_id
        self._run_state.state = found.state
        if found.store_id != store_id and not found.is_idle:
            identity = self._rules.identity
            raise UserError(
                f"the orders of {identity.symbol} on {identity.exchange_name} by {identity.strategy_name} belong to "
                f"store {found.store_id or 'without a name'}, and this is store {store_id}: it would believe that the "
                "position is closed. Keep all contracts in one store (kit.persistence.bind('*', store)) and start from "
                "the directory in which the position was opened; or close it by hand and begin with an empty store"
            )
        await self._sender.save(msgspec.structs.replace(found, store_id=store_id), "try")
        crashpoint("live.start.after_commit")
        await self._sender.deliver_outbox()

    def rehearse(self) -> bool:
        """As `Rehearsal.begin`."""
        return self._rehearsal.begin(self.position_state, self._run_state.tick.when_ms)

    async def end(self) -> None:
        """Wait for the current command, and refuse all others from now on."""
        async with self._lock:
            self._ended = True

    async def execute(self, act: Act, command: Change | None = None) -> tuple[Event, ...]:
        async with self._lock:
            self._hooks.stop_if_lost()
            if self._ended:
                raise Refused("the run has ended")
            if command is None:
                return await self._execute(act)
            return await self._execute_command(act, KIND_OF[command])

    async def _execute_command(self, act: Act, kind: OrderKind) -> tuple[Event, ...]:
        before, when_ms = self.position_state, self._run_state.tick.when_ms
        known = self._rehearsal.outcome(kind, before, when_ms)
        if known is not None:
            if known.refused:
                raise Refused(known.refused)
            return ()
        try:
            return await self._execute(act)
        except Refused as refused:
            if self.position_state.commands is before.commands:
                # Not stored by itself: it is written with the next command that changes something.
                declined = Commanded(kind, str(refused))
                self._position_store.position_state = self.position_state.with_commands(when_ms, declined)
            raise

    async def _execute(self, act: Act) -> tuple[Event, ...]:
        if self.position_state.intent is not None:
            raise Refused(f"order {self.position_state.intent.order.client_order_id} is still pending")
        before = self._run_state.state
        after, events = act(before)
        if after == before:
            return events
        count = self.position_state.orders + 1 if isinstance(before, Holding) and isinstance(after, Holding) else 0
        intent = self._intended(before, after, events, numbered_from(before) + count)
        if intent is not None:
            if self._flags.no_entry and intent.order.kind in OPENING:
                return self._entry_waits(intent)
            return await self._sender.place(intent)
        position_state = msgspec.structs.replace(self.position_state, state=after)
        if _waits_for_next_minute(after) and not _waits_for_next_minute(before):
            position_state = position_state.with_commands(self._run_state.tick.when_ms)
        await self._sender.save(position_state, "try")
        crashpoint("live.minute.after_commit")
        return events

    def _entry_waits(self, intent: Intent) -> tuple[Event, ...]:
        """A resting entry goes on resting: `check_entry` finds out if the exchange fills it.

        Raises:
            Refused: it is another order that opens.
        """
        if intent.order.kind == "activate":
            return ()
        raise Refused(f"nothing is opened now: {self._flags.no_entry}")

    async def manage_pending_order(self) -> tuple[Event, ...]:
        """Look up an order whose outcome is unknown, and finish it. Returns what happened."""
        async with self._lock:
            self._hooks.stop_if_lost()
            await self._sender.guarded(self._position_store.flush())
            await self._sender.deliver_outbox()
            intent, state = self.position_state.intent, self.position_state.state
            if intent is None:
                return ()
            if done_already(intent, state):
                return await self._sender.record_outcome(intent.order, state, events_of(intent, state))
            try:
                report = await self._broker.find(intent.order)
            except Exception as error:
                self._alarms.venue_silent(intent.order.client_order_id, error)
                return ()
            self._alarms.venue_answered()
            verdict = judged(intent.order, report)
            if verdict == "done":
                return await self._sender.filled(intent, report.fill)
            if verdict == "open":
                return ()
            with suppress(Refused):
                return await self._sender.send_again(intent, report)
            return ()

    async def check_exchange(self) -> tuple[Event, ...]:
        """Take in what happened on the exchange: the position was closed, the entry filled or cancelled. Returns what
        happened."""
        async with self._lock:
            self._hooks.stop_if_lost()
            state, tick = self.position_state.state, self._run_state.tick
            if self.position_state.intent is not None or isinstance(state, Flat):
                return ()
            after: State
            try:
                if isinstance(state, Holding):
                    fill = await self._broker.check_position(state.position)
                else:
                    fill = await self._broker.check_entry(state.entry)
            except OrderDeleted:
                if isinstance(state, Holding):
                    if self._flags.unpriced:
                        return ()  # no price is known yet at which it was closed
                    after, events = closed(state, "closed", tick.price, tick, self._rules)
                else:
                    after, events = cancelled(state, tick, self._rules)
                return await self._sender.record_outcome(None, after, events)
            except Exception as error:
                self._alarms.venue_silent(signal_id_of(state), error)
                return ()
            self._alarms.venue_answered()
            if fill is None:
                return ()
            if isinstance(state, Holding):
                after, events = closed(state, fill.reason or "closed", fill.price, tick, self._rules, fill)
                return await self._sender.record_outcome(None, after, events)
            after, events = activated(state, fill, tick, self._rules)
            intent = self._intended(state, after, events, 0, quantities=False)
            return () if intent is None else await self._sender.place(intent)

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
        """Stop calling the strategy, or call it again; also after a restart.

        Raises:
            BacktestKitError: it could not be stored, and is as before.
        """
        async with self._lock:
            self._hooks.stop_if_lost()
            try:
                await self._sender.save(msgspec.structs.replace(self.position_state, paused=paused), "store")
            except Unsaved as error:
                raise BacktestKitError(f"the pause could not be stored: {error}") from error

    async def adopt(self, state: Holding, event: PositionOpened) -> tuple[Event, ...]:
        """Take over a position on the exchange that no run manages; nothing if this run has one by now."""
        async with self._lock:
            self._hooks.stop_if_lost()
            if not self.position_state.is_idle:
                return ()
            return await self._sender.record_outcome(None, state, (event,))

    async def protect(self, order: Order) -> None:
        """Place a stop on the exchange for a position without one, ours or not.

        Raises:
            Conflict, RetryLater: as `confirm`.
            Exception: what the broker raises.
        """
        async with self._lock:
            self._hooks.stop_if_lost()
            await self._sender.confirm()
            await self._broker.move_stop(order)


def _waits_for_next_minute(state: State) -> bool:
    """Whether a command waits to be carried out at the next minute."""
    return bool(state.order) if isinstance(state, Resting) else isinstance(state, Holding) and state.closing is not None
