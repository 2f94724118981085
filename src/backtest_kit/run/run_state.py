"""Where commands meet the state of a run: views of the position and the entry, read-only except for commands."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Literal, Protocol

import msgspec

from backtest_kit.engine import commands
from backtest_kit.engine.pnl import closed_pct, effective_price, profit, remaining_cost
from backtest_kit.engine.step import Flat, Holding, Resting, Rules, State, Tick
from backtest_kit.errors import UserError
from backtest_kit.model.event import Change, Event, PositionChanged
from backtest_kit.model.interval import MINUTE_MS, to_datetime
from backtest_kit.model.position import Entry, Extreme, Position, Reduction, RestingEntry
from backtest_kit.model.price import price_text
from backtest_kit.model.signal import Direction
from backtest_kit.records.unawaited import must_await

FULLY_REDUCED = "full_partial_close"


class CommandOutcome(msgspec.Struct, frozen=True):
    """The outcome of a command. True if it was accepted."""

    accepted: bool
    reason: str = ""
    """Why it was not accepted, if so."""

    def __bool__(self) -> bool:
        return self.accepted


_ACCEPTED = CommandOutcome(True)


Act = Callable[[State], tuple[State, tuple[Event, ...]]]
"""A change of state: computes the new state and the events, and changes nothing itself.

Raises `commands.Refused` if the state or the market does not allow it."""


class Executor(Protocol):
    """Carries out changes of state in a run that can be killed at any moment."""

    async def execute(self, act: Act, command: Change | None = None) -> tuple[Event, ...]:
        """Do `act`: write the intent, send the order, and set the state. Returns the events.

        `command` names the command that changes the position, if it is one. When its minute is repeated after a crash,
        the command is not carried out twice.

        Raises:
            commands.Refused: `act` was not possible, or the exchange refused it.
        """
        ...


class RunState:
    """The state of one run, its current minute, and the events that commands have caused since the last call."""

    __slots__ = ("events", "executor", "rules", "state", "tick")

    def __init__(self, rules: Rules, executor: Executor | None = None) -> None:
        self.rules = rules
        self.executor = executor
        self.state: State = Flat()
        self.tick = Tick(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        self.events: list[Event] = []

    async def apply(self, act: Act, command: Change | None = None) -> tuple[Event, ...]:
        """Change the state, and return the events."""
        if self.executor is not None:
            return await self.executor.execute(act, command)
        self.state, events = act(self.state)
        return events

    def position(self) -> PositionView | None:
        return PositionView(self, self.state.position) if isinstance(self.state, Holding) else None

    def entry(self) -> EntryView | None:
        return EntryView(self, self.state.entry) if isinstance(self.state, Resting) else None

    def take_events(self) -> list[Event]:
        events, self.events = self.events, []
        return events


class PositionView:
    """An open position as it is now. The view follows the changes of this position only.

    Profits are at the current price, after fees and slippage. Commands are carried out at the current
    price; they return an outcome that says whether they were accepted, and raise only for invalid arguments.
    """

    __slots__ = ("_last", "_run_state")

    def __init__(self, run_state: RunState, position: Position) -> None:
        self._run_state = run_state
        self._last = position

    @property
    def value(self) -> Position:
        """The whole position as a frozen value; once it is closed, its last value."""
        state = self._run_state.state
        if isinstance(state, Holding) and state.position.signal_id == self._last.signal_id:
            self._last = state.position
        return self._last

    @property
    def signal_id(self) -> str:
        return self._last.signal_id

    @property
    def side(self) -> Direction:
        """ "long" or "short"."""
        return self._last.side

    @property
    def price_open(self) -> float:
        """Effective entry price: the cost-weighted harmonic mean of the entries."""
        return effective_price(self.value.entries, self.value.reductions)

    @property
    def take_profit(self) -> float:
        """The level in force."""
        return self.value.take_profit

    @property
    def stop_loss(self) -> float:
        """The level in force."""
        return self.value.stop_loss

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.value.entries

    @property
    def reductions(self) -> tuple[Reduction, ...]:
        return self.value.reductions

    @property
    def cost(self) -> float:
        """The total invested, in quote currency."""
        return self.value.cost

    @property
    def remaining_cost(self) -> float:
        """The part of it that is still open."""
        return remaining_cost(self.value.entries, self.value.reductions)

    @property
    def closed_pct(self) -> float:
        """The part of it that has been closed, in percent."""
        return closed_pct(self.value.entries, self.value.reductions)

    @property
    def pnl_pct(self) -> float:
        """Profit in percent of the total invested, if the rest were closed now."""
        return self._profit()[0]

    @property
    def pnl_cost(self) -> float:
        """The same in quote currency."""
        return self._profit()[1]

    @property
    def peak(self) -> Extreme:
        """The best price so far, and the profit there."""
        return self.value.peak

    @property
    def fall(self) -> Extreme:
        """The worst price so far, and the profit there."""
        return self.value.fall

    @property
    def opened_at(self) -> datetime:
        return to_datetime(self._last.opened_at_ms)

    @property
    def minutes_open(self) -> int:
        """Whole minutes since it was opened."""
        return (self._run_state.tick.when_ms - self._last.opened_at_ms) // MINUTE_MS

    @property
    def minutes_left(self) -> float:
        """Minutes until it expires; `math.inf` if it never does."""
        return max(0.0, self._last.minutes - self.minutes_open)

    @property
    def breakeven_possible(self) -> bool:
        """Whether `breakeven()` would be accepted now."""
        try:
            commands.breakeven(self.value, self._run_state.tick.price, self._run_state.rules.settings)
        except commands.Refused:
            return False
        return True

    @must_await
    async def reduce(self, *, percent: float | None = None, cost: float | None = None) -> CommandOutcome:
        """Close a part: `percent` of what is still open, or `cost` of it. Reducing all of it closes the position.

        Raises:
            UserError: not exactly one of the two is given, or it is out of range.
        """
        when_ms = self._run_state.tick.when_ms
        return await self._change(
            "reduced", lambda held, price: commands.reduce(held, price, when_ms, percent=percent, cost=cost)
        )

    @must_await
    async def add(self, cost: float | None = None) -> CommandOutcome:
        """Buy more for `cost` (default CC_POSITION_ENTRY_COST), at a better price than ever before.

        Raises:
            UserError: `cost` is not a number above 0.
        """
        settings, when_ms = self._run_state.rules.settings, self._run_state.tick.when_ms
        amount = settings.CC_POSITION_ENTRY_COST if cost is None else cost
        return await self._change("added", lambda held, price: commands.add(held, price, when_ms, amount, settings))

    @must_await
    async def move_stop(self, price: float) -> CommandOutcome:
        """Move the stop loss to an absolute price, towards profit.

        Raises:
            UserError: `price` is not a price.
        """
        settings = self._run_state.rules.settings
        return await self._change("stop_moved", lambda held, now: commands.move_stop(held, now, price, settings))

    @must_await
    async def move_take(self, price: float) -> CommandOutcome:
        """Move the take profit to an absolute price, towards the entry.

        Raises:
            UserError: `price` is not a price.
        """
        settings = self._run_state.rules.settings
        return await self._change("take_moved", lambda held, now: commands.move_take(held, now, price, settings))

    @must_await
    async def breakeven(self) -> CommandOutcome:
        """Move the stop loss to the effective entry price, once the profit covers the costs."""
        settings = self._run_state.rules.settings
        return await self._change("breakeven", lambda held, now: commands.breakeven(held, now, settings))

    @must_await
    async def close(self, note: str = "") -> CommandOutcome:
        """Close it at the next minute, at that minute's price, with the reason "closed"."""
        given: object = note
        if not isinstance(given, str):
            raise UserError(f"note is {given!r}: give a text")
        return await self._give(lambda state: (msgspec.structs.replace(self._held(state), closing=note), ()))

    async def _change(self, change: Change, act: Callable[[Position, float], Position]) -> CommandOutcome:
        return await self._give(partial(self._changed, change, act), change)

    async def _give(self, act: Act, command: Change | None = None) -> CommandOutcome:
        run_state = self._run_state
        try:
            run_state.events += await run_state.apply(act, command)
        except commands.Refused as refused:
            return CommandOutcome(False, str(refused))
        return _ACCEPTED

    def _changed(
        self, change: Change, act: Callable[[Position, float], Position], state: State
    ) -> tuple[State, tuple[Event, ...]]:
        held, run_state = self._held(state), self._run_state
        position = act(held.position, run_state.tick.price)
        closing = FULLY_REDUCED if commands.is_closed(position) else None
        changed = PositionChanged(
            identity=run_state.rules.identity,
            when_ms=run_state.tick.when_ms,
            price=run_state.tick.price,
            position=position,
            change=change,
        )
        return Holding(position, held.last_slot_ms, closing), (changed,)

    def _held(self, state: State) -> Holding:
        if not isinstance(state, Holding) or state.position.signal_id != self._last.signal_id:
            raise commands.Refused(f"position {self._last.signal_id} is closed")
        if state.closing is not None:
            raise commands.Refused(f"position {self._last.signal_id} closes at the next minute")
        return state

    def _profit(self) -> tuple[float, float]:
        value, run_state = self.value, self._run_state
        return profit(value.side, value.entries, value.reductions, run_state.tick.price, run_state.rules.settings)

    def __repr__(self) -> str:
        start = price_text(self.price_open)
        return f"PositionView({self.side} {self._last.symbol} from {start}, {self.pnl_pct:+.2f} %)"


class EntryView:
    """A resting entry and its commands."""

    __slots__ = ("_run_state", "value")

    value: RestingEntry
    """The whole entry as a frozen value."""

    def __init__(self, run_state: RunState, entry: RestingEntry) -> None:
        self._run_state = run_state
        self.value = entry

    @property
    def minutes_waiting(self) -> int:
        """Whole minutes since it was placed."""
        return (self._run_state.tick.when_ms - self.value.scheduled_at_ms) // MINUTE_MS

    @must_await
    async def cancel(self) -> CommandOutcome:
        """Cancel it at the next minute, with the reason "user"."""
        return await self._order("cancel")

    @must_await
    async def activate(self) -> CommandOutcome:
        """Enter at the next minute without waiting for the price, at that minute's price.

        It is cancelled with the reason "price_reject" if that price is not between its levels.
        """
        return await self._order("activate")

    async def _order(self, order: Literal["cancel", "activate"]) -> CommandOutcome:
        try:
            await self._run_state.apply(partial(self._ordered, order))
        except commands.Refused as refused:
            return CommandOutcome(False, str(refused))
        return _ACCEPTED

    def _ordered(self, order: Literal["cancel", "activate"], state: State) -> tuple[State, tuple[Event, ...]]:
        if not isinstance(state, Resting) or state.entry.signal_id != self.value.signal_id:
            raise commands.Refused(f"entry {self.value.signal_id} no longer rests")
        if state.order:
            raise commands.Refused(f"entry {self.value.signal_id} already has the command to {state.order}")
        return msgspec.structs.replace(state, order=order), ()

    def __repr__(self) -> str:
        return f"EntryView({self.value.side} {self.value.symbol} at {price_text(self.value.price_open)})"
