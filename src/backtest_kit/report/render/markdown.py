"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from backtest_kit.report.heatmap import symbol_heat_map
from backtest_kit.report.tables import (
    Table,
    heading,
    reason_table,
    remarks,
    statistic_lines,
    summary_table,
    trade_columns,
)
from backtest_kit.report.values import ResultSet, ResultValues

MAX_PRINTED_TRADES: Final = 250
"""How many of the newest trades are printed; the statistics count all."""


def render_markdown(results: ResultSet[ResultValues]) -> str:
    title, where = heading(results)
    lines = [f"# {escaped(title)}", "", escaped(where), "", *table_lines(summary_table(results)), ""]
    for remark in remarks(results):
        lines += [f"{escaped(remark)}.", ""]
    if len(results) > 1:
        lines += ["## Heat map", "", *table_lines(symbol_heat_map(results).table), ""]
    lines += ["## Statistics", ""]
    lines += [f"- **{label}:** {text}" for label, text in statistic_lines(results)]
    lines += ["", "## By close reason", "", *table_lines(reason_table(results.trades)), "", "## Trades", ""]
    lines += _trades(results)
    return "\n".join(lines) + "\n"


def _trades(results: ResultSet[ResultValues]) -> list[str]:
    columns = trade_columns(results)
    printed = results.trades[-MAX_PRINTED_TRADES:]
    left_out = len(results.trades) - len(printed)
    lines = []
    if left_out:
        noun = "trade is" if left_out == 1 else "trades are"
        lines += [f"{left_out} earlier {noun} not printed; the statistics count all {len(results.trades)}.", ""]
    rows = [[column.text(trade) for column in columns] for trade in printed]
    return lines + _grid([column.label for column in columns], [column.numeric for column in columns], rows)


def table_lines(table: Table, *, texts: int = 1) -> list[str]:
    """A table whose first columns, `texts` of them, are left-aligned."""
    total = [[f"**{escaped(cell)}**" for cell in table.total]] if table.total else []
    numeric = [column >= texts for column in range(len(table.header))]
    return _grid(table.header, numeric, table.rows) + [_row(cells) for cells in total]


def _grid(header: Sequence[str], numeric: Sequence[bool], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = _row(["---:" if right else "---" for right in numeric])
    return [_row(header), rule, *(_row([escaped(cell) for cell in row]) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    flat = " ".join(text.splitlines())
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
