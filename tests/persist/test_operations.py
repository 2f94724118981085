"""What an operator does: listing, measuring, checking, quarantine, export and import."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backtest_kit.errors import Damaged, RetryLater, UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.backends.dummy import DummyStore
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.contracts import CONTRACTS, Contract, record_contracts
from backtest_kit.persist.operations import (
    du,
    key_from_text,
    spaces,
    text_of,
)
from backtest_kit.persist.store import Key, Plain, Record, SeriesKey, Store, Write
from backtest_kit.persist.transfer import Counts, export_store, import_store
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


async def content(store: Store) -> dict[str, Any]:
    """Everything in a store that moves with it."""
    found: dict[str, Any] = {}
    for path, space in await spaces(store):
        for row in record_contracts():
            records = [record async for record in space.scan(row, include_removed=True)]
            found["/".join((*path, row.name))] = [(r.key, r.value, r.when, r.removed) for r in records]
        for series in (BTC, SeriesKey("okx", "BTC/USDT", "1d")):
            found["/".join((*path, str(series)))] = await space.candles.read(series, *ALWAYS)
    return {name: items for name, items in found.items() if len(items)}


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
    (month,) = tmp_path.rglob("2022-01.arrow")
    data = bytearray(month.read_bytes())
    data[len(data) // 2] ^= 1
    month.write_bytes(data)
    assert await store.check() == []
    (finding,) = await store.check(deep=True)
    assert finding.path.endswith("2022-01.arrow")
    with pytest.raises(Damaged, match="quarantine"):
        await store.candles.read(BTC, *ALWAYS)
    (item,) = await store.quarantined()
    with pytest.raises(UserError, match="still damaged"):
        await store.restore(item.path)
    (copy,) = tmp_path.rglob("quarantine/**/2022-01.arrow")
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


@pytest.mark.parametrize("target", URLS)
@pytest.mark.parametrize("store", URLS, indirect=True)
async def test_everything_moves_between_any_two_stores(store: Store, target: str, tmp_path: Path) -> None:
    await fill(store)
    file = tmp_path / "all.jsonl"
    counts = await export_store(store, file)
    assert counts == Counts(records=3 * 15 + 4, candles=444)
    other = make(target, tmp_path / "other")
    assert await import_store(other, file) == counts
    assert await content(other) == await content(store)
    again = await import_store(other, file)
    assert again == Counts(records=0, candles=0, present=counts.records)
    await export_store(other, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()
    await other.close()


@pytest.fixture
async def exported(tmp_path: Path) -> Path:
    source = MemoryStore()
    for number in range(5):
        await source.put(Write(MEMORY, ("s", "b", str(number)), {"n": number}))
    await source.candles.write(BTC, candles(10))
    await export_store(source, tmp_path / "all.jsonl")
    return tmp_path / "all.jsonl"


def edit(file: Path, change: Callable[[list[str]], object]) -> None:
    lines = file.read_text().splitlines(keepends=True)
    change(lines)
    file.write_text("".join(lines))


def swap(number: int, old: str, new: str) -> Callable[[list[str]], None]:
    def change(lines: list[str]) -> None:
        lines[number - 1] = lines[number - 1].replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap(4, '"n":1', '"n":7'), "line 4: its digest does not match"),
        (swap(2, "100.0", "100.1"), "line 2: its digest"),
        (lambda lines: lines.pop(), "no foot says so: it was cut"),
        (lambda lines: lines.pop(3), "ends after 4 records"),
        (lambda lines: lines.clear(), "ends after 0 records"),
        (lambda lines: lines.__setitem__(0, "{}\n"), "line 1: it has no digest"),
        (lambda lines: lines.__setitem__(2, "not json\n"), "line 3: it is not JSON"),
        (lambda lines: [swap(n, '"n":', '"m":')(lines) for n in (3, 5)], r"line 3: .*; line 5: "),
    ],
    ids=["value", "candle", "no foot", "lost line", "empty", "no head", "no json", "two lines"],
)
async def test_damaged_export_is_named_by_line_and_not_imported(
    exported: Path, change: Callable[[list[str]], object], message: str
) -> None:
    edit(exported, change)
    target = MemoryStore()
    with pytest.raises(UserError, match=message):
        await import_store(target, exported)
    with pytest.raises(UserError, match="nothing was written"):
        await import_store(target, exported)
    assert await content(target) == {}


async def test_import_never_replaces_what_is_there(exported: Path) -> None:
    target = MemoryStore()
    await target.put(Write(MEMORY, ("s", "b", "3"), "mine"))
    await target.candles.write(BTC, candles(4, price=1.0))
    with pytest.raises(
        UserError, match=r"line 2: candle/binance.* is there with another content; line 6: memory/s/b/3 "
    ):
        await import_store(target, exported)
    assert (await target.get(MEMORY, ("s", "b", "0"))) is None


class Breaking(MemoryStore):
    """A store whose disk goes away after some writes."""

    left = 3

    async def put(self, write: Write) -> Record:
        self.left -= 1
        if self.left < 0:
            raise RetryLater("the disk is away")
        return await super().put(write)

    async def batch(self, writes: object) -> None:
        raise RetryLater("the disk is away")


async def test_interrupted_import_says_how_far_it_came_and_goes_on(exported: Path) -> None:
    target = Breaking()
    with pytest.raises(RetryLater, match=r"disk is away; 0 records and 10 candles.*import it again"):
        await import_store(target, exported)
    whole = MemoryStore()
    await whole.put(Write(MEMORY, ("s", "b", "0"), {"n": 0}))
    assert await import_store(whole, exported) == Counts(records=4, candles=10, present=1)


async def test_export_never_overwrites_and_leaves_nothing_half(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        await export_store(MemoryStore(), exported)
    with pytest.raises(UserError, match="cannot be written"):
        await export_store(MemoryStore(), tmp_path / "nowhere" / "all.jsonl")
    store = SqliteStore(tmp_path / "bot.db")
    await store.put(Write(SIGNAL, KEY, {"price": 47000.5}))
    await store.close()
    damage_row(tmp_path)
    with pytest.raises(Damaged):
        await export_store(store, tmp_path / "half.jsonl")
    await store.close()
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["all.jsonl"]


async def test_newer_format_is_refused(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backtest_kit.persist import transfer

    monkeypatch.setattr(transfer, "VERSION", 2)
    await export_store(MemoryStore(), tmp_path / "newer.jsonl")
    monkeypatch.undo()
    with pytest.raises(UserError, match="newer version"):
        await import_store(MemoryStore(), tmp_path / "newer.jsonl")


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
