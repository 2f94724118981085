"""A store is moved into another one: all of it, in its order, from any kind to any, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tests.commands import run_program
from tests.samples import sample, size

from backtest_kit.errors import Conflict, Damaged, OutOfSpace, UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist import migration
from backtest_kit.persist.backends.dummy import DummyStore
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.comparison import compare_stores
from backtest_kit.persist.contracts import CONTRACTS, LEASE, MIGRATION, MIGRATION_KEY, Contract, Kind
from backtest_kit.persist.files import Disk
from backtest_kit.persist.holder import Holder
from backtest_kit.persist.lease import acquire
from backtest_kit.persist.migration import Moved, Progress, migrate_store
from backtest_kit.persist.store import CandleStore, Capability, Key, Plain, Record, Selection, SeriesKey, Store, Write
from backtest_kit.persist.testing.faults import FaultFS
from backtest_kit.persist.urls import store_at

SIGNAL, MEMORY, STORAGE, LOG = (CONTRACTS[name] for name in ("signal", "memory", "storage", "log"))
RECORDS = tuple(row for row in CONTRACTS.values() if row.kind is not Kind.SERIES)
KEY = ("trend", "binance", "BTC/USDT")
BTC = SeriesKey("binance", "BTCUSDT", "1m")
MINUTE = 60_000
START = 1_672_531_200_000 - 100 * MINUTE
MINUTES = 300
"""Of candles, across the end of a year."""
URLS = ["file:{}/dump", "sqlite:{}/bot.db", "memory:"]


def make(url: str, place: Path, *, existing: bool = False) -> Store:
    return store_at(url.format(place), existing=existing)


def candles(count: int, start: int = 1_640_995_200_000, price: float = 100.0) -> CandleSeries:
    return CandleSeries(start + np.arange(count) * MINUTE, *([price + np.arange(float(count)) / 7] * 5))


def key_of(row: Contract, number: int) -> Key:
    return tuple(number % 2 == 0 if field == "backtest" else f"{field}{number}/Ä" for field in row.key_fields)


async def fill(store: Store, each: int = 3) -> None:
    """Something in every contract, removed and rewritten records, candles across a year's end, five namespaces."""
    for row in RECORDS:
        for number in range(each):
            value: Plain = {"number": number, "float": number / 3, "text": "é\U0001f680"}
            await store.put(Write(row, key_of(row, number), value, when=number or None))
    await store.put(Write(MEMORY, key_of(MEMORY, 0), "rewritten, so it is the last", when=9))
    await store.put(Write(MEMORY, key_of(MEMORY, 1), {"gone": 1}, removed=True))
    await store.put(Write(SIGNAL, KEY, None))
    await store.namespace("paper").put(Write(SIGNAL, KEY, "paper"))
    await store.namespace("backtest-1").namespace("Deeper/é").put(Write(SIGNAL, KEY, "deeper"))
    await store.candles.write(BTC, candles(MINUTES, start=START))
    await store.candles.write(SeriesKey("okx", "BTC/USDT", "1d"), candles(40))
    await store.namespace("candles only").candles.write(BTC, candles(4, start=-5 * MINUTE))


async def everything(store: Store, *path: str) -> dict[str, Any]:
    """What must arrive, read without the code that moves it."""
    found: dict[str, Any] = {}
    for row in RECORDS:
        found[row.name] = [
            (record.key, record.value, record.when, record.removed)
            async for record in store.scan(row, include_removed=True)
        ]
    for series in (BTC, SeriesKey("okx", "BTC/USDT", "1d")):
        found[str(series)] = await store.candles.read(series, -(2**53), 2**53)
    for name in ("paper", "backtest-1", "Deeper/é", "candles only"):
        if name not in path and len(path) < 2:
            found[name] = await everything(store.namespace(name), *path, name)
    return found


async def require_equal(source: Store, target: Store) -> None:
    compared = await compare_stores(source, target)
    assert [item for item in compared if item.difference or item.source != item.target] == []
    assert compared
    unfinished = await target.get(MIGRATION, MIGRATION_KEY)
    assert unfinished is None or unfinished.removed


def snapshot(place: Path) -> dict[Path, bytes]:
    """The files of a store, but for what its readers share: the memory of SQLite's log, the locks of files."""
    files = (path for path in place.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal", ".lock")))
    return {path: path.read_bytes() for path in files}


@pytest.fixture
async def source() -> MemoryStore:
    store = MemoryStore()
    await fill(store)
    return store


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[Store]:
    store = make(URLS[1], tmp_path / "target")
    yield store
    await store.close()


# -- what is moved ---------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize(("source_url", "target_url"), sample(itertools.product(URLS, URLS), 4, "from any to any"))
async def test_everything_moves_between_any_two_stores(source_url: str, target_url: str, tmp_path: Path) -> None:
    written = make(source_url, tmp_path / "source")
    await fill(written)
    await written.put(Write(LEASE, KEY, msgspec.to_builtins(holder(released=True))))
    await written.close()
    before = snapshot(tmp_path / "source")
    source = written if source_url == "memory:" else make(source_url, tmp_path / "source", existing=True)
    target = make(target_url, tmp_path / "target")
    moved = await migrate_store(source, target)
    assert {item.contract: item.copied for item in moved.contracts} == {
        **{row.name: 3 for row in RECORDS}, "signal": 6, "candle": MINUTES + 44,
    }  # fmt: skip
    assert sum(item.present for item in moved.contracts) == 0
    assert list(moved.contracts) == sorted(moved.contracts, key=lambda item: list(CONTRACTS).index(item.contract))
    assert await everything(target) == await everything(source)
    await require_equal(source, target)
    assert await target.get(LEASE, KEY) is None
    again = await migrate_store(source, target)
    assert [(item.copied, item.present) for item in again.contracts] == [(0, item.copied) for item in moved.contracts]
    await source.close()
    await target.close()
    assert snapshot(tmp_path / "source") == before


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
written_records = st.lists(
    st.tuples(
        st.sampled_from(RECORDS),
        st.sampled_from(["", "paper", "backtest-É"]),
        st.sampled_from(["a", "A", "b/c", "", "x" * 300, "é"]),
        plain,
        st.none() | st.integers(0, 2**50),
        st.booleans(),
    ),
    max_size=25,
)


@pytest.mark.sampled
@settings(max_examples=size(8, 25), deadline=None)
@given(items=written_records, way=st.sampled_from(["file:{}/dump", "sqlite:{}/bot.db"]))
def test_there_and_back_is_the_same(
    items: list[tuple[Contract, str, str, Plain, int | None, bool]],
    way: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async def there_and_back() -> None:
        first, second, third = MemoryStore(), make(way, tmp_path_factory.mktemp("way")), MemoryStore()
        for row, namespace, name, value, when, removed in items:
            key = tuple(bool(len(name) % 2) if field == "backtest" else name for field in row.key_fields)
            await first.namespace(namespace).put(Write(row, key, value, when=when, removed=removed))
        await migrate_store(first, second)
        await migrate_store(second, third)
        await second.close()
        for left, right in ((first, third), (third, first)):
            for item in await compare_stores(left, right):
                assert item.difference is None
                assert item.source == item.target
        count = len({(row.name, namespace, name) for row, namespace, name, *_ in items})
        assert sum(item.source.count for item in await compare_stores(first, third)) == count

    asyncio.run(there_and_back())


async def test_long_series_are_read_in_pieces(target: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    source = MemoryStore()
    count = 1_300_000
    await source.candles.write(BTC, candles(count))
    largest = 0
    read = source.candles.read

    async def watched(series: SeriesKey, start_ms: int, stop_ms: int) -> CandleSeries:
        nonlocal largest
        found = await read(series, start_ms, stop_ms)
        largest = max(largest, len(found))
        return found

    monkeypatch.setattr(source.candles, "read", watched)
    assert (await migrate_store(source, target)).contracts == (Moved("candle", copied=count),)
    assert largest <= 525_600
    assert await target.candles.read(BTC, 0, 2**53) == candles(count)


async def test_batches_are_bounded_in_records_and_bytes(source: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    big = MemoryStore()
    for number in range(1_100):
        await big.put(Write(LOG, (str(number),), number))
    for number in range(10):
        await big.put(Write(STORAGE, (True, str(number)), "x" * 750_000))
    target = MemoryStore()
    sizes: list[tuple[str, int]] = []
    batch = target.batch

    async def watched(writes: Any) -> None:
        sizes.append((writes[0].contract.name, len(writes)))
        await batch(writes)

    monkeypatch.setattr(target, "batch", watched)
    await migrate_store(big, target)
    assert sizes == [*[("storage", 2)] * 5, ("log", 500), ("log", 500), ("log", 100)]


async def test_progress_is_told(source: MemoryStore, target: Store) -> None:
    told: list[Progress] = []
    await migrate_store(source, target, on_progress=told.append)
    assert (told[-1].records, told[-1].candles) == (48, MINUTES + 44)
    assert told[-1].number <= told[-1].parts
    assert all((a.number, a.records, a.candles) <= (b.number, b.records, b.candles) for a, b in pairwise(told))


# -- the comparison ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (Write(SIGNAL, KEY, "other"), "trend/binance/BTC%2FUSDT has another content"),
        (Write(SIGNAL, KEY, None, when=1), "trend/binance/BTC%2FUSDT has another content"),
        (Write(SIGNAL, KEY, None, removed=True), "trend/binance/BTC%2FUSDT has another content"),
        (Write(LOG, ("new",), 1), "new is only in the target"),
        (Write(STORAGE, key_of(STORAGE, 0), 0), "comes next in the source"),
    ],
    ids=["value", "time", "removal", "one more", "order"],
)
async def test_comparison_names_the_first_difference(
    source: MemoryStore, target: Store, change: Write, named: str
) -> None:
    await migrate_store(source, target)
    await target.put(change)
    (item,) = [item for item in await compare_stores(source, target) if item.difference]
    assert (item.namespace, item.contract) == ((), change.contract.name)
    assert named in (item.difference or "")
    assert item.source.digest != item.target.digest


async def test_comparison_names_missing_records_and_other_candles(source: MemoryStore, target: Store) -> None:
    await migrate_store(source, target)
    await source.namespace("paper").put(Write(SIGNAL, ("a", "b", "C"), 1))
    await source.candles.write(BTC, candles(1, start=START + MINUTES * MINUTE))
    await target.candles.write(SeriesKey("kraken", "X", "1m"), candles(1))
    differences = {
        (item.namespace, item.contract): item.difference
        for item in await compare_stores(source, target)
        if item.difference
    }
    assert differences == {
        ((), "candle"): "candle/binance/BTCUSDT/1m from 2023-01-01T03:20Z on",
        (("paper",), "signal"): "a/b/C is missing from the target",
    }


# -- what is refused before anything is written ------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (Write(SIGNAL, KEY, "mine"), r"signal: trend/binance/BTC%2FUSDT"),
        (Write(LOG, ("of another bot",), 1), "log: of%20another%20bot"),
        (Write(SIGNAL, key_of(SIGNAL, 1), {"number": 1}), "signal: "),
    ],
    ids=["same key", "another key", "not the beginning"],
)
async def test_target_with_something_else_is_refused(
    source: MemoryStore, target: Store, write: Write, named: str
) -> None:
    await target.put(write)
    before = await everything(target)
    for resume in (False, True):
        with pytest.raises(UserError, match=rf"nothing was written: the target has {named}.*empty target"):
            await migrate_store(source, target, resume=resume)
    assert await everything(target) == before
    assert await target.get(MIGRATION, MIGRATION_KEY) is None


async def test_target_with_other_candles_or_namespaces_is_refused(source: MemoryStore) -> None:
    cases = (
        ("candles of", "", SeriesKey("binance", "BTCUSDT", "1m"), candles(5, start=START, price=7)),
        ("candles of", "", SeriesKey("kraken", "BTCUSDT", "1m"), candles(5)),
        ("@elsewhere", "elsewhere", None, None),
    )
    for named, namespace, series, rows in cases:
        target = MemoryStore()
        if series is not None and rows is not None:
            await target.candles.write(series, rows)
        else:
            await target.namespace(namespace).put(Write(SIGNAL, KEY, 1))
        with pytest.raises(UserError, match=f"nothing was written: the target has .*{named}"):
            await migrate_store(source, target)
        assert [record async for record in target.scan(LOG)] == []


async def test_target_with_the_beginning_is_completed(source: MemoryStore, target: Store) -> None:
    await target.put(Write(LOG, key_of(LOG, 0), {"number": 0, "float": 0.0, "text": "é\U0001f680"}))
    await target.candles.write(BTC, candles(10, start=START))
    moved = {item.contract: (item.copied, item.present) for item in (await migrate_store(source, target)).contracts}
    assert (moved["log"], moved["candle"], moved["state"]) == ((2, 1), (MINUTES + 34, 10), (3, 0))
    await require_equal(source, target)


@pytest.mark.parametrize("url", URLS[:2])
async def test_store_at_another_path_to_it_is_the_same(url: str, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(tmp_path)
    source, target = make(url, tmp_path), make(url, tmp_path / "linked")
    await source.put(Write(SIGNAL, KEY, 1))
    with pytest.raises(UserError, match="the same store"):
        await migrate_store(source, target)
    assert await target.get(MIGRATION, MIGRATION_KEY) is None
    await source.close()
    await target.close()


async def test_stores_that_cannot_say_what_they_have_are_refused(source: MemoryStore) -> None:
    with pytest.raises(UserError, match="the same store"):
        await migrate_store(source, source)
    with pytest.raises(UserError, match="DummyStore cannot list its namespaces"):
        await migrate_store(DummyStore(), source)
    with pytest.raises(UserError, match="DummyStore cannot list what it has in order"):
        await migrate_store(source, DummyStore())


async def test_checkpoint_of_another_version_is_refused(source: MemoryStore, target: Store) -> None:
    await target.put(Write(MIGRATION, MIGRATION_KEY, {"later": 1}))
    with pytest.raises(Damaged, match="the checkpoint in the target is not one of this version"):
        await migrate_store(source, target, resume=True)
    assert [record async for record in target.scan(LOG)] == []


async def test_candles_that_nobody_can_list_are_not_left_behind(target: Store) -> None:
    source = MemoryStore()
    await source.put(Write(LOG, ("1",), 1))
    source.candles = DummyStore().candles
    with pytest.raises(UserError, match="DummyCandleStore cannot list its candles"):
        await migrate_store(source, target)
    assert [record async for record in target.scan(LOG)] == []


async def test_target_that_lists_nothing_is_compared_all_the_same(source: MemoryStore) -> None:
    inner = MemoryStore()
    target = Unlisted(inner)
    await migrate_store(source, target)
    assert await everything(inner) == await everything(source)
    again = await migrate_store(source, target)
    assert sum(item.copied for item in again.contracts) == 0
    other = MemoryStore()
    await other.namespace("paper").candles.write(BTC, candles(5, price=7))
    await source.namespace("paper").candles.write(BTC, candles(5))
    with pytest.raises(UserError, match="the target has @paper/candle"):
        await migrate_store(source, Unlisted(other))


class Unlisted(Store):
    """A user's own store that cannot list its namespaces and series."""

    capabilities = MemoryStore.capabilities - {Capability.LISTING, Capability.PRUNING}

    def __init__(self, inner: MemoryStore) -> None:
        self._inner = inner
        self.candles = UnlistedCandles(inner.candles)

    async def get(self, contract: Contract, key: Key) -> Record | None:
        return await self._inner.get(contract, key)

    async def put(self, write: Write) -> Record:
        return await self._inner.put(write)

    async def batch(self, writes: Sequence[Write]) -> None:
        await self._inner.batch(writes)

    def select(self, wanted: Selection) -> AsyncGenerator[Record, None]:
        return self._inner.select(wanted)

    def namespace(self, name: str) -> Unlisted:
        return Unlisted(self._inner.namespace(name)) if name else self


class UnlistedCandles(CandleStore):
    def __init__(self, inner: CandleStore) -> None:
        self._inner = inner

    async def read(self, series: SeriesKey, start_ms: int, stop_ms: int) -> CandleSeries:
        return await self._inner.read(series, start_ms, stop_ms)

    async def write(self, series: SeriesKey, candles: CandleSeries) -> int:
        return await self._inner.write(series, candles)


def holder(**changes: Any) -> Holder:
    return Holder(**{
        "owner": "o", "pid": 77, "host": "elsewhere", "since": 0, "ttl_ms": 300, "machine": "another", "started": 1.0,
        **changes,
    })  # fmt: skip


@pytest.mark.parametrize("namespace", ["", "paper"])
@pytest.mark.parametrize("side", ["source", "target"])
async def test_traded_store_is_refused_and_the_holder_named(
    source: MemoryStore, target: Store, side: str, namespace: str
) -> None:
    space = (source if side == "source" else target).namespace(namespace)
    lease = await acquire(lambda row: space, KEY, ttl=0.3)
    kept = asyncio.create_task(lease.keep())
    if side == "target":
        await space.put(Write(SIGNAL, ("a", "b", "C"), 1))
    with pytest.raises(Conflict, match=rf"is traded by process {os.getpid()} on "):
        await migrate_store(source, target)
    assert [record async for record in target.scan(LOG)] == []
    kept.cancel()
    await asyncio.gather(kept, return_exceptions=True)


async def test_leases_of_the_dead_do_not_hold_it_up(source: MemoryStore, target: Store) -> None:
    for number in range(50):
        await source.put(Write(LEASE, ("s", "e", f"P{number}"), msgspec.to_builtins(holder())))
    started = asyncio.get_running_loop().time()
    await migrate_store(source, target)
    assert asyncio.get_running_loop().time() - started < 50 * 0.3
    await require_equal(source, target)


@pytest.mark.parametrize("url", URLS[:2])
async def test_everything_damaged_is_named_and_nothing_moved(url: str, target: Store, tmp_path: Path) -> None:
    written = make(url, tmp_path)
    await fill(written)
    await written.close()
    damaged = 0
    for path in [*tmp_path.rglob("2022-01.candles"), *tmp_path.rglob("BTC%2FUSDT.json")]:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        damaged += 1
    if url.startswith("sqlite"):
        database = tmp_path / "bot.db"
        database.write_bytes(database.read_bytes().replace(b'"paper"', b'"pager"'))
        damaged += 1
    before = snapshot(tmp_path)
    source = make(url, tmp_path, existing=True)
    with pytest.raises(Damaged, match=rf"nothing was moved, because {damaged} of the source.*2022-01.candles: the ch"):
        await migrate_store(source, target)
    await source.close()
    assert {path: data for path, data in snapshot(tmp_path).items() if path in before} == before
    assert await target.get(MIGRATION, MIGRATION_KEY) is None


async def test_what_is_in_quarantine_is_not_left_behind_unsaid(target: Store, tmp_path: Path) -> None:
    written = make(URLS[0], tmp_path)
    await written.put(Write(SIGNAL, KEY, 1))
    await written.put(Write(LOG, ("1",), 1))
    await written.close()
    (path,) = tmp_path.rglob("BTC%2FUSDT.json")
    path.write_bytes(b"?")
    source = make(URLS[0], tmp_path, existing=True)
    with pytest.raises(Damaged, match="quarantine"):
        await source.get(SIGNAL, KEY)
    with pytest.raises(Damaged, match="in quarantine, its key is blocked"):
        await migrate_store(source, target)
    await source.close()


async def test_strange_files_are_listed_and_left_out(target: Store, tmp_path: Path) -> None:
    source = make(URLS[0], tmp_path)
    await source.put(Write(LOG, ("1",), 1))
    (tmp_path / "dump/notes.txt").write_text("mine")
    moved = await migrate_store(source, target)
    assert [finding.path for finding in moved.left_out] == ["notes.txt"]
    assert moved.contracts == (Moved("log", copied=1),)
    await source.close()


# -- what happens meanwhile --------------------------------------------------------------------------------


class Busy(MemoryStore):
    """A store that is written to when somebody has read its logs: a bot that was not stopped."""

    write: Write | None = None

    async def scan(self, contract: Contract, *arguments: Any, **named: Any) -> AsyncIterator[Record]:
        async for record in super().scan(contract, *arguments, **named):
            yield record
        if contract is LOG and self.write is not None and "limit" in named and named["limit"] is None:
            write, self.write = self.write, None
            await self.put(write)


@pytest.mark.parametrize("written_down", [True, False])
async def test_source_that_is_written_to_is_noticed(
    written_down: bool, target: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "CHECKPOINT_SECONDS", 0 if written_down else 60)
    source = Busy()
    await fill(source)
    source.write = Write(SIGNAL, ("new", "e", "P"), 1)
    with pytest.raises(Conflict, match=r"written to while it was copied \(signal\).*stop the program.*--resume"):
        await migrate_store(source, target)
    with pytest.raises(UserError, match=r"half of a migration.*--resume"):
        await migrate_store(source, target)
    await migrate_store(source, target, resume=True)
    await require_equal(source, target)


@pytest.mark.parametrize("written_down", [True, False])
async def test_source_whose_past_changed_takes_an_empty_target(
    written_down: bool, target: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "CHECKPOINT_SECONDS", 0 if written_down else 60)
    source = Busy()
    await fill(source)
    source.write = Write(SIGNAL, key_of(SIGNAL, 0), "changed")
    with pytest.raises(Conflict, match="written to while it was copied"):
        await migrate_store(source, target)
    with pytest.raises(UserError, match=r"signal: .*not what the source has there \(or has now\).*empty target"):
        await migrate_store(source, target, resume=True)


async def test_full_target_says_how_to_go_on(source: MemoryStore, tmp_path: Path) -> None:
    faults = FaultFS(sync=False)
    target = FileStore(tmp_path / "dump", disk=Disk(faults))
    faults.inject("write", errno.ENOSPC, nth=60, lasting=True)
    with pytest.raises(OutOfSpace, match=r"No space left.*\d+ records and [\d,]+ candles were copied before.*--resume"):
        await migrate_store(source, target)
    faults.heal()
    with pytest.raises(UserError, match=r"half of a migration.*--resume"):
        await migrate_store(source, target)
    await migrate_store(source, target, resume=True)
    assert await everything(target) == await everything(source)
    await require_equal(source, target)
    await target.close()


async def test_resuming_from_another_source_is_refused(
    source: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "CHECKPOINT_SECONDS", 0)
    target = Breaking(5)
    with pytest.raises(OutOfSpace):
        await migrate_store(source, target)
    other = MemoryStore()
    await fill(other)
    await other.put(Write(SIGNAL, KEY, "another position"))
    with pytest.raises(UserError, match=r"nothing was written: the target has signal: "):
        await migrate_store(other, target, resume=True)
    with pytest.raises(UserError, match=r"nothing was written: the target has candle/"):
        await migrate_store(MemoryStore(), target, resume=True)
    target.left = 10**6
    moved = {item.contract: item for item in (await migrate_store(source, target, resume=True)).contracts}
    assert moved["signal"].present == 4
    await require_equal(source, target)


async def test_nobody_trades_on_half_of_a_store(source: MemoryStore) -> None:
    target = Breaking(5)
    with pytest.raises(OutOfSpace):
        await migrate_store(source, target)
    with pytest.raises(Conflict, match=r"half of a migration.*--resume"):
        await acquire(lambda row: target, KEY)
    target.left = 10**6
    await migrate_store(source, target, resume=True)
    assert (await acquire(lambda row: target, KEY)).held


class Breaking(MemoryStore):
    """A store whose disk is full after some batches."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    async def batch(self, writes: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise OutOfSpace("the disk is full")
        await super().batch(writes)


class Plainest(MemoryStore):
    """A store without any promise but order, as a class of the user's own may be."""

    capabilities = frozenset((Capability.ORDERED_SCAN,))

    async def batch(self, writes: Any) -> None:
        raise AssertionError("it has no batches")


async def test_resuming_reads_nothing_that_is_complete(source: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "CHECKPOINT_SECONDS", 0)
    target = Breaking(8)
    with pytest.raises(OutOfSpace):
        await migrate_store(source, target)
    read: list[str] = []
    scan = source.scan

    def watched(contract: Contract, *arguments: Any, **named: Any) -> AsyncIterator[Record]:
        if named.get("limit") is None:
            read.append(contract.name)
        return scan(contract, *arguments, **named)

    monkeypatch.setattr(source, "scan", watched)
    target.left = 10**6
    await migrate_store(source, target, resume=True)
    complete = {"signal", "schedule", "strategy", "risk", "partial", "breakeven", "storage"}
    assert complete.isdisjoint(read)
    assert {"log", "memory"} <= set(read)


async def test_store_without_promises_is_filled_one_by_one(source: MemoryStore) -> None:
    target = Plainest()
    await migrate_store(source, target)
    await require_equal(source, target)


CHILD = """
import asyncio, sys
from backtest_kit.persist import crashpoints, migration
from backtest_kit.persist.migration import migrate_store
from backtest_kit.persist.urls import store_at

async def main():
    source, target = store_at(sys.argv[1], existing=True), store_at(sys.argv[2])
    passed = crashpoints.record()
    await migrate_store(source, target)
    await target.close()
    print(*(f"{name}:{count}" for name, count in passed.items()))

migration.CHECKPOINT_SECONDS = 0
asyncio.run(main())
"""


def run_child(source: str, target: str, order: str = "") -> subprocess.CompletedProcess[str]:
    return run_program(CHILD, source, target, environment={"BACKTEST_KIT_CRASH": order})


def spread(passed: str, count: int) -> list[str]:
    """So many crash points, evenly spread over all passages of all points."""
    counts = {name: int(times) for name, times in (item.split(":") for item in passed.split())}
    passages = [f"{name}:{number}" for name, times in counts.items() for number in range(1, times + 1)]
    return passages[:: len(passages) // count][:count]


@pytest.mark.crash
@pytest.mark.sampled
@pytest.mark.parametrize(
    ("source_url", "target_url"), [(URLS[0], URLS[1]), (URLS[1], URLS[0])], ids=["to sqlite", "to file"]
)
async def test_kill_at_any_point_and_resume(source_url: str, target_url: str, tmp_path: Path) -> None:
    source = make(source_url, tmp_path / "source")
    await fill(source, each=30)
    await source.close()
    address = source_url.format(tmp_path / "source")
    whole = run_child(address, target_url.format(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    points = spread(whole.stdout, 10)
    assert len(points) == 10
    gone_on = 0
    for point in sample(points, 4, f"killed migrations from {source_url}"):
        place = tmp_path / point
        killed = run_child(address, target_url.format(place), point)
        assert killed.returncode == -9, (point, killed.stdout, killed.stderr)
        target = make(target_url, place)
        moved = await migrate_store(source, target, resume=True)
        gone_on += any(item.present for item in moved.contracts)
        assert await everything(target) == await everything(source), point
        await require_equal(source, target)
        await target.close()
    assert gone_on >= size(1, 5), "the kills come too early to be resumed from"
    await source.close()
