"""A disk that fails at every single call, one after the other, once and for good."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from backtest_kit.errors import BacktestKitError, Outcome, OutOfSpace, RetryLater
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import TEMP_PREFIX, Disk
from backtest_kit.persist.store import Write
from backtest_kit.persist.testing.faults import FaultFS

SIGNAL, RISK, STATE, STORAGE = (CONTRACTS[name] for name in ("signal", "risk", "state", "storage"))
WRITES = (
    Write(SIGNAL, ("s", "e", "A"), "new"),
    Write(SIGNAL, ("s", "e", "B"), "new"),
    Write(RISK, ("e", "r"), "new"),
    Write(STATE, ("s", "b"), "new"),
    Write(STORAGE, (True, "id"), "new"),
)

Operation = Callable[[FileStore], Awaitable[object]]


async def alone(store: FileStore) -> None:
    await store.put(WRITES[0])


async def together(store: FileStore) -> None:
    results = await asyncio.gather(*(store.put(write) for write in WRITES), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def in_a_batch(store: FileStore) -> None:
    await store.batch(WRITES)


OPERATIONS: dict[str, Operation] = {"alone": alone, "together": together, "batch": in_a_batch}


async def values(store: FileStore) -> list[object]:
    return [found and found.value for found in [await store.get(write.contract, write.key) for write in WRITES]]


def temporary_files(root: Path) -> list[Path]:
    return [path for path in root.rglob(f"{TEMP_PREFIX}*") if path.is_file()]


async def prepare(root: Path, faults: FaultFS) -> FileStore:
    store = FileStore(root, disk=Disk(faults))
    for write in WRITES:
        await store.put(Write(write.contract, write.key, "old"))
    return store


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    "call", ["open", "write", "fsync", "close", "replace", "fstat", "read", "stat", "posix_fallocate"]
)
async def test_every_call_that_fails(tmp_path: Path, call: str, name: str, lasting: bool) -> None:
    """The caller hears of it or the write took place; the value is old or new; afterwards everything works."""
    for number in range(1, 200):
        faults = FaultFS(sync=False)
        root = tmp_path / str(number)
        store = await prepare(root, faults)
        fault = faults.inject(call, errno.EIO, nth=number, lasting=lasting)
        failure: BacktestKitError | None = None
        try:
            await OPERATIONS[name](store)
        except BacktestKitError as error:
            failure = error
        faults.heal()
        state = await values(store)
        assert set(state) <= {"old", "new"}, (number, state)
        if failure is None:
            assert state[0] == "new", number
        elif failure.outcome is Outcome.NOT_DONE and name != "together":
            assert set(state) == {"old"}, number
        if name == "batch":
            assert len(set(state)) == 1, (number, state)
        await store.put(Write(SIGNAL, ("s", "e", "A"), "later"))
        (closing,) = await asyncio.gather(store.close(), return_exceptions=True)
        if closing is not None:  # the fault met the syncing of a record in the background
            assert isinstance(closing, RetryLater), number
            assert fault.hits, number
            assert closing.outcome is Outcome.UNKNOWN, number
        assert faults.opened == {}, number
        assert faults.retried == [], number
        again = FileStore(root)
        assert (await values(again))[1:] == state[1:], number
        assert (await values(again))[0] == "later"
        assert temporary_files(root) == []
        await again.close()
        shutil.rmtree(root)
        if not fault.hits:
            break
    else:
        pytest.fail("the calls of one operation have no end")
    assert number > 1 or call in ("close", "posix_fallocate", "read", "stat"), "no call was made to fail"


@pytest.mark.parametrize("call", ["open", "mkdir", "write", "fsync", "replace", "scandir", "stat", "utime"])
async def test_first_opening_that_fails_at_every_call(tmp_path: Path, call: str) -> None:
    for number in range(1, 100):
        faults = FaultFS(sync=False)
        root = tmp_path / str(number)
        store = FileStore(root, disk=Disk(faults))
        fault = faults.inject(call, errno.EIO, nth=number)
        try:
            await store.open()
        except RetryLater:
            assert fault.hits
        faults.heal()
        await store.put(WRITES[0])
        assert (await values(store))[0] == "new"
        await store.close()
        assert faults.opened == {}
        assert faults.retried == []
        if not fault.hits:
            break


@pytest.mark.parametrize("name", OPERATIONS)
async def test_writes_that_take_a_byte_each_do_no_harm(tmp_path: Path, name: str) -> None:
    faults = FaultFS(sync=False)
    store = await prepare(tmp_path, faults)
    faults.write_limit = 1
    await OPERATIONS[name](store)
    faults.heal()
    await store.close()
    assert await store.check() == []
    again = FileStore(tmp_path)
    assert (await values(again))[0] == "new"
    await again.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT], ids=["disk", "quota"])
@pytest.mark.parametrize("name", OPERATIONS)
async def test_no_space(tmp_path: Path, name: str, error: int) -> None:
    faults = FaultFS(sync=False)
    store = await prepare(tmp_path, faults)
    for call in ("write", "posix_fallocate"):
        faults.inject(call, error, lasting=True)
    with pytest.raises(OutOfSpace, match="free some space") as raised:
        await OPERATIONS[name](store)
    assert raised.value.outcome is Outcome.NOT_DONE
    # Feeds are in a file of SQLite, whose calls do not fail here: alone they stand, in a batch they fall with it.
    feeds = ["new" if name == "together" else "old"]
    assert await values(store) == ["old"] * (len(WRITES) - 1) + feeds
    assert temporary_files(tmp_path) == []
    faults.heal()
    await OPERATIONS[name](store)
    assert (await values(store))[0] == "new"
    await store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if not mounted or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system of 1 MiB; test_no_space has the same case with a shim")
    yield place
    subprocess.run(["umount", str(place)], check=True)


async def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    store = FileStore(small_disk / "dump")
    stored = 0
    full: OutOfSpace | None = None
    while full is None:
        try:
            await store.put(Write(SIGNAL, ("s", "e", f"P{stored}"), "x" * 5000))
            stored += 1
        except OutOfSpace as error:
            full = error
    assert full.outcome is Outcome.NOT_DONE
    for number in range(stored):
        found = await store.get(SIGNAL, ("s", "e", f"P{number}"))
        assert found is not None
        assert found.value == "x" * 5000
    with pytest.raises(OutOfSpace):
        await store.batch([Write(SIGNAL, ("s", "e", f"P{number}"), "y" * 5000) for number in range(3)])
    for number in range(3):
        found = await store.get(SIGNAL, ("s", "e", f"P{number}"))
        assert found is not None
        assert found.value == "x" * 5000
    assert temporary_files(small_disk) == []
    for number in range(10):
        (small_disk / f"dump/signal/s/e/P{number}.json").unlink()
    await store.put(Write(SIGNAL, ("s", "e", "after"), "x" * 5000))
    await store.close()


@pytest.mark.parametrize("name", OPERATIONS)
async def test_cancelled_at_every_moment(tmp_path: Path, name: str) -> None:
    faults = FaultFS(sync=False)
    store = await prepare(tmp_path, faults)
    open_before = len(faults.opened)
    for steps in range(70):
        task = asyncio.ensure_future(OPERATIONS[name](store))
        for _ in range(steps % 10):
            await asyncio.sleep(0)
        await asyncio.sleep(steps * 0.00002)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert set(await values(store)) <= {"old", "new"}
        await store.put(Write(SIGNAL, ("s", "e", "A"), "old"))
    await store.put(Write(SIGNAL, ("s", "e", "A"), "new"))
    assert len(faults.opened) <= open_before + 64 + 128  # locks, and files on their way to being freed
    assert temporary_files(tmp_path) == []
    await store.close()
    assert faults.opened == {}
