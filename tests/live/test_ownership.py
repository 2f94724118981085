"""Who trades a position: one run at a time, for as long as it has the lease."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import pytest
from tests.live.rig import START, WHERE, Rig, UntilClock, running
from tests.live.scenario import get_candles, prepared

import backtest_kit as bk
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.persist.contracts import CONTRACTS, LEASE
from backtest_kit.persist.lease import acquire
from backtest_kit.persist.store import ANY, Write

SCOPE = ("trend", "demo", "BTCUSDT")


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
