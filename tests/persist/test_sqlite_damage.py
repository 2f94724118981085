"""SQLite: a bit that changes in the database, or in its log after a kill, is an error; never None or an old value."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.samples import sample

from backtest_kit.errors import BacktestKitError, Damaged, UserError
from backtest_kit.persist import crashpoints
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.backends.sqlite_mark import Head, Mark
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.diagnosis import require_live_grade
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import Key, Plain, Write

SIGNAL, MEASURE, MEMORY = (CONTRACTS[name] for name in ("signal", "measure", "memory"))
KEYS: list[Key] = [("trend", "binance", f"S{number}") for number in range(12)]
KEY = KEYS[3]

WRITER = """
import asyncio, os, signal, sys
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Write

async def main():
    store = SqliteStore(sys.argv[1])
    for turn in range(int(sys.argv[2])):
        for number in range(12):
            await store.put(Write(CONTRACTS["signal"], ("trend", "binance", f"S{number}"), {"turn": turn}))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
TURNS = 4
LAST: dict[Key, Plain] = {key: {"turn": TURNS - 1} for key in KEYS}


def killed(place: Path) -> Path:
    """A database whose writer was killed after every write had been acknowledged."""
    path = place / "bot.db"
    child = subprocess.run([sys.executable, "-c", WRITER, str(path), str(TURNS)], check=False)
    assert child.returncode == -signal.SIGKILL
    return path


def checkpointed(place: Path) -> Path:
    """The same, with everything in the database itself."""
    path = killed(place)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    connection.close()
    return path


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


async def answers(path: Path) -> tuple[dict[Key, Plain], list[Plain] | None, int]:
    """What each key answers, what the listing answers, and how many of all those were errors."""
    store, read, errors = SqliteStore(path, busy_timeout=1), {}, 0
    listed: list[Plain] | None = None
    for key in KEYS:
        try:
            found = await store.get(SIGNAL, key)
            read[key] = None if found is None else found.value
        except BacktestKitError:
            errors += 1
    try:
        listed = [record.value async for record in store.scan(SIGNAL)]
    except BacktestKitError:
        errors += 1
    await store.close()
    return read, listed, errors


@pytest.mark.sampled
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("make", "suffix"), [(checkpointed, ""), (killed, "-wal")], ids=["pages", "log"])
async def test_a_flipped_bit_is_never_a_wrong_answer(
    tmp_path: Path, make: Callable[[Path], Path], suffix: str, seed: int
) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    path = make(origin)
    chance = random.Random(seed)  # noqa: S311
    size = Path(f"{path}{suffix}").stat().st_size
    assert size > 20_000
    noticed = 0
    # The head of the file, where a bit has the most to say, and places all over it.
    bits = chance.sample(range(100 * 8), 20) + [chance.randrange(size * 8) for _ in range(60)]
    for number, bit in enumerate(sample(bits, 30, f"flipped bits{suffix} {seed}")):
        place = tmp_path / str(number)
        shutil.copytree(origin, place)
        flip(Path(f"{place / 'bot.db'}{suffix}"), bit)
        read, listed, errors = await answers(place / "bot.db")
        said = f"seed {seed}, bit {bit}"
        assert all(read[key] == LAST[key] for key in read), said
        assert listed is None or listed == list(LAST.values()), said
        noticed += errors > 0
        shutil.rmtree(place)
    assert noticed, "the flips hit nothing that matters"


async def filled(tmp_path: Path) -> SqliteStore:
    store = SqliteStore(tmp_path / "bot.db")
    for key in KEYS:
        await store.put(Write(SIGNAL, key, LAST[key]))
    await store.close()
    return store


def page_of(path: Path, index: str) -> range:
    """The bytes of an index, which has a single page."""
    connection = sqlite3.connect(path)
    (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (index,)).fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    return range((page - 1) * size, page * size)


async def index_damaged(tmp_path: Path, index: str) -> SqliteStore:
    """A store of which one index has a bit flipped in an entry, in that of `KEY` if it has keys."""
    store = await filled(tmp_path)
    page = page_of(store.path, index)
    content = store.path.read_bytes()[page.start : page.stop]
    where = content.index(b"signal" if index == "records_in_order" else b"trend/binance/S3")
    flip(store.path, (page.start + where) * 8 + 3)
    return store


@pytest.mark.parametrize("index", ["records_by_name", "records_by_key", "records_in_order"])
async def test_a_damaged_index_hides_no_position(tmp_path: Path, index: str) -> None:
    store = await index_damaged(tmp_path, index)
    if index == "records_by_name":
        with pytest.raises(Damaged, match=r"binance/S3: one index of the database has lost it.*quarantine restore"):
            await store.get(SIGNAL, KEY)
        with pytest.raises(Damaged):
            await store.put(Write(SIGNAL, KEY, "over it"))
    else:
        found = await store.get(SIGNAL, KEY)
        assert found is not None
        assert found.value == LAST[KEY]
    prefix = () if index == "records_in_order" else ("trend",)
    for limit in (None, 100):
        with pytest.raises(Damaged, match=r"bot\.db is damaged: its indexes disagree.*REINDEX"):
            _ = [record async for record in store.scan(SIGNAL, prefix, limit=limit)]
    assert any(index in finding.problem for finding in await store.check())
    with pytest.raises(UserError, match=r"not fit for live trading: .*contents: damaged"):
        await require_live_grade(store)
    await store.close()
    connection = sqlite3.connect(store.path)
    connection.execute("REINDEX")
    connection.close()
    assert [record.key async for record in store.scan(SIGNAL, prefix)] == KEYS
    await store.close()


@pytest.mark.parametrize("index", ["records_by_name", "records_in_order"])
async def test_a_damaged_index_hides_no_namespace_and_counts_none_away(tmp_path: Path, index: str) -> None:
    store = SqliteStore(tmp_path / "bot.db")
    await store.namespace("paper").put(Write(SIGNAL, KEY, 1))
    assert await store.namespaces() == [("paper",)]
    assert await store.namespace("paper").count(SIGNAL) == 1
    await store.close()
    page = page_of(store.path, index)
    where = store.path.read_bytes()[page.start : page.stop].index(b"@paper/")
    flip(store.path, (page.start + where) * 8 + 3)
    with pytest.raises(Damaged, match=r"bot\.db is damaged: its indexes disagree about which namespaces there are"):
        await store.namespaces()
    with pytest.raises(Damaged, match="disagree about which records of signal"):
        await store.namespace("paper").count(SIGNAL)
    await store.close()


async def test_a_key_that_an_index_has_lost_is_restored_with_its_index(tmp_path: Path) -> None:
    store = await index_damaged(tmp_path, "records_by_name")
    with pytest.raises(Damaged):
        await store.get(SIGNAL, KEY)
    (item,) = await store.quarantined()
    assert await store.restore(item.path) is not None
    found = await store.get(SIGNAL, KEY)
    assert found is not None
    assert (found.value, found.rev) == (LAST[KEY], 2)
    assert await store.check() == []
    await store.close()


@pytest.mark.parametrize("part", ["signal", "trend"], ids=["contract", "key"])
async def test_a_name_that_changed_in_the_row_is_noticed_and_mended(tmp_path: Path, part: str) -> None:
    store = await filled(tmp_path)
    name, index = b"signaltrend/binance/S3", page_of(store.path, "records_by_name")
    content = store.path.read_bytes()
    places = [place for place in range(len(content)) if content.startswith(name, place) and place not in index]
    assert places
    for place in places:
        flip(store.path, (place + name.index(part.encode())) * 8 + 1)
    with pytest.raises(Damaged, match=r"signal trend/binance/S3: its row is called"):
        await store.get(SIGNAL, KEY)
    with pytest.raises(Damaged, match=r"signal trend/binance/S3: its row is called"):
        _ = [record async for record in store.scan(SIGNAL)]
    (item,) = await store.quarantined()
    assert item.path == "signal/trend/binance/S3"
    await store.restore(item.path)
    assert {record.key: record.value async for record in store.scan(SIGNAL)} == LAST
    assert await store.check() == []
    await store.close()


async def test_a_log_that_lost_commits_is_refused_until_that_is_accepted(tmp_path: Path) -> None:
    path = killed(tmp_path)
    log = Path(f"{path}-wal")
    flip(log, log.stat().st_size * 4)
    before = log.read_bytes()
    for existing in (False, True):
        store = SqliteStore(path, existing=existing)
        with pytest.raises(Damaged, match=r"bot\.db has lost commits \d+ to 48.*--accept-loss --store sqlite:"):
            await store.get(SIGNAL, KEY)
        with pytest.raises(Damaged):
            await store.put(Write(SIGNAL, KEY, "over it"))
        (finding,) = await store.check()
        assert "has lost commits" in finding.problem
        with pytest.raises(UserError, match=r"has lost commits.*--accept-loss"):
            await require_live_grade(store)
        await store.close()
    assert log.read_bytes() == before, "what is left of the log is for those who can read it"
    store = SqliteStore(path)
    assert "has lost commits" in str(await store.accept_loss())
    assert await store.accept_loss() is None
    assert await store.check() == []
    found = await store.get(SIGNAL, KEY)
    assert found is not None
    assert found.value != LAST[KEY]
    assert (await store.put(Write(SIGNAL, KEY, "next"))).rev == found.rev + 1
    await store.close()
    assert await SqliteStore(path, existing=True).check() == []


async def put(path: Path, value: Plain) -> None:
    store = SqliteStore(path)
    await store.put(Write(SIGNAL, KEY, value))
    await store.close()


def mark_path(path: Path) -> Path:
    return Path(f"{path}-mark")


def noted(path: Path) -> Head:
    head = Mark(str(path), Disk()).read()
    assert head is not None
    return head


class TestMark:
    async def test_an_older_copy_in_its_place_is_noticed(self, tmp_path: Path) -> None:
        path = tmp_path / "bot.db"
        await put(path, 1)
        shutil.copy(path, tmp_path / "backup.db")
        await put(path, 2)
        shutil.copy(tmp_path / "backup.db", path)
        with pytest.raises(Damaged, match=r"has lost commit 2,"):
            await put(path, 3)
        # Somewhere else, without the mark, it is a database like any other.
        await put(tmp_path / "backup.db", 3)

    async def test_a_mark_of_another_database_means_nothing(self, tmp_path: Path) -> None:
        path, other = tmp_path / "bot.db", tmp_path / "other.db"
        for number in range(5):
            await put(other, number)
        await put(path, 1)
        identity = noted(path)[0]
        shutil.copy(mark_path(other), mark_path(path))
        await put(path, 2)
        assert noted(path) == (identity, 2)

    @pytest.mark.parametrize("content", [None, b"", b"\0" * 4096, b"\xff" * 5000, b"short"])
    async def test_without_a_readable_mark_nothing_is_claimed(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "bot.db"
        await put(path, 1)
        mark_path(path).unlink()
        if content is not None:
            mark_path(path).write_bytes(content)
        await put(path, 2)
        await put(path, 3)
        assert noted(path).commits == 3

    async def test_only_synced_commits_are_noted(self, tmp_path: Path) -> None:
        """A commit that was not synced may be lost with the host's power; a mark that knew of it would cry damage."""
        path = tmp_path / "bot.db"
        store = SqliteStore(path)
        await store.open()
        assert not mark_path(path).exists()
        await store.put(Write(MEASURE, ("a", "b"), 1))
        assert not mark_path(path).exists()
        await store.put(Write(SIGNAL, KEY, 1))
        assert noted(path).commits == 1
        await store.put(Write(MEASURE, ("a", "b"), 2))
        await store.get(SIGNAL, KEY)
        await store.put(Write(MEMORY, ("a", "b", "c"), 2))
        assert noted(path).commits == 2
        await store.close()

    async def test_a_process_that_was_paused_takes_nothing_back(self, tmp_path: Path) -> None:
        """It stands still between its commit and its note, until others have made 128 more."""
        path = tmp_path / "bot.db"
        environment = {**os.environ, crashpoints.VARIABLE: "sqlite.after_commit:1:STOP"}
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "1"], env=environment)
        async with asyncio.timeout(60):
            while not (stopped := os.waitpid(child.pid, os.WUNTRACED | os.WNOHANG))[0]:
                await asyncio.sleep(0.01)
            assert os.WIFSTOPPED(stopped[1])
            store = SqliteStore(path)
            for number in range(128):
                await store.put(Write(SIGNAL, ("other", "binance", "S"), number))
            assert noted(path).commits == 129
            child.send_signal(signal.SIGCONT)
            while child.poll() is None:
                await asyncio.sleep(0.01)
        await store.close()
        assert noted(path).commits == 129 + 11

    def test_a_slow_writer_does_not_set_it_back(self, tmp_path: Path) -> None:
        path, identity = tmp_path / "bot.db", b"i" * 16
        slow, fast = Mark(str(path), Disk()), Mark(str(path), Disk())
        slow.begin(Head(identity, 6))
        for commits in range(7, 70_000, 1_000):
            fast.begin(Head(identity, commits))
            fast.note(Head(identity, commits + 1))
            slow.note(Head(identity, 7))
            assert noted(path) == (identity, commits + 1)
        # It grows by a byte with each commit, so it is begun anew from time to time, also under one that has it open.
        assert mark_path(path).stat().st_size < 1 << 16
        assert mark_path(path).stat().st_mode & 0o777 == 0o600
        slow.begin(Head(identity, commits + 1))
        slow.note(Head(identity, commits + 2))
        assert noted(path) == (identity, commits + 2)
        slow.close()
        fast.close()

    def test_a_database_that_falls_behind_while_it_is_open_takes_nothing_back(self, tmp_path: Path) -> None:
        path, identity = tmp_path / "bot.db", b"i" * 16
        mark = Mark(str(path), Disk())
        mark.begin(Head(identity, 500))
        mark.note(Head(identity, 501))
        for commits in (490, 3):
            mark.begin(Head(identity, commits))
            mark.note(Head(identity, commits + 1))
            assert noted(path) == (identity, 501)
        mark.close()

    async def test_a_mark_that_is_taken_away_is_made_again(self, tmp_path: Path) -> None:
        path = tmp_path / "bot.db"
        store = SqliteStore(path)
        for number in range(3):
            await store.put(Write(SIGNAL, KEY, number))
            assert noted(path).commits == number + 1
            mark_path(path).unlink()
        await store.close()

    async def test_it_is_written_with_calls_that_windows_has(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("pwrite", "pread"):
            monkeypatch.delattr(f"os.{name}")
        await put(tmp_path / "bot.db", 1)
        assert noted(tmp_path / "bot.db").commits == 1

    async def test_a_mark_that_cannot_be_written_fails_no_write(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "bot.db"
        mark_path(path).mkdir()
        await put(path, 1)
        await put(path, 2)
        assert f"{mark_path(path)} cannot be written" in caplog.text

    @pytest.mark.parametrize("marked", [True, False])
    async def test_a_number_of_the_last_commit_that_cannot_be_read_is_damage(
        self, tmp_path: Path, marked: bool
    ) -> None:
        path = tmp_path / "bot.db"
        await put(path, 1)
        if not marked:
            mark_path(path).unlink()
        connection = sqlite3.connect(path)
        with connection:
            connection.execute("UPDATE store SET head = x'00'")
        connection.close()
        with pytest.raises(Damaged, match=r"bot\.db does not say which commit was its last.*--accept-loss"):
            await put(path, 2)
        store = SqliteStore(path)
        (finding,) = await store.check()
        assert "does not say" in finding.problem
        assert await store.accept_loss() == finding.problem
        assert await store.check() == []
        assert (await store.put(Write(SIGNAL, KEY, 2))).rev == 2
        await store.close()

    async def test_a_database_that_was_emptied_is_not_a_new_one(self, tmp_path: Path) -> None:
        path = tmp_path / "bot.db"
        await put(path, 1)
        await put(path, 2)
        path.write_bytes(b"")
        for existing in (False, True):
            store = SqliteStore(path, existing=existing)
            with pytest.raises(Damaged, match=r"bot\.db has lost commits 1 to 2,.*--accept-loss"):
                await store.get(SIGNAL, KEY)
            await store.close()
        store = SqliteStore(path)
        assert await store.accept_loss() is not None
        assert await store.check() == []
        assert (await store.put(Write(SIGNAL, KEY, 3))).rev == 1
        await store.close()

    async def test_the_mark_of_a_database_that_was_taken_away_goes_with_it(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "bot.db"
        await put(path, 1)
        assert caplog.text == ""
        path.unlink()
        await put(path, 2)
        assert f"{path} is gone, which had" in caplog.text
        assert noted(path).commits == 1

    async def test_tables_of_another_form_are_damage(self, tmp_path: Path) -> None:
        path = tmp_path / "bot.db"
        await put(path, 1)
        connection = sqlite3.connect(path)
        connection.execute("DROP INDEX records_by_key")
        connection.close()
        with pytest.raises(Damaged, match=r"the tables of .*bot\.db are not those that this program made: restore"):
            await put(path, 2)

    async def test_a_read_only_directory_gets_no_mark(self, tmp_path: Path) -> None:
        path = tmp_path / "bot.db"
        await put(path, 1)
        mark_path(path).unlink()
        store = SqliteStore(path, existing=True)
        assert (await store.get(SIGNAL, KEY)) is not None
        await store.close()
        assert not mark_path(path).exists()

    async def test_other_stores_have_no_loss_to_accept(self) -> None:
        with pytest.raises(UserError, match="MemoryStore does not support accepting a loss"):
            await MemoryStore().accept_loss()
