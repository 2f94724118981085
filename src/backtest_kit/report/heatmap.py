"""A heat map: names down, statistics across, each cell tinted by how good it is within its column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from backtest_kit.report.statistics import Statistics
from backtest_kit.report.tables import Table, by_sharpe, result_names
from backtest_kit.report.values import ResultSet, ResultValues
from backtest_kit.report.wording import STATISTICS, Line

HEAT_FIELDS: Final = (
    "total_pnl",
    "sharpe_ratio",
    "annualized_sharpe_ratio",
    "sortino_ratio",
    "calmar_ratio",
    "recovery_factor",
    "certainty_ratio",
    "profit_factor",
    "expectancy",
    "expected_yearly_returns",
    "win_rate",
    "avg_win",
    "avg_loss",
    "median_pnl",
    "max_drawdown",
    "avg_peak_pnl",
    "avg_fall_pnl",
    "max_win_streak",
    "max_loss_streak",
    "avg_duration",
    "trades_per_year",
    "total_count",
)


class HeatMap(NamedTuple):
    """A table and a score for each cell of its rows: -1 to 1, None if unknown."""

    table: Table
    tones: list[list[float | None]]


def heat_map(corner: str, rows: Sequence[tuple[str, Statistics]], total: tuple[str, Statistics] | None) -> HeatMap:
    """Score `rows` in their order; `corner` is the heading of the names."""
    lines = [STATISTICS[field] for field in HEAT_FIELDS]
    columns = [_tones(line, [getattr(stats, line.field) for _, stats in rows]) for line in lines]
    table = Table(
        (corner, *(line.short for line in lines)),
        [_row(name, stats, lines) for name, stats in rows],
        _row(*total, lines) if total else None,
    )
    return HeatMap(table, [list(tones) for tones in zip(*columns, strict=True)])


def symbol_heat_map(results: ResultSet[ResultValues]) -> HeatMap:
    """One row per result, best Sharpe ratio first, and the statistics of all trades as one series."""
    names = result_names(results)
    rows = [(names[id(result)], result.stats) for result in by_sharpe(results)]
    return heat_map("Symbol", rows, ("Pooled", results.stats))


def _row(name: str, stats: Statistics, lines: Sequence[Line]) -> tuple[str, ...]:
    return (name, *(line.cell(stats) for line in lines))


def _tones(line: Line, values: Sequence[Any]) -> list[float | None]:
    """The distance from the neutral value, relative to the largest one of the column."""
    if line.neutral is None:
        return [None] * len(values)
    sign = -1 if line.lower_is_better else 1
    distances = [
        None if value is None or not math.isfinite(value) else sign * (value - line.neutral) for value in values
    ]
    largest = max((abs(each) for each in distances if each is not None), default=0.0)
    return [None if each is None else round(each / largest, 3) if largest else 0.0 for each in distances]
