"""Reports as data frames: the only module that uses pandas and polars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec
import numpy as np

from backtest_kit.errors import UserError
from backtest_kit.export import export
from backtest_kit.model.position import Trade
from backtest_kit.report.statistics import Statistics

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

PandasFrame: TypeAlias = "pd.DataFrame"
PolarsFrame: TypeAlias = "pl.DataFrame"

TEXT: Final = "text"
TIME: Final = "time"
FLOAT: Final = "float"
ANY: Final = "any"
"""Set by the user: the type is that of the values."""

_OF_TRADES: Final = {
    "signal_id": TEXT,
    "symbol": TEXT,
    "position": TEXT,
    "opened_at": TIME,
    "closed_at": TIME,
    "price_open": FLOAT,
    "price_close": FLOAT,
    "close_reason": TEXT,
    "cost": FLOAT,
    "pnl_pct": FLOAT,
    "pnl_cost": FLOAT,
    "peak_pct": FLOAT,
    "fall_pct": FLOAT,
}
"""The columns in their order; a time is read from the trade's field of the same name with `_ms`, the position from its
side."""


class Frame:
    """A table of values on its way to a data frame library or a file: the kind and the values of each column."""

    def __init__(self, columns: Mapping[str, tuple[str, Sequence[Any]]]) -> None:
        self._columns = dict(columns)

    def to_pandas(self) -> PandasFrame:
        """Times are datetime64[ms, UTC].

        Raises:
            UserError: pandas is not installed.
        """
        pandas = _installed("pandas")
        made: dict[str, Any] = {}
        for name, (kind, values) in self._columns.items():
            if kind == TIME:
                made[name] = pandas.Series(np.array(values, dtype="datetime64[ms]")).dt.tz_localize("UTC")
            elif kind == ANY:
                made[name] = pandas.Series(values, dtype=None if values else "object")
            else:
                made[name] = pandas.Series(values, dtype="str" if kind == TEXT else "float64")
        frame: PandasFrame = pandas.DataFrame(made)
        return frame

    def to_polars(self) -> PolarsFrame:
        """Times are Datetime("ms", "UTC").

        Raises:
            UserError: polars is not installed.
        """
        polars = _installed("polars")
        stored = {TEXT: polars.String, TIME: polars.Int64, FLOAT: polars.Float64}
        made = [
            polars.Series(name, values, strict=False)
            if kind == ANY
            else polars.Series(name, values, dtype=stored[kind])
            for name, (kind, values) in self._columns.items()
        ]
        frame: PolarsFrame = polars.DataFrame(made)
        times = [name for name, (kind, _) in self._columns.items() if kind == TIME]
        return frame.with_columns(polars.col(times).cast(polars.Datetime("ms", "UTC")))

    def save(self, path: str | Path) -> Path:
        """Write a `.csv` file, or with the extra `arrow` a `.parquet`, `.feather` or `.arrow` one. Times are UTC.

        Raises:
            UserError, OutOfSpace, RetryLater: as `export`.
        """
        columns = {
            name: np.array(values, dtype="datetime64[ms]") if kind == TIME else list(values)
            for name, (kind, values) in self._columns.items()
        }
        return export(path, columns)


def trades_frame(trades: Sequence[Trade]) -> Frame:
    """One row per trade."""
    fields = {name: f"{name}_ms" if kind == TIME else name for name, kind in _OF_TRADES.items()} | {"position": "side"}
    return Frame(
        {name: (kind, [getattr(trade, fields[name]) for trade in trades]) for name, kind in _OF_TRADES.items()}
    )


def statistics_columns(rows: Sequence[Statistics | None]) -> dict[str, tuple[str, Sequence[Any]]]:
    """A column per statistic, named as its field; N/A is null, and a row that is None is all null."""
    return {
        name: (TEXT if name == "trend" else FLOAT, [getattr(stats, name, None) for stats in rows])
        for name in (field.name for field in msgspec.structs.fields(Statistics))
    }


def _installed(package: str) -> ModuleType:
    try:
        if package == "pandas":
            import pandas

            return pandas
        import polars
    except ImportError as error:
        raise UserError(f"{package} is not installed: pip install 'backtest-kit[{package}]'") from error
    return polars
