"""State and session: what is read is what was set last, by whoever set it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.records.conftest import MINUTE_MS, NOON_MS, kit_on, run_of

import backtest_kit as bk
from backtest_kit.model.identity import Mode
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.store import ANY, Capability, Key, Record, Write
from backtest_kit.records import RunRecords
from backtest_kit.records.state import Slot

OF_BTC: Any = {"strategy_name": "trend", "exchange_name": "binance", "symbol": "BTCUSDT"}


def slots(kit: bk.Kit) -> list[Slot]:
    return [kit.records.state("plan", **OF_BTC), kit.records.session(**OF_BTC)]


async def test_a_value_of_any_kind_comes_back(kit: bk.Kit) -> None:
    values: list[Any] = [
        {"levels": [1, 2.5], "note": "é", "until": math.inf, "at": datetime(2024, 6, 1, tzinfo=UTC), "raw": b"\0"},
        "text", 7, None, [], {}, False,
    ]  # fmt: skip
    for slot in slots(kit):
        assert await slot.get() is None
        assert await slot.get("default") == "default"
        for value in values:
            await slot.set(value)
            assert await slot.get("default") == value


async def test_what_was_read_is_the_reader_s_own(kit: bk.Kit) -> None:
    for slot in slots(kit):
        value = {"levels": [1]}
        await slot.set(value)
        value["levels"].append(2)
        (await slot.get())["levels"].append(3)
        assert await slot.get() == {"levels": [1]}


async def test_updates_at_the_same_time_all_count(kit: bk.Kit) -> None:
    async def slowly(count: int) -> int:
        await asyncio.sleep(0)
        return count + 1

    for slot in slots(kit):
        returned = await asyncio.gather(*(slot.update(slowly, 0) for _ in range(50)))
        assert sorted(returned) == list(range(1, 51))
        assert await slot.get() == 50


async def test_updates_of_two_programs_all_count(shared_address: str, tmp_path: Path) -> None:
    kits = [kit_on(shared_address, tmp_path) for _ in range(3)]
    states = [kit.records.state("count", **OF_BTC) for kit in kits]

    async def count_to(state: Slot) -> None:
        for _ in range(20):
            await state.update(lambda count: count + 1, 0)

    await asyncio.gather(*(count_to(state) for state in states for _ in range(2)))
    assert [await state.get() for state in states] == [120] * 3
    for kit in kits:
        await kit.close()


async def test_an_update_that_raises_changes_nothing(kit: bk.Kit) -> None:
    def fail(value: object) -> None:
        raise RuntimeError("no")

    for slot in slots(kit):
        await slot.set(1)
        with pytest.raises(RuntimeError, match="no"):
            await slot.update(fail)
        with pytest.raises(bk.UserError, match="value is a set"):
            await slot.update(lambda value: {value})
        assert await slot.update(lambda value: value + 1) == 2


async def test_an_update_inside_of_itself_is_refused_and_one_beside_it_is_not(kit: bk.Kit) -> None:
    mine, other = kit.records.state("plan", **OF_BTC), kit.records.state("other", **OF_BTC)

    async def again(value: int) -> int:
        await other.update(lambda count: count + 1, 0)
        await asyncio.gather(mine.update(lambda value: value, 0))
        return value

    with pytest.raises(bk.UserError, match="updates the same record"):
        await mine.update(again, 0)
    assert (await mine.get(), await other.get()) == (None, 1)

    late: list[asyncio.Task[int]] = []

    async def leave_behind(value: int) -> int:
        late.append(asyncio.create_task(after(gate)))
        return value + 1

    async def after(gate: asyncio.Event) -> int:
        await gate.wait()
        return int(await mine.update(lambda value: value + 10, 0))

    gate = asyncio.Event()
    await mine.update(leave_behind, 0)
    gate.set()
    assert await late[0] == 11


async def test_a_cancelled_update_lets_the_next_one_through(kit: bk.Kit) -> None:
    state = kit.records.state("plan", **OF_BTC)
    begun, never = asyncio.Event(), asyncio.Event()

    async def hang(value: object) -> object:
        begun.set()
        await never.wait()
        return value

    first = asyncio.create_task(state.update(hang, 0))
    await begun.wait()
    second = asyncio.create_task(state.update(lambda value: "second"))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second == "second"


async def test_each_owner_bucket_mode_and_run_has_its_own(kit: bk.Kit) -> None:
    owners: list[dict[str, Any]] = [
        OF_BTC,
        OF_BTC | {"symbol": "BTC/USDT"},
        OF_BTC | {"strategy_name": "trend@binance", "exchange_name": "x"},
        OF_BTC | {"strategy_name": "trend", "exchange_name": "binance@x"},
        {"signal_id": "trend@binance"},
        {"signal_id": "s-1"},
    ]
    runs: list[dict[str, Any]] = [
        {"mode": "live"},
        {"mode": "paper"},
        {"mode": "backtest", "run_id": "a"},
        {"mode": "backtest", "run_id": "A/../b"},
    ]
    states = [
        kit.records.state(bucket, **owner, **run) for bucket in ("plan", "..") for owner in owners for run in runs
    ]
    for number, state in enumerate(states):
        await state.set(number)
    assert [await state.get() for state in states] == list(range(len(states)))
    names: list[dict[str, Any]] = [{**OF_BTC, **run} for run in runs] + [{**OF_BTC, "frame_name": "june"}]
    sessions = [kit.records.session(**name) for name in names]
    for number, session in enumerate(sessions):
        await session.set(number)
    assert [await session.get() for session in sessions] == list(range(len(sessions)))


async def test_a_position_begins_with_what_the_strategy_noted(kit: bk.Kit) -> None:
    run = run_of(kit)
    flat = run.state("plan", NOON_MS, None, None, False)
    held = run.state("plan", NOON_MS, "s-1", None, False)
    assert await held.get("nothing") == "nothing"
    await flat.set(["reason"])
    assert await held.get() == ["reason"]
    assert await held.update(lambda notes: [*notes, "added"]) == ["reason", "added"]
    assert await flat.get() == ["reason"]
    assert await run.state("plan", NOON_MS, "s-1", None, True).get() == ["reason"], "shared is the strategy's"
    assert await run.state("plan", NOON_MS, "s-2", None, False).get() == ["reason"], "each position begins anew"
    assert await run.state("plan", NOON_MS, None, "s-1", False).get() == ["reason", "added"]
    assert await run.state("plan", NOON_MS, None, "s-3", False).get() is None, "another signal has its own alone"
    assert await kit.records.state("plan", signal_id="s-1").get() == ["reason", "added"]


async def test_a_value_of_the_future_is_not_there(kit: bk.Kit) -> None:
    run = run_of(kit)
    await run.state("plan", NOON_MS + MINUTE_MS, None, None, False).set("later")
    assert await run.state("plan", NOON_MS, None, None, False).get("nothing") == "nothing"
    assert await kit.records.state("plan", **OF_BTC).get() == "later"
    assert await kit.records.state("plan", **OF_BTC, when="2024-06-01T12:00").get() is None


WriteAt = Callable[[RunRecords, int], Awaitable[object]]
"""A write of a run by a context of some minute."""

WRITES: dict[str, WriteAt] = {
    "state.set": lambda run, when: run.state("plan", when, None, None, False).set("old"),
    "state.update": lambda run, when: run.state("plan", when, None, None, False).update(lambda found: found, "old"),
    "state of a signal": lambda run, when: run.state("plan", when, "s-1", None, False).set("old"),
    "session.set": lambda run, when: run.session(when).set("old"),
    "session.update": lambda run, when: run.session(when).update(lambda found: found, "old"),
    "memory.write": lambda run, when: run.memory("notes", when, None, None, False).write("a", "old"),
    "memory.remove": lambda run, when: run.memory("notes", when, None, None, False).remove("a"),
    "memory over a removed note": lambda run, when: run.memory("notes", when, None, None, False).write("gone", "old"),
}


async def write_at(run: RunRecords, when_ms: int, value: object) -> None:
    for held_id in (None, "s-1"):
        await run.state("plan", when_ms, held_id, None, False).set(value)
    await run.session(when_ms).set(value)
    notes = run.memory("notes", when_ms, None, None, False)
    await notes.write("a", value)
    await notes.write("gone", value)
    await notes.remove("gone")


async def seen_at(run: RunRecords, when_ms: int) -> list[object]:
    notes = run.memory("notes", when_ms, None, None, False)
    return [
        *[await run.state("plan", when_ms, held_id, None, False).get() for held_id in (None, "s-1")],
        await run.session(when_ms).get(),
        [(entry.memory_id, entry.value, entry.removed) for entry in await notes.list(removed=True)],
    ]


@pytest.mark.parametrize("history", [False, True], ids=["last", "history"])
@pytest.mark.parametrize("mode", ["live", "paper", "backtest"])
async def test_a_context_that_was_kept_replaces_nothing_newer(kit: bk.Kit, mode: Mode, history: bool) -> None:
    if history:
        kit.persistence.keep_history("state", "session", "memory")
    run = run_of(kit, mode, "mine" if mode == "backtest" else None)
    await write_at(run, NOON_MS, "first")
    await write_at(run, NOON_MS + MINUTE_MS, "newer")
    before = await seen_at(run, NOON_MS + MINUTE_MS)
    for name, write in WRITES.items():
        with pytest.raises(bk.LookAhead, match="is of 2024-06-01T12:01Z, later than 2024-06-01T12:00Z"):
            await write(run, NOON_MS)
        assert await seen_at(run, NOON_MS + MINUTE_MS) == before, name
    for write in WRITES.values():
        await write(run, NOON_MS + 2 * MINUTE_MS)


async def test_from_outside_nothing_newer_is_replaced_either(kit: bk.Kit) -> None:
    of_run: Any = {"mode": "backtest", "run_id": "mine"}
    await write_at(run_of(kit, **of_run), NOON_MS + MINUTE_MS, "newer")
    with pytest.raises(bk.LookAhead, match="without when="):
        await kit.records.state("plan", **OF_BTC, **of_run, when=NOON_MS).update(lambda found: found, "default")
    state = kit.records.state("plan", **OF_BTC, **of_run)
    assert await state.get() == "newer"
    await state.set("by hand")
    assert await state.get() == "by hand"


@pytest.mark.parametrize("history", [False, True], ids=["last", "history"])
@pytest.mark.parametrize("name", WRITES)
async def test_a_run_that_is_repeated_replaces_what_the_earlier_one_left(
    tmp_path: Path, name: str, history: bool
) -> None:
    kit = kit_on("memory:", tmp_path)
    if history:
        kit.persistence.keep_history("state", "session", "memory")
    kept = run_of(kit, "backtest", "mine")
    await write_at(kept, NOON_MS + 2 * MINUTE_MS, "left")
    again = run_of(kit, "backtest", "mine")
    for minute in (0, 1, 3):
        await WRITES[name](again, NOON_MS + minute * MINUTE_MS)
    if name != "memory.remove":  # there was nothing to be removed, so nothing was replaced
        with pytest.raises(bk.LookAhead, match="is of 2024-06-01T12:03Z, later than 2024-06-01T12:01Z"):
            await WRITES[name](again, NOON_MS + MINUTE_MS)
    await kit.close()


async def test_of_a_write_that_is_under_way_an_older_context_knows(tmp_path: Path) -> None:
    kit = kit_on("file:{place}/dump", tmp_path)
    run = run_of(kit, "backtest", "mine")
    newer = asyncio.create_task(run.session(NOON_MS + MINUTE_MS).set("newer"))
    await asyncio.sleep(0)
    with pytest.raises(bk.LookAhead):
        await run.session(NOON_MS).set("old")
    await newer
    assert await run.session(NOON_MS + MINUTE_MS).get() == "newer"
    await kit.close()


async def test_a_write_that_came_in_between_is_not_replaced(shared_address: str, tmp_path: Path) -> None:
    """Live, another process writes for a later minute while this one makes up its mind."""
    kits = [kit_on(shared_address, tmp_path) for _ in range(2)]
    runs = [run_of(kit) for kit in kits]

    async def slowly(found: object) -> str:
        await runs[1].session(NOON_MS + MINUTE_MS).set("newer")
        return "old"

    with pytest.raises(bk.LookAhead):
        await runs[0].session(NOON_MS).update(slowly)
    assert await runs[0].session(NOON_MS + MINUTE_MS).get() == "newer"
    for kit in kits:
        await kit.close()


async def test_a_store_without_compare_and_set_serves_one_program(tmp_path: Path) -> None:
    class Plain(MemoryStore):
        capabilities = frozenset((Capability.ORDERED_SCAN,))

        async def get(self, contract: Contract, key: Key) -> Record | None:
            found = await super().get(contract, key)
            await asyncio.sleep(0)
            return found

        async def put(self, write: Write) -> Record:
            if write.expect != ANY:
                raise bk.UserError("this store cannot compare and set")
            return await super().put(write)

    kit = bk.Kit(tmp_path)
    kit.persistence.bind("*", Plain())
    state = kit.records.state("count", **OF_BTC)
    await asyncio.gather(*(state.update(lambda count: count + 1, 0) for _ in range(20)))
    assert await state.get() == 20
    memory = kit.records.memory("notes", **OF_BTC)
    await memory.write("a", "note")
    assert (await memory.remove("a"), await memory.list()) == (True, [])


def test_bad_names_are_refused_and_named(kit: bk.Kit) -> None:
    records = kit.records
    with pytest.raises(bk.UserError, match="symbol is None"):
        records.state("plan", strategy_name="trend", exchange_name="binance")
    with pytest.raises(bk.UserError, match="by signal_id and by strategy"):
        records.state("plan", signal_id="s-1", symbol="BTCUSDT")
    with pytest.raises(bk.UserError, match="bucket is ''"):
        records.state("", **OF_BTC)
    with pytest.raises(bk.UserError, match="signal_id is 7"):
        records.state("plan", signal_id=7)  # type: ignore[arg-type]
    with pytest.raises(bk.UserError, match="name its run"):
        records.state("plan", **OF_BTC, mode="backtest")
    with pytest.raises(bk.UserError, match="no run id"):
        records.session(**OF_BTC, run_id="a")
    with pytest.raises(bk.UserError, match="choose one"):
        run_of(kit).state("plan", NOON_MS, None, "s-1", True)
