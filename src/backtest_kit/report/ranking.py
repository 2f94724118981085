"""`Ranking`: several strategies on the same candles, ranked by one statistic. `Comparison` adds the ways to show it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, overload

import msgspec

from backtest_kit.errors import UserError
from backtest_kit.format import NOT_AVAILABLE
from backtest_kit.report.heatmap import HeatMap, heat_map
from backtest_kit.report.result import Results
from backtest_kit.report.tables import Table, gap_remarks
from backtest_kit.report.wording import STATISTICS, Line

METRICS: Final = tuple(field for field in STATISTICS if field != "trend")
"""The statistics that strategies can be ranked by: every one that is a number."""

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
        UserError: it does not exist, or is not a number.
    """
    if metric not in METRICS:
        raise UserError(f"metric is {metric!r}: use one of {', '.join(METRICS)}")
    return STATISTICS[metric]


class Failure(NamedTuple):
    """Why a strategy has no results: its error, and the symbol."""

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
    """The parameters that `grid` used."""
    failure: Failure | None = None
    value: float | None = None
    """The metric; None if it failed, did not trade, or traded too little."""


class Ranking(Sequence[Contender]):
    """Contenders, the best first; then those without a value, then those that failed.

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
        """Rank `contenders` by `metric`, ignoring the value they have.

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
        """The best contender, if it has a value."""
        return self._contenders[0] if self._contenders and self._contenders[0].value is not None else None

    def heading(self) -> tuple[str, str]:
        """Title, and a line with symbols, exchange and frame."""
        return (
            f"Strategies by {metric_line(self.metric).label}",
            f"{', '.join(self.symbols)}, {self.exchange_name}, {self.frame_name}",
        )

    def ranked_table(self) -> Table:
        """One row per contender; `failures` has the errors of those that failed."""
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
        """The error of each failed contender, a line each."""
        return [f"{each.strategy_name} failed on {each.failure}" for each in self if each.failure]

    def heat_map(self) -> HeatMap:
        """All statistics of the contenders that did not fail."""
        rows = [(each.strategy_name, each.results.stats) for each in self if not each.failure]
        return heat_map("Strategy", rows, None)

    def remarks(self) -> list[str]:
        """Warnings about the ranking, a sentence each."""
        ran = [each for each in self if not each.failure]
        sentences = []
        if len(ran) > 1:
            sentences.append(
                f"The best of {len(ran)} was chosen on the same candles, so its figures are too good: "
                "replay it over another frame before you trust them"
            )
        return sentences + (gap_remarks(ran[0].results) if ran else [])

    def __repr__(self) -> str:
        best = f"best {self.best.strategy_name!r}" if self.best else "none ranked"
        return f"{type(self).__name__}({len(self)} strategies by {self.metric}: {best})"

    def __len__(self) -> int:
        return len(self._contenders)

    @overload
    def __getitem__(self, index: int) -> Contender: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Contender, ...]: ...
    def __getitem__(self, index: int | slice) -> Contender | tuple[Contender, ...]:
        return self._contenders[index]


def _value(contender: Contender, line: Line) -> float | None:
    # A strategy that never traded has the fewest losses of all: it is not ranked.
    if contender.failure or not contender.results.stats.total_count:
        return None
    value: float | None = getattr(contender.results.stats, line.field)
    return value
