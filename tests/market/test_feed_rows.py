"""Rows that are not 1m candles: refused, or repaired, and never cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.market.feeds import START, Make, feed_of, minutes

from backtest_kit.errors import UserError
from backtest_kit.market import sources
from backtest_kit.market.fetch import CandleFeed
from backtest_kit.market.sources import CandleSource
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.settings import Settings


def garbled(held: CandleSeries, **cells: tuple[int, float]) -> CandleSeries:
    columns = {name: column.copy() for name, column in held.columns().items()}
    for name, (at, value) in cells.items():
        columns[name][at] = value
    return CandleSeries(**columns)


class Raw(CandleSource):
    """Serves the rows it was given, whatever their order."""

    def __init__(self, rows: CandleSeries) -> None:
        self.rows = rows

    async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        return self.rows.take((self.rows.timestamp >= start_ms) & (self.rows.timestamp < stop_ms))


async def test_bad_rows_are_refused_or_repaired_counted_and_logged_once(
    make_candles: Make, caplog: pytest.LogCaptureFixture
) -> None:
    held = make_candles(60)
    bad = garbled(held, close=(20, float("nan")), volume=(30, -1.0), timestamp=(40, minutes(40) + 14_789))
    rows = bad.take(np.r_[0:11, 10:60])
    feed = feed_of(Raw(rows), CC_MAX_CANDLES_PER_REQUEST=10)
    with pytest.raises(UserError, match=r"00:10Z appears twice .* repaired \(dirty=\"repair\""):
        await feed.load("BTCUSDT", START, minutes(60), gaps="fill")
    assert not caplog.messages
    loaded = await feed.load("BTCUSDT", START, minutes(60), gaps="fill", dirty="repair")
    assert loaded.repairs == {"repeated": 1, "not_finite": 1, "volume": 1, "moved": 1, "conflicting": 1}
    assert loaded.filled == 3
    assert loaded.candles.close[41] == held.close[40], "the row that opened at 00:40:14 closes after 00:41"
    assert loaded.candles.close[40] == held.close[39]
    (message,) = caplog.messages
    assert message.startswith("BTCUSDT: bad rows of binance were repaired: 1 moved up to the next whole minute; ")
    with pytest.raises(UserError, match="3 minutes of BTCUSDT are missing in 3 places"):
        await feed.load("BTCUSDT", START, minutes(60), dirty="repair")


async def test_what_goes_on_being_wrong_is_told_once_an_hour(
    make_candles: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A live run meets it at every minute."""
    held = make_candles(200)
    rows = CandleSeries(**{**held.columns(), "timestamp": held.timestamp + 14_000})
    now_ms = START
    feed = CandleFeed("binance", Raw(rows), None, Settings(), lambda: now_ms)
    for at in range(1, 150):
        now_ms = minutes(at + 1)
        await feed.load("BTCUSDT", minutes(at), now_ms, gaps="fill", dirty="repair")
    assert len(caplog.messages) == 3


async def test_a_minute_is_found_whose_row_opened_before_the_range(make_candles: Make) -> None:
    """As a live run asks: minute by minute, of an exchange whose minutes begin at 14 s."""
    held = make_candles(30)
    columns = {**held.columns(), "timestamp": held.timestamp + 14_000}
    feed = feed_of(Raw(CandleSeries(**columns)))
    for at in range(1, 30):
        loaded = await feed.load("BTCUSDT", minutes(at), minutes(at + 1), dirty="repair", edges="wait")
        assert loaded.candles.close[0] == held.close[at - 1]


async def test_only_what_was_published_is_cached(make_candles: Make, memory_store: Any) -> None:
    """What was repaired is repaired, and counted, again: the cache is no place where bad data turn into good."""
    held = make_candles(30)
    rows = garbled(held, timestamp=(10, minutes(10) + 500), close=(20, float("nan")))
    feed = feed_of(Raw(rows), memory_store)
    first = await feed.load("BTCUSDT", START, minutes(30), gaps="fill", dirty="repair")
    (stored,) = memory_store.rows.values()
    assert sorted(stored) == [minutes(at) for at in range(30) if at not in (10, 11, 20)]
    second = await feed.load("BTCUSDT", START, minutes(30), gaps="fill", dirty="repair")
    assert (second.candles, second.filled, second.fetched, second.repairs) == (first.candles, 2, 1, first.repairs)
    with pytest.raises(UserError, match="do not open on a whole 60 s step"):
        await feed.load("BTCUSDT", START, minutes(30), gaps="fill")


async def test_a_page_of_bad_rows_alone_is_no_end(make_candles: Make) -> None:
    """An exchange with small pages: what follows is asked from the last row, not from the end of the request."""
    held = make_candles(60)
    closes = held.close.copy()
    closes[10:40] = np.nan
    source = Raw(CandleSeries(**{**held.columns(), "close": closes}))
    fetch = source.fetch

    async def short(symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        return (await fetch(symbol, interval, start_ms, stop_ms))[:5]

    source.fetch = short  # type: ignore[method-assign]
    loaded = await feed_of(source).load("BTCUSDT", START, minutes(60), gaps="fill", dirty="repair")
    assert loaded.repairs == {"not_finite": 30}
    assert loaded.candles[40:] == held[40:]


@pytest.mark.parametrize("dirty", ["refuse", "repair"])
@pytest.mark.parametrize("page", [1000, 60])
async def test_longer_candles_than_promised_are_refused_and_not_cached(
    make_candles: Make, memory_store: Any, dirty: Any, page: int
) -> None:
    """Filled up to minutes, each hour would show its close at its beginning."""
    source = Raw(make_candles(6000).take(np.arange(0, 6000, 60)))
    feed = feed_of(source, memory_store, CC_MAX_CANDLES_PER_REQUEST=page)
    with pytest.raises(UserError, match="BTCUSDT of binance has 1h candles: give 1m candles, longer ones are made"):
        await feed.load("BTCUSDT", START, minutes(6000), gaps="fill", dirty=dirty)
    assert memory_store.rows == {}


async def test_a_function_that_ignores_the_interval_is_refused_in_a_short_frame(make_candles: Make) -> None:
    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> CandleSeries:
        hours = make_candles(60 * limit, since_ms // MINUTE_MS * MINUTE_MS)
        return hours.take(np.arange(0, len(hours), 60))

    with pytest.raises(UserError, match="has 1h candles"):
        await feed_of(sources.function(get_candles)).load("BTCUSDT", START, minutes(90), gaps="fill", dirty="repair")


async def test_a_file_says_where_its_bad_row_stands(make_candles: Make, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    rows = [f"{minutes(at)},1,1,1,{'' if at == 7 else 1},1" for at in range(10)]
    path.write_text("\n".join(["time,o,h,l,c,v", *rows]))
    feed = feed_of(sources.csv(path))
    with pytest.raises(UserError, match=r"x\.csv, line 9: 'c' is empty: give a finite number, or have bad rows repa"):
        await feed.load("BTCUSDT", START, minutes(10))
    loaded = await feed.load("BTCUSDT", START, minutes(10), gaps="fill", dirty="repair")
    assert (loaded.filled, loaded.repairs) == (1, {"not_finite": 1})
