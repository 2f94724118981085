"""Figures of a market from the closing prices of its trades."""

from __future__ import annotations

import math
from typing import Any, Final, Literal

import numpy as np

from backtest_kit.model.candle import FloatColumn
from backtest_kit.model.interval import DAY_MS

MIN_PRICES: Final = 10
MIN_TREND_FIT: Final = 0.30
"""A line that explains less than this share of the variance is not a trend."""
MIN_TREND_STEPS: Final = 0.25
"""A slope per day below this share of a typical step is not a trend either."""

Trend = Literal["bullish", "bearish", "sideways", "neutral"]

_NO_PROFILE: Final = {
    "median_step_size": None,
    "buyer_pressure": None,
    "seller_pressure": None,
    "buyer_strength": None,
    "seller_strength": None,
    "pressure_imbalance": None,
    "trend_strength": None,
    "trend_confidence": None,
    "trend": None,
}


def price_profile(closed_at_ms: FloatColumn, close_price: FloatColumn) -> dict[str, Any]:
    """The fields of `Statistics` about prices; a price that is not a positive number is left out."""
    usable = np.isfinite(close_price) & (close_price > 0)
    if np.count_nonzero(usable) < MIN_PRICES:
        return _NO_PROFILE
    times, prices = closed_at_ms[usable], close_price[usable]
    order = np.argsort(times, kind="stable")
    times, prices = times[order], prices[order]
    steps = np.diff(prices) / prices[:-1]
    up, down = steps[steps > 0], -steps[steps < 0]
    pressure = finite(len(up) / (len(up) + len(down))) if len(up) + len(down) else None
    strength = finite(up.sum() / (up.sum() + down.sum())) if len(up) + len(down) else None
    median_step = finite(np.median(np.abs(steps)) * 100)
    return {
        "median_step_size": median_step,
        "buyer_pressure": pressure,
        "seller_pressure": None if pressure is None else 1 - pressure,
        "buyer_strength": strength,
        "seller_strength": None if strength is None else 1 - strength,
        "pressure_imbalance": None if strength is None else 2 * strength - 1,
        **_trend((times - times[0]) / DAY_MS, np.log(prices), median_step),
    }


def _trend(days: FloatColumn, log_price: FloatColumn, median_step: float | None) -> dict[str, Any]:
    x, y = days - days.mean(), log_price - log_price.mean()
    spread, height, joint = float(x @ x), float(y @ y), float(x @ y)
    if spread <= 0:
        return {"trend_strength": None, "trend_confidence": None, "trend": None}
    slope = finite(joint / spread * 100)
    # R^2 as the product of both slopes: the product of spread and height could round to zero.
    fit = min(1.0, max(0.0, joint / spread * (joint / height))) if height > 0 else 0.0
    trend: Trend | None
    if fit < MIN_TREND_FIT:
        trend = "sideways"
    elif slope is None or median_step is None:
        trend = None
    elif abs(slope) < MIN_TREND_STEPS * median_step:
        trend = "neutral"
    else:
        trend = "bullish" if slope > 0 else "bearish"
    return {"trend_strength": slope, "trend_confidence": finite(fit), "trend": trend}


def finite(value: Any) -> float | None:
    """`value`, or None if it is not a finite number."""
    return float(value) if value is not None and math.isfinite(value) else None
