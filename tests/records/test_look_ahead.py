"""No read at a moment returns anything that was written for a later one: every record, every way to read it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from tests.records.conftest import Minute, kit_on, run_of
from tests.records.stores import MONGO, STORES, address_on

import backtest_kit as bk

TIMES = st.integers(0, 20).map(lambda minute: minute * 60_000)
HELD = st.sampled_from([None, "s-1"])
NAMES = st.sampled_from(["a", "b", "c"])
WRITES = st.tuples(st.sampled_from(["state", "session", "memory", "remove", "measure", "read"]), TIMES, HELD, NAMES)


class Reader:
    """Writes values that say when they were written, and looks at every record at some moment."""

    def __init__(self, kit: bk.Kit) -> None:
        self.kit = kit
        self.run = run_of(kit)

        @kit.records.measure.cached(name="ask", version="1")
        async def ask(ctx: Any, name: str) -> Any:
            return {"written_at": ctx.when_ms, "text": f"word {name}"}

        self.ask = ask

    async def write(self, kind: str, when_ms: int, held_id: str | None, name: str) -> None:
        value = {"written_at": when_ms, "text": f"word {name}"}
        memory = self.run.memory("m", when_ms, held_id, None, False)
        if kind == "state":
            await self.run.state(name, when_ms, held_id, None, False).set(value)
        elif kind == "session":
            await self.run.session(when_ms).set(value)
        elif kind == "memory":
            await memory.write(name, value)
        elif kind == "remove":
            await memory.remove(name)
        elif kind == "measure":
            await self.ask(Minute(when_ms=when_ms), name)
        else:
            await self.look(when_ms, held_id)

    async def look(self, when_ms: int, held_id: str | None) -> None:
        seen = [await self.run.session(when_ms).get()]
        for name in "abc":
            seen.append(await self.run.state(name, when_ms, held_id, None, False).get())
            seen.append(await self.run.memory("m", when_ms, held_id, None, False).read(name))
        memory = self.run.memory("m", when_ms, held_id, None, False)
        for entries in (await memory.list(), await memory.list(removed=True), await memory.search("word a b c", k=9)):
            seen += [entry.value for entry in entries]
            assert all(entry.when_ms is not None and entry.when_ms <= when_ms for entry in entries)
        found = [value["written_at"] for value in seen if value is not None]
        assert all(written_at <= when_ms for written_at in found), (when_ms, found)

    async def look_through(self, when_ms: int) -> None:
        """Also by the doors of the contracts."""
        persistence = self.kit.persistence
        for door in (persistence.state, persistence.session, persistence.memory):
            values = [value.get("value", value) async for _, value in door.list(when=when_ms)]
            assert all(value["written_at"] <= when_ms for value in values)


EXAMPLES = {"memory": 60, MONGO: 5}


@pytest.mark.parametrize("store", [*STORES, MONGO])
def test_nothing_of_a_later_moment_is_seen(
    store: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(max_examples=EXAMPLES.get(store, 12))
    @given(st.lists(WRITES, max_size=20), TIMES, HELD)
    def law(writes: list[tuple[str, int, str | None, str]], when_ms: int, held_id: str | None) -> None:
        async def check(address: str, place: Path) -> None:
            kit = kit_on(address, place)
            reader = Reader(kit)
            for write in writes:
                await reader.write(*write)
            await reader.look(when_ms, held_id)
            await reader.look_through(when_ms)
            for name in "abc":
                answer = await reader.ask(Minute(when_ms=when_ms), name)
                assert answer["written_at"] <= when_ms
            await kit.close()

        with address_on(store, request) as address:
            asyncio.run(check(address, tmp_path_factory.mktemp("law")))

    law()


@pytest.mark.parametrize("store", STORES)
async def test_what_is_hidden_does_not_move_a_ranking(store: str, tmp_path: Path) -> None:
    """A search at a moment ranks as if the notes of later moments had never been made."""
    texts = ["bull bull market", "bear market", "bull bear", "market market market calm", "bull"]
    with_future, without = kit_on(STORES[store], tmp_path / "a"), kit_on(STORES[store], tmp_path / "b")
    for kit in (with_future, without):
        memory = run_of(kit).memory("m", 60_000, None, None, False)
        for number, text in enumerate(texts):
            await memory.write(f"n{number}", text)
    future = run_of(with_future).memory("m", 120_000, None, None, False)
    for number in range(30):
        await future.write(f"later{number}", "bear calm market")
    answers = []
    for kit in (with_future, without):
        memory = run_of(kit).memory("m", 60_000, None, None, False)
        answers.append([[e.memory_id for e in await memory.search(q)] for q in ("bull", "bear calm", "market bull")])
        await kit.close()
    assert answers[0] == answers[1]
    assert answers[0][0]
