"""Candles into files that the sources read back."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from backtest_kit import arrow
from backtest_kit.errors import UserError
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.persist.atomic import write_atomic

_CSV: Final = ".csv"


def save(candles: CandleSeries, path: str | Path) -> Path:
    """Write candles to a `.csv`, `.parquet`, `.feather` or `.arrow` file and return its path.

    All but `.csv` need the extra `arrow`. A file of that name is replaced.

    Raises:
        UserError: the suffix is another one, or pyarrow is not installed.
        OutOfSpace, RetryLater: the file could not be written; the one before it is untouched.
    """
    path = Path(path)
    if path.suffix == _CSV:
        rows = zip(*(column.tolist() for column in candles.columns().values()), strict=True)
        text = "\n".join([",".join(COLUMNS), *(",".join(map(repr, row)) for row in rows)]) + "\n"
        write_atomic(path, text.encode())
    elif path.suffix in arrow.SUFFIXES:
        columns = candles.columns() | {"timestamp": candles.timestamp.astype("datetime64[ms]")}
        write_atomic(path, arrow.dump_table(columns, path.suffix))
    else:
        raise UserError(f"{path} has the suffix {path.suffix!r}: use one of {', '.join((_CSV, *arrow.SUFFIXES))}")
    return path
