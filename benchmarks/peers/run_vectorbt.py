"""vectorbt: all symbols in one call, compiled code warm. It has no limit of 24 hours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import vectorbt as vbt
from workload import (
    EVERY,
    FAST_LESS_SLOW,
    FEE_PCT,
    FIRST_DECISION,
    LOOKBACK,
    MINUTES,
    SLIPPAGE_PCT,
    STOP_PCT,
    SYMBOLS,
    TAKE_PCT,
    candles,
    serve,
)

columns = [candles(i) for i in range(len(SYMBOLS))]
frames = {
    name: pd.DataFrame({symbol: each[name] for symbol, each in zip(SYMBOLS, columns, strict=True)})
    for name in ("open", "high", "low", "close")
}


def run() -> tuple[int, Callable[[], object]]:
    close = frames["close"].to_numpy()
    # The signal of a row is filled at its close: the decision knows the candle that has just closed, as ours does.
    rows = np.arange(FIRST_DECISION - 1, MINUTES, EVERY)
    windows = np.lib.stride_tricks.sliding_window_view(close, LOOKBACK, axis=0)[rows - LOOKBACK + 1]
    rising = windows @ FAST_LESS_SLOW > 0
    entries, short_entries = np.zeros(close.shape, dtype=bool), np.zeros(close.shape, dtype=bool)
    entries[rows], short_entries[rows] = rising, ~rising
    portfolio = vbt.Portfolio.from_signals(
        frames["close"],
        entries=entries,
        exits=False,
        short_entries=short_entries,
        short_exits=False,
        open=frames["open"],
        high=frames["high"],
        low=frames["low"],
        sl_stop=STOP_PCT / 100,
        tp_stop=TAKE_PCT / 100,
        upon_opposite_entry="ignore",
        size=100.0,
        size_type="value",
        init_cash=100_000.0,
        freq="1min",
        fees=FEE_PCT / 100,
        slippage=SLIPPAGE_PCT / 100,
    )
    return len(portfolio.trades.records), lambda: portfolio.stats(agg_func=None)


serve(run)
