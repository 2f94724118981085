"""Records of the record class: durable soon, never at the cost of the one before, readable from the first moment."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from backtest_kit.errors import Damaged, Outcome, RetryLater
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.diagnosis import require_live_grade
from backtest_kit.persist.files import Disk, has_lost_blocks
from backtest_kit.persist.store import Key, Write
from backtest_kit.persist.testing.faults import FaultFS
from backtest_kit.persist.upkeep import Status

SIGNAL, STATE, MEASURE, LOG = (CONTRACTS[name] for name in ("signal", "state", "measure", "log"))
KEY = ("s", "b")
RECORD, SUCCESSOR = "state/s/b.json", "state/s/b.json.next"

WRITER = """
import asyncio, os, signal, sys
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Write

async def main():
    store = FileStore(sys.argv[1])
    await store.put(Write(CONTRACTS["state"], ("s", "b"), sys.argv[2]))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def write_and_die(root: Path, value: str) -> None:
    """In a process of its own, which is killed as soon as the write is acknowledged."""
    done = subprocess.run([sys.executable, "-c", WRITER, str(root), value], check=False)
    assert done.returncode == -9


async def value(store: FileStore, row: Contract = STATE, key: Key = KEY) -> object:
    record = await store.get(row, key)
    return record and record.value


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[FileStore]:
    """A store that has the state "old", durably."""
    store = FileStore(tmp_path)
    await store.put(Write(STATE, KEY, "old"))
    await store.close()
    yield store
    await store.close()


def tear(root: Path, data: bytes) -> None:
    (root / SUCCESSOR).parent.mkdir(parents=True, exist_ok=True)
    (root / SUCCESSOR).write_bytes(data)


async def test_another_process_sees_a_write_before_it_is_synced(store: FileStore, tmp_path: Path) -> None:
    await store.put(Write(STATE, KEY, "new"))
    other = FileStore(tmp_path)
    assert await value(other) == "new"
    assert [record.value async for record in other.scan(STATE)] == ["new"]
    assert (await other.put(Write(STATE, KEY, "newer", expect=2))).rev == 3
    assert await value(store) == "newer"
    await other.close()


async def test_what_a_killed_process_wrote_is_read_and_tidied_up(store: FileStore, tmp_path: Path) -> None:
    await store.close()
    write_and_die(tmp_path, "new")
    looking = FileStore(tmp_path, existing=True)
    assert await value(looking) == "new"
    assert await looking.check() == []
    await looking.close()
    again = FileStore(tmp_path)
    assert await value(again) == "new"
    await again.close()  # waits for the tidying up
    assert not (tmp_path / SUCCESSOR).exists()
    assert await value(FileStore(tmp_path)) == "new"


@pytest.mark.parametrize("left", [b"", b"\0" * 900, b'{\n  "contract": "sta'], ids=["empty", "zeros", "cut"])
async def test_a_torn_successor_gives_way_to_the_record(
    store: FileStore, tmp_path: Path, left: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await store.close()
    tear(tmp_path, left)
    looking = FileStore(tmp_path, existing=True)
    assert await value(looking) == "old"
    (finding,) = await looking.check()
    assert (finding.path, finding.blocks) == (SUCCESSOR, False)
    await looking.close()
    with caplog.at_level(logging.WARNING):
        assert (await store.put(Write(STATE, KEY, "new"))).rev == 2
    assert "never synced" in caplog.text
    (item,) = await store.quarantined()
    assert (item.path, item.blocks) == (SUCCESSOR, False)
    assert await value(store) == "new"
    await store.close()
    os.utime(tmp_path / "quarantine" / SUCCESSOR, (1, 1))
    await store.open()
    await store.close()  # waits until what killed processes left is tidied up
    assert (tmp_path / "quarantine" / SUCCESSOR).read_bytes() == left


async def test_a_torn_successor_of_nothing_is_absent(tmp_path: Path) -> None:
    tear(tmp_path, b"")
    store = FileStore(tmp_path)
    assert await value(store) is None
    assert [record async for record in store.scan(STATE)] == []
    await store.close()
    (item,) = await store.quarantined()
    assert not item.blocks


async def test_a_changed_successor_is_refused(store: FileStore, tmp_path: Path) -> None:
    await store.close()
    write_and_die(tmp_path, "new")
    tear(tmp_path, (tmp_path / SUCCESSOR).read_bytes().replace(b"new", b"n\0w"))
    for again in (store, FileStore(tmp_path, existing=True)):
        with pytest.raises(Damaged, match="remove it to go back"):
            await again.get(STATE, KEY)
        await again.close()
    assert [finding.path for finding in await store.check()] == [SUCCESSOR]
    (tmp_path / SUCCESSOR).unlink()
    assert await value(store) == "old"


@pytest.mark.parametrize(
    ("row", "path", "key"),
    [(STATE, RECORD, KEY), (MEASURE, "measure/b/k.json", ("b", "k"))],
    ids=["record", "cache"],
)
@pytest.mark.parametrize("left", [b"", b"\0" * 700], ids=["empty", "zeros"])
async def test_an_empty_file_is_absent_where_no_money_is(
    tmp_path: Path, row: Contract, path: str, key: Key, left: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_bytes(left)
    store = FileStore(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert await value(store, row, key) is None
    assert "never synced" in caplog.text
    (item,) = await store.quarantined()
    assert (item.path, item.blocks) == (path, False)
    assert (tmp_path / "quarantine" / path).read_bytes() == left
    assert (await store.put(Write(row, key, "new"))).rev == 1
    await store.close()


async def test_an_empty_file_of_money_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "signal/s/e/A.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    store = FileStore(tmp_path)
    for _ in range(2):
        with pytest.raises(Damaged):
            await store.get(SIGNAL, ("s", "e", "A"))
    await store.close()


async def test_a_batch_is_not_undone_by_an_older_successor(store: FileStore, tmp_path: Path) -> None:
    await store.put(Write(STATE, KEY, "new"))
    await store.batch([Write(STATE, KEY, "batch"), Write(SIGNAL, ("s", "e", "A"), "batch")])
    assert await value(store) == "batch"
    await store.close()
    assert not (tmp_path / SUCCESSOR).exists()
    assert await value(FileStore(tmp_path)) == "batch"


async def test_a_sync_that_fails_is_reported_and_not_tried_again(tmp_path: Path) -> None:
    faults = FaultFS()
    store = FileStore(tmp_path, disk=Disk(faults))
    await store.put(Write(STATE, KEY, "old"))
    await store.close()
    faults.inject("fsync", errno.EIO, path=".next")
    await store.put(Write(STATE, KEY, "new"))
    assert await value(store) == "new"
    with pytest.raises(RetryLater, match="write it again") as raised:
        await store.close()
    assert raised.value.outcome is Outcome.UNKNOWN
    assert b'"old"' in (tmp_path / RECORD).read_bytes()  # still durable
    assert await value(store) == "new"
    await store.close()
    assert faults.retried == []
    synced = [path for call, path in faults.history if call == "fsync" and path.endswith(".next")]
    assert len(synced) == 2, "what was left of it was written anew, not synced again"
    assert b'"new"' in (tmp_path / RECORD).read_bytes()


async def test_a_record_and_its_successor_are_forgotten_together(store: FileStore, tmp_path: Path) -> None:
    await store.put(Write(STATE, KEY, "new"))
    removed = await store.put(Write(CONTRACTS["memory"], ("s", "b", "m"), 1, removed=True))
    assert await store.prune(CONTRACTS["memory"], {("s", "b", "m"): removed.rev}) == 1
    assert await store.get(CONTRACTS["memory"], ("s", "b", "m")) is None
    await store.close()
    assert list((tmp_path / "memory").rglob("*.json*")) == []


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL])
async def test_a_file_system_that_cannot_preallocate_takes_every_write(tmp_path: Path, error: int) -> None:
    faults = FaultFS()
    faults.inject("posix_fallocate", error, lasting=True)
    store = FileStore(tmp_path, disk=Disk(faults))
    await store.put(Write(STATE, KEY, 1))
    await store.batch([Write(STATE, KEY, 2), Write(SIGNAL, ("s", "e", "A"), 2)])
    assert await value(store) == 2
    await store.close()
    assert faults.calls["posix_fallocate"]


def test_a_directory_is_removed_with_what_is_renamed_meanwhile(tmp_path: Path) -> None:
    def rename(call: str, path: str) -> None:
        if call == "unlink" and path.endswith(".next"):
            Path(path).rename(path.removesuffix(".next"))

    faults = FaultFS()
    faults.observer = rename
    tear(tmp_path / "run", b"")
    Disk(faults).remove_tree(str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


async def test_a_record_is_forgotten_while_it_gets_its_name(tmp_path: Path) -> None:
    def forget(call: str, path: str) -> None:
        if call == "replace" and path.endswith(".next"):
            Path(path).unlink()

    faults = FaultFS()
    faults.observer = forget
    store = FileStore(tmp_path, disk=Disk(faults))
    await store.namespace("run").put(Write(STATE, KEY, 1))
    await store.close()
    assert await value(store.namespace("run")) is None
    await store.close()


async def test_what_a_loss_of_power_left_keeps_no_live_start_waiting(store: FileStore, tmp_path: Path) -> None:
    await store.close()
    tear(tmp_path, b"")
    await store.put(Write(STATE, KEY, "new"))
    assert [item.blocks for item in await store.quarantined()] == [False]
    readings = await require_live_grade(store, allow_weak=True)
    (reading,) = [each for each in readings if each.subject == "quarantine"]
    assert (reading.status, SUCCESSOR in reading.detail) == (Status.WARNING, True)


async def test_a_listing_has_every_new_record_while_they_get_their_names(tmp_path: Path) -> None:
    store, other = FileStore(tmp_path), FileStore(tmp_path)
    for number in range(60):
        await store.put(Write(STATE, (f"s{number}", "b"), number))
        listed = [record.value async for record in other.scan(STATE)]
        assert listed == list(range(number + 1))
    await store.close()
    await other.close()


def test_which_zeros_a_loss_of_power_leaves() -> None:
    line = b"x" * 1500 + b"\n"
    assert has_lost_blocks(line[:12] + bytes(512) + line[524:], 500)  # a block in the middle
    assert has_lost_blocks(bytes(24) + line[24:], 1000)  # from its beginning to a block's end
    assert has_lost_blocks(line[:24] + bytes(400), 1000)  # to the end of the file
    assert not has_lost_blocks(line)
    assert not has_lost_blocks(line[:700] + b"\0" + line[701:])
    assert not has_lost_blocks(b"\0" + line[1:])


async def test_blocks_of_a_log_that_were_lost_block_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FileStore(tmp_path)
    for number in range(4):
        await store.put(Write(LOG, (f"{number}",), "x" * 3000))
    await store.close()
    (log,) = (tmp_path / "log").glob("*.jsonl")
    data = log.read_bytes()
    log.write_bytes(data[:4096] + bytes(4096) + data[8192:])
    again = FileStore(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert [record.key async for record in again.scan(LOG)] == [("0",), ("3",)]
    assert "never synced" in caplog.text
    items = await again.quarantined()
    assert items
    assert not any(item.blocks for item in items)
    await again.put(Write(LOG, ("1",), "again"))
    assert await asyncio.to_thread(log.read_bytes) != data
    await again.close()
