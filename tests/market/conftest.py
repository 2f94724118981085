"""Candles, a source that counts what it is asked, and a candle store in a dict."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from backtest_kit.market.sources.base import CandleSource
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.persist.store import CandleStore, SeriesKey

START = 1_640_995_200_000  # 2022-01-01
DATA = Path(__file__).parents[2].parent / "shared" / "data"


class CountingSource(CandleSource):
    """Serves the candles it was given, and remembers every range it was asked for."""

    def __init__(self, candles: CandleSeries) -> None:
        self.held = candles
        self.asked: list[tuple[int, int]] = []
        self.failures: list[Exception] = []
        self.pause = 0.0

    async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        self.asked.append((start_ms, stop_ms))
        await asyncio.sleep(self.pause)
        if self.failures:
            raise self.failures.pop(0)
        return self.held.between(start_ms, stop_ms)

    async def range(self, symbol: str) -> tuple[int, int] | None:
        if not len(self.held):
            return None
        return int(self.held.timestamp[0]), int(self.held.timestamp[-1]) + MINUTE_MS


class DictCandleStore(CandleStore):
    def __init__(self) -> None:
        self.rows: dict[SeriesKey, dict[int, tuple[float, ...]]] = {}
        self.broken = False

    async def read(self, series: SeriesKey, start_ms: int, stop_ms: int) -> CandleSeries:
        rows = self.rows.get(series, {})
        return CandleSeries.from_rows([rows[at] for at in sorted(rows) if start_ms <= at < stop_ms])

    async def write(self, series: SeriesKey, candles: CandleSeries) -> int:
        if self.broken:
            raise OSError("no space left")
        rows = self.rows.setdefault(series, {})
        before = len(rows)
        for row in zip(*(candles.columns()[name].tolist() for name in COLUMNS), strict=True):
            rows.setdefault(row[0], row)
        return len(rows) - before


def _make_candles(count: int, start_ms: int = START, seed: int = 1) -> CandleSeries:
    random = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(random.normal(0, 0.001, count)))
    open_ = np.concatenate(([100.0], close[:-1]))[:count]
    high = np.maximum(open_, close) * 1.001
    low = np.minimum(open_, close) * 0.999
    times = start_ms + np.arange(count, dtype=np.int64) * MINUTE_MS
    return CandleSeries(times, open_, high, low, close, random.uniform(0.1, 9, count))


@pytest.fixture
def make_candles() -> Callable[..., CandleSeries]:
    """`make_candles(count, start_ms=2022-01-01, seed=1)`: a random walk without gaps."""
    return _make_candles


@pytest.fixture
def source_of() -> type[CountingSource]:
    return CountingSource


@pytest.fixture
def memory_store() -> DictCandleStore:
    return DictCandleStore()


@pytest.fixture
def real_files() -> list[Path]:
    """The shared files of real candles."""
    files = sorted(DATA.glob("*.csv.gz"))
    if not files:
        pytest.skip(f"the real candles are not here: put *.csv.gz files into {DATA}")
    return files
