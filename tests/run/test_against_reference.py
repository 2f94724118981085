"""A month of real candles, traded by the engine and by a few lines that share nothing with it."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest

import backtest_kit as bk

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "nautilus_BTC-PERP_1m_20211231-20220201.csv.gz"
MINUTE = 60_000
START, STOP = 1641038400000, 1643673600000  # 2022-01-01T12:00Z .. 2022-02-01T00:00Z

pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"the real candles of {DATA.name} are not beside the project")


def reference() -> list[tuple[int, int, str, float, float, str]]:
    """The rules in plain Python: no numpy, no skipping, every minute visited."""
    with gzip.open(DATA, "rt") as file:
        rows = {int(row["timestamp"]): row for row in csv.DictReader(file)}
    column = {name: {t: float(row[name]) for t, row in rows.items()} for name in ("high", "low", "close", "volume")}

    def price(t: int) -> float:
        last = [t - k * MINUTE for k in range(5, 0, -1)]
        volume = sum(column["volume"][o] for o in last)
        worth = sum((column["high"][o] + column["low"][o] + column["close"][o]) / 3 * column["volume"][o] for o in last)
        return worth / volume if volume else sum(column["close"][o] for o in last) / 5

    trades: list[tuple[int, int, str, float, float, str]] = []
    held: tuple[int, str, float, float, float] | None = None
    slot = -1
    for t in range(START, STOP + 1, MINUTE):
        p = price(t)
        if held:
            opened, side, entry, take, stop = held
            sign = 1 if side == "long" else -1
            exit_ = None
            if t - opened >= 1440 * MINUTE:
                exit_ = (p, "time_expired")
            elif sign * (p - take) >= 0:
                exit_ = (take, "take_profit")
            elif sign * (p - stop) <= 0:
                exit_ = (stop, "stop_loss")
            elif t == STOP:
                exit_ = (p, "frame_end")
            if exit_:
                trades.append((opened, t, side, entry, *exit_))
                held = None
        elif t // (15 * MINUTE) != slot and t < STOP:
            slot = t // (15 * MINUTE)
            aligned = slot * 15 * MINUTE
            closes = [column["close"][aligned - k * 15 * MINUTE - MINUTE] for k in range(50)]
            distance = (closes[0] / (sum(closes) / 50) - 1) * 100
            if abs(distance) >= 0.5:
                sign = 1 if distance > 0 else -1
                held = (t, "long" if sign > 0 else "short", p, p * (1 + sign * 0.02), p * (1 - sign * 0.01))
    return trades


async def get_signal(ctx: bk.Context) -> bk.Signal | None:
    close = (await ctx.candles("15m", 50)).close
    distance_pct = (close[-1] / close.mean() - 1) * 100
    if abs(distance_pct) < 0.5:
        return None
    position = "long" if distance_pct > 0 else "short"
    return bk.Signal.bracket(position, price=ctx.price, take_profit_pct=2, stop_loss_pct=1, minutes=1440)  # type: ignore[arg-type]


def test_a_month_of_real_trades_is_the_reference_s(tmp_path: Path) -> None:
    kit = bk.Kit(tmp_path)
    kit.add_exchange_schema("nautilus", source=bk.sources.csv(DATA))
    kit.add_frame_schema("january", start_date=START, end_date=STOP)
    kit.add_strategy_schema("trend", interval="15m", get_signal=get_signal)
    result = kit.backtest.run_sync("BTC-PERP", strategy_name="trend", exchange_name="nautilus", frame_name="january")
    expected = reference()
    assert 40 < len(expected) < 400
    assert [(trade.opened_at_ms, trade.closed_at_ms, trade.side, trade.close_reason) for trade in result.trades] == [
        (opened, closed, side, reason) for opened, closed, side, _, _, reason in expected
    ]
    for trade, (_, _, side, entry, exit_, _) in zip(result.trades, expected, strict=True):
        sign = 1 if side == "long" else -1
        bought, sold = entry * (1 + sign * 0.001), exit_ * (1 - sign * 0.001)
        pct = sign * (sold - bought) / bought * 100 - 0.1 * (1 + sold / bought)
        assert trade.price_open == pytest.approx(entry, rel=1e-12)
        assert trade.price_close == pytest.approx(exit_, rel=1e-12)
        assert trade.pnl_pct == pytest.approx(pct, abs=1e-9)
        assert trade.pnl_cost == pytest.approx(pct, abs=1e-9)
    assert {trade.close_reason for trade in result.trades} >= {"take_profit", "stop_loss"}
    assert result.stats.total_pnl == pytest.approx(sum(trade.pnl_pct for trade in result.trades))
