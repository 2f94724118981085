"""What is particular to files. What every store does is in the conformance kit."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from backtest_kit.errors import Conflict, Damaged, RetryLater, UserError
from backtest_kit.persist.backends import file_sync
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.codec import NewerSchema, seal
from backtest_kit.persist.contracts import CONTRACTS, LEASE, Contract
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import Record, Write
from backtest_kit.persist.testing.faults import FaultFS

SIGNAL, STATE, MEASURE, RISK = (CONTRACTS[name] for name in ("signal", "state", "measure", "risk"))
KEY = ("trend", "binance", "BTC/USDT")
PATH = "signal/trend/binance/BTC%2FUSDT.json"


async def test_layout_is_that_of_the_table(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    await store.put(Write(SIGNAL, KEY, {"price": 1.5}))
    await store.put(Write(CONTRACTS["recent"], ("trend", "binance", "jan", "BTCUSDT", True), 1))
    await store.put(Write(CONTRACTS["storage"], (False, "id"), 1))
    await store.put(Write(CONTRACTS["log"], ("entry",), 1))
    await store.within("paper").put(Write(SIGNAL, KEY, 1))
    await store.close()
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {path for path in files if not path.startswith(".backtest-kit/")} == {
        PATH,
        "recent/trend/binance/jan/BTCUSDT/backtest.json",
        "storage/live/00000001.jsonl",
        "log/00000001.jsonl",
        f"@paper/{PATH}",
    }
    text = json.loads((tmp_path / PATH).read_text())
    assert (text["key"]["symbol"], text["value"], text["rev"]) == ("BTC/USDT", {"price": 1.5}, 1)


async def test_root_does_not_move_with_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = FileStore()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    await store.put(Write(SIGNAL, KEY, 1))
    await store.close()
    assert (tmp_path / "dump" / PATH).exists()


async def test_money_write_is_synced_before_it_returns(file_store: FileStore, faults: FaultFS) -> None:
    await file_store.put(Write(SIGNAL, KEY, 1))
    faults.history.clear()
    await file_store.put(Write(SIGNAL, KEY, 2))
    steps = [(call, Path(path).name) for call, path in faults.history if call in ("write", "fsync", "replace")]
    assert [call for call, _ in steps] == ["write", "fsync", "replace", "fsync"]
    assert steps[0][1] == steps[1][1] == steps[2][1]
    assert steps[0][1].startswith(".tmp-")
    assert steps[3][1] == "binance"


async def test_new_directories_are_durable_in_their_parents(file_store: FileStore, faults: FaultFS) -> None:
    await file_store.open()
    faults.history.clear()
    await file_store.put(Write(SIGNAL, KEY, 1))
    synced = [Path(path).name for call, path in faults.history if call == "fsync"]
    assert synced[:3] == ["dump", "signal", "trend"]
    assert synced[-1] == "binance"


async def test_record_write_is_synced_within_50_ms(file_store: FileStore, faults: FaultFS) -> None:
    await file_store.put(Write(STATE, ("a", "b"), 1))
    assert not [path for call, path in faults.history if call == "fsync" and path.endswith("b.json")]
    await asyncio.sleep(0.2)
    assert [path for call, path in faults.history if call == "fsync" and path.endswith("b.json")]


async def test_cache_write_is_never_synced(file_store: FileStore, faults: FaultFS) -> None:
    await file_store.open()
    faults.history.clear()
    await file_store.put(Write(MEASURE, ("a", "b"), 1))
    await file_store.close()
    assert "fsync" not in {call for call, _ in faults.history}


async def test_closing_syncs_records(file_store: FileStore, faults: FaultFS) -> None:
    await file_store.put(Write(STATE, ("a", "b"), 1))
    await file_store.close()
    assert [path for call, path in faults.history if call == "fsync" and path.endswith("b.json")]


async def test_many_money_writes_at_once_share_their_syncs(file_store: FileStore, faults: FaultFS) -> None:
    async def put_all() -> None:
        await asyncio.gather(*(file_store.put(Write(SIGNAL, ("s", "e", f"P{n}"), n)) for n in range(32)))

    await put_all()
    faults.calls.clear()
    await put_all()
    assert faults.calls["fsync"] <= 8
    await file_store.close()
    for number in range(32):
        found = await file_store.get(SIGNAL, ("s", "e", f"P{number}"))
        assert found is not None
        assert (found.value, found.rev) == (number, 2)


async def test_reads_see_what_is_on_the_disk(tmp_path: Path) -> None:
    one, two = FileStore(tmp_path), FileStore(tmp_path)
    await one.put(Write(SIGNAL, KEY, 1))
    for number in range(2, 20):
        writer, reader = (one, two) if number % 2 else (two, one)
        await writer.put(Write(SIGNAL, KEY, number, expect=number - 1))
        found = await reader.get(SIGNAL, KEY)
        assert found is not None
        assert found.value == number
    with pytest.raises(Conflict):
        await one.put(Write(SIGNAL, KEY, 0, expect=3))
    await one.close()
    await two.close()


# -- damage --------------------------------------------------------------------------------------------


async def damaged(store: FileStore, root: Path, data: bytes = b"{not json") -> Path:
    await store.put(Write(SIGNAL, KEY, {"price": 1}))
    (root / PATH).write_bytes(data)
    return root / "quarantine" / PATH


async def test_damage_is_kept_untouched_and_blocks_until_the_operator_decides(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    kept = await damaged(store, tmp_path, b"\xff\0 what was this")
    for again in (store, FileStore(tmp_path)):
        for _ in range(2):
            with pytest.raises(Damaged, match=r"quarantine restore .*drop"):
                await again.get(SIGNAL, KEY)
            with pytest.raises(Damaged, match="blocked"):
                await again.put(Write(SIGNAL, KEY, 2))
            with pytest.raises(Damaged):
                await again.batch([Write(SIGNAL, KEY, 2), Write(SIGNAL, ("a", "b", "c"), 2)])
            assert await again.get(SIGNAL, ("a", "b", "c")) is None
    assert kept.read_bytes() == b"\xff\0 what was this"
    (item,) = await store.quarantined()
    assert (item.path, item.contract, item.key) == (PATH, "signal", list(KEY))
    await store.drop(PATH)
    assert await store.get(SIGNAL, KEY) is None
    assert (await store.put(Write(SIGNAL, KEY, 3))).rev == 1
    assert await store.quarantined() == []
    await store.close()


async def test_mended_record_is_restored_as_a_new_revision(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    await store.put(Write(SIGNAL, KEY, {"price": 1}))
    (tmp_path / PATH).write_text((tmp_path / PATH).read_text().replace('"price": 1', '"price": 2'))
    with pytest.raises(Damaged, match="by hand"):
        await store.get(SIGNAL, KEY)
    restored = await store.restore(PATH)
    assert restored is not None
    assert (restored.value, restored.rev) == ({"price": 2}, 2)
    assert await store.get(SIGNAL, KEY) == restored
    assert await store.check() == []
    await store.close()


async def test_what_is_still_damaged_is_not_restored(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    kept = await damaged(store, tmp_path)
    with pytest.raises(Damaged):
        await store.get(SIGNAL, KEY)
    with pytest.raises(UserError, match="still damaged"):
        await store.restore(PATH)
    with pytest.raises(UserError, match="nothing in quarantine"):
        await store.restore("signal/x.json")
    kept.write_bytes(seal(SIGNAL, Record(("a", "b", "c"), 1, 1, None, 0)))
    with pytest.raises(UserError, match="another name"):
        await store.restore(PATH)
    with pytest.raises(Damaged):
        await store.get(SIGNAL, KEY)
    await store.close()


async def test_restoring_never_replaces_what_was_written_since(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    await store.put(Write(SIGNAL, KEY, "backup"))
    backup = (tmp_path / PATH).read_bytes()
    kept = await damaged(store, tmp_path)
    with pytest.raises(Damaged):
        await store.get(SIGNAL, KEY)
    (tmp_path / PATH).write_bytes(backup)
    newest = [await store.put(Write(SIGNAL, KEY, value)) for value in range(3)][-1]
    kept.write_bytes(backup)
    with pytest.raises(UserError, match="revision 4, written since"):
        await store.restore(PATH)
    assert await store.get(SIGNAL, KEY) == newest
    (tmp_path / PATH).write_bytes(b"damaged too")
    for _ in range(2):
        with pytest.raises(Damaged, match="earlier one"):
            await store.get(SIGNAL, KEY)
    with pytest.raises(UserError, match="move it away"):
        await store.restore(PATH)
    assert ((tmp_path / PATH).read_bytes(), kept.read_bytes()) == (b"damaged too", backup)
    (tmp_path / PATH).unlink()
    restored = await store.restore(PATH)
    assert restored is not None
    assert (restored.value, restored.rev) == ("backup", 2)
    await store.close()


@pytest.mark.parametrize("row", [SIGNAL, CONTRACTS["log"]], ids=["slot", "feed"])
async def test_restoring_that_was_cut_short_is_finished(file_store: FileStore, faults: FaultFS, row: Contract) -> None:
    key = KEY[: len(row.key_fields)]
    await file_store.put(Write(row, key, {"price": 1}))
    files = (file for file in Path(file_store.root.path).rglob("*.json*") if file.is_file())
    (path,) = (file for file in files if b"price" in file.read_bytes())
    path.write_bytes(path.read_bytes().replace(b"price", b"Price"))
    with pytest.raises(Damaged):
        await file_store.get(row, key)
    (item,) = await file_store.quarantined()
    faults.inject("unlink", path="quarantine")
    with pytest.raises(RetryLater):
        await file_store.restore(item.path)
    restored = await file_store.restore(item.path)
    assert restored is not None
    assert (restored.value, restored.rev) == ({"Price": 1}, 2)
    assert await file_store.get(row, key) == restored
    assert await file_store.quarantined() == []


async def test_scan_tells_of_damage_where_it_meets_it(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for name in "abc":
        await store.put(Write(STATE, (name, "x"), name))
    (tmp_path / "state/b/x.json").write_bytes(b"")
    os.utime(tmp_path / "state/b/x.json", (time.time() + 1, time.time() + 1))
    scan = store.scan(STATE)
    assert [(await anext(scan)).value for _ in "ac"] == ["a", "c"]
    with pytest.raises(Damaged, match="state/b/x"):
        await anext(scan)
    assert [record.value async for record in store.scan(STATE)] == ["a", "c"]
    with pytest.raises(Damaged):
        await store.get(STATE, ("b", "x"))
    await store.close()


async def test_sound_record_under_a_wrong_name_is_refused(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    await store.put(Write(SIGNAL, KEY, 1))
    await store.put(Write(SIGNAL, ("trend", "binance", "ETHUSDT"), 2))
    (tmp_path / "signal/trend/binance/ETHUSDT.json").replace(tmp_path / PATH)
    with pytest.raises(Damaged, match="ETHUSDT"):
        await store.get(SIGNAL, KEY)
    await store.close()


async def test_newer_record_is_left_where_it_is(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    newer = seal(SIGNAL, Record(KEY, 1, 1, None, 0, schema_version=2))
    await damaged(store, tmp_path, newer)
    for operation in (store.get(SIGNAL, KEY), store.put(Write(SIGNAL, KEY, 1))):
        with pytest.raises(NewerSchema, match="upgrade"):
            await operation
    assert (tmp_path / PATH).read_bytes() == newer
    await store.close()


async def test_directory_in_the_place_of_a_record_is_damage(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    (tmp_path / PATH).mkdir(parents=True)
    with pytest.raises(Damaged):
        await store.get(SIGNAL, KEY)
    with pytest.raises(Damaged):
        await store.get(SIGNAL, KEY)
    await store.close()


async def test_check_explains_and_changes_nothing(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    await damaged(store, tmp_path)
    await store.put(Write(CONTRACTS["log"], ("a",), 1))
    await store.put(Write(CONTRACTS["log"], ("b",), 1))
    await store.close()
    log = tmp_path / "log/00000001.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"a"', b'"z"'))
    stale = tmp_path / "signal/.tmp-1-0123456789ab-1"
    stale.write_bytes(b"")
    os.utime(stale, (0, 0))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    findings = await store.check()
    assert [finding.path for finding in findings] == [
        "log/00000001.jsonl at byte 0",
        "signal/.tmp-1-0123456789ab-1",
        PATH,
    ]
    assert "checksum" in findings[0].problem
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# -- a disk that fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["open", "read", "fstat"])
async def test_input_error_changes_nothing(file_store: FileStore, faults: FaultFS, tmp_path: Path, call: str) -> None:
    await file_store.put(Write(SIGNAL, KEY, 1))
    faults.inject(call, path=PATH) if call == "open" else faults.inject(call)
    with pytest.raises(RetryLater, match="try again"):
        await file_store.get(SIGNAL, KEY)
    found = await file_store.get(SIGNAL, KEY)
    assert found is not None
    assert not (tmp_path / "dump/quarantine").exists()


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


# -- opened to look at it ------------------------------------------------------------------------------


async def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "signal").mkdir()
    (tmp_path / "signal/.tmp-1-0123456789ab-1").write_bytes(b"")
    os.utime(tmp_path / "signal/.tmp-1-0123456789ab-1", (0, 0))
    before = sorted(tmp_path.rglob("*"))
    store = FileStore(tmp_path, existing=True)
    for looking in (store.get(SIGNAL, KEY), store.check(), FileStore(tmp_path).check()):
        with pytest.raises(UserError, match="no store"):
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
    log = tmp_path / "log/00000001.jsonl"
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
    for operation in (looking.get(STATE, ("a", "x")), looking.get(CONTRACTS["log"], ("b",))):
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
        ("singal/a.json", b"", "nothing of this store"),
        ("notes.txt", b"", "nothing of this store"),
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
    with pytest.raises(UserError, match="no store"):
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


# -- the journal ---------------------------------------------------------------------------------------


async def test_batch_whose_renames_fail_has_happened(file_store: FileStore, faults: FaultFS, tmp_path: Path) -> None:
    """The journal has it: this process reads it at once, and the next write carries it out."""
    writes = [Write(row, ("s", "e", "P")[: len(row.key_fields)], "new") for row in (SIGNAL, RISK)]
    writes.append(Write(CONTRACTS["storage"], (True, "id"), "new"))
    await file_store.open()
    faults.inject("replace", nth=2, lasting=True)
    with pytest.raises(RetryLater) as raised:
        await file_store.batch(writes)
    assert raised.value.outcome.name == "UNKNOWN"
    for write in writes:
        found = await file_store.get(write.contract, write.key)
        assert found is not None
        assert found.value == "new"
    with pytest.raises(RetryLater):
        await file_store.put(Write(SIGNAL, KEY, 1))
    faults.heal()
    await file_store.put(Write(SIGNAL, KEY, 1))
    other = FileStore(tmp_path / "dump")
    for write in writes:
        found = await other.get(write.contract, write.key)
        assert found is not None
        assert (found.value, found.rev) == ("new", 1)
    await other.close()


async def test_large_batch_needs_few_descriptors(file_store: FileStore, faults: FaultFS) -> None:
    writes = [Write(STATE, ("s", f"b{number}"), number) for number in range(1500)]
    await file_store.batch(writes)
    most = 0

    def count(call: str, path: str) -> None:
        nonlocal most
        most = max(most, len(faults.opened))

    faults.observer = count
    await file_store.batch(writes)
    assert most < 300


async def test_unfinished_batch_is_finished_by_the_next_one_to_open(tmp_path: Path) -> None:
    faults = FaultFS()
    first = FileStore(tmp_path, disk=Disk(faults))
    await first.put(Write(RISK, ("e", "r"), "old"))
    writes = [Write(SIGNAL, KEY, "new"), Write(RISK, ("e", "r"), "new"), Write(LEASE, KEY, "new")]
    writes.append(Write(CONTRACTS["log"], ("entry",), "new"))
    faults.inject("replace", nth=1, lasting=True)
    with pytest.raises(RetryLater):
        await first.batch(writes)
    await first.close()
    faults.heal()
    second = FileStore(tmp_path)
    for write in writes:
        found = await second.get(write.contract, write.key)
        assert found is not None
        assert found.value == "new"
    await second.put(Write(RISK, ("e", "r"), "newer"))
    await second.close()
    third = FileStore(tmp_path)
    found = await third.get(RISK, ("e", "r"))
    assert found is not None
    assert (found.value, found.rev) == ("newer", 3)
    assert list((tmp_path / ".backtest-kit/journal").iterdir()) == []
    await third.close()


async def test_journal_of_a_living_process_is_left_to_it(tmp_path: Path) -> None:
    faults = FaultFS()
    first = FileStore(tmp_path, disk=Disk(faults))
    await first.open()
    faults.inject("replace", lasting=True, path="signal")
    with pytest.raises(RetryLater):
        await first.batch([Write(SIGNAL, KEY, 1), Write(RISK, ("e", "r"), 1)])
    second = FileStore(tmp_path)
    assert await second.get(SIGNAL, KEY) is None
    await second.close()
    await first.close()


async def test_record_torn_by_power_loss_comes_from_the_journal(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    writes = [Write(SIGNAL, KEY, "whole"), Write(RISK, ("e", "r"), "whole")]
    await store.batch(writes)
    (journal,) = (tmp_path / ".backtest-kit/journal").iterdir()
    kept = journal.read_bytes()
    await store.close()
    journal.write_bytes(kept + b"00000000 {torn")
    (tmp_path / PATH).write_bytes(b"")
    (tmp_path / "risk/e/r.json").unlink()
    again = FileStore(tmp_path)
    for write in writes:
        found = await again.get(write.contract, write.key)
        assert found is not None
        assert (found.value, found.rev) == ("whole", 1)
    (evidence,) = await again.quarantined()
    assert (evidence.path, evidence.blocks) == (PATH, False)
    await again.close()


async def test_checkpoint_empties_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_sync, "CHECKPOINT_SECONDS", 0.2)
    store = FileStore(tmp_path)
    await store.batch([Write(SIGNAL, KEY, 1), Write(RISK, ("e", "r"), 1)])
    assert len(list((tmp_path / ".backtest-kit/journal").iterdir())) == 1
    await asyncio.sleep(0.8)
    assert list((tmp_path / ".backtest-kit/journal").iterdir()) == []
    await store.close()


async def test_child_of_a_fork_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path)
    await store.put(Write(SIGNAL, KEY, 1))
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    for operation in (store.get(SIGNAL, KEY), store.put(Write(SIGNAL, KEY, 2))):
        with pytest.raises(UserError, match="forked"):
            await operation
    monkeypatch.undo()
    found: Any = await store.get(SIGNAL, KEY)
    assert found.value == 1
    await store.close()
