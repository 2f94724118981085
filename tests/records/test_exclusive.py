"""A run that somebody has named is replayed by one process at a time, and costs nobody else anything."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.records.conftest import kit_on
from tests.records.stores import SHARED

import backtest_kit as bk
from backtest_kit.persist.contracts import CLAIM, CONTRACTS
from backtest_kit.persist.store import Store, Write
from backtest_kit.records import exclusive

PROGRAM = Path(__file__).with_name("replayer.py")
WHERE: Any = {"strategy_name": "counting", "exchange_name": "demo"}


async def count(ctx: bk.Context) -> None:
    await ctx.state("asked").update(lambda count: count + 1, 0)


def kit_that_asks(
    address: str, place: Path, get_signal: Callable[[bk.Context], Awaitable[None]] = count, interval: Any = "15m"
) -> bk.Kit:
    kit = kit_on(address, place)
    kit.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
    kit.add_frame_schema("one", start_date="2024-06-01", end_date="2024-06-02")
    kit.add_frame_schema("two", start_date="2024-06-02", end_date="2024-06-03")
    kit.add_strategy_schema("counting", interval=interval, get_signal=get_signal)
    return kit


def claims_of(kit: bk.Kit) -> Store:
    return kit.persistence.store_for(CONTRACTS["state"], "backtest")


async def counted(kit: bk.Kit) -> Any:
    return await kit.records.state("asked", symbol="BTCUSDT", **WHERE, mode="backtest", run_id="mine").get()


@pytest.mark.parametrize("store", SHARED)
async def test_a_run_of_another_process_is_refused_until_it_has_ended(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exclusive, "TTL_S", 0.3)
    asked, gate = asyncio.Event(), asyncio.Event()

    async def wait(ctx: bk.Context) -> None:
        await count(ctx)
        asked.set()
        await gate.wait()

    first, second = (kit_that_asks(SHARED[store], tmp_path, each) for each in (wait, count))
    run = first.backtest.background("BTCUSDT", **WHERE, frame_name="one", run_id="mine")
    await asked.wait()
    with pytest.raises(
        bk.Conflict,
        match=rf"run 'mine' of strategy 'counting' for BTCUSDT is already running in process {os.getpid()} on .*"
        "wait for it, or choose another run_id",
    ):
        # Whatever its days are: the state is the same.
        await second.backtest.background("BTCUSDT", **WHERE, frame_name="two", run_id="mine")
    beside: Any = {**WHERE, "frame_name": "one"}
    await second.backtest.background("BTCUSDT", **beside, run_id="another")
    await second.backtest.background("ETHUSDT", **beside, run_id="mine")
    gate.set()
    await run
    assert await counted(second) == 96
    await second.backtest.background("BTCUSDT", **WHERE, frame_name="two", run_id="mine")
    assert await counted(second) == 192
    await first.close()
    await second.close()


async def test_frames_of_one_run_do_not_go_on_at_once_in_one_process(tmp_path: Path) -> None:
    kit = kit_that_asks("memory:", tmp_path)
    first = kit.backtest.background("BTCUSDT", **WHERE, frame_name="one", run_id="mine")
    with pytest.raises(bk.UserError, match="run 'mine' of strategy 'counting' for BTCUSDT is already running"):
        kit.backtest.background("BTCUSDT", **WHERE, frame_name="two", run_id="mine")
    await first
    await kit.close()


@pytest.mark.parametrize("store", SHARED)
async def test_a_run_whose_process_was_killed_is_free_at_once(store: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, PROGRAM, SHARED[store], tmp_path],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
    ) as child:
        try:
            assert child.stdout is not None
            assert await asyncio.to_thread(child.stdout.readline) == b"asked\n"
            kit = kit_that_asks(SHARED[store], tmp_path)
            with pytest.raises(bk.Conflict, match=f"is already running in process {child.pid} on "):
                await kit.backtest.background("BTCUSDT", **WHERE, frame_name="one", run_id="mine")
        finally:
            child.kill()
    async with asyncio.timeout(10):  # its lease would lapse after a minute
        await kit.backtest.background("BTCUSDT", **WHERE, frame_name="two", run_id="mine")
    assert await counted(kit) == 97
    await kit.close()


async def test_a_run_that_is_lost_to_another_process_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive, "TTL_S", 0.06)
    taken = asyncio.Event()

    async def be_overtaken(ctx: bk.Context) -> None:
        if not taken.is_set():
            taken.set()
            store = claims_of(kit)
            (held,) = [record async for record in store.scan(CLAIM)]
            assert isinstance(held.value, dict)
            await store.put(Write(CLAIM, held.key, {**held.value, "owner": "x", "pid": 4_000_000, "host": "far"}))
        await asyncio.sleep(0.01)

    kit = kit_that_asks(SHARED["sqlite"], tmp_path, be_overtaken, interval="1m")
    failed: list[bk.RunFailed] = []
    kit.on(bk.RunFailed, failed.append)
    with pytest.raises(bk.Conflict, match="is already running in process 4000000 on far"):
        await kit.backtest.background("BTCUSDT", **WHERE, frame_name="one", run_id="mine")
    assert len(failed) == 1
    await kit.close()


async def test_a_run_of_its_own_id_claims_nothing_and_one_that_is_cancelled_gives_back(tmp_path: Path) -> None:
    kit = kit_that_asks(SHARED["file"], tmp_path)
    await kit.backtest.background("BTCUSDT", **WHERE, frame_name="one")
    assert [record async for record in claims_of(kit).scan(CLAIM)] == []
    asked = asyncio.Event()

    async def wait(ctx: bk.Context) -> None:
        asked.set()
        await asyncio.Event().wait()

    kit.add_strategy_schema("counting", interval="15m", get_signal=wait, replace=True)
    run = kit.backtest.background("BTCUSDT", **WHERE, frame_name="one", run_id="mine")
    await asked.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    (left,) = [record async for record in claims_of(kit).scan(CLAIM)]
    assert msgspec.convert(left.value, dict[str, Any])["released"]
    await kit.close()
