from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests import values
from tests.values import make_entry, make_position

from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.identity import Identity
from backtest_kit.model.interval import DAY_MS, MINUTE_MS
from backtest_kit.model.position import CloseReason, Entry, Reduction, Trade
from backtest_kit.model.signal import Direction
from backtest_kit.report import BacktestResult

START = 1_640_995_200_000  # 2022-01-01

MakeTrade = Callable[..., Trade]
MakeResult = Callable[..., BacktestResult]


@pytest.fixture
def make_trade() -> MakeTrade:
    def make(
        *,
        symbol: str = "BTCUSDT",
        strategy_name: str = "trend",
        signal_id: str = "s-1",
        position: Direction = "long",
        price_open: float = 100.0,
        price_close: float = 102.0,
        price_take_profit: float | None = None,
        price_stop_loss: float | None = None,
        original_price_take_profit: float = 102.0,
        original_price_stop_loss: float = 99.0,
        opened_at_ms: int = START + 60 * MINUTE_MS,
        closed_at_ms: int = START + 150 * MINUTE_MS,
        close_reason: CloseReason = "take_profit",
        pnl_pct: float = 1.5,
        pnl_cost: float = 1.5,
        peak_pct: float = 1.8,
        fall_pct: float = -0.4,
        note: str = "",
        entries: tuple[Entry, ...] = (),
        reductions: tuple[Reduction, ...] = (),
    ) -> Trade:
        identity = Identity(symbol, strategy_name, "binance", "jan-2022", "backtest")
        take, stop = original_price_take_profit, original_price_stop_loss
        entry = make_entry(
            signal_id, position, identity=identity, price=100.0, take=take, stop=stop, at_ms=START, note=note
        )
        held = msgspec.structs.replace(
            make_position(entry, opened_at_ms, entries),
            reductions=reductions,
            moved_take_profit=price_take_profit,
            moved_stop_loss=price_stop_loss,
        )
        trade = values.make_trade(
            held,
            closed_at_ms=closed_at_ms,
            price_close=price_close,
            reason=close_reason,
            pnl_pct=pnl_pct,
            peak_pct=peak_pct,
            fall_pct=fall_pct,
            fees=0.2,
        )
        return msgspec.structs.replace(trade, price_open=price_open, pnl_cost=pnl_cost)

    return make


@pytest.fixture
def make_result(make_trade: MakeTrade) -> MakeResult:
    def make(symbol: str = "BTCUSDT", trades: Sequence[Trade] = (), **changes: Any) -> BacktestResult:
        close = 100 + np.sin(np.arange(720) / 20)
        hours = START + np.arange(720) * 60 * MINUTE_MS
        fields: dict[str, Any] = {
            "symbol": symbol,
            "strategy_name": "trend",
            "exchange_name": "binance",
            "frame_name": "jan-2022",
            "start_ms": START,
            "stop_ms": START + 30 * DAY_MS,
            "trades": tuple(trades),
            "chart": CandleSeries(hours, close, close + 1, close - 1, close + 0.1, np.ones(720)),
        }
        return BacktestResult(**(fields | changes))

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
