"""What only the SQLite store has: a file that can be bad, processes that share it, commits in groups."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from backtest_kit.errors import BacktestKitError, Damaged, Outcome, OutOfSpace, RetryLater, UserError
from backtest_kit.persist import crashpoints
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.backends.sqlite_file import SqliteFile
from backtest_kit.persist.codec import seal
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import Record, Write
from backtest_kit.persist.testing.faults import FaultFS

SIGNAL, MEASURE, MEMORY = CONTRACTS["signal"], CONTRACTS["measure"], CONTRACTS["memory"]
KEY = ("trend", "binance", "BTCUSDT")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path / "bot.db", busy_timeout=0.2)
    await store.open()
    yield store
    await store.close()


def edit(store: SqliteStore, statement: str, *arguments: object) -> None:
    connection = sqlite3.connect(store.path)
    with connection:
        connection.execute(statement, arguments)
    connection.close()


def ask(store: SqliteStore, statement: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(store.path)
    rows = connection.execute(statement).fetchall()
    connection.close()
    return rows


async def ended(path: Path) -> None:
    """Wait until no thread of a store over `path` is left: it ends just after its last answer."""
    for thread in threading.enumerate():
        if str(path) in thread.name:
            await asyncio.to_thread(thread.join, 5)
            assert not thread.is_alive()


async def listed(store: SqliteStore) -> list[Record]:
    return [record async for record in store.scan(MEMORY)]


async def test_the_name_of_the_file_is_durable(tmp_path: Path) -> None:
    """A synced commit in a file whose name the host forgets is lost all the same."""
    faults = FaultFS()
    store = SqliteStore(tmp_path / "a" / "b" / "bot.db", disk=Disk(faults))
    faults.inject("fsync", nth=3)
    with pytest.raises(RetryLater, match=r"durable the name of .*bot\.db"):
        await store.put(Write(SIGNAL, KEY, 1))
    assert [path for call, path in faults.history if call == "fsync"] == [
        str(path) for path in (tmp_path, tmp_path / "a", tmp_path / "a" / "b")
    ]
    faults.history.clear()
    assert (await store.put(Write(SIGNAL, KEY, 1))).rev == 1
    assert [path for call, path in faults.history if call == "fsync"] == [str(tmp_path / "a" / "b")]
    await store.close()
    assert faults.opened == {}


class TestBadFile:
    @pytest.mark.parametrize(
        "content", [b"not a database, but a text of some length" * 9, b"\0" * 5_000, b"SQLite format 3\0"]
    )
    async def test_file_that_is_no_database_is_left_alone(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "bot.db"
        path.write_bytes(content)
        store = SqliteStore(path)
        for _ in range(2):
            with pytest.raises(Damaged, match=r"bot\.db.*restore a copy.*was not changed"):
                await store.put(Write(SIGNAL, KEY, 1))
        assert path.read_bytes() == content
        await store.close()

    async def test_database_of_another_program_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "bot.db"
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE theirs (x)")
        connection.close()
        before = path.read_bytes()
        with pytest.raises(UserError, match="another program"):
            await SqliteStore(path).open()
        assert path.read_bytes() == before

    def test_a_file_that_another_process_is_just_making_is_not_another_programs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file, maker = SqliteFile(tmp_path / "bot.db", 5), SqliteFile(tmp_path / "bot.db", 5)
        (tmp_path / "bot.db").touch()
        edited = sqlite3.connect(tmp_path / "bot.db")
        edited.execute("PRAGMA journal_mode = WAL")  # as far as the other process has come
        edited.close()

        def make() -> None:
            with maker.transaction():
                pass

        making = threading.Thread(target=make)
        connect = sqlite3.connect

        def look(*arguments: Any, **options: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(*arguments, **options)
            if options.get("uri"):
                connection.set_trace_callback(make_the_rest)
            return connection

        def make_the_rest(statement: str) -> None:
            if statement == "PRAGMA user_version":  # after the look at whose file it is
                making.start()
                making.join()

        monkeypatch.setattr(sqlite3, "connect", look)
        assert not file.is_made()
        assert not making.is_alive()
        monkeypatch.undo()
        assert file.is_made()
        maker.close_writer()

    async def test_newer_schema_is_left_alone(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path / "bot.db")
        await store.open()
        await store.close()
        edit(store, "PRAGMA user_version = 99")
        before = store.path.read_bytes()
        with pytest.raises(Damaged, match=r"newer version of this program.*schema 99"):
            await store.get(SIGNAL, KEY)
        assert store.path.read_bytes() == before

    async def test_directory_and_missing_parent(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is a directory"):
            await SqliteStore(tmp_path).open()
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="a directory of its path is a file"):
            await SqliteStore(tmp_path / "file" / "bot.db").open()
        store = SqliteStore(tmp_path / "made" / "on the way" / "bot.db")
        await store.open()
        await store.close()

    async def test_corrupt_page_is_damaged_and_not_absent(self, store: SqliteStore) -> None:
        for number in range(200):
            await store.put(Write(MEMORY, ("s", "b", str(number)), "x" * 500))
        await store.close()
        with store.path.open("r+b") as file:
            for page in range(1, store.path.stat().st_size // 4096):
                file.seek(page * 4096)
                file.write(b"\xff" * 64)
        with pytest.raises(Damaged, match="not a sound SQLite database"):
            await store.get(MEMORY, ("s", "b", "7"))
        with pytest.raises(Damaged):
            await store.put(Write(MEMORY, ("s", "b", "7"), "new"))

    async def test_full_disk(self, store: SqliteStore) -> None:
        await store.put(Write(SIGNAL, KEY, "small"))

        await store._threads.write(lambda connection: connection.execute("PRAGMA max_page_count = 20").fetchone())
        writes = [store.put(Write(MEMORY, ("s", "b", str(n)), "x" * (200_000 if n == 3 else 10))) for n in range(6)]
        results = await asyncio.gather(*writes, return_exceptions=True)
        assert [isinstance(result, OutOfSpace) for result in results] == [n == 3 for n in range(6)]
        failure = results[3]
        assert isinstance(failure, OutOfSpace)
        assert failure.outcome is Outcome.NOT_DONE
        found = await store.get(SIGNAL, KEY)
        assert found is not None
        assert found.value == "small"
        assert len(await listed(store)) == 5


class TestDamagedRow:
    @pytest.mark.parametrize(
        "damage",
        [
            "UPDATE records SET record = replace(CAST(record AS TEXT), '100.5', '100.6') WHERE key LIKE 'trend%'",
            "UPDATE records SET record = substr(record, 1, 40) WHERE key LIKE 'trend%'",
            "UPDATE records SET record = x'' WHERE key LIKE 'trend%'",
            "UPDATE records SET record = x'ff00fe' WHERE key LIKE 'trend%'",
            "UPDATE records SET record = 7 WHERE key LIKE 'trend%'",
            "UPDATE records SET record = (SELECT record FROM records WHERE key LIKE 'other%') WHERE key LIKE 'trend%'",
            "UPDATE records SET removed = 1 WHERE key LIKE 'trend%'",
        ],
        ids=["value", "cut", "empty", "binary", "number", "of another key", "removed"],
    )
    async def test_tampered_row_blocks_its_key_and_is_kept(self, store: SqliteStore, damage: str) -> None:
        await store.put(Write(SIGNAL, KEY, {"price": 100.5}))
        await store.put(Write(SIGNAL, ("other", "binance", "BTCUSDT"), {"price": 100.5}))
        edit(store, damage)
        (before,) = ask(store, "SELECT * FROM records WHERE key LIKE 'trend%'")
        for _ in range(2):
            with pytest.raises(Damaged, match=r"signal.trend/binance/BTCUSDT.*quarantine.*restore.*drop"):
                await store.get(SIGNAL, KEY)
            with pytest.raises(Damaged):
                await store.put(Write(SIGNAL, KEY, "over it"))
            with pytest.raises(Damaged):
                await store.batch([Write(CONTRACTS["risk"], ("binance", "r"), 1), Write(SIGNAL, KEY, "over it")])
        assert await store.get(CONTRACTS["risk"], ("binance", "r")) is None
        assert ask(store, "SELECT * FROM records WHERE key LIKE 'trend%'") == [before]
        assert len(ask(store, "SELECT * FROM quarantine")) == 1
        other = await store.get(SIGNAL, ("other", "binance", "BTCUSDT"))
        assert other is not None

    async def test_scan_raises_where_it_meets_the_damage(self, store: SqliteStore) -> None:
        for name in "abc":
            await store.put(Write(MEMORY, ("s", "b", name), name))
        edit(store, "UPDATE records SET record = x'00' WHERE key = 's/b/b'")
        scan = store.scan(MEMORY)
        assert (await anext(scan)).value == "a"
        with pytest.raises(Damaged):
            await anext(scan)

    async def test_record_of_a_newer_version_is_refused_and_not_quarantined(self, store: SqliteStore) -> None:
        await store.put(Write(SIGNAL, KEY, 1))
        newer = seal(SIGNAL, Record(KEY, 1, 1, None, 0, schema_version=99))
        edit(store, "UPDATE records SET record = ?", newer)
        with pytest.raises(Damaged, match="newer"):
            await store.get(SIGNAL, KEY)
        assert ask(store, "SELECT * FROM quarantine") == []


class TestSharing:
    async def test_locked_by_another_process_is_retry_later(self, store: SqliteStore) -> None:
        other = sqlite3.connect(store.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        writes = [store.put(Write(MEMORY, ("s", "b", str(n)), n)) for n in range(8)]
        results = await asyncio.gather(*writes, return_exceptions=True)
        assert all(isinstance(result, RetryLater) and result.outcome is Outcome.NOT_DONE for result in results)
        assert time.monotonic() - started < 5
        assert await listed(store) == []
        other.execute("ROLLBACK")
        other.close()
        await store.put(Write(SIGNAL, KEY, "later"))

    async def test_paused_listing_and_open_reader_hold_no_writer_up(self, store: SqliteStore) -> None:
        for number in range(600):
            await store.put(Write(MEASURE, ("b", str(number)), number))
        scan = store.scan(MEASURE)
        await anext(scan)
        other = sqlite3.connect(store.path, isolation_level=None)
        other.execute("BEGIN")
        other.execute("SELECT * FROM records").fetchone()
        await asyncio.wait_for(store.put(Write(SIGNAL, KEY, "written")), 1)
        assert len([record async for record in scan]) == 599
        other.close()

    async def test_several_processes_open_a_new_file_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "bot.db"
        stores = [SqliteStore(path) for _ in range(8)]
        await asyncio.gather(*(store.open() for store in stores))
        await asyncio.gather(*(store.put(Write(MEMORY, ("s", "b", str(n)), n)) for n, store in enumerate(stores)))
        assert len(await listed(stores[0])) == 8
        await asyncio.gather(*(store.close() for store in stores))

    def test_eight_processes_lose_no_increment(self, tmp_path: Path) -> None:
        command = [sys.executable, "-c", INCREMENT, str(tmp_path / "bot.db"), "1000"]
        children = [subprocess.Popen(command) for _ in range(8)]
        assert [child.wait(300) for child in children] == [0] * 8

        async def read() -> Record | None:
            store = SqliteStore(tmp_path / "bot.db")
            found = await store.get(SIGNAL, KEY)
            await store.close()
            return found

        found = asyncio.run(read())
        assert found is not None
        assert (found.value, found.rev) == (8_000, 8_000)


INCREMENT = """
import asyncio, sys
from backtest_kit.errors import Conflict
from backtest_kit.persist import crashpoints
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.backends.sqlite_file import SqliteFile
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import ABSENT, Write

async def main():
    store = SqliteStore(sys.argv[1], busy_timeout=30)
    key = ("trend", "binance", "BTCUSDT")
    for _ in range(int(sys.argv[2])):
        while True:
            found = await store.get(CONTRACTS["signal"], key)
            value, expect = (found.value, found.rev) if found else (0, ABSENT)
            try:
                await store.put(Write(CONTRACTS["signal"], key, value + 1, expect=expect))
                break
            except Conflict:
                pass
    await store.close()

asyncio.run(main())
"""


class TestGroups:
    async def test_waiting_writes_share_commits(self, store: SqliteStore) -> None:
        rounds = 20

        async def write(writer: int) -> None:
            for number in range(rounds):
                await store.put(Write(SIGNAL, ("trend", "binance", str(writer)), number))

        passed = crashpoints.record()
        await asyncio.gather(*(write(writer) for writer in range(32)))
        assert passed["sqlite.after_commit"] <= 5 * rounds
        for writer in range(32):
            found = await store.get(SIGNAL, ("trend", "binance", str(writer)))
            assert found is not None
            assert (found.value, found.rev) == (rounds - 1, rounds)

    async def test_money_and_records_are_synced_and_caches_are_not(
        self, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        levels: list[int] = []
        transaction = store._file.transaction

        @contextlib.contextmanager
        def watch(*, durable: bool) -> Iterator[sqlite3.Connection]:
            with transaction(durable=durable) as connection:
                yield connection
                levels.append(connection.execute("PRAGMA synchronous").fetchone()[0])

        monkeypatch.setattr(store._file, "transaction", watch)
        for contract in (SIGNAL, MEASURE, MEMORY):
            await store.put(Write(contract, ("a", "b", "c")[: len(contract.key_fields)], 2))
        full, normal = 2, 1
        assert levels == [full, normal, full]

    async def test_each_write_of_a_group_has_its_own_outcome(self, store: SqliteStore) -> None:
        await store.put(Write(SIGNAL, KEY, "first"))
        expectations = [1, 1, 2, 9, 3]
        writes = [store.put(Write(SIGNAL, KEY, number, expect=expect)) for number, expect in enumerate(expectations)]
        results = await asyncio.gather(*writes, return_exceptions=True)
        assert [result.rev if isinstance(result, Record) else type(result).__name__ for result in results] == [
            2,
            "Conflict",
            3,
            "Conflict",
            4,
        ]

    async def test_failed_commit_may_have_happened(self, store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
        class Failing:
            """The connection, with a disk that fails at the end of a transaction."""

            def __init__(self, real: sqlite3.Connection) -> None:
                self.real = real

            def __getattr__(self, name: str) -> Any:
                return getattr(self.real, name)

            def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
                if statement == "COMMIT":
                    error = sqlite3.OperationalError("disk I/O error")
                    error.sqlite_errorcode = sqlite3.SQLITE_IOERR
                    raise error
                return self.real.execute(statement, *arguments)

        monkeypatch.setattr(store._file, "_writer", Failing(cast(sqlite3.Connection, store._file._writer)))
        writes = [store.put(Write(SIGNAL, ("trend", "binance", str(n)), n)) for n in range(3)]
        for result in await asyncio.gather(*writes, return_exceptions=True):
            assert isinstance(result, RetryLater)
            assert result.outcome is Outcome.UNKNOWN
        monkeypatch.undo()
        await store.put(Write(SIGNAL, KEY, "works again"))


class TestCancellation:
    async def test_cancelled_anywhere_leaves_old_or_new_and_nothing_open(self, tmp_path: Path) -> None:
        path = tmp_path / "bot.db"
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        for steps in range(200):
            store = SqliteStore(path)

            async def work(store: SqliteStore = store, value: int = steps) -> None:
                await store.put(Write(SIGNAL, KEY, value))
                await store.batch([Write(MEMORY, ("s", "b", name), value) for name in "ab"])
                async for _ in store.scan(MEMORY):
                    pass
                await store.close()

            task = asyncio.ensure_future(work())
            for _ in range(steps % 20):
                await asyncio.sleep(0)
            if steps % 3:
                await asyncio.sleep(steps / 100_000)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            # What was under way may still be done: closing waits for it, so that the listing sees it or not.
            await store.close()
            pair = [record.value for record in await listed(store)]
            assert len(set(pair)) <= 1
            found = await store.get(SIGNAL, KEY)
            assert found is None or isinstance(found.value, int)
            await store.close()
        await ended(path)
        assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors

    async def test_cancelled_close_is_closed_by_the_next(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path / "bot.db")
        await store.put(Write(SIGNAL, KEY, 1))
        await store.get(SIGNAL, KEY)
        closing = asyncio.ensure_future(store.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await store.close()
        await ended(store.path)


async def test_inline_it_needs_no_thread(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "bot.db", inline=True)
    results = await asyncio.gather(*(store.put(Write(SIGNAL, KEY, number)) for number in range(3)))
    assert [result.rev for result in results] == [1, 2, 3]
    await store.batch([Write(MEMORY, ("s", "b", name), name) for name in "ab"])
    assert [record.value for record in await listed(store)] == ["a", "b"]
    assert not [thread for thread in threading.enumerate() if str(store.path) in thread.name]
    await store.close()
    found = await store.get(SIGNAL, KEY)
    assert found is not None
    assert (found.value, found.rev) == (2, 3)
    await store.close()


class TestProcesses:
    def test_store_serves_one_loop_after_another(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path / "bot.db")
        for number in range(3):
            assert asyncio.run(store.put(Write(SIGNAL, KEY, number))).rev == number + 1
        asyncio.run(store.close())

    def test_loop_that_ended_under_a_write_does_not_stop_the_store(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path / "bot.db")

        async def leave() -> None:
            asyncio.ensure_future(store.put(Write(SIGNAL, KEY, "left behind")))  # noqa: RUF006
            await asyncio.sleep(0)

        asyncio.run(leave())
        assert asyncio.run(store.put(Write(SIGNAL, KEY, "next"))).value == "next"
        asyncio.run(store.close())

    def test_fork_is_refused_and_harms_nobody(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path / "bot.db")

        async def use(value: str) -> list[object]:
            attempts: list[Awaitable[object]] = [store.put(Write(SIGNAL, KEY, value)), store.get(SIGNAL, KEY)]
            attempts += [store.check(), store.accept_loss(), store.close()]
            return [await asyncio.gather(attempt, return_exceptions=True) for attempt in attempts]

        asyncio.run(store.put(Write(SIGNAL, KEY, "parent")))
        child = os.fork()
        if not child:
            status = 1
            try:
                outcomes = asyncio.run(use("child"))
                status = 0 if str(outcomes).count("is used in its fork") == 5 else 2
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        found = asyncio.run(store.get(SIGNAL, KEY))
        assert found is not None
        assert found.value == "parent"
        asyncio.run(store.close())

    async def test_every_error_is_one_of_the_house(self, store: SqliteStore) -> None:
        with pytest.raises(BacktestKitError, match="not a plain JSON tree"):
            await store.put(Write(SIGNAL, KEY, object()))  # type: ignore[arg-type]
