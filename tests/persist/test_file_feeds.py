"""`feeds.db`: the feeds of a file store as rows, in transactions of its commit thread."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist import crashpoints
from backtest_kit.persist.backends.file_feeds import FILE, NAMES, Feeds
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.codec import dump_record
from backtest_kit.persist.contracts import ALL_CONTRACTS
from backtest_kit.persist.files import Disk
from backtest_kit.persist.locks import Locked
from backtest_kit.persist.store import Key, Plain, Record, Selection
from backtest_kit.persist.upkeep import Status

STORAGE, NOTIFICATION = ALL_CONTRACTS["storage"], ALL_CONTRACTS["notification"]
KEY: Key = (False, "signal-1")


@pytest.fixture
def feeds(tmp_path: Path) -> Iterator[Feeds]:
    feeds = Feeds(str(tmp_path), Disk())
    yield feeds
    feeds.close()


def record_of(value: Plain, rev: int = 1, key: Key = KEY, *, removed: bool = False) -> Record:
    return Record(key, value, rev, None, 1_700_000_000_000, removed)


def put(feeds: Feeds, *records: Record, namespace: str = "") -> None:
    with feeds.transaction() as transaction:
        for record in records:
            transaction.write(STORAGE, namespace, record, dump_record(STORAGE, record))


def listed(feeds: Feeds, namespace: str = "", *, newest_first: bool = False) -> list[Record | Damaged]:
    wanted = Selection(STORAGE, (), limit=None, newest_first=newest_first, include_removed=True)
    return feeds.read(STORAGE, namespace, feeds.numbers(wanted, namespace))


def edit(root: Path, statement: str) -> None:
    connection = sqlite3.connect(root / FILE)
    with connection:
        connection.execute(statement)
    connection.close()


def test_reading_makes_nothing(tmp_path: Path, feeds: Feeds) -> None:
    assert feeds.get(STORAGE, "", KEY) is None
    assert listed(feeds) == []
    assert feeds.count(STORAGE, "") == 0
    assert feeds.namespaces("") == []
    assert feeds.check() == []
    assert feeds.examine() is None
    assert feeds.quarantined() == []
    assert feeds.accept_loss() is None
    feeds.forget("@paper/")
    assert [*tmp_path.iterdir()] == []


def test_what_is_written_is_read_in_order_of_the_last_write(tmp_path: Path, feeds: Feeds) -> None:
    keys: list[Key] = [(False, name) for name in "abc"]
    put(feeds, *(record_of(number, key=key) for number, key in enumerate(keys)))
    put(feeds, record_of("again", 2, keys[0]))
    assert [each.value for each in listed(feeds) if isinstance(each, Record)] == [1, 2, "again"]
    assert listed(feeds, newest_first=True) == listed(feeds)[::-1]
    assert feeds.get(STORAGE, "", keys[0]) == record_of("again", 2, keys[0])
    assert feeds.get(NOTIFICATION, "", keys[0]) is None
    assert {path.name for path in tmp_path.iterdir()} <= NAMES
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())


def test_a_transaction_sees_its_own_writes_and_leaves_nothing_if_it_fails(feeds: Feeds) -> None:
    put(feeds, record_of("first"))

    def fail() -> None:
        second = record_of("second", 2)
        with feeds.transaction() as transaction:
            transaction.write(STORAGE, "", second, dump_record(STORAGE, second))
            head = transaction.head(STORAGE, "", KEY)
            assert head is not None
            assert (head.rev, head.value) == (2, None)
            assert feeds.get(STORAGE, "", KEY) == record_of("first"), "reading does not wait for a transaction"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert feeds.get(STORAGE, "", KEY) == record_of("first")


def test_a_journal_is_carried_out_once(feeds: Feeds) -> None:
    def replay(record: Record) -> bool:
        with feeds.transaction() as transaction:
            return transaction.replay(STORAGE, "", record, dump_record(STORAGE, record))

    put(feeds, record_of("first"))
    for _ in range(2):
        assert replay(record_of("second", 2))
        assert feeds.get(STORAGE, "", KEY) == record_of("second", 2)
    put(feeds, record_of("third", 3))
    assert replay(record_of("second", 2))
    assert feeds.get(STORAGE, "", KEY) == record_of("third", 3)
    other: Key = (True, "new")
    assert replay(record_of("from the journal", 1, other))
    assert feeds.get(STORAGE, "", other) == record_of("from the journal", 1, other)


def test_namespaces_are_apart_and_forgotten_with_those_below(feeds: Feeds) -> None:
    spaces = ["", "@paper/", "@paper/@inner/", "@papers/"]
    for space in spaces:
        put(feeds, record_of(space), namespace=space)
    assert [getattr(each, "value", each) for space in spaces for each in listed(feeds, space)] == spaces
    assert feeds.namespaces("") == spaces[1:]
    assert feeds.namespaces("@paper/") == ["@paper/@inner/"]
    feeds.forget("@paper/")
    assert feeds.namespaces("") == ["@papers/"]
    assert feeds.get(STORAGE, "", KEY) is not None


def test_prune_and_count(feeds: Feeds) -> None:
    keys: list[Key] = [(False, str(number)) for number in range(600)]
    put(feeds, *(record_of(0, key=key) for key in keys))
    put(feeds, record_of(1, 2, keys[0]), record_of(1, 2, keys[1], removed=True))
    assert feeds.count(STORAGE, "") == 599
    assert feeds.prune(STORAGE, "", dict.fromkeys(keys[:500], 1)) == 498
    assert feeds.count(STORAGE, "") == 101


def test_another_process_that_keeps_it_locked_is_retry_later(tmp_path: Path, feeds: Feeds) -> None:
    put(feeds, record_of("first"))
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Locked, match=r"another process has held .*feeds\.db"), feeds.transaction(0.1):
        pytest.fail("it was not locked")
    assert feeds.get(STORAGE, "", KEY) == record_of("first")
    other.execute("ROLLBACK")
    other.close()
    put(feeds, record_of("second", 2))


def test_threads_share_it(feeds: Feeds) -> None:
    def write(number: int) -> None:
        for rev in range(1, 21):
            put(feeds, record_of(rev, rev, (False, str(number))))
            assert feeds.get(STORAGE, "", (False, str(number))) == record_of(rev, rev, (False, str(number)))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert feeds.count(STORAGE, "") == 4


class TestDamage:
    def test_a_tampered_row_blocks_its_key_and_is_kept(self, tmp_path: Path, feeds: Feeds) -> None:
        put(feeds, record_of("first"), record_of("other", key=(True, "sound")), namespace="@paper/")
        edit(tmp_path, "UPDATE records SET record = substr(record, 1, 40) WHERE key = 'live/signal-1'")
        with pytest.raises(Damaged, match=r"feeds\.db: storage live/signal-1.*quarantine restore @paper/storage/live"):
            feeds.get(STORAGE, "@paper/", KEY)
        damaged, sound = listed(feeds, "@paper/")
        assert isinstance(damaged, Damaged)
        assert sound == record_of("other", key=(True, "sound"))
        with feeds.transaction() as transaction:
            with pytest.raises(Damaged):
                transaction.head(STORAGE, "@paper/", KEY)
            second = record_of("second", 2)
            assert not transaction.replay(STORAGE, "@paper/", second, dump_record(STORAGE, second))
        (item,) = feeds.quarantined()
        assert (item.path, item.key) == ("@paper/storage/live/signal-1", ["live", "signal-1"])
        assert feeds.holds(item.path)
        assert not feeds.holds("storage/live/signal-1")
        (finding,) = feeds.check()
        assert finding.path == item.path
        with pytest.raises(UserError, match="still damaged"):
            feeds.restore(item.path)
        feeds.drop(item.path)
        assert feeds.get(STORAGE, "@paper/", KEY) is None
        assert feeds.check() == []

    def test_an_edited_row_is_restored_as_it_is(self, tmp_path: Path, feeds: Feeds) -> None:
        put(feeds, record_of("first"))
        edit(tmp_path, "UPDATE records SET record = replace(CAST(record AS TEXT), 'first', 'edited')")
        with pytest.raises(Damaged):
            feeds.get(STORAGE, "", KEY)
        restored = feeds.restore("storage/live/signal-1")
        assert (restored.value, restored.rev) == ("edited", 2)
        assert feeds.get(STORAGE, "", KEY) == restored

    def test_lost_commits_are_refused_until_that_is_accepted(self, tmp_path: Path, feeds: Feeds) -> None:
        put(feeds, record_of("first"))
        feeds.close()
        older = (tmp_path / FILE).read_bytes()
        put(feeds, record_of("second", 2))
        feeds.close()
        (tmp_path / FILE).write_bytes(older)
        with pytest.raises(Damaged, match=r"feeds\.db has lost commit 2.*--accept-loss"):
            feeds.get(STORAGE, "", KEY)
        with pytest.raises(Damaged):
            put(feeds, record_of("third", 3))
        (finding,) = feeds.check()
        assert finding.path == FILE
        assert "has lost commit 2" in finding.problem
        assert feeds.accept_loss() is not None
        assert feeds.get(STORAGE, "", KEY) == record_of("first")
        assert feeds.check() == []

    def test_an_emptied_file_is_not_a_new_one(self, tmp_path: Path, feeds: Feeds) -> None:
        put(feeds, record_of("first"))
        feeds.close()
        (tmp_path / FILE).write_bytes(b"")
        with pytest.raises(Damaged, match=r"has lost commit 1"):
            feeds.get(STORAGE, "", KEY)

    def test_the_live_grade_looks_at_it(self, tmp_path: Path, feeds: Feeds) -> None:
        put(feeds, record_of("first"))
        reading = feeds.examine()
        assert reading is not None
        assert (reading.subject, reading.status) == ("feeds", Status.OK)
        feeds.close()
        connection = sqlite3.connect(tmp_path / FILE)
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'records_by_key'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        connection.close()
        with (tmp_path / FILE).open("r+b") as file:
            file.seek((page - 1) * size)
            content = bytearray(file.read(size))
            content[content.index(b"live/signal-1")] ^= 4
            file.seek((page - 1) * size)
            file.write(content)
        reading = feeds.examine()
        assert reading is not None
        assert reading.status is Status.FAULT
        assert "records_by_key" in reading.detail


WRITER = """
import os, signal, sys
from backtest_kit.persist.backends.file_feeds import Feeds
from backtest_kit.persist.codec import dump_record
from backtest_kit.persist.contracts import ALL_CONTRACTS
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import Record

row, feeds = ALL_CONTRACTS["storage"], Feeds(sys.argv[1], Disk())
for rev in range(1, 6):
    with feeds.transaction() as transaction:
        for name in "ab":
            record = Record((False, name), rev, rev, None, 0)
            transaction.write(row, "", record, dump_record(row, record))
    print(rev, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    "point",
    ["", *(f"{name}:{count}" for name in crashpoints.CRASHPOINTS if name.startswith("sqlite.") for count in (1, 3))],
)
def test_killed_anywhere_it_has_all_that_was_acknowledged_and_no_half(tmp_path: Path, point: str) -> None:
    environment = {**os.environ, crashpoints.VARIABLE: point}
    child = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path)], env=environment, check=False, capture_output=True, timeout=60
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    acknowledged = len(child.stdout.split())
    looked = Feeds(str(tmp_path), Disk(), existing=True)
    assert looked.check() == []
    looked.close()
    feeds = Feeds(str(tmp_path), Disk())
    first, second = (feeds.get(STORAGE, "", (False, name)) for name in "ab")
    found = 0 if first is None else first.rev
    assert found in (acknowledged, acknowledged + 1)
    assert (0 if second is None else second.rev) == found
    put(feeds, record_of("next", found + 1, (False, "a")))
    assert feeds.check() == []
    feeds.close()


async def test_it_is_an_sqlite_store_of_its_own(tmp_path: Path, feeds: Feeds) -> None:
    put(feeds, record_of("first"), namespace="@paper/")
    feeds.close()
    store = SqliteStore(tmp_path / FILE, existing=True)
    assert await store.namespaces() == [("paper",)]
    assert await store.namespace("paper").get(STORAGE, KEY) == record_of("first")
    await store.close()
