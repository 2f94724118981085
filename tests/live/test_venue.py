"""Live on the simulated exchange, over real sockets."""

from __future__ import annotations

import asyncio
import math
import random
from pathlib import Path
from typing import Any

import pytest
from tests.engine import test_against_reference as engine
from tests.live.rig import START
from tests.live.scenario import SETTINGS, get_candles, get_signal, manage
from tests.live.test_identity import lasting, source_of

import backtest_kit as bk
from backtest_kit.market.clock import SteppedClock
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.venue.client import connect
from backtest_kit.venue.server import VenueServer
from backtest_kit.venue.venue import Venue

MINUTES = 120


async def traded(
    tmp_path: Path, source: Any, start: int, strategy: dict[str, Any], restarts: random.Random, fill_at: Any
) -> list[bk.Event]:
    """Trade to the end of the minutes, in runs that are cancelled when it pleases the dice."""
    venue = Venue(source, ("COINUSDT",), SteppedClock(start))
    server = VenueServer(venue)
    await server.start()
    events: list[bk.Event] = []
    try:
        over = False
        while not over:
            client = connect(server.url)
            kit = bk.Kit(tmp_path / "live")
            kit.set_config(CC_GET_CANDLES_RETRY_COUNT=1, **{**SETTINGS, "CC_MAX_SIGNAL_LIFETIME_MINUTES": math.inf})
            kit.add_exchange_schema(
                "demo", source=client.source(), broker=client.broker(fill_at=fill_at), clock=client.clock()
            )
            kit.add_strategy_schema("trend", **strategy)
            kit.on(bk.Event, events.append)
            handle = kit.live.background("COINUSDT", strategy_name="trend", exchange_name="demo", allow_weak=True)
            stop_ms = handle_until(events, start) + restarts.randint(1, 60) * MINUTE_MS
            while not handle.done() and handle.status.when_ms < min(stop_ms, start + MINUTES * MINUTE_MS):
                await asyncio.sleep(0.002)
            over = handle.status.when_ms >= start + MINUTES * MINUTE_MS
            handle.cancel()
            await asyncio.wait({handle.task})
            if not handle.task.cancelled():
                await handle
            await kit.close()
        return events
    finally:
        await server.stop()


def handle_until(events: list[bk.Event], start: int) -> int:
    return max((event.when_ms for event in events), default=start)


@pytest.mark.parametrize("seed", [901, 902])
async def test_at_reference_prices_the_venue_makes_the_trades_of_the_backtest(tmp_path: Path, seed: int) -> None:
    rows = engine.random_market(seed)
    start, strategy = rows[engine.LEAD][0], engine.RandomStrategy(seed)
    schema: dict[str, Any] = {"get_signal": strategy.get_signal, "interval": strategy.interval}
    kit = bk.Kit(tmp_path / "backtest")
    kit.set_config(**{**SETTINGS, "CC_MAX_SIGNAL_LIFETIME_MINUTES": math.inf})
    kit.add_exchange_schema("demo", source=source_of(rows))
    kit.add_frame_schema("frame", start_date=start, end_date=start + MINUTES * MINUTE_MS)
    kit.add_strategy_schema("trend", **schema)
    expected = [
        event
        async for event in kit.backtest.run("COINUSDT", strategy_name="trend", exchange_name="demo", frame_name="frame")
    ]
    events = await traded(tmp_path, source_of(rows), start, schema, random.Random(seed), "reference")  # noqa: S311
    stop = start + MINUTES * MINUTE_MS
    assert lasting(events, stop) == lasting(expected, stop)
    assert not [event for event in events if isinstance(event, bk.StrategyFailed | bk.OrderFailed | bk.StoreDegraded)]
    assert lasting(expected, stop)


async def test_at_its_own_prices_the_venue_has_the_last_word(tmp_path: Path) -> None:
    schema: dict[str, Any] = {"get_signal": get_signal, "interval": "1m", "manage": manage}
    source = bk.sources.function(get_candles)
    events = await traded(tmp_path, source, START, schema, random.Random(1), "venue")  # noqa: S311
    trades = [event.trade for event in events if isinstance(event, bk.PositionClosed)]
    assert trades
    assert not [event for event in events if isinstance(event, bk.StrategyFailed | bk.StoreDegraded | bk.RunFailed)]
