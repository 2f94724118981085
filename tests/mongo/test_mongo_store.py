"""The Mongo store beyond the suite: opening, damage, batches that die, answers that never come, loops and forks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pymongo
import pytest
import pytest_asyncio
from bson.int64 import Int64
from bson.objectid import ObjectId
from pymongo import UpdateOne
from pymongo.asynchronous.collection import AsyncCollection
from tests.mongo.samples import ALWAYS, BTC, KEY, NAME, Database, candles, store_over
from tests.servers import mongo_server, running

from backtest_kit.errors import Conflict, Damaged, Outcome, RetryLater, UserError
from backtest_kit.persist.backends.mongo.connection import database_of
from backtest_kit.persist.backends.mongo.schema import indexes_of
from backtest_kit.persist.backends.mongo.settings import MongoSettings
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.backends.mongo.writing import BulkUpsert
from backtest_kit.persist.codec import NewerSchema
from backtest_kit.persist.contracts import CONTRACTS, LEASE
from backtest_kit.persist.store import ABSENT, ANY, Capability, Expect, SeriesKey, Write

SIGNAL, STATE, MEMORY, LOG = (CONTRACTS[name] for name in ("signal", "state", "memory", "log"))


class TestDocuments:
    async def test_record_can_be_queried_by_its_key_and_its_value(self, store: MongoStore, database: Database) -> None:
        await store.namespace("paper").put(Write(SIGNAL, KEY, {"priceOpen": 1.5, "note": None}, when=7))
        found = database["signal-items"].find_one({"symbol": "BTCUSDT", "payload.priceOpen": {"$gt": 1}})
        assert found["namespace"] == "paper"
        assert (found["payload"], found["rev"], found["when"]) == ({"priceOpen": 1.5, "note": None}, 1, 7)
        assert (found["removed"], found["schemaVersion"]) == (False, 1)
        assert found["writtenAt"] > 1_600_000_000_000

    async def test_removal_keeps_the_document(self, store: MongoStore, database: Database) -> None:
        await store.put(Write(MEMORY, ("s", "b", "m"), {"seen": 1}))
        await store.put(Write(MEMORY, ("s", "b", "m"), {"seen": 1}, removed=True))
        assert database["memory-items"].find_one({"memoryId": "m"})["removed"] is True

    async def test_every_index_serves_a_query_and_is_unique_where_the_table_says_so(
        self, store: MongoStore, database: Database
    ) -> None:
        for contract in (*CONTRACTS.values(), LEASE):
            found = database[contract.collection].index_information()
            assert found["key"]["key"] == [(field, 1) for field in ("namespace", *contract.key_fields)]
            assert found["key"]["unique"]
            assert set(found) == {"_id_", *(index.document["name"] for index in indexes_of(contract))}
        names = [(field, 1) for field in ("namespace", "exchangeName", "symbol", "interval", "timestamp")]
        assert database["candle-items"].index_information()["key"]["key"] == names

    async def test_value_too_large_for_a_document_is_refused(self, store: MongoStore) -> None:
        with pytest.raises(UserError, match="16 MiB") as caught:
            await store.put(Write(STATE, ("s", "b"), "x" * (17 << 20)))
        assert caught.value.outcome is Outcome.NOT_DONE
        assert await store.get(STATE, ("s", "b")) is None

    async def test_commands_of_the_store_work_on_an_address(self, mongo_url: str, store: MongoStore) -> None:
        await store.put(Write(SIGNAL, KEY, "here"))
        for verb in (["ls", "signal"], ["get", "signal", "trend/binance/BTCUSDT"], ["du"], ["check", "--deep"]):
            command = [
                sys.executable,
                "-c",
                "from backtest_kit.cli import main; main()",
                "store",
                *verb,
                "--store",
                mongo_url,
            ]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr + done.stdout


class TestOpening:
    async def test_many_processes_open_an_empty_database_at_once(self, mongo_url: str, database: Database) -> None:
        program = (
            "import asyncio, sys\nfrom backtest_kit.persist.backends.mongo.store import MongoStore\n"
            "async def main():\n    store = MongoStore(sys.argv[1])\n    await store.open()\n    await store.close()\n"
            "asyncio.run(main())\n"
        )
        commands = [[sys.executable, "-W", "error", "-c", program, mongo_url]] * 4
        processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
        outcomes = [(process.communicate()[1], process.returncode) for process in processes]
        assert [code for _, code in outcomes] == [0] * 4, outcomes
        assert database["store-meta"].count_documents({"_id": "schema"}) == 1
        assert set(database["log-items"].index_information()) == {"_id_", "key", "order"}

    async def test_no_server_is_an_error_within_seconds(self) -> None:
        store = store_over("mongodb://u:secret@127.0.0.1:9/db", CC_MONGO_SERVER_SELECTION_TIMEOUT_MS=300)
        started = time.monotonic()
        with pytest.raises(RetryLater, match="start it") as caught:
            await store.put(Write(SIGNAL, KEY, 1))
        assert time.monotonic() - started < 3
        assert caught.value.outcome is Outcome.NOT_DONE
        assert "secret" not in str(caught.value)
        await store.close()

    async def test_wrong_password_is_an_error_at_once(self) -> None:
        with running(mongo_server()) as server:
            with pymongo.MongoClient[dict[str, Any]]("127.0.0.1", server.port) as client:
                roles = [{"role": "root", "db": "admin"}]
                client.admin.command(
                    {"createUser": "bot", "pwd": "right", "roles": roles, "writeConcern": {"w": 1, "j": True}}
                )
            server.stop()
            server.options = ["--auth"]
            server.start()
            right = store_over(f"mongodb://bot:right@127.0.0.1:{server.port}/db?authSource=admin")
            await right.put(Write(SIGNAL, KEY, 1))
            await right.close()
            for credentials in ("bot:wrong@", ""):
                wrong = store_over(f"mongodb://{credentials}127.0.0.1:{server.port}/db?authSource=admin")
                started = time.monotonic()
                with pytest.raises(UserError, match="user, password and authSource") as caught:
                    await wrong.open()
                assert time.monotonic() - started < 3
                assert "wrong@" not in str(caught.value)
                await wrong.close()

    async def test_newer_database_is_refused_and_untouched(self, mongo_url: str, database: Database) -> None:
        database["store-meta"].insert_one({"_id": "schema", "schemaVersion": 2})
        store = store_over(mongo_url)
        with pytest.raises(NewerSchema, match="upgrade"):
            await store.get(SIGNAL, KEY)
        assert database.list_collection_names() == ["store-meta"]
        await store.close()

    async def test_duplicates_forbid_the_index_with_a_way_out(self, mongo_url: str, database: Database) -> None:
        database["signal-items"].insert_many([dict(NAME), dict(NAME)])
        store = store_over(mongo_url)
        with pytest.raises(UserError, match=r"signal-items.*strategyName, exchangeName, symbol.*delete the others"):
            await store.open()
        database["signal-items"].delete_many({})
        await store.open()
        await store.close()

    async def test_index_of_another_form_is_named(self, mongo_url: str, database: Database) -> None:
        database["signal-items"].create_index([("symbol", 1)], name="key")
        store = store_over(mongo_url)
        with pytest.raises(UserError, match=r"signal-items.*dropIndex"):
            await store.open()
        await store.close()

    async def test_looking_at_what_is_no_store_makes_nothing(self, mongo_url: str, database: Database) -> None:
        store = MongoStore(mongo_url, settings=MongoSettings(CC_REDIS_HOST=""), existing=True)
        with pytest.raises(UserError, match="not a store"):
            await store.open()
        assert database.list_collection_names() == []
        await store.close()


DAMAGE: dict[str, dict[str, Any]] = {
    "payload gone": {"$unset": {"payload": ""}},
    "payload of another type": {"$set": {"payload.at": ObjectId()}},
    "not a number in the payload": {"$set": {"payload.price": float("nan")}},
    "revision as text": {"$set": {"rev": "7"}},
    "removed as text": {"$set": {"removed": "no"}},
    "time as text": {"$set": {"when": "yesterday"}},
    "no version": {"$unset": {"schemaVersion": ""}},
}


class TestDamage:
    @pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE.keys())
    async def test_damaged_document_stays_and_blocks_its_key(
        self, store: MongoStore, database: Database, mongo_url: str, change: dict[str, Any]
    ) -> None:
        await store.put(Write(SIGNAL, KEY, {"price": 1.0}))
        database["signal-items"].update_one(NAME, change)
        before = database["signal-items"].find_one(NAME)
        assert [finding.path for finding in await store.check()] == ["signal/trend/binance/BTCUSDT"]
        assert repr(database["signal-items"].find_one(NAME)) == repr(before)
        with pytest.raises(Damaged, match="signal/trend/binance/BTCUSDT"):
            await store.get(SIGNAL, KEY)
        other = store_over(mongo_url)
        for blocked in (
            other.put(Write(SIGNAL, KEY, "lost")),
            other.put(Write(SIGNAL, KEY, "lost", expect=ABSENT)),
            other.batch([Write(SIGNAL, KEY, "lost"), Write(STATE, ("s", "b"), "lost")]),
            anext(other.scan(SIGNAL)),
        ):
            with pytest.raises(Damaged):
                await blocked
        assert await other.get(STATE, ("s", "b")) is None
        after = database["signal-items"].find_one(NAME)
        assert repr({**after, "quarantine": None}) == repr({**before, "quarantine": None})
        await other.close()

    async def test_operator_mends_or_drops(self, store: MongoStore, database: Database) -> None:
        await store.namespace("paper").put(Write(SIGNAL, KEY, {"price": 1.0}))
        name = {**NAME, "namespace": "paper"}
        database["signal-items"].update_one(name, {"$set": {"payload": ObjectId()}})
        with pytest.raises(Damaged):
            await store.namespace("paper").get(SIGNAL, KEY)
        (item,) = await store.quarantined()
        assert (item.path, item.contract) == ("@paper/signal/trend/binance/BTCUSDT", "signal")
        with pytest.raises(UserError, match="still damaged"):
            await store.restore(item.path)
        database["signal-items"].update_one(name, {"$set": {"payload": "mended"}})
        restored = await store.restore(item.path)
        assert restored is not None
        assert (restored.value, restored.rev) == ("mended", 2)
        assert await store.namespace("paper").get(SIGNAL, KEY) == restored
        with pytest.raises(UserError, match="is not in quarantine"):
            await store.drop(item.path)

    async def test_dropping_frees_the_key(self, store: MongoStore, database: Database) -> None:
        await store.put(Write(SIGNAL, KEY, 1))
        database["signal-items"].update_one(NAME, {"$set": {"rev": None}})
        with pytest.raises(Damaged):
            await store.get(SIGNAL, KEY)
        await store.drop("signal/trend/binance/BTCUSDT")
        assert (await store.put(Write(SIGNAL, KEY, 2))).rev == 1

    async def test_record_of_a_newer_version_is_left_alone(self, store: MongoStore, database: Database) -> None:
        await store.put(Write(SIGNAL, KEY, 1))
        database["signal-items"].update_one(NAME, {"$set": {"schemaVersion": 2}})
        before = database["signal-items"].find_one(NAME)
        for refused in (store.get(SIGNAL, KEY), store.put(Write(SIGNAL, KEY, 2))):
            with pytest.raises(NewerSchema, match="upgrade"):
                await refused
        assert database["signal-items"].find_one(NAME) == before

    async def test_candles_written_by_hand_are_read_and_damaged_ones_named(
        self, store: MongoStore, database: Database
    ) -> None:
        await store.candles.write(BTC, candles(0, 3))
        name = {"namespace": "", "exchangeName": "binance", "symbol": "BTCUSDT", "interval": "1m"}
        row = {"volume": 5, "close": 4.0, "low": 3.0, "high": 2, "open": 1.0}
        last = int(candles(3, 1).timestamp[0])
        database["candle-items"].insert_one({**row, "timestamp": Int64(last), **name})
        found = await store.candles.read(BTC, *ALWAYS)
        assert (len(found), found.open[-1], found.volume[-1]) == (4, 1.0, 5.0)
        assert np.array_equal(found.open[:3], candles(0, 3).open)
        database["candle-items"].update_one({"timestamp": last}, {"$set": {"open": "1"}})
        with pytest.raises(Damaged, match="BTCUSDT"):
            await store.candles.read(BTC, *ALWAYS)
        assert [finding.path for finding in await store.check(deep=True)] == ["candle/binance/BTCUSDT/1m"]

    async def test_series_and_namespaces_are_listed(self, store: MongoStore) -> None:
        other = SeriesKey("okx", "ETHUSDT", "1h")
        await store.candles.write(BTC, candles(0, 2))
        await store.candles.write(other, candles(0, 2))
        assert await store.candles.series() == [BTC, other]
        await store.namespace("a").namespace("b/c").put(Write(LOG, ("1",), 1))
        assert await store.namespaces() == [("a", "b/c")]
        assert await store.namespace("a").namespaces() == [("b/c",)]


CHILD = """
import asyncio, sys
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.binding import Persistence
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Write
SIGNAL, STATE = CONTRACTS["signal"], CONTRACTS["state"]
async def main():
    persistence = Persistence()
    persistence.bind("*", MongoStore(sys.argv[1]))
    one, two = Write(SIGNAL, ("trend", "binance", "BTCUSDT"), "new"), Write(STATE, ("s", "b"), "new")
    await persistence.batch([one, two], mode="live")
asyncio.run(main())
"""


def batch_in_child(url: str, point: str) -> None:
    """A process writes two records as one batch and dies at a crash point."""
    command = [sys.executable, "-c", CHILD, url]
    environ = {**os.environ, "BACKTEST_KIT_CRASH": point}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr


class TestBatches:
    @pytest.mark.parametrize("is_there", [True, False], ids=["over records", "over nothing"])
    async def test_killed_without_transactions_between_two_writes(self, standalone_url: str, is_there: bool) -> None:
        store = store_over(standalone_url)
        if is_there:
            await store.put(Write(SIGNAL, KEY, "old"))
            await store.put(Write(STATE, ("s", "b"), "old"))
        await asyncio.to_thread(batch_in_child, standalone_url, "batch.between_writes")
        signal, state = await store.get(SIGNAL, KEY), await store.get(STATE, ("s", "b"))
        assert signal is not None
        assert (signal.value, signal.rev) == ("new", 1 + is_there)
        assert (state and (state.value, state.rev)) == (("old", 1) if is_there else None)
        await store.close()

    async def test_standalone_server_declares_and_takes_no_batch(self, standalone_url: str, mongo_url: str) -> None:
        standalone, replica_set = store_over(standalone_url), store_over(mongo_url)
        both = [Write(SIGNAL, KEY, "new"), Write(STATE, ("s", "b"), "new")]
        with pytest.raises(UserError, match=r"does not support atomic batches.*replica set"):
            await standalone.batch(both)
        assert await standalone.get(SIGNAL, KEY) is None
        await replica_set.batch(both)
        for store, is_atomic in ((standalone, False), (standalone.namespace("paper"), False), (replica_set, True)):
            assert (Capability.ATOMIC_BATCH in store.capabilities) == is_atomic
            await store.close()
        await standalone.close()
        await replica_set.close()

    @pytest.mark.parametrize(
        ("point", "expected"), [("mongo.after_transaction_writes", "old"), ("mongo.after_batch", "new")]
    )
    async def test_with_transactions(self, point: str, expected: str) -> None:
        # A server of its own: it keeps the transaction of a client that died, and its locks, for a minute.
        with running(mongo_server()) as server:
            url = f"mongodb://127.0.0.1:{server.port}/db"
            store = store_over(url)
            await store.put(Write(SIGNAL, KEY, "old"))
            await store.put(Write(STATE, ("s", "b"), "old"))
            await asyncio.to_thread(batch_in_child, url, point)
            found = [await store.get(SIGNAL, KEY), await store.get(STATE, ("s", "b"))]
            assert [record and record.value for record in found] == [expected] * 2
            await store.close()

    async def test_batches_and_writes_of_several_stores_lose_nothing(self, mongo_url: str) -> None:
        stores = [store_over(mongo_url) for _ in range(3)]
        await stores[0].batch([Write(SIGNAL, KEY, 0), Write(STATE, ("s", "b"), 0)])

        async def count(store: MongoStore) -> None:
            for _ in range(5):
                while True:
                    signal, state = await store.get(SIGNAL, KEY), await store.get(STATE, ("s", "b"))
                    assert signal is not None
                    assert state is not None
                    assert isinstance(signal.value, int)
                    assert isinstance(state.value, int)
                    both = (
                        Write(SIGNAL, KEY, signal.value + 1, expect=signal.rev),
                        Write(STATE, ("s", "b"), state.value + 1, expect=state.rev),
                    )
                    try:
                        await store.batch(both)
                    except Conflict:
                        continue
                    break

        await asyncio.gather(*map(count, stores))
        for contract, key in ((SIGNAL, KEY), (STATE, ("s", "b"))):
            record = await stores[1].get(contract, key)
            assert record is not None
            assert (record.value, record.rev) == (15, 16)
        for store in stores:
            await store.close()


class Proxy:
    """A relay in front of a server that, once asked to, swallows the answer to the next write and hangs up."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.swallow = 0
        self.swallowed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except ConnectionError:  # the server was killed: so is who asks for it
            writer.close()
            self._tasks.discard(task)
            return
        is_cut = False

        async def ask() -> None:
            nonlocal is_cut
            while True:
                header = await reader.readexactly(4)
                body = await reader.readexactly(int.from_bytes(header, "little") - 4)
                if self.swallow and any(word in body for word in _DECISIONS):
                    self.swallow -= 1
                    is_cut = True
                server_writer.write(header + body)

        async def answer() -> None:
            while data := await server_reader.read(1 << 16):
                if is_cut:
                    self.swallowed.set()
                    return
                writer.write(data)

        ways = [asyncio.ensure_future(ask()), asyncio.ensure_future(answer())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            server_writer.close()
            writer.close()
            self._tasks.discard(task)


_DECISIONS = (b"findAndModify", b"commitTransaction")
"""What is in a request after which nothing is as before."""


class TestAnswersThatNeverCome:
    """The server did what it was told, and the connection went away before it could say so."""

    @pytest_asyncio.fixture
    async def proxy(self, standalone_url: str) -> AsyncIterator[Proxy]:
        port = int(standalone_url.rpartition(":")[2].partition("/")[0])
        async with Proxy(port) as proxy:
            yield proxy

    @pytest_asyncio.fixture
    async def behind(self, standalone_url: str, proxy: Proxy) -> AsyncIterator[MongoStore]:
        store = store_over(f"mongodb://127.0.0.1:{proxy.port}/{database_of(standalone_url)}?directConnection=true")
        await store.open()
        yield store
        await store.close()

    @pytest.mark.parametrize("expect", ["any", "absent", 1], ids=str)
    async def test_write_is_found_to_be_done(self, behind: MongoStore, proxy: Proxy, expect: Any) -> None:
        if expect == 1:
            await behind.put(Write(SIGNAL, KEY, "old"))
        proxy.swallow = 1
        written = await behind.put(Write(SIGNAL, KEY, "new", expect=expect))
        assert proxy.swallowed.is_set()
        assert written.rev == (2 if expect == 1 else 1)
        assert await behind.get(SIGNAL, KEY) == written

    async def test_first_write_of_a_log_entry_is_found_to_be_done(self, behind: MongoStore, proxy: Proxy) -> None:
        proxy.swallow = 1
        written = await behind.put(Write(LOG, ("1",), "mine"))
        assert (written.value, written.rev) == ("mine", 1)

    async def test_transaction_is_found_to_be_done(self, mongo_url: str) -> None:
        async with Proxy(pymongo.uri_parser.parse_uri(mongo_url)["nodelist"][0][1]) as proxy:
            store = store_over(f"mongodb://127.0.0.1:{proxy.port}/{database_of(mongo_url)}?directConnection=true")
            await store.put(Write(SIGNAL, KEY, "old"))
            proxy.swallow = 1
            await store.batch([Write(SIGNAL, KEY, "new", expect=1), Write(STATE, ("s", "b"), "new")])
            assert proxy.swallowed.is_set()
            found = await store.get(SIGNAL, KEY), await store.get(STATE, ("s", "b"))
            assert [record and (record.value, record.rev) for record in found] == [("new", 2), ("new", 1)]
            await store.close()

    async def test_outcome_is_unknown_if_another_process_wrote_meanwhile(
        self, behind: MongoStore, proxy: Proxy, standalone_url: str
    ) -> None:
        other = store_over(standalone_url)
        await other.put(Write(SIGNAL, KEY, "theirs"))
        proxy.swallow = 1
        writing = asyncio.ensure_future(behind.put(Write(SIGNAL, KEY, "mine")))
        await proxy.swallowed.wait()
        await other.put(Write(SIGNAL, KEY, "theirs again"))
        outcome = await asyncio.gather(writing, return_exceptions=True)
        found = await other.get(SIGNAL, KEY)
        assert found is not None
        if isinstance(outcome[0], BaseException):
            assert isinstance(outcome[0], RetryLater)
            assert outcome[0].outcome is Outcome.UNKNOWN
        assert (found.value, found.rev) == ("theirs again", 3)
        await other.close()

    async def test_server_that_stays_away_is_an_unknown_outcome_in_time(self) -> None:
        with running(mongo_server("--standalone")) as server:
            async with Proxy(server.port) as proxy:
                store = store_over(
                    f"mongodb://127.0.0.1:{proxy.port}/db?directConnection=true",
                    CC_MONGO_SERVER_SELECTION_TIMEOUT_MS=500,
                    CC_MONGO_OPERATION_TIMEOUT_MS=1_500,
                )
                await store.put(Write(SIGNAL, KEY, "old"))
                proxy.swallow = 1_000_000
                writing = asyncio.ensure_future(store.put(Write(SIGNAL, KEY, "new")))
                await proxy.swallowed.wait()
                server.kill()
                started = time.monotonic()
                with pytest.raises(RetryLater) as caught:
                    await writing
                assert caught.value.outcome is Outcome.UNKNOWN
                assert time.monotonic() - started < 4
                proxy.swallow = 0
                server.start()
                assert (await store.put(Write(SIGNAL, KEY, "newest"))).rev == 3
                await store.close()


async def test_what_others_have_written_since_is_not_undone_by_one_of_many(
    mongo_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = store_over(mongo_url), store_over(mongo_url)
    keys = [("trend", "binance", name) for name in ("any", "guarded", "alone")]
    for key in keys:
        await ours.put(Write(SIGNAL, key, "first"))
    ask = BulkUpsert._found

    asked = 0

    async def overtaken(self: BulkUpsert, *arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        for key in keys[:2] if asked == 2 else ():  # first it asks what there is, and then what has become of it
            await theirs.put(Write(SIGNAL, key, "theirs"))
        return await ask(self, *arguments)

    monkeypatch.setattr(BulkUpsert, "_found", overtaken)
    expectations: list[Expect] = [ANY, 1, ANY]
    done = await ours.put_each(
        [Write(SIGNAL, key, "ours", expect=expect) for key, expect in zip(keys, expectations, strict=True)]
    )
    for result, kind in zip(done[:2], (RetryLater, Conflict), strict=True):
        assert isinstance(result, kind)
        assert result.outcome is Outcome.UNKNOWN
    assert not isinstance(done[2], BaseException)
    found = [await ours.get(SIGNAL, key) for key in keys]
    assert [(each.value, each.rev) for each in found if each] == [("theirs", 3), ("theirs", 3), ("ours", 2)]
    await ours.close()
    await theirs.close()


@pytest.mark.parametrize("is_done", [True, False])
async def test_upsert_without_its_document_is_not_sent_again(
    mongo_url: str, monkeypatch: pytest.MonkeyPatch, is_done: bool
) -> None:
    """Where a server leaves the document out, and somebody else has written it since."""
    ours, theirs = store_over(mongo_url), store_over(mongo_url)
    await ours.open()
    ask = AsyncCollection.find_one_and_update
    asked: list[Any] = []

    async def silent(self: AsyncCollection[Any], *arguments: Any, **options: Any) -> Any:
        asked.append(self)
        if len(asked) > 1:
            return await ask(self, *arguments, **options)
        if is_done:
            await ask(self, *arguments, **options)
        await theirs.put(Write(SIGNAL, KEY, "theirs"))
        return None

    monkeypatch.setattr(AsyncCollection, "find_one_and_update", silent)
    if is_done:
        assert (await ours.put(Write(SIGNAL, KEY, "ours"))).rev == 1
    else:
        with pytest.raises(RetryLater, match="another process has written the record") as failure:
            await ours.put(Write(SIGNAL, KEY, "ours"))
        assert failure.value.outcome is Outcome.UNKNOWN
    found = await ours.get(SIGNAL, KEY)
    assert found is not None
    assert (found.value, found.rev) == ("theirs", 1 + is_done)
    await ours.close()
    await theirs.close()


async def test_many_new_records_are_listed_between_what_was_written_before_and_after(mongo_url: str) -> None:
    ours, theirs = store_over(mongo_url), store_over(mongo_url)
    written: list[str] = []

    async def put(store: MongoStore, *names: str) -> None:
        results = await store.put_each([Write(MEMORY, ("s-1", "plan", name), name) for name in names])
        assert [each.rev for each in results if not isinstance(each, BaseException)] == [1] * len(names)
        written.extend(names)

    for number in range(5):
        await put(ours, f"{number}-one")
        await put(theirs, *(f"{number}-many-{place}" for place in range(40)))
        await put(ours, *(f"{number}-few-{place}" for place in range(3)))
    assert [record.value async for record in ours.scan(MEMORY)] == written
    assert [record.value async for record in ours.scan(MEMORY, newest_first=True)] == written[::-1]
    await ours.close()
    await theirs.close()


async def test_many_first_writes_of_two_at_once_count_each(mongo_url: str) -> None:
    stores = [store_over(mongo_url) for _ in range(2)]
    keys = [("s-1", "plan", str(number)) for number in range(60)]
    done = await asyncio.gather(*(each.put_each([Write(MEMORY, key, 1) for key in keys]) for each in stores))
    for one, other in zip(*done, strict=True):
        assert not isinstance(one, BaseException)
        assert not isinstance(other, BaseException)
        assert {one.rev, other.rev} == {1, 2}
    lines = [await each.put_each([Write(LOG, (key[2],), place) for key in keys]) for place, each in enumerate(stores)]
    assert [each.value for part in lines for each in part if not isinstance(each, BaseException)] == [0] * 120
    for store in stores:
        await store.close()


async def test_many_records_are_found_by_the_index(
    store: MongoStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search through everything for each of hundreds of keys takes a slow server longer than there is."""
    asked: list[tuple[str, dict[str, Any]]] = []
    find = AsyncCollection.find

    def noted(self: AsyncCollection[Any], wanted: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        asked.append((self.name, wanted))
        return find(self, wanted, *arguments, **options)

    monkeypatch.setattr(AsyncCollection, "find", noted)
    keys = [("s-1", "plan", f"m-{number}") for number in range(20)]
    await store.batch([Write(MEMORY, key, 1) for key in keys])
    await store.batch([Write(STATE, (f"s-{number}", "plan"), 1) for number in range(20)])
    await store.put_each([Write(MEMORY, key, 2) for key in keys[:10]])
    assert await store.prune(MEMORY, dict.fromkeys(keys[5:15], 2)) == 5
    by_key = [(collection, wanted) for collection, wanted in asked if "_id" not in wanted]
    assert len(by_key) >= 4, asked
    for collection, wanted in by_key:
        plan = str(database[collection].find(wanted).explain()["queryPlanner"]["winningPlan"])
        assert "IXSCAN" in plan, (wanted, plan)
        assert "COLLSCAN" not in plan, (wanted, plan)


async def test_updates_of_a_batch_name_the_whole_key(store: MongoStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sharded cluster has to be told which shard makes a document."""
    asked: list[UpdateOne] = []
    bulk_write = AsyncCollection.bulk_write

    async def noted(self: AsyncCollection[Any], requests: Sequence[Any], **options: Any) -> Any:
        asked.extend(requests)
        return await bulk_write(self, requests, **options)

    monkeypatch.setattr(AsyncCollection, "bulk_write", noted)
    await store.put(Write(MEMORY, ("s-1", "plan", "a"), 1))
    await store.batch([Write(MEMORY, ("s-1", "plan", name), 2) for name in "ab"])
    assert len(asked) == 2
    assert all({"namespace", *MEMORY.key_fields} <= each._filter.keys() for each in asked)
    assert [record.value async for record in store.scan(MEMORY)] == [2, 2]
