"""What an operator does: listing, measuring, checking, quarantine."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from backtest_kit.errors import Damaged, UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.backends.dummy import DummyStore
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.contracts import CONTRACTS, Contract, record_contracts
from backtest_kit.persist.operations import (
    du,
    key_from_text,
    text_of,
)
from backtest_kit.persist.store import Key, Plain, SeriesKey, Store, Write
from backtest_kit.persist.urls import store_at

SIGNAL, MEMORY, STORAGE, LOG = (CONTRACTS[name] for name in ("signal", "memory", "storage", "log"))
KEY = ("trend", "binance", "BTC/USDT")
BTC = SeriesKey("binance", "BTCUSDT", "1d")
DAY = 86_400_000
ALWAYS = (0, 2**53)

URLS = ["file:{}/dump", "sqlite:{}/bot.db", "memory:"]
DISK_URLS = URLS[:2]


def make(url: str, place: Path) -> Store:
    return store_at(url.format(place))


@pytest.fixture
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    store = make(request.param, tmp_path)
    await store.open()
    yield store
    await store.close()


def candles(days: int, price: float = 100.0) -> CandleSeries:
    times = 1_640_995_200_000 + np.arange(days) * DAY
    return CandleSeries(times, *([price + np.arange(float(days)) / 7] * 5))


async def fill(store: Store) -> None:
    """Something in every contract and in three namespaces."""
    for row in record_contracts():
        if row.name in CONTRACTS:
            for number in range(3):
                parts = [True if field == "backtest" else f"{field}{number}/{number}" for field in row.key_fields]
                value: Plain = {"number": number, "float": number / 3, "text": "\u00e9\U0001f680"}
                await store.put(Write(row, tuple(parts), value, when=number))
    await store.put(Write(MEMORY, ("memory", "b", "gone"), "gone", removed=True))
    await store.put(Write(SIGNAL, KEY, None))
    await store.namespace("paper").put(Write(SIGNAL, KEY, "paper"))
    await store.namespace("backtest-1").namespace("deeper").put(Write(SIGNAL, KEY, "deeper"))
    await store.candles.write(BTC, candles(400))
    await store.candles.write(SeriesKey("okx", "BTC/USDT", "1d"), candles(40))
    await store.namespace("paper").candles.write(BTC, candles(4))


class TestKeys:
    @pytest.mark.parametrize(
        ("row", "key", "text"),
        [
            (SIGNAL, ("trend", "binance", "BTCUSDT"), "trend/binance/BTCUSDT"),
            (SIGNAL, KEY, "trend/binance/BTC%2FUSDT"),
            (STORAGE, (True, "s-1"), "backtest/s-1"),
            (STORAGE, (False, "s-1"), "live/s-1"),
            (LOG, ("",), "%"),
        ],
    )
    def test_key_is_written_as_its_file_is_called(self, row: Contract, key: Key, text: str) -> None:
        assert text_of(row, key) == text
        assert key_from_text(row, text) == key

    def test_key_may_be_written_as_it_is(self) -> None:
        assert key_from_text(SIGNAL, "Trend/Binance/btcusdt") == ("Trend", "Binance", "btcusdt")
        assert key_from_text(SIGNAL, "trend", prefix=True) == ("trend",)
        assert key_from_text(SIGNAL, "", prefix=True) == ()

    @pytest.mark.parametrize("text", ["", "trend", "trend/binance", "trend/binance/BTC/USDT"])
    def test_other_shapes_are_refused(self, text: str) -> None:
        with pytest.raises(UserError, match="strategyName"):
            key_from_text(SIGNAL, text)


@pytest.mark.parametrize("store", URLS, indirect=True)
class TestReading:
    async def test_ls_and_get(self, store: Store) -> None:
        await fill(store)
        listed = [record.key async for record in store.scan(SIGNAL, limit=2, newest_first=True)]
        assert listed == [KEY, ("strategyName2/2", "exchangeName2/2", "symbol2/2")]
        assert [record async for record in store.scan(MEMORY, ("memory",))] == []
        assert [record.removed async for record in store.scan(MEMORY, ("memory",), include_removed=True)] == [True]
        found = await store.get(SIGNAL, KEY)
        assert found is not None
        assert (found.value, found.rev) == (None, 1)

    async def test_du_counts_what_is_there(self, store: Store) -> None:
        await fill(store)
        usage = {(item.namespace, item.contract): item for item in await du(store)}
        assert usage[(), "signal"].records == 4
        assert (usage[(), "memory"].records, usage[(), "memory"].removed) == (4, 1)
        assert usage[("paper",), "signal"].size == len('"paper"')
        assert usage[("backtest-1", "deeper"), "signal"].records == 1
        assert (usage[(), "candle"].records, usage[(), "candle"].size) == (440, 440 * 48)
        assert usage[("paper",), "candle"].records == 4
        assert ((), "lease") not in usage

    async def test_sound_store_has_no_findings(self, store: Store) -> None:
        await fill(store)
        assert await store.check() == []
        assert await store.check(deep=True) == []


def damage_file(place: Path) -> None:
    path = place / "dump" / "signal" / "trend" / "binance" / "BTC%2FUSDT.json"
    path.write_bytes(path.read_bytes().replace(b"47000.5", b"48000.5"))


def damage_row(place: Path) -> None:
    with closing(sqlite3.connect(place / "bot.db")) as connection, connection:
        connection.execute(
            "UPDATE records SET record = CAST(replace(CAST(record AS TEXT), '47000.5', '48000.5') AS BLOB) "
            "WHERE contract = 'signal'"
        )


def snapshot(place: Path) -> dict[Path, bytes]:
    # The log of SQLite is shared memory of its readers, and the clock file of the file store one of its writers.
    files = (path for path in place.rglob("*") if path.is_file() and not path.name.endswith(("-shm", ".lock", "clock")))
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("store", "damage"), list(zip(DISK_URLS, [damage_file, damage_row], strict=True)), indirect=["store"]
)
class TestDamage:
    NAME = "signal/trend/binance/BTC%2FUSDT"

    async def damaged(self, store: Store, damage: Callable[[Path], None], place: Path) -> str:
        await store.put(Write(SIGNAL, KEY, {"price": 47000.5}, when=3))
        await store.put(Write(SIGNAL, ("other", "binance", "BTCUSDT"), "sound"))
        await store.close()
        damage(place)
        with pytest.raises(Damaged, match="quarantine restore"):
            await store.get(SIGNAL, KEY)
        (item,) = await store.quarantined()
        assert item.path.startswith(self.NAME)
        assert "checksum" in item.reason
        return item.path

    async def test_check_finds_it_and_changes_nothing(
        self, store: Store, damage: Callable[[Path], None], tmp_path: Path
    ) -> None:
        await store.put(Write(SIGNAL, KEY, {"price": 47000.5}))
        await store.close()
        damage(tmp_path)
        before = snapshot(tmp_path)
        for deep in (False, True):
            (finding,) = await store.check(deep=deep)
            assert finding.path.startswith(self.NAME)
            assert "by hand" in finding.problem
        await store.close()
        assert snapshot(tmp_path) == before

    async def test_check_tells_of_the_quarantine(
        self, store: Store, damage: Callable[[Path], None], tmp_path: Path
    ) -> None:
        await self.damaged(store, damage, tmp_path)
        (finding,) = await store.check()
        assert "in quarantine" in finding.problem
        assert self.NAME in finding.path

    async def test_restoring_accepts_it_as_a_new_revision(
        self, store: Store, damage: Callable[[Path], None], tmp_path: Path
    ) -> None:
        path = await self.damaged(store, damage, tmp_path)
        restored = await store.restore(path)
        found = await store.get(SIGNAL, KEY)
        assert found == restored
        assert found is not None
        assert (found.value, found.rev, found.when) == ({"price": 48000.5}, 2, 3)
        assert await store.quarantined() == []
        assert await store.check(deep=True) == []
        assert (await store.put(Write(SIGNAL, KEY, "next"))).rev == 3

    async def test_dropping_frees_the_key(self, store: Store, damage: Callable[[Path], None], tmp_path: Path) -> None:
        path = await self.damaged(store, damage, tmp_path)
        assert (await store.drop(path)).path == path
        assert await store.get(SIGNAL, KEY) is None
        assert await store.quarantined() == []
        assert await store.check() == []
        assert (await store.put(Write(SIGNAL, KEY, "anew"))).rev == 1

    async def test_unknown_name_is_refused(self, store: Store, damage: Callable[[Path], None], tmp_path: Path) -> None:
        await self.damaged(store, damage, tmp_path)
        for operation in (store.restore, store.drop):
            with pytest.raises(UserError, match="quarantine list"):
                await operation("signal/nobody")

    async def test_other_namespaces_are_seen(
        self, store: Store, damage: Callable[[Path], None], tmp_path: Path
    ) -> None:
        path = await self.damaged(store, damage, tmp_path)
        assert [item.path for item in await store.namespace("paper").quarantined()] == [path]


@pytest.mark.parametrize("store", DISK_URLS, indirect=True)
async def test_damaged_candles_are_found_and_given_up(store: Store, tmp_path: Path) -> None:
    await store.candles.write(BTC, candles(40))
    await store.close()
    (month,) = tmp_path.rglob("2022-01.candles")
    data = bytearray(month.read_bytes())
    data[len(data) // 2] ^= 1
    month.write_bytes(data)
    assert await store.check() == []
    (finding,) = await store.check(deep=True)
    assert finding.path.endswith("2022-01.candles")
    with pytest.raises(Damaged, match="quarantine"):
        await store.candles.read(BTC, *ALWAYS)
    (item,) = await store.quarantined()
    with pytest.raises(UserError, match="still damaged"):
        await store.restore(item.path)
    (copy,) = tmp_path.rglob("quarantine/**/2022-01.candles")
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    assert await store.restore(item.path) is None
    assert await store.candles.read(BTC, *ALWAYS) == candles(40)
    assert await store.quarantined() == []

    data[len(data) // 2] ^= 1
    month.write_bytes(data)
    await store.close()
    store = make("file:{}/dump" if "dump" in str(month) else "sqlite:{}/bot.db", tmp_path)
    with pytest.raises(Damaged, match="quarantine"):
        await store.candles.read(BTC, *ALWAYS)
    await store.drop(item.path)
    assert len(await store.candles.read(BTC, *ALWAYS)) == 40 - 31
    assert await store.check(deep=True) == []
    await store.close()


async def test_damaged_database_page_is_found_when_looking_deep(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "bot.db")
    for number in range(300):
        await store.put(Write(MEMORY, ("s", "b", str(number)), "x" * 300))
    await store.close()
    with store.path.open("r+b") as file:
        file.seek(4096 * 12 + 5)
        file.write(b"\xff\xff")
    try:
        assert await store.check(deep=True)
    except Damaged as error:
        assert "not a sound SQLite database" in str(error)  # noqa: PT017
    await store.close()


async def test_stores_without_a_quarantine_say_so() -> None:
    for operation in (MemoryStore().quarantined(), MemoryStore().drop("signal/a/b/C")):
        with pytest.raises(UserError, match="MemoryStore does not support quarantine"):
            await operation
    assert await DummyStore().check() == []


async def test_database_is_looked_at_without_being_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SqliteStore(tmp_path / "bot.db")
    await store.put(Write(SIGNAL, KEY, "kept"))
    await store.close()
    before = store.path.read_bytes()
    for writable in (True, False):
        monkeypatch.setattr(os, "access", lambda *_, answer=writable: answer)
        looking = SqliteStore(tmp_path / "bot.db", existing=True)
        found = await looking.get(SIGNAL, KEY)
        assert found is not None
        assert found.value == "kept"
        assert await looking.check(deep=True) == []
        await looking.close()
        assert store.path.read_bytes() == before
        Path(f"{store.path}-wal").unlink(missing_ok=True)  # empty: SQLite needs one to read where it can write
    (tmp_path / "bot.db").write_bytes(b"")
    (finding,) = await SqliteStore(tmp_path / "bot.db", existing=True).check()
    assert "has lost commit 1" in finding.problem
    (tmp_path / "bot.db-mark").unlink()
    with pytest.raises(UserError, match="not a store"):
        await SqliteStore(tmp_path / "bot.db", existing=True).check()
    assert (tmp_path / "bot.db").read_bytes() == b""
