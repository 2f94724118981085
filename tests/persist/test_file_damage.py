"""Damage in a file store: found, kept untouched, and decided on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from backtest_kit.errors import Damaged, RetryLater, UserError
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.codec import NewerSchema, seal
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.store import Record, Write
from backtest_kit.persist.testing.faults import FaultFS

SIGNAL, STATE = (CONTRACTS[name] for name in ("signal", "state"))
KEY = ("trend", "binance", "BTC/USDT")
PATH = "signal/trend/binance/BTC%2FUSDT.json"


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
    await store.close()
    (tmp_path / "state/b/x.json").write_bytes(b"rotten")
    os.utime(tmp_path / "state/b/x.json", (time.time() + 1, time.time() + 1))
    scan = store.scan(STATE)
    assert [(await anext(scan)).value for _ in "ac"] == ["a", "c"]
    with pytest.raises(Damaged, match="state/b/x"):
        await anext(scan)
    with pytest.raises(Damaged):
        await store.get(STATE, ("b", "x"))
    await store.close()


async def test_every_scan_tells_of_what_is_in_quarantine(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for space in (store, store.namespace("paper")):
        for name in "abc":
            await space.put(Write(STATE, (name, "x"), name))
    await store.close()
    place = tmp_path / "@paper/state/b/x.json"
    written = place.stat().st_mtime_ns
    place.write_bytes(b"rotten")
    os.utime(place, ns=(written, written))
    for again in (store, FileStore(tmp_path), FileStore(tmp_path, existing=True)):
        for newest_first, before in ((False, "a"), (True, "c")):
            scan = again.namespace("paper").scan(STATE, newest_first=newest_first)
            assert (await anext(scan)).value == before  # at its place in the order
            with pytest.raises(Damaged, match="quarantine"):
                await anext(scan)
        with pytest.raises(Damaged):
            [record async for record in again.namespace("paper").scan(STATE, ("b",))]
        assert [record.value async for record in again.namespace("paper").scan(STATE, ("a",))] == ["a"]
        assert [record.value async for record in again.scan(STATE)] == ["a", "b", "c"]
    await store.drop("@paper/state/b/x.json")
    assert [record.value async for record in store.namespace("paper").scan(STATE)] == ["a", "c"]
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
    (log,) = (tmp_path / "log").glob("*.jsonl")
    log.write_bytes(log.read_bytes().replace(b'"a"', b'"z"'))
    stale = tmp_path / "signal/.tmp-1-0123456789ab-1"
    stale.write_bytes(b"")
    os.utime(stale, (0, 0))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    findings = await store.check()
    assert [finding.path for finding in findings] == [
        f"log/{log.name} at byte 0",
        "signal/.tmp-1-0123456789ab-1",
        PATH,
    ]
    assert "checksum" in findings[0].problem
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("call", ["open", "read", "fstat"])
async def test_input_error_changes_nothing(file_store: FileStore, faults: FaultFS, tmp_path: Path, call: str) -> None:
    await file_store.put(Write(SIGNAL, KEY, 1))
    faults.inject(call, path=PATH) if call == "open" else faults.inject(call)
    with pytest.raises(RetryLater, match="try again"):
        await file_store.get(SIGNAL, KEY)
    found = await file_store.get(SIGNAL, KEY)
    assert found is not None
    assert not (tmp_path / "dump/quarantine").exists()
