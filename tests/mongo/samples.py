"""Candles for the tests of the Mongo store."""

from __future__ import annotations

import numpy as np

from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.store import SeriesKey

BTC = SeriesKey("binance", "BTCUSDT", "1m")
ALWAYS = (-(2**53), 2**53)


def candles(first: int, count: int) -> CandleSeries:
    """`count` candles from the minute `first` of 2022 on."""
    minutes = np.arange(first, first + count)
    price = 100 + minutes / 7
    return CandleSeries(1_640_995_200_000 + minutes * 60_000, price, price + 1, price - 1, price + 0.5, minutes * 1e-3)
