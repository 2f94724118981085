"""A signal on its way: the entry that rests, the open position, the closed trade. Each contains the one before."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Literal

import msgspec

from backtest_kit.model.identity import Identity, OfRun
from backtest_kit.model.inner import Inner
from backtest_kit.model.interval import to_datetime
from backtest_kit.model.signal import Direction, Signal

CloseReason = Literal["take_profit", "stop_loss", "trailing_stop", "time_expired", "frame_end", "closed"]
"""`trailing_stop` is a stop loss that was moved past the effective entry price, so that it closed in profit before
costs."""


class Execution(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """How an order was executed on the exchange."""

    fee: float | None = None
    """In quote currency, as the exchange charged it; None if unknown, then CC_PERCENT_FEE is used."""
    fee_currency: str = ""
    """The currency of the fee, such as BNB; several are joined by +, empty if unknown."""
    client_order_ids: tuple[str, ...] = ()
    """More than one if the order was sent in parts, or again under another id."""
    order_ids: tuple[str, ...] = ()
    """The exchange's own ids; empty if unknown."""


class Entry(msgspec.Struct, frozen=True, rename="camel"):
    """A purchase: `cost` in quote currency at `price`.

    If the exchange took its fee out of the purchase, `cost` is that of the rest, and the fee comes on top.
    """

    price: float
    cost: float
    timestamp: int
    execution: Execution | None = None
    """None in a backtest."""


class Reduction(msgspec.Struct, frozen=True, rename="camel"):
    """A partial close: `percent` of `cost_basis`, the cost still held just before it."""

    percent: float
    price: float
    cost_basis: float
    entry_count: int
    """How many entries had been made before it."""
    timestamp: int
    execution: Execution | None = None
    """None in a backtest."""


class Extreme(msgspec.Struct, frozen=True, rename="camel"):
    """The best or the worst price that a position has seen, and its profit there."""

    price: float
    timestamp: int
    pnl_pct: float
    pnl_cost: float


class RestingEntry(OfRun, frozen=True, kw_only=True):
    """A limit order that waits for its price. `price_stop_loss` reached first cancels it."""

    identity: Identity
    signal: Signal
    """The signal that it carries out, with every default filled in."""
    scheduled_at_ms: int

    signal_id = Inner[str]("signal.id")
    side = Inner[Direction]("signal.position")
    price_open = Inner[float]("signal.price_open")
    price_take_profit = Inner[float]("signal.price_take_profit")
    price_stop_loss = Inner[float]("signal.price_stop_loss")
    minutes = Inner[float]("signal.minutes")
    """Lifetime of the position once it is open."""
    cost = Inner[float]("signal.cost")
    note = Inner[str]("signal.note")

    def __post_init__(self) -> None:
        missing = [name for name in ("id", "price_open", "minutes", "cost") if getattr(self.signal, name) is None]
        if missing:
            raise ValueError(f"the signal of an entry has no {', '.join(missing)}")

    def at(self, price: float, cost: float = 0.0) -> RestingEntry:
        """The same entry at another price, and for another cost if given."""
        signal = msgspec.structs.replace(self.signal, price_open=price, cost=cost or self.cost)
        return msgspec.structs.replace(self, signal=signal)


class OfSignal(OfRun, frozen=True, kw_only=True):
    """Base of what has an `entry`, read as its own."""

    identity = Inner[Identity]("entry.identity")
    signal_id = Inner[str]("entry.signal.id")
    side = Inner[Direction]("entry.signal.position")
    """ "long" or "short"."""
    note = Inner[str]("entry.signal.note")
    scheduled_at_ms = Inner[int]("entry.scheduled_at_ms")


class Position(OfSignal, frozen=True, kw_only=True):
    """An open position. A change makes a new value, so a copy never changes."""

    entry: RestingEntry
    """The entry that it was opened from, at the price and cost of the first fill."""
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

    price_open = Inner[float]("entry.signal.price_open")
    """Price of the first entry."""
    price_take_profit = Inner[float]("entry.signal.price_take_profit")
    """As the signal gave it."""
    price_stop_loss = Inner[float]("entry.signal.price_stop_loss")
    """As the signal gave it."""
    minutes = Inner[float]("entry.signal.minutes")
    """Lifetime from `opened_at_ms`; `math.inf` for none."""

    @property
    def take_profit(self) -> float:
        """The level in force."""
        moved = self.moved_take_profit
        return self.entry.signal.price_take_profit if moved is None else moved

    @property
    def stop_loss(self) -> float:
        """The level in force."""
        moved = self.moved_stop_loss
        return self.entry.signal.price_stop_loss if moved is None else moved

    @property
    def cost(self) -> float:
        """The total invested, in quote currency."""
        return math.fsum(entry.cost for entry in self.entries)

    @property
    def expires_at_ms(self) -> float:
        """The minute at which it expires; `math.inf` if never."""
        return self.opened_at_ms + self.minutes * 60_000


class Trade(OfSignal, frozen=True, kw_only=True):
    """A closed position. Profits are after fees and slippage; percentages are in percent."""

    position: Position
    """As it was at the close."""
    closed_at_ms: int
    price_open: float
    """Effective entry price: the cost-weighted harmonic mean of the entries, without slippage."""
    price_close: float
    close_reason: CloseReason
    pnl_pct: float
    """Profit in percent of `cost`."""
    pnl_cost: float
    """Profit in quote currency."""
    fees: float
    """All fees in quote currency: those reported by the exchange, otherwise CC_PERCENT_FEE."""
    execution: Execution | None = None
    """Of the close; None in a backtest."""
    close_note: str = ""
    """The note of the command that closed it."""

    entry = Inner[RestingEntry]("position.entry")
    """The entry that the position was opened from, at the price and cost of the first fill."""
    opened_at_ms = Inner[int]("position.opened_at_ms")
    price_take_profit = Inner[float]("position.take_profit")
    """The level in force at the close."""
    price_stop_loss = Inner[float]("position.stop_loss")
    """The level in force at the close."""
    original_price_open = Inner[float]("position.entry.signal.price_open")
    original_price_take_profit = Inner[float]("position.entry.signal.price_take_profit")
    original_price_stop_loss = Inner[float]("position.entry.signal.price_stop_loss")
    cost = Inner[float]("position.cost")
    """The total invested, in quote currency."""
    peak_pct = Inner[float]("position.peak.pnl_pct")
    """Profit in percent at the best price seen on the way."""
    fall_pct = Inner[float]("position.fall.pnl_pct")
    """Profit in percent at the worst price seen on the way."""
    entries = Inner[tuple[Entry, ...]]("position.entries")
    reductions = Inner[tuple[Reduction, ...]]("position.reductions")

    @property
    def executions(self) -> tuple[Execution, ...]:
        """How its orders were executed: entries, partial closes, the close. Empty in a backtest."""
        entries, reductions = (part.execution for part in self.entries), (part.execution for part in self.reductions)
        return tuple(each for each in (*entries, *reductions, self.execution) if each is not None)

    @property
    def opened_at(self) -> datetime:
        return to_datetime(self.opened_at_ms)

    @property
    def closed_at(self) -> datetime:
        return to_datetime(self.closed_at_ms)
