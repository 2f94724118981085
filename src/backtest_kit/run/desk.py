"""Where commands meet the state of a run: views of what is held, read-only but for their commands."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import msgspec

from backtest_kit.engine import commands
from backtest_kit.engine.pnl import closed_pct, effective_price, profit, remaining_cost
from backtest_kit.engine.step import Flat, Holding, Resting, Rules, State, Tick
from backtest_kit.errors import UserError
from backtest_kit.model.event import Change, Event, PositionChanged
from backtest_kit.model.interval import MINUTE_MS, to_datetime
from backtest_kit.model.position import Direction, Entry, Extreme, Position, Reduction, RestingEntry

FULLY_REDUCED = "full_partial_close"


class CommandOutcome(msgspec.Struct, frozen=True):
    """What became of a command. True where it was accepted."""

    accepted: bool
    reason: str = ""
    """Why it was not accepted."""

    def __bool__(self) -> bool:
        return self.accepted


_ACCEPTED = CommandOutcome(True)


class Desk:
    """The state of one run, the minute it is at, and what commands have caused since the last look."""

    __slots__ = ("events", "rules", "state", "tick")

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.state: State = Flat()
        self.tick = Tick(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        self.events: list[Event] = []

    def position(self) -> PositionView | None:
        return PositionView(self, self.state.position) if isinstance(self.state, Holding) else None

    def entry(self) -> EntryView | None:
        return EntryView(self, self.state.entry) if isinstance(self.state, Resting) else None

    def take_events(self) -> list[Event]:
        events, self.events = self.events, []
        return events


class PositionView:
    """An open position as it is now. It follows the changes of its position, and no other position's.

    Profits are at the current price, after fees and slippage. Commands are carried out at the current
    price; they return an outcome that says whether they were accepted, and raise only for arguments
    that make no sense at any time.
    """

    __slots__ = ("_desk", "_last")

    def __init__(self, desk: Desk, position: Position) -> None:
        self._desk = desk
        self._last = position

    @property
    def value(self) -> Position:
        """The whole position as a frozen value; the last one there was, once it is closed."""
        state = self._desk.state
        if isinstance(state, Holding) and state.position.signal_id == self._last.signal_id:
            self._last = state.position
        return self._last

    @property
    def signal_id(self) -> str:
        return self._last.signal_id

    @property
    def position(self) -> Direction:
        """ "long" or "short"."""
        return self._last.position

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
        """All that was ever put in, in quote currency."""
        return self.value.cost

    @property
    def remaining_cost(self) -> float:
        """What is still held of it."""
        return remaining_cost(self.value.entries, self.value.reductions)

    @property
    def closed_pct(self) -> float:
        """What has been taken out of it, in percent."""
        return closed_pct(self.value.entries, self.value.reductions)

    @property
    def pnl_pct(self) -> float:
        """Profit in percent of all that was put in, if the rest were closed now."""
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
        return (self._desk.tick.when_ms - self._last.opened_at_ms) // MINUTE_MS

    @property
    def minutes_left(self) -> float:
        """Minutes until it expires; `math.inf` where it never does."""
        return max(0.0, self._last.minutes - self.minutes_open)

    @property
    def breakeven_possible(self) -> bool:
        """Whether `breakeven()` would be accepted now."""
        try:
            commands.breakeven(self.value, self._desk.tick.price, self._desk.rules.settings)
        except commands.Refused:
            return False
        return True

    async def reduce(self, *, percent: float | None = None, cost: float | None = None) -> CommandOutcome:
        """Close a part: `percent` of what is still held, or `cost` of it. All of it closes the position.

        Raises:
            UserError: not exactly one of the two, or no amount in range.
        """
        when_ms = self._desk.tick.when_ms
        return self._change(
            "reduced", lambda held, price: commands.reduce(held, price, when_ms, percent=percent, cost=cost)
        )

    async def add(self, cost: float | None = None) -> CommandOutcome:
        """Buy more for `cost` (default CC_POSITION_ENTRY_COST), at a better price than ever before.

        Raises:
            UserError: `cost` is no amount above 0.
        """
        settings, when_ms = self._desk.rules.settings, self._desk.tick.when_ms
        amount = settings.CC_POSITION_ENTRY_COST if cost is None else cost
        return self._change("added", lambda held, price: commands.add(held, price, when_ms, amount, settings))

    async def move_stop(self, price: float) -> CommandOutcome:
        """Move the stop loss to an absolute price, towards profit.

        Raises:
            UserError: `price` is no price.
        """
        settings = self._desk.rules.settings
        return self._change("stop_moved", lambda held, now: commands.move_stop(held, now, price, settings))

    async def move_take(self, price: float) -> CommandOutcome:
        """Move the take profit to an absolute price, towards the entry.

        Raises:
            UserError: `price` is no price.
        """
        settings = self._desk.rules.settings
        return self._change("take_moved", lambda held, now: commands.move_take(held, now, price, settings))

    async def breakeven(self) -> CommandOutcome:
        """Move the stop loss to the effective entry price, once the price has earned the costs."""
        settings = self._desk.rules.settings
        return self._change("breakeven", lambda held, now: commands.breakeven(held, now, settings))

    async def close(self, note: str = "") -> CommandOutcome:
        """Close it at the next minute, at the price of then, with the reason "closed"."""
        given: object = note
        if not isinstance(given, str):
            raise UserError(f"note is {given!r}: give a text")
        state = self._held()
        if isinstance(state, CommandOutcome):
            return state
        self._desk.state = msgspec.structs.replace(state, closing=note)
        return _ACCEPTED

    def _change(self, change: Change, act: Callable[[Position, float], Position]) -> CommandOutcome:
        state, desk = self._held(), self._desk
        if isinstance(state, CommandOutcome):
            return state
        try:
            position = act(state.position, desk.tick.price)
        except commands.Refused as refused:
            return CommandOutcome(False, str(refused))
        closing = FULLY_REDUCED if commands.is_closed(position) else None
        desk.state = Holding(position, state.last_slot_ms, closing)
        desk.events.append(
            PositionChanged(
                identity=desk.rules.identity,
                when_ms=desk.tick.when_ms,
                price=desk.tick.price,
                position=position,
                change=change,
            )
        )
        return _ACCEPTED

    def _held(self) -> Holding | CommandOutcome:
        state = self._desk.state
        if not isinstance(state, Holding) or state.position.signal_id != self._last.signal_id:
            return CommandOutcome(False, f"position {self._last.signal_id} is closed")
        if state.closing is not None:
            return CommandOutcome(False, f"position {self._last.signal_id} closes at the next minute")
        return state

    def _profit(self) -> tuple[float, float]:
        value, desk = self.value, self._desk
        return profit(value.position, value.entries, value.reductions, desk.tick.price, desk.rules.settings)

    def __repr__(self) -> str:
        return f"PositionView({self.position} {self._last.symbol} from {self.price_open:g}, {self.pnl_pct:+.2f} %)"


class EntryView:
    """A resting entry, and what can be done to it."""

    __slots__ = ("_desk", "value")

    value: RestingEntry
    """The whole entry as a frozen value."""

    def __init__(self, desk: Desk, entry: RestingEntry) -> None:
        self._desk = desk
        self.value = entry

    @property
    def minutes_waiting(self) -> int:
        """Whole minutes since it was placed."""
        return (self._desk.tick.when_ms - self.value.scheduled_at_ms) // MINUTE_MS

    async def cancel(self) -> CommandOutcome:
        """Give it up at the next minute, with the reason "user"."""
        return self._order("cancel")

    async def activate(self) -> CommandOutcome:
        """Enter at the next minute without waiting for the price, at the price of then.

        It is cancelled with the reason "price_reject" if that price is not between its levels.
        """
        return self._order("activate")

    def _order(self, order: str) -> CommandOutcome:
        state = self._desk.state
        if not isinstance(state, Resting) or state.entry.signal_id != self.value.signal_id:
            return CommandOutcome(False, f"entry {self.value.signal_id} rests no more")
        if state.order:
            return CommandOutcome(False, f"entry {self.value.signal_id} is already told to {state.order}")
        self._desk.state = msgspec.structs.replace(state, order=order)
        return _ACCEPTED

    def __repr__(self) -> str:
        return f"EntryView({self.value.position} {self.value.symbol} at {self.value.price_open:g})"
