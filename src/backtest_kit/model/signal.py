"""`Signal`: what a strategy returns to open a position."""

from __future__ import annotations

from typing import Literal, cast

import msgspec

from backtest_kit.errors import UserError

Direction = Literal["long", "short"]


class Signal(msgspec.Struct, frozen=True, rename="camel"):
    """A position to open. The engine checks it as a whole when the strategy returns it."""

    position: Direction
    price_take_profit: float
    price_stop_loss: float
    price_open: float | None = None
    """Entry price. None enters now at the current price; a price enters now if the market is already
    there or better."""
    minutes: float | None = None
    """Lifetime in whole minutes, or `math.inf`; None takes CC_MAX_SIGNAL_LIFETIME_MINUTES."""
    cost: float | None = None
    """In quote currency; None takes CC_POSITION_ENTRY_COST."""
    note: str = ""
    id: str | None = None
    """The id of the position; None makes one from strategy, symbol and time. A signal with the id of the previous
    position is ignored: no idea is traded twice."""

    @classmethod
    def bracket(
        cls,
        position: Direction,
        *,
        price: float,
        take_profit_pct: float,
        stop_loss_pct: float,
        minutes: float | None = None,
        cost: float | None = None,
        note: str = "",
        id: str | None = None,
    ) -> Signal:
        """A position entered now, with both levels at a distance from `price` in percent of it.

        Raises:
            UserError: `position` is neither "long" nor "short".
        """
        if position not in ("long", "short"):
            raise UserError(f"position is {position!r}: use 'long' or 'short'")
        towards_profit = 1.0 if cast(str, position) == "long" else -1.0
        return cls(
            position=position,
            price_take_profit=price * (1 + towards_profit * take_profit_pct / 100),
            price_stop_loss=price * (1 - towards_profit * stop_loss_pct / 100),
            minutes=minutes,
            cost=cost,
            note=note,
            id=id,
        )
