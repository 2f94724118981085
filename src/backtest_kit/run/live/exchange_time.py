"""What time it is at an exchange, and how wrong the clock of this machine is."""

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
"""How often the exchange is asked."""
_AT_ONCE_S: Final = 5.0
"""And how often at most, because the clock was set."""
_PATIENCE_S: Final = 5.0
_TRIES: Final = 3
"""How often it is asked, where it answers too slowly."""
_SLOW_S: Final = 1.0
"""A round trip beyond which the answer is no measurement: it is unknown which half of it took the time."""
DRIFT_MS: Final = 1000
"""From where on a clock is wrong enough to be reported."""
_log = logging.getLogger("backtest_kit")


class VenueTime:
    """The time by which the runs of one exchange act, and how far this machine is from it. Shared by those runs."""

    def __init__(self, exchange_name: str, source: CandleSource, clock: Clock) -> None:
        self.source = source
        self.clock = clock
        self.drift_ms: int | None = None
        """How far the exchange's clock is ahead of this machine's; None where it does not say."""
        self._exchange_name = exchange_name
        self._asked_s = -_EVERY_S
        self._told_ms = 0
        """The drift that was complained of."""

    async def measure(self, *, at_once: bool = False) -> None:
        """Ask the exchange for its time, unless another run has lately. Its silence changes nothing, and
        neither does an answer that was under way for more than a second."""
        now_s = time.monotonic()
        if now_s - self._asked_s < (_AT_ONCE_S if at_once else _EVERY_S):
            return
        self._asked_s = now_s
        try:
            async with asyncio.timeout(_PATIENCE_S):
                for _ in range(_TRIES):  # the first request may have to connect
                    before_s, before_ms = time.monotonic(), self.clock.now_ms()
                    told_ms = await self.source.server_time_ms()
                    if told_ms is None:
                        return
                    if time.monotonic() - before_s <= _SLOW_S:
                        break
                else:
                    raise RetryLater(f"it took more than {_SLOW_S:g} s to answer, {_TRIES} times")
        except Exception as error:  # the source may be anybody's code
            reason = f"no answer in {_PATIENCE_S:g} s" if isinstance(error, TimeoutError) else error_text(error)
            _log.warning("%s does not tell its time: %s", self._exchange_name, reason)
            return
        # The answer was under way for half of the time, as far as anybody knows.
        if isinstance(self.clock, SystemClock):
            self.drift_ms = self.clock.follow(told_ms + (time.monotonic() - before_s) * 500)
            self._complain(self.drift_ms)
        else:
            self.drift_ms = round(told_ms - (before_ms + self.clock.now_ms()) / 2)

    def witness(self, when_ms: int) -> None:
        """The candle that ends at `when_ms` is there: it is never earlier again, whatever the wall clock says."""
        if isinstance(self.clock, SystemClock):
            self.clock.witness(when_ms)

    def _complain(self, drift_ms: int) -> None:
        wrong = abs(drift_ms) > DRIFT_MS
        if wrong and abs(drift_ms - self._told_ms) > DRIFT_MS:
            _log.warning(
                "the clock of this machine is %d ms %s that of %s, whose time is gone by: set it by NTP",
                abs(drift_ms), "behind" if drift_ms > 0 else "ahead of", self._exchange_name,
            )  # fmt: skip
        self._told_ms = drift_ms if wrong else 0
