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
from backtest_kit.model.interval import MINUTE_MS

SPEED = 600.0


class FastWall(SystemClock):
    """The clock of a machine on which a minute takes a tenth of a second, and whose wall clock can be set."""

    def __init__(self) -> None:
        self.set_by_s = 0.0
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
    assert not bot.rig.of(bk.StrategyFailed, bk.OrderFailed, bk.Degraded)


async def test_an_hour_forward_is_an_hour_that_was_missed(bot: Bot) -> None:
    before = bot.minutes[-1]
    bot.clock.set_by_s += 3600
    await bot.asked(4)
    assert bot.minutes[-1] > before + 60
    (jump,) = bot.rig.of(bk.ClockJumped)
    assert jump.by_ms == pytest.approx(3_600_000, abs=1000)
    assert sum(missed.count for missed in bot.rig.of(bk.MinutesMissed)) >= 55
    assert bot.handle.status.position is not None


async def test_after_a_clock_that_is_set_back_time_stands_still(bot: Bot) -> None:
    before = bot.minutes[-1]
    bot.clock.set_by_s -= 600
    set_at = time.monotonic()
    await bot.asked(4)
    assert time.monotonic() - set_at > 600 / SPEED * 0.8
    assert bot.minutes[-1] > before
    (jump,) = bot.rig.of(bk.ClockJumped)
    assert jump.by_ms == pytest.approx(-600_000, abs=1000)


async def test_a_clock_that_goes_to_and_fro(bot: Bot) -> None:
    for seconds in (7200, -3600, 1800, -900):
        bot.clock.set_by_s += seconds
        await bot.asked(2)
    assert len(bot.rig.of(bk.ClockJumped)) == 4
