"""What a validation of a risk profile gets and returns."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime

import msgspec

from backtest_kit.model.identity import Identity
from backtest_kit.model.inner import Inner
from backtest_kit.model.interval import to_datetime
from backtest_kit.model.position import OfSignal, RestingEntry
from backtest_kit.model.signal import Signal


class ActivePosition(OfSignal, frozen=True, kw_only=True):
    """A position, or a resting entry with its place reserved, that counts under a risk profile."""

    entry: RestingEntry
    cost: float
    """The total invested so far, in quote currency."""
    opened_at_ms: int
    """When it was opened, or placed if it still rests."""

    price_open = Inner[float]("entry.price_open")
    price_take_profit = Inner[float]("entry.price_take_profit")
    price_stop_loss = Inner[float]("entry.price_stop_loss")
    minutes = Inner[float]("entry.minutes")


class RiskRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a validation checks: one signal, and all other positions under the same profile."""

    identity: Identity
    signal: Signal
    price: float
    """The current price."""
    when_ms: int
    positions: tuple[ActivePosition, ...]
    """The positions of all strategies and symbols that share the profile on this exchange and frame, except its own."""

    @property
    def when(self) -> datetime:
        return to_datetime(self.when_ms)

    @property
    def price_open(self) -> float:
        """The price at which the position would be entered."""
        return self.price if self.signal.price_open is None else self.signal.price_open


RiskValidation = Callable[[RiskRequest], Awaitable[str | None] | str | None]
"""Returns the reason to reject the signal, or None (or an empty text) to allow it; may be async."""
