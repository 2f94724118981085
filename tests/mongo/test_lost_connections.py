"""Connections that are cut at any byte, requests that arrive late, and a server that says nothing for seconds.

`make prove` tries about a thousand places.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import psutil
import pymongo
import pytest
from pymongo.errors import OperationFailure
from pymongo.helpers_shared import _RETRYABLE_ERROR_CODES
from tests.mongo.relay import Relay, Side
from tests.mongo.samples import candles
from tests.samples import dice, size
from tests.servers import Server, mongo_server, running

from backtest_kit.errors import BacktestKitError, Outcome, RetryLater
from backtest_kit.persist.backends.mongo.connection import database_of
from backtest_kit.persist.backends.mongo.documents import change_of
from backtest_kit.persist.backends.mongo.server import is_transient
from backtest_kit.persist.backends.mongo.settings import MongoSettings
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.backends.mongo.writing import Upsert
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Record, SeriesKey, Write

SIGNAL, SCHEDULE = CONTRACTS["signal"], CONTRACTS["schedule"]
TIMES = size(1, 8)
LANES = 8
"""Stores that are tried at the same time, each behind a relay of its own."""
BULK = candles(0, 100)


def key_of(name: str) -> tuple[str, str, str]:
    return ("trend", "binance", name)


def series_of(name: str) -> SeriesKey:
    return SeriesKey("binance", name, "1m")


def store_behind(relay: Relay, database: str, **settings: Any) -> MongoStore:
    url = f"mongodb://127.0.0.1:{relay.port}/{database}?directConnection=true"
    return MongoStore(url, settings=MongoSettings(CC_REDIS_HOST="", **settings))


class Case:
    """A write that is tried with a key of its own each time."""

    def __init__(self, before: int, write: Callable[[MongoStore, str], Awaitable[object]]) -> None:
        self.before = before
        """The revision that its records have before it."""
        self.write = write


async def put(store: MongoStore, name: str) -> None:
    assert (await store.put(Write(SIGNAL, key_of(name), "new"))).rev == 1


async def put_over(store: MongoStore, name: str) -> None:
    assert (await store.put(Write(SIGNAL, key_of(name), "new"))).rev == 2


async def put_new(store: MongoStore, name: str) -> None:
    new = [Write(SIGNAL, key_of(f"{name}{tail}"), "new", expect="absent") for tail in ("", "-2", "-3")]
    for done in await store.put_each(new):
        if isinstance(done, BaseException):
            raise done
        assert done.rev == 1


async def compare_and_set(store: MongoStore, name: str) -> None:
    assert (await store.put(Write(SIGNAL, key_of(name), "new", expect=1))).rev == 2


async def batch(store: MongoStore, name: str) -> None:
    await store.batch([Write(SIGNAL, key_of(name), "new", expect=1), Write(SCHEDULE, key_of(name), "new")])


async def bulk(store: MongoStore, name: str) -> None:
    assert await store.candles.write(series_of(name), BULK) == len(BULK)


CASES = {
    "put": (Case(0, put), 16),
    "put new records in one go": (Case(0, put_new), 16),
    "put over a record": (Case(1, put_over), 16),
    "put over a record without transactions": (Case(1, put_over), 16),
    "compare and set": (Case(1, compare_and_set), 16),
    "batch": (Case(1, batch), 24),
    "candles": (Case(0, bulk), 16),
}
"""Each with the number of places at which its connection is cut."""


async def require_truth(direct: MongoStore, name: str, case: Case, error: BacktestKitError | None) -> None:
    """What is stored is what was acknowledged; after an unknown outcome it is all of it or nothing."""
    if case.write is bulk:
        found = await direct.candles.read(series_of(name), 0, 1 << 45)
        assert found == BULK or (error is not None and error.outcome is Outcome.UNKNOWN)
        assert found == BULK[: len(found)]
        return
    contracts = (SIGNAL, SCHEDULE) if case.write is batch else (SIGNAL,)
    records = [await direct.get(contract, key_of(name)) for contract in contracts]
    stands = [("old", 0) if record is None else (record.value, record.rev) for record in records]
    done = [("new", case.before + 1) for _ in contracts]
    not_done = [("old", case.before) for _ in contracts]
    if error is None:
        assert stands == done, (name, stands)
    elif error.outcome is Outcome.NOT_DONE:
        assert stands == not_done, (name, stands, error)
    else:
        assert stands in (done, not_done), (name, stands, error)


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("name", CASES)
async def test_connection_is_cut_at_any_byte(name: str, request: pytest.FixtureRequest) -> None:
    case, count = CASES[name]
    kind = "standalone_url" if "without transactions" in name else "mongo_url"
    url = request.getfixturevalue(kind)
    port, database = pymongo.uri_parser.parse_uri(url)["nodelist"][0][1], database_of(url)
    direct = MongoStore(url, settings=MongoSettings(CC_REDIS_HOST=""))
    failed = 0
    hung_up = 0

    async def prepare(key: str) -> None:
        if case.before:
            old = [Write(contract, key_of(key), "old") for contract in (SIGNAL, SCHEDULE)]
            await asyncio.gather(*map(direct.put, old))

    async def lane(number: int) -> None:
        nonlocal failed, hung_up
        chance = dice(f"cuts of {name} in lane {number}")
        async with Relay(port) as relay:
            store = store_behind(relay, database)
            await prepare(f"warm-{number}")
            await store.open()
            relay.mend()
            await case.write(store, f"warm-{number}")
            sizes = dict(relay.sent)
            places: list[tuple[Side, int]] = []
            share = round(count * TIMES / LANES)
            for index in range(share):
                side: Side = "request" if index % 2 else "answer"
                low = sizes[side] * index // share
                places.append((side, min(sizes[side] - 1, chance.randrange(low, low + sizes[side] // share + 1))))
            for index, (side, after) in enumerate(places):
                key = f"{side}-{after}-{number}-{index}"
                await prepare(key)
                relay.cut(side, after, times=1 + index % 3)
                error = None
                try:
                    await case.write(store, key)
                except BacktestKitError as caught:
                    error = caught
                    failed += 1
                assert relay.cuts > 0, (side, after, sizes)
                hung_up += relay.cuts
                relay.mend()
                await require_truth(direct, key, case, error)
            await store.close()

    await direct.open()
    await asyncio.gather(*(lane(number) for number in range(LANES)))
    await direct.close()
    assert hung_up >= count * TIMES
    assert failed <= hung_up // 10, "the store gives up though the server is well"


async def test_request_that_arrives_late_does_not_undo_a_later_write(mongo_url: str) -> None:
    port = pymongo.uri_parser.parse_uri(mongo_url)["nodelist"][0][1]
    async with Relay(port) as relay:
        # Opened with all the time that a busy machine needs, and then used with little.
        direct = MongoStore(mongo_url, settings=MongoSettings(CC_REDIS_HOST=""))
        await direct.put(Write(SIGNAL, key_of("late"), "first"))
        await direct.close()
        store = store_behind(relay, database_of(mongo_url), CC_MONGO_OPERATION_TIMEOUT_MS=1_000)
        await store.open()
        relay.keep = b"findAndModify"
        with pytest.raises(RetryLater) as caught:
            await store.put(Write(SIGNAL, key_of("late"), "given up"))
        assert relay.is_kept.is_set()
        assert caught.value.outcome is Outcome.UNKNOWN
        last = await store.put(Write(SIGNAL, key_of("late"), "acknowledged"))
        answer = await relay.release()
        found = await store.get(SIGNAL, key_of("late"))
        assert found == last, answer
        assert (last.value, last.rev) == ("acknowledged", 2)
        await store.close()


async def test_nothing_connects_in_the_background_once_the_store_is_open(mongo_url: str) -> None:
    """The driver leaks the socket of what connects while the store is closed."""
    port = pymongo.uri_parser.parse_uri(mongo_url)["nodelist"][0][1]
    async with Relay(port) as relay:
        store = store_behind(relay, database_of(mongo_url), CC_MONGO_POOL_SIZE=1)
        await store.open()
        for _ in range(10):
            assert await store.get(SIGNAL, key_of("nothing")) is None
        assert relay.connections == 2, "one that looks after the server, and one for requests"
        await store.close()


def test_whatever_the_driver_would_have_retried_heals() -> None:
    assert len(_RETRYABLE_ERROR_CODES) > 10
    for code in _RETRYABLE_ERROR_CODES:
        assert is_transient(OperationFailure("in a moment", code)), code


async def test_connection_that_hangs_leaves_time_for_another_one(mongo_url: str) -> None:
    port = pymongo.uri_parser.parse_uri(mongo_url)["nodelist"][0][1]
    async with Relay(port) as relay:
        store = store_behind(relay, database_of(mongo_url), CC_MONGO_SOCKET_TIMEOUT_MS=300)
        await store.open()
        calls: dict[bytes, Callable[[], Awaitable[Record | None]]] = {
            b"findAndModify": lambda: store.put(Write(SIGNAL, key_of("hung"), "new")),
            b"find": lambda: store.get(SIGNAL, key_of("hung")),
        }
        for request, call in calls.items():
            relay.keep = request
            began = time.monotonic()
            record = await call()
            assert relay.is_kept.is_set()
            relay.is_kept.clear()
            assert record is not None
            assert (record.value, record.rev) == ("new", 1)
            assert 0.3 <= time.monotonic() - began < 5
        await store.close()


async def test_outcome_stays_unknown_while_the_server_tells_of_an_older_state(
    mongo_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A majority that lags behind is read as it was before the write."""
    port = pymongo.uri_parser.parse_uri(mongo_url)["nodelist"][0][1]
    async with Relay(port) as relay:
        store = store_behind(relay, database_of(mongo_url), CC_MONGO_OPERATION_TIMEOUT_MS=600)
        await store.put(Write(SIGNAL, key_of("lag"), "old"))
        look = Upsert._look
        older = await look(Upsert(store.connection(), change_of("", Write(SIGNAL, key_of("lag"), "new"))))
        looks = 0

        async def lagging(self: Upsert) -> Any:
            nonlocal looks
            looks += 1
            return older

        monkeypatch.setattr(Upsert, "_look", lagging)
        relay.lose = b"findAndModify"
        with pytest.raises(RetryLater) as caught:
            await store.put(Write(SIGNAL, key_of("lag"), "new"))
        assert caught.value.outcome is Outcome.UNKNOWN
        assert looks < 40
        monkeypatch.undo()
        found = await store.get(SIGNAL, key_of("lag"))
        assert found is not None
        assert (found.value, found.rev) == ("new", 2)
        await store.close()


async def test_write_of_a_process_whose_clock_is_behind_is_done(
    mongo_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (MongoStore(mongo_url, settings=MongoSettings(CC_REDIS_HOST="")) for _ in range(2))
    await first.put(Write(SIGNAL, key_of("clock"), 1))
    hour_ago = time.time_ns() - 3_600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: hour_ago)
    assert (await second.put(Write(SIGNAL, key_of("clock"), 2))).rev == 2
    assert (await first.put(Write(SIGNAL, key_of("clock"), 3))).rev == 3
    assert (await second.put(Write(SIGNAL, key_of("clock"), 4))).rev == 4
    await first.close()
    await second.close()


@pytest.fixture
def mortal() -> Iterator[Server]:
    with running(mongo_server()) as server:
        yield server


async def test_commit_that_a_server_forgot_by_its_death_is_not_done_again() -> None:
    with running(mongo_server("--sync-on-commit")) as server:
        async with Relay(server.port) as relay:
            store = store_behind(relay, "db", CC_MONGO_OPERATION_TIMEOUT_MS=30_000)

            async def die_and_return() -> None:
                server.kill()
                await asyncio.to_thread(server.start)

            writes = [Write(contract, key_of("twice"), 1) for contract in (SIGNAL, SCHEDULE)]
            await store.batch(writes)
            relay.lose, relay.meanwhile = b"commitTransaction", die_and_return
            await store.batch([Write(contract, key_of("twice"), 2) for contract in (SIGNAL, SCHEDULE)])
            assert relay.lose == b""
            for contract in (SIGNAL, SCHEDULE):
                record = await store.get(contract, key_of("twice"))
                assert record is not None
                assert (record.value, record.rev) == (2, 2)
            await store.close()


@contextlib.asynccontextmanager
async def heartbeat() -> AsyncIterator[list[float]]:
    """How long other work on the loop had to wait, in seconds of this process's own time."""
    gaps: list[float] = []

    async def beat() -> None:
        while True:
            busy = time.process_time()
            await asyncio.sleep(0.01)
            gaps.append(time.process_time() - busy)

    task = asyncio.ensure_future(beat())
    yield gaps
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_server_that_stalls_ends_no_call_late(mortal: Server) -> None:
    deadline, stall, pool = 1.5, 5.0, 4
    url = f"mongodb://127.0.0.1:{mortal.port}/db"
    settings = MongoSettings(
        CC_REDIS_HOST="", CC_MONGO_OPERATION_TIMEOUT_MS=round(deadline * 1000), CC_MONGO_POOL_SIZE=pool
    )
    store = MongoStore(url, settings=settings)
    for index in range(4):
        await store.put(Write(SIGNAL, key_of(f"{index}"), "old"))
    await store.candles.write(series_of("BTC"), BULK)

    async def timed(call: Awaitable[object]) -> tuple[float, BaseException | None]:
        started = time.monotonic()
        try:
            await call
        except BacktestKitError as error:
            return time.monotonic() - started, error
        return time.monotonic() - started, None

    async def listed() -> None:
        async for _ in store.scan(SIGNAL):
            pass

    os.kill(mortal.pid, signal.SIGSTOP)
    try:
        # A signal takes its time on a busy machine.
        while psutil.Process(mortal.pid).status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0)
        until = time.monotonic() + stall
        async with heartbeat() as gaps:
            while time.monotonic() < until - deadline:
                calls = [
                    store.get(SIGNAL, key_of("0")),
                    store.put(Write(SIGNAL, key_of("1"), "new")),
                    store.put(Write(SIGNAL, key_of("2"), "new", expect=1)),
                    store.batch([Write(SIGNAL, key_of("3"), "new"), Write(SCHEDULE, key_of("3"), "new")]),
                    store.candles.read(series_of("BTC"), 0, 1 << 45),
                    store.candles.write(series_of("ETH"), BULK),
                    listed(),
                    *(store.get(SIGNAL, key_of("0")) for _ in range(2 * pool)),
                ]
                for seconds, error in await asyncio.gather(*map(timed, calls)):
                    assert isinstance(error, RetryLater)
                    assert seconds < deadline + 1, "it waited for another call's end as well"
        # Beats are counted, not timed: others may keep the machine from us for long.
        assert len(gaps) > 50
        assert max(gaps) < 0.25
        await asyncio.sleep(until - time.monotonic())
    finally:
        os.kill(mortal.pid, signal.SIGCONT)
    started = time.monotonic()
    for index in range(4):
        record = await store.put(Write(SIGNAL, key_of(f"{index}"), "after"))
        assert record == await store.get(SIGNAL, key_of(f"{index}"))
        assert record.rev <= 3 + (index == 1)
    assert time.monotonic() - started < 2 + deadline
    # Every connection of the pool is of use again.
    await asyncio.gather(*(store.get(SIGNAL, key_of("0")) for _ in range(4 * pool)))
    assert await store.candles.write(series_of("ETH"), BULK) in (0, len(BULK))
    assert await store.candles.read(series_of("ETH"), 0, 1 << 45) == BULK
    with pymongo.MongoClient[dict[str, Any]](url) as client:
        found = client["db"]["signal-items"].aggregate([{"$group": {"_id": "$symbol", "n": {"$sum": 1}}}])
        assert {each["n"] for each in found} == {1}
    await store.close()
    gc.collect()  # here, and not in somebody else's test
