"""Closed positions as a data frame: the only file that knows pandas and polars."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from backtest_kit.errors import UserError
from backtest_kit.model.position import Trade

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

PandasFrame: TypeAlias = "pd.DataFrame"
PolarsFrame: TypeAlias = "pl.DataFrame"

_TEXT: Final = "text"
_TIME: Final = "time"
_FLOAT: Final = "float"

COLUMNS: Final = {
    "signal_id": _TEXT,
    "symbol": _TEXT,
    "position": _TEXT,
    "opened_at": _TIME,
    "closed_at": _TIME,
    "price_open": _FLOAT,
    "price_close": _FLOAT,
    "close_reason": _TEXT,
    "cost": _FLOAT,
    "pnl_pct": _FLOAT,
    "pnl_cost": _FLOAT,
    "peak_pct": _FLOAT,
    "fall_pct": _FLOAT,
}
"""The columns in their order; a time is read from the trade's field of the same name with `_ms`."""


def to_pandas(trades: Sequence[Trade]) -> PandasFrame:
    """One row per trade; `opened_at` and `closed_at` are datetime64[ms, UTC].

    Raises:
        UserError: pandas is not installed.
    """
    pandas = _installed("pandas")
    made: dict[str, Any] = {}
    for name, kind in COLUMNS.items():
        values = _values(trades, name, kind)
        if kind == _TIME:
            made[name] = pandas.Series(np.array(values, dtype="datetime64[ms]")).dt.tz_localize("UTC")
        else:
            made[name] = pandas.Series(values, dtype="str" if kind == _TEXT else "float64")
    frame: PandasFrame = pandas.DataFrame(made)
    return frame


def to_polars(trades: Sequence[Trade]) -> PolarsFrame:
    """One row per trade; `opened_at` and `closed_at` are Datetime("ms", "UTC").

    Raises:
        UserError: polars is not installed.
    """
    polars = _installed("polars")
    stored = {_TEXT: polars.String, _TIME: polars.Int64, _FLOAT: polars.Float64}
    frame: PolarsFrame = polars.DataFrame(
        {name: _values(trades, name, kind) for name, kind in COLUMNS.items()},
        schema={name: stored[kind] for name, kind in COLUMNS.items()},
    )
    times = [name for name, kind in COLUMNS.items() if kind == _TIME]
    return frame.with_columns(polars.col(times).cast(polars.Datetime("ms", "UTC")))


def _values(trades: Sequence[Trade], name: str, kind: str) -> list[Any]:
    field = f"{name}_ms" if kind == _TIME else name
    return [getattr(trade, field) for trade in trades]


def _installed(package: str) -> ModuleType:
    try:
        if package == "pandas":
            import pandas

            return pandas
        import polars
    except ImportError as error:
        raise UserError(f"{package} is not installed: pip install 'backtest-kit[{package}]'") from error
    return polars
