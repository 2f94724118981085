"""Candles that are late, missing or unreadable, and minutes that were slept through."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.live.rig import START, WHERE, Rig, UntilClock, running
from tests.live.scenario import get_candles, prepared

import backtest_kit as bk
from backtest_kit.market.clock import Jump
from backtest_kit.model.interval import MINUTE_MS


async def test_minutes_that_were_slept_through_are_told_and_not_made_up_for(memory_rig: Rig) -> None:
    asked: list[int] = []

    def get_signal(ctx: bk.Context) -> None:
        asked.append((ctx.when_ms - START) // MINUTE_MS)
        if len(asked) == 3:
            clock.advance_to(START + 7 * MINUTE_MS + 20_000)
            jumps.append(Jump(START, 5000))

    memory_rig.strategy = {"get_signal": get_signal, "interval": "1m"}
    clock = UntilClock(START, START + 9 * MINUTE_MS)
    jumps: list[Jump] = [Jump(START, 7000)]  # before the run, and none of its business
    clock.jumps = jumps  # type: ignore[attr-defined]
    handle = memory_rig.kit(clock).live.background("BTCUSDT", **WHERE)
    await clock.over.wait()
    assert handle.status.missed == 4
    handle.cancel()
    await asyncio.wait({handle.task})
    assert asked == [0, 1, 2, 7, 8, 9]
    (missed,) = memory_rig.of(bk.MinutesMissed)
    assert ((missed.first_ms - START) // MINUTE_MS, missed.count) == (3, 4)
    assert [event.by_ms for event in memory_rig.of(bk.ClockJumped)] == [5000]


async def test_a_candle_that_comes_late_is_waited_for_and_one_that_does_not_is_missed(memory_rig: Rig) -> None:
    asked: list[tuple[int, int]] = []
    clock = UntilClock(START, START + 6 * MINUTE_MS)

    async def late(symbol: str, interval: str, since_ms: int, limit: int) -> list[list[float]]:
        rows = await get_candles(symbol, interval, since_ms, limit)
        now_ms = clock.now_ms()
        # The candle of minute 1 comes 20 s late, that of minute 3 after the next.
        late_by = {START + MINUTE_MS: 20_000, START + 3 * MINUTE_MS: 70_000}
        return [row for row in rows if now_ms >= row[0] + MINUTE_MS + late_by.get(int(row[0]), 0)]

    memory_rig.source = bk.sources.function(late)
    memory_rig.strategy = {
        "get_signal": lambda ctx: asked.append(((ctx.when_ms - START) // MINUTE_MS, clock.now_ms() - ctx.when_ms)),
        "interval": "1m",
    }
    handle = memory_rig.kit(clock).live.background("BTCUSDT", **WHERE)
    await clock.over.wait()
    handle.cancel()
    await asyncio.wait({handle.task})
    assert asked == [(0, 0), (1, 0), (2, 20_000), (3, 0), (5, 0), (6, 0)]
    (missed,) = memory_rig.of(bk.MinutesMissed)
    assert "not published" in missed.reason


@pytest.mark.parametrize("stop", [False, True])
async def test_a_minute_without_a_candle_is_watched_at_the_venue_all_the_same(memory_rig: Rig, stop: bool) -> None:
    """Nothing is decided without a price, and what the venue has closed or left undone is seen to."""
    prepared(memory_rig)
    clock = UntilClock(START, START + 12 * MINUTE_MS)

    async def silent(symbol: str, interval: str, since_ms: int, limit: int) -> list[list[float]]:
        rows = await get_candles(symbol, interval, since_ms, limit)
        return [row for row in rows if row[0] < START + 3 * MINUTE_MS]

    def check(held: Any) -> bk.Fill | None:
        asked_at.append((clock.now_ms() - START) // MINUTE_MS)
        return bk.Fill(price=95.0, cost=1, quantity=1, reason="stop_loss") if len(asked_at) == 5 else None

    asked_at: list[int] = []
    memory_rig.source = bk.sources.function(silent)
    memory_rig.strategy["manage"] = None
    memory_rig.venue.check = check
    handle = memory_rig.kit(clock).live.background("BTCUSDT", **WHERE)
    while not memory_rig.of(bk.PositionOpened):
        await asyncio.sleep(0)
    if stop:
        handle.stop()
    over = asyncio.ensure_future(clock.over.wait())
    await asyncio.wait({over, handle.task}, return_when=asyncio.FIRST_COMPLETED)
    over.cancel()
    handle.cancel()
    await asyncio.wait({handle.task})
    assert asked_at == [2, 3, 5, 6, 7]
    (trade,) = memory_rig.trades()
    assert (trade.price_close, trade.close_reason) == (95.0, "stop_loss")
    assert handle.task.cancelled() != stop
    assert len(memory_rig.venue.sent("open")) == 1


@pytest.mark.parametrize("error", [KeyError("openTime"), TypeError("'NoneType' object is not subscriptable")])
@pytest.mark.parametrize("lasts", ["once", "minutes"])
async def test_an_answer_of_the_source_that_its_code_chokes_on_is_a_candle_that_is_missing(
    memory_rig: Rig, error: Exception, lasts: str
) -> None:
    """What is open stays watched, at the venue meanwhile and by its price afterwards."""
    prepared(memory_rig)
    garbled: list[float] = []
    clock = UntilClock(START, START + 9 * MINUTE_MS)

    async def garbling(symbol: str, interval: str, since_ms: int, limit: int) -> list[list[float]]:
        now = (clock.now_ms() - START) / MINUTE_MS
        if not garbled if lasts == "once" and now == 4 else lasts == "minutes" and 4 <= now < 7.5:
            garbled.append(now)
            raise error
        return await get_candles(symbol, interval, since_ms, limit)

    checked: list[int] = []
    memory_rig.venue.check = lambda held: checked.append((clock.now_ms() - START) // MINUTE_MS)
    memory_rig.source = bk.sources.function(garbling)
    memory_rig.strategy["manage"] = None
    handle = memory_rig.kit(clock).live.background("BTCUSDT", **WHERE)
    over = asyncio.ensure_future(clock.over.wait())
    await asyncio.wait({over, handle.task}, return_when=asyncio.FIRST_COMPLETED)
    over.cancel()
    assert garbled
    assert not handle.done()
    assert (handle.status.when_ms - START) // MINUTE_MS == 9
    assert handle.status.position is not None
    handle.cancel()
    await asyncio.wait({handle.task})
    missed = memory_rig.of(bk.MinutesMissed)
    holes = [((event.first_ms - START) // MINUTE_MS, event.count) for event in missed]
    assert holes == ([] if lasts == "once" else [(4, 3)])
    assert all(f"{type(error).__name__}: {error}" in event.reason for event in missed)
    assert set(checked) >= {2, 3, 5, 6, 7, 8, 9}


async def test_an_order_to_open_is_not_sent_without_a_price(memory_rig: Rig) -> None:
    prepared(memory_rig)
    clock = UntilClock(START, START + 9 * MINUTE_MS)

    async def silent(symbol: str, interval: str, since_ms: int, limit: int) -> list[list[float]]:
        rows = await get_candles(symbol, interval, since_ms, limit)
        return [row for row in rows if row[0] < START + MINUTE_MS or clock.now_ms() >= START + 5 * MINUTE_MS]

    memory_rig.source = bk.sources.function(silent)
    memory_rig.venue.script["open", 1] = "lost_request"
    sent: list[int] = []

    def price(order: bk.Order) -> float:
        sent.append((clock.now_ms() - START) // MINUTE_MS)
        return order.price

    memory_rig.venue.price = price
    handle = memory_rig.kit(clock).live.background("BTCUSDT", **WHERE)
    await clock.over.wait()
    handle.cancel()
    await asyncio.wait({handle.task})
    assert [attempt for _, _, attempt in memory_rig.venue.sent("open")][:2] == [0, 1]
    assert sent[0] >= 5
    assert memory_rig.venue.sent("find")


async def test_months_of_minutes_do_not_pile_up(memory_rig: Rig) -> None:
    prepared(memory_rig)
    async with running(memory_rig, 1) as (handle, clock):
        await clock.over.wait()
        history = handle._run.candles._histories["BTCUSDT"]
        clock.advance_to(START + 9 * 1440 * MINUTE_MS)
        for day in range(1, 9):
            await history.extend(START + day * 1440 * MINUTE_MS)
        assert len(history.candles) <= 4 * 1440
        assert history.stop_ms == START + 8 * 1440 * MINUTE_MS
        deep = await history.window("1d", 5, history.stop_ms)
        assert len(deep) == 5
        prices = history.prices
        assert len(prices) == len(history.candles)
