"""What the venue holds and nobody watches, and the other way round."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.live.rig import START, WHERE, Rig, UntilClock, Venue

import backtest_kit as bk
from backtest_kit.broker.order_ids import SignalIds
from backtest_kit.model.interval import MINUTE_MS


def held(stop_loss: float | None, direction: Any = "long", quantity: float = 0.5) -> bk.VenuePosition:
    return bk.VenuePosition(
        symbol="BTCUSDT", direction=direction, quantity=quantity, price_open=41_000.0, stop_loss=stop_loss
    )


class Mirror(Venue):
    """Lists what its orders have filled."""

    def __init__(self) -> None:
        super().__init__()
        self.trigger: Callable[[], float | None] = lambda: None
        self.factor = 1.0
        """What it lists of all that was bought; below 0 the other way round."""

    async def holdings(self, symbols: Sequence[str]) -> list[bk.VenuePosition] | None:
        bought = sum(fill.quantity for (kind, _), fill in self.done.items() if kind == "open") * self.factor
        direction = "long" if bought > 0 else "short"
        return [held(self.trigger(), direction, abs(bought))] if bought else []


@pytest.fixture
def idle(memory_rig: Rig) -> Rig:
    memory_rig.strategy["get_signal"] = lambda ctx: None
    return memory_rig


async def test_a_position_that_nobody_watches_is_an_alarm_and_told_once(idle: Rig) -> None:
    idle.venue.held = [held(None)]
    await idle.trade(4)
    (found,) = idle.of(bk.OrphanFound)
    assert (found.what, found.quantity) == ("foreign_position", 0.5)
    assert found.reason == "the exchange holds long 0.5 of BTCUSDT, and this store knows nothing of it"
    assert found.next_step == (
        "nothing is done; nothing is opened on BTCUSDT until then: adopt it (--orphans adopt), "
        "close it by hand, or start with the store that opened it"
    )
    assert not idle.venue.calls


@pytest.mark.parametrize("direction", ["long", "short"])
@pytest.mark.parametrize("stop", [None, 40_000.0])
async def test_a_position_that_nobody_watches_is_adopted(idle: Rig, stop: float | None, direction: str) -> None:
    if direction == "short" and stop is not None:
        stop = 42_000.0
    idle.venue.held = [held(stop, direction)]
    status = (await idle.trade(0, orphans="adopt")).status
    assert status.position is not None
    sign = 1 if direction == "long" else -1
    assert status.position.stop_loss == (stop or 41_000 * (1 - sign * 0.2))
    assert status.position.take_profit == pytest.approx(82_000 - status.position.stop_loss)
    assert status.position.cost == pytest.approx(0.5 * 41_000)
    assert [call[0] for call in idle.venue.calls] == ([] if stop else ["move_stop"])
    assert [type(event) for event in idle.of(bk.OrphanFound, bk.PositionOpened)] == [bk.OrphanFound, bk.PositionOpened]
    idle.venue.held = [held(status.position.stop_loss, direction)]
    after = (await idle.trade(2, orphans="adopt")).status.position
    assert after is not None
    assert after.signal_id == status.position.signal_id


async def test_a_position_that_nobody_watches_is_protected(idle: Rig) -> None:
    idle.venue.held = [held(None)]

    def placed() -> None:
        idle.venue.held = [held(32_800.0)]

    idle.venue.script["move_stop", 1] = placed
    status = (await idle.trade(2, orphans="protect")).status
    assert status.position is None
    assert [call[0] for call in idle.venue.calls] == ["move_stop"]
    assert "32800" in idle.of(bk.OrphanFound)[0].next_step


async def test_a_position_of_ours_that_the_venue_does_not_hold_is_an_alarm(memory_rig: Rig) -> None:
    memory_rig.venue.held = []
    await memory_rig.trade(3)
    assert [event.what for event in memory_rig.of(bk.OrphanFound)] == ["missing_position"]


@pytest.mark.parametrize("policy", ["alarm", "adopt", "protect"])
async def test_a_stop_that_is_left_of_nothing_is_an_alarm_and_told_once(idle: Rig, policy: Any) -> None:
    idle.venue.held = [bk.VenuePosition(symbol="BTCUSDT", direction="long", quantity=0.0, stop_loss=40_000.0)]
    await idle.trade(3, orphans=policy)
    (found,) = idle.of(bk.OrphanFound)
    assert (found.what, found.quantity) == ("left_stop", 0.0)
    assert "cancel it by hand: it would close the next position there" in found.next_step
    assert not idle.venue.calls


async def test_a_position_of_ours_without_a_stop_gets_one(memory_rig: Rig) -> None:
    memory_rig.venue = Mirror()
    memory_rig.strategy["get_signal"] = wide
    status = (await memory_rig.trade(2, orphans="protect")).status
    assert status.position is not None
    assert {event.what for event in memory_rig.of(bk.OrphanFound)} == {"unprotected_position"}
    assert memory_rig.venue.sent("move_stop")


def minutes_of(rig: Rig) -> list[int]:
    """When a stop was placed, as the findings tell."""
    return [(event.when_ms - START) // MINUTE_MS for event in rig.of(bk.OrphanFound) if "stop" in event.next_step]


@pytest.mark.parametrize("foreign", [True, False])
async def test_a_stop_that_the_venue_does_not_show_is_placed_again_and_less_and_less_often(
    memory_rig: Rig, foreign: bool
) -> None:
    memory_rig.strategy["get_signal"] = lambda ctx: None if foreign or ctx.when_ms > START else wide(ctx)
    memory_rig.venue = Venue() if foreign else Mirror()
    memory_rig.venue.held = [held(None)]
    await memory_rig.trade(140, orphans="protect")
    waits = [later - earlier for earlier, later in pairwise(minutes_of(memory_rig))]
    expected = [1, 2, 4, 8, 16, 32, 60]
    assert waits[: len(expected)] == expected[: len(waits)]
    assert len(waits) >= 5
    assert len(memory_rig.venue.sent("move_stop")) == len(memory_rig.of(bk.OrphanFound))


@pytest.mark.parametrize("foreign", [True, False])
async def test_a_stop_that_vanishes_again_is_placed_again_at_once(memory_rig: Rig, foreign: bool) -> None:
    memory_rig.strategy["get_signal"] = lambda ctx: None if foreign or ctx.when_ms > START else wide(ctx)
    memory_rig.venue = venue = Mirror()
    if not foreign:
        await memory_rig.trade(0)
    clock = UntilClock(START + MINUTE_MS, START + 9 * MINUTE_MS)
    kit = memory_rig.kit(clock)
    venue.trigger = lambda: None if (clock.now_ms() - START) // MINUTE_MS in (2, 5, 8) else 30_000.0
    if foreign:

        async def holdings(symbols: Any) -> Any:
            return [held(venue.trigger())]

        venue.holdings = holdings  # type: ignore[method-assign]
    handle = kit.live.background("BTCUSDT", **WHERE, orphans="protect")
    await clock.over.wait()
    handle.cancel()
    await asyncio.wait({handle.task})
    assert [minute for minute in minutes_of(memory_rig) if minute in (2, 5, 8)] == [2, 5, 8]


async def test_nothing_is_adopted_by_a_run_that_is_told_to_stop(memory_rig: Rig) -> None:
    """A position of its own keeps it going; what somebody else opens meanwhile stays his, with a stop."""
    memory_rig.strategy["get_signal"] = lambda ctx: None
    memory_rig.venue.held = []
    clock = UntilClock(START, START + 5 * MINUTE_MS)
    kit = memory_rig.kit(clock)

    asked: list[int] = []

    async def holdings(symbols: Any) -> Any:
        asked.append(clock.now_ms())
        if len(asked) > 1:  # the first time is before the first minute
            handle.stop()
        return [held(None)]

    memory_rig.venue.holdings = holdings  # type: ignore[method-assign]
    handle = kit.live.background("BTCUSDT", **WHERE, orphans="adopt")
    assert await asyncio.wait_for(asyncio.shield(handle.task), 120) == ()
    assert not memory_rig.of(bk.PositionOpened)
    (found,) = memory_rig.of(bk.OrphanFound)
    assert "not adopted" in found.next_step
    assert len(memory_rig.venue.sent("move_stop")) == 1


async def test_a_stop_that_cannot_be_placed_is_told_and_tried_again(idle: Rig) -> None:
    idle.venue.held = [held(None)]
    idle.venue.script["move_stop", 1] = "rejected"
    await idle.trade(3, orphans="protect")
    steps = [event.next_step for event in idle.of(bk.OrphanFound)]
    assert steps[0].startswith("no stop could be placed, it is tried again: insufficient funds; nothing is opened")
    assert "its stop is at" in steps[1]


@pytest.mark.parametrize("orphans", ["alarm", "adopt", "protect"])
@pytest.mark.parametrize("left", ["position", "entry", "order"])
async def test_what_another_strategy_of_the_store_has_is_known_although_its_process_is_gone(
    tmp_path: Path, left: str, orphans: str
) -> None:
    store = bk.MemoryStore()
    first, second = Rig(tmp_path / "first", store), Rig(tmp_path / "second", store)
    first.venue = second.venue = Mirror()
    second.venue.trigger = lambda: 40_000.0
    second.strategy["get_signal"] = lambda ctx: None
    if left == "entry":
        first.strategy["get_signal"] = lambda ctx: bk.Signal(
            "long", ctx.price * 1.1, ctx.price * 0.8, price_open=ctx.price * 0.9
        )
    elif left == "order":
        first.venue.script["open", 0] = "lost_response"
        first.venue.find_fails = 9
    await first.trade(1)
    calls = len(first.venue.calls)
    second.now_ms = START + MINUTE_MS
    handle = await trade_as(second, "mean", 3, orphans=orphans)
    assert not second.of(bk.OrphanFound)
    assert handle.status.position is None
    assert handle.status.no_entry == ""
    assert len(second.venue.calls) == calls


@pytest.mark.parametrize("orphans", ["adopt", "protect"])
@pytest.mark.parametrize(
    ("left", "words"),
    [
        ("position", "strategy trend holds a position of BTCUSDT on demo"),
        ("entry", "strategy trend has a resting entry of BTCUSDT on demo"),
        ("order", "strategy trend has a pending order of BTCUSDT on demo"),
        ("elsewhere", "strategy trend holds a position of BTC-USDT on demo"),
        ("alive", "strategy trend trades BTCUSDT on demo: process"),
    ],
)
async def test_of_more_than_another_strategy_has_nothing_is_done(
    tmp_path: Path, left: str, words: str, orphans: str
) -> None:
    """Two owners of one position would each manage and close it."""
    store = bk.MemoryStore()
    first, second = Rig(tmp_path / "first", store), Rig(tmp_path / "second", store)
    second.venue = first.venue
    second.strategy["get_signal"] = lambda ctx: None
    if left == "entry":
        first.strategy["get_signal"] = lambda ctx: bk.Signal(
            "long", ctx.price * 1.1, ctx.price * 0.8, price_open=ctx.price * 0.9
        )
    elif left == "order":
        first.venue.script["open", 0] = "lost_request"
    elif left == "alive":
        first.strategy["get_signal"] = lambda ctx: None
    clock = UntilClock(START, START)
    alive = None
    signals: tuple[bk.VenueSignal, ...] = ()
    if left == "alive":
        alive = first.kit(clock).live.background("BTCUSDT", **WHERE)
        await clock.over.wait()
    else:
        status = (await first.trade(1, symbol="BTC-USDT" if left == "elsewhere" else "BTCUSDT")).status
        if left == "elsewhere" and status.position is not None:
            ids = SignalIds(status.position.signal_id, first.venue.store_id)
            signals = (bk.VenueSignal(store_id=ids.store_id, digest=ids.digest, client_order_ids=(ids.stop(0),)),)
    first.venue.calls.clear()
    first.venue.held = [msgspec.structs.replace(held(None), signals=signals)]
    second.now_ms = START + MINUTE_MS
    handle = await trade_as(second, "mean", 4, orphans=orphans)
    if alive is not None:
        alive.cancel()
        await asyncio.wait({alive.task})
    (found,) = second.of(bk.OrphanFound)
    assert words in found.next_step
    assert handle.status.position is None
    assert "this store knows" in handle.status.no_entry
    assert not first.venue.calls


@pytest.mark.parametrize(("symbol", "exchange"), [("BTC-USDT", "demo"), ("BTCUSDT", "again")])
async def test_a_market_of_two_names_is_one(tmp_path: Path, symbol: str, exchange: str) -> None:
    store = bk.MemoryStore()
    first, second = Rig(tmp_path / "first", store), Rig(tmp_path / "second", store)
    second.venue = first.venue
    second.strategy["get_signal"] = lambda ctx: None
    position = (await trade_as(first, "first", 1, symbol=symbol, exchange=exchange)).status.position
    assert position is not None
    ids = SignalIds(position.signal_id, first.venue.store_id)
    signals = (bk.VenueSignal(store_id=ids.store_id, digest=ids.digest, client_order_ids=(ids.stop(0),)),)
    quantity = position.cost / position.price_open
    first.venue.held = [msgspec.structs.replace(held(40_000.0, quantity=quantity), signals=signals)]
    second.now_ms = START + MINUTE_MS
    handle = await trade_as(second, "mean", 2)
    assert not second.of(bk.OrphanFound)
    assert not handle.status.no_entry


async def test_what_a_strategy_that_ended_without_holding_anything_has_left_is_nobodys(tmp_path: Path) -> None:
    store = bk.MemoryStore()
    first, second = Rig(tmp_path / "first", store), Rig(tmp_path / "second", store)
    first.strategy["get_signal"] = second.strategy["get_signal"] = lambda ctx: None
    await first.trade(1)
    second.venue.held = [held(40_000.0)]
    handle = await trade_as(second, "mean", 1, orphans="adopt")
    assert handle.status.position is not None


async def test_nothing_is_adopted_or_opened_while_the_store_does_not_tell_what_others_have(memory_rig: Rig) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise bk.RetryLater("the server is away")

    memory_rig.venue.held = [held(40_000.0)]
    memory_rig.store.scan = away  # type: ignore[method-assign]
    status = (await memory_rig.trade(2, orphans="adopt")).status
    assert status.position is None
    assert status.no_entry == "the exchange and the store could not be compared: the server is away"
    assert not memory_rig.venue.calls


async def test_a_position_the_other_way_round_is_told_once_and_gets_no_stop_of_ours(memory_rig: Rig) -> None:
    memory_rig.strategy["get_signal"] = lambda ctx: None if ctx.when_ms > START else wide(ctx)
    await memory_rig.trade(1)
    memory_rig.venue.held = [held(None, "short")]
    await memory_rig.trade(4, orphans="protect")
    (found,) = memory_rig.of(bk.OrphanFound)
    assert (found.what, found.next_step) == ("missing_position", "nothing is done")
    assert "is not the position in the store" in found.reason
    assert not memory_rig.venue.sent("move_stop")


def opening(direction: Any) -> Any:
    """A strategy that opens in the first minute, so or not at all."""

    async def get_signal(ctx: bk.Context) -> bk.Signal | None:
        if ctx.when_ms > START or direction is None:
            return None
        return bk.Signal.bracket(direction, price=ctx.price, take_profit_pct=9, stop_loss_pct=9, minutes=1000)

    return get_signal


@pytest.mark.parametrize("orphans", ["alarm", "adopt", "protect"])
@pytest.mark.parametrize(
    ("sides", "factor", "stop", "what"),
    [
        ((None, None), 1, None, None),
        (("long", "long"), 1, 40_000.0, None),
        (("long", None), 1, 40_000.0, None),
        (("long", "long"), 0, None, "missing_position"),
        ((None, "long"), -1, 42_000.0, "missing_position"),
        (("long", "long"), 1, None, "unprotected_position"),
        (("long", "long"), 1.5, 40_000.0, "foreign_position"),
        (("long", "short"), 0, None, None),
        (("long", "short"), 1, 40_000.0, "foreign_position"),
    ],
)
async def test_of_strategies_side_by_side_the_sum_is_compared_and_nothing_is_done(
    idle: Rig, sides: tuple[Any, Any], factor: float, stop: float | None, what: str | None, orphans: str
) -> None:
    clock = UntilClock(START, START + 5 * MINUTE_MS)
    clock.join("", 2)
    asked: list[int] = []
    kit = idle.kit(clock)
    for name, side in zip(("mean", "fade"), sides, strict=True):
        kit.add_strategy_schema(name, get_signal=opening(side), interval="1m")
    mirror = Mirror()

    async def holdings(symbols: Any) -> Any:
        # What is wrong with it is so from the next minute on.
        asked.append((clock.now_ms() - START) // MINUTE_MS)
        mirror.done, mirror.factor, mirror.trigger = idle.venue.done, factor, lambda: stop
        return await mirror.holdings(symbols) if asked[-1] else []

    idle.venue.holdings = holdings  # type: ignore[method-assign]
    where = {**WHERE, "orphans": orphans}
    handles = [kit.live.background("BTCUSDT", **{**where, "strategy_name": name}) for name in ("mean", "fade")]
    await clock.over.wait()
    for each in handles:
        each.cancel()
    await asyncio.wait({each.task for each in handles})
    assert [minute for minute in asked if 0 < minute < 5] == [1, 2, 3, 4]  # one of them asks for both
    assert [event.what for event in idle.of(bk.OrphanFound)] == ([what] if what else [])
    for event in idle.of(bk.OrphanFound):
        assert "nothing is done: strategies mean and fade trade BTCUSDT side by side" in event.next_step
    assert not idle.venue.sent("move_stop")
    assert len(idle.of(bk.PositionOpened)) == sum(side is not None for side in sides)
    says = [any("side by side" in step for step in event.steps) for event in idle.of(bk.Recovered)]
    assert says == [orphans != "alarm"] * 2


async def test_who_is_left_of_two_strategies_looks_for_itself(idle: Rig) -> None:
    clock = UntilClock(START, START + 8 * MINUTE_MS)
    clock.join("", 2)
    kit = idle.kit(clock)
    kit.add_strategy_schema("mean", **idle.strategy)
    idle.venue.held = [held(40_000.0)]
    gone = kit.live.background("BTCUSDT", **{**WHERE, "strategy_name": "mean"})
    stays = kit.live.background("BTCUSDT", **WHERE, orphans="adopt")
    while clock.now_ms() < START + 3 * MINUTE_MS:
        await asyncio.sleep(0)
    assert not idle.of(bk.PositionOpened)
    gone.stop()
    await gone
    async with asyncio.timeout(120):
        while not idle.of(bk.PositionOpened):
            clock.advance_to(clock.now_ms() + MINUTE_MS // 2)
            await asyncio.sleep(0.001)
    assert stays.status.position is not None
    stays.cancel()
    await asyncio.wait({stays.task})


async def trade_as(
    rig: Rig, strategy_name: str, minutes: int, *, symbol: str = "BTCUSDT", exchange: str = "demo", **options: Any
) -> bk.LiveHandle:
    clock = UntilClock(rig.now_ms, rig.now_ms + minutes * MINUTE_MS)
    kit = rig.kit(clock)
    kit.add_strategy_schema(strategy_name, **rig.strategy)
    if exchange != "demo":
        kit.add_exchange_schema(exchange, source=rig.source, broker=rig.venue, clock=clock)
    where = {**WHERE, "strategy_name": strategy_name, "exchange_name": exchange}
    handle = kit.live.background(symbol, **where, **options)
    await clock.over.wait()
    handle.cancel()
    await asyncio.wait({handle.task})
    return handle


def wide(ctx: bk.Context) -> bk.Signal:
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=9, stop_loss_pct=9, minutes=1000)
