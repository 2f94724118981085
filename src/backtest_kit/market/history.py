"""`History`: the only door through which a strategy reads candles."""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

import numpy as np

from backtest_kit.errors import LookAhead, RetryLater, UserError
from backtest_kit.market.fetch import CandleFeed, EdgeRule, GapRule, Loaded
from backtest_kit.market.price import resample, vwap
from backtest_kit.market.repair import DirtyRule
from backtest_kit.model.candle import BoolColumn, CandleSeries, FloatColumn
from backtest_kit.model.interval import CANDLE_INTERVALS, DAY_MS, INTERVAL_MS, MINUTE_MS, interval_ms, iso

_STEPS: Final = {name: INTERVAL_MS[name] for name in CANDLE_INTERVALS}
_WHOLE: Final = (int, np.integer)
_LATE: Final = 5
"""For so many minutes a filled one is requested again, at each minute that follows."""


class _Minutes(NamedTuple):
    """Contiguous candles and the price after each; `real` says which are not filled, None that all are real."""

    candles: CandleSeries
    prices: FloatColumn
    real: BoolColumn | None

    def cut(self, rows: slice) -> _Minutes:
        real = None if self.real is None else self.real[rows]
        return _Minutes(self.candles[rows], self.prices[rows], None if real is None or real.all() else real)

    def real_rows(self) -> BoolColumn:
        return np.ones(len(self.candles), dtype=np.bool_) if self.real is None else self.real


class History:
    """The minutes of one symbol inside one run, and what may be known of them at each of its steps.

    At step time t exactly the candles that closed by t are known. The last of them has index
    (t - 1 min - first_ms) / 1 min in `candles` and in `prices`: `prices[i]` is the volume-weighted
    average over candles i - price_window + 1 .. i, the price at the step that follows candle i. So the
    steps t, t + 1 min, ... read consecutive elements, and a run of steps is a slice.

    A minute that no source had is a flat candle of volume 0, and False in `real`.

    `candles`, `prices`, `real` and `first_ms` are replaced together when history is prepended, appended or trimmed.
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
        """Candles that were requested from the source; the others were cached."""
        self.repairs = loaded.repairs
        """How many rows of the source were repaired, by the kind of repair: see `REPAIRS`."""
        self._feed = feed
        self._gaps: Final[GapRule] = gaps
        self._dirty: Final[DirtyRule] = dirty
        self._price_window: Final = price_window
        self._moving = asyncio.Lock()
        self._begins = False
        self._doubted: tuple[int, int, int] | None = None
        """Older minutes of which some were filled: begin, end, and how often they are still requested again."""
        self._depth_ms = DAY_MS
        """How far back a strategy is known to look."""
        self._set(_Minutes(loaded.candles, vwap(loaded.candles, price_window), loaded.real))

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
        edges: EdgeRule = "refuse",
    ) -> History:
        """The minutes of `[start_ms, stop_ms)`, and the `price_window` before them that the first step needs.

        Raises:
            UserError, RetryLater: as `CandleFeed.load`.
        """
        lead_ms = price_window * MINUTE_MS
        loaded = await feed.load(symbol, start_ms, stop_ms, gaps=gaps, dirty=dirty, lead_ms=lead_ms, edges=edges)
        return cls(feed, symbol, loaded, gaps=gaps, dirty=dirty, price_window=price_window)

    @property
    def candles(self) -> CandleSeries:
        """Contiguous 1m candles of `[first_ms, stop_ms)`."""
        return self._minutes.candles

    @property
    def real(self) -> BoolColumn | None:
        """Which candles are real, not filled; None if all are."""
        return self._minutes.real

    @property
    def prices(self) -> FloatColumn:
        """The price known once each candle has closed; NaN for the first `price_window - 1`."""
        return self._minutes.prices

    @property
    def first_ms(self) -> int:
        """Open time of the first candle; moves back when a strategy asks for older ones."""
        return self._first_ms

    @property
    def stop_ms(self) -> int:
        """End of the last candle: the last step that can be made."""
        return self._stop_ms

    async def window(self, interval: str, limit: int, when_ms: int, *, until_ms: int | None = None) -> CandleSeries:
        """The last `limit` candles of `interval` that have closed by `when_ms`, or by an earlier `until_ms`.

        They are the candles of `[A - limit * step, A)` with A = floor(until_ms or when_ms, step), oldest
        first. The columns are copies: nothing in them leads to a later candle.

        Raises:
            LookAhead: `until_ms` is later than `when_ms`.
            UserError: `interval` or `limit` is invalid, or the data do not reach back far enough.
        """
        step_ms = _STEPS.get(interval) or interval_ms(interval, CANDLE_INTERVALS)
        if not _is_count(limit):
            raise UserError(f"limit is {limit!r}: give the number of candles, 1 or more")
        at_ms = when_ms
        if until_ms is not None:
            if until_ms > when_ms:
                raise LookAhead(f"{self.symbol}: candles until {iso(until_ms)} were requested at {iso(when_ms)}")
            at_ms = until_ms
        stop_ms = at_ms - at_ms % step_ms
        start_ms = stop_ms - int(limit) * step_ms
        if stop_ms > self._stop_ms:
            raise LookAhead(
                f"{self.symbol}: candles until {iso(stop_ms)} were requested, {iso(self._stop_ms)} is the last known"
            )
        if start_ms < self._first_ms:
            await self._prepend(start_ms)
            if start_ms < self._first_ms:
                raise self._too_early(interval, limit, stop_ms, step_ms)
        low, high = (start_ms - self._first_ms) // MINUTE_MS, (stop_ms - self._first_ms) // MINUTE_MS
        return resample(self._minutes.candles, step_ms, slice(low, high))

    async def extend(self, stop_ms: int, *, edges: EdgeRule = "wait") -> None:
        """Append the minutes up to `stop_ms`, as a live run does at each step. Does nothing if they are there.

        The last of them is real, or not there yet; only with edges="fill" it may be filled, until the next call.

        Raises:
            UserError, RetryLater: as `CandleFeed.load`; the history is as it was.
        """
        async with self._moving:
            if stop_ms <= self._stop_ms:
                return
            # Where the data begin was learnt from an answer, which may have been a bad one.
            self._begins = False
            known = self._minutes
            if known.real is not None and not known.real[-1]:
                # A filled end was a guess.
                known = known.cut(slice(0, len(known.real) - int(known.real[::-1].argmax())))
            begin_ms = int(known.candles.timestamp[-1]) + MINUTE_MS
            newer = await self._load(begin_ms, stop_ms, edges, known)
            known = await self._asked_again(known)
            self.filled -= int(np.count_nonzero(~self._minutes.real_rows())) - int(np.count_nonzero(~known.real_rows()))
            self._join(known, self._taken(newer))
            await self._ask_again_for_older()
            self._trim()

    async def _asked_again(self, known: _Minutes) -> _Minutes:
        """The same with the candles that have come of minutes that were filled lately. What was real stays as it was
        seen, even if the source has revised it."""
        recent = known.real_rows()[1:][-_LATE:]
        if recent.all():
            return known
        first = len(known.candles) - len(recent) + int(recent.argmin())
        settled, open_ = known.cut(slice(0, first)), known.cut(slice(first, None))
        begin_ms, stop_ms = int(open_.candles.timestamp[0]), int(open_.candles.timestamp[-1]) + MINUTE_MS
        try:
            loaded = await self._load(begin_ms, stop_ms, "fill", settled)
        except RetryLater:
            return known  # another minute may bring them
        return self._joined(settled, self._completed(open_, loaded))

    async def _ask_again_for_older(self) -> None:
        """As `_asked_again` for the minutes that were reached back to: an empty page may have been a bad answer."""
        if self._doubted is None:
            return
        begin_ms, stop_ms, times = self._doubted
        self._doubted = (begin_ms, stop_ms, times - 1) if times > 1 else None
        known, begin_ms = self._minutes, max(begin_ms, self._first_ms)
        first, last = (begin_ms - self._first_ms) // MINUTE_MS, (stop_ms - self._first_ms) // MINUTE_MS
        part = known.cut(slice(first, last))
        if part.real is None:
            return
        try:
            loaded = await self._feed.available(self.symbol, begin_ms, stop_ms, gaps=self._gaps, dirty=self._dirty)
        except RetryLater:
            return
        if len(loaded.candles) == len(part.candles):
            whole = self._completed(part, loaded)
            self.filled -= int(np.count_nonzero(whole.real_rows() & ~part.real))
            self._set(self._joined(self._joined(known.cut(slice(0, first)), whole), known.cut(slice(last, None))))

    def _completed(self, part: _Minutes, loaded: Loaded) -> _Minutes:
        """The same minutes, with loaded candles instead of filled ones."""
        kept, found = part.real_rows(), np.ones(len(part.candles), dtype=np.bool_)
        found = found if loaded.real is None else loaded.real
        columns = {
            name: np.where(kept, getattr(part.candles, name), column)
            for name, column in loaded.candles.columns().items()
        }
        candles, real = CandleSeries(**columns), kept | found
        return _Minutes(candles, vwap(candles, self._price_window), None if real.all() else real)

    async def _load(self, begin_ms: int, stop_ms: int, edges: EdgeRule, known: _Minutes) -> Loaded:
        return await self._feed.load(
            self.symbol,
            begin_ms,
            stop_ms,
            gaps=self._gaps,
            dirty=self._dirty,
            edges=edges,
            before=known.candles[-1:],
        )

    def _trim(self) -> None:
        """Drop candles twice as old as the strategy looks back: a run of months must not keep them all."""
        keep = (self._depth_ms + DAY_MS) // MINUTE_MS
        count = len(self._minutes.candles)
        if count > 2 * keep:
            self._begins = False
            last = self._minutes.cut(slice(count - keep, count))
            # Copies: a view would hold on to all of it.
            candles = last.candles.take(np.arange(keep))
            self._set(_Minutes(candles, last.prices.copy(), None if last.real is None else last.real.copy()))

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
            self._begins = not older.candles or int(older.candles.timestamp[0]) > low_ms
            if older.candles:
                if older.filled:
                    self._doubted = int(older.candles.timestamp[0]), self._first_ms, _LATE
                self._join(self._taken(older), self._minutes)

    def _taken(self, loaded: Loaded) -> _Minutes:
        self.filled += loaded.filled
        self.fetched += loaded.fetched
        self.repairs = self.repairs + loaded.repairs
        return _Minutes(loaded.candles, vwap(loaded.candles, self._price_window), loaded.real)

    def _join(self, older: _Minutes, newer: _Minutes) -> None:
        self._set(self._joined(older, newer))

    def _joined(self, older: _Minutes, newer: _Minutes) -> _Minutes:
        """Put two runs of candles together; only the prices whose window spans both are still to be made."""
        reach = self._price_window - 1
        first = max(len(older.candles) - reach, 0)
        seam = CandleSeries.concat((older.candles[first:], newer.candles[:reach]))
        spanning = vwap(seam, self._price_window)[len(older.candles) - first :]
        prices = np.concatenate((older.prices, spanning, newer.prices[len(spanning) :]))
        real = None
        if older.real is not None or newer.real is not None:
            real = np.concatenate((older.real_rows(), newer.real_rows()))
        return _Minutes(CandleSeries.concat((older.candles, newer.candles)), prices, real)

    def _set(self, minutes: _Minutes) -> None:
        self._minutes = minutes
        minutes.prices.flags.writeable = False
        self._first_ms = int(minutes.candles.timestamp[0])
        self._stop_ms = int(minutes.candles.timestamp[-1]) + MINUTE_MS

    def _too_early(self, interval: str, limit: int, stop_ms: int, step_ms: int) -> UserError:
        enough = self._first_ms + -self._first_ms % step_ms + int(limit) * step_ms
        return UserError(
            f"not enough history: {limit} x {interval} candles of {self.symbol} before {iso(stop_ms)} were requested, "
            f"but continuous data starts at {iso(self._first_ms)}: start the frame at {iso(enough)} or request fewer"
        )


def _is_count(limit: object) -> bool:
    return isinstance(limit, _WHOLE) and not isinstance(limit, bool) and bool(limit > 0)
