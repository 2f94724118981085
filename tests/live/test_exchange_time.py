"""What time it is at a venue: asked now and then, shared, and told of where the machine's clock is wrong."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from backtest_kit.errors import RetryLater
from backtest_kit.market.clock import SteppedClock, SystemClock
from backtest_kit.market.sources.base import CandleSource
from backtest_kit.model.candle import CandleSeries
from backtest_kit.run.live import exchange_time
from backtest_kit.run.live.exchange_time import VenueTime

START = 1_704_067_200_000


class Server(CandleSource):
    def __init__(self, ahead_ms: int | None = 0) -> None:
        self.ahead_ms = ahead_ms
        self.asked = 0
        self.error: Exception | None = None
        self.queued_s: list[float] = []
        """How long the next requests wait before the time is read."""

    async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        return CandleSeries.empty()

    async def server_time_ms(self) -> int | None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        await asyncio.sleep(self.queued_s.pop(0) if self.queued_s else 0)
        return None if self.ahead_ms is None else int(time.time() * 1000) + self.ahead_ms


@pytest.mark.parametrize(("ahead_ms", "words"), [(90_000, "behind"), (-90_000, "ahead of"), (300, "")])
async def test_a_wrong_clock_is_told_of_once_and_not_gone_by(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, ahead_ms: int, words: str
) -> None:
    monkeypatch.setattr(exchange_time, "_EVERY_S", 0.0)
    server, clock = Server(ahead_ms), SystemClock()
    there = VenueTime("binance", server, clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await there.measure()
    assert there.drift_ms == pytest.approx(ahead_ms, abs=200)
    assert clock.now_ms() == pytest.approx(time.time() * 1000 + (ahead_ms if words else 0), abs=900)
    assert [f"{words} that of binance" in record.message for record in caplog.records] == ([True] if words else [])


async def test_those_who_share_it_ask_once_in_a_while() -> None:
    server = Server()
    there = VenueTime("binance", server, SystemClock())
    for _ in range(50):
        await there.measure()
    await there.measure(after_jump=True)
    assert server.asked == 1


@pytest.mark.parametrize("error", [RetryLater("away"), KeyError("serverTime"), TypeError("not subscriptable")])
async def test_a_venue_that_is_away_or_tells_nothing_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(exchange_time, "_EVERY_S", 0.0)
    server = Server(5_000)
    there = VenueTime("binance", server, SystemClock())
    await there.measure()
    known = there.drift_ms
    server.error = error
    await there.measure()
    server.error, server.ahead_ms = None, None
    await there.measure()
    assert server.asked == 3
    assert there.drift_ms == known


async def test_an_answer_that_took_too_long_is_no_measurement(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Credited for half of a request that waited, the run would act before the market is there."""
    monkeypatch.setattr(exchange_time, "_EVERY_S", 0.0)
    monkeypatch.setattr(exchange_time, "_SLOW_S", 0.2)
    server, clock = Server(5_000), SystemClock()
    there = VenueTime("binance", server, clock)
    server.queued_s = [0.3] * 3
    with caplog.at_level(logging.WARNING):
        await there.measure()
    assert there.drift_ms is None
    assert clock.now_ms() == pytest.approx(time.time() * 1000, abs=900)
    assert "the time of binance is unknown: it took more than 0.2 s to answer" in caplog.text
    server.queued_s = [0.3]
    await there.measure()
    assert server.asked == 5
    assert there.drift_ms == pytest.approx(5_000, abs=100)


async def test_a_time_that_is_not_the_machines_is_compared_alone() -> None:
    clock = SteppedClock(int(time.time() * 1000) - 60_000)
    there = VenueTime("sim", Server(), clock)
    before = clock.now_ms()
    await there.measure()
    assert there.drift_ms == pytest.approx(60_000, abs=1000)
    assert clock.now_ms() == before
