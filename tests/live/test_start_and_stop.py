"""How a run starts, pauses, stops and is cancelled."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.live.rig import START, WHERE, Rig, UntilClock, running
from tests.live.scenario import get_candles, prepared

import backtest_kit as bk
from backtest_kit.market.clock import SteppedClock
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.persist.contracts import CONTRACTS, LEASE
from backtest_kit.persist.store import Write

SCOPE = ("trend", "demo", "BTCUSDT")


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
