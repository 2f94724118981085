"""Redis beside MongoDB: whatever becomes of it costs time, never an answer and never a write."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
import redis
from bson.objectid import ObjectId
from tests.servers import redis_server, running

from backtest_kit.persist.backends.mongo.connection import database_of
from backtest_kit.persist.backends.mongo.documents import name_of
from backtest_kit.persist.backends.mongo.reading import cache_name
from backtest_kit.persist.backends.mongo.redis_ids import IdCache
from backtest_kit.persist.backends.mongo.settings import MongoSettings
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Write

STATE = CONTRACTS["state"]
KEYS = [(f"signal-{number}", "notes") for number in range(8)]


def store_over(url: str, redis_address: str, prefix: str = "test") -> MongoStore:
    return MongoStore(url, settings=MongoSettings(CC_REDIS_URL=redis_address, CC_REDIS_PREFIX=prefix))


def entry(url: str, key: tuple[str, ...], prefix: str = "test") -> str:
    return f"{prefix}:{database_of(url)}:{cache_name(STATE, name_of('', STATE, key))}"


@pytest.fixture
def cache(redis_address: str, mongo_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_address) as client:
        yield client
        for name in client.scan_iter(f"*{database_of(mongo_url)}*"):
            client.delete(name)


@pytest_asyncio.fixture
async def store(mongo_url: str, redis_address: str, cache: redis.Redis) -> AsyncIterator[MongoStore]:
    store = store_over(mongo_url, redis_address)
    for key in KEYS:
        await store.put(Write(STATE, key, list(key)))
    yield store
    await store.close()


async def require_right_answers(store: MongoStore) -> None:
    for key in KEYS:
        found = await store.get(STATE, key)
        assert found is not None
        assert (found.key, found.value) == (key, list(key))
    assert await store.get(STATE, ("absent", "notes")) is None


def is_passed_over(store: MongoStore) -> bool:
    ids = store.connection().ids
    assert ids is not None
    return bool(ids.is_passed_over)


async def test_write_leaves_the_id_of_its_document_for_a_while(
    store: MongoStore, cache: redis.Redis, mongo_url: str
) -> None:
    document = await store.connection().database["state-items"].find_one({"signalId": KEYS[0][0]})
    assert document is not None
    assert cache.get(entry(mongo_url, KEYS[0])) == str(document["_id"]).encode()
    ttl = cache.ttl(entry(mongo_url, KEYS[0]))
    assert isinstance(ttl, int)
    assert 0 < ttl <= MongoSettings().CC_REDIS_TTL_SECONDS


@pytest.mark.parametrize("scripts", ["taken", "forbidden", "unknown"])
async def test_writes_of_many_leave_their_ids(mongo_url: str, scripts: str) -> None:
    renamed = ["--rename-command", "EVAL", ""] if scripts == "unknown" else []
    with running(redis_server(*renamed)) as server, redis.Redis(port=server.port) as client:
        may = ["+@all", *(["-eval"] if scripts == "forbidden" else [])]
        client.execute_command("ACL", "SETUSER", "bot", "on", ">secret", "~*", *may)
        store = store_over(mongo_url, f"redis://bot:secret@127.0.0.1:{server.port}")
        await store.put_each([Write(STATE, key, list(key)) for key in KEYS[:4]])
        await store.put_each([Write(STATE, key, list(key)) for key in KEYS[4:]])
        refused = client.info("commandstats").get("cmdstat_eval", {}).get("rejected_calls", 0)
        assert refused <= 1, "it is not asked again"
        documents = store.connection().database["state-items"].find()
        ids = {entry(mongo_url, (each["signalId"], each["bucketName"])): each["_id"] async for each in documents}
        assert {name.decode() for name in client.scan_iter()} == ids.keys()
        assert all(client.get(name) == str(identity).encode() for name, identity in ids.items())
        assert all(0 < client.ttl(name) <= MongoSettings().CC_REDIS_TTL_SECONDS for name in ids)
        await require_right_answers(store)
        assert not is_passed_over(store)
        await store.close()


async def test_candles_have_no_entries(store: MongoStore, cache: redis.Redis) -> None:
    from tests.mongo.samples import ALWAYS, BTC, candles

    before = cache.dbsize()
    await store.candles.write(BTC, candles(0, 50))
    assert len(await store.candles.read(BTC, *ALWAYS)) == 50
    assert cache.dbsize() == before


async def test_poisoned_entries_are_never_an_answer(store: MongoStore, cache: redis.Redis, mongo_url: str) -> None:
    """10,000 of them: random bytes, the id of another key, of another database, of nothing, and other types."""
    chance = random.Random(7)  # noqa: S311
    other_database = store_over(mongo_url + "-other", "redis://127.0.0.1:9")
    strange = await other_database.put(Write(STATE, KEYS[0], "of another database"))
    assert strange.rev == 1
    foreign = await other_database.connection().database["state-items"].find_one({})
    ids = [document["_id"] async for document in store.connection().database["state-items"].find({})]
    assert foreign is not None
    for _ in range(100):
        pipeline = cache.pipeline(transaction=False)
        for number in range(100):
            name = entry(mongo_url, KEYS[number % len(KEYS)])
            pipeline.delete(name)
            match chance.randrange(6):
                case 0:
                    pipeline.set(name, chance.randbytes(chance.randrange(40)))
                case 1:
                    pipeline.set(name, str(chance.choice(ids)))
                case 2:
                    pipeline.set(name, str(foreign["_id"]))
                case 3:
                    pipeline.set(name, str(ObjectId()))
                case 4:
                    pipeline.rpush(name, "a", "b")
                case 5:
                    pipeline.hset(name, "a", "b")
        pipeline.execute()
        await require_right_answers(store)
    assert not is_passed_over(store)
    await other_database.connection().mongo.drop_database(database_of(mongo_url) + "-other")
    await other_database.close()


async def test_flush_in_the_middle_is_made_good_by_one_pass(mongo_url: str) -> None:
    with running(redis_server()) as server, redis.Redis(port=server.port) as cache:
        store = store_over(mongo_url, f"redis://127.0.0.1:{server.port}")
        for key in KEYS:
            await store.put(Write(STATE, key, list(key)))
        for _ in range(5):
            cache.flushall()
            await require_right_answers(store)
            assert all(cache.exists(entry(mongo_url, key)) for key in KEYS)
        await store.close()


async def test_two_projects_share_one_redis(
    store: MongoStore, cache: redis.Redis, mongo_url: str, redis_address: str
) -> None:
    other = store_over(mongo_url + "-2", redis_address)
    await other.put(Write(STATE, KEYS[0], "other"))
    found = await other.get(STATE, KEYS[0])
    assert found is not None
    assert found.value == "other"
    assert await other.get(STATE, KEYS[1]) is None
    await require_right_answers(store)
    await other.connection().mongo.drop_database(database_of(mongo_url) + "-2")
    await other.close()


@pytest.mark.parametrize("point", ["mongo.after_write", "mongo.after_cache"])
async def test_death_between_the_write_and_the_cache_loses_nothing(
    store: MongoStore, mongo_url: str, redis_address: str, point: str
) -> None:
    program = (
        "import asyncio, sys\nfrom backtest_kit.persist.backends.mongo.store import MongoStore\n"
        "from backtest_kit.persist.contracts import CONTRACTS\nfrom backtest_kit.persist.store import Write\n"
        "store = MongoStore(sys.argv[1])\n"
        "asyncio.run(store.put(Write(CONTRACTS['signal'], ('trend', 'binance', 'BTCUSDT'), 'new')))\n"
    )
    environ = {
        **os.environ,
        "BACKTEST_KIT_CRASH": point,
        "CC_REDIS_URL": redis_address,
        "CC_REDIS_PREFIX": "test",
    }
    command = [sys.executable, "-c", program, mongo_url]
    done = await asyncio.to_thread(subprocess.run, command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    found = await store.get(CONTRACTS["signal"], ("trend", "binance", "BTCUSDT"))
    assert found is not None
    assert (found.value, found.rev) == ("new", 1)


async def test_a_client_that_loses_a_cancellation_does_not_lose_ours(
    mongo_url: str, redis_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_over(mongo_url, redis_address)
    await store.open()
    ids = store.connection().ids
    assert ids is not None
    asked = asyncio.Event()

    async def deaf(name: str) -> None:
        asked.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.05)

    monkeypatch.setattr(ids.client, "get", deaf)
    reading = asyncio.ensure_future(store.get(STATE, KEYS[0]))
    await asked.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await store.close()


async def test_redis_that_dies_is_passed_over_and_taken_back(mongo_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "backtest_kit.mongo")
    with running(redis_server()) as server:
        store = store_over(mongo_url, f"redis://127.0.0.1:{server.port}")
        await store.open()
        connection = store.connection()
        assert connection.ids is not None
        await connection.ids.close()
        connection.ids = IdCache(connection.settings, connection.database_name, connection.log, pause_seconds=0.05)
        for key in KEYS:
            await store.put(Write(STATE, key, list(key)))
        server.kill()
        for _ in range(3):
            await require_right_answers(store)
        assert is_passed_over(store)
        server.start()
        for _ in range(200):
            await require_right_answers(store)
            if not is_passed_over(store):
                break
        assert not is_passed_over(store)
        await store.close()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said
    assert "MongoDB only" in said[0]
    assert "answers again" in said[1]


@pytest.mark.parametrize("options", [["--requirepass", "right"], ["--maxmemory", "1"]], ids=["refuses", "is full"])
async def test_redis_that_refuses_changes_no_answer(mongo_url: str, options: list[str]) -> None:
    with running(redis_server(*options)) as server:
        store = store_over(mongo_url, f"redis://:wrong@127.0.0.1:{server.port}")
        for key in KEYS:
            await store.put(Write(STATE, key, list(key)))
        await require_right_answers(store)
        await store.close()


async def test_address_that_is_no_redis_changes_no_answer(mongo_url: str) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    store = store_over(mongo_url, f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    for key in KEYS:
        await store.put(Write(STATE, key, list(key)))
    await require_right_answers(store)
    await store.close()
    server.close()


async def test_absent_key_with_an_entry_is_absent(store: MongoStore, cache: redis.Redis, mongo_url: str) -> None:
    absent: Any = ("absent", "notes")
    cache.set(entry(mongo_url, absent), str(ObjectId()))
    assert await store.get(STATE, absent) is None
    assert not cache.exists(entry(mongo_url, absent))
