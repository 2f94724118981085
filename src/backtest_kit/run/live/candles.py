"""The candles of a live run: polled until they are there."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Final

from backtest_kit.engine.step import Tick
from backtest_kit.errors import BacktestKitError, BadCandles, RetryLater, UserError
from backtest_kit.format import error_text
from backtest_kit.market.fetch import CandleFeed, EdgeRule
from backtest_kit.market.history import History
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.run.feeds import columns_of
from backtest_kit.run.live.job import LiveJob

POLL_MS: Final = 1000
"""How often a candle that is not published yet is polled."""
_OTHERS_LATE_MS: Final = 10_000
"""How long a decision waits for a candle of another symbol than its own before that counts as missing."""
_SILENCE_S: Final = 60.0
"""How long a source may take to answer. A later answer would come after its minute."""
_log = logging.getLogger("backtest_kit")


class LiveCandles:
    """The candles of every symbol that a run reads, up to the current minute."""

    def __init__(self, job: LiveJob) -> None:
        self.feed: CandleFeed | None = None
        """Where candles come from; None before the run has begun, and after its end."""
        self._job = job
        self._symbol = job.identity.symbol
        self._histories: dict[str, History] = {}
        self._loading = asyncio.Lock()
        self._logged = ""

    @property
    def filled(self) -> int:
        """Minutes without a candle that were taken as flat."""
        return sum(history.filled for history in self._histories.values())

    @property
    def repairs(self) -> Counter[str]:
        """Rows that were repaired, by what was done to them."""
        return sum((history.repairs for history in self._histories.values()), Counter[str]())

    def tick(self, when_ms: int) -> Tick:
        """A minute of the run's own symbol for `step`."""
        return columns_of(self._histories[self._symbol]).tick(when_ms)

    async def missing(self, when_ms: int, *, patient: bool = True) -> str:
        """Load the candles up to a minute: why they are missing, or nothing.

        Raises:
            UserError: not `patient`, and waiting does not help.
        """
        try:
            async with asyncio.timeout(_SILENCE_S):
                await self._bring(self._symbol, when_ms, "wait")
        except TimeoutError:
            return f"{self._job.identity.exchange_name} took longer than {_SILENCE_S:g} s to answer"
        except Exception as error:  # the source may be the user's code
            if isinstance(error, UserError) and not isinstance(error, BadCandles) and not patient:
                raise
            reason = error_text(error)
            if not isinstance(error, BacktestKitError) and reason != self._logged:
                self._logged = reason
                _log.error("the source of the %s candles failed", self._symbol, exc_info=error)
            return reason
        return ""

    async def history_of(self, symbol: str, when_ms: int) -> History:
        """The candles of a symbol up to a minute. Its last ones are filled if they do not come within seconds."""
        clock, until_ms = self._job.clock, when_ms + _OTHERS_LATE_MS
        while True:
            late = clock.now_ms() >= until_ms and self._job.gaps == "fill"
            try:
                return await self._bring(symbol, when_ms, "fill" if late else "wait")
            except RetryLater:
                if clock.now_ms() >= until_ms and (late or self._job.gaps == "error"):
                    raise
            await clock.sleep_until(min(clock.now_ms() + POLL_MS, until_ms))

    async def _bring(self, symbol: str, when_ms: int, edges: EdgeRule) -> History:
        async with self._loading:
            history = self._histories.get(symbol)
            if history is None:
                if self.feed is None:
                    raise UserError(f"{symbol} candles were requested before the run began, or after its end")
                history = self._histories[symbol] = await History.load(
                    self.feed,
                    symbol,
                    when_ms - MINUTE_MS,
                    when_ms,
                    gaps=self._job.gaps,
                    dirty=self._job.dirty,
                    price_window=self._job.settings.CC_AVG_PRICE_CANDLES_COUNT,
                    edges=edges,
                )
        await history.extend(when_ms, edges=edges)
        return history
