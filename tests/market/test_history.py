from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from backtest_kit.errors import LookAhead, UserError
from backtest_kit.market import sources
from backtest_kit.market.fetch import CandleFeed
from backtest_kit.market.history import History
from backtest_kit.market.price import resample, vwap
from backtest_kit.market.sources import CandleSource
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.model.interval import CANDLE_INTERVALS, DAY_MS, INTERVAL_MS, MINUTE_MS
from backtest_kit.settings import Settings

START = 1_640_995_200_000
Make = Callable[..., CandleSeries]


def feed_of(source: CandleSource) -> CandleFeed:
    return CandleFeed("binance", source, None, Settings(), lambda: START + 365 * DAY_MS)


def minutes(count: int) -> int:
    return START + count * MINUTE_MS


def index_at(history: History, when_ms: int) -> int:
    """Of the last candle that has closed at a moment."""
    return (when_ms - MINUTE_MS - history.first_ms) // MINUTE_MS


def price_at(history: History, when_ms: int) -> float:
    return float(history.prices[index_at(history, when_ms)])


async def two_days() -> History:
    return await History.load(feed_of(sources.synthetic()), "BTCUSDT", START, START + 2 * DAY_MS, price_window=5)


async def test_it_holds_the_frame_and_the_lead_of_its_first_price(make_candles: Make, source_of: Any) -> None:
    held = make_candles(200, START - 100 * MINUTE_MS)
    history = await History.load(feed_of(source_of(held)), "BTCUSDT", START, minutes(60), price_window=5)
    assert (history.first_ms, history.stop_ms, history.filled) == (minutes(-5), minutes(60), 0)
    assert history.candles == held[95:160]
    assert index_at(history, START) == 4
    assert price_at(history, START) == vwap(held[95:100], 5)[-1]
    first, stop = index_at(history, START), index_at(history, minutes(61) - MINUTE_MS)
    steps = [price_at(history, minutes(at)) for at in range(61)]
    assert history.prices[first : stop + 1].tolist() == steps, "consecutive steps are a slice"
    for at, price in enumerate(steps):
        assert price == vwap(held[: 100 + at], 5)[-1], "the candles that opened in [t - 5 min, t)"


@pytest.fixture(scope="module")
def shared_history() -> History:
    return asyncio.run(two_days())


@given(
    interval=st.sampled_from(CANDLE_INTERVALS),
    limit=st.integers(1, 40),
    when=st.integers(0, 2 * DAY_MS),
    back=st.none() | st.integers(0, DAY_MS),
)
def test_a_window_never_shows_the_moment_it_is_read_at(
    shared_history: History, interval: str, limit: int, when: int, back: int | None
) -> None:
    when_ms = START + when
    until_ms = None if back is None else when_ms - back
    window = asyncio.run(shared_history.window(interval, limit, when_ms, until_ms=until_ms))
    step_ms = INTERVAL_MS[interval]
    end_ms = (when_ms if until_ms is None else until_ms) // step_ms * step_ms
    assert window.timestamp.tolist() == [end_ms - left * step_ms for left in range(limit, 0, -1)]
    assert window.timestamp[-1] + step_ms <= when_ms, "the last candle has closed"
    minutes_known = shared_history.candles.between(end_ms - limit * step_ms, end_ms)
    assert window == resample(minutes_known, step_ms)


async def test_nothing_in_a_window_leads_past_it() -> None:
    history = await two_days()
    for interval in ("1m", "15m"):
        window = await history.window(interval, 10, START + DAY_MS)
        for name in COLUMNS:
            column = getattr(window, name)
            assert not np.shares_memory(column, getattr(history.candles, name))
            assert column.base is None or column.base.size == 10
            with pytest.raises(ValueError, match="read-only"):
                column[0] = 0


async def test_a_later_until_is_a_look_ahead() -> None:
    history = await two_days()
    with pytest.raises(LookAhead, match="candles until 2022-01-02T00:01Z were requested at 2022-01-02T00:00Z"):
        await history.window("1m", 5, START + DAY_MS, until_ms=START + DAY_MS + MINUTE_MS)
    with pytest.raises(LookAhead, match="2022-01-03T00:00Z is the last known"):
        await history.window("1m", 5, START + 2 * DAY_MS + MINUTE_MS)


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "3", None])
async def test_a_limit_must_be_a_count(limit: Any) -> None:
    with pytest.raises(UserError, match=r"limit is .*: give the number of candles"):
        await (await two_days()).window("1m", limit, START + DAY_MS)


@pytest.mark.parametrize("interval", ["7m", "12h", "", None])
async def test_an_interval_must_be_known(interval: Any) -> None:
    with pytest.raises(UserError, match="use one of 1m, 3m"):
        await (await two_days()).window(interval, 3, START + DAY_MS)


async def test_older_candles_are_fetched_and_the_indices_follow(make_candles: Make, source_of: Any) -> None:
    held = make_candles(6000, START - 5000 * MINUTE_MS)
    source = source_of(held)
    history = await History.load(feed_of(source), "BTCUSDT", START, minutes(600), price_window=5)
    before = {at: price_at(history, minutes(at)) for at in range(600)}
    old_candles, old_first = history.candles, history.first_ms
    source.asked.clear()
    window = await history.window("15m", 50, minutes(15))
    assert window == resample(held.between(minutes(15 - 750), minutes(15)), 15 * MINUTE_MS)
    assert history.first_ms <= minutes(-735)
    assert old_first == int(old_candles.timestamp[0]), "columns already taken stay as they are"
    assert history.candles.timestamp[index_at(history, minutes(100))] == minutes(99)
    assert {at: price_at(history, minutes(at)) for at in range(600)} == before
    assert np.isnan(history.prices[:4]).all()
    assert not np.isnan(history.prices[4:]).any()
    asked = len(source.asked)
    for at in range(16, 200):
        await history.window("15m", 50, minutes(at))
    assert len(source.asked) == asked, "one generous step serves the reads that follow"


async def test_concurrent_reads_extend_the_history_once(make_candles: Make, source_of: Any) -> None:
    source = source_of(make_candles(6000, START - 5000 * MINUTE_MS))
    source.pause = 0.001
    history = await History.load(feed_of(source), "BTCUSDT", START, minutes(600), price_window=5)
    source.asked.clear()
    windows = await asyncio.gather(*(history.window("5m", 12 + at, minutes(at)) for at in range(40)))
    assert [len(window) for window in windows] == [12 + at for at in range(40)]
    asked = [at for low, high in source.asked for at in range(low, high, MINUTE_MS)]
    assert len(asked) == len(set(asked))
    assert np.array_equal(np.diff(history.candles.timestamp), np.full(len(history.candles) - 1, MINUTE_MS))


@pytest.mark.parametrize("hole", [False, True], ids=["the data begin", "a hole"])
async def test_data_that_do_not_reach_back_name_a_frame_that_works(
    make_candles: Make, source_of: Any, hole: bool
) -> None:
    held = make_candles(2000, minutes(-55))
    if hole:
        held = CandleSeries.concat((make_candles(100, minutes(-200)), held))
    source = source_of(held)
    history = await History.load(feed_of(source), "BTCUSDT", START, minutes(600), price_window=5)
    with pytest.raises(UserError) as caught:
        await history.window("15m", 50, START)
    assert str(caught.value) == (
        "not enough history: 50 x 15m candles of BTCUSDT before 2022-01-01T00:00Z were requested, but continuous data "
        "starts at 2021-12-31T23:05Z: start the frame at 2022-01-01T11:45Z or request fewer"
    )
    asked = len(source.asked)
    with pytest.raises(UserError):
        await history.window("15m", 50, minutes(15))
    assert len(source.asked) == asked, "what is known to be absent is not asked for again"
    assert len(await history.window("15m", 3, START)) == 3
    better = await History.load(feed_of(source), "BTCUSDT", minutes(705), minutes(800), price_window=5)
    assert len(await better.window("15m", 50, minutes(705))) == 50, "the frame that was named works"


async def test_a_window_longer_than_time_is_refused_without_a_request(make_candles: Make, source_of: Any) -> None:
    source = source_of(make_candles(700, minutes(-55)))
    history = await History.load(feed_of(source), "BTCUSDT", START, minutes(600), price_window=5)
    asked = len(source.asked)
    with pytest.raises(UserError, match="or request fewer"):
        await history.window("1d", 10**6, minutes(600))
    assert len(source.asked) == asked


async def test_gaps_are_filled_in_older_candles_too(make_candles: Make, source_of: Any) -> None:
    whole = make_candles(700, minutes(-100))
    source = source_of(whole.take(np.r_[0:50, 60:200, 210:700]))
    feed = feed_of(source)
    history = await History.load(feed, "BTCUSDT", START, minutes(500), gaps="fill", price_window=5)
    assert history.filled == 10
    window = await history.window("1m", 100, START)
    assert window.volume[50:60].tolist() == [0.0] * 10
    with pytest.raises(UserError, match="10 minutes of BTCUSDT are missing"):
        await History.load(feed, "BTCUSDT", START, minutes(500), price_window=5)


async def test_a_live_run_appends_minute_by_minute(make_candles: Make, source_of: Any) -> None:
    held = make_candles(200)
    feed = feed_of(source_of(held))
    grown = await History.load(feed, "BTCUSDT", minutes(10), minutes(20), price_window=5)
    for at in range(21, 60):
        await grown.extend(minutes(at))
    await grown.extend(minutes(30))
    whole = await History.load(feed, "BTCUSDT", minutes(10), minutes(59), price_window=5)
    assert grown.candles == whole.candles
    assert np.array_equal(grown.prices, whole.prices, equal_nan=True)
    assert grown.stop_ms == minutes(59)


@pytest.mark.parametrize("price_window", [1, 2, 5, 40])
@pytest.mark.parametrize("older", [1, 4, 100])
@pytest.mark.parametrize("newer", [1, 4, 100])
async def test_prices_do_not_depend_on_how_the_candles_came(
    make_candles: Make, source_of: Any, price_window: int, older: int, newer: int
) -> None:
    held = make_candles(older + 60 + newer)
    history = await History.load(
        feed_of(source_of(held)),
        "BTCUSDT",
        minutes(older + price_window),
        minutes(older + 60),
        price_window=price_window,
    )
    assert len(history.candles) == 60
    await history.extend(minutes(older + 60 + newer))
    await history.window("1m", older + 1, minutes(older + 1))
    assert history.candles == held
    assert np.array_equal(history.prices, vwap(held, price_window), equal_nan=True)


async def test_a_filled_minute_whose_candle_comes_late_is_replaced_and_a_revised_one_is_not(
    make_candles: Make, source_of: Any
) -> None:
    whole, late = make_candles(40), 20
    source = source_of(whole.take(np.r_[0:late, late + 1 : 22]))
    history = await History.load(feed_of(source), "BTCUSDT", minutes(10), minutes(19), gaps="fill", price_window=5)
    await history.extend(minutes(22))
    assert (history.filled, history.candles.volume[late - 5]) == (1, 0.0)
    assert history.real is not None
    assert np.flatnonzero(~history.real).tolist() == [late - 5]
    columns = {name: column.copy() for name, column in whole.columns().items()}
    columns["close"][21] *= 1.0001
    source.held = CandleSeries(**columns)[:30]
    await history.extend(minutes(23))
    assert history.filled == 0
    assert history.candles == whole[5:23]
    assert history.prices.tolist()[4:] == vwap(whole[5:23], 5).tolist()[4:]


async def test_a_hole_is_asked_for_again_for_some_minutes_only(make_candles: Make, source_of: Any) -> None:
    whole = make_candles(60)
    source = source_of(whole.take(np.r_[0:20, 23:60]))
    history = await History.load(feed_of(source), "BTCUSDT", minutes(10), minutes(20), gaps="fill", price_window=5)
    for at in range(24, 40):
        source.asked.clear()
        await history.extend(minutes(at))
    assert source.asked == [(minutes(38), minutes(39))]
    assert history.filled == 3
    source.held = whole
    await history.extend(minutes(45))
    assert history.filled == 3, "what a strategy has read for long does not change under it"


async def test_an_end_that_is_filled_is_a_guess_until_the_next_minute(make_candles: Make, source_of: Any) -> None:
    whole = make_candles(40)
    source = source_of(whole[:20])
    history = await History.load(feed_of(source), "BTCUSDT", minutes(10), minutes(20), gaps="fill", price_window=5)
    await history.extend(minutes(22), edges="fill")
    assert (history.stop_ms, history.filled) == (minutes(22), 2)
    source.held = whole
    await history.extend(minutes(23), edges="fill")
    assert history.filled == 0
    assert history.candles == whole[5:23]


async def test_an_empty_page_on_the_way_back_is_asked_for_again(make_candles: Make, source_of: Any) -> None:
    whole = make_candles(2000)
    source = source_of(whole.take(np.r_[0:900, 1400:2000]))
    history = await History.load(feed_of(source), "BTCUSDT", minutes(1900), minutes(1910), gaps="fill", price_window=5)
    window = await history.window("1m", 1200, minutes(1910))
    assert np.count_nonzero(window.volume == 0) == history.filled == 500
    source.held = whole
    await history.extend(minutes(1911))
    assert history.filled == 0
    assert history.real is None
    assert history.candles == (seen := whole[1911 - len(history.candles) : 1911])
    assert np.array_equal(history.prices, vwap(seen, 5), equal_nan=True)
    source.asked.clear()
    await history.extend(minutes(1912))
    assert source.asked == [(minutes(1911), minutes(1912))]
