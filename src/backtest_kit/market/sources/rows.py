"""Raw rows as columns, with any content of the cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from backtest_kit.model.candle import COLUMNS, NO_TIME, CandleSeries, TimeColumn

_LATEST_MS: Final = 2**53


def series_of(rows: Sequence[Sequence[Any]]) -> CandleSeries:
    """Columns of rows of (timestamp, open, high, low, close, volume).

    What is not a number becomes NaN, a timestamp that cannot be one NO_TIME; a row that is too short lacks its end.
    The reader of a source decides what becomes of such rows.
    """
    if not rows:
        return CandleSeries.empty()
    try:
        table = np.array(rows, dtype=np.float64)
    except (OverflowError, TypeError, ValueError):
        table = np.array([_numbers(row) for row in rows])
    if table.ndim != 2 or table.shape[1] != len(COLUMNS):
        table = np.array([_numbers(row) for row in rows])
    return CandleSeries(epoch_ms(table[:, 0]), *table.T[1:])


def epoch_ms(times: Any) -> TimeColumn:
    """Epoch milliseconds of numbers: parts of one are moved up, so that nothing is known too early."""
    readable = np.abs(times) < _LATEST_MS
    return np.where(readable, np.ceil(np.where(readable, times, 0.0)), NO_TIME).astype(np.int64)


def number(cell: Any) -> float:
    """The number in a cell, or NaN."""
    try:
        return float(cell)
    except (OverflowError, TypeError, ValueError):
        return float("nan")


def _numbers(row: Any) -> list[float]:
    cells = row if isinstance(row, list | tuple) else ()
    return [number(cells[at]) if at < len(cells) else float("nan") for at in range(len(COLUMNS))]
