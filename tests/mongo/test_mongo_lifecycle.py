"""The Mongo store of several loops, threads and processes, and how it ends in each of them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

import psutil
import pymongo
import pytest
from pymongo import monitoring
from tests.mongo.samples import KEY, NAME, Database, store_over

from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Write

SIGNAL, STATE = CONTRACTS["signal"], CONTRACTS["state"]


class TestLoopsAndForks:
    def test_every_loop_has_connections_of_its_own(self, mongo_url: str) -> None:
        store = store_over(mongo_url)

        async def write(number: int) -> tuple[int, int]:
            record = await store.put(Write(SIGNAL, KEY, number))
            connection = store.connection()
            await store.close()
            return record.rev, id(connection.mongo)

        results = [asyncio.run(write(number)) for number in range(3)]
        assert [rev for rev, _ in results] == [1, 2, 3]

    async def test_two_loops_at_once(self, store: MongoStore, mongo_url: str) -> None:
        async def elsewhere() -> Any:
            await store.put(Write(STATE, ("s", "b"), "from a thread"))
            other = store.connection()
            await store.close()
            return other

        other = await asyncio.to_thread(lambda: asyncio.run(elsewhere()))
        assert other.mongo is not store.connection().mongo
        found = await store.get(STATE, ("s", "b"))
        assert found is not None
        assert found.value == "from a thread"

    def test_fork_of_an_open_store_has_connections_of_its_own(self, mongo_url: str) -> None:
        program = FORK.format(url=mongo_url)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split()) == ["child", "parent"]

    async def test_close_waits_for_writes_whose_callers_are_gone(self, store: MongoStore, database: Database) -> None:
        writing = asyncio.ensure_future(store.put(Write(SIGNAL, KEY, "kept")))
        await asyncio.sleep(0)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        await store.close()
        assert database["signal-items"].find_one(NAME)["payload"] == "kept"


FORK = """
import asyncio, os, warnings
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Write
warnings.simplefilter("ignore", DeprecationWarning)
STATE = CONTRACTS["state"]
store = MongoStore("{url}")
async def work(name):
    for number in range(20):
        await store.put(Write(STATE, (name, "b"), number))
        found = await store.get(STATE, (name, "b"))
        assert found.value == number, found
async def main():
    await store.open()
    await work("before")
    child = os.fork()
    if child == 0:
        asyncio.events._set_running_loop(None)
        try:
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            loop.run_until_complete(work("child"))
            loop.run_until_complete(store.close())
            print("child", flush=True)
            os._exit(0)
        finally:
            os._exit(1)
    await work("parent")
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert status == 0, status
    await store.close()
    print("parent", flush=True)
asyncio.run(main())
"""


class Commands(monitoring.CommandListener):
    """What is sent to servers, in its order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        command = event.command
        self.names.append(f"{event.command_name} {command.get(event.command_name)}")

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        self.names.append(f"{event.command_name} is done")

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        raise AssertionError(event.failure)


def connections(url: str) -> int:
    """How many this process has to the server."""
    port = pymongo.uri_parser.parse_uri(url)["nodelist"][0][1]
    return sum(each.raddr and each.raddr.port == port for each in psutil.Process().net_connections("tcp"))


@pytest.mark.parametrize("is_open", [True, False], ids=["open", "not open yet"])
async def test_what_is_written_while_the_store_closes_is_flushed(mongo_url: str, is_open: bool) -> None:
    commands = Commands()
    listeners = list(monitoring._LISTENERS.command_listeners)
    monitoring.register(commands)
    try:
        held = connections(mongo_url)
        store = store_over(mongo_url)
        if is_open:
            await store.open()
        writing = [asyncio.ensure_future(store.put(Write(STATE, ("s", str(number)), number))) for number in range(20)]
        await asyncio.sleep(0)
        await store.close()
        assert [record.rev for record in await asyncio.gather(*writing)] == [1] * 20
    finally:
        monitoring._LISTENERS.command_listeners[:] = listeners
    flushed = commands.names.index("update store-meta", commands.names.index("findAndModify state-items"))
    assert "findAndModify is done" not in commands.names[flushed:]
    assert commands.names.count("findAndModify is done") == 20
    assert connections(mongo_url) <= held, "a connection of the store is left"


def test_loops_of_many_threads_take_connections_at_once(mongo_url: str) -> None:
    store = store_over(mongo_url)
    failed: list[BaseException] = []

    async def use() -> None:
        store.connection()

    def work() -> None:
        try:
            for _ in range(40):
                asyncio.run(use())
        except BaseException as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failed == []
