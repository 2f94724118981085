"""The same candles and strategy in a backtest, on paper and live, on a clock that waits for nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.engine import test_against_reference as engine
from tests.live.bot import Rows
from tests.live.test_identity import lasting

import backtest_kit as bk
from backtest_kit.market.clock import AcceleratedClock
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.venue.client import connect
from backtest_kit.venue.server import VenueServer
from backtest_kit.venue.venue import Venue

MINUTES = 30
SPEEDS = (120.0, 60.0, 20.0)
"""A minute takes half a second; where the machine is too busy for that, the whole is played again more slowly."""


async def get_signal(ctx: bk.Context) -> bk.Signal | None:
    close = (await ctx.candles("1m", 20)).close
    side: Any = "long" if close[-1] >= close.mean() else "short"
    if (ctx.when_ms // MINUTE_MS) % 3:
        return bk.Signal.bracket(side, price=ctx.price, take_profit_pct=0.6, stop_loss_pct=0.6, minutes=4)
    sign = 1 if side == "long" else -1
    limit = ctx.price * (1 - sign * 0.0005)
    return bk.Signal(side, limit * (1 + sign * 0.01), limit * (1 - sign * 0.01), price_open=limit, minutes=5)


async def manage(ctx: bk.Context) -> None:
    if ctx.position is not None and ctx.position.minutes_open == 2:
        await ctx.position.reduce(percent=40)


@pytest.mark.slow
async def test_paper_and_live_on_an_accelerated_venue_trade_as_the_backtest(tmp_path: Path) -> None:
    rows = engine.random_market(4)
    candles, end_ms = Rows(CandleSeries.from_rows(rows)), rows[engine.LEAD][0] + MINUTES * MINUTE_MS
    for speed in SPEEDS:
        events = await played(tmp_path / f"{speed:g}", candles, end_ms, speed)
        missed = [event for happened in events.values() for event in happened if isinstance(event, bk.MinutesMissed)]
        if not missed:
            break
    assert not missed, f"this machine is too slow for {SPEEDS[-1]:g} minutes in a minute: {missed}"
    for mode, happened in events.items():
        begun_ms = next(event.when_ms for event in happened if isinstance(event, bk.Recovered))
        expected = await backtested(tmp_path / f"backtest-{mode}", candles, begun_ms, end_ms)
        assert lasting(happened, end_ms) == expected, mode
        assert {action for action, _ in expected} >= {"opened", "closed", "scheduled", "changed"}


async def played(place: Path, candles: Rows, end_ms: int, speed: float) -> dict[str, list[bk.Event]]:
    """What happens on paper and live, at the same time on one venue."""
    begin_ms = end_ms - MINUTES * MINUTE_MS - 1000
    server = VenueServer(Venue(candles, ("COINUSDT",), AcceleratedClock(begin_ms, speed)))
    await server.start()
    events: dict[str, list[bk.Event]] = {}
    handles = {}
    try:
        for mode in ("paper", "live"):
            venue = connect(server.url)
            kit = bk.Kit(place / mode)
            kit.add_exchange_schema(
                "demo", source=venue.source(), broker=venue.broker(fill_at="reference"), clock=venue.clock(mode)
            )
            kit.add_strategy_schema("trend", get_signal=get_signal, manage=manage, interval="1m")
            kit.on(bk.Event, events.setdefault(mode, []).append)
            handles[mode] = kit.live.background(
                "COINUSDT", strategy_name="trend", exchange_name="demo", paper=mode == "paper", allow_weak=True
            )
            await handles[mode]._run.began.wait()
        async with asyncio.timeout(MINUTES * 60 / speed + 60):
            while any(handle.status.when_ms < end_ms for handle in handles.values()):
                assert not any(handle.done() for handle in handles.values())
                await asyncio.sleep(0.05)
    finally:
        for handle in handles.values():
            handle.cancel()
        await asyncio.gather(*(handle.task for handle in handles.values()), return_exceptions=True)
        await server.stop()
    return events


async def backtested(place: Path, candles: Rows, start_ms: int, end_ms: int) -> list[Any]:
    kit = bk.Kit(place)
    kit.add_exchange_schema("demo", source=candles)
    kit.add_frame_schema("frame", start_date=start_ms, end_date=end_ms)
    kit.add_strategy_schema("trend", get_signal=get_signal, manage=manage, interval="1m")
    where: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "demo", "frame_name": "frame"}
    return lasting([event async for event in kit.backtest.run("COINUSDT", **where)], end_ms)
