from __future__ import annotations

import asyncio
import time

import pytest

from backtest_kit.errors import Conflict, UserError
from backtest_kit.market.clock import AcceleratedClock, Clock, Jump, SteppedClock, SystemClock

START = 1_704_067_200_000


class Hands:
    """A wall clock and an elapsed time that a test sets."""

    def __init__(self) -> None:
        self.wall = START / 1000
        self.elapsed = 100.0

    def clock(self) -> SystemClock:
        return SystemClock(wall_s=lambda: self.wall, monotonic_s=lambda: self.elapsed)

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.elapsed += seconds


@pytest.mark.parametrize("clock", [SystemClock(), AcceleratedClock(START, 60), SteppedClock(START)])
def test_all_are_clocks(clock: Clock) -> None:
    assert clock.now_ms() >= START


def test_system_time_follows_both_clocks_while_they_agree() -> None:
    hands = Hands()
    clock = hands.clock()
    hands.pass_(90)
    hands.wall += 0.9  # slewed, not set
    assert (clock.now_ms(), clock.jumps) == (START + 90_000, [])


def test_a_wall_clock_set_forward_is_followed_and_kept() -> None:
    hands = Hands()
    clock = hands.clock()
    hands.pass_(10)
    hands.wall += 3600
    assert clock.now_ms() == START + 3_610_000
    assert clock.jumps == [Jump(START + 10_000, 3_600_000)]
    hands.pass_(1)
    assert (clock.now_ms(), len(clock.jumps)) == (START + 3_611_000, 1)


def test_a_wall_clock_set_back_stops_the_time_until_it_is_there_again() -> None:
    hands = Hands()
    clock = hands.clock()
    hands.pass_(10)
    assert clock.now_ms() == START + 10_000
    hands.wall -= 5
    assert clock.now_ms() == START + 10_000
    assert clock.jumps == [Jump(START + 10_000, -5000)]
    hands.pass_(4)
    assert clock.now_ms() == START + 10_000
    hands.pass_(3)
    assert clock.now_ms() == START + 12_000


async def test_system_sleep_ends_when_the_time_is_there() -> None:
    clock = SystemClock()
    until = clock.now_ms() + 30
    await clock.sleep_until(until)
    assert until <= clock.now_ms() < until + 5000


async def test_sleep_ends_early_when_the_wall_clock_is_set_forward() -> None:
    hands = Hands()
    clock = hands.clock()
    sleep = asyncio.create_task(clock.sleep_until(START + 60_000))
    await asyncio.sleep(0)
    hands.wall += 61
    began = time.monotonic()
    await sleep
    assert time.monotonic() - began < 10
    assert len(clock.jumps) == 1


async def test_an_accelerated_minute_is_short() -> None:
    clock = AcceleratedClock(START, 6000)
    began = time.monotonic()
    await clock.sleep_until(START + 60_000)
    assert clock.now_ms() >= START + 60_000
    assert 0.009 < time.monotonic() - began < 5


@pytest.mark.parametrize("speed", [0, -1, float("nan"), float("inf")])
def test_a_speed_that_is_none_is_refused(speed: float) -> None:
    with pytest.raises(UserError, match="speed is"):
        AcceleratedClock(START, speed)


async def test_stepped_time_jumps_when_all_sleep() -> None:
    clock = SteppedClock(START, sleepers=2)
    seen: list[tuple[str, int]] = []

    async def work(name: str, step_ms: int, times: int) -> None:
        for _ in range(times):
            await clock.sleep_until(clock.now_ms() + step_ms)
            seen.append((name, clock.now_ms() - START))
            await asyncio.sleep(0)
        await clock.sleep_until(START + 10_000)

    async with asyncio.timeout(5):
        await asyncio.gather(work("fast", 100, 6), work("slow", 300, 2))
    assert seen == [
        ("fast", 100),
        ("fast", 200),
        *sorted([("slow", 300), ("fast", 300)], key=seen.index),
        ("fast", 400),
        ("fast", 500),
        *sorted([("slow", 600), ("fast", 600)], key=seen.index),
    ]
    assert clock.now_ms() == START + 10_000


async def test_stepped_time_waits_for_who_died_until_he_joins_again() -> None:
    clock = SteppedClock(START)
    clock.join("bot")
    clock.join("driver")
    bot = asyncio.create_task(clock.sleep_until(START + 60_000, "bot"))
    await asyncio.sleep(0)
    bot.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bot
    driver = asyncio.create_task(clock.sleep_until(START + 60_000, "driver"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert clock.now_ms() == START
    assert clock.waiting() == {"bot": [], "driver": [START + 60_000]}
    clock.join("bot")
    await clock.sleep_until(START + 60_000, "bot")
    await driver
    assert clock.now_ms() == START + 60_000


async def test_joining_again_ends_what_sleeps_under_the_name() -> None:
    clock = SteppedClock(START)
    clock.join("driver")
    clock.join("bot")
    ghost = asyncio.create_task(clock.sleep_until(START + 60_000, "bot"))
    await asyncio.sleep(0)
    clock.join("bot")
    with pytest.raises(Conflict, match="'bot' has joined the clock again"):
        await ghost
    driver = asyncio.create_task(clock.sleep_until(START + 1000, "driver"))
    await asyncio.sleep(0)
    assert clock.now_ms() == START
    clock.leave("bot")
    await driver
    assert clock.now_ms() == START + 1000


async def test_stepped_time_is_set_forward_by_hand() -> None:
    clock = SteppedClock(START)
    sleep = asyncio.create_task(clock.sleep_until(START + 1000))
    await asyncio.sleep(0)
    clock.advance_to(START + 999)
    await asyncio.sleep(0)
    assert not sleep.done()
    clock.advance_to(START + 1000)
    clock.advance_to(START)
    await sleep
    assert clock.now_ms() == START + 1000


def test_joining_with_nobody_is_refused() -> None:
    with pytest.raises(UserError, match="sleepers of 'bot' is 0"):
        SteppedClock(START).join("bot", 0)


def test_after_a_clock_that_is_set_back_time_goes_on_from_what_the_market_has_reached() -> None:
    hands = Hands()
    clock = hands.clock()
    hands.pass_(60)
    clock.witness(START + 58_000)
    hands.pass_(10)
    hands.wall -= 3600
    assert clock.now_ms() == START + 68_000
    hands.pass_(30)
    assert clock.now_ms() == START + 98_000
    hands.wall += 3600
    assert clock.now_ms() == START + 100_000
    assert [jump.by_ms for jump in clock.jumps] == [-3_600_000, 3_600_000]


def test_a_clock_that_was_ahead_goes_back_to_what_the_market_has_reached() -> None:
    hands = Hands()
    clock = hands.clock()
    clock.witness(START)
    hands.wall += 3600
    assert clock.now_ms() == START + 3_600_000
    hands.wall -= 3600
    assert clock.now_ms() == START


def test_an_older_witness_changes_nothing() -> None:
    hands = Hands()
    clock = hands.clock()
    clock.witness(START + 10_000)
    clock.witness(START - 3_600_000)
    assert clock.now_ms() == START + 10_000


@pytest.mark.parametrize("wrong_s", [-3600, 3600])
def test_a_market_that_tells_its_time_is_followed_while_the_wall_clock_is_wrong(wrong_s: int) -> None:
    hands = Hands()
    hands.wall += wrong_s
    clock = hands.clock()
    assert clock.now_ms() == START + wrong_s * 1000
    assert clock.follow(START) == -wrong_s * 1000
    assert clock.now_ms() == START
    hands.pass_(60)
    assert clock.now_ms() == START + 60_000
    hands.wall -= wrong_s  # somebody has put it right
    assert clock.now_ms() == START + 60_000
    hands.pass_(60)
    assert clock.now_ms() == START + 120_000
    hands.wall += 7200  # the machine slept
    assert clock.now_ms() == START + 7_320_000


def test_a_clock_that_is_right_enough_stays_its_own() -> None:
    hands = Hands()
    clock = hands.clock()
    assert clock.follow(START + 700) == 700
    assert clock.now_ms() in (START, START + 700)
    assert clock.jumps == []
