"""Candles kept in the process: right whatever is asked in whatever order, asked for once, and bounded."""

from __future__ import annotations

import asyncio

import numpy as np
from hypothesis import given, strategies as st

from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.candle_cache import CandleCache
from backtest_kit.persist.store import SeriesKey

MINUTE = 60_000
BTC, ETH = SeriesKey("binance", "BTCUSDT", "1m"), SeriesKey("binance", "ETHUSDT", "1m")


def candles(minutes: list[int]) -> CandleSeries:
    column = np.array(minutes, float)
    return CandleSeries(np.array(minutes, np.int64) * MINUTE, column, column, column, column, column)


class Server:
    """The candles that there are, and what is asked for them."""

    def __init__(self, minutes: list[int]) -> None:
        self.there = candles(minutes)
        self.asked: list[tuple[int, int]] = []

    async def read(self, start_ms: int, stop_ms: int) -> CandleSeries:
        self.asked.append((start_ms // MINUTE, stop_ms // MINUTE))
        return self.there.between(start_ms, stop_ms)


def ask(cache: CandleCache, server: Server, start: int, stop: int, series: SeriesKey = BTC) -> CandleSeries:
    return asyncio.run(cache.read(("", series), start * MINUTE, stop * MINUTE, server.read))


def test_a_range_is_read_once_and_its_end_alone_as_time_goes_on() -> None:
    cache, server = CandleCache(1_000), Server(list(range(200)))
    for stop in (100, 100, 101, 102):
        assert ask(cache, server, 0, stop) == server.there[:stop]
    assert ask(cache, server, 50, 60) == server.there[50:60]
    assert server.asked == [(0, 100), (100, 101), (101, 102)]


def test_a_look_before_the_range_reads_what_is_missing_alone() -> None:
    """A strategy that looks back before its frame must not drive the frame out, nor the frame what it looked at."""
    cache, server = CandleCache(10_000), Server(list(range(2_000)))
    ask(cache, server, 500, 1_940)
    for now in range(500, 560):
        assert ask(cache, server, now - 300, now) == server.there[now - 300 : now]
        assert ask(cache, server, 500, 1_940) == server.there[500:1_940]
    assert server.asked == [(500, 1_940), (200, 500)]


def test_spans_apart_are_kept_apart_until_what_lies_between_is_read() -> None:
    cache, server = CandleCache(10_000), Server(list(range(500)))
    for _ in range(2):
        for start, stop in ((0, 100), (200, 300), (400, 450)):
            assert ask(cache, server, start, stop) == server.there[start:stop]
    assert ask(cache, server, 50, 250) == server.there[50:250]
    assert ask(cache, server, 0, 300) == server.there[:300]
    assert server.asked == [(0, 100), (200, 300), (400, 450), (100, 200)]
    assert ask(cache, server, 0, 460) == server.there[:460]
    assert server.asked[4:] == [(300, 460)]
    assert cache._count == 460


def test_a_hole_before_what_is_kept_does_not_drive_it_out() -> None:
    cache, server = CandleCache(10_000), Server(list(range(100, 500)))
    ask(cache, server, 100, 500)
    for _ in range(2):
        assert ask(cache, server, 0, 300) == server.there[:200]
    assert server.asked == [(100, 500), (0, 100), (0, 100)]


def test_what_is_missing_is_asked_for_again_until_it_is_there() -> None:
    cache, server = CandleCache(1_000), Server([0, 1, 3])
    assert len(ask(cache, server, 0, 4)) == 3
    server.there = candles([0, 1, 2, 3])
    assert ask(cache, server, 0, 4) == server.there
    assert ask(cache, server, 0, 4) == server.there
    assert server.asked == [(0, 4), (0, 4)]


def test_no_more_is_kept_than_allowed_and_what_was_asked_for_last_stays() -> None:
    cache, server = CandleCache(100), Server(list(range(500)))
    for series in (BTC, ETH):
        ask(cache, server, 0, 40, series)
    ask(cache, server, 0, 40, BTC)
    ask(cache, server, 0, 40, SeriesKey("binance", "SOLUSDT", "1m"))  # drives out ETH
    ask(cache, server, 0, 400, BTC)  # too long to be kept
    server.asked.clear()
    ask(cache, server, 0, 40, BTC)
    ask(cache, server, 0, 40, ETH)
    assert server.asked == [(0, 40)]
    assert cache._count <= 100


def test_nothing_is_kept_of_a_namespace_that_is_forgotten_or_where_nothing_may_be() -> None:
    cache, nothing, server = CandleCache(1_000), CandleCache(0), Server(list(range(10)))
    for name in ("run", "run/inner", "runner"):
        asyncio.run(cache.read((name, BTC), 0, 10 * MINUTE, server.read))
    cache.forget("run")
    server.asked.clear()
    for name in ("run", "run/inner", "runner"):
        asyncio.run(cache.read((name, BTC), 0, 10 * MINUTE, server.read))
    assert len(server.asked) == 2
    server.asked.clear()
    for _ in range(2):
        ask(nothing, server, 0, 10)
    assert len(server.asked) == 2


@given(
    st.sets(st.integers(0, 30)),
    st.lists(st.tuples(st.integers(0, 32), st.integers(0, 32), st.sets(st.integers(0, 30), max_size=4)), max_size=12),
)
def test_every_answer_is_that_of_the_server(there: set[int], questions: list[tuple[int, int, set[int]]]) -> None:
    cache, server = CandleCache(40), Server(sorted(there))
    for start, stop, news in questions:
        server.there = candles(sorted({*map(int, server.there.timestamp // MINUTE), *news}))
        assert ask(cache, server, start, max(start, stop)) == server.there.between(start * MINUTE, stop * MINUTE)
