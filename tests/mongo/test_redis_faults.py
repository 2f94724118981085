"""Redis that goes away, refuses, is full, flushed or behind: no operation fails, no answer is wrong.

In `make prove` each of the fifty flushes comes in the middle of a thousand operations.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import time
from typing import Any

import pytest
import redis
from tests.mongo.test_redis_ids import (
    KEYS,
    STATE,
    cache,
    entry,
    is_passed_over,
    require_right_answers,
    store,
    store_over,
)
from tests.samples import size
from tests.servers import Server, redis_server, running

from backtest_kit.persist.backends.mongo.connection import database_of
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.store import Write

__all__ = ["cache", "store"]

FLUSHES, PER_TASK = size(4, 50), size(20, 100)
UNTOLD = size(200, 1_000)
SLACK_SECONDS = 0.5
"""For a machine that has other things to do."""


def at(server: Server) -> str:
    return f"redis://127.0.0.1:{server.port}"


async def fill(store: MongoStore) -> None:
    for key in KEYS:
        await store.put(Write(STATE, key, list(key)))


async def test_redis_that_is_gone_refuses_or_is_full_fails_nothing_and_is_told_at_once(
    mongo_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def require_alarm(store: MongoStore, number: int) -> None:
        await store.open()
        caplog.clear()
        started = time.time()
        while not caplog.records:
            await store.put(Write(STATE, (f"alarm-{number}", "notes"), number))
            await require_right_answers(store)
        assert caplog.records[0].created - started < 1.0 + SLACK_SECONDS
        assert "nothing is lost" in caplog.records[0].getMessage()

    caplog.set_level(logging.WARNING, "backtest_kit.mongo")
    with contextlib.ExitStack() as stack:
        gone, refusing, full, stalled = (
            stack.enter_context(running(redis_server(*options))) for options in ([], ["--requirepass", "right"], [], [])
        )
        gone.kill()
        with redis.Redis(port=full.port) as client:
            client.config_set("maxmemory", 1)
        for number, server in enumerate((gone, refusing, full)):
            store = store_over(
                mongo_url, f"redis://:wrong@127.0.0.1:{server.port}" if server is refusing else at(server)
            )
            await fill(store)
            await store.close()
            store = store_over(
                mongo_url, f"redis://:wrong@127.0.0.1:{server.port}" if server is refusing else at(server)
            )
            await require_alarm(store, number)
            await store.close()
        store = store_over(mongo_url, at(stalled))
        await fill(store)
        os.kill(stalled.pid, signal.SIGSTOP)
        await require_alarm(store, 3)
        os.kill(stalled.pid, signal.SIGCONT)
        await store.close()


async def test_full_redis_is_still_asked_for_what_it_has(mongo_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "backtest_kit.mongo")
    with running(redis_server()) as server, redis.Redis(port=server.port) as client:
        store = store_over(mongo_url, at(server))
        await fill(store)
        client.config_set("maxmemory", 1)
        for _ in range(5):
            await require_right_answers(store)
            await store.put(Write(STATE, ("more", "notes"), "more"))
        assert not is_passed_over(store)
        assert ["stores no ids" in record.getMessage() for record in caplog.records] == [True]
        client.config_resetstat()
        await require_right_answers(store)
        assert client.info("stats")["keyspace_hits"] == len(KEYS)
        await store.close()


@pytest.mark.sampled
@pytest.mark.slow
async def test_flushes_in_the_middle_of_many_operations_change_no_answer(mongo_url: str) -> None:
    """Again and again: operations of several tasks, a flush in the middle of them, and one pass over the keys."""
    keys: list[tuple[str, str]] = [(f"signal-{number}", "notes") for number in range(40)]
    chance = random.Random(11)  # noqa: S311
    with running(redis_server()) as server, redis.Redis(port=server.port) as cache:
        store = store_over(mongo_url, at(server))
        acknowledged = dict.fromkeys(keys, 0)
        for key in keys:
            await store.put(Write(STATE, key, 0))

        async def work(own: list[tuple[str, str]]) -> None:
            for _ in range(PER_TASK):
                key = chance.choice(own)
                if chance.random() < 0.2:
                    await store.put(Write(STATE, key, acknowledged[key] + 1))
                    acknowledged[key] += 1
                else:
                    found = await store.get(STATE, key)
                    assert found is not None
                    assert (found.key, found.value, found.rev) == (key, acknowledged[key], acknowledged[key] + 1)

        async def flush() -> None:
            await asyncio.sleep(chance.uniform(0, 0.1))
            await asyncio.to_thread(cache.flushall)

        for _ in range(FLUSHES):
            await asyncio.gather(*(work(keys[number::10]) for number in range(10)), flush())
            for key in keys:
                await store.get(STATE, key)
            cache.config_resetstat()
            for key in keys:
                await store.get(STATE, key)
            said: Any = cache.info("stats")
            assert said["keyspace_hits"] >= 0.95 * len(keys)
            assert said["keyspace_misses"] <= 0.05 * len(keys)
        await store.close()


@pytest.mark.sampled
async def test_writer_that_dies_before_it_tells_redis_leaves_nobody_with_old_answers(
    store: MongoStore, mongo_url: str, redis_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes of which Redis is never told, also over keys that were removed from the database by hand."""
    reader = store_over(mongo_url, redis_address)
    await require_right_answers(reader)

    async def not_told(*_: Any) -> None:
        return None

    ids = store.connection().ids
    assert ids is not None
    monkeypatch.setattr(ids, "set", not_told)
    documents = store.connection().database["state-items"]
    for number in range(UNTOLD):
        key = KEYS[number % len(KEYS)]
        if number % 5 == 0:
            await documents.delete_one({"signalId": key[0]})
        written = await store.put(Write(STATE, key, number))
        assert await reader.get(STATE, key) == written
    await reader.close()


async def test_flush_of_one_project_leaves_the_other(mongo_url: str) -> None:
    with running(redis_server()) as server, redis.Redis(port=server.port) as cache:
        cache.set("somebody else's", "value")
        ours, theirs = store_over(mongo_url, at(server), "ours"), store_over(mongo_url + "-2", at(server), "ours[x]*")
        await fill(ours)
        await fill(theirs)
        ids = ours.connection().ids
        assert ids is not None
        assert await ids.forget() == len(KEYS)
        assert not any(cache.exists(entry(mongo_url, key, "ours")) for key in KEYS)
        assert all(cache.exists(entry(mongo_url + "-2", key, "ours[x]*")) for key in KEYS)
        assert cache.get("somebody else's") == b"value"
        await require_right_answers(ours)
        await require_right_answers(theirs)
        other = theirs.connection().ids
        assert other is not None
        assert await other.forget() == len(KEYS)
        assert all(cache.exists(entry(mongo_url, key, "ours")) for key in KEYS)
        await theirs.connection().mongo.drop_database(database_of(mongo_url) + "-2")
        await ours.close()
        await theirs.close()
