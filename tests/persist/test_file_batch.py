"""Batches of a file store, and what its journal finishes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from backtest_kit.errors import RetryLater
from backtest_kit.persist.backends import file_sync
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS, LEASE
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import Write
from backtest_kit.persist.testing.faults import FaultFS

SIGNAL, STATE, RISK = (CONTRACTS[name] for name in ("signal", "state", "risk"))
KEY = ("trend", "binance", "BTC/USDT")
PATH = "signal/trend/binance/BTC%2FUSDT.json"


async def test_batch_whose_renames_fail_has_happened(file_store: FileStore, faults: FaultFS, tmp_path: Path) -> None:
    """The journal has it: the next call opens the root again, which carries it out as soon as the disk lets it."""
    writes = [Write(row, ("s", "e", "P")[: len(row.key_fields)], "new") for row in (SIGNAL, RISK)]
    writes.append(Write(CONTRACTS["storage"], (True, "id"), "new"))
    await file_store.open()
    faults.inject("replace", nth=2, lasting=True)
    with pytest.raises(RetryLater) as raised:
        await file_store.batch(writes)
    assert raised.value.outcome.name == "UNKNOWN"
    for write in writes:  # until then nothing is answered: what is in the files is not what has happened
        with pytest.raises(RetryLater):
            await file_store.get(write.contract, write.key)
    with pytest.raises(RetryLater):
        await file_store.put(Write(SIGNAL, KEY, 1))
    faults.heal()
    for write in writes:
        found = await file_store.get(write.contract, write.key)
        assert found is not None
        assert (found.value, found.rev) == ("new", 1)
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
    first = FileStore(tmp_path)
    await first.batch([Write(SIGNAL, KEY, 1), Write(RISK, ("e", "r"), 1)])
    (tmp_path / PATH).unlink()  # carried out again, the entry would bring it back
    second = FileStore(tmp_path)
    assert await second.get(SIGNAL, KEY) is None
    await second.close()
    await first.close()


async def test_a_batch_that_failed_half_way_is_finished_by_another_process(tmp_path: Path) -> None:
    faults = FaultFS()
    first, second = FileStore(tmp_path, disk=Disk(faults)), FileStore(tmp_path)
    writes = [Write(SIGNAL, KEY, 1), Write(RISK, ("e", "r"), 1), Write(CONTRACTS["log"], ("entry",), 1)]
    await first.open()
    faults.inject("replace", nth=2, lasting=True)
    with pytest.raises(RetryLater):
        await first.batch(writes)
    for write in writes:
        found = await second.get(write.contract, write.key)
        assert found is not None
        assert found.rev == 1
    faults.heal()
    assert (await first.put(Write(SIGNAL, KEY, 2))).rev == 2
    assert [record.key async for record in first.scan(CONTRACTS["log"])] == [("entry",)]
    await first.close()
    await second.close()


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
