"""`CandleFeed`: the one way in for candles, from the cache and from the source."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Final, Literal, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from backtest_kit.errors import BacktestKitError, Damaged, RetryLater, UserError
from backtest_kit.market.integrity import (
    check_candles,
    check_grid,
    fill_gaps,
    find_gaps,
    whole_minutes,
)
from backtest_kit.market.repair import DirtyRule, Repaired, as_published, repair
from backtest_kit.market.sources.base import CandleSource
from backtest_kit.model.candle import NO_TIME, BoolColumn, CandleSeries
from backtest_kit.model.interval import DAY_MS, MINUTE_MS, floor_ms, iso
from backtest_kit.model.repairs import describe_repairs
from backtest_kit.persist.store import CandleStore, SeriesKey
from backtest_kit.settings import Settings

GapRule = Literal["error", "fill"]
EdgeRule = Literal["refuse", "wait", "fill"]
"""What to do about missing minutes at an edge of a range without a candle beyond them. "refuse": the range lies outside
of the data. "wait": they will come. "fill": those at its end become flat candles."""

_STORE_BATCH: Final = 20_000
"""Fetched candles that are stored together: a long download that is killed loses no more than these."""
_NO_USE_RETRYING: Final = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, SyntaxError, TypeError),
)
"""Errors of the source's code: another attempt would meet them again."""
_PUBLISHING_MS: Final = 5 * MINUTE_MS
"""How late an exchange may be with a candle before it counts as missing."""
_LOG_AGAIN_MS: Final = 60 * MINUTE_MS
"""How long a lasting problem of a symbol is not logged again."""
_LOOK_BACK_MS: Final = 30 * DAY_MS
"""How far back an earlier candle is searched if the source does not know where its candles begin."""

_log = logging.getLogger("backtest_kit")


class Loaded(NamedTuple):
    """Contiguous 1m candles, and where they came from; what was neither filled nor fetched was cached."""

    candles: CandleSeries
    filled: int
    """Minutes that no source had."""
    fetched: int
    """Candles that were requested from the source."""
    repairs: Counter[str] = Counter()  # noqa: RUF012  # never changed
    """How many rows of the source were repaired, by the kind of repair: see `REPAIRS`."""
    real: BoolColumn | None = None
    """Which of them are real, not filled; None if all are."""


class _Page(NamedTuple):
    """What the source answered to one request."""

    content: Repaired
    next_ms: int | None
    """The minute after its last row; None if no row is in the range."""


class _Collected(NamedTuple):
    candles: CandleSeries
    fetched: int
    repairs: Counter[str]


class CandleFeed:
    """Brings in the 1m candles of one exchange: read from the store, fetched where missing, checked, stored.

    `now_ms` is the clock that decides which candles are closed; only those are stored or returned.
    """

    def __init__(
        self,
        exchange_name: str,
        source: CandleSource,
        store: CandleStore | None,
        settings: Settings,
        now_ms: Callable[[], int],
        *,
        live: bool = False,
    ) -> None:
        """`live`: a damaged cache is logged, and its candles are fetched."""
        self._live = live
        self._exchange_name = exchange_name
        self._source = source
        self._store = store if source.cached else None
        self._settings = settings
        self._now_ms = now_ms
        # Weak: a lock lives while someone holds or awaits it, so none outlives its event loop.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._logged: dict[tuple[str, str], int] = {}
        """When a problem of a symbol was logged last."""

    async def load(
        self,
        symbol: str,
        start_ms: int,
        stop_ms: int,
        *,
        gaps: GapRule = "error",
        dirty: DirtyRule = "refuse",
        lead_ms: int = 0,
        edges: EdgeRule = "refuse",
        before: CandleSeries | None = None,
    ) -> Loaded:
        """Every minute of `[start_ms - lead_ms, stop_ms)`.

        `lead_ms` is what a frame needs before its start; messages speak of the frame. With gaps="fill", missing
        minutes become flat candles of volume 0 and are counted, at the edges as well wherever there is a candle
        beyond them. With dirty="repair" bad rows of the source are repaired, counted and logged (see `REPAIRS`).
        `before` is the last candle before the range, if the caller has it.

        Raises:
            UserError: the range is not whole minutes or reaches into the future, or lies outside of the source's
                data, minutes are missing and gaps is "error", the source serves candles of another length, or a candle
                is refused by `check_candles`.
            RetryLater: the source does not answer, or has not published the last minutes yet.
        """
        self._check_range(symbol, start_ms, stop_ms, gaps)
        first_ms = start_ms - lead_ms
        candles, fetched, repairs = await self._collect(symbol, first_ms, stop_ms, dirty)
        missing = find_gaps(candles, first_ms, stop_ms)
        if not missing:
            return Loaded(candles, 0, fetched, repairs)
        no_head, no_tail = bool(missing.start_ms[0] == first_ms), bool(missing.stop_ms[-1] == stop_ms)
        if no_tail and edges == "wait":
            raise self._not_published(symbol, int(missing.start_ms[-1]))
        if no_head and before is None:
            before = await self._last_before(symbol, first_ms, dirty)
        after = (
            await self._first_after(symbol, stop_ms, dirty) if no_tail and edges == "refuse" else CandleSeries.empty()
        )
        known = _merge([before or CandleSeries.empty(), candles, after])
        off_head = no_head and not before
        off_tail = no_tail and not after and edges == "refuse"
        if off_head and edges == "wait":
            raise RetryLater(f"{symbol}: {self._exchange_name} has no candle before {iso(first_ms + MINUTE_MS)} yet")
        if off_head or off_tail:
            raise await self._outside(symbol, start_ms, stop_ms, lead_ms, known, off_head=off_head, off_tail=off_tail)
        if gaps == "error":
            raise UserError(
                f"{missing.describe(symbol)}: choose another frame, or fill them with flat candles "
                f'(gaps="fill", on the command line --gaps fill)'
            )
        return _filled(known, first_ms, stop_ms, fetched, repairs)

    async def available(
        self, symbol: str, start_ms: int, stop_ms: int, *, gaps: GapRule = "error", dirty: DirtyRule = "refuse"
    ) -> Loaded:
        """The longest unbroken run of candles in `[start_ms, stop_ms)` that ends at `stop_ms`; may be empty.

        With gaps="fill" missing minutes do not break it, and it begins at `start_ms`, or where the data begin.
        Raises as `load`, but never for candles that are absent.
        """
        start_ms = max(start_ms, 0)
        if stop_ms <= start_ms:
            return Loaded(CandleSeries.empty(), 0, 0)
        self._check_range(symbol, start_ms, stop_ms, gaps)
        candles, fetched, repairs = await self._collect(symbol, start_ms, stop_ms, dirty)
        missing = find_gaps(candles, start_ms, stop_ms)
        if not missing:
            return Loaded(candles, 0, fetched, repairs)
        if gaps == "error":
            return Loaded(candles.between(int(missing.stop_ms[-1]), stop_ms), 0, fetched, repairs)
        if missing.start_ms[0] == start_ms:
            before = await self._last_before(symbol, start_ms, dirty)
            if not before and not candles:
                return Loaded(candles, 0, fetched, repairs)
            start_ms = start_ms if before else int(candles.timestamp[0])
            candles = _merge([before, candles])
        return _filled(candles, start_ms, stop_ms, fetched, repairs)

    def _check_range(self, symbol: str, start_ms: int, stop_ms: int, gaps: GapRule) -> None:
        if gaps not in ("error", "fill"):
            raise UserError(f"gaps is {gaps!r}: use 'error' or 'fill'")
        for name, when in (("start", start_ms), ("end", stop_ms)):
            if when % MINUTE_MS:
                raise UserError(f"the {name} of the {symbol} candles is {iso(when)}: give a whole minute")
        if stop_ms <= start_ms:
            raise UserError(f"{symbol}: the frame ends at {iso(stop_ms)}, not after its start {iso(start_ms)}")
        closed = floor_ms(self._now_ms(), MINUTE_MS)
        if stop_ms > closed:
            raise UserError(
                f"{symbol}: the frame ends at {iso(stop_ms)}, which is in the future: "
                f"end it at {iso(closed)} or earlier"
            )

    async def _collect(self, symbol: str, start_ms: int, stop_ms: int, dirty: DirtyRule) -> _Collected:
        """What store and source have in the range: checked or repaired, ascending, with the gaps that remain.

        And how many of them the source delivered.
        """
        lock = self._locks.setdefault(symbol, asyncio.Lock())
        async with lock:
            series = SeriesKey(self._source.series_name or self._exchange_name, symbol, "1m")
            known = await self._cached(series, start_ms, stop_ms)
            pages = [repair(known, start_ms, stop_ms, self._settings) if dirty == "repair" else as_published(known)]
            missing = find_gaps(pages[0].candles, start_ms, stop_ms)
            for low, high in zip(missing.start_ms.tolist(), missing.stop_ms.tolist(), strict=True):
                pages += await self._download(series, low, high, dirty)
        candles = _merge([page.candles for page in pages])
        if dirty == "refuse":
            check_candles(candles, symbol=symbol, settings=self._settings)
        repairs = sum((page.repairs for page in pages), Counter[str]())
        if repairs and self._is_news(symbol, *repairs):
            words = describe_repairs(repairs)
            _log.warning("%s: bad rows of %s were repaired: %s", symbol, self._exchange_name, words)
        return _Collected(candles, sum(len(page.candles) for page in pages[1:]), repairs)

    async def _last_before(self, symbol: str, when_ms: int, dirty: DirtyRule) -> CandleSeries:
        """The last candle that opens before a moment; empty if there is none."""
        bounds = await self._bounds(symbol)
        begin_ms = max(bounds[0] if bounds else when_ms - _LOOK_BACK_MS, 0)
        reach_ms = self._page_ms
        while when_ms > begin_ms:
            low_ms = max(when_ms - reach_ms, begin_ms)
            candles = (await self._collect(symbol, low_ms, when_ms, dirty)).candles
            if candles:
                return candles[-1:]
            when_ms, reach_ms = low_ms, reach_ms * 4
        return CandleSeries.empty()

    async def _first_after(self, symbol: str, when_ms: int, dirty: DirtyRule) -> CandleSeries:
        """A candle that opens at a moment or later, the first one if it is near; empty if there is none."""
        bounds = await self._bounds(symbol)
        closed_ms = floor_ms(self._now_ms(), MINUTE_MS)
        end_ms = min(bounds[1], closed_ms) if bounds else closed_ms
        for low_ms, high_ms in ((when_ms, when_ms + self._page_ms), (end_ms - self._page_ms, end_ms)):
            low_ms, high_ms = max(low_ms, when_ms), min(high_ms, end_ms)
            if low_ms < high_ms:
                candles = (await self._collect(symbol, low_ms, high_ms, dirty)).candles
                if candles:
                    return candles[:1]
        return CandleSeries.empty()

    async def _cached(self, series: SeriesKey, start_ms: int, stop_ms: int) -> CandleSeries:
        if self._store is None:
            return CandleSeries.empty()
        try:
            return await self._store.read(series, start_ms, stop_ms)
        except (RetryLater, Damaged) as error:
            # A server that is away comes back. Damage waits for a person, and a live run cannot wait.
            wanted = self._live if isinstance(error, Damaged) else stop_ms - start_ms <= self._page_ms
            if not wanted:
                raise
            if self._is_news(series.symbol, "unread"):
                _log.warning("candles of %s are fetched, because their cache cannot be read: %s", series.symbol, error)
            return CandleSeries.empty()

    @property
    def _page_ms(self) -> int:
        """What one request brings at most."""
        return (self._source.page_limit or self._settings.CC_MAX_CANDLES_PER_REQUEST) * MINUTE_MS

    async def _download(self, series: SeriesKey, start_ms: int, stop_ms: int, dirty: DirtyRule) -> list[Repaired]:
        """The source's candles of one range, stored as they come."""
        if dirty == "refuse":
            await self._source.verify(series.symbol)
        pages: list[Repaired] = []
        stored = 0
        try:
            async for page in self._pages(series.symbol, start_ms, stop_ms, dirty):
                pages.append(page)
                if sum(len(each.candles) for each in pages[stored:]) >= _STORE_BATCH:
                    await self._keep(series, pages[stored:])
                    stored = len(pages)
        finally:
            # Also when a later page fails: the next attempt goes on from here.
            await self._keep(series, pages[stored:])
        return pages

    async def _pages(self, symbol: str, start_ms: int, stop_ms: int, dirty: DirtyRule) -> AsyncIterator[Repaired]:
        bounds_known = False
        # To repair them takes the minute before, of which rows may be moved up into the page.
        lead_ms = MINUTE_MS if dirty == "repair" else 0
        span_ms = max(self._page_ms - lead_ms, MINUTE_MS)
        while start_ms < stop_ms:
            page_stop = min(start_ms + span_ms, stop_ms)
            page, next_ms = await self._request(symbol, start_ms, page_stop, dirty, lead_ms)
            yield page
            if next_ms is not None:
                # A short page may be a gap, or an exchange with smaller pages: ask on from its last row.
                start_ms = next_ms
                continue
            start_ms = page_stop
            if not bounds_known and start_ms < stop_ms:
                # Years before a listing would otherwise be requested page by page.
                bounds = await self._bounds(symbol)
                bounds_known = True
                if bounds is not None:
                    start_ms, stop_ms = max(start_ms, bounds[0]), min(stop_ms, bounds[1])

    async def _bounds(self, symbol: str) -> tuple[int, int] | None:
        """The source's range in whole minutes: its first row may open off them."""
        bounds = await self._source.range(symbol)
        return None if bounds is None else (_whole_minute(bounds[0]), _whole_minute(bounds[1]))

    async def _request(self, symbol: str, start_ms: int, stop_ms: int, dirty: DirtyRule, lead_ms: int) -> _Page:
        rows = await self._fetch(symbol, max(start_ms - lead_ms, 0), stop_ms)
        check_grid(rows.timestamp, what=f"{symbol} of {self._exchange_name}")
        minutes = whole_minutes(rows.timestamp)
        wanted = (minutes >= start_ms) & (minutes < stop_ms)
        next_ms = int(minutes[wanted].max()) + MINUTE_MS if wanted.any() else None
        if dirty == "repair":
            return _Page(repair(rows, start_ms, stop_ms, self._settings), next_ms)
        untimed = rows.timestamp == NO_TIME
        page = rows.take(untimed | (rows.timestamp >= start_ms) & (rows.timestamp < stop_ms))
        check_candles(page, symbol=symbol, settings=self._settings)
        return _Page(as_published(page), next_ms)

    async def _fetch(self, symbol: str, start_ms: int, stop_ms: int) -> CandleSeries:
        attempts = self._settings.CC_GET_CANDLES_RETRY_COUNT
        for attempt in range(1, attempts + 1):
            try:
                page = await self._source.fetch(symbol, "1m", start_ms, stop_ms)
                break
            except (UserError, *_NO_USE_RETRYING):
                raise
            except Exception as error:
                if attempt == attempts:
                    raise RetryLater(
                        f"{self._exchange_name}: the candles of {symbol} from {iso(start_ms)} could not be fetched "
                        f"in {attempts} attempts: {type(error).__name__}: {error}"
                    ) from error
            await asyncio.sleep(self._settings.CC_GET_CANDLES_RETRY_DELAY_MS / 1000)
        if not isinstance(page, CandleSeries):
            raise UserError(f"{type(self._source).__name__}.fetch returned {type(page).__name__}, not a CandleSeries")
        return page

    async def _keep(self, series: SeriesKey, pages: list[Repaired]) -> None:
        """Store candles as they were published. Repaired ones are not: they are repaired, and counted, in each run."""
        candles = CandleSeries.concat([page.candles for page in pages])
        # Requests may be so small that one row came in each.
        check_grid(candles.timestamp, what=f"{series.symbol} of {self._exchange_name}")
        if self._store is None or not len(candles):
            return
        candles = CandleSeries.concat([page.candles.take(page.published) for page in pages])
        closed = candles.between(0, floor_ms(self._now_ms(), MINUTE_MS))
        try:
            if len(closed):
                await self._store.write(series, closed)
        except Exception as error:
            # The candles are in hand; a cache that cannot keep them costs the next run a download.
            if self._is_news(series.symbol, "unkept"):
                _log.warning(
                    "%d candles of %s/%s/%s could not be cached: %s",
                    len(closed), series.exchange_name, series.symbol, series.interval, error,
                    extra={"series": series, "error": error},
                )  # fmt: skip

    def _is_news(self, symbol: str, *what: str) -> bool:
        """Whether to log a problem: a live run meets it every second, for as long as it lasts."""
        now_ms = self._now_ms()
        logged_ms = [self._logged.get((symbol, each), -_LOG_AGAIN_MS) for each in what]
        if now_ms - min(logged_ms) < _LOG_AGAIN_MS:
            return False
        self._logged.update(((symbol, each), now_ms) for each in what)
        return True

    def _not_published(self, symbol: str, late_ms: int) -> RetryLater:
        message = f"{symbol}: {self._exchange_name} has not published the candle of {iso(late_ms)} yet"
        minutes = (self._now_ms() - late_ms) // MINUTE_MS
        if minutes * MINUTE_MS >= _PUBLISHING_MS:
            message += (
                f", which was {minutes} minutes ago by this clock: set it by NTP if it is ahead, or look at the market"
            )
        return RetryLater(message)

    async def _outside(
        self,
        symbol: str,
        start_ms: int,
        stop_ms: int,
        lead_ms: int,
        known: CandleSeries,
        *,
        off_head: bool,
        off_tail: bool,
    ) -> BacktestKitError:
        """The error of a range that begins before the data (`off_head`) or ends after them, naming one that works."""
        first_ms = start_ms - lead_ms
        bounds = await self._bounds(symbol)
        reaches = bounds is None or bounds[1] >= stop_ms
        found = (int(known.timestamp[0]), int(known.timestamp[-1]) + MINUTE_MS) if known else None
        late = found[1] if found and found[1] > first_ms else first_ms
        if off_tail and reaches and self._now_ms() - late < _PUBLISHING_MS:
            return self._not_published(symbol, late)
        requested = f"frame outside the data: {symbol} was requested from {iso(start_ms)} to {iso(stop_ms)}"
        if lead_ms:
            requested += f" (and {lead_ms // MINUTE_MS} minutes before it, for the first price)"
        have = _reach(bounds, found, first_ms if off_head else None, stop_ms if off_tail else None)
        if have is None:
            return UserError(
                f"{requested}, and {self._exchange_name} has no candle there: choose another frame or symbol"
            )
        low, high = have[0] + lead_ms, have[1]
        if low >= high:
            return UserError(
                f"{requested}, but {self._exchange_name} has only {iso(have[0])} to {iso(high)}: get more data"
            )
        start, stop = max(low, start_ms), min(high, stop_ms)
        start, stop = (start, stop) if start < stop else (low, high)
        return UserError(
            f"{requested}, but {self._exchange_name} has {iso(have[0])} to {iso(have[1])}: "
            f"use start_date={iso(start)!r}, end_date={iso(stop)!r}"
        )


def _filled(candles: CandleSeries, start_ms: int, stop_ms: int, fetched: int, repairs: Counter[str]) -> Loaded:
    """The minutes of a range from candles of which some are missing, and one may lie before it."""
    whole = fill_gaps(candles, start_ms, stop_ms)
    real = np.zeros(len(whole), dtype=np.bool_)
    real[(candles.between(start_ms, stop_ms).timestamp - start_ms) // MINUTE_MS] = True
    filled = len(whole) - int(np.count_nonzero(real))
    return Loaded(whole, filled, fetched, repairs, real if filled else None)


def _whole_minute(when_ms: int) -> int:
    return floor_ms(when_ms + MINUTE_MS - 1, MINUTE_MS)


def _merge(parts: list[CandleSeries]) -> CandleSeries:
    filled = [part for part in parts if len(part)]
    candles = CandleSeries.concat(filled)
    return candles if len(filled) < 2 else candles.take(np.argsort(candles.timestamp, kind="stable"))


def _reach(
    bounds: tuple[int, int] | None, found: tuple[int, int] | None, no_head: int | None, no_tail: int | None
) -> tuple[int, int] | None:
    """The true range of the data: the source's, corrected by what it did not deliver."""
    if found is None:
        # Nothing came from inside the bounds, so they help only if they lie elsewhere.
        if bounds is None or (
            no_head is not None and no_tail is not None and bounds[0] < no_tail and no_head < bounds[1]
        ):
            return None
        return bounds
    low, high = bounds or found
    if no_head is not None and low <= no_head:
        low = found[0]
    if no_tail is not None and high >= no_tail:
        high = found[1]
    return low, high
