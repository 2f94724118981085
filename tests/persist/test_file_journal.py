"""What a journal must not bring back, and what must not keep it alive."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backtest_kit.errors import Damaged, Outcome, OutOfSpace, RetryLater
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import ABSENT, Write
from backtest_kit.persist.testing.faults import FaultFS

SIGNAL, SCHEDULE, STORAGE = (CONTRACTS[name] for name in ("signal", "schedule", "storage"))
KEY = ("s", "e", "A")
BATCH = [Write(SIGNAL, KEY, "batch"), Write(SCHEDULE, KEY, "batch")]

HEAD = """
import asyncio, os, sys, time
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Write
from backtest_kit.persist import crashpoints

SIGNAL, SCHEDULE, KEY = CONTRACTS["signal"], CONTRACTS["schedule"], ("s", "e", "A")

def batch(value):
    return [Write(SIGNAL, KEY, value), Write(SCHEDULE, KEY, value)]
"""

BOT = """
async def main():
    store = FileStore(sys.argv[1])
    for number in range(5):
        await store.batch(batch(number))
    print("ready", flush=True)
    time.sleep(60)

asyncio.run(main())
"""

PARENT = """
async def main():
    store = FileStore(sys.argv[1])
    await store.batch(batch("old"))
    worker = os.fork()
    if worker == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print(worker, flush=True)
    crashpoints.arm("journal.between_renames")
    await store.batch(batch("new"))

asyncio.run(main())
"""

CHILD = """
store = FileStore(sys.argv[1])

async def use():
    await store.close()
    await asyncio.wait_for(store.put(Write(SIGNAL, KEY, "child")), 5)

with asyncio.Runner() as runner:
    runner.run(store.batch(batch("old")))
    worker = os.fork()
    if worker == 0:
        try:
            asyncio.run(use())
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    os.waitpid(worker, 0)
    print(len(os.listdir(sys.argv[1] + "/.backtest-kit/journal")), flush=True)
    runner.run(store.batch(batch("new")))
    runner.run(store.close())
"""


def start(program: str, root: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", HEAD + program, str(root)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


async def values(store: FileStore) -> list[object]:
    return [found and found.value for found in [await store.get(row, KEY) for row in (SIGNAL, SCHEDULE)]]


def copy_of_a_killed_process(root: Path, copy: Path) -> FileStore:
    """A store over what would be there if this process were killed now."""
    subprocess.run(["cp", "-a", str(root), str(copy)], check=True)
    return FileStore(copy)


@pytest.mark.parametrize("call", ["fsync", "write"])
async def test_a_batch_that_failed_does_not_come_back_over_a_later_write(tmp_path: Path, call: str) -> None:
    """Its entry may be in the journal whole, if the disk lets nobody take it out again at once."""
    faults = FaultFS()
    store = FileStore(tmp_path / "dump", disk=Disk(faults))
    await store.put(Write(SIGNAL, KEY, "old"))
    await store.batch(BATCH)
    if call == "write":  # the first write of the two lets all but the last byte through
        faults.write_limit = 600
        faults.inject("write", nth=2, path=".journal")
    else:
        faults.inject("fsync", path=".journal")
    faults.inject("ftruncate", lasting=True)
    faults.inject("unlink", lasting=True)
    with pytest.raises(RetryLater) as raised:
        await store.batch([Write(SIGNAL, KEY, "x" * 500), Write(SCHEDULE, KEY, "x" * 500)])
    assert raised.value.outcome is Outcome.UNKNOWN
    assert "may have been written" in str(raised.value)
    with pytest.raises(RetryLater):  # nothing is acknowledged while the entry cannot be removed
        await store.put(Write(SIGNAL, KEY, "refused"))
    faults.heal()
    acknowledged = await store.put(Write(SIGNAL, KEY, "acknowledged"))
    assert acknowledged.rev == 3
    after = copy_of_a_killed_process(tmp_path / "dump", tmp_path / "copy")
    assert await values(after) == ["acknowledged", "batch"]
    await after.close()
    await store.close()
    assert faults.opened == {}


async def test_a_batch_that_a_failing_disk_stopped_is_whole_before_another_process_writes(tmp_path: Path) -> None:
    faults = FaultFS()
    one, other = FileStore(tmp_path, disk=Disk(faults)), FileStore(tmp_path)
    await one.batch([Write(SIGNAL, KEY, "old"), Write(SCHEDULE, KEY, "old")])
    await other.open()
    faults.inject("replace", lasting=True)
    with pytest.raises(RetryLater) as raised:
        await one.batch(BATCH)
    assert raised.value.outcome is Outcome.UNKNOWN
    assert (await other.put(Write(SIGNAL, KEY, "acknowledged"))).rev == 3
    assert await values(other) == ["acknowledged", "batch"]
    faults.heal()
    await one.put(Write(SIGNAL, ("s", "e", "B"), 1))
    assert await values(one) == ["acknowledged", "batch"]
    await one.close()
    await other.close()


async def test_an_entry_gives_way_to_another_record_of_its_revision(tmp_path: Path) -> None:
    """Which was acknowledged after the entry had been given up."""
    store, elsewhere = FileStore(tmp_path / "dump"), FileStore(tmp_path / "elsewhere")
    for value in ("old", "batch"):
        await store.batch([Write(SIGNAL, KEY, value), Write(SCHEDULE, KEY, value)])
        await elsewhere.put(Write(SIGNAL, KEY, "acknowledged"))
    (journal,) = (tmp_path / "dump/.backtest-kit/journal").iterdir()
    left = journal.read_bytes()
    await store.close()
    journal.write_bytes(left)
    (tmp_path / "elsewhere/signal/s/e/A.json").rename(tmp_path / "dump/signal/s/e/A.json")
    assert await values(store) == ["acknowledged", "batch"]
    await store.close()
    await elsewhere.close()


async def test_what_was_dropped_does_not_come_back_from_the_journal_of_another_process(tmp_path: Path) -> None:
    bot = start(BOT, tmp_path)
    try:
        assert read_line(bot) == "ready\n"
        with (tmp_path / "signal/s/e/A.json").open("ab") as file:
            file.write(b"junk")
        store = FileStore(tmp_path)
        with pytest.raises(Damaged):
            await store.get(SIGNAL, KEY)
        with pytest.raises(RetryLater, match="another process still has signal/s/e/A"):
            await store.drop("signal/s/e/A.json")
        with pytest.raises(Damaged):
            await store.get(SIGNAL, KEY)
        deadline = time.monotonic() + 15
        while list((tmp_path / ".backtest-kit/journal").iterdir()):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
        await store.drop("signal/s/e/A.json")
        assert (await store.put(Write(SIGNAL, KEY, "acknowledged", expect=ABSENT))).rev == 1
        await store.close()
    finally:
        bot.kill()
        bot.communicate()
    again = FileStore(tmp_path)
    assert await values(again) == ["acknowledged", 4]
    await again.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
async def test_a_worker_that_outlives_a_killed_bot_keeps_nothing_of_it(tmp_path: Path) -> None:
    bot = start(PARENT, tmp_path)
    worker = int(read_line(bot))
    try:
        bot.communicate()
        assert bot.returncode == -signal.SIGKILL
        os.kill(worker, 0)
        store = FileStore(tmp_path)
        assert await values(store) == ["new", "new"]
        began = time.monotonic()
        assert (await store.put(Write(SIGNAL, KEY, "mine"))).rev == 3
        assert time.monotonic() - began < 1
        await store.close()
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
async def test_a_child_neither_writes_nor_closes_what_is_its_parents(tmp_path: Path) -> None:
    bot = start(CHILD, tmp_path)
    said, _ = await asyncio.to_thread(bot.communicate, None, 20)
    refused, journals = said.splitlines()
    assert refused.startswith("UserError")
    assert "forked" in refused
    assert journals == "1", "the child removed the journal of its parent"
    store = FileStore(tmp_path)
    assert await values(store) == ["new", "new"]
    await store.close()


async def test_a_damaged_journal_is_carried_out_as_far_as_it_can_be_read_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "dump"
    store = FileStore(root)
    for number, key in enumerate(("A", "B", "C")):
        await store.batch([Write(row, ("s", "e", key), number) for row in (SIGNAL, SCHEDULE)])
    after = copy_of_a_killed_process(root, tmp_path / "copy")
    await store.close()
    (journal,) = (tmp_path / "copy/.backtest-kit/journal").iterdir()
    damaged = journal.read_bytes().replace(b'"B"', b'"X"')
    journal.write_bytes(damaged)
    for key in ("A", "B", "C"):
        (tmp_path / f"copy/signal/s/e/{key}.json").unlink()
    found = [await after.get(SIGNAL, ("s", "e", key)) for key in ("A", "B", "C")]
    assert [record and record.value for record in found] == [0, None, 2]
    (kept,) = (tmp_path / "copy/.backtest-kit/journal").iterdir()
    assert kept.name == f"{journal.name}.damaged"
    assert kept.read_bytes() == damaged
    assert str(kept) in caplog.text
    await after.close()
    await FileStore(tmp_path / "copy").open()
    assert kept.read_bytes() == damaged


async def test_a_journal_with_a_change_for_a_blocked_key_is_kept(tmp_path: Path) -> None:
    """What a dead bot promised for a key that is in quarantine stays at hand for the operator."""
    bot = start(BOT, tmp_path)
    assert await asyncio.to_thread(read_line, bot) == "ready\n"
    bot.kill()
    await asyncio.to_thread(bot.communicate)
    path = tmp_path / "signal/s/e/A.json"
    (tmp_path / "quarantine/signal/s/e").mkdir(parents=True)
    path.rename(tmp_path / "quarantine/signal/s/e/A.json")
    (journal,) = (tmp_path / ".backtest-kit/journal").iterdir()
    promised = journal.read_bytes()
    store = FileStore(tmp_path)
    with pytest.raises(Damaged):
        await store.get(SIGNAL, KEY)
    record = await store.get(SCHEDULE, KEY)
    assert record is not None
    assert record.value == 4
    await store.close()
    kept = journal.with_name(f"{journal.name}.damaged")
    assert kept.read_bytes() == promised


KILLED = """
async def main():
    store = FileStore(sys.argv[1])
    feed, log = CONTRACTS["storage"], CONTRACTS["log"]
    await store.batch([*batch("new"), Write(feed, (False, "x"), "new"), Write(log, ("x",), "new")])

asyncio.run(main())
"""


@pytest.mark.parametrize(
    "point", ["journal.after_fsync", "journal.between_renames", "log.after_append", "sqlite.after_work"]
)
async def test_a_batch_of_a_killed_process_is_whole_before_another_one_writes(tmp_path: Path, point: str) -> None:
    survivor = FileStore(tmp_path)
    old = [Write(SIGNAL, KEY, "old"), Write(SCHEDULE, KEY, "old"), Write(STORAGE, (False, "x"), "old")]
    await survivor.batch(old)
    environment = {**os.environ, "BACKTEST_KIT_CRASH": point}
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", HEAD + KILLED, str(tmp_path), env=environment)
    assert await killed.wait() == -signal.SIGKILL
    await survivor.put(Write(CONTRACTS["risk"], ("e", "r"), "taken over"))
    found = [await survivor.get(write.contract, write.key) for write in old]
    assert [(record.value, record.rev) for record in found if record is not None] == [("new", 2)] * 3
    assert [record.key async for record in survivor.scan(CONTRACTS["log"])] == [("x",)]
    await survivor.close()


async def test_what_could_not_be_synced_is_written_anew_before_its_entry_goes(tmp_path: Path) -> None:
    faults = FaultFS()
    store = FileStore(tmp_path, disk=Disk(faults))
    await store.batch(BATCH)
    record = tmp_path / "signal/s/e/A.json"
    dropped = record.stat().st_ino
    faults.inject("fsync", path=str(record))
    with pytest.raises(RetryLater):
        await asyncio.to_thread(store.root.checkpoint)
    await asyncio.to_thread(store.root.checkpoint)
    journals = list((tmp_path / ".backtest-kit/journal").iterdir())
    assert [b"batch" in path.read_bytes() for path in journals] == [True]
    found = await store.get(SIGNAL, KEY)
    assert found is not None
    await store.put(Write(CONTRACTS["risk"], ("e", "r"), "next"))
    assert list((tmp_path / ".backtest-kit/journal").iterdir()) == []
    assert await store.get(SIGNAL, KEY) == found
    assert record.stat().st_ino != dropped
    await store.close()


async def test_a_line_of_a_journal_is_synced_although_it_is_there(tmp_path: Path) -> None:
    killed = FileStore(tmp_path)
    await killed.batch([*BATCH, Write(CONTRACTS["log"], ("x",), "line")])
    (journal,) = (tmp_path / ".backtest-kit/journal").iterdir()
    left = journal.read_bytes()
    await killed.close()
    journal.write_bytes(left)
    faults = FaultFS()
    store = FileStore(tmp_path, disk=Disk(faults))
    await store.open()
    before = faults.history[: faults.history.index(("unlink", str(journal)))]
    log = str(tmp_path / "log")
    calls = [call for call, path in before if path.startswith(log) and call in ("fsync", "replace")]
    assert calls == ["fsync", "replace", "fsync"], "the file, its name, its directory"
    assert [record.key async for record in store.scan(CONTRACTS["log"])] == [("x",)]
    await store.close()


async def test_the_journal_stays_away_once_a_key_begins_anew(tmp_path: Path) -> None:
    faults = FaultFS()
    store = FileStore(tmp_path, disk=Disk(faults))
    await store.batch(BATCH)
    (tmp_path / "signal/s/e/A.json").write_text("damaged")
    with pytest.raises(Damaged):
        await store.get(SIGNAL, KEY)
    (journal,) = (tmp_path / ".backtest-kit/journal").iterdir()
    await store.drop("signal/s/e/A.json")
    gone = faults.history.index(("unlink", str(journal)))
    synced = faults.history.index(("fsync", str(journal.parent)), gone)
    assert synced < faults.history.index(("unlink", str(tmp_path / "quarantine/signal/s/e/A.json")))
    await store.close()


async def test_a_line_whose_sync_failed_is_written_to_a_new_file(tmp_path: Path) -> None:
    """To try the sync again on the old one would report success for what the kernel has dropped."""
    faults = FaultFS()
    store = FileStore(tmp_path, disk=Disk(faults))
    lines = [Write(CONTRACTS["log"], (name,), name) for name in ("x", "y")]
    await store.batch([*BATCH, *lines])
    (file,) = (tmp_path / "log").iterdir()
    dropped = file.stat().st_ino
    faults.inject("fsync", path=str(file))
    with pytest.raises(RetryLater):
        await asyncio.to_thread(store.root.checkpoint)
    await store.put(Write(CONTRACTS["risk"], ("e", "r"), "next"))
    assert file.stat().st_ino != dropped
    assert [record.value async for record in store.scan(CONTRACTS["log"])] == ["x", "y"]
    assert list((tmp_path / ".backtest-kit/journal").iterdir()) == []
    await store.close()


async def test_a_sync_that_failed_in_the_background_is_not_tried_again_by_the_journal(tmp_path: Path) -> None:
    faults = FaultFS()
    store = FileStore(tmp_path, disk=Disk(faults))
    log = CONTRACTS["log"]
    await store.batch([*BATCH, Write(log, ("x",), "x")])
    (file,) = (tmp_path / "log").iterdir()
    dropped = file.stat().st_ino
    faults.inject("fsync", path=str(file))
    await store.put(Write(log, ("y",), "y"))
    async with asyncio.timeout(30):
        while file.stat().st_ino == dropped:
            await store.put(Write(CONTRACTS["risk"], ("e", "r"), "next"))
    assert [record.value async for record in store.scan(log)] == ["x", "y"]
    with pytest.raises(RetryLater, match="may not outlive this host"):
        await store.close()


async def test_a_reader_does_not_take_a_batch_for_whole_whose_journal_is_not_closed_yet(tmp_path: Path) -> None:
    faults = FaultFS()
    store = FileStore(tmp_path, disk=Disk(faults))
    await store.batch([Write(SIGNAL, KEY, "old"), Write(SCHEDULE, KEY, "old")])
    faults.inject("replace", nth=2)
    faults.observer = lambda call, path: store.root.open() if (call, path[-8:]) == ("close", ".journal") else None
    with pytest.raises(RetryLater):
        await store.batch(BATCH)
    faults.observer = lambda call, path: None
    assert await values(store) == ["batch", "batch"]
    await store.close()


async def test_reads_go_on_while_the_disk_is_too_full_to_finish_a_batch(tmp_path: Path) -> None:
    faults = FaultFS()
    store = FileStore(tmp_path, disk=Disk(faults))
    other = Write(SIGNAL, ("s", "e", "B"), "other")
    await store.put(other)
    await store.batch([Write(SIGNAL, KEY, "old"), Write(SCHEDULE, KEY, "old")])
    faults.inject("replace", errno.ENOSPC, nth=2, lasting=True)
    with pytest.raises(OutOfSpace):
        await store.batch(BATCH)
    found = await store.get(SIGNAL, other.key)
    assert found is not None
    assert found.value == "other"
    assert [record.key async for record in store.scan(CONTRACTS["risk"])] == []
    for half in (values(store), anext(store.scan(SIGNAL)), store.put(other)):
        with pytest.raises(OutOfSpace):
            await half
    faults.heal()
    assert await values(store) == ["batch", "batch"]
    await store.close()


async def test_what_a_killed_process_left_is_finished_for_who_only_reads(tmp_path: Path) -> None:
    reader = FileStore(tmp_path)
    await reader.batch([Write(SIGNAL, KEY, "old"), Write(SCHEDULE, KEY, "old")])
    environment = {**os.environ, "BACKTEST_KIT_CRASH": "journal.between_renames"}
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", HEAD + KILLED, str(tmp_path), env=environment)
    assert await killed.wait() == -signal.SIGKILL
    async with asyncio.timeout(30):
        while await values(reader) != ["new", "new"]:
            await asyncio.sleep(0.05)
    await reader.close()
