"""Cases of candles: columns over time, of which the first write wins."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.store import Capability, SeriesKey, Store
from backtest_kit.persist.testing.harness import Harness, each, has

BTC = SeriesKey("binance", "BTCUSDT", "1m")
START = 1_640_995_200_000
"""2022-01-01T00:00Z."""
MINUTE = 60_000
ALWAYS = (-(2**53), 2**53)

OTHERS = (
    SeriesKey("okx", "BTCUSDT", "1m"),
    SeriesKey("binance", "BTCUSD", "1m"),
    SeriesKey("binance", "btcusdt", "1m"),
    SeriesKey("binance", "BTC/USDT", "1m"),
    SeriesKey("binance", "BTCUSDT", "1h"),
    SeriesKey("", "..", "1m"),
)
"""Series that differ from BTC as little as possible."""


def candles(first: int, count: int, *, price: float = 100.0, step: int = MINUTE) -> CandleSeries:
    """`count` candles from the minute `first` of 2022 on."""
    minutes = np.arange(first, first + count)
    base = price + (minutes % 97) / 7
    return CandleSeries(START + minutes * step, base, base + 1, base - 1, base + 0.5, minutes * 1e-3)


class CandleCases(Harness):
    async def test_absent_series_is_empty(self, store: Store) -> None:
        assert len(await store.candles.read(BTC, *ALWAYS)) == 0

    async def test_candles_come_back_as_written(self, store: Store) -> None:
        written = await store.candles.write(BTC, candles(0, 500))
        found = await store.candles.read(BTC, *ALWAYS)
        if self.expect_kept(written or len(found)):
            assert (written, found) == (500, candles(0, 500))

    async def test_extreme_prices_come_back_bit_for_bit(self, store: Store) -> None:
        prices = np.array([5e-324, 1e-308, 1 / 3, 1e308, 0.1 + 0.2])
        series = CandleSeries(START + np.arange(5) * MINUTE, prices, prices, prices, prices, prices)
        await store.candles.write(BTC, series)
        found = await store.candles.read(BTC, *ALWAYS)
        if self.expect_kept(len(found)):
            assert found.open.tobytes() == prices.tobytes()
            assert found.timestamp.dtype == np.int64

    async def test_range_takes_its_start_and_leaves_its_stop(self, store: Store) -> None:
        await store.candles.write(BTC, candles(0, 10))
        for start, stop in [(0, 10), (3, 7), (9, 10), (5, 5), (-5, 3), (8, 99), (20, 30), (7, 3)]:
            found = await store.candles.read(BTC, START + start * MINUTE, START + stop * MINUTE)
            expected = [minute for minute in range(10) if start <= minute < stop]
            if self.expect_kept(len(found)):
                assert ((found.timestamp - START) // MINUTE).tolist() == expected, (start, stop)

    async def test_range_between_candles(self, store: Store) -> None:
        await store.candles.write(BTC, candles(0, 10))
        found = await store.candles.read(BTC, START + 1, START + 2 * MINUTE + 1)
        if self.expect_kept(len(found)):
            assert ((found.timestamp - START) // MINUTE).tolist() == [1, 2]

    async def test_first_write_wins(self, store: Store) -> None:
        await store.candles.write(BTC, candles(0, 10))
        written = await store.candles.write(BTC, candles(5, 10, price=900.0))
        found = await store.candles.read(BTC, *ALWAYS)
        if self.expect_kept(written):
            assert written == 5
            assert found == CandleSeries.concat((candles(0, 10), candles(10, 5, price=900.0)))
            assert await store.candles.write(BTC, candles(0, 15, price=1.0)) == 0
            assert await store.candles.read(BTC, *ALWAYS) == found

    async def test_parts_in_any_order_are_read_in_order(self, store: Store) -> None:
        for first in (60_000, 0, 30_000, 29_990, 90_000):
            await store.candles.write(BTC, candles(first, 20))
        found = await store.candles.read(BTC, *ALWAYS)
        if self.expect_kept(len(found)):
            minutes = sorted(
                {minute for first in (60_000, 0, 30_000, 29_990, 90_000) for minute in range(first, first + 20)}
            )
            assert ((found.timestamp - START) // MINUTE).tolist() == minutes

    async def test_candles_across_the_end_of_a_month_and_a_year(self, store: Store) -> None:
        quarters = SeriesKey("binance", "BTCUSDT", "15m")
        series = candles(-3 * 96, 40 * 96, step=15 * MINUTE)
        await store.candles.write(quarters, series)
        found = await store.candles.read(quarters, *ALWAYS)
        if self.expect_kept(len(found)):
            assert found == series

    async def test_gap_is_left_out(self, store: Store) -> None:
        await store.candles.write(BTC, candles(0, 3))
        await store.candles.write(BTC, candles(7, 3))
        found = await store.candles.read(BTC, START, START + 10 * MINUTE)
        if self.expect_kept(len(found)):
            assert ((found.timestamp - START) // MINUTE).tolist() == [0, 1, 2, 7, 8, 9]

    async def test_gap_can_be_filled_later(self, store: Store) -> None:
        await store.candles.write(BTC, candles(0, 3))
        await store.candles.write(BTC, candles(7, 3))
        written = await store.candles.write(BTC, candles(0, 10))
        if self.expect_kept(written):
            assert written == 4
            assert await store.candles.read(BTC, *ALWAYS) == candles(0, 10)

    @each("other", {str(series): series for series in OTHERS})
    async def test_series_are_apart(self, store: Store, other: SeriesKey) -> None:
        await store.candles.write(BTC, candles(0, 5))
        assert len(await store.candles.read(other, *ALWAYS)) == 0
        await store.candles.write(other, candles(0, 5, price=7.0))
        one, two = await store.candles.read(BTC, *ALWAYS), await store.candles.read(other, *ALWAYS)
        if self.expect_kept(len(one) or len(two)):
            assert (one, two) == (candles(0, 5), candles(0, 5, price=7.0))

    async def test_daily_candles(self, store: Store) -> None:
        days = SeriesKey("binance", "BTCUSDT", "1d")
        series = candles(-400, 800, step=86_400_000)
        await store.candles.write(days, series)
        found = await store.candles.read(days, *ALWAYS)
        if self.expect_kept(len(found)):
            assert found == series

    async def test_empty_write(self, store: Store) -> None:
        assert await store.candles.write(BTC, CandleSeries.empty()) == 0
        assert len(await store.candles.read(BTC, *ALWAYS)) == 0

    async def test_stored_candles_cannot_be_changed_from_outside(self, store: Store) -> None:
        column: Any = np.full(3, 100.0)
        series = CandleSeries(START + np.arange(3) * MINUTE, column, column, column, column, column)
        await store.candles.write(BTC, series)
        column[:] = -1.0
        found = await store.candles.read(BTC, *ALWAYS)
        if self.expect_kept(len(found)):
            assert found.open.tolist() == [100.0] * 3
            with pytest.raises(ValueError, match="read-only"):
                found.open[0] = -1.0

    async def test_first_of_many_writers_wins_for_ever(self, store: Store) -> None:
        offers = [candles(0, 50, price=float(100 * number)) for number in range(1, 17)]
        counts = await asyncio.gather(*(store.candles.write(BTC, offer) for offer in offers))
        found = await store.candles.read(BTC, *ALWAYS)
        if self.expect_kept(len(found)):
            assert sorted(counts) == [0] * 15 + [50]
            assert found == offers[counts.index(50)]

    async def test_overlapping_writers_lose_nothing(self, store: Store) -> None:
        counts = await asyncio.gather(*(store.candles.write(BTC, candles(first, 30)) for first in range(0, 100, 10)))
        found = await store.candles.read(BTC, *ALWAYS)
        if self.expect_kept(len(found)):
            assert sum(counts) == 120
            assert found == candles(0, 120)

    async def test_closed_store_has_its_candles(self, place: Path) -> None:
        first = self.make_store(place)
        await first.candles.write(BTC, candles(0, 100))
        await first.close()
        second = self.make_store(place)
        found = await second.candles.read(BTC, *ALWAYS)
        assert found == (candles(0, 100) if has(second, Capability.DURABLE) else CandleSeries.empty())
        await second.close()

    async def test_namespaces_have_candles_of_their_own(self, store: Store) -> None:
        await store.candles.write(BTC, candles(0, 5))
        assert len(await store.namespace("paper").candles.read(BTC, *ALWAYS)) == 0
        await store.namespace("paper").candles.write(BTC, candles(0, 5, price=7.0))
        found = await store.candles.read(BTC, *ALWAYS)
        if self.expect_kept(len(found)):
            assert found == candles(0, 5)
