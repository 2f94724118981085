"""`Comparison`: several strategies on the same candles, ranked, and the ways to show them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backtest_kit.report import frames
from backtest_kit.report.frames import PandasFrame, PolarsFrame
from backtest_kit.report.ranking import Ranking
from backtest_kit.report.render.comparison import render_comparison, render_comparison_page
from backtest_kit.report.render.terminal import plain_text, rich_table
from backtest_kit.report.result import file_name, write_report

if TYPE_CHECKING:
    from rich.table import Table as RichTable


class Comparison(Ranking):
    """Contenders, the best first; then those without a value, then those that failed."""

    def to_pandas(self) -> PandasFrame:
        """A pandas frame with a row per contender, in order of rank.

        Columns: rank (from 1; null without a value), strategy_name, error (null if it did not fail),
        `param_` and the name of each parameter, then the fields of `Statistics`; N/A is null.

        Raises:
            UserError: pandas is not installed.
        """
        return self._frame().to_pandas()

    def to_polars(self) -> PolarsFrame:
        """A polars frame with the rows and columns of `to_pandas`.

        Raises:
            UserError: polars is not installed.
        """
        return self._frame().to_polars()

    def to_markdown(self) -> str:
        """The ranked table, the errors of failed strategies, and all statistics of each, as Markdown."""
        return render_comparison(self)

    def save_markdown(self, path: str | Path | None = None) -> Path:
        """Write the Markdown report and return its path. Blocks on the disk.

        Without a path it is `{report_path}/{frame_name} {metric}.md`.

        Raises:
            UserError: the path is a directory.
            OutOfSpace, RetryLater: it could not be written; an existing file is unchanged.
        """
        return self._save(self.to_markdown(), path, ".md")

    def save_html(self, path: str | Path | None = None) -> Path:
        """Write one self-contained page with charts and return its path. Blocks on the disk.

        Without a path it is `{report_path}/{frame_name} {metric}.html`.

        Raises:
            UserError, OutOfSpace, RetryLater: as `save_markdown`.
        """
        return self._save(render_comparison_page(self), path, ".html")

    def table(self) -> RichTable:
        """The ranked table for a rich console."""
        return rich_table(self.ranked_table(), self.heading(), texts=2, below=self.failures())

    def __str__(self) -> str:
        return plain_text(self.table())

    def _frame(self) -> frames.Frame:
        parameters = dict.fromkeys(name for each in self for name in each.parameters)
        columns: dict[str, tuple[str, Sequence[Any]]] = {
            "rank": (frames.FLOAT, [None if each.value is None else rank for rank, each in enumerate(self, 1)]),
            "strategy_name": (frames.TEXT, [each.strategy_name for each in self]),
            "error": (frames.TEXT, [str(each.failure) if each.failure else None for each in self]),
        }
        columns |= {f"param_{name}": (frames.ANY, [each.parameters.get(name) for each in self]) for name in parameters}
        stats = [None if each.failure else each.results.stats for each in self]
        return frames.Frame(columns | frames.statistics_columns(stats))

    def _save(self, text: str, path: str | Path | None, suffix: str) -> Path:
        default = self.report_path / f"{file_name(f'{self.frame_name} {self.metric}')}{suffix}"
        return write_report(default if path is None else Path(path), text, suffix)
