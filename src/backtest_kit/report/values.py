"""What a finished backtest returns, as values: `BacktestResult` and `Results` add the ways to show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self, TypeVar, overload

import msgspec

from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.decisions import Decisions
from backtest_kit.model.position import Trade
from backtest_kit.model.setup import Setup
from backtest_kit.report.statistics import Statistics, statistics_of


class ResultValues(msgspec.Struct, frozen=True, kw_only=True, eq=False, dict=True, rename="camel"):
    """One strategy on one market over one frame."""

    symbol: str
    strategy_name: str
    exchange_name: str
    frame_name: str
    start_ms: int
    """Start of the frame."""
    stop_ms: int
    """Last minute of the frame."""
    trades: tuple[Trade, ...]
    """Closed positions, oldest first."""
    chart: CandleSeries
    """The candles of the frame, coarse enough to draw."""
    gaps_filled: Mapping[str, int] = msgspec.field(default_factory=dict)
    """Missing minutes that were filled with flat candles, by symbol; other symbols that were read included."""
    repairs: Mapping[str, Mapping[str, int]] = msgspec.field(default_factory=dict)
    """Rows of the source that were repaired, by symbol and kind of repair: see `model.repairs.REPAIRS`."""
    candles_used: int = 0
    """Minutes that were read, history before the frame included."""
    stopped: bool = False
    """Whether it was stopped before the frame's end; `stop_ms` is then its last minute."""
    candles_fetched: int = 0
    """The minutes that came from the source; the others were in the cache."""
    report_path: Path = Path("dump/backtest")
    """The directory of reports saved without a path."""
    run_id: str = ""
    """The run id of its records: `Backtest.run(..., run_id=...)` with it continues with them."""
    show_note: bool = False
    """Whether reports show the note of each position."""
    decisions: Decisions = msgspec.field(default_factory=Decisions)
    """The outcomes of the calls of `get_signal`."""
    setup: Setup = msgspec.field(default_factory=Setup)
    """The settings, code and candles that it was computed from."""

    @cached_property
    def stats(self) -> Statistics:
        """Statistics of all trades."""
        return statistics_of(self.trades)


R = TypeVar("R", bound=ResultValues, covariant=True)


class ResultSet(Sequence[R]):
    """Several results read together, such as one strategy on nine markets."""

    def __init__(self, results: Iterable[R] = ()) -> None:
        self._results = tuple(results)

    @cached_property
    def trades(self) -> tuple[Trade, ...]:
        """Closed positions of all results, in order of close."""
        together = (trade for result in self._results for trade in result.trades)
        return tuple(sorted(together, key=lambda trade: trade.closed_at_ms))

    @cached_property
    def stats(self) -> Statistics:
        """Statistics of all trades as one series in order of close, not a mean of means."""
        return statistics_of(self.trades)

    def __len__(self) -> int:
        return len(self._results)

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> R | Self:
        return type(self)(self._results[index]) if isinstance(index, slice) else self._results[index]
