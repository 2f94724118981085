"""What is held and what became of it: entries, reductions, the open position, the closed trade."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any, Literal

import msgspec

from backtest_kit.model.interval import to_datetime

Direction = Literal["long", "short"]
CloseReason = Literal["take_profit", "stop_loss", "trailing_stop", "time_expired", "frame_end", "closed"]
"""`trailing_stop` is a stop loss that was moved past the effective entry price, so that it closed in profit before
costs."""


class Execution(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """How an order went on the exchange."""

    fee: float | None = None
    """In quote currency, as the exchange charged it; None where it did not say, and CC_PERCENT_FEE is taken."""
    fee_currency: str = ""
    """What it was charged in, such as BNB; empty where the exchange did not say, joined by + where it was several."""
    client_order_ids: tuple[str, ...] = ()
    """More than one where the order was sent in parts, or again under another id."""
    order_ids: tuple[str, ...] = ()
    """The exchange's own; empty where it did not say."""


class Entry(msgspec.Struct, frozen=True, rename="camel"):
    """A purchase: `cost` in quote currency at `price`.

    Where the exchange took its fee out of what was bought, `cost` is what the rest has cost, and the fee comes on top.
    """

    price: float
    cost: float
    timestamp: int
    execution: Execution | None = None
    """None in a backtest, where nothing is sent."""


class Reduction(msgspec.Struct, frozen=True, rename="camel"):
    """A partial close: `percent` of `cost_basis`, the cost still held just before it."""

    percent: float
    price: float
    cost_basis: float
    entry_count: int
    """How many entries had been made before it."""
    timestamp: int
    execution: Execution | None = None
    """None in a backtest, where nothing is sent."""


class Extreme(msgspec.Struct, frozen=True, rename="camel"):
    """The best or the worst price that a position has seen, and its profit there."""

    price: float
    timestamp: int
    pnl_pct: float
    pnl_cost: float


class Origin(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a resting entry, the position that it becomes, and the trade that this becomes have in common."""

    signal_id: str
    symbol: str
    strategy_name: str
    exchange_name: str
    frame_name: str
    position: Direction
    scheduled_at_ms: int
    note: str = ""


def shared(value: msgspec.Struct, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The fields of `value` that `kind` has as well, by name: whoever copies them forgets none."""
    return {name: getattr(value, name) for name in kind.__struct_fields__ if name in value.__struct_fields__}


class Position(Origin, frozen=True, kw_only=True):
    """An open position. A change makes a new value; nobody's copy moves under him."""

    price_open: float
    """Price of the first entry."""
    price_take_profit: float
    """As the signal gave it."""
    price_stop_loss: float
    """As the signal gave it."""
    minutes: float
    """Lifetime from `opened_at_ms`; `math.inf` for none."""
    opened_at_ms: int
    entries: tuple[Entry, ...]
    reductions: tuple[Reduction, ...] = ()
    moved_take_profit: float | None = None
    moved_stop_loss: float | None = None
    peak: Extreme
    fall: Extreme
    profit_level: int = 0
    """Tenths of the way to the take profit that were reached so far: 0, 10, ... 100."""
    loss_level: int = 0
    """Tenths of the way to the stop loss that were reached so far: 0, 10, ... 100."""
    breakeven_reached: bool = False

    @property
    def take_profit(self) -> float:
        """The level in force."""
        return self.price_take_profit if self.moved_take_profit is None else self.moved_take_profit

    @property
    def stop_loss(self) -> float:
        """The level in force."""
        return self.price_stop_loss if self.moved_stop_loss is None else self.moved_stop_loss

    @property
    def cost(self) -> float:
        """All that was ever put in, in quote currency."""
        return math.fsum(entry.cost for entry in self.entries)

    @property
    def expires_at_ms(self) -> float:
        """The first minute at which it is too old; `math.inf` where it never is."""
        return self.opened_at_ms + self.minutes * 60_000


class Trade(Origin, frozen=True, kw_only=True):
    """A closed position. Profits are after fees and slippage; percentages are in percent."""

    opened_at_ms: int
    closed_at_ms: int
    price_open: float
    """Effective entry price: the cost-weighted harmonic mean of the entries, without slippage."""
    price_close: float
    price_take_profit: float
    """The level in force at the close."""
    price_stop_loss: float
    """The level in force at the close."""
    original_price_open: float
    original_price_take_profit: float
    original_price_stop_loss: float
    close_reason: CloseReason
    cost: float
    """All that was ever put in, in quote currency."""
    pnl_pct: float
    """Profit in percent of `cost`."""
    pnl_cost: float
    """Profit in quote currency."""
    fees: float
    """All fees in quote currency: those that the exchange reported, and CC_PERCENT_FEE where it did not."""
    peak_pct: float
    """Profit in percent at the best price seen on the way."""
    fall_pct: float
    """Profit in percent at the worst price seen on the way."""
    entries: tuple[Entry, ...]
    reductions: tuple[Reduction, ...] = ()
    execution: Execution | None = None
    """Of the close; None in a backtest, where nothing is sent."""
    close_note: str = ""
    """What was said with the command that closed it."""

    @property
    def executions(self) -> tuple[Execution, ...]:
        """How its orders went: entries, partial closes, the close. Empty in a backtest."""
        entries, reductions = (part.execution for part in self.entries), (part.execution for part in self.reductions)
        return tuple(each for each in (*entries, *reductions, self.execution) if each is not None)

    @property
    def opened_at(self) -> datetime:
        return to_datetime(self.opened_at_ms)

    @property
    def closed_at(self) -> datetime:
        return to_datetime(self.closed_at_ms)


class RestingEntry(Origin, frozen=True, kw_only=True):
    """A limit order that waits for its price. `price_stop_loss` reached first cancels it."""

    price_open: float
    price_take_profit: float
    price_stop_loss: float
    minutes: float
    """Lifetime of the position once it is open."""
    cost: float
