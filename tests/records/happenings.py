"""Events as runs make them, for the tests of what they leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.records.conftest import MINUTE_MS, NOON_MS

import backtest_kit as bk
from backtest_kit.model.position import Extreme

IDENTITY = bk.Identity("BTCUSDT", "trend", "binance", "", "live")


def opened(signal_id: str, minute: int = 0, identity: bk.Identity = IDENTITY) -> bk.PositionOpened:
    when_ms = NOON_MS + minute * MINUTE_MS
    extreme = Extreme(100.0, when_ms, 0.0, 0.0)
    position = bk.Position(
        **names(signal_id, identity),
        price_open=100.0,
        price_take_profit=110.0,
        price_stop_loss=90.0,
        minutes=60.0,
        scheduled_at_ms=when_ms,
        opened_at_ms=when_ms,
        entries=(bk.Entry(100.0, 50.0, when_ms),),
        peak=extreme,
        fall=extreme,
    )
    return bk.PositionOpened(identity=identity, when_ms=when_ms, price=100.0, position=position)


def closed(
    signal_id: str, minute: int = 1, identity: bk.Identity = IDENTITY, pnl_pct: float = 9.5
) -> bk.PositionClosed:
    when_ms = NOON_MS + minute * MINUTE_MS
    trade = bk.Trade(
        **names(signal_id, identity),
        scheduled_at_ms=NOON_MS,
        opened_at_ms=NOON_MS,
        closed_at_ms=when_ms,
        price_open=100.0,
        price_close=110.0,
        price_take_profit=110.0,
        price_stop_loss=90.0,
        original_price_open=100.0,
        original_price_take_profit=110.0,
        original_price_stop_loss=90.0,
        close_reason="take_profit",
        cost=50.0,
        pnl_pct=pnl_pct,
        pnl_cost=pnl_pct / 2,
        peak_pct=pnl_pct,
        fees=0.1,
        fall_pct=0.0,
        entries=(bk.Entry(100.0, 50.0, NOON_MS),),
    )
    return bk.PositionClosed(identity=identity, when_ms=when_ms, price=110.0, trade=trade)


def names(signal_id: str, identity: bk.Identity) -> dict[str, Any]:
    return {
        "signal_id": signal_id,
        "symbol": identity.symbol,
        "strategy_name": identity.strategy_name,
        "exchange_name": identity.exchange_name,
        "frame_name": identity.frame_name,
        "position": "long",
    }


async def observe(kit: bk.Kit, events: Sequence[bk.Event], run_id: str | None = None) -> None:
    await kit.records.of_run(events[0].identity, run_id).observe(events)
