"""Waits for the minutes of a live run, and for their candles."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from backtest_kit.model.event import ClockJumped, Event
from backtest_kit.model.interval import MINUTE_MS, floor_ms
from backtest_kit.run.live.candles import POLL_MS, LiveCandles
from backtest_kit.run.live.job import LiveJob
from backtest_kit.run.live.missed import MissedMinutes

_LOOK_UP_S: Final = 5.0
"""How often a wait checks whether the clock was set."""
_log = logging.getLogger("backtest_kit")


class NextMinute:
    """The time of one run."""

    def __init__(
        self,
        job: LiveJob,
        candles: LiveCandles,
        missed: MissedMinutes,
        *,
        finished: Callable[[], bool],
        watch: Callable[[int], Awaitable[None]],
        emit: Callable[[Event], Awaitable[None]],
    ) -> None:
        """`finished` returns whether nothing is left to wait for; `watch` is called at a minute without candles."""
        self._job = job
        self._candles = candles
        self._missed = missed
        self._finished = finished
        self._watch = watch
        self._emit = emit
        self._woken = asyncio.Event()
        self._jumps = 0
        self.when_ms = 0
        """The current minute; 0 until the clock is started."""

    def begin(self) -> None:
        """The clock was started."""
        self._jumps = len(getattr(self._job.clock, "jumps", ()))
        self.when_ms = self._now_ms()

    def wake(self) -> None:
        """Have a wait check whether the run is finished."""
        self._woken.set()

    async def first(self, *, patient: bool) -> str:
        """Go to the current minute and load its candles: why they are missing, or nothing.

        Raises:
            UserError: waiting does not help, and `patient` is false: there is no position that needs watching.
        """
        self.when_ms = self._now_ms()
        away = await self._candles.missing(self.when_ms, patient=patient)
        if not away:
            self._job.time.witness(self.when_ms)
        return away

    async def come(self) -> bool:
        """Wait for the next minute whose candles are there; False if the run is finished meanwhile."""
        when_ms = self.when_ms + MINUTE_MS
        while True:
            await self.sleep_until(when_ms)
            if self._finished():
                return False
            now_ms = self._now_ms()
            if now_ms < when_ms:
                # The clock was ahead of the market. No minute comes twice.
                when_ms = max(self.when_ms + MINUTE_MS, now_ms)
                continue
            if now_ms > when_ms:
                self._missed.add(when_ms, (now_ms - when_ms) // MINUTE_MS, "the previous minute took too long")
                when_ms = now_ms
            reason = await self._published(when_ms)
            if not reason:
                break
            if self._finished():
                return False
            self._missed.add(when_ms, 1, reason)
            await self._watch(when_ms)
            when_ms += MINUTE_MS
        self._job.time.witness(when_ms)
        self.when_ms = when_ms
        return True

    async def sleep_until(self, when_ms: int) -> None:
        """Sleep, but wake up when the run is stopped, and when the clock was set back."""
        clock = self._job.clock
        sleep = asyncio.ensure_future(clock.sleep_until(when_ms))
        woken = asyncio.ensure_future(self._woken.wait())
        try:
            while not sleep.done():
                waiting = {sleep} if woken.done() else {sleep, woken}
                await asyncio.wait(waiting, timeout=_LOOK_UP_S, return_when=asyncio.FIRST_COMPLETED)
                await self._watch_clock()
                if self._finished() or when_ms - clock.now_ms() > MINUTE_MS:
                    return
        finally:
            for each in (sleep, woken):
                each.cancel()
            await asyncio.wait({sleep, woken})
        sleep.result()

    async def _published(self, when_ms: int) -> str:
        """Wait for the candles up to a minute, but not into the next one: why they are missing, or nothing."""
        clock = self._job.clock
        while True:
            reason = await self._candles.missing(when_ms)
            if clock.now_ms() < when_ms + MINUTE_MS and not reason:
                return ""
            await self._watch_clock()
            if not when_ms <= clock.now_ms() < when_ms + MINUTE_MS or self._finished():
                return reason or "its candles came too late"
            await self.sleep_until(min(clock.now_ms() + POLL_MS, when_ms + MINUTE_MS))

    async def _watch_clock(self) -> None:
        jumps: Sequence[Any] = getattr(self._job.clock, "jumps", ())
        for jump in jumps[self._jumps :]:
            event = ClockJumped(identity=self._job.identity, when_ms=self.when_ms, by_ms=jump.by_ms)
            _log.warning("the wall clock was moved by %d ms", jump.by_ms, extra={"event": event})
            await self._emit(event)
        if len(jumps) > self._jumps:
            self._jumps = len(jumps)
            await self._job.time.measure(after_jump=True)
        await self._job.time.measure()

    def _now_ms(self) -> int:
        return floor_ms(self._job.clock.now_ms(), MINUTE_MS)
