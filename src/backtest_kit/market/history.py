"""`History`: the only door through which a strategy reads candles."""

from __future__ import annotations

import asyncio
from typing import Final

import numpy as np

from backtest_kit.errors import LookAhead, UserError
from backtest_kit.market.fetch import CandleFeed, GapRule, Loaded
from backtest_kit.market.price import resample, vwap
from backtest_kit.market.repair import DirtyRule
from backtest_kit.model.candle import CandleSeries, FloatColumn
from backtest_kit.model.interval import CANDLE_INTERVALS, DAY_MS, INTERVAL_MS, MINUTE_MS, interval_ms, iso

_STEPS: Final = {name: INTERVAL_MS[name] for name in CANDLE_INTERVALS}
_WHOLE: Final = (int, np.integer)


class History:
    """The minutes of one symbol inside one run, and what may be known of them at each of its steps.

    At step time t exactly the candles that closed by t are known. The last of them has index
    `step_index(t)` = (t - 1 min - first_ms) / 1 min in `candles` and in `prices`: `prices[i]` is the
    volume-weighted average over candles i - price_window + 1 .. i, the price at the step that follows
    candle i. So the steps t, t + 1 min, ... read consecutive elements, and a run of steps is a slice.

    `candles`, `prices` and `first_ms` are replaced together when history is prepended, appended or trimmed.
    Columns already taken stay as they are; take columns and their index with no `await` in between.
    """

    def __init__(
        self,
        feed: CandleFeed,
        symbol: str,
        loaded: Loaded,
        *,
        gaps: GapRule,
        dirty: DirtyRule = "refuse",
        price_window: int,
    ) -> None:
        """Take contiguous candles; `load` is the usual way."""
        self.symbol: Final = symbol
        self.filled = loaded.filled
        """Minutes that no source had, and that were filled flat."""
        self.fetched = loaded.fetched
        """Candles that the source was asked for; the others were cached."""
        self.repairs = loaded.repairs
        """How many rows of the source were repaired, by what was done to them: see `REPAIRS`."""
        self._feed = feed
        self._gaps: Final[GapRule] = gaps
        self._dirty: Final[DirtyRule] = dirty
        self._price_window: Final = price_window
        self._moving = asyncio.Lock()
        self._begins = False
        self._depth_ms = DAY_MS
        """How far back a strategy is known to look."""
        self._set(loaded.candles, vwap(loaded.candles, price_window))

    @classmethod
    async def load(
        cls,
        feed: CandleFeed,
        symbol: str,
        start_ms: int,
        stop_ms: int,
        *,
        gaps: GapRule = "error",
        dirty: DirtyRule = "refuse",
        price_window: int,
        live: bool = False,
    ) -> History:
        """The minutes of `[start_ms, stop_ms)`, and the `price_window` before them that the first step needs.

        `live` says that they end now.

        Raises:
            UserError, RetryLater: as `CandleFeed.load`.
        """
        lead_ms = price_window * MINUTE_MS
        loaded = await feed.load(symbol, start_ms, stop_ms, gaps=gaps, dirty=dirty, lead_ms=lead_ms, live=live)
        return cls(feed, symbol, loaded, gaps=gaps, dirty=dirty, price_window=price_window)

    @property
    def candles(self) -> CandleSeries:
        """Contiguous 1m candles of `[first_ms, stop_ms)`."""
        return self._candles

    @property
    def prices(self) -> FloatColumn:
        """The price known once each candle has closed; NaN for the first `price_window - 1`."""
        return self._prices

    @property
    def first_ms(self) -> int:
        """Open time of the first candle; moves back when a strategy asks for older ones."""
        return self._first_ms

    @property
    def stop_ms(self) -> int:
        """End of the last candle: the last step that can be made."""
        return self._stop_ms

    def step_index(self, when_ms: int) -> int:
        """Index of the last candle that has closed at `when_ms`.

        Raises:
            LookAhead: `when_ms` is after `stop_ms`.
            UserError: no candle has closed by then.
        """
        if when_ms > self._stop_ms:
            raise LookAhead(
                f"{self.symbol}: {iso(when_ms)} is past the last loaded candle, which closed at {iso(self._stop_ms)}"
            )
        index = (when_ms - MINUTE_MS - self._first_ms) // MINUTE_MS
        if index < 0:
            raise UserError(
                f"{self.symbol}: no candle has closed by {iso(when_ms)}: the first opens at {iso(self._first_ms)}"
            )
        return index

    def price_at(self, when_ms: int) -> float:
        """The price known at `when_ms`: the average over the `price_window` minutes that closed by then.

        Raises:
            LookAhead, UserError: as `step_index`, and where fewer than `price_window` minutes have closed.
        """
        index = self.step_index(when_ms)
        if index < self._price_window - 1:
            raise UserError(
                f"{self.symbol}: the price at {iso(when_ms)} takes {self._price_window} closed minutes, "
                f"and candles begin at {iso(self._first_ms)}"
            )
        return float(self._prices[index])

    async def window(self, interval: str, limit: int, when_ms: int, *, until_ms: int | None = None) -> CandleSeries:
        """The last `limit` candles of `interval` that have closed by `when_ms`, or by an earlier `until_ms`.

        They are the candles of `[A - limit * step, A)` with A = floor(until_ms or when_ms, step), oldest
        first. The columns are copies: nothing in them leads to a later candle.

        Raises:
            LookAhead: `until_ms` is later than `when_ms`.
            UserError: `interval` or `limit` makes no sense, or the data do not reach back far enough.
        """
        step_ms = _STEPS.get(interval) or interval_ms(interval, CANDLE_INTERVALS)
        if not _is_count(limit):
            raise UserError(f"limit is {limit!r}: give the number of candles, 1 or more")
        at_ms = when_ms
        if until_ms is not None:
            if until_ms > when_ms:
                raise LookAhead(f"{self.symbol}: candles until {iso(until_ms)} were asked at {iso(when_ms)}")
            at_ms = until_ms
        stop_ms = at_ms - at_ms % step_ms
        start_ms = stop_ms - int(limit) * step_ms
        if stop_ms > self._stop_ms:
            raise LookAhead(
                f"{self.symbol}: candles until {iso(stop_ms)} were asked, and {iso(self._stop_ms)} is the last known"
            )
        if start_ms < self._first_ms:
            await self._prepend(start_ms)
            if start_ms < self._first_ms:
                raise self._too_early(interval, limit, stop_ms, step_ms)
        low, high = (start_ms - self._first_ms) // MINUTE_MS, (stop_ms - self._first_ms) // MINUTE_MS
        return resample(self._candles, step_ms, slice(low, high))

    async def extend(self, stop_ms: int) -> None:
        """Append the minutes up to `stop_ms`, as a live run does at each step. Does nothing if they are there.

        Raises:
            UserError, RetryLater: as `CandleFeed.load`; the history is as it was.
        """
        async with self._moving:
            if stop_ms > self._stop_ms:
                loaded = await self._feed.load(self.symbol, self._stop_ms, stop_ms, gaps=self._gaps, dirty=self._dirty)
                self._count(loaded)
                newer = loaded.candles
                self._join(self._candles, self._prices, newer, vwap(newer, self._price_window))
                self._trim()

    def _trim(self) -> None:
        """Let go of what is twice as old as a strategy looks back: a run of months must not keep them all."""
        keep = (self._depth_ms + DAY_MS) // MINUTE_MS
        if len(self._candles) > 2 * keep:
            self._begins = False
            # Copies: a view would hold on to all of it.
            self._set(
                self._candles.take(np.arange(len(self._candles) - keep, len(self._candles))),
                self._prices[-keep:].copy(),
            )

    async def _prepend(self, start_ms: int) -> None:
        """Reach back to `start_ms` or as far as the data go."""
        async with self._moving:
            # Another reader may have been here while this one waited for the lock.
            if self._begins or start_ms >= self._first_ms or start_ms < 0:
                return
            self._depth_ms = max(self._depth_ms, self._stop_ms - start_ms)
            # Reach further than asked: a strategy asks again at its next step, each time a bit later or deeper.
            span_ms = max(self._first_ms - start_ms, DAY_MS)
            low_ms = max(self._first_ms - span_ms, 0)
            older = await self._feed.available(self.symbol, low_ms, self._first_ms, gaps=self._gaps, dirty=self._dirty)
            self._count(older)
            self._begins = not len(older.candles) or int(older.candles.timestamp[0]) > low_ms
            if len(older.candles):
                self._join(older.candles, vwap(older.candles, self._price_window), self._candles, self._prices)

    def _count(self, loaded: Loaded) -> None:
        self.filled += loaded.filled
        self.fetched += loaded.fetched
        self.repairs = self.repairs + loaded.repairs

    def _join(
        self, older: CandleSeries, older_prices: FloatColumn, newer: CandleSeries, newer_prices: FloatColumn
    ) -> None:
        """Put two runs of candles together; only the prices whose window spans both are still to be made."""
        reach = self._price_window - 1
        first = max(len(older) - reach, 0)
        spanning = vwap(CandleSeries.concat((older[first:], newer[:reach])), self._price_window)[len(older) - first :]
        prices = np.concatenate((older_prices, spanning, newer_prices[len(spanning) :]))
        self._set(CandleSeries.concat((older, newer)), prices)

    def _set(self, candles: CandleSeries, prices: FloatColumn) -> None:
        self._candles = candles
        self._prices = prices
        self._prices.flags.writeable = False
        self._first_ms = int(candles.timestamp[0])
        self._stop_ms = int(candles.timestamp[-1]) + MINUTE_MS

    def _too_early(self, interval: str, limit: int, stop_ms: int, step_ms: int) -> UserError:
        enough = self._first_ms + -self._first_ms % step_ms + int(limit) * step_ms
        return UserError(
            f"{self.symbol}: {limit} x {interval} candles before {iso(stop_ms)} were asked, but its unbroken candles "
            f"begin at {iso(self._first_ms)}: start the frame at {iso(enough)} or later, or ask for fewer"
        )


def _is_count(limit: object) -> bool:
    return isinstance(limit, _WHOLE) and not isinstance(limit, bool) and bool(limit > 0)
