"""Feeds of the tests: over any source, with a clock that stands still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from backtest_kit.market.fetch import CandleFeed
from backtest_kit.market.sources import CandleSource
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import DAY_MS, MINUTE_MS
from backtest_kit.settings import Settings

START = 1_640_995_200_000
NOW = START + 365 * DAY_MS
Make = Callable[..., CandleSeries]


def feed_of(source: CandleSource, store: Any = None, *, now: int = NOW, **settings: Any) -> CandleFeed:
    settings = {"CC_GET_CANDLES_RETRY_DELAY_MS": 0, **settings}
    return CandleFeed("binance", source, store, Settings(**settings), lambda: now)


def minutes(count: int) -> int:
    return START + count * MINUTE_MS
