"""What is held and what became of it: entries, reductions, the open position, the closed trade."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Literal

import msgspec

from backtest_kit.model.interval import to_datetime

Direction = Literal["long", "short"]
CloseReason = Literal["take_profit", "stop_loss", "trailing_stop", "time_expired", "frame_end", "closed"]
"""`trailing_stop` is a stop loss that was moved past the effective entry price, so that it closed in profit before
costs."""


class Entry(msgspec.Struct, frozen=True, rename="camel"):
    """A purchase: `cost` in quote currency at `price`."""

    price: float
    cost: float
    timestamp: int


class Reduction(msgspec.Struct, frozen=True, rename="camel"):
    """A partial close: `percent` of `cost_basis`, the cost still held just before it."""

    percent: float
    price: float
    cost_basis: float
    entry_count: int
    """How many entries had been made before it."""
    timestamp: int


class Extreme(msgspec.Struct, frozen=True, rename="camel"):
    """The best or the worst price that a position has seen, and its profit there."""

    price: float
    timestamp: int
    pnl_pct: float
    pnl_cost: float


class Position(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An open position. A change makes a new value; nobody's copy moves under him."""

    signal_id: str
    symbol: str
    strategy_name: str
    exchange_name: str
    frame_name: str
    position: Direction
    price_open: float
    """Price of the first entry."""
    price_take_profit: float
    """As the signal gave it."""
    price_stop_loss: float
    """As the signal gave it."""
    minutes: float
    """Lifetime from `opened_at_ms`; `math.inf` for none."""
    scheduled_at_ms: int
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
    note: str = ""

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


class Trade(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A closed position. Profits are after fees and slippage; percentages are in percent."""

    signal_id: str
    symbol: str
    strategy_name: str
    exchange_name: str
    frame_name: str
    position: Direction
    scheduled_at_ms: int
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
    peak_pct: float
    """Profit in percent at the best price seen on the way."""
    fall_pct: float
    """Profit in percent at the worst price seen on the way."""
    entries: tuple[Entry, ...]
    reductions: tuple[Reduction, ...] = ()
    note: str = ""
    close_note: str = ""
    """What was said with the command that closed it."""

    @property
    def opened_at(self) -> datetime:
        return to_datetime(self.opened_at_ms)

    @property
    def closed_at(self) -> datetime:
        return to_datetime(self.closed_at_ms)


class RestingEntry(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A limit order that waits for its price. `price_stop_loss` reached first cancels it."""

    signal_id: str
    symbol: str
    strategy_name: str
    exchange_name: str
    frame_name: str
    position: Direction
    price_open: float
    price_take_profit: float
    price_stop_loss: float
    minutes: float
    """Lifetime of the position once it is open."""
    cost: float
    scheduled_at_ms: int
    note: str = ""
