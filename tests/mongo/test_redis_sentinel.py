"""Redis behind sentinels: the master is asked for, also when it is another one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import redis
from tests.servers import redis_server, running, sentinel_server

from backtest_kit.errors import UserError
from backtest_kit.persist.backends.mongo.redis_ids import client_of
from backtest_kit.persist.backends.mongo.settings import MongoSettings, from_environment
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Write

STATE = CONTRACTS["state"]
MINE = ("s-1", "notes")


async def test_ids_are_kept_by_the_master_and_after_a_failover_by_the_next_one(mongo_url: str) -> None:
    with (
        running(redis_server()) as first,
        running(redis_server("--replicaof", "127.0.0.1", str(first.port))) as second,
        running(sentinel_server("ids", first.port)) as sentinel,
        redis.Redis(port=second.port) as there,
        redis.Redis(port=sentinel.port) as watcher,
    ):
        async with asyncio.timeout(30):
            while not watcher.sentinel_slaves("ids"):
                await asyncio.sleep(0.05)
        url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/ids"
        store = MongoStore(mongo_url, settings=MongoSettings(CC_REDIS_URL=url))
        await store.put(Write(STATE, MINE, 1))
        with redis.Redis(port=first.port) as client:
            (entry,) = client.scan_iter()
        first.kill()
        found = await store.get(STATE, MINE)
        assert found is not None
        assert found.value == 1
        async with asyncio.timeout(60):
            while watcher.sentinel_get_master_addr_by_name("ids")[1] != second.port:
                await asyncio.sleep(0.05)
            there.delete(entry)
            while there.get(entry) is None:
                await store.put(Write(STATE, MINE, 2))
                await asyncio.sleep(0.1)
        found = await store.get(STATE, MINE)
        assert found is not None
        assert found.value == 2
        await store.close()


async def test_address_of_sentinels_is_read_whole() -> None:
    url = "rediss+sentinel://bot:se%40cret@one,[::1]:7000/my%20ids/3?sentinel_password=other"
    client, sentinels = client_of(url, 0.25)
    pool: Any = client.connection_pool
    how = pool.connection_kwargs
    assert (how["username"], how["password"], how["db"], how["socket_timeout"]) == ("bot", "se@cret", 3, 0.25)
    assert pool.service_name == "my ids"
    asked = [each.connection_pool.connection_kwargs for each in sentinels]
    assert [(each["host"], each["port"]) for each in asked] == [("one", 26379), ("::1", 7000)]
    assert [each["password"] for each in asked] == ["other", "other"]
    for each in (client, *sentinels):
        await each.aclose()


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://secret@host",
        "redis+sentinel://secret@host/",
        "redis+sentinel://secret@host:x/ids",
        "redis+sentinel://secret@/ids",
        "redis+sentinel://secret@host,/ids",
        "redis+sentinel://secret@host/ids/two",
        "redis+sentinel://secret@host/ids?password=secret",
        "redis+sentinel://secret@host/ids?secret",
    ],
)
def test_address_that_is_none_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(UserError, match="correct CC_REDIS_URL") as failure:
        client_of(url, 0.25)
    assert "secret" not in str(failure.value)


def test_other_kinds_of_address_are_named() -> None:
    with pytest.raises(UserError, match=r"redis\+sentinel://"):
        from_environment({"CC_REDIS_URL": "sentinel://host/ids"})
