"""How much to put into a position: pure calculators of `Signal(cost=...)`.

Each returns a cost in quote currency, `quantity * price_open`. The three ways to find the quantity are those of
backtest-kit, and so is the order of its bounds, each of which may undo the one before:

1. at least `min_quantity`,
2. at most `max_position_pct` percent of the balance,
3. at most `max_quantity`.

Quantities are in units of what is traded, prices and balances in quote currency, percentages in percent. A cost of
0.0 means no position. An invalid argument raises a `UserError` that names it.
"""

from __future__ import annotations

import math

import numpy as np

from backtest_kit.errors import UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.price import price_text


def fixed_percentage(
    *,
    balance: float,
    price_open: float,
    price_stop_loss: float,
    risk_pct: float,
    min_quantity: float | None = None,
    max_position_pct: float | None = None,
    max_quantity: float | None = None,
) -> float:
    """The cost at which a stop at `price_stop_loss` loses `risk_pct` percent of `balance`, before fees.

    quantity = balance * risk_pct / 100 / abs(price_open - price_stop_loss)

    Raises:
        UserError: an argument is out of its range, or the stop lies at the entry.
    """
    _above_zero(price_open=price_open, price_stop_loss=price_stop_loss)
    _at_least_zero(balance=balance, risk_pct=risk_pct)
    distance = abs(price_open - price_stop_loss)
    if not distance:
        raise UserError(
            f"price_stop_loss is {price_text(price_stop_loss)}, the price_open itself: a stop needs a distance"
        )
    quantity = balance * risk_pct / 100 / distance
    return _cost(quantity, balance, price_open, min_quantity, max_position_pct, max_quantity)


def kelly(
    *,
    balance: float,
    price_open: float,
    win_rate: float,
    win_loss_ratio: float,
    multiplier: float = 0.25,
    min_quantity: float | None = None,
    max_position_pct: float | None = None,
    max_quantity: float | None = None,
) -> float:
    """The share of `balance` that Kelly's criterion bets, times `multiplier` (a full Kelly bet is 1).

    share = win_rate - (1 - win_rate) / win_loss_ratio, and 0 if that is negative
    (J. L. Kelly, "A New Interpretation of Information Rate", Bell System Technical Journal 35, 1956).

    Args:
        win_rate: Of the trades so far, 0 to 1, both excluded.
        win_loss_ratio: Average win over average loss, as `Statistics.certainty_ratio`.

    Raises:
        UserError: an argument is out of its range.
    """
    _above_zero(price_open=price_open, win_loss_ratio=win_loss_ratio)
    _at_least_zero(balance=balance, multiplier=multiplier)
    if not 0 < win_rate < 1:
        raise UserError(f"win_rate is {win_rate!r}: give a share above 0 and below 1, such as 0.55")
    share = max(0.0, (win_rate * win_loss_ratio - (1 - win_rate)) / win_loss_ratio) * multiplier
    return _cost(balance * share / price_open, balance, price_open, min_quantity, max_position_pct, max_quantity)


def atr_based(
    *,
    balance: float,
    price_open: float,
    atr: float,
    risk_pct: float,
    multiplier: float = 2.0,
    min_quantity: float | None = None,
    max_position_pct: float | None = None,
    max_quantity: float | None = None,
) -> float:
    """The cost at which a move of `multiplier` times `atr` against the position loses `risk_pct` percent of `balance`.

    quantity = balance * risk_pct / 100 / (atr * multiplier); see `atr` for the average true range.

    Raises:
        UserError: an argument is out of its range.
    """
    _above_zero(price_open=price_open, atr=atr, multiplier=multiplier)
    _at_least_zero(balance=balance, risk_pct=risk_pct)
    quantity = balance * risk_pct / 100 / (atr * multiplier)
    return _cost(quantity, balance, price_open, min_quantity, max_position_pct, max_quantity)


def atr(candles: CandleSeries, period: int = 14) -> float:
    """The average true range of the last candle, in price units.

    true range = max(high - low, abs(high - close before), abs(low - close before)); their average begins as the
    mean of the first `period` of them and goes on as (average * (period - 1) + true range) / period
    (J. Welles Wilder, "New Concepts in Technical Trading Systems", 1978). Give it several times `period` candles:
    the start then weighs next to nothing.

    Raises:
        UserError: `period` is below 1, or there are not `period` + 1 candles.
    """
    if period < 1:
        raise UserError(f"period is {period!r}: give 1 or more")
    if len(candles) < period + 1:
        raise UserError(f"candles has {len(candles)} rows: an atr of period {period} takes {period + 1} or more")
    before, high, low = candles.close[:-1], candles.high[1:], candles.low[1:]
    ranges = np.maximum(high, before) - np.minimum(low, before)
    average = float(ranges[:period].mean())
    for true_range in ranges[period:].tolist():
        average = (average * (period - 1) + true_range) / period
    return average


def _cost(
    quantity: float,
    balance: float,
    price_open: float,
    min_quantity: float | None,
    max_position_pct: float | None,
    max_quantity: float | None,
) -> float:
    bounds = {"min_quantity": min_quantity, "max_position_pct": max_position_pct, "max_quantity": max_quantity}
    _at_least_zero(**{name: bound for name, bound in bounds.items() if bound is not None})
    if min_quantity is not None:
        quantity = max(quantity, min_quantity)
    if max_position_pct is not None:
        quantity = min(quantity, balance * max_position_pct / 100 / price_open)
    if max_quantity is not None:
        quantity = min(quantity, max_quantity)
    return quantity * price_open


def _above_zero(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} is {value!r}: give a number above 0")


def _at_least_zero(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{name} is {value!r}: give a number of 0 or more")
