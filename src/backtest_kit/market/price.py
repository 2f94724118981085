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


def resample(candles: CandleSeries, step_ms: int, rows: slice = slice(None)) -> CandleSeries:
    """Candles of `step_ms` from the contiguous 1m candles `candles[rows]`, as new columns of their own.

    Raises:
        UserError: the candles do not begin on a step, or do not fill whole steps.
    """
    times, volume = candles.timestamp[rows], candles.volume[rows]
    size, odd = divmod(step_ms, MINUTE_MS)
    if odd or size < 1 or len(times) % size or (len(times) and times[0] % step_ms):
        raise UserError(f"{candles[rows]!r} cannot be cut into candles of {step_ms} ms: give whole, aligned steps")
    open_, high, low, close = candles.open[rows], candles.high[rows], candles.low[rows], candles.close[rows]
    if size == 1:
        return CandleSeries.trusted(times.copy(), open_.copy(), high.copy(), low.copy(), close.copy(), volume.copy())
    shape = (-1, size)
    return CandleSeries.trusted(
        times[::size].copy(),
        open_[::size].copy(),
        high.reshape(shape).max(axis=1),
        low.reshape(shape).min(axis=1),
        close[size - 1 :: size].copy(),
        volume.reshape(shape).sum(axis=1),
    )


def _sliding_sum(column: FloatColumn, window: int) -> FloatColumn:
    count = len(column) - window + 1
    total = column[:count].copy()
    for offset in range(1, window):
        total += column[offset : offset + count]
    return total
