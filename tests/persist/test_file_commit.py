"""The writing thread of a file store: what waits for what, and what must not."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from backtest_kit.errors import RetryLater
from backtest_kit.persist.backends import file_commit
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import Disk
from backtest_kit.persist.locks import try_lock
from backtest_kit.persist.store import Write
from backtest_kit.persist.testing.faults import FaultFS

SIGNAL, SCHEDULE, STORAGE = CONTRACTS["signal"], CONTRACTS["schedule"], CONTRACTS["storage"]
STUCK, FREE = ("s", "e", "A"), ("s", "e", "B")


@contextmanager
def lock_of(root: Path, path: str) -> Iterator[None]:
    """Keep the lock of a record, as a process does that was stopped while it wrote."""
    fd = os.open(root / f".backtest-kit/locks/{zlib.crc32(path.encode()) % 64:02d}.lock", os.O_RDWR | os.O_CREAT)
    try:
        assert try_lock(fd)
        yield
    finally:
        os.close(fd)


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.06])
async def test_writes_while_closing_are_carried_out_and_the_close_ends(tmp_path: Path, delay: float) -> None:
    faults = FaultFS()

    def slow(call: str, path: str) -> None:
        if call == "fsync":
            time.sleep(0.02)

    faults.observer = slow
    store = FileStore(tmp_path, disk=Disk(faults))
    await store.put(Write(SIGNAL, STUCK, 0))
    writes = [asyncio.create_task(store.put(Write(SIGNAL, STUCK, 1)))]
    await asyncio.sleep(0.01)
    closes = [asyncio.create_task(store.close())]
    await asyncio.sleep(delay)
    writes += [asyncio.create_task(store.put(Write(SIGNAL, key, 2))) for key in (STUCK, FREE)]
    await asyncio.sleep(0)
    closes.append(asyncio.create_task(store.close()))
    writes.append(asyncio.create_task(store.put(Write(SIGNAL, STUCK, 3))))
    await asyncio.wait_for(asyncio.gather(*writes, *closes), 10)
    assert [task.result().rev for task in writes] == [2, 3, 1, 4]
    await asyncio.wait_for(store.close(), 10)
    assert faults.opened == {}


async def test_a_lock_that_is_kept_stops_nobody_else(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for key in (STUCK, FREE):
        await store.put(Write(SIGNAL, key, 0))
    with lock_of(tmp_path, "signal/s/e/A.json"):
        began = time.monotonic()
        waiting = [asyncio.create_task(store.put(Write(SIGNAL, STUCK, number))) for number in range(8)]
        await asyncio.sleep(0)
        for number in range(3):
            await store.put(Write(SIGNAL, FREE, number))
        assert time.monotonic() - began < 1.9, "writes of another key waited for the lock"
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert 1.9 < time.monotonic() - began < 8, "those who wait for one lock give up together"
    assert all(isinstance(result, RetryLater) and "for 2 s" in str(result) for result in results), results
    found = await store.get(SIGNAL, STUCK)
    assert found is not None
    assert found.value == 0
    await store.close()


async def test_what_waits_for_a_lock_keeps_its_place(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    await store.put(Write(SIGNAL, STUCK, 0))
    with lock_of(tmp_path, "signal/s/e/A.json"):
        waiting: list[asyncio.Task[object]] = [
            asyncio.create_task(store.batch([Write(SIGNAL, STUCK, 1), Write(SIGNAL, FREE, 1)]))
        ]
        await asyncio.sleep(0.2)
        # The free key too is behind the batch that writes it.
        waiting += [asyncio.create_task(store.put(Write(SIGNAL, key, 2))) for key in (FREE, STUCK)]
        await asyncio.sleep(0.2)
        await store.put(Write(SCHEDULE, FREE, 1))
        assert not any(task.done() for task in waiting)
        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0.1)
    await asyncio.wait_for(asyncio.gather(*waiting, closing), 10)
    for key in (STUCK, FREE):
        found = await store.get(SIGNAL, key)
        assert found is not None
        assert found.value == 2
    await store.close()


async def test_who_lingers_for_company_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The shorter the time, the more often it is over before the wait has begun.
    monkeypatch.setattr(file_commit, "LINGER_SECONDS", 1e-6)
    store = FileStore(tmp_path, disk=Disk(FaultFS(sync=False)))
    async with asyncio.timeout(60):
        for number in range(500):
            await asyncio.gather(*(store.put(Write(SIGNAL, ("s", "e", name), number)) for name in "ab"))
            await store.put(Write(SIGNAL, ("s", "e", "a"), number))
    await store.close()


@pytest.mark.parametrize("with_slot", [False, True], ids=["feeds", "batches"])
async def test_a_database_that_is_kept_stops_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_slot: bool
) -> None:
    """Those that want it give up together, or go on once it is free; money goes on in the same thread."""
    store = FileStore(tmp_path)
    await store.put(Write(STORAGE, (False, "a"), 0))
    with closing(sqlite3.connect(tmp_path / "feeds.db", isolation_level=None)) as other:
        for patience in (600, 0.1):
            monkeypatch.setattr(file_commit, "PATIENCE_SECONDS", patience)
            other.execute("BEGIN IMMEDIATE")
            waiting = []
            for number in range(10):
                writes = [Write(STORAGE, (False, f"{number}"), 1)]
                if with_slot:
                    writes.append(Write(SIGNAL, ("s", "e", f"{number}"), 1))
                waiting.append(asyncio.create_task(store.batch(writes)))
            await asyncio.sleep(0)
            await store.put(Write(SIGNAL, FREE, 1))
            if patience == 600:
                assert not any(task.done() for task in waiting), "money waited for the database"
                other.execute("ROLLBACK")
                await asyncio.gather(*waiting)
            else:
                refused = await asyncio.gather(*waiting, return_exceptions=True)
                assert all(isinstance(each, RetryLater) and "feeds.db for 0.1 s" in str(each) for each in refused)
                other.execute("ROLLBACK")
    await store.put(Write(STORAGE, (False, "1"), 1))
    await store.close()
