"""Memory: notes are found by name, by time and by what they say, before and after a signal."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.records.conftest import MINUTE_MS, NOON_MS, kit_on, run_of

import backtest_kit as bk
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Record, Write
from backtest_kit.records import memory as memory_module
from backtest_kit.records.memory import Memory
from backtest_kit.records.search import TextIndex

OF_BTC: Any = {"strategy_name": "trend", "exchange_name": "binance", "symbol": "BTCUSDT"}


def memory_at(kit: bk.Kit, when_ms: int, held_id: str | None = None, *, shared: bool = False) -> Memory:
    return run_of(kit).memory("analysis", when_ms, held_id, None, shared)


async def names(memory: Memory) -> list[str]:
    return [entry.memory_id for entry in await memory.list()]


async def test_a_note_is_read_listed_and_removed(kit: bk.Kit) -> None:
    memory = memory_at(kit, NOON_MS)
    assert (await memory.read("regime"), await memory.list(), await memory.search("bull")) == (None, [], [])
    await memory.write("regime", "bullish", role="assistant")
    await memory.write("levels", {"support": 60_000, "why": ["liquidity", None]})
    assert await memory.read("regime") == "bullish"
    newest, oldest = await memory.list()
    assert (newest.memory_id, newest.value) == ("levels", {"support": 60_000, "why": ["liquidity", None]})
    assert (oldest.memory_id, oldest.value, oldest.role) == ("regime", "bullish", "assistant")
    assert oldest.when is not None
    assert oldest.when.isoformat() == "2024-06-01T12:00:00+00:00"
    assert oldest.owner == "trend@binance@BTCUSDT"
    assert await memory.list(limit=1) == [newest]
    assert await memory.remove("regime") is True
    assert await memory.remove("regime") is False
    assert (await memory.read("regime"), await names(memory)) == (None, ["levels"])
    assert await memory.search("bullish") == []
    await memory.write("regime", "bearish")
    assert await memory.read("regime") == "bearish"


async def test_what_was_removed_is_kept_for_the_audit(kit: bk.Kit) -> None:
    memory = memory_at(kit, NOON_MS)
    await memory.write("thought", "buy everything")
    await memory.remove("thought")
    (kept,) = await memory.list(removed=True)
    assert (kept.removed, kept.value) == (True, "buy everything")
    record = await kit.persistence.store_for(CONTRACTS["memory"], "live").get(
        CONTRACTS["memory"], ("trend@binance@BTCUSDT", "analysis", "thought")
    )
    assert record is not None
    assert record.removed


async def test_what_was_reasoned_before_the_signal_is_found_after_it(kit: bk.Kit) -> None:
    flat, held = memory_at(kit, NOON_MS), memory_at(kit, NOON_MS + MINUTE_MS, "s-1")
    await flat.write("thesis", "funding is negative, shorts are crowded")
    await flat.write("size", "half")
    await held.write("thesis", "squeeze has begun")
    await held.write("exit", "when funding turns")
    assert await held.read("size") == "half"
    assert await held.read("thesis") == "squeeze has begun", "the position's own note hides the strategy's"
    assert await names(held) == ["exit", "thesis", "size"]
    assert {entry.memory_id for entry in await held.search("funding shorts")} == {"exit"}
    assert [message["content"] for message in await held.as_messages()] == [
        "half", "squeeze has begun", "when funding turns",
    ]  # fmt: skip
    later = NOON_MS + 2 * MINUTE_MS
    assert await names(memory_at(kit, later)) == ["size", "thesis"], "flat again: its own notes"
    assert await memory_at(kit, later).read("thesis") == "funding is negative, shorts are crowded"
    assert await names(memory_at(kit, later, "s-2")) == ["size", "thesis"]
    assert await names(run_of(kit).memory("analysis", later, None, "s-1", False)) == ["exit", "thesis"]
    assert await held.remove("thesis")
    assert await held.read("thesis") is None, "nor is the strategy's uncovered"
    assert [entry.removed for entry in await held.list(removed=True)] == [True, False, False]
    shared = memory_at(kit, later, "s-1", shared=True)
    await shared.write("lesson", "wait for the close")
    assert await memory_at(kit, later).read("lesson") == "wait for the close"


@pytest.mark.parametrize("noted", [True, False], ids=["noted in it", "noted before it"])
async def test_what_a_position_removes_is_gone_for_it_and_no_other(kit: bk.Kit, noted: bool) -> None:
    flat, held = memory_at(kit, NOON_MS), memory_at(kit, NOON_MS + MINUTE_MS, "s-1")
    await flat.write("thesis", "shorts are crowded")
    await flat.write("size", "half")
    if noted:
        await held.write("thesis", "squeeze has begun")
    for expected in (True, False):
        assert await held.remove("thesis") is expected
        assert (await held.read("thesis"), await names(held)) == (None, ["size"])
        assert (await held.search("thesis shorts squeeze"), len(await held.as_messages())) == ([], 1)
    (mark,) = [entry for entry in await held.list(removed=True) if entry.removed]
    assert (mark.owner, mark.value) == ("s-1", "squeeze has begun" if noted else "shorts are crowded")
    later = NOON_MS + 2 * MINUTE_MS
    for other in (memory_at(kit, later), memory_at(kit, later, "s-2"), memory_at(kit, later, "s-1", shared=True)):
        assert await other.read("thesis") == "shorts are crowded"
        assert await names(other) == ["size", "thesis"]
    assert await memory_at(kit, NOON_MS, "s-1").read("thesis") == "shorts are crowded", "the mark is of a later minute"
    await memory_at(kit, later, "s-1").write("thesis", "it was right")
    assert await memory_at(kit, later, "s-1").read("thesis") == "it was right"
    assert await memory_at(kit, later, shared=True).remove("thesis")
    assert await names(memory_at(kit, later, "s-1")) == ["thesis", "size"], "its own"


async def test_what_a_position_removes_is_there_before_that_where_history_is_kept(kit: bk.Kit) -> None:
    kit.persistence.keep_history("memory")
    minutes = [NOON_MS + number * MINUTE_MS for number in range(4)]
    await memory_at(kit, minutes[0]).write("thesis", "first")
    await memory_at(kit, minutes[1], "s-1").write("thesis", "second")
    await memory_at(kit, minutes[2], "s-1").remove("thesis")
    await memory_at(kit, minutes[3], "s-1").write("thesis", "third")
    seen = [memory_at(kit, when_ms, "s-1") for when_ms in minutes]
    assert [await memory.read("thesis") for memory in seen] == ["first", "second", None, "third"]
    assert [[entry.value for entry in await memory.list()] for memory in seen] == [["first"], ["second"], [], ["third"]]


async def test_search_ranks_by_what_is_there(kit: bk.Kit) -> None:
    memory = memory_at(kit, NOON_MS)
    await memory.write("a", "the market is trending up, funding funding funding")
    await memory.write("b", "funding rates are a little above zero in a calm market that otherwise does nothing at all")
    await memory.write("c", {"regime": "Café society", "level": 61_250})
    await memory.write("d", "比特币价格上涨")
    await memory.write("e", "nothing of that", text="hidden keyword")
    assert [entry.memory_id for entry in await memory.search("funding")] == ["a", "b"]
    assert [entry.memory_id for entry in await memory.search("funding", k=1)] == ["a"]
    assert [entry.memory_id for entry in await memory.search("TREND cafe")] in (["a", "c"], ["c", "a"])
    assert [entry.memory_id for entry in await memory.search("61250")] == ["c"]
    assert [entry.memory_id for entry in await memory.search("上涨")] == ["d"]
    assert [entry.memory_id for entry in await memory.search("keyword")] == ["e"]
    assert await memory.search("that") == await memory.search("otherwise")
    for nothing in ("", "  ", '"', "NEAR(", "zebra", "*", "AND OR NOT"):
        found = [entry.memory_id for entry in await memory.search(nothing)]
        assert found == [], nothing
    assert await memory.search("funding", k=0) == []
    with pytest.raises(bk.UserError, match="k is -1"):
        await memory.search("funding", k=-1)
    assert (await memory.list(limit=0), await memory.as_messages(limit=0)) == ([], [])
    for listed in (memory.list, memory.as_messages):
        with pytest.raises(bk.UserError, match="limit is -1"):
            await listed(limit=-1)
    await memory.write("a", "rewritten")
    assert [entry.memory_id for entry in await memory.search("funding rewritten")] in (["a", "b"], ["b", "a"])


async def test_what_another_program_notes_is_found(shared_address: str, tmp_path: Path) -> None:
    mine, other = (kit_on(shared_address, tmp_path) for _ in range(2))
    here, there = memory_at(mine, NOON_MS), memory_at(other, NOON_MS)
    for number in range(5):
        await there.write(f"n{number}", f"remark number {number}")
        assert len(await here.list()) == number + 1
        assert (await here.search(f"number {number}"))[0].memory_id == f"n{number}"
    await there.remove("n2")
    await there.write("n0", "replaced")
    assert await names(here) == ["n0", "n4", "n3", "n1"]
    assert [entry.memory_id for entry in await here.search("replaced")] == ["n0"]
    for kit in (mine, other):
        await kit.close()


async def test_a_list_is_right_while_others_write(kit: bk.Kit) -> None:
    """Random writes and removals of one program, with readers at the same time, end in what the store has."""
    chance = random.Random(7)  # noqa: S311
    memory = memory_at(kit, NOON_MS)
    stop = asyncio.Event()

    async def read_on() -> None:
        while not stop.is_set():
            await memory.list()
            await memory.search("word")
            await asyncio.sleep(0)

    readers = [asyncio.create_task(read_on()) for _ in range(2)]
    expected: dict[str, str] = {}
    for step in range(150):
        name = f"n{chance.randrange(20)}"
        if chance.random() < 0.3:
            assert await memory.remove(name) == (expected.pop(name, None) is not None)
        else:
            expected.pop(name, None)
            expected[name] = f"word {step}"
            await memory.write(name, expected[name])
    stop.set()
    await asyncio.gather(*readers)
    assert {entry.memory_id: entry.value for entry in await memory.list()} == expected
    assert await names(memory) == list(reversed(expected))


async def test_only_what_is_new_is_read_again(kit: bk.Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(kit)
    memory = run.memory("analysis", NOON_MS, None, None, False)
    for number in range(60):
        await memory.write(f"n{number}", f"word {number}")
    for _ in range(2):
        await memory.list()
    store = kit.persistence.store_for(CONTRACTS["memory"], "live")
    scan, read = store.scan, list[str]()

    async def counting(*arguments: Any, **options: Any) -> Any:
        async for record in scan(*arguments, **options):
            read.append(str(record.key[-1]))
            yield record

    monkeypatch.setattr(store, "scan", counting)
    await memory.write("new", "word")
    assert len(await memory.list()) == 61
    assert read == ["new", "n59"]
    text_of, texts = memory_module._text, list[str]()

    def counting_text(record: Record) -> str:
        texts.append(str(record.key[-1]))
        return text_of(record)

    monkeypatch.setattr(memory_module, "_text", counting_text)
    assert len(await memory.search("word", k=1_000)) == 61
    assert len(texts) == 61
    texts.clear()
    await memory.write("newer", "word")
    await memory.remove("n0")
    assert len(await memory.search("word", k=1_000)) == 61
    assert texts == ["newer"], "the index takes in what is new, and nothing else"
    assert len(await run.memory("analysis", NOON_MS, "s-1", None, False).search("word", k=1_000)) == 61
    assert texts == ["newer"], "the index of the strategy serves its positions"
    assert len(read) < 20


async def test_many_buckets_are_right_though_few_are_kept_at_hand(kit: bk.Kit) -> None:
    run = run_of(kit)
    for _ in range(2):
        for number in range(40):
            memory = run.memory(f"b{number}", NOON_MS, "s-1", None, False)
            await memory.write("note", f"word {number}")
            assert [entry.value for entry in await memory.search("word")] == [f"word {number}"]


async def test_a_note_that_is_rewritten_while_it_is_removed_goes_as_well(tmp_path: Path) -> None:
    class Overtaken(MemoryStore):
        rewrites = 3

        async def put(self, write: Write) -> Record:
            if write.removed and self.rewrites:
                self.rewrites -= 1
                await super().put(Write(write.contract, write.key, f"version {self.rewrites}", when=write.when))
            return await super().put(write)

    kit = bk.Kit(tmp_path)
    kit.persistence.bind("*", Overtaken())
    memory = memory_at(kit, NOON_MS)
    await memory.write("thought", "first")
    assert await memory.remove("thought")
    assert await memory.list() == []
    assert [entry.value for entry in await memory.list(removed=True)] == ["version 0"]


async def test_a_chat_gets_the_newest_notes_oldest_first(kit: bk.Kit) -> None:
    await memory_at(kit, NOON_MS).write("system", "You trade.", role="system")
    await memory_at(kit, NOON_MS + MINUTE_MS).write("market", {"price": 61_000.5, "trend": "上"})
    await memory_at(kit, NOON_MS + 2 * MINUTE_MS).write("thought", "I wait.", role="assistant")
    memory = memory_at(kit, NOON_MS + 3 * MINUTE_MS)
    messages = await memory.as_messages()
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert json.loads(messages[1]["content"]) == {"price": 61_000.5, "trend": "上"}
    assert "上" in messages[1]["content"]
    assert await memory.as_messages(limit=1) == [{"role": "assistant", "content": "I wait."}]


async def test_a_note_written_through_the_contract_is_a_note(kit: bk.Kit) -> None:
    key: Any = {"signal_id": "trend@binance@BTCUSDT", "bucket_name": "analysis", "memory_id": "by-hand"}
    await kit.persistence.memory.write({"value": "of another shape"}, **key)
    memory = kit.records.memory("analysis", **OF_BTC)
    assert await memory.read("by-hand") == {"value": "of another shape"}
    assert [entry.memory_id for entry in await memory.search("shape")] == ["by-hand"]
    assert (await memory.list())[0].when is None
    await kit.persistence.memory.remove(**key)
    assert await memory.list() == []


async def test_bad_arguments_are_refused_and_named(kit: bk.Kit) -> None:
    memory = memory_at(kit, NOON_MS)
    with pytest.raises(bk.UserError, match="role of 'a' is 'human'"):
        await memory.write("a", "x", role="human")  # type: ignore[arg-type]
    with pytest.raises(bk.UserError, match="text of 'a' is 7"):
        await memory.write("a", "x", text=7)  # type: ignore[arg-type]
    with pytest.raises(bk.UserError, match="query is None"):
        await memory.search(None)  # type: ignore[arg-type]
    with pytest.raises(bk.UserError, match="memoryId is 7"):
        await memory.write(7, "x")  # type: ignore[arg-type]
    with pytest.raises(bk.UserError, match="value is a set"):
        await memory.write("a", {1})
    assert await memory.list() == []


async def test_a_strategy_that_reasons(kit: bk.Kit, backtest: Callable[..., Any]) -> None:
    """Notes of `get_signal` reach `manage` of the position that came of them, over a real replay."""
    found: list[tuple[str, str, str]] = []

    async def get_signal(ctx: bk.Context) -> bk.Signal | None:
        memory = ctx.memory("analysis")
        await memory.write("thesis", f"opened because of {ctx.when:%H:%M}")
        return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=1, stop_loss_pct=1, minutes=60)

    async def manage(ctx: bk.Context) -> None:
        assert ctx.position is not None
        if ctx.position.minutes_open != 1:
            return
        thesis = await ctx.memory("analysis").read("thesis")
        await ctx.memory("analysis").write("review", f"holding, {thesis}")
        (best, *_) = await ctx.memory("analysis").search("opened because", k=1)
        found.append((ctx.position.signal_id, thesis, best.memory_id))

    result = await backtest(get_signal, manage=manage)
    assert len(found) == len({signal_id for signal_id, _, _ in found}) > 3
    for trade in result.trades:
        thesis = next((text for signal_id, text, _ in found if signal_id == trade.signal_id), None)
        if thesis is None:
            continue
        assert thesis == f"opened because of {trade.opened_at:%H:%M}"
        own = kit.records.memory("analysis", signal_id=trade.signal_id, mode="backtest", run_id=result.run_id)
        assert [entry.value for entry in await own.list()] == [f"holding, {thesis}"]


def test_an_index_needs_full_text_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backtest_kit.records.search._SCHEMA", "CREATE VIRTUAL TABLE entries USING fts99(text)")
    with pytest.raises(bk.UserError, match="built with FTS5"):
        TextIndex()
