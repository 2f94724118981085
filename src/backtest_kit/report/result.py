"""`BacktestResult` and `Results`: what a finished backtest returns."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from backtest_kit.errors import UserError
from backtest_kit.format import signed_percent
from backtest_kit.persist.atomic import write_atomic
from backtest_kit.report import frames
from backtest_kit.report.frames import Frame, PandasFrame, PolarsFrame
from backtest_kit.report.render.markdown import render_markdown
from backtest_kit.report.render.terminal import plain_text, rich_table
from backtest_kit.report.saved import dump_results, load_results
from backtest_kit.report.statistics import Statistics
from backtest_kit.report.tables import by_sharpe, heading, remarks, summary_table
from backtest_kit.report.values import ResultSet, ResultValues

if TYPE_CHECKING:
    from rich.table import Table

_LONGEST_NAME = 150


class BacktestResult(ResultValues, frozen=True, kw_only=True, eq=False, dict=True, rename="camel"):
    """One strategy on one market over one frame."""

    def to_pandas(self) -> PandasFrame:
        """As `Results.to_pandas`, oldest position first."""
        return frames.trades_frame(self.trades).to_pandas()

    def to_polars(self) -> PolarsFrame:
        """As `Results.to_polars`, oldest position first."""
        return frames.trades_frame(self.trades).to_polars()

    def save_trades(self, path: str | Path) -> Path:
        """As `Results.save_trades`, oldest position first."""
        return frames.trades_frame(self.trades).save(path)

    def to_markdown(self) -> str:
        """As `Results.to_markdown`."""
        return Results((self,)).to_markdown()

    def save_markdown(self, path: str | Path | None = None) -> Path:
        """As `Results.save_markdown`."""
        return Results((self,)).save_markdown(path)

    def save_html(self, path: str | Path | None = None) -> Path:
        """As `Results.save_html`."""
        return Results((self,)).save_html(path)

    def save(self, path: str | Path | None = None) -> Path:
        """As `Results.save`."""
        return Results((self,)).save(path)

    def __str__(self) -> str:
        return str(Results((self,)))

    def __repr__(self) -> str:
        return f"BacktestResult({self.strategy_name!r} on {self.symbol!r}: {_in_short(self.stats)})"


class Results(ResultSet[BacktestResult]):
    """Several results read together, such as one strategy on nine markets."""

    def to_pandas(self) -> PandasFrame:
        """A pandas frame with a row per closed position, in order of close.

        Columns: signal_id, symbol, position, opened_at, closed_at, price_open, price_close,
        close_reason, cost, pnl_pct, pnl_cost, peak_pct, fall_pct. Times are aware, in UTC.

        Raises:
            UserError: pandas is not installed.
        """
        return frames.trades_frame(self.trades).to_pandas()

    def to_polars(self) -> PolarsFrame:
        """A polars frame with the rows and columns of `to_pandas`.

        Raises:
            UserError: polars is not installed.
        """
        return frames.trades_frame(self.trades).to_polars()

    def save_trades(self, path: str | Path) -> Path:
        """Write the rows and columns of `to_pandas` to a file and return its path. Blocks on the disk.

        The suffix selects the format: `.csv`, or with the extra `arrow` `.parquet`, `.feather` or `.arrow`.

        Raises:
            UserError: another suffix, or pyarrow is not installed.
            OutOfSpace, RetryLater: it could not be written; an existing file is unchanged.
        """
        return frames.trades_frame(self.trades).save(path)

    def to_markdown(self) -> str:
        """The report as Markdown: the newest 250 trades, statistics of all."""
        return render_markdown(self)

    def save_markdown(self, path: str | Path | None = None) -> Path:
        """Write the Markdown report and return its path. Blocks on the disk.

        Without a path it is `{report_path}/{strategy_name}.md`.

        Raises:
            UserError: the path is a directory, or is needed because the results are of several strategies.
            OutOfSpace, RetryLater: it could not be written; an existing file is unchanged.
        """
        return self._save(self.to_markdown(), path, ".md")

    def save_html(self, path: str | Path | None = None) -> Path:
        """Write one self-contained page with charts and return its path. Blocks on the disk.

        Without a path it is `{report_path}/{strategy_name}.html`.

        Raises:
            UserError: as `save_markdown`.
            OutOfSpace, RetryLater: as `save_markdown`.
        """
        from backtest_kit.report.render.html import render_html  # pages are rarely needed, and slow to import

        return self._save(render_html(self), path, ".html")

    def save(self, path: str | Path | None = None) -> Path:
        """Write the results as one JSON file, for `load`, and return its path. Blocks on the disk.

        Without a path it is `{report_path}/{strategy_name}.json`.

        Raises:
            UserError: as `save_markdown`.
            OutOfSpace, RetryLater: as `save_markdown`.
        """
        return self._save(dump_results(self), path, ".json")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """The results that `save` wrote. Blocks on the disk.

        Raises:
            UserError: the file does not exist, or has no results.
            Damaged: the file was cut, changed, or is of a newer version. It stays as it is.
            RetryLater: it could not be read.
        """
        return cls(load_results(Path(path), BacktestResult))

    def statistics_frame(self) -> Frame:
        """Every statistic of every result, for `.to_pandas()` or `.to_polars()`: the numbers of the heat map.

        Columns: symbol, strategy_name, then the fields of `Statistics`; the best Sharpe ratio first, N/A is null.
        """
        rows = by_sharpe(self)
        return frames.Frame(
            {
                "symbol": (frames.TEXT, [result.symbol for result in rows]),
                "strategy_name": (frames.TEXT, [result.strategy_name for result in rows]),
                **frames.statistics_columns([result.stats for result in rows]),
            }
        )

    def remarks(self) -> list[str]:
        """Warnings about the figures, a sentence each: positions cut off, minutes filled."""
        return remarks(self)

    def table(self) -> Table:
        """One row per result, best Sharpe ratio first, and a total, for a rich console."""
        return rich_table(summary_table(self), heading(self))

    def __str__(self) -> str:
        return plain_text(self.table())

    def __repr__(self) -> str:
        return f"Results({len(self)} results: {_in_short(self.stats)})"

    def _save(self, content: str | bytes, path: str | Path | None, suffix: str) -> Path:
        return write_report(self._default_path(suffix) if path is None else Path(path), content, suffix)

    def _default_path(self, suffix: str) -> Path:
        names = sorted({result.strategy_name for result in self._results})
        if len(names) != 1:
            raise UserError(
                f"the results are of {len(names)} strategies ({', '.join(names) or 'no results'}): "
                "say where to save them with path="
            )
        return self._results[0].report_path / f"{file_name(names[0])}{suffix}"


def write_report(path: Path, content: str | bytes, suffix: str) -> Path:
    """Write a report and return its path.

    Raises:
        UserError: the path is a directory.
        OutOfSpace, RetryLater: it could not be written; an existing file is unchanged.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory: give the name of a file, such as {path / f'report{suffix}'}")
    write_atomic(path, content.encode(errors="backslashreplace") if isinstance(content, str) else content)
    return path


def _in_short(stats: Statistics) -> str:
    return f"{stats.total_count} trades, {signed_percent(stats.total_pnl)}"


def file_name(name: str) -> str:
    """A file name for any text: it never leaves its directory, and no two texts share one."""
    escaped = quote(name, safe=" ", errors="surrogatepass")
    if len(escaped) > _LONGEST_NAME:
        return f"{escaped[:_LONGEST_NAME]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:12]}"
    return escaped.replace(".", "%2E", 1) if escaped.startswith(".") else escaped or "%"
