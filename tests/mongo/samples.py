"""What the tests of the Mongo store have in common: stores, keys and candles."""

from __future__ import annotations

from typing import Any

import numpy as np

from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.backends.mongo.settings import MongoSettings
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.store import SeriesKey

KEY = ("trend", "binance", "BTCUSDT")
NAME = {"namespace": "", "strategyName": "trend", "exchangeName": "binance", "symbol": "BTCUSDT"}

BTC = SeriesKey("binance", "BTCUSDT", "1m")
ALWAYS = (-(2**53), 2**53)


Database = Any
"""A database of the synchronous driver, for looking behind the store's back."""


def store_over(url: str, **settings: Any) -> MongoStore:
    """Without Redis."""
    return MongoStore(url, settings=MongoSettings(CC_REDIS_HOST="", **settings))


def candles(first: int, count: int) -> CandleSeries:
    """`count` candles from the minute `first` of 2022 on."""
    minutes = np.arange(first, first + count)
    price = 100 + minutes / 7
    return CandleSeries(1_640_995_200_000 + minutes * 60_000, price, price + 1, price - 1, price + 0.5, minutes * 1e-3)
