"""A program moves from files or SQLite to MongoDB and back: everything arrives, also when the move is killed."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pymongo
import pytest
from tests.commands import run_command
from tests.persist.test_migration import BTC, RECORDS, fill, require_equal, run_child, spread

from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.migration import migrate_store
from backtest_kit.persist.store import Store, Write
from backtest_kit.persist.urls import store_at

Addresses = Callable[[str, str], str]
WAYS = [("file", "mongodb"), ("mongodb", "file"), ("sqlite", "mongodb"), ("mongodb", "sqlite")]


SPACES: list[tuple[str, ...]] = [(), ("paper",), ("backtest-1", "Deeper/é"), ("candles only",)]


async def contents(store: Store) -> list[Any]:
    """What must arrive, read without the code that moves it."""
    found: list[Any] = []
    for path in SPACES:
        space = reduce(lambda outer, name: outer.namespace(name), path, store)
        found.append(await space.candles.read(BTC, -(2**53), 2**53))
        for row in RECORDS:
            records = [record async for record in space.scan(row, include_removed=True)]
            found.append([(each.key, each.value, each.when, each.removed) for each in records])
    return found


@pytest.fixture
def address(mongo_address: str, tmp_path: Path) -> Iterator[Addresses]:
    """The address of a store of that kind and name; the databases are dropped afterwards."""
    run = uuid.uuid4().hex[:12]
    made: set[str] = set()

    def of(kind: str, name: str) -> str:
        if kind != "mongodb":
            return f"{kind}:{tmp_path / name}"
        made.add(f"test-{run}-{len(made)}")
        parts = urlsplit(mongo_address)
        return parts._replace(path=f"/test-{run}-{len(made) - 1}").geturl()

    yield of
    with pymongo.MongoClient[dict[str, object]](mongo_address) as client:
        for database in made:
            client.drop_database(database)


@pytest.mark.parametrize(("source_kind", "target_kind"), WAYS)
async def test_everything_moves_and_is_proven(source_kind: str, target_kind: str, address: Addresses) -> None:
    source_url, target_url = address(source_kind, "source"), address(target_kind, "target")
    written = store_at(source_url)
    await fill(written)
    await written.close()
    done = run_command("store", "migrate", source_url, target_url, "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Both stores have the same records, in the same order." in done.stdout
    source, target = store_at(source_url, existing=True), store_at(target_url, existing=True)
    assert await contents(target) == await contents(source)
    await source.close()
    await target.close()


@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.parametrize(("source_kind", "target_kind"), [("file", "mongodb"), ("mongodb", "sqlite")])
async def test_kill_at_any_point_and_resume(
    source_kind: str, target_kind: str, address: Addresses, tmp_path: Path
) -> None:
    source_url = address(source_kind, "source")
    source = store_at(source_url)
    await fill(source, each=3)
    await source.close()
    whole = run_child(source_url, address(target_kind, "whole"))
    assert whole.returncode == 0, whole.stderr
    points = spread(whole.stdout, 3)[1:]
    assert len(points) == 2
    gone_on = 0
    for point in points:
        target_url = address(target_kind, point)
        killed = run_child(source_url, target_url, point)
        assert killed.returncode == -9, (point, killed.stdout, killed.stderr)
        target = store_at(target_url)
        moved = await migrate_store(source, target, resume=True)
        gone_on += any(item.present for item in moved.contracts)
        await require_equal(source, target)
        await target.close()
    assert gone_on, "the kills come too early to be resumed from"
    await source.close()


def test_password_of_neither_address_is_shown(address: Addresses) -> None:
    empty = "mongodb://bot:geheim@127.0.0.1:9/bot?serverSelectionTimeoutMS=200"
    for arguments in ((empty, address("file", "dump")), (empty, empty)):
        done = run_command("store", "migrate", *arguments)
        assert done.returncode != 0
        assert "geheim" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


async def test_database_under_another_spelling_of_its_host_is_the_same(address: Addresses) -> None:
    url = address("mongodb", "source")
    other = url.replace("127.0.0.1", "localhost") if "127.0.0.1" in url else f"{url}?uuidRepresentation=standard"
    source = MongoStore(url)
    await source.put(Write(CONTRACTS["signal"], ("trend", "binance", "BTCUSDT"), 1))
    await source.close()
    with pymongo.MongoClient[dict[str, Any]](url) as client:
        database = client[urlsplit(url).path.strip("/")]
        before = {name: list(database[name].find()) for name in database.list_collection_names()}
        refused = run_command("store", "migrate", url, other, "--verify")
        assert refused.returncode != 0
        assert "the same store" in refused.stdout + refused.stderr
        assert {name: list(database[name].find()) for name in database.list_collection_names()} == before
    assert run_command("store", "migrate", url, address("mongodb", "of the same server")).returncode == 0


async def test_thousands_of_records_move_with_the_settings_of_the_command(address: Addresses) -> None:
    """Those of one bucket, and those of which each is in a bucket of its own."""
    source, target = store_at(address("sqlite", "bot.db")), MongoStore(address("mongodb", "target"), patient=True)
    for start in range(0, 2_500, 500):
        keys = [f"{number:05}" for number in range(start, start + 500)]
        await source.batch([Write(CONTRACTS["memory"], ("s-1", "plan", key), [0] * 20, when=1) for key in keys])
    await source.batch([Write(CONTRACTS["state"], (f"s-{number}", "plan"), number) for number in range(200)])
    moved = await migrate_store(source, target)
    assert {each.contract: each.copied for each in moved.contracts} == {"memory": 2_500, "state": 200}
    assert [await target.count(CONTRACTS[name]) for name in ("memory", "state")] == [2_500, 200]
    await source.close()
    await target.close()


async def test_large_lists_of_small_numbers_move_to_a_server_without_transactions(
    address: Addresses, standalone_url: str
) -> None:
    """It has no batches: the records are written one by one. Together they are larger than a document can be."""
    source, target = store_at(address("sqlite", "bot.db")), MongoStore(standalone_url, patient=True)
    for number in range(8):
        await source.put(Write(CONTRACTS["memory"], ("s-1", "plan", str(number)), [number] * 200_000))
    moved = await migrate_store(source, target)
    assert [each.copied for each in moved.contracts] == [8]
    record = await target.get(CONTRACTS["memory"], ("s-1", "plan", "7"))
    assert record is not None
    assert record.value == [7] * 200_000
    await source.close()
    await target.close()
