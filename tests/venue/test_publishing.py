"""Candles that are published badly on purpose, as bots and ccxt read them."""

from __future__ import annotations

from typing import Any

import ccxt.async_support as ccxt_library
import numpy as np
import pytest
from tests.venue.conftest import START, Serve, advance

from backtest_kit.errors import RetryLater, UserError
from backtest_kit.market import sources
from backtest_kit.market.fetch import CandleFeed
from backtest_kit.market.sources import CandleSource
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import DAY_MS, MINUTE_MS
from backtest_kit.settings import Settings
from backtest_kit.venue.client import ccxt_options, connect
from backtest_kit.venue.publishing import GARBLES, LOST, Publishing, Row, plain_rows

BAD = Publishing(seed=3, missing=0.1, garbled=0.4, late=0.1, revised=0.1)


def known(publishing: Publishing, candles: CandleSeries, now_ms: int) -> list[Row]:
    return [row for row in (publishing.known(each, now_ms) for each in plain_rows(candles)) if row is not None]


@pytest.mark.parametrize("through", ["venue", "ccxt"])
async def test_what_can_be_known_is_what_a_feed_makes_of_it(serve: Serve, through: str) -> None:
    server = await serve(publishing=BAD)
    advance(server, 300)
    client: Any = None
    source: CandleSource = connect(server.url).source()
    if through == "ccxt":
        client = ccxt_library.binance({**ccxt_options(server.url, ccxt_library.binance), "enableRateLimit": False})
        source = sources.ccxt(client)
        await source.server_time_ms()
    now_ms = START + 300 * MINUTE_MS
    feed = CandleFeed("venue", source, None, Settings(CC_GET_CANDLES_RETRY_COUNT=1), lambda: now_ms)
    try:
        loaded = await feed.load("BTCUSDT", START + 2 * MINUTE_MS, START + 290 * MINUTE_MS, gaps="fill", dirty="repair")
    finally:
        if client is not None:
            await client.close()
    whole = await sources.synthetic(7).fetch("BTCUSDT", "1m", START + 2 * MINUTE_MS, START + 290 * MINUTE_MS)
    expected = CandleSeries(*zip(*known(BAD, whole, now_ms), strict=True))
    assert loaded.real is not None
    assert loaded.candles.take(loaded.real) == expected
    assert loaded.filled > 40
    assert set(loaded.repairs) >= {"moved", "repeated", "conflicting", "not_finite", "price", "range"}
    assert ("unsorted" in loaded.repairs) == (through == "venue"), "ccxt sorts by itself"


async def test_an_outage_serves_nothing_and_trades_on(serve: Serve) -> None:
    publishing = Publishing(seed=5, outages=1.0, outage_minutes=90)
    first_ms, end_ms = publishing.outage(START)
    assert START <= first_ms < end_ms <= START + DAY_MS // 4
    server = await serve(publishing=publishing)
    source = connect(server.url).source()
    for now_ms, is_down in ((first_ms - 1, False), (first_ms, True), (end_ms - 1, True), (end_ms, False)):
        server.venue.clock.advance_to(now_ms)  # type: ignore[attr-defined]
        if is_down:
            with pytest.raises(RetryLater, match="no candles are served until"):
                await source.fetch("BTCUSDT", "1m", START - DAY_MS, START)
            async with server.venue.at_now():
                assert server.venue.exchanges["spot"].prices["BTCUSDT"] > 0
        else:
            assert len(await source.fetch("BTCUSDT", "1m", START - DAY_MS, START)) == 1440


def test_a_late_candle_comes_and_a_revised_one_is_put_right() -> None:
    whole = CandleSeries(START + np.arange(2000) * MINUTE_MS, *np.full((5, 2000), 100.0))
    publishing = Publishing(seed=1, late=0.2, late_minutes=3, revised=0.2, garbled=0.2, garbled_minutes=2)
    for row in plain_rows(whole):
        fate, garble = publishing.fate(int(row[0] or 0))
        seen = [publishing.known(row, int(row[0] or 0) + at * MINUTE_MS) for at in range(1, 6)]
        assert seen[-1] == row
        if fate == "late" or (fate == "garbled" and garble in LOST):
            assert seen[0] is None
        elif fate == "revised":
            assert seen[0] is not None
            assert seen[0][4] == pytest.approx(100.2)
            assert seen[2] == row
        else:
            assert seen == [row] * 5
    fates = [publishing.fate(int(at)) for at in whole.timestamp]
    assert fates == [publishing.fate(int(at)) for at in whole.timestamp], "the same each time"
    assert {garble for fate, garble in fates if fate == "garbled"} == set(GARBLES)


def test_it_is_read_from_a_text() -> None:
    assert Publishing.parse("seed=3,missing=0.05") == Publishing(seed=3, missing=0.05)
    for text in ("gone=1", "missing=x", "missing=0.8,late=0.3", "late_minutes=0", "outage_minutes=361", "outages=2"):
        with pytest.raises(UserError, match="its fields are seed, missing"):
            Publishing.parse(text)
