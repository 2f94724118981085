"""Clocks: the time of a market, and waiting for it.

`SystemClock` is the real one. `AcceleratedClock` runs a simulated time faster. `SteppedClock` stands
still until all its users wait, and then jumps: an hour takes no time, and a slow user misses nothing.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from backtest_kit.errors import Conflict, UserError

_JUMP_MS: Final = 1000
"""From this distance between wall clock and elapsed time on, the clock counts as having been set."""
_LONGEST_NAP_S: Final = 1.0
"""How late a wall clock that was set, or a machine that slept, is noticed by waiting tasks."""


class Clock(Protocol):
    """The time of a market, in epoch milliseconds. It goes backwards only if it was ahead of that market."""

    def now_ms(self) -> int:
        """The time now."""
        ...

    async def sleep_until(self, when_ms: int) -> None:
        """Return once the time is `when_ms` or later. If it already is, other tasks still get a turn first."""
        ...

    async def start(self) -> None:
        """Connect to the source of the time. Called once, before anything else.

        Raises:
            RetryLater: it does not answer.
        """
        ...

    async def stop(self) -> None:
        """Disconnect. Idempotent."""
        ...


class _Local:
    """A clock of this process: nothing to connect to."""

    async def start(self) -> None:
        """Does nothing."""

    async def stop(self) -> None:
        """Does nothing."""


class Jump(msgspec.Struct, frozen=True):
    """The wall clock was set, or the machine slept."""

    at_ms: int
    """The clock's time before the jump."""
    by_ms: int
    """How far the wall clock moved against the elapsed time; below 0 it was set back."""


class SystemClock(_Local):
    """The wall clock of this machine, corrected by the elapsed time and by the known time of the market.

    A wall clock that is set forward by more than a second is followed immediately. After one that is set back, the time
    continues by the elapsed time from the known time of the market; if that is unknown, it stands still until the wall
    clock has caught up. All jumps are in `jumps`.
    """

    def __init__(
        self, *, wall_s: Callable[[], float] = time.time, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.jumps: list[Jump] = []
        self._wall_s = wall_s
        self._monotonic_s = monotonic_s
        self._begin_ms = wall_s() * 1000
        self._began_s = monotonic_s()
        self._latest_ms = int(self._begin_ms)
        self._market: tuple[float, float] | None = None
        """A time that the market has reached, and the elapsed time at which that was known."""
        self._ahead_ms = 0.0
        """How far the market is ahead of a wall clock that is wrong."""

    def now_ms(self) -> int:
        wall_ms, elapsed_s = self._hands()
        now_ms, reached_ms = wall_ms + self._ahead_ms, self._reached_ms(elapsed_s)
        # The known time of the market may be a little behind; a clock ahead of the market was wrong.
        self._latest_ms = int(max(now_ms, self._latest_ms if reached_ms is None else reached_ms))
        return self._latest_ms

    def witness(self, when_ms: int) -> None:
        """The market has reached `when_ms`, for a candle that ends there was published: it is never earlier again."""
        _, elapsed_s = self._hands()
        reached_ms = self._reached_ms(elapsed_s)
        if reached_ms is None or when_ms > reached_ms:
            self._market = when_ms, elapsed_s

    def follow(self, there_ms: float) -> int:
        """It is `there_ms` at the market now. If the wall clock is off by more than a second, the market's time is used
        from now on. Returns how far the market is ahead of the wall clock, in ms."""
        wall_ms, elapsed_s = self._hands()
        ahead_ms = there_ms - wall_ms
        self._ahead_ms = ahead_ms if abs(ahead_ms) > _JUMP_MS else 0.0
        reached_ms = self._reached_ms(elapsed_s)
        if reached_ms is None or abs(there_ms - reached_ms) > _JUMP_MS:
            self._market = there_ms, elapsed_s
        return round(ahead_ms)

    def _hands(self) -> tuple[float, float]:
        """The wall clock in ms without its jitter, and the elapsed time; a jump is noticed here."""
        wall_ms, elapsed_s = self._wall_s() * 1000, self._monotonic_s()
        expected_ms = self._begin_ms + (elapsed_s - self._began_s) * 1000
        if abs(wall_ms - expected_ms) <= _JUMP_MS:
            return expected_ms, elapsed_s
        self.jumps.append(Jump(int(expected_ms), round(wall_ms - expected_ms)))
        self._begin_ms, self._began_s = wall_ms, elapsed_s
        reached_ms = self._reached_ms(elapsed_s)
        if reached_ms is not None and abs(wall_ms - reached_ms) <= _JUMP_MS:
            self._ahead_ms = 0.0
        return wall_ms, elapsed_s

    def _reached_ms(self, elapsed_s: float) -> float | None:
        """The time that the market has reached by now; None if unknown."""
        return None if self._market is None else self._market[0] + (elapsed_s - self._market[1]) * 1000

    async def sleep_until(self, when_ms: int) -> None:
        await _nap_until(self.now_ms, when_ms, speed=1.0)


class AcceleratedClock(_Local):
    """A time that begins at `start_ms` and runs `speed` times as fast as the real one.

    Raises:
        UserError: `speed` is not above 0.
    """

    def __init__(self, start_ms: int, speed: float, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        if not 0 < speed < math.inf:
            raise UserError(f"speed is {speed!r}: give a number above 0; 60 makes a minute a second")
        self.speed = speed
        self._start_ms = start_ms
        self._monotonic_s = monotonic_s
        self._began_s = monotonic_s()

    def now_ms(self) -> int:
        return self._start_ms + int((self._monotonic_s() - self._began_s) * 1000 * self.speed)

    async def sleep_until(self, when_ms: int) -> None:
        await _nap_until(self.now_ms, when_ms, self.speed)


class SteppedClock(_Local):
    """A time that stands still until every participant waits, and then jumps to the earliest moment waited for.

    A participant joins by name, with the number of its tasks that sleep at the same time. None is left behind: one
    that has died stops the time until it joins again under its name. Without participants, only `advance_to` moves
    the time.

    `sleepers` joins that many without a name, for a program that uses the clock alone.
    """

    def __init__(self, start_ms: int, *, sleepers: int = 0) -> None:
        self._now_ms = start_ms
        self._joined: dict[str, int] = {"": sleepers} if sleepers else {}
        self._asleep: list[_Sleeper] = []

    def now_ms(self) -> int:
        return self._now_ms

    def join(self, name: str, sleepers: int = 1) -> None:
        """From now on the time waits for `name`. Joining again ends its earlier sleeps with Conflict.

        Raises:
            UserError: `sleepers` is below 1.
        """
        if sleepers < 1:
            raise UserError(f"sleepers of {name!r} is {sleepers}: give the number of tasks that sleep, 1 or more")
        for each in self._asleep:
            if each.name == name and not each.woken.done():
                each.woken.set_result(False)
        self._asleep = [each for each in self._asleep if each.name != name]
        self._joined[name] = sleepers

    def leave(self, name: str) -> None:
        """The time no longer waits for `name`."""
        self._joined.pop(name, None)
        self._jump()

    def advance_to(self, when_ms: int) -> None:
        """Set the time forward, even while tasks work; an earlier time changes nothing."""
        self._now_ms = max(self._now_ms, when_ms)
        for each in self._asleep:
            if each.until_ms <= self._now_ms and not each.woken.done():
                each.woken.set_result(True)
        self._asleep = [each for each in self._asleep if not each.woken.done()]

    def waiting(self) -> dict[str, list[int]]:
        """The participants, and until when each of their tasks sleeps."""
        return {name: [each.until_ms for each in self._asleep if each.name == name] for name in self._joined}

    async def sleep_until(self, when_ms: int, name: str = "") -> None:
        if when_ms <= self._now_ms:
            await asyncio.sleep(0)
            return
        sleeper = _Sleeper(name, when_ms)
        self._asleep.append(sleeper)
        self._jump()
        try:
            if not await sleeper.woken:
                raise Conflict(f"{name!r} has joined the clock again: its earlier sleeps are over")
        finally:
            if sleeper in self._asleep:
                self._asleep.remove(sleeper)

    def _jump(self) -> None:
        waiting = self.waiting()
        if waiting and all(len(waiting[name]) >= self._joined[name] for name in waiting):
            self.advance_to(min(each.until_ms for each in self._asleep))


class _Sleeper:
    def __init__(self, name: str, until_ms: int) -> None:
        self.name = name
        self.until_ms = until_ms
        self.woken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()


async def _nap_until(now_ms: Callable[[], int], when_ms: int, speed: float) -> None:
    """Sleep by the elapsed time, in naps: it may pass slower or faster than the time that is waited for."""
    await asyncio.sleep(0)
    while (left_ms := when_ms - now_ms()) > 0:  # noqa: ASYNC110  # a clock has no event to wait for
        await asyncio.sleep(min(left_ms / 1000 / speed, _LONGEST_NAP_S))
