"""What a record was before: read as of a moment, on every store, by everybody who asks with a moment."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from tests.records.conftest import MINUTE_MS, NOON_MS, kit_on, run_of
from tests.samples import size

import backtest_kit as bk
from backtest_kit.errors import UserError
from backtest_kit.persist.contracts import CONTRACTS, HISTORY
from backtest_kit.persist.history import NotKept, RevisionStore
from backtest_kit.persist.retention import Retention, Rule, compact
from backtest_kit.persist.store import Store, Write
from backtest_kit.persist.writing import now_ms

STATE, MEMORY = CONTRACTS["state"], CONTRACTS["memory"]
SLOT: dict[str, Any] = {"signal_id": "s-1", "bucket_name": "plan"}
NOTE: dict[str, Any] = {"signal_id": "s-1", "bucket_name": "notes", "memory_id": "thesis"}


def at(minute: int) -> int:
    return NOON_MS + minute * MINUTE_MS


def noted(minute: int, seen: list[int]) -> list[int]:
    return [*seen, minute]


@pytest.fixture
def keeping(kit: bk.Kit) -> bk.Kit:
    kit.persistence.keep_history("state", "memory", "session", "recent")
    return kit


async def test_a_record_is_read_as_it_stood_at_a_moment(keeping: bk.Kit) -> None:
    state = keeping.persistence.state
    for minute in (1, 3, 5):
        await state.write({"minute": minute, "level": math.inf}, when=at(minute), **SLOT)
    for minute, expected in ((0, None), (1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (9, 5)):
        found = await state.read(as_of=at(minute), **SLOT)
        assert (found and found["minute"]) == expected
    found = await state.read(as_of=at(2), **SLOT)
    assert found["level"] == math.inf
    assert await state.read(when=at(2), **SLOT) is None, "`when` shows the last write or nothing"


async def test_what_was_removed_is_there_before_its_removal(keeping: bk.Kit) -> None:
    notes = run_of(keeping).memory
    await notes("notes", at(1), "s-1", None, False).write("thesis", "it rises")
    await notes("notes", at(3), "s-1", None, False).remove("thesis")
    await notes("notes", at(5), "s-1", None, False).write("thesis", "it falls")
    memory = keeping.persistence.memory
    found = [await memory.read(as_of=at(minute), **NOTE) for minute in range(7)]
    assert [each and each["value"] for each in found] == [None, "it rises", "it rises", None, None, *["it falls"] * 2]


async def test_a_history_begins_where_it_is_switched_on(address: str, tmp_path: Path) -> None:
    kit = kit_on(address, tmp_path)
    state = kit.persistence.state
    await state.write("first", when=at(1), **SLOT)
    await state.write("second", when=at(2), **SLOT)
    with pytest.raises(UserError, match=r"PersistStateAdapter.keep_history\(\)"):
        await state.read(as_of=at(2), **SLOT)
    state.keep_history()
    await state.write("third", when=at(3), **SLOT)
    assert await state.read(as_of=at(2), **SLOT) == "second"
    with pytest.raises(NotKept, match="goes back to revision 2 of 2024-06-01T12:02Z"):
        await state.read(as_of=at(1), **SLOT)
    await kit.close()


async def test_records_as_of_a_moment_from_outside_and_in_a_run_that_is_repeated(keeping: bk.Kit) -> None:
    for minute in (1, 2, 3):
        run = run_of(keeping, "backtest", "one")
        await run.state("plan", at(minute), None, "s-1", False).set(minute)
        await run.memory("notes", at(minute), None, "s-1", False).write("last", f"minute {minute}")
        await run.session(at(minute)).update(partial(noted, minute), [])
    of_run: dict[str, Any] = {"mode": "backtest", "run_id": "one", "when": at(2)}
    records = keeping.records
    assert await records.state("plan", signal_id="s-1", **of_run).get() == 2
    assert await records.memory("notes", signal_id="s-1", **of_run).read("last") == "minute 2"
    (note,) = await records.memory("notes", signal_id="s-1", **of_run).list()
    assert (note.value, note.when_ms) == ("minute 2", at(2))
    (note,) = await records.memory("notes", signal_id="s-1", **of_run).search("minute 2")
    assert note.value == "minute 2"
    # Whoever repeats the second minute goes on from what was there, and replaces what came after it.
    again = run_of(keeping, "backtest", "one").session(at(2))
    assert await again.update(lambda seen: [*seen, "again"], []) == [1, 2, "again"]
    assert await run_of(keeping, "backtest", "one").session(at(3)).get() == [1, 2, "again"]


@pytest.mark.sampled
async def test_no_read_as_of_a_moment_shows_a_later_one(tmp_path: Path) -> None:
    numbers = itertools.count()
    kit = kit_on("memory:", tmp_path)
    kit.persistence.keep_history("state")

    @settings(max_examples=size(20, 60), deadline=None)
    @given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.integers(0, 6))
    def check(minutes: list[int], moment: int) -> None:
        async def scenario() -> None:
            key: dict[str, Any] = {"signal_id": f"s-{next(numbers)}", "bucket_name": "plan"}
            for number, minute in enumerate(minutes):
                await kit.persistence.state.write(number, when=at(minute), **key)
            known = [number for number, minute in enumerate(minutes) if minute <= moment]
            assert await kit.persistence.state.read(as_of=at(moment), **key) == (known[-1] if known else None)

        asyncio.run(scenario())

    await asyncio.to_thread(check)


async def test_what_is_not_kept_is_an_error_and_no_default(address: str, tmp_path: Path) -> None:
    kit = kit_on(address, tmp_path)
    notes = run_of(kit).memory
    await run_of(kit).state("plan", at(1), None, "s-1", False).set("first")
    await run_of(kit).state("plan", at(2), None, "s-1", False).set("second")
    await run_of(kit).session(at(2)).set("session")
    for minute in (1, 2):
        await notes("notes", at(minute), "s-1", None, False).write("thesis", f"minute {minute}")
    kit.persistence.keep_history("state", "session", "memory")
    await run_of(kit).state("plan", at(3), None, "s-1", False).set("third")
    await notes("notes", at(3), "s-1", None, False).write("thesis", "minute 3")
    state = partial(kit.records.state, "plan", signal_id="s-1")
    assert await state(when=at(2)).get("DEFAULT") == "second"
    memory = kit.records.memory("notes", signal_id="s-1", when=at(1))
    for read in (state(when=at(1)).get, partial(memory.read, "thesis"), memory.list, partial(memory.search, "minute")):
        with pytest.raises(NotKept, match="goes back to revision 2 of 2024-06-01T12:02Z"):
            await read()
    names: Any = {"symbol": "BTCUSDT", "strategy_name": "trend", "exchange_name": "binance"}
    assert await kit.records.session(**names, when=at(1)).get("DEFAULT") == "DEFAULT", "it was not there yet"
    assert await run_of(kit).state("plan", at(1), None, "s-1", False).get("DEFAULT") == "DEFAULT", "a run goes on"
    assert await notes("notes", at(1), "s-1", None, False).list() == []
    await kit.close()


async def test_a_removal_is_of_the_moment_that_it_is_given(keeping: bk.Kit) -> None:
    memory = keeping.persistence.memory
    await memory.write("first", when=at(1), **NOTE)
    await memory.write("second", when=at(3), **NOTE)
    assert await memory.remove(when=at(5), **NOTE)
    found = [await memory.read(as_of=at(minute), **NOTE) for minute in range(7)]
    assert found == [None, "first", "first", "second", "second", None, None]
    await memory.write("third", when=at(6), **NOTE)
    assert await memory.remove(**NOTE)
    found = [await memory.read(as_of=at(minute), **NOTE) for minute in range(3, 8)]
    assert found == ["second", "second", None, None, None], "without a time, that of the last write"


async def test_of_concurrent_updates_no_revision_is_lost(shared_address: str, tmp_path: Path) -> None:
    kits = [kit_on(shared_address, tmp_path) for _ in range(2)]
    for kit in kits:
        kit.persistence.keep_history("state")

    async def count(kit: bk.Kit, minute: int) -> None:
        await run_of(kit).state("plan", at(minute), None, "s-1", False).update(lambda count: count + 1, 0)

    await asyncio.gather(*(count(kit, 1) for kit in kits for _ in range(10)))
    store = kits[0].persistence.store_for(STATE, "live")
    notes = [(record.key[-1], record.value) async for record in store.scan(HISTORY)]
    assert sorted((rev, note["value"]) for rev, note in notes if isinstance(note, dict)) == [
        (rev, rev) for rev in range(1, 20)
    ]
    for kit in kits:
        await kit.close()


async def test_a_crash_between_the_note_and_the_record_changes_nothing(tmp_path: Path) -> None:
    store = bk.MemoryStore()
    keeper = RevisionStore(store, STATE)
    key = ("s-1", "plan")
    await keeper.put(Write(STATE, key, "first", when=at(1)))

    class Killed(BaseException):
        pass

    async def killed(write: Write) -> Any:
        if write.contract is STATE:
            raise Killed
        return await put(write)

    put, store.put = store.put, killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        await keeper.put(Write(STATE, key, "second", when=at(2)))
    store.put = put  # type: ignore[method-assign]
    found = await keeper.as_of(STATE, key, at(3))
    assert found is not None
    assert (found.value, found.rev) == ("first", 1)
    await keeper.put(Write(STATE, key, "third", when=at(3)))
    found = await keeper.as_of(STATE, key, at(2))
    assert found is not None
    assert found.value == "first"


async def test_a_batch_keeps_what_it_replaces(kit: bk.Kit) -> None:
    kit.persistence.keep_history("memory")
    store = kit.persistence.store_for(MEMORY, "live")
    key = ("s-1", "notes", "a"), ("s-1", "notes", "b")
    for minute in (1, 2):
        await store.batch([Write(MEMORY, each, minute, when=at(minute)) for each in key])
    assert isinstance(store, RevisionStore)
    for each in key:
        found = await store.as_of(MEMORY, each, at(1))
        assert found is not None
        assert found.value == 1
    with pytest.raises(bk.Conflict):
        await store.batch([Write(MEMORY, key[0], 3, expect=1)])


async def test_history_is_forgotten_in_time_and_nothing_else_with_it(keeping: bk.Kit) -> None:
    state = keeping.persistence.state
    for minute in (1, 2, 3):
        await state.write(minute, when=at(minute), **SLOT)
    store: Store = keeping.persistence.stores()[0]
    retention = Retention({"history": Rule(days=30)}, 90, Rule())
    assert await compact(store, retention) == []
    (expired,) = await compact(store, retention, at_ms=now_ms() + 31 * 86_400_000)
    assert (expired.contract, expired.records) == ("history", 2)
    assert await state.read(**SLOT) == 3
    with pytest.raises(NotKept):
        await state.read(as_of=at(2), **SLOT)
    await state.write(4, when=at(4), **SLOT)
    assert await state.read(as_of=at(3), **SLOT) == 3


async def test_without_history_nothing_is_kept_of_what_was(kit: bk.Kit) -> None:
    for minute in (1, 2):
        await kit.persistence.state.write(minute, when=at(minute), **SLOT)
    store = kit.persistence.store_for(STATE, "live")
    assert [record async for record in store.scan(HISTORY)] == []


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda kit: kit.persistence.keep_history("signal"), "no history is kept of signal"),
        (lambda kit: kit.persistence.keep_history("log"), "no history is kept of log"),
        (lambda kit: kit.persistence.keep_history("candle"), "no history is kept of candle"),
        (lambda kit: kit.persistence.keep_history("plan"), "no contract is called 'plan'"),
    ],
)
async def test_what_has_no_history_is_said(act: Callable[[bk.Kit], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        act(bk.Kit(tmp_path))


async def test_a_store_that_does_not_compare_is_refused(tmp_path: Path) -> None:
    class Slots:
        async def read_value(self, entity_id: str) -> Any:
            return None

        async def write_value(self, entity_id: str, value: Any) -> None:
            return None

    kit = bk.Kit(tmp_path)
    kit.persistence.state.use_adapter(Slots())
    kit.persistence.state.keep_history()
    with pytest.raises(UserError, match="takes a store that compares revisions"):
        await kit.persistence.state.write(1, **SLOT)
    with pytest.raises(UserError, match="are both given"):
        await bk.Kit(tmp_path).persistence.state.read(when=1, as_of=1, **SLOT)
    await kit.close()
