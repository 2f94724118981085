"""A made-up market that is the same for everyone who names the same seed."""

from __future__ import annotations

import asyncio
import math
from numbers import Real
from typing import Final
from zlib import crc32

import numpy as np

from backtest_kit.errors import UserError
from backtest_kit.market.sources.base import ANY_RANGE, CandleSource
from backtest_kit.model.candle import CandleSeries, FloatColumn
from backtest_kit.model.interval import DAY_MS, MINUTE_MS, floor_ms, interval_ms

_BEGIN_MS: Final = 1_420_070_400_000  # 2015-01-01
_END_MS: Final = 4_102_444_800_000  # 2100-01-01
_MINUTES: Final = DAY_MS // MINUTE_MS
_PERSISTENCE: Final = 0.997
"""Part of the distance from the long-run price that is left after a day."""
_TURNOVER: Final = 500_000.0
"""Median traded value of a minute, in quote currency."""
_START_PRICE: Final = 50_000.0
_SIGMA: Final = 0.0008


def synthetic(seed: int = 7, *, start_price: float = _START_PRICE, sigma: float = _SIGMA) -> CandleSource:
    """A deterministic market from 2015 to 2100: a candle depends on seed, symbol and minute alone.

    Each symbol wanders about its own long-run price: `start_price` for symbols that begin with BTC,
    a fraction of it for the others. `sigma` is the standard deviation of a minute's log return.

    The log price of midnights is a mean-reverting walk (AR(1)); inside a day it is a Brownian bridge
    between two midnights. Every candle opens at the close before it; prices and volumes are positive.

    Raises:
        UserError: `seed` is negative, `start_price` not above 0, or `sigma` not within 0 .. 0.005.
    """
    given: tuple[object, ...] = (seed, start_price, sigma)
    if not all(isinstance(each, Real) for each in given) or int(seed) != seed:
        raise UserError(
            f"synthetic({seed!r}, start_price={start_price!r}, sigma={sigma!r}): give numbers, and a whole seed"
        )
    if seed < 0:
        raise UserError(f"seed is {seed}: give a whole number, 0 or above")
    if not 0 < start_price < math.inf:
        raise UserError(f"start_price is {start_price}: give a number above 0")
    if not 0 <= sigma <= 0.005:
        raise UserError(f"sigma is {sigma}: give the log return of a minute, from 0 to 0.005 (0.0008 is lively)")
    return SyntheticSource(seed, start_price, sigma)


class SyntheticSource(CandleSource):
    page_limit = ANY_RANGE

    def __init__(self, seed: int, start_price: float, sigma: float) -> None:
        self._seed = seed
        self._start_price = start_price
        self._sigma = sigma
        name = f"synthetic-{seed}"
        if start_price != _START_PRICE:
            name += f"-price-{start_price!r}"
        if sigma != _SIGMA:
            name += f"-sigma-{sigma!r}"
        self.series_name = name

    async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        interval_ms(interval, ("1m",), what="interval of a synthetic market")
        return await asyncio.to_thread(self._candles, symbol, start_ms, stop_ms)

    async def range(self, symbol: str) -> tuple[int, int]:
        return _BEGIN_MS, _END_MS

    def _candles(self, symbol: str, start_ms: int, stop_ms: int) -> CandleSeries:
        start_ms, stop_ms = max(start_ms, _BEGIN_MS), min(stop_ms, _END_MS)
        if stop_ms <= start_ms:
            return CandleSeries.empty()
        first = (start_ms - _BEGIN_MS) // DAY_MS
        last = (stop_ms - 1 - _BEGIN_MS) // DAY_MS
        name = crc32(symbol.encode())
        level = math.log(self._start_price * _level(symbol, name))
        anchors = level + self._anchors(name, last + 2)
        days = [self._day(name, day, anchors[day], anchors[day + 1]) for day in range(first, last + 1)]
        open_, high, low, close, volume = np.concatenate(days, axis=1)
        times = np.arange(len(open_), dtype=np.int64) * MINUTE_MS + floor_ms(start_ms, DAY_MS)
        return CandleSeries(times, open_, high, low, close, volume).between(start_ms, stop_ms)

    def _anchors(self, name: int, count: int) -> FloatColumn:
        """The first `count` midnights as log distance from the long-run price."""
        shocks = np.random.default_rng([self._seed, name]).standard_normal(count) * self._sigma * math.sqrt(_MINUTES)
        anchors = [0.0]
        for shock in shocks[1:].tolist():
            anchors.append(anchors[-1] * _PERSISTENCE + shock)
        return np.array(anchors)

    def _day(self, name: int, day: int, begin: float, end: float) -> FloatColumn:
        """Rows open, high, low, close, volume of one day."""
        noise = np.random.default_rng([self._seed, name, day]).standard_normal((4, _MINUTES))
        walk = np.cumsum(noise[0]) * self._sigma
        elapsed = np.arange(1, _MINUTES + 1) / _MINUTES
        path = _rounded(np.exp(np.concatenate(([begin], begin + walk + elapsed * (end - begin - walk[-1])))))
        # The bridge ends at `end` only up to the last bit; the next day opens at `end` itself.
        path[-1] = _rounded(np.exp(np.array([end])))[0]
        open_, close = path[:-1], path[1:]
        top, bottom = np.maximum(open_, close), np.minimum(open_, close)
        wicks = np.exp(np.abs(noise[1:3]) * self._sigma * 0.5)
        high = np.maximum(_rounded(top * wicks[0]), top)
        low = np.minimum(_rounded(bottom / wicks[1]), bottom)
        # Busier in the middle of the day, and where the price moves.
        activity = 1 - 0.4 * np.cos(2 * np.pi * elapsed) + np.abs(noise[0])
        volume = _rounded(_TURNOVER / close * activity * np.exp(0.6 * noise[3]))
        return np.stack((open_, high, low, close, volume))


def _level(symbol: str, name: int) -> float:
    """The long-run price of a symbol as a part of the start price: 1 for BTC, else 0.1 .. 0.0001."""
    return 1.0 if symbol.startswith("BTC") else float(10.0 ** -(1 + name % 3000 / 1000))


def _rounded(values: FloatColumn) -> FloatColumn:
    """To eight significant digits: a price an exchange could show, and the same on every processor."""
    scale = 10.0 ** (7 - np.floor(np.log10(values)))
    rounded: FloatColumn = np.rint(values * scale) / scale
    return rounded
