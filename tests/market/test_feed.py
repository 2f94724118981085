"""Candles are fetched once, in pages, and then served from the store."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np
import pytest
from tests.market.feeds import NOW, START, Make, feed_of, minutes

from backtest_kit.errors import Damaged, RetryLater, UserError
from backtest_kit.market import sources
from backtest_kit.market.fetch import CandleFeed
from backtest_kit.market.sources import CandleSource
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.settings import Settings


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
