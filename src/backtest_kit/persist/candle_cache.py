"""`CandleCache`: candles of a store on another machine, kept in this process. A candle that was read never changes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import INTERVAL_MS
from backtest_kit.persist.store import SeriesKey

Name = tuple[str, SeriesKey]
"""A namespace and a series in it."""
Read = Callable[[int, int], Awaitable[CandleSeries]]


class _Span(NamedTuple):
    """Every candle of `[start_ms, stop_ms)`."""

    start_ms: int
    stop_ms: int
    candles: CandleSeries


class CandleCache:
    """One unbroken span of each series, those last asked for first; safe to use from several threads."""

    def __init__(self, most: int) -> None:
        """`most` candles are kept in all; a million is about 50 MB."""
        self._most = most
        self._count = 0
        self._spans: OrderedDict[Name, _Span] = OrderedDict()
        self._guard = threading.Lock()

    async def read(self, name: Name, start_ms: int, stop_ms: int, read: Read) -> CandleSeries:
        """The candles of a range: `read` is asked for the part of it that is not here."""
        span = self._span(name)
        if span is None or stop_ms <= span.start_ms or span.stop_ms <= start_ms or start_ms < span.start_ms:
            fresh = await read(start_ms, stop_ms)
            self._keep(name, start_ms, stop_ms, fresh)
            return fresh
        if stop_ms <= span.stop_ms:
            return span.candles.between(start_ms, stop_ms)
        fresh = await read(span.stop_ms, stop_ms)
        whole = CandleSeries.concat([span.candles, fresh])
        self._keep(name, span.start_ms, stop_ms, whole)
        return whole.between(start_ms, stop_ms)

    def forget(self, namespace: str) -> None:
        """Drop what is kept of a namespace and of those in it."""
        with self._guard:
            for name in [name for name in self._spans if f"{name[0]}/".startswith(f"{namespace}/")]:
                self._count -= len(self._spans.pop(name).candles)

    def _span(self, name: Name) -> _Span | None:
        with self._guard:
            if name in self._spans:
                self._spans.move_to_end(name)
            return self._spans.get(name)

    def _keep(self, name: Name, start_ms: int, stop_ms: int, candles: CandleSeries) -> None:
        step_ms = INTERVAL_MS.get(name[1].interval)
        if step_ms is None:
            return
        first_ms = -(-start_ms // step_ms) * step_ms
        is_whole = len(candles) == max(0, -(-(stop_ms - first_ms) // step_ms))
        # What is missing may come later, and a span that would drive out all others is read again as well.
        if not is_whole or not len(candles) or len(candles) > self._most // 2:
            return
        with self._guard:
            before = self._spans.pop(name, None)
            self._count += len(candles) - (0 if before is None else len(before.candles))
            self._spans[name] = _Span(start_ms, stop_ms, candles)
            while self._count > self._most:
                self._count -= len(self._spans.popitem(last=False)[1].candles)
