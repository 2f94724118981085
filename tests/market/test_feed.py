from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backtest_kit.errors import Damaged, RetryLater, UserError
from backtest_kit.market import sources
from backtest_kit.market.fetch import CandleFeed
from backtest_kit.market.integrity import check_candles, find_gaps
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


async def test_a_range_is_fetched_in_pages_and_then_served_from_the_store(
    make_candles: Make, source_of: Any, memory_store: Any
) -> None:
    source = source_of(make_candles(3000))
    feed = feed_of(source, memory_store)
    loaded = await feed.load("BTCUSDT", START, minutes(2500))
    assert loaded.candles == source.held[:2500]
    assert loaded.filled == 0
    assert source.asked == [(minutes(0), minutes(1000)), (minutes(1000), minutes(2000)), (minutes(2000), minutes(2500))]
    source.asked.clear()
    assert (await feed.load("BTCUSDT", START, minutes(2500))).candles == loaded.candles
    assert source.asked == []
    assert (await feed.load("BTCUSDT", minutes(2400), minutes(2600))).candles == source.held[2400:2600]
    assert source.asked == [(minutes(2500), minutes(2600))], "only what is missing"


async def test_only_the_missing_middle_is_fetched(make_candles: Make, source_of: Any, memory_store: Any) -> None:
    source = source_of(make_candles(100))
    feed = feed_of(source, memory_store)
    await feed.load("BTCUSDT", minutes(0), minutes(30))
    await feed.load("BTCUSDT", minutes(60), minutes(100))
    source.asked.clear()
    assert (await feed.load("BTCUSDT", minutes(0), minutes(100))).candles == source.held
    assert source.asked == [(minutes(30), minutes(60))]


@pytest.mark.parametrize(("limit", "requests"), [(None, 5), (50, 2), (sources.ANY_RANGE, 1)])
async def test_a_source_may_name_its_own_page(make_candles: Make, source_of: Any, limit: int, requests: int) -> None:
    source = source_of(make_candles(100))
    source.page_limit = limit
    await feed_of(source, CC_MAX_CANDLES_PER_REQUEST=20).load("BTCUSDT", START, minutes(100))
    assert len(source.asked) == requests


async def test_a_source_that_answers_in_smaller_pages_is_asked_on(make_candles: Make, source_of: Any) -> None:
    source = source_of(make_candles(100))

    class Short(CandleSource):
        async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
            page: CandleSeries = await source.fetch(symbol, interval, start_ms, stop_ms)
            return page[:30]

    assert (await feed_of(Short()).load("BTCUSDT", START, minutes(100))).candles == source.held
    assert len(source.asked) == 4


async def test_what_lies_outside_the_answer_asked_for_is_cut_away(make_candles: Make) -> None:
    held = make_candles(100)

    class Generous(CandleSource):
        async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
            return held

    assert (await feed_of(Generous()).load("BTCUSDT", minutes(10), minutes(20))).candles == held[10:20]


async def test_a_failing_source_is_asked_again_and_then_given_up(make_candles: Make, source_of: Any) -> None:
    source = source_of(make_candles(10))
    feed = feed_of(source, CC_GET_CANDLES_RETRY_COUNT=3)
    source.failures = [RetryLater("busy"), OSError("reset")]
    assert len((await feed.load("BTCUSDT", START, minutes(10))).candles) == 10
    assert len(source.asked) == 3

    last = OSError("the third")
    source.failures = [RetryLater("busy"), OSError("reset"), last]
    with pytest.raises(
        RetryLater, match="BTCUSDT from 2022-01-01T00:00Z could not be fetched in 3 attempts: OSError: the third"
    ) as caught:
        await feed.load("BTCUSDT", START, minutes(10))
    assert caught.value.__cause__ is last
    assert len(source.asked) == 6


async def test_the_pause_between_attempts_is_the_setting(make_candles: Make, source_of: Any) -> None:
    source = source_of(make_candles(10))
    source.failures = [RetryLater("busy")]
    began = asyncio.get_running_loop().time()
    await feed_of(source, CC_GET_CANDLES_RETRY_DELAY_MS=50).load("BTCUSDT", START, minutes(10))
    assert asyncio.get_running_loop().time() - began >= 0.05


async def test_what_the_user_must_correct_is_not_tried_again(make_candles: Make, source_of: Any) -> None:
    source = source_of(make_candles(10))
    source.failures = [UserError("no such symbol")]
    with pytest.raises(UserError, match="no such symbol"):
        await feed_of(source).load("BTCUSDT", START, minutes(10))
    assert len(source.asked) == 1


async def test_a_source_must_return_candles() -> None:
    class Wrong(CandleSource):
        async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> Any:
            return [[1, 2, 3]]

    with pytest.raises(UserError, match=r"Wrong\.fetch returned list, not a CandleSeries"):
        await feed_of(Wrong()).load("BTCUSDT", START, minutes(10))


async def test_pages_before_a_failure_are_kept(make_candles: Make, source_of: Any, memory_store: Any) -> None:
    source = source_of(make_candles(3000))
    feed = feed_of(source, memory_store, CC_GET_CANDLES_RETRY_COUNT=1)
    fetch = source.fetch

    async def failing(symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        if start_ms >= minutes(2000):
            raise OSError("cut")
        result: CandleSeries = await fetch(symbol, interval, start_ms, stop_ms)
        return result

    source.fetch = failing
    with pytest.raises(RetryLater):
        await feed.load("BTCUSDT", START, minutes(3000))
    source.fetch = fetch
    source.asked.clear()
    await feed.load("BTCUSDT", START, minutes(3000))
    assert source.asked == [(minutes(2000), minutes(3000))]


async def test_a_refused_page_is_never_stored(make_candles: Make, source_of: Any, memory_store: Any) -> None:
    source = source_of(make_candles(10))
    columns = source.held.columns()
    columns["volume"] = np.full(10, -1.0)
    source.held = CandleSeries(**columns)
    with pytest.raises(UserError, match="BTCUSDT: volume is -1"):
        await feed_of(source, memory_store).load("BTCUSDT", START, minutes(10))
    assert memory_store.rows == {}


async def test_concurrent_loads_never_fetch_a_minute_twice(
    make_candles: Make, source_of: Any, memory_store: Any
) -> None:
    source = source_of(make_candles(500))
    source.pause = 0.005
    feed = feed_of(source, memory_store, CC_MAX_CANDLES_PER_REQUEST=100)
    ranges = [(0, 300), (100, 500), (0, 500), (250, 260)]
    loads = await asyncio.gather(*(feed.load("BTCUSDT", minutes(low), minutes(high)) for low, high in ranges))
    for (low, high), loaded in zip(ranges, loads, strict=True):
        assert loaded.candles == source.held[low:high]
    asked = [at for low, high in source.asked for at in range(low, high, MINUTE_MS)]
    assert len(asked) == len(set(asked)) == 500


async def test_symbols_do_not_wait_for_each_other(make_candles: Make, source_of: Any) -> None:
    held = make_candles(10)
    both = asyncio.Barrier(2)

    class Together(CandleSource):
        async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
            await both.wait()
            return held

    feed = feed_of(Together())
    async with asyncio.timeout(5):
        await asyncio.gather(feed.load("BTCUSDT", START, minutes(10)), feed.load("ETHUSDT", START, minutes(10)))


async def test_a_cancelled_load_leaves_nothing_locked(make_candles: Make, source_of: Any, memory_store: Any) -> None:
    source = source_of(make_candles(10))
    source.pause = 60.0
    feed = feed_of(source, memory_store)
    tasks = [asyncio.create_task(feed.load("BTCUSDT", START, minutes(10))) for _ in range(3)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    assert all(
        isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*tasks, return_exceptions=True)
    )
    source.pause = 0.0
    async with asyncio.timeout(5):
        assert len((await feed.load("BTCUSDT", START, minutes(10))).candles) == 10


def test_a_feed_outlives_its_event_loop(make_candles: Make, source_of: Any, memory_store: Any) -> None:
    source = source_of(make_candles(10))
    feed = feed_of(source, memory_store)

    async def two_at_once() -> None:
        await asyncio.gather(*(feed.load("BTCUSDT", START, minutes(10)) for _ in range(2)))

    asyncio.run(two_at_once())
    memory_store.rows.clear()
    asyncio.run(two_at_once())


async def test_a_candle_that_is_still_open_is_not_stored(make_candles: Make, source_of: Any, memory_store: Any) -> None:
    now = [minutes(10)]
    source = source_of(make_candles(20))

    class Eager(CandleSource):
        """Time passes while it answers, and it answers with all it has."""

        async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
            now[0] = minutes(8) + 1
            return source.held  # type: ignore[no-any-return]

    feed = CandleFeed("binance", Eager(), memory_store, Settings(), lambda: now[0])
    assert len((await feed.load("BTCUSDT", START, minutes(10))).candles) == 10
    (rows,) = memory_store.rows.values()
    assert sorted(rows) == [minutes(at) for at in range(8)]


async def test_a_frame_in_the_future_is_refused(make_candles: Make, source_of: Any) -> None:
    feed = feed_of(source_of(make_candles(20)), now=minutes(10) + 59_999)
    assert len((await feed.load("BTCUSDT", START, minutes(10))).candles) == 10
    with pytest.raises(
        UserError, match="ends at 2022-01-01T00:11Z, which is in the future: end it at 2022-01-01T00:10Z"
    ):
        await feed.load("BTCUSDT", START, minutes(11))


async def test_a_range_must_be_whole_minutes_and_run_forwards(make_candles: Make, source_of: Any) -> None:
    feed = feed_of(source_of(make_candles(20)))
    with pytest.raises(UserError, match="give a whole minute"):
        await feed.load("BTCUSDT", START + 1000, minutes(10))
    with pytest.raises(UserError, match="not after its start"):
        await feed.load("BTCUSDT", minutes(10), minutes(10))
    with pytest.raises(UserError, match="gaps is 'drop': use 'error' or 'fill'"):
        await feed.load("BTCUSDT", START, minutes(10), gaps="drop")  # type: ignore[arg-type]


async def test_a_cache_that_cannot_write_costs_a_warning(
    make_candles: Make, source_of: Any, memory_store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    memory_store.broken = True
    with caplog.at_level(logging.WARNING, "backtest_kit"):
        loaded = await feed_of(source_of(make_candles(10)), memory_store).load("BTCUSDT", START, minutes(10))
    assert len(loaded.candles) == 10
    assert caplog.messages == ["10 candles of binance/BTCUSDT/1m could not be cached: no space left"]


async def test_a_cache_that_is_away_costs_one_request_and_no_more(
    make_candles: Make, source_of: Any, memory_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The minute of a live run is there without its store; a year of them is not downloaded again for that."""
    source = source_of(make_candles(300))
    feed = feed_of(source, memory_store, CC_MAX_CANDLES_PER_REQUEST=100)

    async def away(*_: Any) -> CandleSeries:
        raise RetryLater("the server is away")

    monkeypatch.setattr(memory_store, "read", away)
    assert len((await feed.load("BTCUSDT", START, minutes(100))).candles) == 100
    with pytest.raises(RetryLater, match="the server is away"):
        await feed.load("BTCUSDT", START, minutes(101))
    assert len(source.asked) == 1


async def test_a_cache_that_cannot_be_trusted_is_an_error(
    make_candles: Make, source_of: Any, memory_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def damaged(*_: Any) -> CandleSeries:
        raise Damaged("month 2022-01 is torn")

    monkeypatch.setattr(memory_store, "read", damaged)
    source = source_of(make_candles(10))
    with pytest.raises(Damaged):
        await feed_of(source, memory_store).load("BTCUSDT", START, minutes(10))
    assert not source.asked


async def test_a_live_run_goes_on_without_a_cache_that_cannot_be_trusted(
    make_candles: Make, source_of: Any, memory_store: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """What is damaged waits for a person: an open position cannot, and a look back is longer than one request."""

    async def damaged(*_: Any) -> CandleSeries:
        raise Damaged("month 2022-01 is torn")

    monkeypatch.setattr(memory_store, "read", damaged)
    monkeypatch.setattr(memory_store, "write", damaged)
    source, held = source_of(make_candles(30)), make_candles(30)
    settings = Settings(CC_MAX_CANDLES_PER_REQUEST=10)
    feed = CandleFeed("binance", source, memory_store, settings, lambda: NOW, live=True)
    for _ in range(2):
        assert (await feed.load("BTCUSDT", START, minutes(30))).candles == held
    assert [text.split(":")[0] for text in caplog.messages] == [
        "candles of BTCUSDT are fetched, because their cache cannot be read",
        "30 candles of binance/BTCUSDT/1m could not be cached",
    ]


async def test_sources_that_are_at_hand_are_not_cached(make_candles: Make, source_of: Any, memory_store: Any) -> None:
    source = source_of(make_candles(10))
    source.cached = False
    await feed_of(source, memory_store).load("BTCUSDT", START, minutes(10))
    assert memory_store.rows == {}


async def test_two_seeds_never_share_a_cache(memory_store: Any) -> None:
    one, two = (feed_of(sources.synthetic(seed), memory_store) for seed in (1, 2))
    first = (await one.load("BTCUSDT", START, minutes(10))).candles
    second = (await two.load("BTCUSDT", START, minutes(10))).candles
    assert first != second
    assert (await one.load("BTCUSDT", START, minutes(10))).candles == first


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
