"""What is too old is forgotten, what is of money never is, on every store that forgets."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from backtest_kit.errors import Conflict, UserError
from backtest_kit.persist.contracts import CONTRACTS, LEASE, Contract, Durability, Kind
from backtest_kit.persist.lease import claim
from backtest_kit.persist.retention import DAY_MS, Retention, Rule, compact, retention_of
from backtest_kit.persist.store import Key, Store, Write
from backtest_kit.persist.testing.harness import sample_key
from backtest_kit.persist.urls import store_at
from backtest_kit.persist.writing import now_ms
from backtest_kit.settings import Settings, with_settings

LOG, MEMORY, STATE, STORAGE = (CONTRACTS[name] for name in ("log", "memory", "state", "storage"))
ROWS = [*(row for row in CONTRACTS.values() if row.kind is not Kind.SERIES), LEASE]


@pytest_asyncio.fixture(params=["memory:", "file:{place}/dump", "sqlite:{place}/bot.db"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    store = store_at(request.param.format(place=tmp_path))
    yield store
    await store.close()


async def lines(store: Store) -> list[object]:
    return [record.key[0] async for record in store.scan(LOG)]


async def say(store: Store, *names: str) -> None:
    for name in names:
        await store.put(Write(LOG, (name,), {"message": name}))


async def test_only_the_last_are_kept(store: Store) -> None:
    await say(store, *"abcdef")
    kept = Retention({"log": Rule(last=2)}, math.inf, Rule())
    (planned,) = await compact(store, kept, look_only=True)
    assert (planned.contract, planned.records) == ("log", 4)
    assert await lines(store) == list("abcdef")
    assert await compact(store, kept) == [planned]
    assert await lines(store) == list("ef")
    assert await compact(store, kept) == []


async def test_what_is_too_old_goes_and_what_is_young_stays(store: Store) -> None:
    await say(store, *"abc")
    kept = Retention({"log": Rule(days=2)}, math.inf, Rule())
    assert await compact(store, kept, at_ms=now_ms() + 2 * DAY_MS - 60_000) == []
    (expired,) = await compact(store, kept, at_ms=now_ms() + 2 * DAY_MS + 60_000)
    assert (expired.records, expired.size > 0) == (3, True)
    assert await lines(store) == []
    await say(store, "d")
    assert await lines(store) == ["d"]


async def test_paper_has_the_same_rules(store: Store) -> None:
    await say(store, "live")
    await say(store.namespace("paper"), "paper")
    await compact(store, Retention({"log": Rule(days=1)}, math.inf, Rule()), at_ms=now_ms() + 2 * DAY_MS)
    assert await lines(store) == await lines(store.namespace("paper")) == []


async def test_removed_records_are_kept_for_a_time_of_their_own(store: Store) -> None:
    def note(name: str) -> Key:
        return ("s-1", "notes", name)

    for name in "abc":
        await store.put(Write(MEMORY, note(name), name))
    await store.put(Write(MEMORY, note("b"), "b", removed=True))
    kept = Retention({}, 10, Rule())
    assert await compact(store, kept, at_ms=now_ms() + 9 * DAY_MS) == []
    (expired,) = await compact(store, kept, at_ms=now_ms() + 11 * DAY_MS)
    assert expired.records == 1
    assert await store.get(MEMORY, note("b")) is None
    assert [record.value async for record in store.scan(MEMORY)] == ["a", "c"]


async def test_who_had_a_run_is_forgotten_the_next_day(store: Store) -> None:
    space = store.namespace("backtest")
    words: dict[str, Any] = {"what": "the run", "doing": "is under way in", "remedy": "wait"}
    await (await claim(space, "run", ("mine", "BTCUSDT"), **words)).release()
    held = await claim(space, "run", ("mine", "ETHUSDT"), **words)
    kept = retention_of(Settings())
    assert await compact(store, kept) == []
    (expired,) = await compact(store, kept, at_ms=now_ms() + 2 * DAY_MS)
    assert (expired.namespace, expired.contract, expired.records) == (("backtest",), "claim", 2)
    with pytest.raises(Conflict):
        await held.renew()


async def test_a_run_goes_as_a_whole_by_age_or_number(store: Store) -> None:
    for number in range(5):
        run = store.namespace(f"backtest-{number}")
        await run.put(Write(STORAGE, (True, f"s-{number}"), number))
        await say(run, "line")
    await say(store.namespace("backtester"), "no run")
    crowded = Retention({}, math.inf, Rule(last=2))
    assert await compact(store, crowded) == []  # they may be going on
    expired = await compact(store, crowded, at_ms=now_ms() + 2 * DAY_MS)
    assert sorted((each.namespace, each.contract, each.records) for each in expired) == [
        ((f"backtest-{number}",), "", 2) for number in range(3)
    ]
    assert [await lines(store.namespace(f"backtest-{number}")) for number in range(5)] == [
        [],
        [],
        [],
        ["line"],
        ["line"],
    ]
    assert len(await compact(store, Retention({}, math.inf, Rule(days=3)), at_ms=now_ms() + 4 * DAY_MS)) == 2
    assert await lines(store.namespace("backtester")) == ["no run"]


@pytest.mark.parametrize("row", [STATE, STORAGE], ids=lambda row: row.name)
@pytest.mark.parametrize("url", ["file:{}/dump", "sqlite:{}/bot.db"], ids=["file", "sqlite"])
async def test_a_run_with_a_damaged_record_is_not_forgotten(tmp_path: Path, row: Contract, url: str) -> None:
    store = store_at(url.format(tmp_path))
    for name in ("damaged", "intact"):
        await store.namespace("backtest-1").put(
            Write(row, sample_key(row, name), {"stop": 95, "text": f"{name} by hand"})
        )
    await store.close()
    damage(tmp_path, b"damaged by hand")
    store = store_at(url.format(tmp_path))
    for day in (2, 3, 4):  # on the first one it is found, and put into quarantine
        for kept in (Rule(days=1), Rule(last=0)):
            (told,) = await compact(store, Retention({}, math.inf, kept), at_ms=now_ms() + day * DAY_MS)
            assert (told.namespace, told.records, told.size) == (("backtest-1",), 0, 0)
            assert "quarantine" in (told.fault or "")
    intact = await store.namespace("backtest-1").get(row, sample_key(row, "intact"))
    assert intact is not None
    for item in await store.quarantined():
        await store.drop(item.path)
    (gone,) = await compact(store, Retention({}, math.inf, Rule(days=1)), at_ms=now_ms() + 2 * DAY_MS)
    assert (gone.records, gone.fault) == (1, None)
    await store.close()


def damage(place: Path, text: bytes) -> None:
    """Change a text wherever it is stored, and not when that was written."""
    for path in place.rglob("*.*"):
        if path.is_file() and text in (data := path.read_bytes()):
            written = path.stat().st_mtime_ns
            path.write_bytes(data.replace(text, text.swapcase()))
            os.utime(path, ns=(written, written))


@pytest.mark.parametrize("mode", ["", "paper"])
async def test_state_and_memory_go_with_signals_that_are_over(store: Store, mode: str) -> None:
    space = store.namespace(mode)
    for name, status in (("open", "opened"), ("rests", "scheduled"), ("closed", "closed"), ("off", "cancelled")):
        await space.put(Write(STORAGE, (False, name), {"action": status}))
    # The last one is not a signal: it is what a strategy keeps while it has no position.
    for owner in ("open", "rests", "closed", "off", "trend@binance@BTCUSDT"):
        await space.put(Write(STATE, (owner, "plan"), 95))
        for note in ("a", "b"):
            await space.put(Write(MEMORY, (owner, "notes", note), note))
    kept = Retention({"state": Rule(days=30), "memory": Rule(days=10)}, math.inf, Rule())
    assert await compact(store, kept, at_ms=now_ms() + 9 * DAY_MS) == []
    (notes,) = await compact(store, kept, at_ms=now_ms() + 11 * DAY_MS)
    assert (notes.contract, notes.records) == ("memory", 4)
    (states,) = await compact(store, kept, at_ms=now_ms() + 10_000 * DAY_MS)
    assert (states.contract, states.records) == ("state", 2)
    for row, most in ((STATE, 1), (MEMORY, 2)):
        left = [record.key[0] async for record in space.scan(row)]
        assert left == [owner for owner in ("open", "rests", "trend@binance@BTCUSDT") for _ in range(most)]
    await space.put(Write(STORAGE, (False, "open"), {"action": "closed"}))
    assert len(await compact(store, kept, at_ms=now_ms() + 31 * DAY_MS)) == 2


async def test_a_damaged_signal_keeps_its_state_and_holds_up_no_other(tmp_path: Path) -> None:
    store = store_at(f"file:{tmp_path}/dump")
    for name in ("first", "second"):
        await store.put(Write(STORAGE, (False, name), {"action": "closed", "note": f"the {name} one"}))
        await store.put(Write(STATE, (name, "plan"), 95))
    await store.close()
    damage(tmp_path, b"the first one")
    store = store_at(f"file:{tmp_path}/dump")
    for records in (1, 0):
        expired = await compact(store, Retention({"state": Rule(days=1)}, 1, Rule()), at_ms=now_ms() + 2 * DAY_MS)
        assert sum(each.records for each in expired) == records
        assert [record.key[0] async for record in store.scan(STATE)] == ["first"]
    await store.close()


async def test_sessions_and_last_signals_go_by_their_age(store: Store) -> None:
    rows = [CONTRACTS[name] for name in ("session", "recent")]
    for row in rows:
        await store.put(Write(row, sample_key(row), 1))
    kept = retention_of(with_settings(Settings(), {f"CC_RETENTION_{row.name.upper()}_DAYS": 7 for row in rows}))
    assert await compact(store, kept, at_ms=now_ms() + 6 * DAY_MS) == []
    gone = await compact(store, kept, at_ms=now_ms() + 8 * DAY_MS)
    assert sorted(each.contract for each in gone) == ["recent", "session"]


async def test_a_run_that_wrote_within_a_day_stays_whatever_is_set(store: Store) -> None:
    await store.namespace("backtest-now").put(Write(STATE, ("s-1", "plan"), 95))
    settings = with_settings(Settings(), {"CC_RETENTION_RUN_DAYS": 0.01, "CC_RETENTION_RUN_COUNT": 1})
    assert await compact(store, retention_of(settings), at_ms=now_ms() + DAY_MS - 60_000) == []
    (gone,) = await compact(store, retention_of(settings), at_ms=now_ms() + DAY_MS + 60_000)
    assert gone.namespace == ("backtest-now",)


async def test_nothing_of_money_is_forgotten_by_any_setting(store: Store) -> None:
    for space in (store, store.namespace("paper")):
        for row in ROWS:
            await space.put(Write(row, sample_key(row), "kept"))
    names = [name for name in Settings.__struct_fields__ if name.startswith("CC_RETENTION_")]
    changes = {name: 1 if name.endswith("_COUNT") else 1e-9 for name in names}
    await compact(store, retention_of(with_settings(Settings(), changes)), at_ms=now_ms() + 10_000 * DAY_MS)
    for space in (store, store.namespace("paper")):
        kept = {row.name for row in ROWS if await space.get(row, sample_key(row)) is not None}
        assert {row.name for row in ROWS if row.durability is Durability.MONEY} <= kept
        assert kept.isdisjoint(("log", "notification", "storage", "measure", "interval", "session", "recent"))


async def test_by_default_signals_memory_and_state_are_kept_for_ever(store: Store) -> None:
    for row in ROWS:
        await store.put(Write(row, sample_key(row), "kept"))
    await compact(store, retention_of(Settings()), at_ms=now_ms() + 10_000 * DAY_MS)
    gone = {row.name for row in ROWS if await store.get(row, sample_key(row)) is None}
    assert gone == {"log", "notification", "interval"}


async def test_many_are_forgotten_in_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backtest_kit.persist.retention._PART", 7)
    await say(store, *(f"{number:03d}" for number in range(50)))
    await compact(store, Retention({"log": Rule(last=5)}, math.inf, Rule()))
    assert await lines(store) == [f"{number:03d}" for number in range(45, 50)]


def test_the_settings_are_checked() -> None:
    assert math.inf == with_settings(Settings(), {"CC_RETENTION_LOG_DAYS": "inf"}).CC_RETENTION_LOG_DAYS
    with pytest.raises(UserError, match="CC_RETENTION_LOG_DAYS is 0: it must be above 0"):
        with_settings(Settings(), {"CC_RETENTION_LOG_DAYS": 0})


@pytest.mark.parametrize("name", ["LOG", "NOTIFICATION", "STORAGE", "RUN"])
def test_counts_are_whole(name: str) -> None:
    for value in (0.5, 0, -1, 1.5):
        with pytest.raises(UserError, match=f"_{name}_COUNT is {value}: it must be a whole number, 1 or more, or inf"):
            with_settings(Settings(), {f"CC_RETENTION_{name}_COUNT": value})
    for good in (1, "1000", math.inf):
        with_settings(Settings(), {f"CC_RETENTION_{name}_COUNT": good})


@pytest.mark.parametrize("written_meanwhile", [False, True])
async def test_records_are_counted_once_unless_some_are_written_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch, written_meanwhile: bool
) -> None:
    """Counting a million of them for every part would take minutes."""
    monkeypatch.setattr("backtest_kit.persist.retention._PART", 7)
    writes = [Write(STORAGE, (False, f"s-{number:02d}"), number) for number in range(50)]
    for write in writes:
        await store.put(write)
    counts: list[int] = []
    kind: Any = type(store)
    count, prune = kind.count, kind.prune

    async def counted(self: Store, contract: Contract) -> int:
        counts.append(0)
        return int(await count(self, contract))

    async def prune_after_a_write(self: Store, contract: Contract, revisions: Mapping[Key, int]) -> int:
        if written_meanwhile and writes[0].key in revisions:
            await self.put(writes[0])
        return int(await prune(self, contract, revisions))

    monkeypatch.setattr(kind, "count", counted)
    monkeypatch.setattr(kind, "prune", prune_after_a_write)
    await compact(store, Retention({"storage": Rule(last=10)}, math.inf, Rule()))
    left = [record.value async for record in store.scan(STORAGE)]
    assert left == [*range(41, 50), 0] if written_meanwhile else left == list(range(40, 50))
    assert len(counts) == 1 + written_meanwhile
