"""backtesting.py: one symbol after the other. Its fee is its commission, its slippage half its spread."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
from backtesting import Backtest, Strategy
from workload import (
    EVERY,
    FAST_LESS_SLOW,
    FEE_PCT,
    FIRST_DECISION,
    HOURS,
    LOOKBACK,
    SLIPPAGE_PCT,
    START_MS,
    STOP_PCT,
    SYMBOLS,
    TAKE_PCT,
    candles,
    serve,
)

warnings.simplefilter("ignore")  # it warns of open positions at the end and of prices above its cash


class Averages(Strategy):
    def init(self) -> None:
        pass

    def next(self) -> None:
        row = len(self.data) - 1
        if self.position:
            if row - self.trades[0].entry_bar >= HOURS * 60:
                self.position.close()
            return
        if row < FIRST_DECISION - 1 or (row + 1) % EVERY:
            return
        close = np.asarray(self.data.Close[-LOOKBACK:])
        price = close[-1]
        if close @ FAST_LESS_SLOW > 0:
            self.buy(size=1, tp=price * (1 + TAKE_PCT / 100), sl=price * (1 - STOP_PCT / 100))
        else:
            self.sell(size=1, tp=price * (1 - TAKE_PCT / 100), sl=price * (1 + STOP_PCT / 100))


def frame(i: int) -> pd.DataFrame:
    columns = {name.capitalize(): column for name, column in candles(i).items()}
    length = len(columns["Close"])
    return pd.DataFrame(columns, index=pd.date_range(pd.Timestamp(START_MS, unit="ms"), periods=length, freq="min"))


frames = [frame(i) for i in range(len(SYMBOLS))]


def run() -> tuple[int, Callable[[], object]]:
    trades = 0
    for each in frames:
        test = Backtest(
            each,
            Averages,
            cash=10_000_000,
            commission=FEE_PCT / 100,
            spread=SLIPPAGE_PCT / 100,
            trade_on_close=True,
            finalize_trades=True,
        )
        trades += len(test.run()["_trades"])
    return trades, lambda: None  # its statistics are part of its run


serve(run)
