"""Reports of finished backtests: statistics, data frames, Markdown and one HTML page."""

from backtest_kit.report.result import BacktestResult, Results
from backtest_kit.report.statistics import Statistics, compute_statistics, equity_curve

__all__ = ["BacktestResult", "Results", "Statistics", "compute_statistics", "equity_curve"]
