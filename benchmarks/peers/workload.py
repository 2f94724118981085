"""What every system of `replay.py` is given, and how it is asked. Needs numpy alone.

Nine symbols, 30 days of 1-minute candles each: a geometric walk from 50,000 with a deviation of 0.0008
per minute, seed 7 + i. Every 15 minutes, when flat: EMA(9) and EMA(21) over the last 50 closed closes,
seeded with the first of the 50; long if the fast one is higher, else short. Take profit 2 %, stop loss 1 %,
at most 24 hours, one position at a time; fee 0.1 % and slippage 0.1 % a side. The first decision is an hour
into the candles, when there are 50 of them.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable

import numpy as np

SYMBOLS = tuple(f"COIN{i}" for i in range(9))
DAYS = 30
MINUTES = DAYS * 24 * 60
MINUTE_MS = 60_000
START_MS = 1_704_067_200_000
FIRST_DECISION = 60
EVERY = 15
LOOKBACK = 50
TAKE_PCT, STOP_PCT, HOURS, FEE_PCT, SLIPPAGE_PCT = 2.0, 1.0, 24, 0.1, 0.1
FIELDS = ("open", "high", "low", "close", "volume")


def candles(i: int, minutes: int = MINUTES) -> dict[str, np.ndarray]:
    """The columns of symbol i; row r opens r minutes after START_MS."""
    rng = np.random.default_rng(7 + i)
    close = 50_000 * np.exp(np.cumsum(rng.normal(0, 0.0008, minutes)))
    open_ = np.concatenate(([50_000.0], close[:-1]))
    wicks = np.abs(rng.normal(0, 0.0004, (2, minutes)))
    return {
        "open": open_,
        "high": np.maximum(open_, close) * (1 + wicks[0]),
        "low": np.minimum(open_, close) * (1 - wicks[1]),
        "close": close,
        "volume": rng.uniform(1, 100, minutes),
    }


def ema_weights(span: int) -> np.ndarray:
    """What each of the 50 closes weighs in an EMA that is seeded with the first of them."""
    alpha = 2 / (span + 1)
    weights = alpha * (1 - alpha) ** np.arange(LOOKBACK - 1, -1, -1.0)
    weights[0] /= alpha
    return weights


FAST_LESS_SLOW = ema_weights(9) - ema_weights(21)
"""The closes times these: above 0 where the fast average is the higher one."""


def serve(run: Callable[[], tuple[int, Callable[[], object]]]) -> None:
    """Answer each line on stdin with one timed run. `run` returns its trades and what makes its statistics."""
    for _ in sys.stdin:
        started = time.perf_counter()
        trades, statistics = run()
        replayed = time.perf_counter()
        statistics()
        ended = time.perf_counter()
        answer = {
            "seconds": replayed - started,
            "with_statistics": ended - started,
            "trades": trades,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(json.dumps(answer), flush=True)
