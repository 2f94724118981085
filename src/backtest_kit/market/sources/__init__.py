"""Where candles come from: files, exchanges, a formula, or a function of the user's own."""

from __future__ import annotations

from backtest_kit.market.sources.arrow_file import arrow, parquet
from backtest_kit.market.sources.base import ANY_RANGE, CandleSource
from backtest_kit.market.sources.ccxt import ccxt
from backtest_kit.market.sources.csv_file import csv
from backtest_kit.market.sources.function import function
from backtest_kit.market.sources.saving import save
from backtest_kit.market.sources.synthetic import synthetic

__all__ = ["ANY_RANGE", "CandleSource", "arrow", "ccxt", "csv", "function", "parquet", "save", "synthetic"]
