"""The wall clock of a running bot is set, or runs fast: no minute comes twice, and no order."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.live.rig import START, WHERE, Rig

import backtest_kit as bk
from backtest_kit.market.clock import SystemClock, _nap_until as nap_until
from backtest_kit.market.sources import CandleSource
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import MINUTE_MS, floor_ms

SPEED = 600.0
AHEAD_S = 1200
"""Longer than an exchange takes to publish a candle, and two seconds at this speed: a time that is waited for."""


class FastWall(SystemClock):
    """The clock of a machine on which a minute takes a tenth of a second, and whose wall clock can be set."""

    def __init__(self, set_by_s: float = 0.0) -> None:
        self.set_by_s = set_by_s
        self._began_real_s = time.monotonic()
        self._elapsed_s = 0.0
        super().__init__(wall_s=self._wall, monotonic_s=lambda: self._elapsed_s)

    def _wall(self) -> float:
        # Both clocks are read at one moment: at this speed a thread that had to wait between them is a jump.
        self._elapsed_s = (time.monotonic() - self._began_real_s) * SPEED
        return START / 1000 + self._elapsed_s + self.set_by_s

    async def sleep_until(self, when_ms: int) -> None:
        await nap_until(self.now_ms, when_ms, SPEED)


class Bot:
    """A run that holds a position, and the minutes at which it was asked what to do."""

    def __init__(self, tmp_path: Path) -> None:
        self.rig = Rig(tmp_path, bk.FileStore(tmp_path / "store"))
        self.minutes: list[int] = []
        self.rig.strategy["manage"] = self.manage
        self.clock = FastWall()
        self.handle: Any = None

    async def manage(self, ctx: bk.Context) -> None:
        self.minutes.append((ctx.when_ms - START) // MINUTE_MS)
        if len(self.minutes) % 3 == 0 and ctx.position is not None:
            await ctx.position.reduce(percent=5)

    async def asked(self, times: int) -> None:
        """Wait until it was asked so many times more."""
        wanted = len(self.minutes) + times
        async with asyncio.timeout(60):
            while len(self.minutes) < wanted:
                assert not self.handle.done(), self.handle
                await asyncio.sleep(0.005)


@pytest.fixture
async def bot(tmp_path: Path) -> Any:
    bot = Bot(tmp_path)
    bot.handle = bot.rig.kit(bot.clock).live.background("BTCUSDT", **WHERE)
    await bot.asked(4)
    yield bot
    bot.handle.cancel()
    await asyncio.wait({bot.handle.task})
    assert bot.handle.task.cancelled()
    assert all(earlier < later for earlier, later in pairwise(bot.minutes))
    assert len(bot.rig.venue.sent("open")) == 1
    assert set(bot.rig.venue.times_done.values()) == {1}
    assert not bot.rig.of(bk.StrategyFailed, bk.OrderFailed, bk.StoreDegraded)


async def test_an_hour_forward_is_an_hour_that_was_missed(bot: Bot) -> None:
    before = bot.minutes[-1]
    bot.clock.set_by_s += 3600
    await bot.asked(4)
    assert bot.minutes[-1] > before + 60
    (jump,) = bot.rig.of(bk.ClockJumped)
    assert jump.by_ms == pytest.approx(3_600_000, abs=1000)
    assert sum(missed.count for missed in bot.rig.of(bk.MinutesMissed)) >= 55
    assert bot.handle.status.position is not None


async def test_after_a_clock_that_is_set_back_the_minutes_go_on(bot: Bot) -> None:
    """The candles so far are proof of how late it is, and an hour in which nobody watches is too long."""
    before, elapsed_s = bot.minutes[-1], bot.clock._elapsed_s
    bot.clock.set_by_s -= 3600
    while not bot.rig.of(bk.ClockJumped):
        await asyncio.sleep(0.005)
    (jump,) = bot.rig.of(bk.ClockJumped)
    assert jump.by_ms == pytest.approx(-3_600_000, abs=1000)
    assert bot.minutes[-1] <= before + 2
    await bot.asked(4)
    passed = (bot.clock._elapsed_s - elapsed_s) / 60
    assert passed < 30
    assert bot.minutes[-1] == pytest.approx(before + passed, abs=2)


class Told(CandleSource):
    """Candles as they really come, and a server that tells its time."""

    def __init__(self, clock: FastWall) -> None:
        self.made_up = bk.sources.synthetic(seed=7)
        self.clock = clock
        self.asked = 0

    def there_ms(self) -> float:
        self.clock._wall()
        return START + self.clock._elapsed_s * 1000

    async def server_time_ms(self) -> int:
        self.asked += 1
        return int(self.there_ms())

    async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        stop_ms = min(stop_ms, floor_ms(int(self.there_ms()), MINUTE_MS))
        return await self.made_up.fetch(symbol, interval, start_ms, max(stop_ms, start_ms))


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_run_goes_by_the_time_of_an_exchange_that_tells_it(tmp_path: Path, hours: int) -> None:
    bot = Bot(tmp_path)
    bot.clock = FastWall(set_by_s=hours * 3600)
    bot.rig.source = source = Told(bot.clock)
    bot.handle = bot.rig.kit(bot.clock).live.background("BTCUSDT", **WHERE)
    await bot.asked(4)
    assert bot.handle.status.clock_drift_ms == pytest.approx(-hours * 3_600_000, abs=60_000)
    assert bot.minutes[-1] == pytest.approx((source.there_ms() - START) / MINUTE_MS, abs=2)
    bot.clock.set_by_s = 0  # NTP has put it right
    await bot.asked(4)
    assert bot.minutes[-1] == pytest.approx((source.there_ms() - START) / MINUTE_MS, abs=2)
    assert all(earlier < later for earlier, later in pairwise(bot.minutes))
    assert len(bot.rig.of(bk.ClockJumped)) == 1
    bot.handle.cancel()
    await asyncio.wait({bot.handle.task})


async def test_a_clock_that_was_ahead_for_a_while_is_caught_up_with(tmp_path: Path) -> None:
    """Candles of minutes that have not been come from nowhere: what was acted at tells how late it is."""
    bot = Bot(tmp_path)
    source = bot.rig.source = Told(bot.clock)
    source.server_time_ms = lambda: none()  # type: ignore[assignment,method-assign,return-value]
    bot.handle = bot.rig.kit(bot.clock).live.background("BTCUSDT", **WHERE)
    await bot.asked(3)
    bot.clock.set_by_s += AHEAD_S
    async with asyncio.timeout(60):
        while not bot.handle.status.missed:
            await asyncio.sleep(0.005)
    bot.clock.set_by_s -= AHEAD_S
    await bot.asked(3)
    assert bot.minutes[-1] == pytest.approx((source.there_ms() - START) / MINUTE_MS, abs=2)
    bot.handle.cancel()
    await asyncio.wait({bot.handle.task})


async def test_a_start_with_a_clock_that_is_far_ahead_waits_until_it_is_set_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A program that gave up over it would not be started again, and NTP sets a clock within minutes."""
    bot = Bot(tmp_path)
    bot.clock = FastWall(set_by_s=AHEAD_S)
    source = bot.rig.source = Told(bot.clock)
    source.server_time_ms = lambda: none()  # type: ignore[assignment,method-assign,return-value]
    bot.handle = bot.rig.kit(bot.clock).live.background("BTCUSDT", **WHERE)
    while not any("minutes ago by this clock: set it by NTP" in record.message for record in caplog.records):
        assert not bot.handle.done(), bot.handle.task.exception()
        await asyncio.sleep(0.005)
    bot.clock.set_by_s = 0
    await bot.asked(2)
    assert bot.minutes[-1] == pytest.approx((source.there_ms() - START) / MINUTE_MS, abs=2)
    bot.handle.cancel()
    await asyncio.wait({bot.handle.task})


async def none() -> None:
    return None


async def test_a_clock_that_goes_to_and_fro(bot: Bot) -> None:
    for seconds in (7200, -3600, 1800, -900):
        bot.clock.set_by_s += seconds
        await bot.asked(2)
    assert len(bot.rig.of(bk.ClockJumped)) == 4
