"""The time at an exchange, and how far the clock of this machine is off."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from backtest_kit.errors import RetryLater
from backtest_kit.format import error_text
from backtest_kit.market.clock import Clock, SystemClock
from backtest_kit.market.sources import CandleSource

_EVERY_S: Final = 600.0
"""How often the time of the exchange is read."""
_AFTER_JUMP_S: Final = 5.0
"""How often at most after the clock was set."""
_PATIENCE_S: Final = 5.0
_TRIES: Final = 3
"""How often it is read again if the answer is too slow."""
_SLOW_S: Final = 1.0
"""A longer round trip measures nothing: either half of it may have taken the time."""
DRIFT_MS: Final = 1000
"""A clock that is off by more is reported."""
_log = logging.getLogger("backtest_kit")


class VenueTime:
    """The clock of the runs of one exchange, and how far this machine is off. Shared by those runs."""

    def __init__(self, exchange_name: str, source: CandleSource, clock: Clock) -> None:
        self.source = source
        self.clock = clock
        self.drift_ms: int | None = None
        """How far the exchange's clock is ahead of this machine's; None if it is unknown."""
        self._exchange_name = exchange_name
        self._asked_s = -_EVERY_S
        self._reported_ms = 0
        """The drift that was logged last."""

    async def measure(self, *, after_jump: bool = False) -> None:
        """Read the time of the exchange, unless another run has lately. No answer changes nothing, and neither does one
        that took more than a second."""
        now_s = time.monotonic()
        if now_s - self._asked_s < (_AFTER_JUMP_S if after_jump else _EVERY_S):
            return
        self._asked_s = now_s
        try:
            async with asyncio.timeout(_PATIENCE_S):
                for _ in range(_TRIES):  # the first request may have to connect
                    before_s, before_ms = time.monotonic(), self.clock.now_ms()
                    server_ms = await self.source.server_time_ms()
                    if server_ms is None:
                        return
                    if time.monotonic() - before_s <= _SLOW_S:
                        break
                else:
                    raise RetryLater(f"it took more than {_SLOW_S:g} s to answer, {_TRIES} times")
        except Exception as error:  # the source may be the user's code
            reason = f"no answer in {_PATIENCE_S:g} s" if isinstance(error, TimeoutError) else error_text(error)
            _log.warning("the time of %s is unknown: %s", self._exchange_name, reason)
            return
        # The best guess: the answer took half of the round trip.
        if isinstance(self.clock, SystemClock):
            self.drift_ms = self.clock.follow(server_ms + (time.monotonic() - before_s) * 500)
            self._complain(self.drift_ms)
        else:
            self.drift_ms = round(server_ms - (before_ms + self.clock.now_ms()) / 2)

    def witness(self, when_ms: int) -> None:
        """The candle that ends at `when_ms` is there, so the clock never goes back before it."""
        if isinstance(self.clock, SystemClock):
            self.clock.witness(when_ms)

    def _complain(self, drift_ms: int) -> None:
        wrong = abs(drift_ms) > DRIFT_MS
        if wrong and abs(drift_ms - self._reported_ms) > DRIFT_MS:
            _log.warning(
                "the clock of this machine is %d ms %s that of %s, whose time is used: set it by NTP",
                abs(drift_ms), "behind" if drift_ms > 0 else "ahead of", self._exchange_name,
            )  # fmt: skip
        self._reported_ms = drift_ms if wrong else 0
