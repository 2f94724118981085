"""Where candles come from: files, exchanges, a formula, or a function of the user's own."""

from __future__ import annotations

from backtest_kit.market.sources.base import ANY_RANGE, CandleSource
from backtest_kit.market.sources.ccxt import ccxt
from backtest_kit.market.sources.function import function
from backtest_kit.market.sources.synthetic import synthetic
from backtest_kit.market.sources.table import csv, parquet

__all__ = ["ANY_RANGE", "CandleSource", "ccxt", "csv", "function", "parquet", "synthetic"]
