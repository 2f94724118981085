"""A report as one HTML page that needs nothing but itself: it opens offline and asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import importlib.util
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from backtest_kit.errors import UserError
from backtest_kit.model.candle import CandleSeries, FloatColumn
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.position import Trade
from backtest_kit.report.statistics import equity_of
from backtest_kit.report.tables import (
    Table,
    heading,
    reason_table,
    remarks,
    result_names,
    statistic_lines,
    summary_table,
    trade_columns,
)
from backtest_kit.report.wording import price, price_decimals, signed_percent

if TYPE_CHECKING:
    from backtest_kit.report.result import BacktestResult, Results

_LIBRARY: Final = "vendor/lightweight-charts.standalone.production.js"
_EQUITY_POINTS: Final = 1000
_LARGEST_DRAWN: Final = 9e13
"""The chart library refuses a larger number."""
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
"""A wide table is read from the left; the other columns follow in their own order."""


def render_html(results: Results) -> str:
    """The page.

    Raises:
        UserError: lwcharts is not installed, whose chart library the page takes in.
    """
    page = importlib.resources.files("backtest_kit.report").joinpath("page.html").read_text(encoding="utf-8")
    library = _chart_library()
    own = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)[-1]
    scripts = " ".join(f"'sha256-{_digest(script)}'" for script in (library, own))
    # The page's only scripts are these two, known by their digest: no text of a strategy can become another.
    policy = f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    parts = {
        "policy": policy,
        "title": html.escape(heading(results)[0]),
        "data": _json(_content(results)),
        "library": library,
    }
    return re.sub(r"\{\{(policy|title|data|library)\}\}", lambda found: parts[found[1]], page)


def _json(content: dict[str, Any]) -> str:
    """JSON that no HTML parser can take for markup."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _chart_library() -> str:
    # Found without an import: lwcharts would import pandas only to say where it keeps a file.
    package = importlib.util.find_spec("lwcharts")
    folders = package.submodule_search_locations if package else None
    for folder in folders or ():
        file = Path(folder) / _LIBRARY
        if file.is_file():
            script = file.read_text(encoding="utf-8")
            return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    raise UserError(f"lwcharts is not installed, or brings no {_LIBRARY}: pip install --upgrade 'lwcharts>=0.3'")


def _content(results: Results) -> dict[str, Any]:
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
    return {
        "title": title,
        "where": where,
        "remarks": remarks(results),
        "cards": [(label, texts[label]) for label in _CARDS],
        "statistics": lines,
        "summary": _table(summary_table(results)),
        "reasons": _table(reason_table(results.trades)),
        "columns": [(column.label, column.numeric) for column in columns],
        "trades": [[column.text(trade) for column in columns] for trade in results.trades],
        "equity": _equity(results),
        "markets": [_market(names[id(result)], result) for result in results],
    }


def _table(table: Table) -> dict[str, Any]:
    return {"header": table.header, "rows": table.rows, "total": table.total}


def _equity(results: Results) -> dict[str, Any] | None:
    """Equity and drawdown in percent at even times; a point shows the deepest drawdown since the one before.

    The chart spaces its points evenly whatever their times, so only even times are drawn to scale.
    """
    curve = equity_of(results.trades)
    if not len(curve.equity):
        return None
    start = min(*(result.start_ms for result in results), int(curve.closed_at_ms[0]))
    stop = max(*(result.stop_ms for result in results), int(curve.closed_at_ms[-1]))
    step = max(1, -(-(stop - start) // (_EQUITY_POINTS * MINUTE_MS))) * MINUTE_MS
    points = -(-(stop - start) // step) + 1
    closed = np.searchsorted(curve.closed_at_ms, start + np.arange(points) * step, side="right")
    equity = np.concatenate(([1.0], curve.equity))
    peak = np.maximum.accumulate(equity)
    with np.errstate(all="ignore"):
        drawdown = ((peak - equity) / peak * 100)[closed]
        np.maximum.at(drawdown, -(-(curve.closed_at_ms - start) // step), curve.drawdown_pct)
    return {
        "start": start // 1000,
        "step": step // 1000,
        "equity": [_drawn((value - 1) * 100) for value in equity[closed].tolist()],
        "drawdown": [_drawn(-value) for value in drawdown.tolist()],
    }


def _drawn(value: float) -> float | None:
    return round(value, 4) + 0.0 if abs(value) < _LARGEST_DRAWN else None


def _market(name: str, result: BacktestResult) -> dict[str, Any]:
    chart = _drawable(result.chart)
    seconds = chart.timestamp // 1000
    decimals = price_decimals(float(chart.close[-1])) if len(chart) else 2
    prices = (_significant(column) for column in (chart.open, chart.high, chart.low, chart.close))
    return {
        "name": name,
        "decimals": decimals,
        "candles": list(zip(seconds.tolist(), *prices, strict=True)),
        "trades": [
            _mark(trade, chart) for trade in result.trades if len(chart) and abs(trade.price_close) < _LARGEST_DRAWN
        ],
    }


def _drawable(chart: CandleSeries) -> CandleSeries:
    """Without what the chart library refuses: numbers that are none, and two candles of one second."""
    prices = np.stack((chart.open, chart.high, chart.low, chart.close))
    chart = chart.take((np.abs(prices) < _LARGEST_DRAWN).all(axis=0))
    return chart.take(np.unique(chart.timestamp // 1000, return_index=True)[1])


def _significant(column: FloatColumn) -> list[float]:
    return [float(f"{value:.8g}") for value in column.tolist()]


def _mark(trade: Trade, chart: CandleSeries) -> dict[str, Any]:
    times = (trade.opened_at_ms, trade.closed_at_ms)
    entry, exit_ = np.clip(np.searchsorted(chart.timestamp, times, side="right") - 1, 0, None)
    return {
        "from": int(chart.timestamp[entry]) // 1000,
        "to": int(chart.timestamp[exit_]) // 1000,
        "long": trade.position == "long",
        "exit": trade.price_close,
        "outcome": "gain" if trade.pnl_pct > 0 else "loss" if trade.pnl_pct < 0 else "even",
        "text": f"{trade.position} {price(trade.price_open)} to {price(trade.price_close)}, "
        f"{signed_percent(trade.pnl_pct)}, {trade.close_reason}",
    }
