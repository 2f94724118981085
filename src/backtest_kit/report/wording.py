"""The label and format of each statistic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from backtest_kit.format import minutes, negated_percent, percent, plain, ratio, share, signed_percent
from backtest_kit.report.statistics import Statistics


class Line(NamedTuple):
    """One statistic of a report."""

    label: str
    field: str
    text: Callable[[Any], str]
    short: str
    """Heading of its column in a table; it carries the unit, the cells do not."""
    neutral: float | None = None
    """The value that is neither good nor bad, if there is one."""
    lower_is_better: bool = False

    def of(self, stats: Statistics) -> str:
        """The statistic with its unit."""
        return self.text(getattr(stats, self.field))

    def cell(self, stats: Statistics) -> str:
        """The statistic without its unit."""
        return self.of(stats).removesuffix(" %")


STATISTIC_LINES: Final = (
    Line("Trades", "total_count", plain, "Trades"),
    Line("Wins", "win_count", plain, "Wins"),
    Line("Losses", "loss_count", plain, "Losses", lower_is_better=True),
    Line("Win rate", "win_rate", percent, "Win rate %", neutral=50),
    Line("Average PnL", "avg_pnl", signed_percent, "Avg PnL %", neutral=0),
    Line("Total PnL", "total_pnl", signed_percent, "Total PnL %", neutral=0),
    Line("Median PnL", "median_pnl", signed_percent, "Median PnL %", neutral=0),
    Line("Standard deviation", "std_dev", percent, "Std dev %", lower_is_better=True),
    Line("Sharpe ratio", "sharpe_ratio", ratio, "Sharpe", neutral=0),
    Line("Annualized Sharpe ratio", "annualized_sharpe_ratio", ratio, "Annual Sharpe", neutral=0),
    Line("Sortino ratio", "sortino_ratio", ratio, "Sortino", neutral=0),
    Line("Calmar ratio", "calmar_ratio", ratio, "Calmar", neutral=0),
    Line("Recovery factor", "recovery_factor", ratio, "Recovery", neutral=0),
    Line("Certainty ratio", "certainty_ratio", ratio, "Certainty", neutral=1),
    Line("Profit factor", "profit_factor", ratio, "Profit factor", neutral=1),
    Line("Expectancy", "expectancy", signed_percent, "Expectancy %", neutral=0),
    Line("Expected yearly returns", "expected_yearly_returns", signed_percent, "Yearly %", neutral=0),
    Line("Equity at the end", "equity_final", ratio, "Equity", neutral=1),
    Line("Max drawdown", "max_drawdown", negated_percent, "Max DD %", neutral=0, lower_is_better=True),
    Line("Span (days)", "span_days", minutes, "Days"),
    Line("Trades per year", "trades_per_year", minutes, "Trades/year"),
    Line("Average win", "avg_win", signed_percent, "Avg win %"),
    Line("Average loss", "avg_loss", signed_percent, "Avg loss %"),
    Line("Longest win streak", "max_win_streak", plain, "Win streak"),
    Line("Longest loss streak", "max_loss_streak", plain, "Loss streak", lower_is_better=True),
    Line("Average win streak PnL", "avg_consecutive_win_pnl", signed_percent, "Win streak %"),
    Line("Average loss streak PnL", "avg_consecutive_loss_pnl", signed_percent, "Loss streak %"),
    Line("Average peak PnL", "avg_peak_pnl", signed_percent, "Avg peak %"),
    Line("Average fall PnL", "avg_fall_pnl", signed_percent, "Avg fall %"),
    Line("Highest peak PnL", "peak_profit_pnl", signed_percent, "Peak %"),
    Line("Deepest fall PnL", "max_drawdown_pnl", signed_percent, "Fall %"),
    Line("Average duration (min)", "avg_duration", minutes, "Avg min"),
    Line("Average win duration (min)", "avg_win_duration", minutes, "Avg win min"),
    Line("Average loss duration (min)", "avg_loss_duration", minutes, "Avg loss min"),
)
"""Every statistic except the price profile, which needs a single market."""

PROFILE_LINES: Final = (
    Line("Trend", "trend", plain, "Trend"),
    Line("Trend strength per day", "trend_strength", signed_percent, "Trend %/day", neutral=0),
    Line("Trend confidence (R²)", "trend_confidence", ratio, "Trend R²"),
    Line("Median step", "median_step_size", percent, "Step %"),
    Line("Buyer pressure", "buyer_pressure", share, "Buyers %"),
    Line("Seller pressure", "seller_pressure", share, "Sellers %"),
    Line("Buyer strength", "buyer_strength", share, "Buyer strength %"),
    Line("Seller strength", "seller_strength", share, "Seller strength %"),
    Line("Pressure imbalance", "pressure_imbalance", ratio, "Imbalance", neutral=0),
)

STATISTICS: Final = {line.field: line for line in (*STATISTIC_LINES, *PROFILE_LINES)}
"""Every statistic by its field name."""
