"""Candles from Parquet, Feather and Arrow IPC files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from backtest_kit.arrow import read_table
from backtest_kit.market.sources.base import CandleSource
from backtest_kit.market.sources.rows import number
from backtest_kit.market.sources.table import SYMBOL, Table, TableSource, bad_cell, find_columns
from backtest_kit.market.sources.times import times_of
from backtest_kit.model.candle import NO_TIME


def parquet(path: str | Path) -> CandleSource:
    """1m candles from a Parquet file; columns as in `csv`. Needs the extra `arrow`."""
    return TableSource(path, _read)


def arrow(path: str | Path) -> CandleSource:
    """1m candles from an Arrow IPC file (`.arrow`, `.feather`, or the stream `.arrows`); columns as in `csv`.

    Needs the extra `arrow`.
    """
    return TableSource(path, _read)


def _read(path: Path) -> Table:
    listed = read_table(path)
    places = find_columns(path, [name for name, _ in listed])
    columns: dict[str, Any] = {}
    complaint = ""
    for name, at in places.items():
        raw = listed[at][1]
        if name == SYMBOL:
            columns[name] = np.asarray(raw, dtype=np.str_)
            continue
        columns[name] = times_of(raw) if name == "timestamp" else _numbers(raw)
        wrong = columns[name] == NO_TIME if name == "timestamp" else ~np.isfinite(columns[name])
        if wrong.any() and not complaint:
            row = int(np.argmax(wrong))
            complaint = bad_cell(path, f"row {row + 1}", listed[at][0], raw[row], number=name != "timestamp")
    return Table.of(path, [columns] if len(columns["timestamp"]) else [], complaint)


def _numbers(values: Any) -> Any:
    if isinstance(values, np.ndarray) and values.dtype.kind in "iuf":
        return values.astype(np.float64)
    return np.array([number(value) for value in values], dtype=np.float64)
