"""Fifty symbols live in one process on a running clock: none misses a minute, all trade as in a backtest."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.live.test_identity import lasting

import backtest_kit as bk
from backtest_kit.market.clock import AcceleratedClock
from backtest_kit.model.interval import MINUTE_MS, to_ms

SYMBOLS = [f"C{number:02}USDT" for number in range(50)]
BEGIN_MS = to_ms("2024-06-01T10:00")
MINUTES = 5
SPEEDS = (30.0, 10.0, 3.0)
"""A minute takes two seconds; where the machine is too busy for that, the whole is played again more slowly."""


async def get_signal(ctx: bk.Context) -> bk.Signal:
    close = (await ctx.candles("1m", 20)).close
    side: Any = "long" if close[-1] >= close.mean() else "short"
    return bk.Signal.bracket(side, price=ctx.price, take_profit_pct=2, stop_loss_pct=2, minutes=3)


async def manage(ctx: bk.Context) -> None:
    if ctx.position is not None and ctx.position.minutes_open == 1:
        await ctx.position.reduce(percent=20)


def kit_at(place: Path, **exchange: Any) -> bk.Kit:
    kit = bk.Kit(place)
    kit.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7), **exchange)
    kit.add_strategy_schema("busy", get_signal=get_signal, manage=manage, interval="1m")
    return kit


@pytest.mark.slow
async def test_fifty_symbols_miss_no_minute_and_trade_as_in_a_backtest(tmp_path: Path) -> None:
    for speed in SPEEDS:
        events = await played(tmp_path / f"{speed:g}", speed)
        missed = [event for event in events if isinstance(event, bk.MinutesMissed)]
        if not missed:
            break
    assert not missed, f"this machine is too slow for {SPEEDS[-1]:g} minutes in a minute: {missed}"
    end_ms = BEGIN_MS + MINUTES * MINUTE_MS
    for symbol in SYMBOLS:
        happened = [event for event in events if event.symbol == symbol]
        expected = await backtested(tmp_path / symbol, symbol)
        assert lasting(happened, end_ms) == expected
        assert {action for action, _ in expected} == {"opened", "changed", "closed"}


async def played(place: Path, speed: float) -> list[bk.Event]:
    clock = AcceleratedClock(BEGIN_MS - 1000, speed)
    kit = kit_at(place, broker=bk.Broker(), clock=clock)
    events: list[bk.Event] = []
    kit.on(bk.Event, events.append)
    where: dict[str, Any] = {"strategy_name": "busy", "exchange_name": "demo"}
    handles = [kit.live.background(symbol, **where) for symbol in SYMBOLS]
    try:
        async with asyncio.timeout((MINUTES + 1) * 60 / speed + 60):
            while any(handle.status.when_ms < BEGIN_MS + MINUTES * MINUTE_MS for handle in handles):
                assert not any(handle.done() for handle in handles)
                await asyncio.sleep(0.05)
    finally:
        for handle in handles:
            handle.cancel()
        await asyncio.gather(*(handle.task for handle in handles), return_exceptions=True)
        await kit.close()
    return events


async def backtested(place: Path, symbol: str) -> list[Any]:
    kit = kit_at(place)
    kit.add_frame_schema("frame", start_date=BEGIN_MS, end_date=BEGIN_MS + MINUTES * MINUTE_MS)
    where: dict[str, Any] = {"strategy_name": "busy", "exchange_name": "demo", "frame_name": "frame"}
    events = [event async for event in kit.backtest.run(symbol, **where)]
    await kit.close()
    return lasting(events, BEGIN_MS + MINUTES * MINUTE_MS)
