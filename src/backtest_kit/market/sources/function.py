"""Candles from a function of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from backtest_kit.errors import BadCandles, UserError
from backtest_kit.market.sources.base import CandleSource
from backtest_kit.market.sources.rows import series_of
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.model.interval import interval_ms

Rows = CandleSeries | Sequence[Mapping[str, Any]] | Sequence[Sequence[float]]
GetCandles = Callable[[str, str, int, int], Awaitable[Rows]]


def function(get_candles: GetCandles) -> CandleSource:
    """Candles from `async def get_candles(symbol, interval, since_ms, limit)`.

    It returns the `limit` closed candles from `since_ms` on, or as many of them as there are: a
    `CandleSeries`, or rows that are dicts with timestamp, open, high, low, close and volume, or
    sequences in that order. Timestamps are open times in epoch ms. Rows outside of the
    requested range are dropped. If bad rows are repaired, the previous minute is requested as well.

    Raises:
        UserError: `get_candles` is not callable.
    """
    if not callable(get_candles):
        raise UserError(f"get_candles is {get_candles!r}: give an async function")
    return FunctionSource(get_candles)


class FunctionSource(CandleSource):
    def __init__(self, get_candles: GetCandles) -> None:
        self._get_candles = get_candles
        self._name = getattr(get_candles, "__qualname__", repr(get_candles))

    async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        limit = (stop_ms - start_ms) // interval_ms(interval)
        pending = self._get_candles(symbol, interval, start_ms, limit)
        if not inspect.isawaitable(pending):
            raise UserError(f"{self._name}() returned {type(pending).__name__}: write it as `async def`")
        return self._series(await pending)

    def _series(self, rows: Any) -> CandleSeries:
        if isinstance(rows, CandleSeries):
            return rows
        if not isinstance(rows, list | tuple):
            raise BadCandles(
                f"{self._name}() returned {type(rows).__name__}: return a CandleSeries or a list of rows "
                f"with {', '.join(COLUMNS)}"
            )
        try:
            return series_of([self._row(row) for row in rows])
        except UserError as error:
            raise BadCandles(f"{self._name}() returned rows that are not candles: {error}") from None

    def _row(self, row: Any) -> Sequence[Any]:
        if isinstance(row, Mapping):
            missing = [name for name in COLUMNS if name not in row]
            if missing:
                raise BadCandles(f"a row lacks {', '.join(missing)}; it has {', '.join(map(str, row))}")
            return [row[name] for name in COLUMNS]
        if isinstance(row, list | tuple) and len(row) == len(COLUMNS):
            return row
        raise BadCandles(f"a row is {row!r:.80}: give a dict, or a sequence of {', '.join(COLUMNS)}")
