"""Events as runs make them, for the tests of what they leave behind."""

from __future__ import annotations

from collections.abc import Sequence

from tests.records.conftest import MINUTE_MS, NOON_MS
from tests.values import make_entry, make_position, make_trade

import backtest_kit as bk

IDENTITY = bk.Identity("BTCUSDT", "trend", "binance", "", "live")


def opened(signal_id: str, minute: int = 0, identity: bk.Identity = IDENTITY) -> bk.PositionOpened:
    when_ms = NOON_MS + minute * MINUTE_MS
    position = make_position(make_entry(signal_id, identity=identity, cost=50.0, at_ms=when_ms))
    return bk.PositionOpened(identity=identity, when_ms=when_ms, price=100.0, position=position)


def closed(
    signal_id: str, minute: int = 1, identity: bk.Identity = IDENTITY, pnl_pct: float = 9.5
) -> bk.PositionClosed:
    when_ms = NOON_MS + minute * MINUTE_MS
    position = make_position(make_entry(signal_id, identity=identity, cost=50.0, at_ms=NOON_MS))
    trade = make_trade(position, closed_at_ms=when_ms, pnl_pct=pnl_pct)
    return bk.PositionClosed(identity=identity, when_ms=when_ms, price=110.0, trade=trade)


async def observe(kit: bk.Kit, events: Sequence[bk.Event], run_id: str | None = None) -> None:
    await kit.records.of_run(events[0].identity, run_id).observe(events)
