"""Where the records of a file store lie, and when they are durable. What every store does is in the conformance kit."""

from __future__ import annotations

import asyncio
import json
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backtest_kit.errors import Conflict
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Write
from backtest_kit.persist.testing.faults import FaultFS

SIGNAL, STATE, MEASURE = (CONTRACTS[name] for name in ("signal", "state", "measure"))
KEY = ("trend", "binance", "BTC/USDT")
PATH = "signal/trend/binance/BTC%2FUSDT.json"


async def test_layout_is_that_of_the_table(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    await store.put(Write(SIGNAL, KEY, {"price": 1.5}))
    await store.put(Write(CONTRACTS["recent"], ("trend", "binance", "jan", "BTCUSDT", True), 1))
    await store.put(Write(CONTRACTS["storage"], (False, "id"), 1))
    await store.put(Write(CONTRACTS["log"], ("entry",), 1))
    await store.namespace("paper").put(Write(SIGNAL, KEY, 1))
    await store.close()
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    today = datetime.now(UTC).date().isoformat()
    assert {path for path in files - {"feeds.db-mark"} if not path.startswith(".backtest-kit/")} == {
        PATH,
        "recent/trend/binance/jan/BTCUSDT/backtest.json",
        "feeds.db",
        f"log/{today}.jsonl",
        f"@paper/{PATH}",
    }
    text = json.loads((tmp_path / PATH).read_text())
    assert (text["key"]["symbol"], text["value"], text["rev"]) == ("BTC/USDT", {"price": 1.5}, 1)


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


def steps_of(faults: FaultFS, name: str) -> list[str]:
    """What was done with the files and the directory of a record, in order."""
    told = {f"{name}.json.next": "successor", f"{name}.json": "record", "a": "directory"}
    return [
        f"{call} {told[Path(path).name]}"
        for call, path in faults.history
        if call in ("fsync", "replace") and Path(path).name in told
    ]


async def test_record_write_is_synced_within_50_ms_before_it_gets_its_name(
    file_store: FileStore, faults: FaultFS
) -> None:
    await file_store.put(Write(STATE, ("a", "b"), 1))
    renamed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def observe(call: str, path: str) -> None:
        if call == "close" and path.endswith("/a"):
            loop.call_soon_threadsafe(renamed.set)

    faults.observer = observe
    if steps_of(faults, "b") == []:
        await renamed.wait()
    faults.observer = lambda call, path: None
    await file_store.close()
    assert steps_of(faults, "b") == ["fsync successor", "replace successor", "fsync directory"]


async def test_cache_write_is_never_synced(file_store: FileStore, faults: FaultFS) -> None:
    await file_store.open()
    faults.history.clear()
    await file_store.put(Write(MEASURE, ("a", "b"), 1))
    await file_store.close()
    assert "fsync" not in {call for call, _ in faults.history}


async def test_closing_syncs_records(file_store: FileStore, faults: FaultFS) -> None:
    await file_store.put(Write(STATE, ("a", "b"), 1))
    await file_store.close()
    assert steps_of(faults, "b") == ["fsync successor", "replace successor", "fsync directory"]


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


async def test_an_inline_store_has_no_threads(tmp_path: Path) -> None:
    """For a simulation that decides itself what happens after what."""
    threads = threading.active_count()
    store = FileStore(tmp_path, inline=True)
    for number in range(3):
        await store.batch([Write(SIGNAL, KEY, number), Write(CONTRACTS["storage"], (False, "id"), number)])
        await store.put(Write(STATE, ("a", "b"), number))
        await store.put(Write(CONTRACTS["log"], (f"{number}",), number))
    results = await store.put_each([Write(SIGNAL, KEY, 3, expect=3), Write(SIGNAL, KEY, 4, expect=3)])
    assert isinstance(results[1], Conflict)
    assert [record.value async for record in store.scan(CONTRACTS["log"])] == [0, 1, 2]
    assert (tmp_path / "state/a/b.json").exists(), "it was synced and has its name when the write returns"
    assert threading.active_count() == threads
    await store.close()
    again = FileStore(tmp_path)
    for row, key, value in ((SIGNAL, KEY, 3), (STATE, ("a", "b"), 2), (CONTRACTS["storage"], (False, "id"), 2)):
        found = await again.get(row, key)
        assert found is not None
        assert found.value == value
    await again.close()
