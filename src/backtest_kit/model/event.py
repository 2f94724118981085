"""What happens in a run, as values. `action` names each kind in one word."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar, Literal

import msgspec

from backtest_kit.model.interval import to_datetime
from backtest_kit.model.position import Position, RestingEntry, Trade
from backtest_kit.model.signal import Signal

Mode = Literal["backtest", "paper", "live"]
CancelReason = Literal["timeout", "price_reject", "frame_end"]


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
    price: float
    """The current price of the symbol at that minute."""

    @property
    def when(self) -> datetime:
        return to_datetime(self.when_ms)

    @property
    def symbol(self) -> str:
        return self.identity.symbol


class EntryScheduled(Event, frozen=True, kw_only=True):
    """A resting entry was placed."""

    action: ClassVar[str] = "scheduled"
    entry: RestingEntry


class EntryCancelled(Event, frozen=True, kw_only=True):
    """A resting entry was given up before it was reached."""

    action: ClassVar[str] = "cancelled"
    entry: RestingEntry
    reason: CancelReason


class PositionOpened(Event, frozen=True, kw_only=True):
    """A position was opened, at once or by a resting entry that was reached."""

    action: ClassVar[str] = "opened"
    position: Position


class PositionClosed(Event, frozen=True, kw_only=True):
    """A position was closed."""

    action: ClassVar[str] = "closed"
    trade: Trade


class RiskRejected(Event, frozen=True, kw_only=True):
    """A risk profile refused a signal."""

    action: ClassVar[str] = "rejected"
    signal: Signal
    risk_name: str
    reason: str
