"""`Comparison`: what several strategies made of the same candles, ranked by one statistic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, overload

import msgspec

from backtest_kit.errors import UserError
from backtest_kit.report import frames
from backtest_kit.report.heatmap import HeatMap, heat_map
from backtest_kit.report.result import Results, file_name, write_report
from backtest_kit.report.tables import Table, gap_remarks
from backtest_kit.report.wording import NOT_AVAILABLE, STATISTICS, Line

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from backtest_kit.report.frames import PandasFrame, PolarsFrame

METRICS: Final = tuple(field for field in STATISTICS if field != "trend")
"""What strategies can be ranked by: every statistic that is a number."""

_COLUMNS: Final = (
    "total_count",
    "win_rate",
    "avg_pnl",
    "total_pnl",
    "sharpe_ratio",
    "sortino_ratio",
    "max_drawdown",
)


def metric_line(metric: str) -> Line:
    """The statistic of that name.

    Raises:
        UserError: there is none, or it is no number.
    """
    if metric not in METRICS:
        raise UserError(f"metric is {metric!r}: use one of {', '.join(METRICS)}")
    return STATISTICS[metric]


class Failure(NamedTuple):
    """Why a strategy has no results: what it raised, and on which symbol."""

    symbol: str
    error: Exception

    def __str__(self) -> str:
        text = " ".join(str(self.error).split())
        return f"{self.symbol}: {type(self.error).__name__}{': ' if text else ''}{text}"


class Contender(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One strategy of a comparison."""

    strategy_name: str
    results: Results
    """One result per symbol; empty if it failed."""
    parameters: Mapping[str, object] = {}
    """What `grid` made it from."""
    failure: Failure | None = None
    value: float | None = None
    """The metric; None if it failed, did not trade, or traded too little to say."""


class Comparison(Sequence[Contender]):
    """Contenders, the best first; those without a value come after them, and those that failed last.

    Equal values keep the order in which the strategies were given.
    """

    def __init__(
        self,
        contenders: Iterable[Contender],
        *,
        metric: str,
        symbols: Sequence[str],
        exchange_name: str,
        frame_name: str,
        report_path: Path = Path("dump/walker"),
    ) -> None:
        """Rank `contenders` by `metric`, whatever value they brought.

        Raises:
            UserError: the metric is unknown.
        """
        line = metric_line(metric)
        self.metric: Final = metric
        self.symbols: Final = tuple(symbols)
        self.exchange_name: Final = exchange_name
        self.frame_name: Final = frame_name
        self.report_path: Final = report_path
        valued = [msgspec.structs.replace(each, value=_value(each, line)) for each in contenders]
        sign = 1.0 if line.lower_is_better else -1.0
        self._contenders = tuple(
            sorted(valued, key=lambda each: (each.failure is not None, each.value is None, sign * (each.value or 0.0)))
        )

    @property
    def best(self) -> Contender | None:
        """The first, if it has a value."""
        return self._contenders[0] if self._contenders and self._contenders[0].value is not None else None

    def to_pandas(self) -> PandasFrame:
        """A pandas frame with a row per contender, in order of rank.

        Columns: rank (from 1; null without a value), strategy_name, error (null where it did not fail),
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
        """The ranked table, why any strategy failed, and all statistics of each, as Markdown."""
        from backtest_kit.report.markdown import render_comparison

        return render_comparison(self)

    def save_markdown(self, path: str | Path | None = None) -> Path:
        """Write the Markdown report and return where. Blocks on the disk.

        Without a path it is `{report_path}/{frame_name} {metric}.md`.

        Raises:
            UserError: the path is a directory.
            OutOfSpace, RetryLater: it could not be written; what was there before is untouched.
        """
        return self._save(self.to_markdown(), path, ".md")

    def save_html(self, path: str | Path | None = None) -> Path:
        """Write one self-contained page with charts and return where. Blocks on the disk.

        Without a path it is `{report_path}/{frame_name} {metric}.html`.

        Raises:
            UserError, OutOfSpace, RetryLater: as `save_markdown`.
        """
        from backtest_kit.report.html_comparison import render_comparison_page

        return self._save(render_comparison_page(self), path, ".html")

    def heading(self) -> tuple[str, str]:
        """Title, and a line with symbols, exchange and frame."""
        return (
            f"Strategies by {metric_line(self.metric).label}",
            f"{', '.join(self.symbols)}, {self.exchange_name}, {self.frame_name}",
        )

    def ranked_table(self) -> Table:
        """One row per contender; `failures` says of those that failed why."""
        first = metric_line(self.metric)
        lines = [first, *(STATISTICS[field] for field in _COLUMNS if field != self.metric)]
        header = ("Rank", "Strategy", *(line.short for line in lines))
        rows = []
        for rank, each in enumerate(self, 1):
            if each.failure:
                cells = ["failed", *[""] * (len(lines) - 1)]
            else:
                value = NOT_AVAILABLE if each.value is None else first.cell(each.results.stats)
                cells = [value, *(line.cell(each.results.stats) for line in lines[1:])]
            rows.append(("" if each.value is None else str(rank), each.strategy_name, *cells))
        return Table(header, rows)

    def failures(self) -> list[str]:
        """Why each of those that failed did, a line each."""
        return [f"{each.strategy_name} failed on {each.failure}" for each in self if each.failure]

    def heat_map(self) -> HeatMap:
        """All that can be compared of the contenders that did not fail."""
        rows = [(each.strategy_name, each.results.stats) for each in self if not each.failure]
        return heat_map("Strategy", rows, None)

    def remarks(self) -> list[str]:
        """What to know before the ranking is trusted, a sentence each."""
        ran = [each for each in self if not each.failure]
        sentences = []
        if len(ran) > 1:
            sentences.append(
                f"The best of {len(ran)} was picked on the candles it is judged by, so its figures are too good: "
                "replay it over another frame before you believe them"
            )
        return sentences + (gap_remarks(ran[0].results) if ran else [])

    def table(self) -> RichTable:
        """The ranked table for a rich console."""
        from backtest_kit.report.console import rich_table

        return rich_table(self.ranked_table(), self.heading(), texts=2, below=self.failures())

    def __str__(self) -> str:
        from backtest_kit.report.console import plain_text

        return plain_text(self.table())

    def __repr__(self) -> str:
        best = f"best {self.best.strategy_name!r}" if self.best else "none ranked"
        return f"Comparison({len(self)} strategies by {self.metric}: {best})"

    def __len__(self) -> int:
        return len(self._contenders)

    @overload
    def __getitem__(self, index: int) -> Contender: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Contender, ...]: ...
    def __getitem__(self, index: int | slice) -> Contender | tuple[Contender, ...]:
        return self._contenders[index]

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


def _value(contender: Contender, line: Line) -> float | None:
    # A strategy that never traded has the fewest losses of all: it is not ranked.
    if contender.failure or not contender.results.stats.total_count:
        return None
    value: float | None = getattr(contender.results.stats, line.field)
    return value
