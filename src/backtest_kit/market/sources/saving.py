"""Candles into files that the sources read back."""

from __future__ import annotations

from pathlib import Path

from backtest_kit.export import export
from backtest_kit.model.candle import CandleSeries


def save(candles: CandleSeries, path: str | Path) -> Path:
    """Write candles to a `.csv`, `.parquet`, `.feather` or `.arrow` file and return its path.

    All but `.csv` need the extra `arrow`. A file of that name is replaced.

    Raises:
        UserError, OutOfSpace, RetryLater: as `export`.
    """
    return export(path, candles.columns() | {"timestamp": candles.timestamp.astype("datetime64[ms]")})
