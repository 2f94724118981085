"""`CandleCache`: candles of a store on another machine, kept in this process. A candle that was read never changes."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count

from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import INTERVAL_MS
from backtest_kit.persist.store import SeriesKey

Name = tuple[str, SeriesKey]
"""A namespace and a series in it."""
Read = Callable[[int, int], Awaitable[CandleSeries]]


@dataclass(eq=False, slots=True)
class _Span:
    """Every candle of `[start_ms, stop_ms)`."""

    start_ms: int
    stop_ms: int
    candles: CandleSeries
    used: int = 0
    """When it was last used, by a counter."""


class CandleCache:
    """Unbroken spans of each series, the last used ones; safe to use from several threads."""

    def __init__(self, most: int) -> None:
        """`most` candles are kept in all; a million is about 50 MB."""
        self._most = most
        self._count = 0
        self._spans: dict[Name, list[_Span]] = {}
        self._uses = count()
        self._guard = threading.Lock()

    async def read(self, name: Name, start_ms: int, stop_ms: int, read: Read) -> CandleSeries:
        """The candles of a range: `read` is called once, for what is missing between the spans at its two ends."""
        left, right = self._ends(name, start_ms, stop_ms)
        if left is not None and stop_ms <= left.stop_ms:
            return left.candles.between(start_ms, stop_ms)
        first_ms = start_ms if left is None else left.stop_ms
        # Spans can overlap where two tasks read one range at once.
        last_ms = stop_ms if right is None else max(first_ms, right.start_ms)
        fresh = await read(first_ms, last_ms) if first_ms < last_ms else CandleSeries.empty()
        if _is_whole(name, first_ms, last_ms, fresh):
            self._keep(name, left, _Span(first_ms, last_ms, fresh), right)
        before = [] if left is None else [left.candles.between(start_ms, first_ms)]
        after = [] if right is None else [right.candles.between(last_ms, stop_ms)]
        return CandleSeries.concat([*before, fresh, *after])

    def forget(self, namespace: str) -> None:
        """Drop what is kept of a namespace and of those in it."""
        with self._guard:
            for name in [name for name in self._spans if f"{name[0]}/".startswith(f"{namespace}/")]:
                self._count -= sum(len(span.candles) for span in self._spans.pop(name))

    def _ends(self, name: Name, start_ms: int, stop_ms: int) -> tuple[_Span | None, _Span | None]:
        """The span that has, or ends at, the start of a range, and the one that has, or begins at, its end."""
        with self._guard:
            spans = self._spans.get(name, [])
            lefts = [span for span in spans if span.start_ms <= start_ms <= span.stop_ms]
            rights = [span for span in spans if span.start_ms <= stop_ms <= span.stop_ms]
            left = max(lefts, key=lambda span: span.stop_ms, default=None)
            right = min(rights, key=lambda span: span.start_ms, default=None)
            for span in (left, right):
                if span is not None:
                    span.used = next(self._uses)
            return left, right

    def _keep(self, name: Name, left: _Span | None, fresh: _Span, right: _Span | None) -> None:
        """Keep what was read, as one span with those at its ends where that is not too long."""
        first_ms, last_ms = fresh.start_ms, fresh.stop_ms
        before = [] if left is None else [left.candles.between(left.start_ms, first_ms)]
        after = [] if right is None else [right.candles.between(last_ms, right.stop_ms)]
        whole = _Span(
            first_ms if left is None else left.start_ms,
            last_ms if right is None else right.stop_ms,
            CandleSeries.concat([*before, fresh.candles, *after]),
        )
        # One that would drive out all others is read again as well.
        new = next((span for span in (whole, fresh) if 0 < len(span.candles) <= self._most // 2), None)
        if new is None:
            return
        with self._guard:
            for span in [each for each in self._spans.get(name, []) if _has(new, each)]:
                self._drop(name, span)
            self._spans.setdefault(name, []).append(new)
            new.used = next(self._uses)
            self._count += len(new.candles)
            while self._count > self._most:
                everything = [(each, span) for each, spans in self._spans.items() for span in spans]
                self._drop(*min(everything, key=lambda item: item[1].used))

    def _drop(self, name: Name, span: _Span) -> None:
        self._spans[name].remove(span)
        self._count -= len(span.candles)
        if not self._spans[name]:
            del self._spans[name]


def _has(span: _Span, other: _Span) -> bool:
    return span.start_ms <= other.start_ms and other.stop_ms <= span.stop_ms


def _is_whole(name: Name, start_ms: int, stop_ms: int, candles: CandleSeries) -> bool:
    """Whether no candle is missing. What is may come later."""
    step_ms = INTERVAL_MS.get(name[1].interval)
    if step_ms is None:
        return False
    first_ms = -(-start_ms // step_ms) * step_ms
    return len(candles) == max(0, -(-(stop_ms - first_ms) // step_ms))
