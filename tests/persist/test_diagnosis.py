"""What is wrong with a store is found and named before it costs a position; looking changes nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import psutil
import pytest
from tests.commands import run_command

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist.backends import disk_diagnosis
from backtest_kit.persist.backends.dummy import DummyStore
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.binding import Persistence
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.diagnosis import examine, fails, require_live_grade
from backtest_kit.persist.files import Disk
from backtest_kit.persist.lease import acquire
from backtest_kit.persist.store import Store, Write
from backtest_kit.persist.testing.faults import FaultFS
from backtest_kit.persist.upkeep import Reading, Status
from backtest_kit.persist.urls import store_at

SIGNAL = CONTRACTS["signal"]
KEY = ("trend", "binance", "BTCUSDT")
URLS = ["file:{}/dump", "sqlite:{}/bot.db"]


@pytest.fixture
def tmp_path(disk: Path) -> Path:
    """On the disk: a store in memory is not fit for live."""
    return disk


async def fill(url: str) -> None:
    store = store_at(url)
    await store.put(Write(SIGNAL, KEY, {"id": "s-1"}))
    await store.close()


async def diagnosis(url: str) -> list[Reading]:
    store = store_at(url, existing=True)
    try:
        return await examine(store, samples=2)
    finally:
        await store.close()


def found(readings: list[Reading], status: Status) -> str:
    return "\n".join(f"{each.subject}: {each.detail} -> {each.remedy}" for each in readings if each.status is status)


def tree(place: Path) -> dict[Path, bytes]:
    """The files below, but for those that every reader of SQLite's log has."""
    files = (path for path in place.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal")))
    return {path: path.read_bytes() for path in files}


@pytest.fixture(params=URLS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param).format(tmp_path)


async def test_a_store_that_others_can_read_is_named_and_left_as_it_is(url: str, tmp_path: Path) -> None:
    await fill(url)
    part = next(path for path in (tmp_path / "dump/signal", tmp_path / "bot.db") if path.exists())
    assert not any(each.subject == "permissions" and each.remedy for each in await diagnosis(url))
    part.chmod(0o755)
    said = found(await diagnosis(url), Status.WARNING)
    assert f"can read {part}" in said
    assert f"chmod -R go= {part}" in said
    await fill(url)
    assert part.stat().st_mode & 0o777 == 0o755


async def test_sound_store_is_fit_for_live_and_looking_changes_nothing(url: str, tmp_path: Path) -> None:
    await fill(url)
    before = tree(tmp_path)
    first, second = await diagnosis(url), await diagnosis(url)
    assert tree(tmp_path) == before
    assert not fails(first, live=True), first
    # How fast the disk is depends on what else the machine does.
    said = [
        [(each.subject, each.subject == "disk" or each.status) for each in readings] for readings in (first, second)
    ]
    assert said[0] == said[1]
    assert {"promises", "file system", "space", "disk", "schema", "locks", "quarantine", "positions"} <= {
        each.subject for each in first
    }
    assert all(each.median_ms is None or each.median_ms > 0 for each in first)
    store = store_at(url)
    assert await require_live_grade(store)
    await store.close()


async def test_store_that_does_not_exist_is_new_and_not_made(url: str, tmp_path: Path) -> None:
    readings = await diagnosis(url)
    assert "first run makes it" in found(readings, Status.NEW)
    assert not fails(readings, live=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("store", [MemoryStore(), DummyStore()], ids=["memory", "dummy"])
async def test_store_that_forgets_is_refused_for_live_unless_allowed(store: Store) -> None:
    readings = await examine(store)
    assert "does not promise: durable" in found(readings, Status.WEAK)
    assert not fails(readings)
    assert fails(readings, live=True)
    assert not fails(readings, live=True, allow_weak=True)
    with pytest.raises(UserError, match=r"durable.*file:DIR.*--allow-weak"):
        await require_live_grade(store)
    assert await require_live_grade(store, allow_weak=True)


async def test_every_store_that_keeps_money_is_asked(tmp_path: Path) -> None:
    persistence = Persistence(environ={"CC_STORE": f"file:{tmp_path}"})
    persistence.bind("log", MemoryStore())
    persistence.bind("signal", MemoryStore(), mode="paper")
    await persistence.require_live_grade()
    persistence.bind("risk", MemoryStore(), mode="live")
    with pytest.raises(UserError, match="MemoryStore does not promise: durable"):
        await persistence.require_live_grade()
    await persistence.require_live_grade(allow_weak=True)
    await persistence.close()


def test_command_ends_with_a_code(tmp_path: Path) -> None:
    def run(*options: str) -> tuple[int, str]:
        done = run_command("doctor", "--samples", "1", *options, cwd=tmp_path)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    assert run("--store", "file:dump")[0] == 0
    code, shown = run("--store", "memory:")
    assert (code, "--live would fail on weak points" in shown) == (0, True)
    assert run("--store", "memory:", "--live")[0] == 1
    assert run("--store", "memory:", "--live", "--allow-weak")[0] == 0
    code, shown = run("--store", "sqlite:/dev/null/bot.db", "--json")
    assert (code, json.loads(shown)["fit"]) == (1, False)
    code, shown = run("--store", "nothing:")
    assert (code, "has no known backend" in shown) == (2, True)
    assert list(tmp_path.iterdir()) == []


async def test_fault_is_refused_for_live_whatever_is_allowed(tmp_path: Path) -> None:
    calls = FaultFS()
    store = FileStore(tmp_path, disk=Disk(calls))
    await store.open()
    calls.inject("fsync", errno.EIO, lasting=True)
    with pytest.raises(UserError, match="cannot be written to") as raised:
        await require_live_grade(store, allow_weak=True)
    assert "--allow-weak" not in str(raised.value)
    calls.heal()
    await require_live_grade(store)
    await store.close()


@pytest.mark.parametrize(("call", "error"), [("open", errno.EACCES), ("write", errno.ENOSPC), ("fsync", errno.EIO)])
async def test_disk_that_takes_no_durable_file_is_found(call: str, error: int, tmp_path: Path) -> None:
    calls = FaultFS()
    calls.inject(call, error, lasting=True, path=".tmp" if call == "open" else "")
    readings = await examine(FileStore(tmp_path, disk=Disk(calls), existing=True), samples=1)
    assert "cannot be written to" in found(readings, Status.FAULT)
    assert list(tmp_path.iterdir()) == []


async def test_place_that_is_a_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "dump").write_text("mine")
    for url in ("file:{}/dump", "file:{}/dump/deeper", "sqlite:{}/dump/bot.db"):
        assert "is a file, not a directory" in found(await diagnosis(url.format(tmp_path)), Status.FAULT)


async def test_what_is_newer_or_not_ours_is_found(tmp_path: Path) -> None:
    for url in URLS:
        await fill(url.format(tmp_path))
    (tmp_path / "dump/.backtest-kit/root.json").write_text('{"schemaVersion": 99, "createdAt": 1}')
    with contextlib.closing(sqlite3.connect(tmp_path / "bot.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
        connection.commit()
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE mine (x)")
        connection.commit()
    (tmp_path / "text.db").write_text("no database at all" * 100)
    expected = {
        "file:{}/dump": "newer version",
        "sqlite:{}/bot.db": "newer version",
        "sqlite:{}/other.db": "another program",
        "sqlite:{}/text.db": "not a sound SQLite database",
    }
    before = tree(tmp_path)
    for url, said in expected.items():
        assert said in found(await diagnosis(url.format(tmp_path)), Status.FAULT), url
    assert tree(tmp_path) == before


HOLDER = """
import fcntl, sqlite3, sys
if sys.argv[1].endswith(".lock"):
    file = open(sys.argv[1])
    fcntl.flock(file, fcntl.LOCK_EX)
else:
    connection = sqlite3.connect(sys.argv[1])
    connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Another process keeps the lock on `path`."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield
        child.kill()


async def test_lock_that_is_never_given_back_is_found(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("file_diagnosis", "sqlite_diagnosis"):
        monkeypatch.setattr(f"backtest_kit.persist.backends.{module}.LOCK_PATIENCE_SECONDS", 0.05)
    await fill(url)
    path = tmp_path / "bot.db"
    if url.startswith("file:"):
        path = min((tmp_path / "dump/.backtest-kit/locks").glob("*.lock"))
    with held(path):
        faults = found(await diagnosis(url), Status.FAULT)
    assert "lsof" in faults
    assert str(path) in faults
    assert not fails(await diagnosis(url))


async def test_quarantine_is_found(url: str, tmp_path: Path) -> None:
    await fill(url)
    if url.startswith("file:"):
        path = tmp_path / "dump/signal/trend/binance/BTCUSDT.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"value": {"id": "forged"}}))
    else:
        with contextlib.closing(sqlite3.connect(tmp_path / "bot.db")) as connection:
            connection.execute("UPDATE records SET record = 'torn'")
            connection.commit()
    store = store_at(url)
    with pytest.raises(Damaged):
        await store.get(SIGNAL, KEY)
    await store.close()
    faults = found(await diagnosis(url), Status.FAULT)
    assert "1 could not be read: signal/trend/binance/BTCUSDT" in faults
    assert "quarantine list" in faults


async def test_owner_of_a_position_is_named(url: str) -> None:
    store = store_at(url)
    lease = await acquire(lambda contract: store, KEY)
    assert "1 owned: process " in found(await examine(store, samples=1), Status.OK)
    await lease.release()
    assert "none owned" in found(await examine(store, samples=1), Status.OK)
    await store.close()


async def test_directory_in_memory_is_weak() -> None:
    with TemporaryDirectory(dir="/dev/shm") as place:  # the one tmpfs that every Linux has
        readings = await diagnosis(f"file:{place}")
    assert "tmpfs: everything is lost when the machine stops" in found(readings, Status.WEAK)


class _Mount(NamedTuple):
    mountpoint: str
    fstype: str
    opts: str


@pytest.mark.parametrize(
    ("name", "kind", "status"),
    [
        ("with space/deeper", "nfs4", Status.WEAK),
        ("ssh", "fuse.sshfs", Status.WEAK),
        ("box", "overlay", Status.WARNING),
        ("elsewhere", "ext4", Status.OK),
        ("drive", "smb", Status.WEAK),
    ],
)
def test_file_system_is_that_of_the_nearest_mount(
    name: str, kind: str, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [
        ("/", "ext4", "rw"),
        (f"{tmp_path}/with space", "nfs4", "rw,vers=4.2"),
        (f"{tmp_path}/ssh", "fuse.sshfs", "rw"),
        (f"{tmp_path}/box", "ext4", "rw"),
        (f"{tmp_path}/box", "overlay", "rw"),
        (f"{tmp_path}/drive", "NTFS", "rw,remote"),
    ]
    place = tmp_path / name
    place.mkdir(parents=True)
    assert disk_diagnosis.file_system(place) is not None
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [_Mount(*mount) for mount in mounts])
    assert disk_diagnosis.file_system(place) == kind
    (reading,) = [each for each in disk_diagnosis.examine_directory(place, 1, Disk()) if each.subject == "file system"]
    assert (reading.status, reading.detail.partition(",")[0].partition(":")[0]) == (status, kind)


@pytest.mark.parametrize(("free", "status"), [(1 << 20, Status.FAULT), (500 << 20, Status.WARNING)])
async def test_disk_that_is_nearly_full_is_found(
    free: int, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert "GiB free" in found(await diagnosis(f"file:{tmp_path}"), status)
