"""What happens in a run, as values. `action` names each kind in one word."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar, Literal

import msgspec

from backtest_kit.model.interval import to_datetime
from backtest_kit.model.position import Position, RestingEntry, Trade
from backtest_kit.model.signal import Signal

Mode = Literal["backtest", "paper", "live"]
CancelReason = Literal["timeout", "price_reject", "frame_end", "user", "risk"]
Change = Literal["reduced", "added", "stop_moved", "take_moved", "breakeven"]


class Identity(msgspec.Struct, frozen=True):
    """Which run something belongs to: one engine, holding at most one position or resting entry."""

    symbol: str
    strategy_name: str
    exchange_name: str
    frame_name: str
    mode: Mode


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all events."""

    action: ClassVar[str] = ""
    identity: Identity
    when_ms: int

    @property
    def when(self) -> datetime:
        return to_datetime(self.when_ms)

    @property
    def symbol(self) -> str:
        return self.identity.symbol


class MarketEvent(Event, frozen=True, kw_only=True):
    """Base of the events of a minute of a market."""

    price: float
    """The current price of the symbol at that minute."""


class EntryScheduled(MarketEvent, frozen=True, kw_only=True):
    """A resting entry was placed."""

    action: ClassVar[str] = "scheduled"
    entry: RestingEntry


class EntryCancelled(MarketEvent, frozen=True, kw_only=True):
    """A resting entry was given up before it was reached."""

    action: ClassVar[str] = "cancelled"
    entry: RestingEntry
    reason: CancelReason


class PositionOpened(MarketEvent, frozen=True, kw_only=True):
    """A position was opened, at once or by a resting entry that was reached."""

    action: ClassVar[str] = "opened"
    position: Position


class PositionClosed(MarketEvent, frozen=True, kw_only=True):
    """A position was closed."""

    action: ClassVar[str] = "closed"
    trade: Trade


class PositionChanged(MarketEvent, frozen=True, kw_only=True):
    """A command changed an open position; `position` is how it is now."""

    action: ClassVar[str] = "changed"
    position: Position
    change: Change


class PositionActive(MarketEvent, frozen=True, kw_only=True):
    """One more minute in which a position stays open."""

    action: ClassVar[str] = "active"
    position: Position


class EntryWaiting(MarketEvent, frozen=True, kw_only=True):
    """One more minute in which a resting entry was not reached."""

    action: ClassVar[str] = "waiting"
    entry: RestingEntry


class LevelReached(MarketEvent, frozen=True, kw_only=True):
    """A position has come another tenth of the way to its take profit, or to its stop loss.

    Each level is reported once in the life of a position; a jump over several reports all of them.
    """

    action: ClassVar[str] = "level"
    position: Position
    side: Literal["profit", "loss"]
    level: int
    """10, 20, ... 100: percent of the way from the effective entry price."""


class BreakevenReached(MarketEvent, frozen=True, kw_only=True):
    """For the first time, a stop at the entry price would not lose: the price has earned the costs."""

    action: ClassVar[str] = "breakeven"
    position: Position


class PeakReached(MarketEvent, frozen=True, kw_only=True):
    """A position is better off than ever before; `position.peak` has the figures."""

    action: ClassVar[str] = "peak"
    position: Position


class FallReached(MarketEvent, frozen=True, kw_only=True):
    """A position is worse off than ever before; `position.fall` has the figures."""

    action: ClassVar[str] = "fall"
    position: Position


class Progress(Event, frozen=True, kw_only=True):
    """How far a run has come: at most one for each percent."""

    action: ClassVar[str] = "progress"
    fraction: float
    """0 to 1."""


class RunFailed(Event, frozen=True, kw_only=True):
    """A run ended by an error; whoever awaits the run gets the error itself."""

    action: ClassVar[str] = "failed"
    error: Exception


class RunDone(Event, frozen=True, kw_only=True):
    """A run came to its end, or was stopped or cancelled."""

    action: ClassVar[str] = "done"
    trades: tuple[Trade, ...]
    cancelled: bool = False
    """Whether it was ended at once, with what it held left as it was."""


class RiskRejected(MarketEvent, frozen=True, kw_only=True):
    """A risk profile refused a signal."""

    action: ClassVar[str] = "rejected"
    signal: Signal
    risk_name: str
    reason: str
