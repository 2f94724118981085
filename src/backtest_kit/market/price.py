"""Prices made from candles: the volume-weighted average, and longer candles from 1m ones."""

from __future__ import annotations

import numpy as np

from backtest_kit.errors import UserError
from backtest_kit.model.candle import CandleSeries, FloatColumn
from backtest_kit.model.interval import MINUTE_MS


def vwap(candles: CandleSeries, window: int) -> FloatColumn:
    """Volume-weighted average price of each candle and the `window - 1` before it.

    Element i is `sum(typical * volume) / sum(volume)` over candles i - window + 1 .. i, with
    typical = (high + low + close) / 3; where that volume is 0, the plain mean of the closes. The
    first `window - 1` elements are NaN.

    Sums are taken window by window, not from running totals: an element depends on nothing but its
    own candles, to the last bit, so a live run and a backtest agree however far back each began.
    """
    prices = np.full(len(candles), np.nan)
    if len(candles) < window:
        return prices
    typical = (candles.high + candles.low + candles.close) / 3
    volume = _sliding_sum(candles.volume, window)
    traded = volume > 0
    averages = prices[window - 1 :]
    np.divide(_sliding_sum(typical * candles.volume, window), volume, out=averages, where=traded)
    if not traded.all():
        averages[~traded] = _sliding_sum(candles.close, window)[~traded] / window
    return prices


def resample(candles: CandleSeries, step_ms: int) -> CandleSeries:
    """Candles of `step_ms` from contiguous 1m candles that begin on a step and fill whole steps.

    Raises:
        UserError: the candles do not fill whole steps from an aligned start.
    """
    size, odd = divmod(step_ms, MINUTE_MS)
    if odd or size < 1 or len(candles) % size or (len(candles) and candles.timestamp[0] % step_ms):
        raise UserError(f"{candles!r} cannot be cut into candles of {step_ms} ms: give whole, aligned steps")
    if size == 1:
        return candles
    shape = (-1, size)
    return CandleSeries(
        candles.timestamp[::size].copy(),
        candles.open[::size].copy(),
        candles.high.reshape(shape).max(axis=1),
        candles.low.reshape(shape).min(axis=1),
        candles.close[size - 1 :: size].copy(),
        candles.volume.reshape(shape).sum(axis=1),
    )


def _sliding_sum(column: FloatColumn, window: int) -> FloatColumn:
    count = len(column) - window + 1
    total = column[:count].copy()
    for offset in range(1, window):
        total += column[offset : offset + count]
    return total
