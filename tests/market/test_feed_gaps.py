"""Missing minutes, inside of a range and at its edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.market.feeds import START, Make, feed_of, minutes

from backtest_kit.errors import RetryLater, UserError
from backtest_kit.market import sources
from backtest_kit.market.integrity import check_candles, find_gaps
from backtest_kit.market.sources import CandleSource
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import DAY_MS, MINUTE_MS
from backtest_kit.settings import Settings


async def test_missing_minutes_are_an_error_that_names_the_way_out(make_candles: Make, source_of: Any) -> None:
    source = source_of(make_candles(60).take(np.r_[0:20, 25:60]))
    with pytest.raises(UserError) as caught:
        await feed_of(source).load("BTCUSDT", START, minutes(60))
    assert "5 minutes of BTCUSDT are missing in 1 place: 2022-01-01T00:20Z .. 2022-01-01T00:24Z" in str(caught.value)
    assert 'gaps="fill"' in str(caught.value)
    assert "--gaps fill" in str(caught.value)


async def test_missing_minutes_can_be_filled(make_candles: Make, source_of: Any, memory_store: Any) -> None:
    whole = make_candles(60)
    source = source_of(whole.take(np.r_[0:20, 25:60]))
    loaded = await feed_of(source, memory_store).load("BTCUSDT", START, minutes(60), gaps="fill")
    assert loaded.filled == 5
    assert loaded.candles[:20] == whole[:20]
    assert loaded.candles[25:] == whole[25:]
    assert loaded.candles.open[20:25].tolist() == [whole.close[19]] * 5
    assert loaded.candles.volume[20:25].tolist() == [0.0] * 5
    (rows,) = memory_store.rows.values()
    assert len(rows) == 55, "a filled candle is never stored"


@pytest.mark.parametrize("gaps", ["error", "fill"])
async def test_a_frame_outside_the_data_names_one_that_works(make_candles: Make, source_of: Any, gaps: Any) -> None:
    feed = feed_of(source_of(make_candles(60)))
    with pytest.raises(UserError) as caught:
        await feed.load("BTCUSDT", minutes(-10), minutes(30), gaps=gaps)
    assert str(caught.value) == (
        "frame outside the data: BTCUSDT was requested from 2021-12-31T23:50Z to 2022-01-01T00:30Z, but binance has "
        "2022-01-01T00:00Z to 2022-01-01T01:00Z: use start_date='2022-01-01T00:00Z', end_date='2022-01-01T00:30Z'"
    )
    with pytest.raises(UserError, match="use start_date='2022-01-01T00:40Z', end_date='2022-01-01T01:00Z'"):
        await feed.load("BTCUSDT", minutes(40), minutes(70), gaps=gaps)
    with pytest.raises(UserError, match="use start_date='2022-01-01T00:00Z', end_date='2022-01-01T01:00Z'"):
        await feed.load("BTCUSDT", minutes(100), minutes(200), gaps=gaps)


async def test_the_frame_that_is_named_leaves_room_for_the_lead(make_candles: Make, source_of: Any) -> None:
    feed = feed_of(source_of(make_candles(60)))
    lead = 5 * MINUTE_MS
    with pytest.raises(UserError) as caught:
        await feed.load("BTCUSDT", START, minutes(60), lead_ms=lead)
    assert "(and 5 minutes before it, for the first price)" in str(caught.value)
    assert "use start_date='2022-01-01T00:05Z', end_date='2022-01-01T01:00Z'" in str(caught.value)
    assert (await feed.load("BTCUSDT", minutes(5), minutes(60), lead_ms=lead)).candles == make_candles(60)
    with pytest.raises(UserError, match="has only 2022-01-01T00:00Z to 2022-01-01T00:04Z: get more data"):
        await feed_of(source_of(make_candles(4))).load("BTCUSDT", START, minutes(4), lead_ms=lead)


async def test_a_source_without_any_candle_or_range_says_so() -> None:
    class Nothing(CandleSource):
        async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
            return CandleSeries.empty()

    with pytest.raises(UserError, match="binance has no candle there"):
        await feed_of(Nothing()).load("BTCUSDT", START, minutes(60))


async def test_a_candle_that_is_not_published_yet_is_a_matter_of_time(make_candles: Make, source_of: Any) -> None:
    source = source_of(make_candles(60))

    async def unknown(symbol: str) -> None:
        return None

    source.range = unknown
    with pytest.raises(RetryLater, match="has not published the candle of 2022-01-01T01:00Z yet"):
        await feed_of(source, now=minutes(61) + 500).load("BTCUSDT", minutes(60), minutes(61))


async def test_years_before_a_listing_are_not_asked_for_page_by_page(make_candles: Make, source_of: Any) -> None:
    source = source_of(make_candles(60))
    with pytest.raises(UserError, match="frame outside the data"):
        await feed_of(source).load("BTCUSDT", START - 3000 * DAY_MS, minutes(60))
    assert len(source.asked) == 2


async def test_available_is_the_unbroken_end(make_candles: Make, source_of: Any) -> None:
    whole = make_candles(60)
    feed = feed_of(source_of(whole.take(np.r_[10:20, 25:60])))
    assert (await feed.available("BTCUSDT", START, minutes(60))).candles == whole[25:]
    assert (await feed.available("BTCUSDT", minutes(30), minutes(40))).candles == whole[30:40]
    assert (await feed.available("BTCUSDT", START, minutes(20))).candles == whole[10:20]
    assert len((await feed.available("BTCUSDT", START, minutes(24))).candles) == 0
    assert len((await feed.available("BTCUSDT", START - DAY_MS, START)).candles) == 0
    filled = (await feed.available("BTCUSDT", START, minutes(60), gaps="fill")).candles
    assert filled.timestamp[0] == minutes(10)
    assert len(filled) == 50


async def test_real_candles_are_loaded_or_their_gaps_named(real_files: list[Path]) -> None:
    outcomes = set()
    for path in real_files:
        source = sources.csv(path)
        bounds = await source.range("BTCUSDT")
        assert bounds is not None
        held = await source.fetch("BTCUSDT", "1m", *bounds)
        check_candles(held, symbol=path.name, settings=Settings())
        missing = find_gaps(held, *bounds)
        assert missing.total == (bounds[1] - bounds[0]) // MINUTE_MS - len(held)
        feed = feed_of(source, now=bounds[1])
        filled = await feed.load("BTCUSDT", *bounds, gaps="fill")
        assert filled.filled == missing.total
        assert not find_gaps(filled.candles, *bounds)
        assert filled.candles.take(np.isin(filled.candles.timestamp, held.timestamp)) == held
        outcomes.add(bool(missing))
        if missing:
            with pytest.raises(UserError, match="of BTCUSDT are missing in"):
                await feed.load("BTCUSDT", *bounds)
        else:
            assert (await feed.load("BTCUSDT", *bounds)).candles == held
    assert outcomes == {True, False}, "the files hold both whole and broken series"


async def test_a_missing_minute_at_an_edge_is_a_gap_like_any_other(
    make_candles: Make, source_of: Any, memory_store: Any
) -> None:
    whole = make_candles(400)
    held = whole.take(np.r_[0:95, 96:299, 300:400])
    for told in (True, False):
        source = source_of(held)
        if not told:
            source.range = unknown_range
        feed = feed_of(source, memory_store, CC_MAX_CANDLES_PER_REQUEST=50)
        for first, last in ((95, 200), (50, 300), (95, 300), (299, 300)):
            with pytest.raises(UserError, match=r"missing in [12] place.*--gaps fill"):
                await feed.load("BTCUSDT", minutes(first), minutes(last))
            loaded = await feed.load("BTCUSDT", minutes(first), minutes(last), gaps="fill")
            assert loaded.real is not None
            assert loaded.filled == np.count_nonzero(~loaded.real)
            assert loaded.candles.take(loaded.real) == held.between(minutes(first), minutes(last))
            assert loaded.candles.close[~loaded.real].tolist() == [
                whole.close[at - 1] for at in (95, 299) if first <= at < last
            ]
        memory_store.rows.clear()


async def test_the_candle_before_a_long_hole_is_found(make_candles: Make, source_of: Any) -> None:
    """However many pages it is away."""
    held = make_candles(9000).take(np.r_[0:20, 8000:9000])
    source = source_of(held)
    loaded = await feed_of(source).load("BTCUSDT", minutes(7990), minutes(8100), gaps="fill")
    assert loaded.filled == 10
    assert loaded.candles.close[:10].tolist() == [held.close[19]] * 10
    source.range = unknown_range
    assert (await feed_of(source).load("BTCUSDT", minutes(7990), minutes(8100), gaps="fill")).filled == 10
    deep = await feed_of(source).available("BTCUSDT", minutes(10), minutes(8010), gaps="fill")
    assert (int(deep.candles.timestamp[0]), deep.filled) == (minutes(10), 7980)
    deep = await feed_of(source).available("BTCUSDT", minutes(5000), minutes(8010), gaps="fill")
    assert (int(deep.candles.timestamp[0]), deep.filled) == (minutes(5000), 3000)


async def test_the_range_that_an_error_names_is_true(make_candles: Make, source_of: Any) -> None:
    """It begins and ends where the data do, whatever is missing at the edge of the frame."""
    source = source_of(make_candles(400).take(np.r_[0:299, 300:400]))
    with pytest.raises(UserError, match="binance has 2022-01-01T00:00Z to 2022-01-01T06:40Z: use start_date"):
        await feed_of(source).load("BTCUSDT", minutes(-10), minutes(300))
    with pytest.raises(UserError, match="end_date='2022-01-01T06:40Z'"):
        await feed_of(source).load("BTCUSDT", minutes(299), minutes(420))


async def unknown_range(symbol: str) -> None:
    return None


async def test_a_live_range_waits_for_its_end_and_for_a_first_candle(make_candles: Make, source_of: Any) -> None:
    source = source_of(make_candles(60).take(np.r_[10:30, 31:59]))
    feed = feed_of(source, now=minutes(60))
    with pytest.raises(RetryLater, match="has not published the candle of 2022-01-01T00:59Z yet"):
        await feed.load("BTCUSDT", minutes(59), minutes(60), gaps="fill", edges="wait")
    with pytest.raises(RetryLater, match="no candle before 2022-01-01T00:06Z yet"):
        await feed.load("BTCUSDT", minutes(5), minutes(59), gaps="fill", edges="wait")
    assert (await feed.load("BTCUSDT", minutes(30), minutes(59), gaps="fill", edges="wait")).filled == 1
    loaded = await feed.load("BTCUSDT", minutes(58), minutes(60), gaps="fill", edges="fill")
    assert loaded.real is not None
    assert loaded.real.tolist() == [True, False]
