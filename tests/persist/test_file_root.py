"""The root of a file store: its opening, what is not made or swept there, and looking at it without a change."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from backtest_kit.errors import Damaged, RetryLater, UserError
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.codec import NewerSchema
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import Write
from backtest_kit.persist.testing.faults import FaultFS

SIGNAL, STATE, RISK = (CONTRACTS[name] for name in ("signal", "state", "risk"))
KEY = ("trend", "binance", "BTC/USDT")
PATH = "signal/trend/binance/BTC%2FUSDT.json"


async def test_root_does_not_move_with_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = FileStore()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    await store.put(Write(SIGNAL, KEY, 1))
    await store.close()
    assert (tmp_path / "dump" / PATH).exists()


async def test_young_temporary_files_are_somebodys_write(tmp_path: Path) -> None:
    directory = tmp_path / "signal/trend"
    directory.mkdir(parents=True)
    stale, young = directory / ".tmp-1-0123456789ab-1", directory / ".tmp-1-0123456789ab-2"
    for path in (stale, young):
        path.write_bytes(b"{}")
    os.utime(stale, (time.time() - 121, time.time() - 121))
    os.utime(young, (time.time() - 100, time.time() - 100))
    store = FileStore(tmp_path)
    assert [record async for record in store.scan(SIGNAL)] == []
    await store.close()
    assert (stale.exists(), young.exists()) == (False, True)


async def test_files_of_others_are_never_swept(tmp_path: Path) -> None:
    name = ".tmp-1-0123456789ab-1"
    others = [tmp_path / name, tmp_path / "notes" / name, tmp_path / "signal/.tmp-notes.txt"]
    ours = [tmp_path / place / name for place in ("signal/a", "@paper/signal", ".backtest-kit", "quarantine/log")]
    for path in (*others, *ours):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (0, 0))
    store = FileStore(tmp_path)
    await store.open()
    await store.close()
    assert [path.exists() for path in others] == [True] * 3
    assert [path.exists() for path in ours] == [False] * 4


async def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "signal").mkdir()
    (tmp_path / "signal/.tmp-1-0123456789ab-1").write_bytes(b"")
    os.utime(tmp_path / "signal/.tmp-1-0123456789ab-1", (0, 0))
    before = sorted(tmp_path.rglob("*"))
    store = FileStore(tmp_path, existing=True)
    for looking in (store.get(SIGNAL, KEY), store.check(), FileStore(tmp_path).check()):
        with pytest.raises(UserError, match="not a store"):
            await looking
    for operation in (FileStore(tmp_path).restore("a"), FileStore(tmp_path).drop("a")):
        with pytest.raises(UserError, match="nothing in quarantine"):
            await operation
    await store.close()
    assert sorted(tmp_path.rglob("*")) == before


class ReadOnlyDisk(Disk):
    def writable(self, path: str) -> bool:
        return False


async def test_looking_changes_nothing_where_nothing_can_be_changed(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for name in ("a", "b"):
        await store.put(Write(CONTRACTS["log"], (name,), name))
        await store.put(Write(STATE, (name, "x"), name))
    await store.close()
    (log,) = (tmp_path / "log").glob("*.jsonl")
    log.write_bytes(log.read_bytes() + b"00000000 torn")
    faults = FaultFS()
    for call in ("write", "mkdir", "replace", "unlink", "utime", "ftruncate"):
        faults.inject(call, 30, lasting=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    looking = FileStore(tmp_path, disk=ReadOnlyDisk(faults), existing=True)
    assert [record.value async for record in looking.scan(STATE)] == ["a", "b"]
    assert [record.value async for record in looking.scan(CONTRACTS["log"])] == ["a", "b"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    await looking.close()
    (tmp_path / "state/a/x.json").write_bytes(b"?")
    log.write_bytes(log.read_bytes().replace(b'"value":"a"', b'"value":"?"'))
    for operation in (looking.get(STATE, ("a", "x")), looking.get(CONTRACTS["log"], ("a",))):
        with pytest.raises(Damaged, match="read-only"):
            await operation
    await looking.close()
    assert set(before) == {path for path in tmp_path.rglob("*") if path.is_file()}


async def test_looking_carries_out_what_a_killed_process_left(tmp_path: Path) -> None:
    faults = FaultFS()
    first = FileStore(tmp_path, disk=Disk(faults))
    await first.open()
    faults.inject("replace", nth=1, lasting=True)
    with pytest.raises(RetryLater):
        await first.batch([Write(SIGNAL, KEY, "new"), Write(RISK, ("e", "r"), "new")])
    await first.close()
    looking = FileStore(tmp_path, existing=True)
    found = await looking.get(SIGNAL, KEY)
    assert found is not None
    assert found.value == "new"
    await looking.close()


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        (".backtest-kit/root.json", b"garbage", "remove that file"),
        (".backtest-kit/root.json", b'{"schemaVersion": 9, "createdAt": 0}', "schema 9"),
        (".backtest-kit/journal/1-1-1.journal", b"00000000 garbage\n", "not carried out"),
        ("singal/a.json", b"", "not a name of this store"),
        ("notes.txt", b"", "not a name of this store"),
    ],
)
async def test_check_looks_at_what_is_not_a_record_too(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    store = FileStore(tmp_path)
    await store.put(Write(SIGNAL, KEY, 1))
    await store.close()
    (tmp_path / "backtest").mkdir()
    assert await store.check() == []
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
    (finding,) = await store.check()
    assert problem in finding.problem
    assert finding.path.startswith(name.partition("/")[0])


async def test_check_of_what_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "q.db").write_bytes(b"")
    with pytest.raises(UserError, match="is a file"):
        await FileStore(tmp_path / "q.db").check()
    with pytest.raises(UserError, match="not a store"):
        await FileStore(tmp_path / "nowhere").check()


async def test_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "dump").write_text("")
    for path in (tmp_path / "dump", tmp_path / "dump/below"):
        with pytest.raises(UserError, match="is a file"):
            await FileStore(path).open()


async def test_root_that_is_not_writable(tmp_path: Path) -> None:
    for error in (13, 30):
        faults = FaultFS()
        faults.inject("mkdir", error)
        with pytest.raises(UserError, match="not writable"):
            await FileStore(tmp_path / "dump", disk=Disk(faults)).open()


async def test_root_of_a_newer_version(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    await store.put(Write(SIGNAL, KEY, 1))
    await store.close()
    (tmp_path / ".backtest-kit/root.json").write_text('{"schemaVersion": 9, "createdAt": 0}')
    with pytest.raises(NewerSchema, match="schema 9"):
        await FileStore(tmp_path).open()
    (tmp_path / ".backtest-kit/root.json").write_text("?")
    with pytest.raises(Damaged, match=r"root\.json"):
        await FileStore(tmp_path).open()


async def test_child_of_a_fork_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path)
    await store.put(Write(SIGNAL, KEY, 1))
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    for operation in (
        store.get(SIGNAL, KEY),
        store.put(Write(SIGNAL, KEY, 2)),
        store.check(),
        store.quarantined(),
        store.restore("signal/s/e/A.json"),
        store.drop("signal/s/e/A.json"),
        store.accept_loss(),
    ):
        with pytest.raises(UserError, match="forked"):
            await operation
    monkeypatch.undo()
    found: Any = await store.get(SIGNAL, KEY)
    assert found.value == 1
    await store.close()
