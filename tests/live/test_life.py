"""A run from outside: who may start it, how it stops and pauses, what it tells, and what a failing store does to it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.live.rig import START, WHERE, Rig, UntilClock
from tests.live.scenario import get_candles, prepared

import backtest_kit as bk
from backtest_kit.errors import Outcome
from backtest_kit.market.clock import Jump, SteppedClock
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.persist.contracts import CONTRACTS, LEASE, Contract
from backtest_kit.persist.lease import acquire
from backtest_kit.persist.store import ANY, CandleStore, Capability, Key, Record, Selection, Store, Write
from backtest_kit.seams import Seams

SCOPE = ("trend", "demo", "BTCUSDT")


@asynccontextmanager
async def running(rig: Rig, minutes: int, **options: Any) -> AsyncIterator[tuple[bk.LiveHandle, UntilClock]]:
    clock = UntilClock(rig.now_ms, rig.now_ms + minutes * MINUTE_MS)
    handle = rig.kit(clock).live.background("BTCUSDT", **{**WHERE, **options})
    try:
        yield handle, clock
    finally:
        handle.cancel()
        await asyncio.wait({handle.task})


class FailingCandles(CandleStore):
    """The candles of a store that is away."""

    def __init__(self, store: FailingStore, inner: Any) -> None:
        self._store, self._inner = store, inner

    async def read(self, *asked: Any) -> Any:
        if isinstance(self._store.error, bk.RetryLater):
            raise self._store.error
        return await self._inner.read(*asked)

    async def write(self, *given: Any) -> int:
        if self._store.error is not None:
            raise self._store.error
        return int(await self._inner.write(*given))


class FailingStore(Store):
    """A memory store that takes no writes while `error` is set, and loses the answer of the next while `lossy` is."""

    def __init__(self) -> None:
        self._inner = bk.MemoryStore()
        self.candles = FailingCandles(self, self._inner.candles)
        self.error: Exception | None = None
        self.lossy = False
        self.lease_too = False
        self.refused_leases = 0

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self._inner.capabilities

    def select(self, wanted: Selection) -> AsyncGenerator[Record, None]:
        return self._inner.select(wanted)

    async def namespaces(self) -> list[tuple[str, ...]]:
        return await self._inner.namespaces()

    async def prune(self, contract: Contract, revisions: Mapping[Key, int]) -> int:
        return await self._inner.prune(contract, revisions)

    async def count(self, contract: Contract) -> int:
        return await self._inner.count(contract)

    async def get(self, contract: Contract, key: Key) -> Record | None:
        return await self._inner.get(contract, key)

    async def put(self, write: Write) -> Record:
        if write.contract is not LEASE:
            self._fail()
        elif self.lease_too and self.error is not None:
            self.refused_leases += 1
            raise self.error
        return await self._inner.put(write)

    async def batch(self, writes: Sequence[Write]) -> None:
        self._fail()
        await self._inner.batch(writes)
        if self.lossy:
            self.lossy = False
            raise bk.RetryLater("the answer was lost", outcome=Outcome.UNKNOWN)

    def namespace(self, name: str) -> Store:
        return self

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def failing(tmp_path: Path) -> tuple[Rig, FailingStore]:
    store = FailingStore()
    return prepared(Rig(tmp_path, store)), store


# Ownership


async def test_a_second_run_is_told_who_has_the_position(rig: Rig) -> None:
    async with running(rig, 3, lease_ttl_s=1) as (_, clock):
        await clock.over.wait()
        with pytest.raises(bk.Conflict, match=f"process {os.getpid()} on"):
            await rig.kit(UntilClock(rig.now_ms, rig.now_ms)).live.background("BTCUSDT", **WHERE, lease_ttl_s=1)
        async with running(rig, 1, paper=True) as (_, paper_clock):
            await paper_clock.over.wait()  # paper is kept apart
    assert rig.of(bk.RunFailed)


async def test_a_run_whose_position_was_taken_stops_and_sends_nothing_more(rig: Rig) -> None:
    prepared(rig)
    calls = 0
    key = SCOPE

    async def taken() -> None:
        nonlocal calls
        found = await rig.store.get(CONTRACTS["strategy"], key)
        assert found is not None
        await rig.store.put(Write(CONTRACTS["strategy"], key, found.value, expect=ANY))
        calls = len(rig.venue.calls)

    async def manage(ctx: bk.Context) -> None:
        if ctx.when_ms == START + 3 * MINUTE_MS and ctx.position is not None:
            await taken()
            await ctx.position.reduce(percent=50)

    rig.strategy["manage"] = manage
    with pytest.raises(bk.Conflict, match="another process trades this position"):
        await rig.trade(9)
    assert len(rig.venue.calls) == calls
    assert [type(event.error) for event in rig.of(bk.RunFailed)] == [bk.Conflict]
    assert not rig.of(bk.StrategyFailed)


async def test_a_run_that_loses_its_lease_stops_where_it_is(memory_rig: Rig) -> None:
    async with running(memory_rig, 2, lease_ttl_s=1) as (handle, clock):
        await clock.over.wait()
        found = await memory_rig.store.get(LEASE, SCOPE)
        assert found is not None
        assert isinstance(found.value, dict)
        await memory_rig.store.put(Write(LEASE, SCOPE, {**found.value, "owner": "somebody", "pid": 1}))
        with pytest.raises(bk.Conflict, match="is traded by process 1"):
            await asyncio.wait_for(asyncio.shield(handle.task), 120)
    assert not memory_rig.venue.sent("close")


@pytest.mark.parametrize("ttl", [-5, 0, 0.999, 3601, float("nan"), float("inf"), "15", True, None])
async def test_a_lease_of_no_sensible_time_is_refused(memory_rig: Rig, ttl: Any) -> None:
    with pytest.raises(bk.UserError, match=r"lease_ttl_s is .*: give 1 to 3600 seconds"):
        memory_rig.kit(UntilClock(START, START)).live.background("BTCUSDT", **WHERE, lease_ttl_s=ttl)


# Stop, pause, cancel


async def test_stop_ends_a_run_that_holds_nothing_at_once(memory_rig: Rig) -> None:
    memory_rig.strategy["get_signal"] = lambda ctx: None
    async with running(memory_rig, 3) as (handle, clock):
        await clock.over.wait()
        handle.stop()
        assert await handle == ()
    assert [event.cancelled for event in memory_rig.of(bk.RunDone)] == [False]


async def test_stop_carries_a_position_to_its_end_and_opens_no_other(memory_rig: Rig) -> None:
    async with running(memory_rig, 2000) as (handle, _):
        memory_rig.strategy["get_signal"] = None
        while not memory_rig.of(bk.PositionOpened):
            await asyncio.sleep(0)
        handle.stop()
        assert handle.status.stopping
        (trade,) = await handle
    assert trade.close_reason in ("take_profit", "stop_loss", "time_expired")
    assert len(memory_rig.of(bk.PositionOpened)) == 1


async def test_stop_cancels_a_resting_entry(memory_rig: Rig) -> None:
    prepared(memory_rig)
    memory_rig.strategy["manage"] = None
    memory_rig.strategy["get_signal"] = lambda ctx: bk.Signal("long", 110, 80, price_open=90)
    async with running(memory_rig, 100) as (handle, _):
        while not memory_rig.of(bk.EntryScheduled):
            await asyncio.sleep(0)
        handle.stop()
        assert await handle == ()
    assert [event.reason for event in memory_rig.of(bk.EntryCancelled)] == ["user"]
    assert memory_rig.venue.sent("cancel")


async def test_a_pause_holds_after_a_restart(rig: Rig) -> None:
    asked: list[int] = []
    rig.strategy = {"get_signal": lambda ctx: asked.append(ctx.when_ms), "interval": "1m"}
    async with running(rig, 2) as (handle, clock):
        await clock.over.wait()
        await handle.pause()
        assert handle.status.paused
        rig.now_ms = clock.now_ms()
    rig.now_ms += MINUTE_MS
    asked.clear()
    async with running(rig, 3) as (handle, clock):
        await clock.over.wait()
        assert handle.status.paused
        assert not asked
        await handle.resume()
        rig.now_ms = clock.now_ms() + MINUTE_MS
    await rig.trade(1)
    assert asked
    assert [event.paused for event in rig.of(bk.Paused)] == [True, False]


async def test_a_run_that_ended_without_beginning_keeps_nobody_waiting_for_a_pause(rig: Rig) -> None:
    kit = rig.kit(UntilClock(START, START + MINUTE_MS))
    await rig.store.put(Write(CONTRACTS["signal"], ("trend", "demo", "BTCUSDT"), "no position"))
    handle = kit.live.background("BTCUSDT", **WHERE)
    async with asyncio.timeout(120):
        for change in (handle.pause, handle.resume):
            with pytest.raises(bk.UserError, match="has ended"):
                await change()
    with pytest.raises(bk.Damaged):
        await handle


async def test_the_end_of_a_start_can_be_waited_for(rig: Rig) -> None:
    await rig.trade(3)
    kit = rig.kit(UntilClock(rig.now_ms, rig.now_ms + MINUTE_MS))
    handle = kit.live.background("BTCUSDT", **WHERE)
    before = handle.status
    assert before.position is None, "nothing was read yet"
    async with asyncio.timeout(120):
        await handle.wait_for_init()
    assert handle.status.position is not None
    handle.cancel()
    await asyncio.wait({handle.task})
    await handle.wait_for_init()


async def test_who_waits_for_a_start_that_fails_gets_its_error(rig: Rig) -> None:
    kit = rig.kit(UntilClock(START, START + MINUTE_MS))
    await rig.store.put(Write(CONTRACTS["signal"], ("trend", "demo", "BTCUSDT"), "no position"))
    handle = kit.live.background("BTCUSDT", **WHERE)
    async with asyncio.timeout(120):
        with pytest.raises(bk.Damaged):
            await handle.wait_for_init()


async def test_leaving_the_loop_over_the_events_cancels_the_run(rig: Rig) -> None:
    clock = UntilClock(START, START + 5 * MINUTE_MS)
    kit = rig.kit(clock)
    seen: list[bk.Event] = []
    events = kit.live.run("BTCUSDT", **WHERE)
    async for event in events:
        seen.append(event)
        if isinstance(event, bk.PositionOpened):
            break
    await events.aclose()  # type: ignore[attr-defined]
    assert [type(each) for each in seen] == [bk.Recovered, bk.PositionOpened]
    rig.now_ms = clock.now_ms()
    assert (await rig.trade(1)).status.position is not None
    assert isinstance(seen[1], bk.PositionOpened)
    assert rig.of(bk.Recovered)[-1].position == seen[1].position


async def test_the_loop_raises_why_a_run_could_not_start(rig: Rig) -> None:
    async with running(rig, 1, lease_ttl_s=1) as (_, clock):
        await clock.over.wait()
        with pytest.raises(bk.Conflict):
            async for _ in rig.kit(UntilClock(START, START)).live.run("BTCUSDT", **WHERE):
                pass


@pytest.mark.parametrize("signals", [1, 2])
def test_signals_end_a_blocking_run(tmp_path: Path, signals: int) -> None:
    program = f"""
import sys, backtest_kit as bk
hold = {signals} == 2
def get_signal(ctx):
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=9, stop_loss_pct=9) if hold else None
bk.default_kit.dump = {str(tmp_path)!r}
bk.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
bk.add_strategy_schema("trend", get_signal=get_signal)
bk.on((bk.Recovered, bk.PositionOpened), lambda event: print(event.action, flush=True))
print("trades", bk.Live.run_sync("BTCUSDT", strategy_name="trend", exchange_name="demo", paper=True))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for wanted in ["recovered", *(["opened"] if signals == 2 else [])]:
            assert process.stdout.readline().strip() == wanted
        process.send_signal(signal.SIGINT)
        if signals == 2:
            process.send_signal(signal.SIGTERM)
        assert process.stdout.read().strip() == "trades ()"
    assert process.returncode == 0


async def test_a_live_run_needs_a_broker(memory_rig: Rig) -> None:
    kit = bk.Kit(memory_rig.tmp_path)
    kit.add_exchange_schema("demo", source=bk.sources.synthetic())
    kit.add_strategy_schema("trend", get_signal=lambda ctx: None)
    with pytest.raises(bk.UserError, match="has no broker"):
        kit.live.background("BTCUSDT", **WHERE)
    with pytest.raises(bk.UserError, match="orphans is 'kill': use one of alarm, adopt, protect"):
        kit.live.background("BTCUSDT", **WHERE, paper=True, orphans="kill")  # type: ignore[arg-type]
    with pytest.raises(bk.UserError, match="dirty is 'drop': use one of refuse, repair"):
        kit.live.background("BTCUSDT", **WHERE, paper=True, dirty="drop")  # type: ignore[arg-type]


async def test_a_weak_store_is_refused_where_orders_are_sent(memory_rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    memory_rig.venue.start = memory_rig.venue.stop = None  # type: ignore[assignment,method-assign]
    with pytest.raises(bk.UserError, match=r"not fit for live trading: promises: MemoryStore does not promise"):
        await memory_rig.trade(1, allow_weak=False)
    assert not memory_rig.venue.calls
    assert await memory_rig.store.get(LEASE, SCOPE) is None
    teller: Any = bk.Broker()
    memory_rig.venue = teller
    assert (await memory_rig.trade(1, allow_weak=False)).status.position is not None
    assert (await memory_rig.trade(1, allow_weak=False, paper=True)).status.position is not None


async def test_runs_that_start_together_look_at_the_stores_once(disk: Path) -> None:
    rig = Rig(disk, bk.FileStore(disk / "store"))
    kit, looked = rig.kit(SteppedClock(START)), 0
    judge = kit.persistence.require_live_grade

    async def look(**options: Any) -> Any:
        nonlocal looked
        looked += 1
        return await judge(**options)

    kit.persistence.require_live_grade = look  # type: ignore[method-assign]
    handles = [kit.live.background(f"C{number}", **{**WHERE, "allow_weak": False}) for number in range(20)]
    while not all(handle.status.position for handle in handles):
        assert not any(handle.done() for handle in handles)
        await asyncio.sleep(0.01)
    for handle in handles:
        handle.cancel()
    await asyncio.wait({handle.task for handle in handles})
    assert looked == 1


# What goes wrong in the user's code


async def test_an_error_of_the_strategy_is_told_and_the_next_slot_goes_on(
    memory_rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def get_signal(ctx: bk.Context) -> bk.Signal | None:
        asked.append((ctx.when_ms - START) // MINUTE_MS)
        if len(asked) < 3:
            raise ZeroDivisionError("oops")
        return None if len(asked) > 3 else bk.Signal("long", ctx.price * 2, ctx.price * 3)

    memory_rig.strategy = {"get_signal": get_signal, "interval": "5m"}
    with caplog.at_level(logging.ERROR):
        await memory_rig.trade(16)
    assert asked == [0, 5, 10, 15]
    failed = memory_rig.of(bk.StrategyFailed)
    assert [type(event.error) for event in failed] == [ZeroDivisionError, ZeroDivisionError, bk.UserError]
    assert {event.what for event in failed} == {"get_signal"}
    assert "ZeroDivisionError: oops" in caplog.text


async def test_handlers_that_fail_stop_nobody_else(memory_rig: Rig) -> None:
    heard: list[bk.Event] = []

    def broken(event: bk.Event) -> None:
        raise RuntimeError("broken handler")

    clock = UntilClock(START, START + 3 * MINUTE_MS)
    kit = memory_rig.kit(clock)
    kit.on(bk.Event, broken)
    kit.on(bk.PositionOpened, heard.append)
    handle = kit.live.background("BTCUSDT", **WHERE)
    await clock.over.wait()
    handle.cancel()
    await asyncio.wait({handle.task})
    assert heard
    assert [event for event in memory_rig.of(bk.StrategyFailed) if "broken" in event.what]
    assert isinstance(handle.status.position, bk.Position)


# Clock and candles


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


@pytest.mark.parametrize("held", [False, True])
async def test_stop_is_noticed_while_the_first_candles_are_unreadable(memory_rig: Rig, held: bool) -> None:
    prepared(memory_rig)
    if held:
        await memory_rig.trade(2)
    away = asyncio.Event()
    readable = False

    async def silent(symbol: str, interval: str, since_ms: int, limit: int) -> list[list[float]]:
        away.set()
        if not readable:
            raise ConnectionError("the exchange is away")
        return await get_candles(symbol, interval, since_ms, limit)

    memory_rig.source = bk.sources.function(silent)
    async with running(memory_rig, 30) as (handle, clock):
        await away.wait()
        handle.stop()
        if held:
            while clock.now_ms() < memory_rig.now_ms + 2 * MINUTE_MS:
                await asyncio.sleep(0)
            assert not handle.done()  # what is open is carried to its end
            readable = True
        async with asyncio.timeout(120):
            trades = await handle
    assert len(trades) == held
    assert [event.cancelled for event in memory_rig.of(bk.RunDone)][-1] is False


@pytest.mark.parametrize("late", ["broker", "candles"])
async def test_the_lease_is_renewed_while_the_start_takes_longer(memory_rig: Rig, late: str) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        asked.set()
        await answer.wait()

    async def slow(symbol: str, interval: str, since_ms: int, limit: int) -> list[list[float]]:
        await wait()
        return await get_candles(symbol, interval, since_ms, limit)

    if late == "broker":
        memory_rig.venue.start = wait  # type: ignore[method-assign]
    else:
        memory_rig.source = bk.sources.function(slow)
    async with running(memory_rig, 2, lease_ttl_s=1) as (handle, clock):
        await asked.wait()
        first = await memory_rig.store.get(LEASE, SCOPE)
        assert first is not None
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            with pytest.raises(bk.Conflict, match=f"process {os.getpid()}"):
                await acquire(lambda row: memory_rig.store, SCOPE, ttl=0.3)
        answer.set()
        await clock.over.wait()
        assert not handle.done()
        assert handle.status.held


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


# Stores that fail


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


async def test_a_position_closes_after_hours_in_which_its_stop_was_moved_without_a_store(
    failing: tuple[Rig, FailingStore],
) -> None:
    """Whose records wait for the store does not fill what is kept for the exit."""
    rig, store = failing
    rig.source = bk.sources.function(get_candles)
    moved: list[bool] = []

    async def trail(ctx: bk.Context) -> None:
        assert ctx.position is not None
        if len(moved) < 120:
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
    end = await rig.trade(124)
    assert moved == [True] * 120
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


async def test_stopping_while_an_order_is_under_way_is_no_failure(memory_rig: Rig) -> None:
    memory_rig.source = bk.sources.function(get_candles)
    memory_rig.strategy["get_signal"] = lambda ctx: bk.Signal(
        "long", ctx.price * 1.1, ctx.price * 0.8, price_open=ctx.price * 0.9
    )
    memory_rig.strategy["manage"] = None
    memory_rig.venue.script["cancel", 1] = "lost_response"
    async with running(memory_rig, 8) as (handle, _):
        while not memory_rig.venue.sent("place"):
            await asyncio.sleep(0)
        memory_rig.venue.find_fails = 2
        handle.stop()
        await asyncio.wait_for(asyncio.shield(handle.task), 120)
    assert len(memory_rig.venue.sent("cancel")) == 1
    assert not memory_rig.of(bk.StrategyFailed)


async def test_a_command_after_the_end_of_a_run_is_refused(memory_rig: Rig) -> None:
    kept: list[bk.Context] = []
    memory_rig.strategy["manage"] = kept.append
    await memory_rig.trade(2)
    position = kept[-1].position
    assert position is not None
    calls = len(memory_rig.venue.calls)
    outcome = await position.close()
    assert (bool(outcome), outcome.reason) == (False, "the run has ended")
    assert len(memory_rig.venue.calls) == calls
