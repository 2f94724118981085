"""What a failing store does to a run: nothing new is opened, and what is held is closed all the same."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from tests.live.failing_store import FailingStore
from tests.live.rig import START, WHERE, Rig, UntilClock, running
from tests.live.scenario import get_candles, prepared

import backtest_kit as bk
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.persist.contracts import CONTRACTS, LEASE
from backtest_kit.persist.store import Record, Write
from backtest_kit.seams import Seams

SCOPE = ("trend", "demo", "BTCUSDT")


@pytest.fixture
def failing(tmp_path: Path) -> tuple[Rig, FailingStore]:
    store = FailingStore()
    return prepared(Rig(tmp_path, store)), store


@pytest.mark.parametrize("error", [bk.OutOfSpace("the disk is full"), bk.RetryLater("the server is away")])
async def test_without_a_store_nothing_is_opened(failing: tuple[Rig, FailingStore], error: Exception) -> None:
    rig, store = failing
    rig.strategy["get_signal"] = lambda ctx: bk.Signal.bracket(
        "long", price=ctx.price, take_profit_pct=5, stop_loss_pct=5
    )
    rig.strategy["manage"] = None
    rig.source = bk.sources.function(get_candles)
    clock = UntilClock(START, START + 8 * MINUTE_MS)

    def breaks(event: bk.Event) -> None:
        store.error = error

    kit = rig.kit(clock)
    kit.on(bk.Recovered, breaks)
    handle = kit.live.background("BTCUSDT", **WHERE)
    while clock.now_ms() < START + 5 * MINUTE_MS:
        await asyncio.sleep(0)
    assert str(error) in handle.status.degraded
    assert not rig.venue.calls
    store.error = None
    await clock.over.wait()
    assert not handle.status.degraded
    assert len(rig.venue.sent("open")) == 1
    handle.cancel()
    await asyncio.wait({handle.task})
    assert [type(event) for event in rig.of(bk.StoreDegraded, bk.StoreRecovered)] == [
        bk.StoreDegraded,
        bk.StoreRecovered,
    ]


@pytest.mark.parametrize("restart", ["after", "meanwhile"])
async def test_without_a_store_a_position_is_closed_all_the_same(
    failing: tuple[Rig, FailingStore], restart: str
) -> None:
    rig, store = failing
    rig.strategy["get_signal"] = lambda ctx: (
        bk.Signal.bracket("long", price=ctx.price, take_profit_pct=0.5, stop_loss_pct=5)
        if ctx.when_ms == START
        else None
    )
    rig.strategy["manage"] = None
    await rig.trade(2)
    store.error = bk.OutOfSpace("the disk is full")
    end = await rig.trade(6)
    assert end.status.position is None
    (close,) = rig.venue.sent("close")
    degraded = rig.of(bk.StoreDegraded)
    assert degraded
    assert degraded[-1].kept
    if restart == "after":
        store.error = None
    end = await rig.trade(3)
    assert "recovered the latest state from the emergency file" in rig.of(bk.Recovered)[-1].steps
    assert end.status.position is None
    assert rig.venue.sent("close") == [close]
    assert len(rig.trades()) == 1
    store.error = None
    end = await rig.trade(2)
    assert not end.status.degraded
    found = await store.get(CONTRACTS["signal"], SCOPE)
    assert found is not None
    assert found.value is None


async def test_a_position_closes_after_an_hour_in_which_its_stop_was_moved_without_a_store(
    failing: tuple[Rig, FailingStore],
) -> None:
    """Whose records wait for the store does not fill what is kept for the exit."""
    rig, store = failing
    rig.source = bk.sources.function(get_candles)
    moved: list[bool] = []

    async def trail(ctx: bk.Context) -> None:
        assert ctx.position is not None
        if len(moved) < 60:
            moved.append(bool(await ctx.position.move_stop(ctx.position.stop_loss * 1.0001)))
        else:
            await ctx.position.close()

    rig.strategy["get_signal"] = lambda ctx: (
        bk.Signal.bracket("long", price=ctx.price, take_profit_pct=20, stop_loss_pct=20)
        if ctx.when_ms == START
        else None
    )
    rig.strategy["manage"] = None
    await rig.trade(1)
    rig.strategy["manage"] = trail
    store.error = bk.OutOfSpace("the disk is full")
    end = await rig.trade(64)
    assert moved == [True] * 60
    assert end.status.position is None
    assert len(rig.venue.sent("close")) == 1
    assert rig.of(bk.StoreDegraded)[-1].kept
    end = await rig.trade(2)
    assert end.status.position is None
    assert len(rig.venue.sent("close")) == 1


async def test_a_write_whose_answer_was_lost_is_looked_up(failing: tuple[Rig, FailingStore]) -> None:
    rig, store = failing

    def lose(event: bk.Event) -> None:
        store.lossy = True

    clock = UntilClock(START, START + 15 * MINUTE_MS)
    kit = rig.kit(clock)
    kit.on(bk.Event, lose)
    handle = kit.live.background("BTCUSDT", **WHERE)
    await clock.over.wait()
    handle.cancel()
    await asyncio.wait({handle.task})
    assert len(rig.trades()) == 2
    assert not rig.of(bk.StoreDegraded)
    assert set(rig.venue.times_done.values()) == {1}


async def test_an_emergency_file_that_others_have_overtaken_is_left_alone(failing: tuple[Rig, FailingStore]) -> None:
    rig, store = failing
    await rig.trade(2)
    store.error = bk.OutOfSpace("the disk is full")
    await rig.trade(1)
    store.error = None
    elsewhere = Rig(rig.tmp_path / "another machine", rig.store)
    elsewhere.venue, elsewhere.now_ms = rig.venue, rig.now_ms
    prepared(elsewhere)
    await elsewhere.trade(1)
    rig.now_ms = elsewhere.now_ms
    await rig.trade(1)
    assert rig.of(bk.Recovered)[-1].steps == ()


async def test_a_full_disk_does_not_take_the_position_from_who_has_it(failing: tuple[Rig, FailingStore]) -> None:
    rig, store = failing
    store.lease_too = True
    async with running(rig, 4, lease_ttl_s=1) as (handle, clock):
        await clock.over.wait()
        store.error = bk.OutOfSpace("the disk is full")
        while store.refused_leases < 5:
            await asyncio.sleep(0.01)
        assert not handle.done()


async def test_who_slept_longer_than_his_lease_sends_nothing_that_the_store_does_not_know_of(
    failing: tuple[Rig, FailingStore],
) -> None:
    rig, store = failing
    put, asked, outcomes = store.put, asyncio.Event(), list[bk.CommandOutcome]()

    async def silent(write: Write) -> Record:
        if write.contract is LEASE and store.error is not None and not asked.is_set():
            asked.set()
            await asyncio.get_running_loop().create_future()
        return await put(write)

    async def manage(ctx: bk.Context) -> None:
        assert ctx.position is not None
        if not outcomes:
            store.error = bk.RetryLater("the server is away")
            time.sleep(1.2)  # the whole process is paused
            outcomes.append(await ctx.position.reduce(percent=50))

    store.put = silent  # type: ignore[method-assign]
    rig.strategy["manage"] = manage
    async with running(rig, 6, lease_ttl_s=1) as (handle, clock):
        store.lease_too = True
        await clock.over.wait()
        assert not handle.done()
    assert asked.is_set()
    (outcome,) = outcomes
    assert "it was not sent: the lease of BTCUSDT on demo by trend has lapsed" in outcome.reason
    assert rig.venue.sent("open")
    assert not rig.venue.sent("reduce")


class Outage:
    """A store and a lease that are away for three times the lease, from minute 3 of a run to its minute 6."""

    def __init__(self, rig: Rig, store: FailingStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rig, self.store = rig, store
        self.clock = UntilClock(START, START + 10 * MINUTE_MS)
        self.over_at = (3, 6)
        self.touched: list[int] = []
        """Minutes whose candle reaches the take profit."""
        self._patch = monkeypatch
        self._gone = False
        store.lease_too = True
        rig.source = bk.sources.function(self.candles)
        rig.strategy = {"get_signal": self.get_signal, "interval": "1m"}
        rig.settings = {"CC_AVG_PRICE_CANDLES_COUNT": 1}

    def minute(self) -> int:
        return (self.clock.now_ms() - START) // MINUTE_MS

    def get_signal(self, ctx: bk.Context) -> bk.Signal | None:
        return bk.Signal("long", 110, 80, minutes=1000) if ctx.when_ms == START else None

    async def candles(self, symbol: str, interval: str, since_ms: int, limit: int) -> list[list[float]]:
        begins, ends = self.over_at
        if self.minute() == begins:
            self.begin()
        elif self.minute() == ends:
            self.end()
        rows = []
        for time_ms in range(since_ms, since_ms + limit * MINUTE_MS, MINUTE_MS):
            price = 115.0 if (time_ms - START) // MINUTE_MS + 1 in self.touched else 100.0
            rows.append([time_ms, *[price] * 4, 1.0])
        return rows

    def begin(self) -> None:
        if not self._gone:
            self._gone = True
            elapsed = Seams.elapsed
            self._patch.setattr(Seams, "elapsed", lambda seams: elapsed(seams) + 3 * 15)
        self.store.error = bk.RetryLater("the server is away")

    def end(self) -> None:
        self.store.error = None

    async def run(self) -> bk.LiveHandle:
        handle = self.rig.kit(self.clock).live.background("BTCUSDT", **WHERE)
        over = asyncio.ensure_future(self.clock.over.wait())
        await asyncio.wait({over, handle.task}, return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        return handle

    def minutes_of(self, *kinds: type[bk.Event]) -> list[int]:
        return [(event.when_ms - START) // MINUTE_MS for event in self.rig.of(*kinds)]


@pytest.fixture
def outage(failing: tuple[Rig, FailingStore], monkeypatch: pytest.MonkeyPatch) -> Outage:
    return Outage(*failing, monkeypatch)


async def test_who_had_no_store_for_longer_than_his_lease_closes_once_it_is_back(outage: Outage) -> None:
    """Meanwhile it sends nothing and asks nothing that may place a stop, for another process may trade the position."""
    checked: list[int] = []
    outage.touched = [4, 8]
    outage.rig.venue.check = lambda held: checked.append(outage.minute())
    handle = await outage.run()
    assert not handle.done()
    handle.cancel()
    await asyncio.wait({handle.task})
    (trade,) = outage.rig.trades()
    assert (trade.close_reason, trade.price_close) == ("take_profit", 110.0)
    assert outage.minutes_of(bk.PositionClosed) == [8]
    assert outage.minutes_of(bk.MinutesMissed) == [6]
    assert checked == [1, 2, 6, 7, 8]
    assert outage.minutes_of(bk.StoreDegraded) == [3]
    assert outage.minutes_of(bk.StoreRecovered) == [6]
    assert list(outage.rig.venue.times_done.values()) == [1, 1]


async def test_who_was_taken_over_while_he_had_no_store_ends_and_has_sent_nothing(outage: Outage) -> None:
    async def taken() -> None:
        found = await outage.store.get(LEASE, SCOPE)
        assert found is not None
        assert isinstance(found.value, dict)
        await outage.store._inner.put(Write(LEASE, SCOPE, {**found.value, "owner": "somebody", "pid": 1}))

    async def candles(*asked: Any) -> Any:
        if outage.minute() == 5:
            await taken()
        return await outage.candles(*asked)

    outage.rig.source = bk.sources.function(candles)
    outage.touched = [4, 6, 8]
    handle = await outage.run()
    with pytest.raises(bk.Conflict, match="is traded by process 1"):
        await handle
    assert [call[0] for call in outage.rig.venue.calls] == ["open"]
    assert outage.minute() == 6


async def test_an_exit_decided_when_the_lease_had_lapsed_is_sent_once_the_store_is_back(outage: Outage) -> None:
    def check(held: Any) -> None:
        if outage.minute() == 2:
            outage.begin()  # after the minute has made sure of its lease

    outage.touched = [2]
    outage.rig.venue.check = check
    sent: list[int] = []

    def price(order: bk.Order) -> float:
        sent.append(outage.minute())
        return order.price

    outage.rig.venue.price = price
    handle = await outage.run()
    handle.cancel()
    await asyncio.wait({handle.task})
    assert sent == [0, 6]
    assert outage.minutes_of(bk.PositionClosed) == [6]
    failed = [event for event in outage.rig.of(bk.OrderFailed) if event.kind == "close"]
    assert "it was not sent" in failed[0].reason
    assert list(outage.rig.venue.times_done.values()) == [1, 1]
