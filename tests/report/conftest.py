from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import DAY_MS, MINUTE_MS
from backtest_kit.model.position import Entry, Trade
from backtest_kit.report import BacktestResult

START = 1_640_995_200_000  # 2022-01-01

MakeTrade = Callable[..., Trade]
MakeResult = Callable[..., BacktestResult]


@pytest.fixture
def make_trade() -> MakeTrade:
    def make(**changes: Any) -> Trade:
        values: dict[str, Any] = {
            "signal_id": "s-1",
            "symbol": "BTCUSDT",
            "strategy_name": "trend",
            "exchange_name": "binance",
            "frame_name": "jan-2022",
            "position": "long",
            "scheduled_at_ms": START,
            "opened_at_ms": START + 60 * MINUTE_MS,
            "closed_at_ms": START + 150 * MINUTE_MS,
            "price_open": 100.0,
            "price_close": 102.0,
            "price_take_profit": 102.0,
            "price_stop_loss": 99.0,
            "original_price_open": 100.0,
            "original_price_take_profit": 102.0,
            "original_price_stop_loss": 99.0,
            "close_reason": "take_profit",
            "cost": 100.0,
            "pnl_pct": 1.5,
            "pnl_cost": 1.5,
            "fees": 0.2,
            "peak_pct": 1.8,
            "fall_pct": -0.4,
            "entries": (Entry(100.0, 100.0, START + 60 * MINUTE_MS),),
        }
        return Trade(**(values | changes))

    return make


@pytest.fixture
def make_result(make_trade: MakeTrade) -> MakeResult:
    def make(symbol: str = "BTCUSDT", trades: Sequence[Trade] = (), **changes: Any) -> BacktestResult:
        close = 100 + np.sin(np.arange(720) / 20)
        hours = START + np.arange(720) * 60 * MINUTE_MS
        values: dict[str, Any] = {
            "symbol": symbol,
            "strategy_name": "trend",
            "exchange_name": "binance",
            "frame_name": "jan-2022",
            "start_ms": START,
            "stop_ms": START + 30 * DAY_MS,
            "trades": tuple(trades),
            "chart": CandleSeries(hours, close, close + 1, close - 1, close + 0.1, np.ones(720)),
        }
        return BacktestResult(**(values | changes))

    return make


@pytest.fixture
def month(make_trade: MakeTrade, make_result: MakeResult) -> Callable[[str, int, int], BacktestResult]:
    """A month of one market: hourly bars of a seeded walk and trades that follow them."""

    def make(symbol: str, seed: int, count: int) -> BacktestResult:
        rng = np.random.default_rng(seed)
        times = START + np.arange(1440) * 30 * MINUTE_MS
        close = 40_000 * np.exp(np.cumsum(rng.normal(0, 0.004, 1440)))
        opened = np.concatenate(([40_000.0], close[:-1]))
        spread = np.abs(rng.normal(0, 0.002, (2, 1440)))
        high, low = np.maximum(opened, close) * (1 + spread[0]), np.minimum(opened, close) * (1 - spread[1])
        chart = CandleSeries(times, opened, high, low, close, rng.random(1440))
        starts = np.sort(rng.choice(1430, size=count, replace=False))
        reasons = ("take_profit", "stop_loss", "time_expired", "closed")
        trades = []
        for number, start in enumerate(starts.tolist()):
            entry, leave, long = float(close[start]), float(close[start + 6]), bool(rng.random() < 0.5)
            pnl = (leave / entry - 1) * (100 if long else -100) - 0.4
            last = number == count - 1
            trades.append(
                make_trade(
                    signal_id=f"{symbol}-{number:04d}",
                    symbol=symbol,
                    position="long" if long else "short",
                    opened_at_ms=int(times[start]) + MINUTE_MS,
                    closed_at_ms=int(times[start + 6]) + MINUTE_MS,
                    price_open=entry,
                    price_close=leave,
                    close_reason="frame_end" if last else reasons[number % 4],
                    pnl_pct=pnl,
                    pnl_cost=pnl,
                    peak_pct=max(pnl, 0.3),
                    fall_pct=min(pnl, -0.3),
                    note=f"note {number}",
                )
            )
        return make_result(symbol, trades, chart=chart, gaps_filled={symbol: 3} if seed == 2 else {})

    return make


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[Path], str]:
    """What a headless Chromium makes of a page: its document once the scripts have run."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom"
    )

    def dom(page: Path) -> str:
        done = subprocess.run(
            [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
            capture_output=True,
            timeout=60,
            check=True,
        )
        return done.stdout.decode()

    return dom
