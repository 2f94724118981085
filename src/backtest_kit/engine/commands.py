"""What may be done to an open position or a resting entry, and when it may not.

Each function returns the changed value or raises `Refused` with the reason: the market or the rules do
not allow the command now. Arguments that make no sense at any time are a `UserError`. Prices are
absolute; a command acts at the current price of its minute.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Final, TypeGuard

import msgspec

from backtest_kit.engine.pnl import closed_pct, effective_price, remaining_cost
from backtest_kit.engine.position import breakeven_pct
from backtest_kit.errors import UserError
from backtest_kit.model.position import Entry, Position, Reduction
from backtest_kit.model.price import price_text
from backtest_kit.settings import Settings

_ROUNDING: Final = 1e-12
_CLOSED: Final = 1e-9
"""A smaller part of the total cost counts as nothing."""


class Refused(Exception):
    """A precondition of the command does not hold now; the message says which."""


def reduce(
    position: Position,
    price: float,
    when_ms: int,
    *,
    percent: float | None = None,
    cost: float | None = None,
) -> Position:
    """Close a part at the current price: `percent` of what is still open, or `cost` of it in quote currency.

    Raises:
        UserError: not exactly one of the two is given, or it is not a number in range.
        Refused: the price is already at or beyond the take profit or the stop loss, or `cost` is more
            than is held.
    """
    held = remaining_cost(position.entries, position.reductions)
    if (percent is None) == (cost is None):
        raise UserError("reduce takes either percent= or cost=, not both and not neither")
    if cost is not None:
        _amount("cost", cost)
        if cost > held * (1 + _CLOSED):
            raise Refused(f"cost is {cost:g}, and {held:g} is held")
        percent = min(100.0, cost / held * 100) if held else 100.0
    if not _is_number(percent) or not 0 < percent <= 100:
        raise UserError(f"percent is {percent!r}: give a number above 0, at most 100")
    sign = _sign(position)
    if sign * price >= sign * position.take_profit:
        raise Refused(f"the price {price_text(price)} is already at the take profit {price_text(position.take_profit)}")
    if sign * price <= sign * position.stop_loss:
        raise Refused(f"the price {price_text(price)} is already at the stop loss {price_text(position.stop_loss)}")
    if closed_pct(position.entries, position.reductions) >= 100 * (1 - _CLOSED):
        raise Refused("nothing is held any more")
    if held * percent / 100 <= position.cost * _CLOSED:
        raise Refused(f"{percent:g} % of the {held:g} that is held is nothing")
    reduction = Reduction(float(percent), price, held, len(position.entries), when_ms)
    return msgspec.structs.replace(position, reductions=(*position.reductions, reduction))


def is_closed(position: Position) -> bool:
    """Whether reductions have taken out everything."""
    return remaining_cost(position.entries, position.reductions) <= position.cost * _CLOSED


def add(position: Position, price: float, when_ms: int, cost: float, settings: Settings) -> Position:
    """Buy more at the current price.

    Raises:
        UserError: `cost` is not a number above 0.
        Refused: the price is not better than every entry so far, unless CC_ENABLE_DCA_EVERYWHERE; or it
            is already at or beyond a level.
    """
    _amount("cost", cost)
    sign = _sign(position)
    best = min(sign * entry.price for entry in position.entries)
    if sign * price >= best and not settings.CC_ENABLE_DCA_EVERYWHERE:
        raise Refused(
            f"the price {price_text(price)} is not better than every entry so far "
            f"(the best is {price_text(sign * best)}): "
            "CC_ENABLE_DCA_EVERYWHERE lifts this rule"
        )
    if not sign * position.stop_loss < sign * price < sign * position.take_profit:
        raise Refused(
            f"the price {price_text(price)} is not between the stop loss {price_text(position.stop_loss)} and "
            f"the take profit {price_text(position.take_profit)}"
        )
    return msgspec.structs.replace(position, entries=(*position.entries, Entry(price, float(cost), when_ms)))


def move_stop(position: Position, price: float, to: float, settings: Settings) -> Position:
    """Move the stop loss to an absolute price.

    Raises:
        UserError: `to` is not a price.
        Refused: the current price is already at or beyond it, it is beyond the take profit, or it is
            not nearer to profit than the stop in force, unless CC_ENABLE_TRAILING_EVERYWHERE.
    """
    _amount("price", to)
    sign = _sign(position)
    if sign * price <= sign * to:
        raise Refused(f"the price {price_text(price)} is already at or beyond a stop at {price_text(to)}")
    if sign * to >= sign * position.take_profit:
        raise Refused(f"a stop at {price_text(to)} lies beyond the take profit {price_text(position.take_profit)}")
    if sign * to <= sign * position.stop_loss and not settings.CC_ENABLE_TRAILING_EVERYWHERE:
        raise Refused(
            f"a stop at {price_text(to)} is no tighter than the one in force, {price_text(position.stop_loss)}: "
            "CC_ENABLE_TRAILING_EVERYWHERE lifts this rule"
        )
    return msgspec.structs.replace(position, moved_stop_loss=float(to))


def move_take(position: Position, price: float, to: float, settings: Settings) -> Position:
    """Move the take profit to an absolute price.

    Raises:
        UserError: `to` is not a price.
        Refused: the current price is already at or beyond it, it is beyond the stop loss, or it is not
            nearer to the entry than the one in force, unless CC_ENABLE_TRAILING_EVERYWHERE.
    """
    _amount("price", to)
    sign = _sign(position)
    if sign * price >= sign * to:
        raise Refused(f"the price {price_text(price)} is already at or beyond a take profit at {price_text(to)}")
    if sign * to <= sign * position.stop_loss:
        raise Refused(f"a take profit at {price_text(to)} lies beyond the stop loss {price_text(position.stop_loss)}")
    if sign * to >= sign * position.take_profit and not settings.CC_ENABLE_TRAILING_EVERYWHERE:
        raise Refused(
            f"a take profit at {price_text(to)} is no nearer than the one in force, "
            f"{price_text(position.take_profit)}: "
            "CC_ENABLE_TRAILING_EVERYWHERE lifts this rule"
        )
    return msgspec.structs.replace(position, moved_take_profit=float(to))


def breakeven(position: Position, price: float, settings: Settings) -> Position:
    """Move the stop loss to the effective entry price.

    Raises:
        Refused: the price has not earned the costs of the round trip and CC_BREAKEVEN_THRESHOLD yet, the
            stop is already there or better, or the entry lies beyond the take profit.
    """
    entry = effective_price(position.entries, position.reductions)
    sign = _sign(position)
    # A reduction may move the last bit of the entry price, but not the stop that went there before.
    if sign * position.stop_loss >= sign * entry - entry * _ROUNDING:
        raise Refused(
            f"the stop loss {price_text(position.stop_loss)} is already at breakeven {price_text(entry)} or better"
        )
    if sign * entry >= sign * position.take_profit:
        raise Refused(f"breakeven {price_text(entry)} lies beyond the take profit {price_text(position.take_profit)}")
    needed = entry * (1 + sign * breakeven_pct(settings) / 100)
    if sign * price < sign * needed:
        raise Refused(
            f"the price {price_text(price)} has not reached {price_text(needed)}, "
            f"{breakeven_pct(settings):g} % from the entry"
        )
    return msgspec.structs.replace(position, moved_stop_loss=entry)


def _sign(position: Position) -> float:
    return 1.0 if position.side == "long" else -1.0


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _amount(name: str, value: object) -> None:
    if not _is_number(value) or not math.isfinite(value) or value <= 0:
        raise UserError(f"{name} is {value!r}: give a finite number above 0")
