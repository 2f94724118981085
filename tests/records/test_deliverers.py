"""Several processes that have one store and one sink: one of them delivers, and when it ends another goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pymongo import AsyncMongoClient
from tests.records.conftest import kit_on
from tests.records.happenings import observe, opened
from tests.records.receiver import SECRET, Receiver, hook
from tests.records.stores import MONGO, SHARED, address_on

import backtest_kit as bk
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.records import delivery, sinks
from backtest_kit.records.notification import Notification

PROGRAM = Path(__file__).with_name("deliverer.py")


async def test_of_two_processes_with_one_sink_one_delivers_what_both_tell(
    shared_address: str, tmp_path: Path, receiver: Receiver
) -> None:
    one, other = (kit_on(shared_address, tmp_path) for _ in range(2))
    for kit in (one, other):
        kit.records.notification.sink(hook(receiver))
        await kit.records.begin("live")
    for number in range(5):
        await observe(one, [opened(f"one-{number}", number)])
        await observe(other, [opened(f"other-{number}", number)])
    everything = {f"{name}-{number}" for name in ("one", "other") for number in range(5)}
    await receiver.until(lambda: {each["signalId"] for each in receiver.got} == everything)
    await one.close()
    await observe(other, [opened("late", 9)])
    await receiver.until(lambda: receiver.got[-1]["signalId"] == "late")
    await other.close()
    assert len(receiver.ids) == len(set(receiver.ids)) == 11


@pytest.mark.usefixtures("short_drain")
async def test_sinks_of_one_name_that_send_elsewhere_are_two(tmp_path: Path, receiver: Receiver) -> None:
    receiver.status = lambda body: 503 if body["chat_id"] == 2 else 200

    def bot(chat_id: int) -> bk.Kit:
        kit = kit_on("sqlite:{place}/bot.db", tmp_path)
        kit.records.notification.sink(sinks.telegram(f"123:{SECRET}", chat_id, base_url=receiver.url))
        return kit

    bots = [bot(1), bot(2)]
    for each in bots:
        await each.records.begin("live")
    for number, each in enumerate((*bots, *bots)):
        await observe(each, [opened(f"s-{number}", number)])
    await receiver.until(lambda: len(receiver.got) == 4)
    for each in bots:
        await each.close()
    receiver.status = lambda body: 200
    again = bot(2)
    await again.records.begin("live")
    await receiver.until(lambda: len(receiver.got) == 8)
    await again.close()
    texts = [[each["text"] for each in receiver.got if each["chat_id"] == chat_id] for chat_id in (1, 2)]
    assert texts[0] == texts[1]
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("bot.db*"))
    assert SECRET.encode() not in kept, "the store knows where sinks send to, and no secret"


@pytest.mark.parametrize("store", SHARED)
@pytest.mark.usefixtures("short_drain")
async def test_a_process_that_cannot_deliver_lets_another_one_try(
    store: str, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE_S", 30.0)
    tried, told = list[str](), list[str]()

    async def cut_off(notification: Notification) -> None:
        tried.append(notification.signal_id)
        raise OSError("no route to host")

    async def connected(notification: Notification) -> None:
        told.append(notification.signal_id)

    one, other = (kit_on(SHARED[store], tmp_path) for _ in range(2))
    one.records.notification.sink(cut_off, name="phone")
    await observe(one, [opened("s-1")])
    await receiver.until(lambda: tried == ["s-1"])
    other.records.notification.sink(connected, name="phone")
    await observe(other, [opened("s-2", 1)])
    await receiver.until(lambda: told == ["s-1", "s-2"])
    await other.close()
    await one.close()


def start(address: str, place: Path, receiver: Receiver, count: int, fatal: str = "") -> subprocess.Popen[bytes]:
    """A process that delivers, and kills itself between handing over `fatal` and marking it."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    command = [sys.executable, str(PROGRAM), address, str(place), receiver.url, str(count), fatal]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize("store", SHARED)
async def test_another_process_goes_on_where_a_killed_one_was(store: str, tmp_path: Path, receiver: Receiver) -> None:
    """The one that is killed is in the middle of a delivery: that one comes again, and no other."""
    address = SHARED[store]
    held = asyncio.Event()

    async def until_killed(body: dict[str, Any]) -> None:
        if body["signalId"] == "s-2":
            held.set()
            await asyncio.Event().wait()

    receiver.before = until_killed
    killed = start(address, tmp_path, receiver, 4)
    try:
        async with asyncio.timeout(60):
            await held.wait()
        assert [each["signalId"] for each in receiver.got] == ["s-0", "s-1"]
        receiver.before = None
        kit = kit_on(address, tmp_path)
        kit.records.notification.sink(hook(receiver))
        await kit.records.begin("live")
        await observe(kit, [opened("own", 9)])
    finally:
        killed.kill()
        killed.wait()
    await receiver.until(lambda: len(receiver.got) == 5)
    await kit.close()
    assert [each["signalId"] for each in receiver.got] == ["s-0", "s-1", "s-2", "s-3", "own"]


async def test_what_was_handed_over_and_not_marked_comes_again_and_nothing_else_does(
    shared_address: str, tmp_path: Path, receiver: Receiver
) -> None:
    killed, other = start(shared_address, tmp_path, receiver, 4, "s-2"), None
    try:
        async with asyncio.timeout(60):
            assert await asyncio.to_thread(killed.wait) == -signal.SIGKILL
        assert [each["signalId"] for each in receiver.got] == ["s-0", "s-1", "s-2"]
        other = start(shared_address, tmp_path, receiver, 5)
        await receiver.until(lambda: len(receiver.got) == 6)
    finally:
        for process in filter(None, (killed, other)):
            process.kill()
            process.wait()
    assert [each["signalId"] for each in receiver.got] == ["s-0", "s-1", "s-2", "s-2", "s-3", "s-4"]
    kit = kit_on(shared_address, tmp_path)
    kit.records.notification.sink(hook(receiver))
    await observe(kit, [opened("last", 9)])
    await receiver.until(lambda: receiver.got[-1]["signalId"] == "last")
    await kit.close()
    rest = [each["signalId"] for each in receiver.got[6:]]
    assert rest in (["last"], ["s-4", "last"]), "the second process was killed as well, before its last mark or after"


async def test_what_comes_in_late_is_not_lost_with_the_process_that_delivers(
    request: pytest.FixtureRequest, tmp_path: Path, receiver: Receiver
) -> None:
    with address_on(MONGO, request) as here, address_on(MONGO, request) as aside:
        kit, other = kit_on(here, tmp_path), kit_on(aside, tmp_path)
        kit.records.notification.sink(hook(receiver))
        await observe(kit, [opened("first")])
        await observe(other, [opened("late", 1)])
        await observe(kit, [opened("second", 2), opened("third", 3)])
        await receiver.until(lambda: len(receiver.got) == 3)
        await kit.close()
        await put_aside(aside, here)
        kit = kit_on(here, tmp_path)
        kit.records.notification.sink(hook(receiver))
        await kit.records.begin("live")
        await receiver.until(lambda: len(receiver.got) == 4)
        await observe(kit, [opened("fourth", 4)])
        await receiver.until(lambda: len(receiver.got) == 5)
        await kit.close()
        await other.close()
    assert [each["signalId"] for each in receiver.got] == ["first", "second", "third", "late", "fourth"]


async def put_aside(source: str, target: str) -> None:
    """Put the notification of one database into another one, as it is."""
    name = CONTRACTS["notification"].collection
    client: Any  # the stubs have it that find_one brings nothing
    async with AsyncMongoClient(target) as client:
        written = await client[urlsplit(source).path[1:]][name].find_one({})
        assert written is not None
        await client.get_default_database()[name].insert_one(written)


async def test_what_a_server_shows_late_is_delivered_late(
    request: pytest.FixtureRequest, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that write at once to MongoDB the later one may be seen first."""
    monkeypatch.setattr(delivery, "LOOK_S", 0.05)
    with address_on(MONGO, request) as here, address_on(MONGO, request) as aside:
        kit, other = kit_on(here, tmp_path), kit_on(aside, tmp_path)
        kit.records.notification.sink(hook(receiver))
        await observe(kit, [opened("first")])
        await observe(other, [opened("late", 1)])
        await observe(kit, [opened("second", 2)])
        await receiver.until(lambda: len(receiver.got) == 2)
        await put_aside(aside, here)
        await receiver.until(lambda: len(receiver.got) == 3)
        await observe(kit, [opened("third", 3)])
        await receiver.until(lambda: len(receiver.got) == 4)
        await kit.close()
        await other.close()
    assert [each["signalId"] for each in receiver.got] == ["first", "second", "late", "third"]
