"""What happens in a run, as values."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from backtest_kit.model.identity import Identity, OfRun
from backtest_kit.model.inner import Inner
from backtest_kit.model.interval import to_datetime
from backtest_kit.model.position import Position, RestingEntry, Trade
from backtest_kit.model.signal import Signal

CancelReason = Literal["timeout", "price_reject", "frame_end", "user", "risk"]
Change = Literal["reduced", "added", "stop_moved", "take_moved", "breakeven"]


class Event(OfRun, frozen=True, kw_only=True, tag_field="action"):
    """Base of all events. The tag of its kind is stored with each."""

    identity: Identity
    when_ms: int

    @property
    def action(self) -> str:
        """What happened, in one word."""
        return str(self.__struct_config__.tag)

    @property
    def when(self) -> datetime:
        return to_datetime(self.when_ms)


class MarketEvent(Event, frozen=True, kw_only=True):
    """Base of the events of a minute of a market."""

    price: float
    """The current price of the symbol at that minute."""


class EntryScheduled(MarketEvent, frozen=True, kw_only=True, tag="scheduled"):
    """A resting entry was placed."""

    entry: RestingEntry


class EntryCancelled(MarketEvent, frozen=True, kw_only=True, tag="cancelled"):
    """A resting entry was given up before it was reached."""

    entry: RestingEntry
    reason: CancelReason


class PositionOpened(MarketEvent, frozen=True, kw_only=True, tag="opened"):
    """A position was opened, immediately or by a resting entry that was reached."""

    position: Position

    entry = Inner[RestingEntry]("position.entry")


class PositionClosed(MarketEvent, frozen=True, kw_only=True, tag="closed"):
    """A position was closed."""

    trade: Trade

    position = Inner[Position]("trade.position")
    entry = Inner[RestingEntry]("trade.position.entry")


class PositionChanged(MarketEvent, frozen=True, kw_only=True, tag="changed"):
    """A command changed an open position; `position` is how it is now."""

    position: Position
    change: Change

    entry = Inner[RestingEntry]("position.entry")


Lasting = EntryScheduled | EntryCancelled | PositionOpened | PositionClosed | PositionChanged
"""Events that are kept until they are in the records: those that begin, change or end something."""


class PositionActive(MarketEvent, frozen=True, kw_only=True, tag="active"):
    """One more minute in which a position stays open."""

    position: Position


class EntryWaiting(MarketEvent, frozen=True, kw_only=True, tag="waiting"):
    """One more minute in which a resting entry was not reached."""

    entry: RestingEntry


class LevelReached(MarketEvent, frozen=True, kw_only=True, tag="level"):
    """A position has come another tenth of the way to its take profit, or to its stop loss.

    Each level is reported once in the life of a position; a jump over several reports all of them.
    """

    position: Position
    side: Literal["profit", "loss"]
    level: int
    """10, 20, ... 100: percent of the way from the effective entry price."""


class BreakevenReached(MarketEvent, frozen=True, kw_only=True, tag="breakeven"):
    """For the first time, a stop at the entry price would not lose: the price covers the costs."""

    position: Position


class PeakReached(MarketEvent, frozen=True, kw_only=True, tag="peak"):
    """The best profit of a position so far (MFE); `position.peak` has the figures."""

    position: Position


class FallReached(MarketEvent, frozen=True, kw_only=True, tag="fall"):
    """The worst loss of a position so far (MAE); `position.fall` has the figures."""

    position: Position


class Progress(Event, frozen=True, kw_only=True, tag="progress"):
    """The progress of a run: at most one event for each percent."""

    fraction: float
    """0 to 1."""


class RunFailed(Event, frozen=True, kw_only=True, tag="failed"):
    """A run ended by an error; the caller that awaits the run gets the error itself."""

    error: Exception


class RunDone(Event, frozen=True, kw_only=True, tag="done"):
    """A run ended, or was stopped or cancelled."""

    trades: tuple[Trade, ...]
    cancelled: bool = False
    """Whether it was cancelled: open positions and orders were left as they were."""


class RiskRejected(MarketEvent, frozen=True, kw_only=True, tag="rejected"):
    """A risk profile refused a signal."""

    signal: Signal
    risk_name: str
    reason: str


class Recovered(Event, frozen=True, kw_only=True, tag="recovered"):
    """A live or paper run has started: what the previous run left, and what was done about it."""

    position: Position | None = None
    """The open position that is resumed."""
    entry: RestingEntry | None = None
    """The resting entry that is resumed."""
    down_ms: int = 0
    """How long nothing ran: the time since the last minute that was written; 0 at the first start."""
    steps: tuple[str, ...] = ()
    """What was done, in words; empty if there was nothing to do."""


class OrderFailed(Event, frozen=True, kw_only=True, tag="order_failed"):
    """An order failed, or its outcome is unknown."""

    kind: str
    """What the order was for: open, place, activate, cancel, add, reduce, close, move_stop, move_take, breakeven;
    or check, if the exchange did not report the state of a position or an entry."""
    client_order_id: str
    attempt: int
    """0 at the first call."""
    reason: str
    next_step: str
    """What happens next, in words."""
    alarm: bool = False
    """Look now: it was refused permanently, or failed too often."""


class StrategyFailed(Event, frozen=True, kw_only=True, tag="strategy_failed"):
    """The user's code raised in a live or paper run, which goes on at the next minute."""

    what: str
    """get_signal, manage, a cron handler, or the name of a handler."""
    error: Exception


class StoreDegraded(Event, frozen=True, kw_only=True, tag="store_degraded"):
    """The store rejects writes: nothing is opened; open positions are still watched and may close."""

    reason: str
    kept: bool
    """Whether the missing writes are in the emergency file: if not, a crash now loses them."""


class StoreRecovered(Event, frozen=True, kw_only=True, tag="store_recovered"):
    """The store has all writes again, and accepts new ones."""


class OrphanFound(Event, frozen=True, kw_only=True, tag="orphan"):
    """The exchange and the store disagree: a position or an order that the store does not know, a stop that was left
    by another position and would close the next one, a position that is missing there, or one without a stop."""

    what: Literal["foreign_position", "foreign_order", "left_stop", "missing_position", "unprotected_position"]
    quantity: float
    """In base currency, as the exchange reports it."""
    reason: str
    """What differs, in words; unknown orders are named with the store that sent them."""
    next_step: str
    """What happens next, in words."""


class MinutesMissed(Event, frozen=True, kw_only=True, tag="missed"):
    """Consecutive minutes passed without a decision: reported once, at the minute that ends the gap. They are not
    replayed."""

    count: int
    first_ms: int
    reason: str
    """Of the first of them."""


class ClockJumped(Event, frozen=True, kw_only=True, tag="clock"):
    """The wall clock was set, or the machine slept."""

    by_ms: int
    """Below 0: it was set back."""


class Paused(Event, frozen=True, kw_only=True, tag="paused"):
    """The strategy is no longer called for signals, or is called again. Open positions go on either way."""

    paused: bool
