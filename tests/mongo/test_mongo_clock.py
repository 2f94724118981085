"""The order of writing, where the clocks of the machines that write are apart."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase
from tests.mongo.samples import store_over

from backtest_kit.persist.backends.mongo import server
from backtest_kit.persist.backends.mongo.server import ServerClock
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Write

LOG = CONTRACTS["log"]
OTHER_MACHINE = """
import asyncio, sys, time
tell = time.time_ns
time.time_ns = lambda: tell() + int(float(sys.argv[2]) * 1e9)
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Write

async def main():
    store = MongoStore(sys.argv[1])
    await store.put(Write(CONTRACTS["log"], ("second",), "second"))
    await store.put_each([Write(CONTRACTS["log"], (name,), name) for name in ("third", "fourth")])
    await store.close()

asyncio.run(main())
"""


async def lines(store: MongoStore) -> list[object]:
    return [record.value async for record in store.scan(LOG)]


@pytest.mark.parametrize("apart_seconds", [-3600, -1, 1, 3600])
async def test_machines_whose_clocks_are_apart_list_in_order_of_writing(mongo_url: str, apart_seconds: int) -> None:
    store = store_over(mongo_url)
    await store.put(Write(LOG, ("first",), "first"))
    command = [sys.executable, "-c", OTHER_MACHINE, mongo_url, str(apart_seconds)]
    subprocess.run(command, check=True, env={"CC_REDIS_HOST": "", "PYTHONWARNINGS": "error"})
    await store.put(Write(LOG, ("fifth",), "fifth"))
    assert await lines(store) == ["first", "second", "third", "fourth", "fifth"]
    await store.close()


@pytest.mark.parametrize("set_by_seconds", [-3600, 3600])
async def test_clock_that_is_set_while_the_store_is_open_changes_no_order(
    mongo_url: str, monkeypatch: pytest.MonkeyPatch, set_by_seconds: int
) -> None:
    ours, theirs = store_over(mongo_url), store_over(mongo_url)
    await theirs.put(Write(LOG, ("first",), "first"))
    await ours.put(Write(LOG, ("second",), "second"))
    tell = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: tell() + set_by_seconds * 1_000_000_000)
    await ours.put(Write(LOG, ("third",), "third"))  # before the server could be asked for its time
    await ours.connection().idle()
    await ours.put(Write(LOG, ("fourth",), "fourth"))
    monkeypatch.undo()
    await theirs.put(Write(LOG, ("fifth",), "fifth"))
    assert await lines(theirs) == ["first", "second", "third", "fourth", "fifth"]
    await ours.close()
    await theirs.close()


async def test_what_was_read_lists_before_what_is_written_after_it(mongo_url: str) -> None:
    ours, theirs = store_over(mongo_url), store_over(mongo_url)
    await ours.open()
    ours.connection().saw_tick({"tick": time.time_ns() // 1000 + 5_000_000})  # as one whose clock is ahead
    await ours.put(Write(LOG, ("first",), "first"))
    assert await lines(theirs) == ["first"]
    await theirs.put(Write(LOG, ("second",), "second"))
    assert await lines(theirs) == ["first", "second"]
    await ours.close()
    await theirs.close()


async def test_machine_that_finds_its_server_late_goes_by_its_clock_all_the_same(
    mongo_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, tell = AsyncDatabase.command, time.time_ns
    calls = 0

    async def late(self: AsyncDatabase[Any], command: str, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += command == "hello"
        if calls == 1:  # the one that connects
            await asyncio.sleep(0.5)
        return await slow(self, command, *arguments, **options)

    monkeypatch.setattr(AsyncDatabase, "command", late)
    monkeypatch.setattr(time, "time_ns", lambda: tell() + 300_000_000)
    store = store_over(mongo_url)
    await store.open()
    assert store.connection().clock.now_us() - tell() // 1000 == pytest.approx(0, abs=50_000)
    await store.close()


async def test_server_that_does_not_tell_the_time_is_asked_again_soon(
    mongo_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_RETRY_SECONDS", 0.0)
    store = store_over(mongo_url)
    await store.open()
    clock = store.connection().clock
    clock.ask()
    before = clock.is_due
    await store.get(LOG, ("first",))
    await store.connection().idle()
    assert (before, clock.is_due) == (True, False)
    await store.close()


def test_what_an_answer_cannot_tell_changes_nothing() -> None:
    def ahead_ms(clock: ServerClock, told: object, under_way_ms: int = 0) -> float:
        clock.answered(clock.ask() - under_way_ms * 1000, {"localTime": told})
        return clock.now_us() / 1000 - time.time() * 1000

    clock = ServerClock()
    before = clock.is_due
    assert ahead_ms(clock, in_seconds(5)) == pytest.approx(5000, abs=50)
    assert (before, clock.is_due) == (True, False)
    assert ahead_ms(clock, in_seconds(-5), 3_000) == pytest.approx(5000, abs=50), "too long under way to tell"
    assert ahead_ms(clock, in_seconds(-5)) == pytest.approx(-5000, abs=50)
    assert ahead_ms(clock, in_seconds(0.05)) == pytest.approx(0, abs=5), "the clock of this machine is near enough"
    assert ahead_ms(clock, in_seconds(5)) == pytest.approx(5000, abs=50)
    assert ahead_ms(clock, None) == pytest.approx(0, abs=5), "a server that tells no time"


def in_seconds(seconds: float) -> datetime:
    return datetime.now(UTC).replace(tzinfo=None) + timedelta(seconds=seconds)
