"""Ticks and lots: prices and quantities as an exchange takes them, in `Decimal`."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_DOWN, ROUND_FLOOR, Context, Decimal

# Quotients of any price and any tick fit; the default context would refuse a billion of an 18-digit token.
_EXACT = Context(prec=60)


def exact(number: float | str | Decimal) -> Decimal:
    """The decimal that `number` is written as: 0.1 is a tenth."""
    return number if isinstance(number, Decimal) else Decimal(str(number))


def lots(quantity: Decimal, step: Decimal) -> Decimal:
    """`quantity` in whole steps, never more than there is."""
    return _whole(quantity, step, ROUND_DOWN)


def price_below(price: Decimal, tick: Decimal) -> Decimal:
    """The highest whole tick that is not above `price`."""
    return _whole(price, tick, ROUND_FLOOR)


def price_above(price: Decimal, tick: Decimal) -> Decimal:
    """The lowest whole tick that is not below `price`."""
    return _whole(price, tick, ROUND_CEILING)


def significant_tick(price: Decimal, digits: int) -> Decimal:
    """The tick of an exchange that takes prices with so many significant digits."""
    return Decimal(1).scaleb(price.adjusted() - digits + 1)


def _whole(value: Decimal, step: Decimal, rounding: str) -> Decimal:
    count = _EXACT.divide(value, step).to_integral_value(rounding)
    return _EXACT.multiply(count, step).normalize(_EXACT)
