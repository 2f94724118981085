"""Figures in the form of the chart library: evenly spaced in time, and only numbers that it accepts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

from backtest_kit.model.candle import CandleSeries, FloatColumn
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.position import Trade
from backtest_kit.report.statistics import equity_of
from backtest_kit.report.values import ResultValues

LARGEST_DRAWN: Final = 9e13
"""The chart library refuses larger numbers."""


class Grid(NamedTuple):
    """Evenly spaced times from `start_ms`: the chart spaces its points evenly."""

    start_ms: int
    step_ms: int
    points: int


class EquityPoints(NamedTuple):
    """Equity and drawdown in percent of the account at the start; None if it cannot be drawn."""

    equity: list[float | None]
    drawdown: list[float | None]


def grid_over(results: Iterable[ResultValues], most: int) -> Grid | None:
    """A grid of about `most` points over all frames and all closes; None without a trade."""
    everything = list(results)
    closes = [trade.closed_at_ms for result in everything for trade in result.trades]
    if not closes:
        return None
    start = min(*(result.start_ms for result in everything), min(closes))
    stop = max(*(result.stop_ms for result in everything), max(closes))
    step = max(1, -(-(stop - start) // (most * MINUTE_MS))) * MINUTE_MS
    return Grid(start, step, -(-(stop - start) // step) + 1)


def equity_points(trades: Sequence[Trade], grid: Grid) -> EquityPoints:
    """The equity curve on a grid; a point shows the deepest drawdown since the one before."""
    curve = equity_of(trades)
    closed = np.searchsorted(curve.closed_at_ms, grid.start_ms + np.arange(grid.points) * grid.step_ms, side="right")
    equity = np.concatenate(([1.0], curve.equity))
    peak = np.maximum.accumulate(equity)
    with np.errstate(all="ignore"):
        drawdown = ((peak - equity) / peak * 100)[closed]
        np.maximum.at(drawdown, -(-(curve.closed_at_ms - grid.start_ms) // grid.step_ms), curve.drawdown_pct)
    return EquityPoints(
        [drawable_number((value - 1) * 100) for value in equity[closed].tolist()],
        [drawable_number(-value) for value in drawdown.tolist()],
    )


def drawable_number(value: float) -> float | None:
    return round(value, 4) + 0.0 if abs(value) < LARGEST_DRAWN else None


def drawable_candles(chart: CandleSeries) -> CandleSeries:
    """Without what the chart library refuses: NaN, and two candles of the same second."""
    prices = np.stack((chart.open, chart.high, chart.low, chart.close))
    chart = chart.take((np.abs(prices) < LARGEST_DRAWN).all(axis=0))
    return chart.take(np.unique(chart.timestamp // 1000, return_index=True)[1])


def significant(column: FloatColumn) -> list[float]:
    return [significant_number(value) for value in column.tolist()]


def significant_number(value: float) -> float:
    return float(f"{value:.8g}")
