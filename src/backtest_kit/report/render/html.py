"""A backtest's report as one HTML page."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from backtest_kit.format import percent, price, signed_percent
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.position import Trade
from backtest_kit.model.price import price_decimals
from backtest_kit.report.heatmap import symbol_heat_map
from backtest_kit.report.render.drawing import (
    LARGEST_DRAWN,
    drawable_candles,
    equity_points,
    grid_over,
    significant,
    significant_number,
)
from backtest_kit.report.render.page import heat_content, render_page, table_content
from backtest_kit.report.tables import (
    heading,
    reason_table,
    remarks,
    result_names,
    statistic_lines,
    summary_table,
    trade_columns,
)
from backtest_kit.report.values import ResultSet, ResultValues

_EQUITY_POINTS: Final = 1000
_CARDS: Final = (
    "Total PnL",
    "Trades",
    "Win rate",
    "Sharpe ratio",
    "Sortino ratio",
    "Profit factor",
    "Max drawdown",
    "Expectancy",
)
_FIRST_COLUMNS: Final = (
    "Symbol",
    "Position",
    "Open Time",
    "Close Time",
    "Duration (min)",
    "Open Price",
    "Close Price",
    "PNL (net)",
    "PNL (USD)",
    "Close Reason",
)
"""The columns that come first in a wide table; the others follow in their own order."""


def render_html(results: ResultSet[ResultValues]) -> str:
    return render_page("backtest", heading(results)[0], _content(results))


def _content(results: ResultSet[ResultValues]) -> dict[str, Any]:
    title, where = heading(results)
    lines = statistic_lines(results)
    texts = dict(lines)
    columns = sorted(
        trade_columns(results),
        key=lambda column: (
            _FIRST_COLUMNS.index(column.label) if column.label in _FIRST_COLUMNS else len(_FIRST_COLUMNS)
        ),
    )
    names = result_names(results)
    rows = {id(trade): row for row, trade in enumerate(results.trades)}
    return {
        "title": title,
        "where": where,
        "remarks": remarks(results),
        "cards": [(label, texts[label]) for label in _CARDS],
        "statistics": lines,
        "summary": table_content(summary_table(results)),
        "heat": heat_content(symbol_heat_map(results)) if len(results) > 1 else None,
        "reasons": table_content(reason_table(results.trades)),
        "columns": [(column.label, column.numeric) for column in columns],
        "trades": [[column.text(trade) for column in columns] for trade in results.trades],
        "equity": _equity(results),
        "markets": [_market(names[id(result)], result, rows) for result in results],
    }


def _equity(results: ResultSet[ResultValues]) -> dict[str, Any] | None:
    grid = grid_over(results, _EQUITY_POINTS)
    if grid is None:
        return None
    points = equity_points(results.trades, grid)
    return {
        "start": grid.start_ms // 1000,
        "step": grid.step_ms // 1000,
        "equity": points.equity,
        "drawdown": points.drawdown,
    }


def _market(name: str, result: ResultValues, rows: dict[int, int]) -> dict[str, Any]:
    chart = drawable_candles(result.chart)
    seconds = chart.timestamp // 1000
    decimals = max(map(price_decimals, chart.close.tolist()), default=2)
    prices = (significant(column) for column in (chart.open, chart.high, chart.low, chart.close))
    return {
        "name": name,
        "decimals": decimals,
        "candles": list(zip(seconds.tolist(), *prices, strict=True)),
        "trades": [
            _mark(trade, chart, rows[id(trade)])
            for trade in result.trades
            if len(chart) and all(abs(level) < LARGEST_DRAWN for level in _prices(trade))
        ],
    }


def _prices(trade: Trade) -> list[float]:
    """Every price in the chart: the levels at the close and as they were set, then all fills."""
    return [
        trade.price_take_profit,
        trade.price_stop_loss,
        trade.original_price_take_profit,
        trade.original_price_stop_loss,
        trade.price_open,
        trade.price_close,
        *(entry.price for entry in trade.entries),
        *(reduction.price for reduction in trade.reductions),
    ]


def _mark(trade: Trade, chart: CandleSeries, row: int) -> dict[str, Any]:
    times = [trade.opened_at_ms, trade.closed_at_ms]
    times += [entry.timestamp for entry in trade.entries] + [reduction.timestamp for reduction in trade.reductions]
    bars = np.clip(np.searchsorted(chart.timestamp, times, side="right") - 1, 0, None)
    opened, closed, *fills = (chart.timestamp[bars] // 1000).tolist()
    entered, reduced = fills[: len(trade.entries)], fills[len(trade.entries) :]
    return {
        "row": row,
        "from": opened,
        "to": closed,
        "long": trade.side == "long",
        "exit": trade.price_close,
        "outcome": "gain" if trade.pnl_pct > 0 else "loss" if trade.pnl_pct < 0 else "even",
        "text": _in_words(trade),
        "added": entered[1:],
        "reduced": [
            (time, significant_number(fill.price)) for time, fill in zip(reduced, trade.reductions, strict=True)
        ],
        "levels": [significant_number(level) for level in _prices(trade)[:5]],
    }


def _in_words(trade: Trade) -> str:
    words = [f"{trade.side} {price(trade.price_open)} to {price(trade.price_close)}"]
    if len(trade.entries) > 1:
        words[0] += f" in {len(trade.entries)} entries"
    words += [f"{percent(each.percent)} out at {price(each.price)}" for each in trade.reductions]
    return ", ".join([*words, signed_percent(trade.pnl_pct), trade.close_reason])
