"""A start whose exchange has no candles yet: nothing is decided, and the venue is looked at all the same."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.live.rig import START, WHERE, Rig, UntilClock
from tests.live.scenario import get_candles

import backtest_kit as bk
from backtest_kit.model.interval import MINUTE_MS

AWAY = 5
"""Minutes after the start until candles are there."""


@pytest.fixture
def rig(memory_rig: Rig) -> Rig:
    """One that has traded two minutes."""
    memory_rig.source = bk.sources.function(get_candles)
    memory_rig.strategy = {"get_signal": once, "interval": "1m"}
    return memory_rig


def once(ctx: bk.Context) -> bk.Signal | None:
    if ctx.when_ms > START:
        return None
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=20, stop_loss_pct=10)


class Start:
    """A second life of a rig, without candles for its first minutes."""

    def __init__(self, rig: Rig) -> None:
        rig.now_ms += 10 * MINUTE_MS  # whose candles nobody has stored
        self.rig, self.began_ms = rig, rig.now_ms
        self.clock = UntilClock(rig.now_ms, rig.now_ms + 8 * MINUTE_MS)
        self.checked: list[int] = []

    def minute(self) -> int:
        return (self.clock.now_ms() - self.began_ms) // MINUTE_MS

    async def candles(self, symbol: str, interval: str, since_ms: int, limit: int) -> list[list[float]]:
        if self.minute() < AWAY:
            raise ConnectionError("the exchange is away")
        return await get_candles(symbol, interval, since_ms, limit)

    def check(self, held: Any) -> None:
        self.checked.append(self.minute())

    async def run(self, **options: Any) -> bk.LiveStatus:
        rig = self.rig
        rig.source = bk.sources.function(self.candles)
        rig.venue.check = rig.venue.check or self.check
        rig.events.clear()
        handle = rig.kit(self.clock).live.background("BTCUSDT", **WHERE, **options)
        over = asyncio.ensure_future(self.clock.over.wait())
        await asyncio.wait({over, handle.task}, return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        status = handle.status
        assert not handle.done()
        handle.cancel()
        await asyncio.wait({handle.task})
        return status

    def minutes_of(self, *kinds: type[bk.Event]) -> list[int]:
        return [(event.when_ms - self.began_ms) // MINUTE_MS for event in self.rig.of(*kinds)]


async def test_what_is_held_is_checked_every_minute_and_gets_its_stop(rig: Rig) -> None:
    await rig.trade(2)
    rig.venue.held = [bk.VenuePosition(symbol="BTCUSDT", direction="long", quantity=1.0)]
    start = Start(rig)
    status = await start.run(orphans="protect")
    assert start.checked == [*range(AWAY), *range(AWAY, 9)]
    assert rig.venue.sent("move_stop")
    assert start.minutes_of(bk.OrphanFound)[0] == 0
    (recovered,) = rig.of(bk.Recovered)
    assert recovered.position is not None
    assert "the exchange has no candles yet, so nothing is decided" in recovered.steps
    assert start.minutes_of(bk.Recovered) == [0]
    (missed,) = rig.of(bk.MinutesMissed)
    assert (missed.first_ms, missed.count, missed.when_ms) == (start.began_ms, AWAY, start.began_ms + AWAY * MINUTE_MS)
    assert "the exchange is away" in missed.reason
    assert status.when_ms == start.began_ms + 8 * MINUTE_MS
    assert status.position is not None


@pytest.mark.parametrize("fault", ["lost_response", "lost_request"])
async def test_a_close_that_was_under_way_is_concluded(rig: Rig, fault: str) -> None:
    closing = False

    async def close(ctx: bk.Context) -> None:
        nonlocal closing
        if ctx.position is not None and not closing:
            closing = True
            await ctx.position.close()

    rig.strategy["manage"] = close
    rig.venue.script["close", 1] = fault
    rig.venue.find_fails = 100
    await rig.trade(3)
    assert closing
    assert len(rig.venue.sent("close")) == 1
    rig.venue.find_fails = 0
    start = Start(rig)
    status = await start.run()
    assert status.position is None
    (trade,) = rig.trades()
    # What the venue had carried out is dated as it was ordered, and the rest is sent at once.
    assert start.minutes_of(bk.PositionClosed) == [-12 if fault == "lost_response" else 0]
    assert 90 < trade.price_close < 110
    assert len(rig.venue.sent("close")) == (1 if fault == "lost_response" else 2)
    assert list(rig.venue.times_done.values()) == [1, 1]


async def test_an_order_to_open_waits_for_its_price(rig: Rig) -> None:
    rig.venue.script["open", 1] = "lost_request"
    await rig.trade(0)
    assert not rig.venue.times_done
    start, sent = Start(rig), []

    def price(order: bk.Order) -> float:
        sent.append(start.minute())
        return order.price

    rig.venue.price = price
    status = await start.run()
    assert sent == [AWAY]
    assert status.position is not None


async def test_what_the_venue_no_longer_holds_is_booked_at_a_price_of_the_market(rig: Rig) -> None:
    await rig.trade(2)
    start = Start(rig)

    def gone(held: Any) -> None:
        raise bk.OrderDeleted("nothing is held, and nobody tells why")

    rig.venue.check = gone
    await start.run()
    (trade,) = rig.trades()
    assert start.minutes_of(bk.PositionClosed) == [AWAY]
    (closed,) = rig.of(bk.PositionClosed)
    assert trade.price_close == closed.price


@pytest.mark.parametrize("orphans", ["adopt", "protect"])
async def test_what_nobody_watches_is_told_at_once_and_seen_to_once_there_is_a_price(rig: Rig, orphans: Any) -> None:
    rig.strategy["get_signal"] = lambda ctx: None
    rig.venue.held = [bk.VenuePosition(symbol="BTCUSDT", direction="long", quantity=1.0)]
    start = Start(rig)
    status = await start.run(orphans=orphans)
    assert start.minutes_of(bk.OrphanFound)[:2] == [0, AWAY]
    assert "there are no candles yet" in rig.of(bk.OrphanFound)[0].next_step
    assert rig.venue.sent("move_stop")
    assert (status.position is not None) == (orphans == "adopt")
    if status.position is not None:
        assert 50 < status.position.stop_loss < 110


async def test_stop_ends_it_once_what_was_left_is_seen_to(rig: Rig) -> None:
    rig.strategy["get_signal"] = lambda ctx: None
    start = Start(rig)
    rig.source = bk.sources.function(start.candles)
    handle = rig.kit(start.clock).live.background("BTCUSDT", **WHERE)
    while not rig.of(bk.Recovered):
        await asyncio.sleep(0)
    await handle.pause()
    handle.stop()
    assert await asyncio.wait_for(asyncio.shield(handle.task), 120) == ()
    assert start.minute() < AWAY
    assert rig.of(bk.Paused)
