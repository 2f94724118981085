"""The rules that a signal must keep. Every broken one is named, all in one error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import Final, TypeGuard

import msgspec

from backtest_kit.errors import UserError
from backtest_kit.model.identity import Identity
from backtest_kit.model.interval import iso
from backtest_kit.model.price import price_text
from backtest_kit.model.signal import Signal
from backtest_kit.settings import Settings

# A level computed as "0.5 % from the price" must pass a limit of 0.5 %, regardless of the last digit.
_ROUNDING: Final = 1e-9


def check_signal(signal: Signal, identity: Identity, price: float, when_ms: int, settings: Settings) -> None:
    """Accept a signal as it would be acted on at `price` and `when_ms`.

    Raises:
        UserError: with every broken rule.
    """
    problems = list(_problems(signal, identity, price, when_ms, settings))
    if problems:
        raise UserError(
            f"signal of strategy {identity.strategy_name!r} for {identity.symbol} at {iso(when_ms)} is refused: "
            + "; ".join(problems)
        )


def enters_now(signal: Signal, price: float) -> bool:
    """Whether the market is already at the entry price or better, or the signal names none."""
    if signal.price_open is None:
        return True
    return price <= signal.price_open if signal.position == "long" else price >= signal.price_open


def _problems(signal: Signal, identity: Identity, price: float, when_ms: int, settings: Settings) -> Iterator[str]:
    for name in ("symbol", "strategy_name", "exchange_name"):
        if not getattr(identity, name):
            yield f"{name} is empty: give a name"
    if when_ms <= 0:
        yield f"the time is {when_ms}: it must be after 1970"
    yield from _field_problems(signal, settings)
    prices: dict[str, object] = {
        "price_take_profit": signal.price_take_profit,
        "price_stop_loss": signal.price_stop_loss,
        "current price": price,
    }
    if signal.price_open is not None:
        prices["price_open"] = signal.price_open
    bad = [name for name, value in prices.items() if not _is_amount(value)]
    for name in bad:
        yield f"{name} is {prices[name]!r}: give a finite number above 0"
    if not bad and signal.position in ("long", "short"):
        yield from _level_problems(signal, price, settings)


def _field_problems(signal: Signal, settings: Settings) -> Iterator[str]:
    # A user's strategy is not type-checked: each field may hold anything.
    fields: dict[str, object] = msgspec.structs.asdict(signal)
    direction, minutes = fields["position"], fields["minutes"]
    if direction not in ("long", "short"):
        yield f"position is {direction!r}: use 'long' or 'short'"
    elif direction == "long" and not settings.CC_ENABLE_LONG_SIGNAL:
        yield "long positions are switched off by CC_ENABLE_LONG_SIGNAL"
    elif direction == "short" and not settings.CC_ENABLE_SHORT_SIGNAL:
        yield "short positions are switched off by CC_ENABLE_SHORT_SIGNAL"
    if fields["id"] is not None and (not isinstance(fields["id"], str) or not fields["id"]):
        yield f"id is {fields['id']!r}: give a text, or leave it out"
    if not isinstance(fields["note"], str):
        yield f"note is {fields['note']!r}: give a text"
    if fields["cost"] is not None and not _is_amount(fields["cost"]):
        yield f"cost is {fields['cost']!r}: give an amount above 0 in quote currency"
    longest = settings.CC_MAX_SIGNAL_LIFETIME_MINUTES
    if minutes is None:
        return
    if not _is_lifetime(minutes):
        yield f"minutes is {minutes!r}: give a whole number of minutes above 0, or math.inf"
    elif minutes > longest:
        yield (
            f"minutes is {minutes:g}: the longest life is {longest:g}; "
            "shorten it or raise CC_MAX_SIGNAL_LIFETIME_MINUTES"
        )


def _level_problems(signal: Signal, price: float, settings: Settings) -> Iterator[str]:
    take, stop = signal.price_take_profit, signal.price_stop_loss
    now = enters_now(signal, price)
    entry = price if signal.price_open is None else signal.price_open
    sign = 1.0 if signal.position == "long" else -1.0
    side, other = ("above", "below") if signal.position == "long" else ("below", "above")
    if sign * (take - entry) <= 0:
        yield (
            f"price_take_profit is {price_text(take)}: a {signal.position} takes profit {side} its entry price "
            f"{price_text(entry)}"
        )
    if sign * (entry - stop) <= 0:
        yield (
            f"price_stop_loss is {price_text(stop)}: a {signal.position} stops {other} its entry price "
            f"{price_text(entry)}"
        )
    yield from _distance_problems(take, stop, entry, sign, settings)
    if now and signal.price_open is not None and not sign * stop < sign * price < sign * take:
        yield (
            f"the current price {price_text(price)} is already beyond price_take_profit {price_text(take)} "
            f"or price_stop_loss {price_text(stop)}: the position would close immediately"
        )


def _distance_problems(take: float, stop: float, entry: float, sign: float, settings: Settings) -> Iterator[str]:
    # Only a level on its right side has a distance worth naming; the wrong side is reported on its own.
    to_take, to_stop = sign * (take - entry) / entry * 100, sign * (entry - stop) / entry * 100
    least_take = settings.CC_MIN_TAKEPROFIT_DISTANCE_PERCENT
    least_stop = settings.CC_MIN_STOPLOSS_DISTANCE_PERCENT
    most_stop = settings.CC_MAX_STOPLOSS_DISTANCE_PERCENT
    if least_take and 0 < to_take < least_take - _ROUNDING:
        yield (
            f"price_take_profit {price_text(take)} is {to_take:.4g} % from the entry price {price_text(entry)}: "
            f"CC_MIN_TAKEPROFIT_DISTANCE_PERCENT asks for {least_take:g} %"
        )
    if least_stop and 0 < to_stop < least_stop - _ROUNDING:
        yield (
            f"price_stop_loss {price_text(stop)} is {to_stop:.4g} % from the entry price {price_text(entry)}: "
            f"CC_MIN_STOPLOSS_DISTANCE_PERCENT asks for {least_stop:g} %"
        )
    if most_stop and to_stop > most_stop + _ROUNDING:
        yield (
            f"price_stop_loss {price_text(stop)} is {to_stop:.4g} % from the entry price {price_text(entry)}: "
            f"CC_MAX_STOPLOSS_DISTANCE_PERCENT allows {most_stop:g} %"
        )


def _is_number(value: object) -> TypeGuard[float]:
    # An instance check against an abstract class costs more than all the other rules together.
    return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))


def _is_amount(value: object) -> bool:
    return _is_number(value) and math.isfinite(value) and value > 0


def _is_lifetime(value: object) -> TypeGuard[float]:
    return _is_number(value) and value > 0 and (math.isinf(value) or value == int(value))
