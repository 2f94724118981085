"""The reference of the persistence layer, claim by claim, in the names of Python and on real servers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pymongo
import pytest
import redis
from tests.servers import redis_server, running

import backtest_kit.mongo as bk_mongo
from backtest_kit.kit import Kit
from backtest_kit.model.candle import CandleSeries
from backtest_kit.mongo import MongoSetup
from backtest_kit.persist.adapters import ContractAdapter
from backtest_kit.persist.contracts import CONTRACTS

UNIQUE: dict[str, tuple[str, set[str]]] = {
    "candle": ("candle-items", {"symbol", "interval", "timestamp"}),
    "signal": ("signal-items", {"symbol", "strategyName", "exchangeName"}),
    "schedule": ("schedule-items", {"symbol", "strategyName", "exchangeName"}),
    "risk": ("risk-items", {"riskName", "exchangeName"}),
    "partial": ("partial-items", {"symbol", "strategyName", "exchangeName", "signalId"}),
    "breakeven": ("breakeven-items", {"symbol", "strategyName", "exchangeName", "signalId"}),
    "storage": ("storage-items", {"backtest", "signalId"}),
    "notification": ("notification-items", {"backtest", "notificationId"}),
    "log": ("log-items", {"entryId"}),
    "measure": ("measure-items", {"bucket", "entryKey"}),
    "interval": ("interval-items", {"bucket", "entryKey"}),
    "memory": ("memory-items", {"signalId", "bucketName", "memoryId"}),
    "recent": ("recent-items", {"symbol", "strategyName", "exchangeName", "frameName", "backtest"}),
    "state": ("state-items", {"signalId", "bucketName"}),
    "session": ("session-items", {"strategyName", "exchangeName", "frameName"}),
}
"""The fifteen contracts: collection, and what the unique index has at least."""

KEY: dict[str, Any] = {"symbol": "BTCUSDT", "strategy_name": "my_strategy", "exchange_name": "binance"}
SERIES: dict[str, Any] = {"exchange_name": "binance", "symbol": "BTCUSDT", "interval": "1m"}
MINUTE = 60_000
START = 1_640_995_200_000
CANDLES = CandleSeries(START + np.arange(3) * MINUTE, *([np.arange(3) + 100.0] * 5))


@pytest.fixture
def redis_of_test() -> Iterator[redis.Redis]:
    with running(redis_server()) as server, redis.Redis(port=server.port, decode_responses=True) as client:
        yield client


@pytest.fixture
async def kit(tmp_path: Path, mongo_url: str, redis_of_test: redis.Redis) -> AsyncIterator[Kit]:
    """A program after `setup()`."""
    kit = Kit(tmp_path / "dump")
    port = redis_of_test.connection_pool.connection_kwargs["port"]
    MongoSetup(kit).setup(CC_MONGO_CONNECTION_STRING=mongo_url, CC_REDIS_HOST="127.0.0.1", CC_REDIS_PORT=port)
    yield kit
    await kit.close()


@pytest.fixture
def documents(mongo_url: str) -> Iterator[Any]:
    with pymongo.MongoClient[dict[str, Any]](mongo_url) as client:
        yield client[urlsplit(mongo_url).path.strip("/")]


def adapter(kit: Kit, name: str) -> ContractAdapter:
    found = getattr(kit.persistence, name)
    assert isinstance(found, ContractAdapter)
    return found


def python_key(name: str, **changes: Any) -> dict[str, Any]:
    """A key of the contract in the names of Python."""
    fields = ["".join(f"_{c.lower()}" if c.isupper() else c for c in field) for field in CONTRACTS[name].key_fields]
    return {field: False if field == "backtest" else f"{field}-1" for field in fields} | changes


# -- files, the default ----------------------------------------------------------------------------------


async def test_files_lie_where_the_reference_says_and_survive_sigkill(tmp_path: Path) -> None:
    """dump/signal/..., dump/candle/{exchangeName}/...; a process that is killed leaves the last state."""
    program = f"""
import asyncio, os, signal, numpy as np, backtest_kit as bk
from backtest_kit.model.candle import CandleSeries
async def main():
    await bk.PersistSignalAdapter.write({{"id": "s-1"}}, **{KEY})
    candles = CandleSeries({START} + np.arange(3) * {MINUTE}, *([np.arange(3) + 100.0] * 5))
    await bk.PersistCandleAdapter.write_candles(candles, **{SERIES})
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CC_")}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=clean, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "dump/signal/my_strategy/binance/BTCUSDT.json").is_file()
    assert [path.name for path in (tmp_path / "dump/candle/binance").rglob("*.candles")] == ["2022-01.candles"]
    kit = Kit(tmp_path / "dump")
    assert await kit.persistence.signal.read(**KEY) == {"id": "s-1"}
    await kit.close()


async def test_class_of_the_reference_keeps_a_contract(tmp_path: Path) -> None:
    class MemorySignalAdapter:
        def __init__(self) -> None:
            self._store: dict[str, object] = {}

        async def read_value(self, entity_id: str) -> object:
            return self._store.get(entity_id)

        async def write_value(self, entity_id: str, entity: object) -> None:
            self._store[entity_id] = entity

    kit = Kit(tmp_path / "dump")
    kit.persistence.signal.use_persist_signal_adapter(MemorySignalAdapter)
    await kit.persistence.signal.write({"id": "s-1"}, **KEY)
    assert await kit.persistence.signal.read(**KEY) == {"id": "s-1"}
    assert not (tmp_path / "dump/signal").exists()
    await kit.close()


# -- one call --------------------------------------------------------------------------------------------


async def test_setup_keeps_all_contracts_in_their_collections(kit: Kit, documents: Any, tmp_path: Path) -> None:
    for name in UNIQUE:
        if name == "candle":
            await kit.persistence.candle.write_candles(CANDLES, **SERIES)
        else:
            await adapter(kit, name).write({"of": name}, **python_key(name))
            assert await adapter(kit, name).read(**python_key(name)) == {"of": name}
    assert {name: documents[collection].count_documents({}) for name, (collection, _) in UNIQUE.items()} == {
        name: 3 if name == "candle" else 1 for name in UNIQUE
    }
    assert not list((tmp_path / "dump").glob("*")), "the adapters of files are replaced"


async def test_unique_index_of_every_collection(kit: Kit, documents: Any) -> None:
    await kit.persistence.signal.read(**KEY)
    for name, (collection, fields) in UNIQUE.items():
        unique = [
            {field for field, _ in index["key"]}
            for index in documents[collection].index_information().values()
            if index.get("unique")
        ]
        assert len(unique) == 1, name
        assert unique[0] >= fields, name
        assert unique[0] == {"namespace", *CONTRACTS[name].key_fields}


async def test_names_of_the_interface(kit: Kit, mongo_url: str, redis_of_test: redis.Redis) -> None:
    names = ("setup", "install", "set_config", "get_config", "get_mongo", "get_redis")
    assert [name for name in names if not callable(getattr(bk_mongo, name))] == []
    setup = MongoSetup(Kit())
    setup.set_config(CC_REDIS_HOST="redis-prod", CC_REDIS_PORT=6380)
    config = setup.get_config()
    assert (config.CC_REDIS_HOST, config.CC_REDIS_PORT) == ("redis-prod", 6380)
    port = redis_of_test.connection_pool.connection_kwargs["port"]
    setup.setup(CC_MONGO_CONNECTION_STRING=mongo_url, CC_REDIS_HOST="127.0.0.1", CC_REDIS_PORT=port)
    mongo, cache = await setup.get_mongo(), await setup.get_redis()
    assert (await mongo.admin.command("ping"))["ok"] == 1
    assert cache is not None
    assert await cache.ping()
    assert await setup.get_mongo() is mongo
    assert await setup.get_redis() is cache
    await mongo.close()
    await cache.aclose()


# -- Redis -----------------------------------------------------------------------------------------------


def hits_and_misses(client: redis.Redis) -> tuple[int, int]:
    stats: dict[str, Any] = client.info("stats")
    return stats["keyspace_hits"], stats["keyspace_misses"]


async def test_write_then_read_hits_and_a_miss_is_written_back(
    kit: Kit, documents: Any, redis_of_test: redis.Redis
) -> None:
    await kit.persistence.signal.write({"id": "s-1"}, **KEY)
    (entry,) = redis_of_test.keys("backtest-kit:*")
    assert redis_of_test.get(entry) == str(documents["signal-items"].find_one()["_id"])
    assert redis_of_test.ttl(entry) > 0
    hits, misses = hits_and_misses(redis_of_test)
    assert await kit.persistence.signal.read(**KEY) == {"id": "s-1"}
    assert hits_and_misses(redis_of_test) == (hits + 1, misses)
    redis_of_test.flushall()
    assert await kit.persistence.signal.read(**KEY) == {"id": "s-1"}
    assert hits_and_misses(redis_of_test)[1] == misses + 1
    assert redis_of_test.keys("backtest-kit:*") == [entry], "the next read is instant again"


# -- writes ----------------------------------------------------------------------------------------------


async def test_concurrent_first_writes_make_one_document(mongo_url: str, documents: Any, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        kits = [Kit(tmp_path / "dump") for _ in range(4)]
        for kit in kits:
            stack.push_async_callback(kit.close)
            MongoSetup(kit).setup(
                CC_MONGO_CONNECTION_STRING=mongo_url,
                CC_REDIS_HOST="",
                CC_MONGO_SOCKET_TIMEOUT_MS=120_000,  # nothing here is about time, and the machine may be busy
                CC_MONGO_OPERATION_TIMEOUT_MS=240_000,
            )
        symbols = [f"COIN{number:02}" for number in range(60)]
        await asyncio.gather(
            *(
                kit.persistence.signal.write({"by": number}, **{**KEY, "symbol": symbol})
                for symbol in symbols
                for number, kit in enumerate(kits)
            )
        )
    found = list(documents["signal-items"].find())
    assert sorted(each["symbol"] for each in found) == symbols
    assert {each["symbol"]: each["rev"] for each in found if each["rev"] != 4} == {}, "lost, or counted twice"


async def test_first_write_of_a_candle_wins(kit: Kit) -> None:
    await kit.persistence.candle.write_candles(CANDLES, **SERIES)
    other = CandleSeries(CANDLES.timestamp, *([np.arange(3) + 500.0] * 5))
    await kit.persistence.candle.write_candles(other, **SERIES)
    found = await kit.persistence.candle.read_candles(START, START + 3 * MINUTE, **SERIES)
    assert found.close.tolist() == CANDLES.close.tolist()


@pytest.mark.parametrize("name", ["measure", "interval", "memory"])
async def test_what_is_removed_stays_as_a_document_and_leaves_the_list(name: str, kit: Kit, documents: Any) -> None:
    shared = python_key(name)
    last = list(shared)[-1]
    for number in range(2):
        await adapter(kit, name).write({"number": number}, **shared | {last: f"entry-{number}"})
    await adapter(kit, name).remove(**shared | {last: "entry-0"})
    prefix = {field: part for field, part in shared.items() if field != last}
    assert [value async for _, value in adapter(kit, name).list(**prefix)] == [{"number": 1}]
    assert await adapter(kit, name).read(**shared | {last: "entry-0"}) is None
    kept = {each["payload"]["number"]: each["removed"] for each in documents[f"{name}-items"].find() if each["payload"]}
    assert documents[f"{name}-items"].count_documents({"removed": True}) == 1
    assert documents[f"{name}-items"].count_documents({}) == 2
    assert kept[1] is False


async def test_position_survives_a_killed_process(mongo_url: str, tmp_path: Path) -> None:
    """After the kill another process goes on from the exact state."""
    program = f"""
import asyncio, os, signal, backtest_kit as bk
from backtest_kit.mongo import setup
setup(CC_REDIS_HOST="")
async def main():
    await bk.PersistSignalAdapter.write({{"id": "s-1", "minutes": float("inf")}}, **{KEY})
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    environment = {**os.environ, "CC_MONGO_CONNECTION_STRING": mongo_url}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    kit = Kit(tmp_path / "dump")
    MongoSetup(kit).setup(CC_MONGO_CONNECTION_STRING=mongo_url, CC_REDIS_HOST="")
    assert await kit.persistence.signal.read(**KEY) == {"id": "s-1", "minutes": float("inf")}
    await kit.close()
