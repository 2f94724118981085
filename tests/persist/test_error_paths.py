"""What stores do when something that they rely on fails or lies; `test_file_faults` has the failing disk of a write."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backtest_kit.errors import Damaged, RetryLater, UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.backends.file_candles import FileCandleStore
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import Disk, require_directory
from backtest_kit.persist.locks import LockSet
from backtest_kit.persist.operations import du
from backtest_kit.persist.store import Record, SeriesKey, Write
from backtest_kit.persist.testing.faults import FaultFS

SIGNAL, LOG = CONTRACTS["signal"], CONTRACTS["log"]
KEY = ("trend", "binance", "BTCUSDT")
BTC = SeriesKey("binance", "BTCUSDT", "1m")
LONG = SeriesKey("binance", "x" * 300, "1m")


def candles(count: int) -> CandleSeries:
    return CandleSeries(1_640_995_200_000 + np.arange(count) * 60_000, *([np.ones(count)] * 5))


class TestLocks:
    def test_a_lock_that_another_process_keeps_is_given_up_on_with_its_name(self, tmp_path: Path) -> None:
        ours, theirs = (LockSet(str(tmp_path / "locks"), Disk(), count=1) for _ in range(2))
        with theirs.hold(["a"]), pytest.raises(RetryLater, match=r"00\.lock for 0\.02 s"), ours.hold(["b"], 0.02):
            pytest.fail("both have it")
        with ours.hold(["b"], 0.02):
            pass
        ours.close()
        theirs.close()

    def test_a_thread_waits_for_a_thread_as_long(self, tmp_path: Path) -> None:
        locks = LockSet(str(tmp_path), Disk(), count=1)
        with locks.hold(["a"]), pytest.raises(RetryLater, match=r"0\.02 s"), locks.hold(["b"], 0.02):
            pytest.fail("both have it")
        with locks.hold(["a"]):
            locks.close()
            with LockSet(str(tmp_path), Disk(), count=1).hold([]):  # no names, no waiting
                pass
        locks.close()

    def test_a_forked_child_does_not_share_its_parents_lock(self, tmp_path: Path) -> None:
        locks = LockSet(str(tmp_path), Disk(), count=1)
        with locks.hold(["a"]):
            child = os.fork()
            if not child:
                try:
                    with locks.hold(["a"], 0.05):
                        os._exit(1)
                except RetryLater:
                    os._exit(0)
                finally:
                    os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        locks.close()


def test_a_root_that_cannot_be_looked_at_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be used: File name too long"):
        require_directory(str(tmp_path / ("x" * 300)))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file, name a directory"):
        require_directory(str(tmp_path / "file" / "dump"))


@pytest.mark.parametrize("contract", [SIGNAL, LOG], ids=["slot", "feed"])
@pytest.mark.parametrize("call", ["scandir", "open", "read"])
async def test_a_scan_that_the_disk_refuses_raises_and_changes_nothing(
    tmp_path: Path, call: str, contract: Any
) -> None:
    root = tmp_path / "dump"
    key = KEY if contract is SIGNAL else ("one",)
    first = FileStore(root)
    await first.put(Write(contract, key, "kept"))
    await first.close()
    faults = FaultFS(sync=False)
    store = FileStore(root, disk=Disk(faults))
    await store.open()
    fault = faults.inject(call, errno.EIO, lasting=True, path=f"/{contract.name}")
    with pytest.raises(RetryLater):
        _ = [record async for record in store.scan(contract)]
    assert fault.hits
    faults.heal()
    assert [record.value async for record in store.scan(contract)] == ["kept"]
    assert await store.quarantined() == []
    await store.close()
    assert faults.opened == {}


class TestCandles:
    @pytest.mark.parametrize("call", ["open", "read", "stat", "fstat", "scandir"])
    async def test_a_read_that_the_disk_refuses_is_no_empty_answer(self, tmp_path: Path, call: str) -> None:
        await FileCandleStore(tmp_path).write(BTC, candles(10))
        faults = FaultFS(sync=False)
        store = FileCandleStore(tmp_path, disk=Disk(faults))
        fault = faults.inject(call, errno.EIO, lasting=True, path="candle/binance")
        try:
            found = await store.read(BTC, 0, 2**53)
        except RetryLater:
            assert fault.hits
        else:
            assert found == candles(10)
        faults.heal()
        assert await store.read(BTC, 0, 2**53) == candles(10)

    async def test_a_write_that_fails_leaves_what_was_there(self, tmp_path: Path) -> None:
        await FileCandleStore(tmp_path).write(BTC, candles(10))
        faults = FaultFS(sync=False)
        store = FileCandleStore(tmp_path, disk=Disk(faults))
        faults.inject("replace", errno.EIO, path="binance")
        with pytest.raises(RetryLater):
            await store.write(BTC, candles(20))
        assert await store.read(BTC, 0, 2**53) == candles(10)
        assert await store.write(BTC, candles(20)) == 10

    async def test_a_series_whose_name_was_cut_is_told_by_its_files(self, tmp_path: Path) -> None:
        store = FileCandleStore(tmp_path)
        await store.write(LONG, candles(3))
        await store.write(BTC, candles(3))
        assert await store.series() == [BTC, LONG]
        (month,) = [path for path in tmp_path.rglob("*.candles") if "BTCUSDT" not in str(path)]
        month.rename(month.with_suffix(".other"))
        with pytest.raises(Damaged, match="whose name is in none of its files: remove the directory"):
            await store.series()
        shutil.rmtree(month.parent)

    async def test_usage_names_what_is_damaged(self, tmp_path: Path) -> None:
        store = FileStore(tmp_path / "dump")
        await store.candles.write(BTC, candles(3))
        await store.put(Write(SIGNAL, KEY, "x"))
        await store.close()
        for path in (*tmp_path.rglob("*.candles"), *tmp_path.rglob("BTCUSDT.json")):
            path.write_bytes(b"{}")
        faults = {usage.contract: usage.fault for usage in await du(store) if usage.fault}
        assert faults.keys() == {"candle", "signal"}
        assert all("quarantine" in str(fault) for fault in faults.values())
        await store.close()


class Unreadable(MemoryStore):
    """A store of the user's own, without upkeep, that finds one contract damaged."""

    def scan(self, contract: Any, *args: Any, **named: Any) -> Any:
        if contract is SIGNAL:
            raise Damaged("these bytes are none of ours")
        return super().scan(contract, *args, **named)


async def test_a_store_without_upkeep_is_checked_by_reading_it() -> None:
    (finding,) = await Unreadable().check()
    assert (finding.path, finding.problem) == ("signal", "these bytes are none of ours")


class TestSqlite:
    async def test_a_write_that_the_database_refuses_reaches_the_caller(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path / "bot.db")
        await store.put(Write(SIGNAL, KEY, "kept"))
        before: Record | None = await store.get(SIGNAL, KEY)
        await store.close()
        connection = sqlite3.connect(tmp_path / "bot.db")
        connection.execute("CREATE TRIGGER full BEFORE INSERT ON records BEGIN SELECT RAISE(ABORT, 'no'); END")
        connection.commit()
        with pytest.raises(Damaged, match=r"bot\.db is not a sound SQLite database \(no\)"):
            await store.put(Write(SIGNAL, ("trend", "binance", "ETHUSDT"), "new"))
        connection.execute("DROP TRIGGER full")
        connection.commit()
        connection.close()
        assert await store.get(SIGNAL, KEY) == before
        await store.put(Write(SIGNAL, ("trend", "binance", "ETHUSDT"), "new"))
        await store.close()

    async def test_a_record_under_the_name_of_another_is_damage(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path / "bot.db")
        await store.put(Write(SIGNAL, KEY, "mine"))
        await store.close()
        connection = sqlite3.connect(tmp_path / "bot.db")
        connection.execute("UPDATE records SET key = 'trend/binance/ETHUSDT'")
        connection.commit()
        connection.close()
        findings = await store.check()
        assert findings
        with pytest.raises(Damaged):
            _ = [record async for record in store.scan(SIGNAL)]
        await store.close()
