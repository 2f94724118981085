"""A comparison of strategies as Markdown and as one HTML page."""

from __future__ import annotations

from typing import Any, Final

from backtest_kit.format import NOT_AVAILABLE
from backtest_kit.report.ranking import Ranking, metric_line
from backtest_kit.report.render.drawing import drawable_number, equity_points, grid_over
from backtest_kit.report.render.markdown import escaped, table_lines
from backtest_kit.report.render.page import heat_content, render_page, table_content

_POINTS: Final = 1000
_FEWER_POINTS: Final = 250
_MANY: Final = 20
"""With more curves than this, each has fewer points: the chart shows no more detail."""


def render_comparison(comparison: Ranking) -> str:
    title, where = comparison.heading()
    lines = [f"# {escaped(title)}", "", escaped(where), "", *table_lines(comparison.ranked_table(), texts=2), ""]
    for remark in comparison.remarks():
        lines += [f"{escaped(remark)}.", ""]
    if comparison.failures():
        lines += [*(f"- {escaped(failure)}" for failure in comparison.failures()), ""]
    heat = comparison.heat_map()
    if heat.table.rows:
        lines += ["## Statistics", "", *table_lines(heat.table)]
    return "\n".join(lines).rstrip("\n") + "\n"


def render_comparison_page(comparison: Ranking) -> str:
    return render_page("comparison", comparison.heading()[0], _content(comparison))


def _content(comparison: Ranking) -> dict[str, Any]:
    title, where = comparison.heading()
    line = metric_line(comparison.metric)
    valued = [each for each in comparison if each.value is not None]
    best = comparison.best
    return {
        "title": title,
        "where": where,
        "remarks": comparison.remarks(),
        "failures": comparison.failures(),
        "cards": [
            ("Best strategy", best.strategy_name if best else NOT_AVAILABLE),
            (line.label, line.of(best.results.stats) if best else NOT_AVAILABLE),
            ("Compared", str(len(comparison))),
            ("Ranked", str(len(valued))),
        ],
        "ranked": table_content(comparison.ranked_table()),
        "names": [each.strategy_name for each in comparison],
        "metric": line.label,
        "bars": [(drawable_number(each.value or 0.0), line.of(each.results.stats)) for each in valued],
        "heat": heat_content(comparison.heat_map()),
        "curves": _curves(comparison),
    }


def _curves(comparison: Ranking) -> dict[str, Any] | None:
    """One curve per contender, in order of rank; empty for one that did not trade."""
    most = _POINTS if len(comparison) <= _MANY else _FEWER_POINTS
    grid = grid_over((result for each in comparison for result in each.results), most)
    if grid is None:
        return None
    everything = [each.results.trades for each in comparison]
    return {
        "start": grid.start_ms // 1000,
        "step": grid.step_ms // 1000,
        "lines": [equity_points(trades, grid).equity if trades else [] for trades in everything],
    }
