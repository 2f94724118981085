"""No read at a moment returns anything that was written for a later one: every record, every way to read it.

Nor does a write at a moment replace what the same run has written for a later one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st
from tests.records.conftest import Minute, kit_on, run_of
from tests.records.stores import MONGO, STORES, address_on
from tests.samples import size

import backtest_kit as bk
from backtest_kit.model.identity import Mode

TIMES = st.integers(0, 20).map(lambda minute: minute * 60_000)
LATER = 20 * 60_000
HELD = st.sampled_from([None, "s-1"])
NAMES = st.sampled_from(["a", "b", "c"])
KINDS = ["state", "session", "memory", "remove", "measure", "once", "read", "again"]
WRITES = st.tuples(st.sampled_from(KINDS), TIMES, HELD, NAMES)
MODES: Any = st.sampled_from(["live", "backtest"])


class Reader:
    """Writes values that say when they were written, and looks at every record at some moment."""

    def __init__(self, kit: bk.Kit, mode: Mode) -> None:
        self.kit = kit
        self.mode: Mode = mode
        self.run_id = "mine" if mode == "backtest" else None
        self.run = run_of(kit, mode, self.run_id)
        self.latest_ms: dict[tuple[str, ...], int] = {}
        """The latest write of this repetition of the run under each key."""
        self.window: tuple[int, int] | None = None
        """Of the function that is due every five minutes, the window that it ran in last, and when that was."""

        @kit.records.measure.cached(name="ask", version="1")
        async def ask(ctx: Any, name: str) -> Any:
            return {"written_at": ctx.when_ms, "text": f"word {name}"}

        @kit.records.interval.once("5m", name="due", version="1")
        async def due(ctx: Any) -> bool:
            return True

        self.ask, self.due = ask, due

    def minute(self, when_ms: int) -> Minute:
        return Minute(when_ms=when_ms, mode=self.mode, run_id=self.run_id)

    async def write(self, kind: str, when_ms: int, held_id: str | None, name: str) -> None:
        if kind == "measure":
            await self.ask(self.minute(when_ms), name)
        elif kind == "once":
            await self.do_once(when_ms)
        elif kind == "read":
            await self.look(when_ms, held_id)
        elif kind == "again":
            if self.mode == "backtest":
                self.run = run_of(self.kit, self.mode, self.run_id)
                self.latest_ms.clear()
        else:
            await self.replace(kind, when_ms, held_id, name)

    async def replace(self, kind: str, when_ms: int, held_id: str | None, name: str) -> None:
        value = {"written_at": when_ms, "text": f"word {name}"}
        memory = self.run.memory("m", when_ms, held_id, None, False)
        state, session = self.run.state(name, when_ms, held_id, None, False), self.run.session(when_ms)
        own = (held_id or "", name)
        writes: dict[str, tuple[tuple[str, ...], Callable[[], Awaitable[object]]]] = {
            "state": (("state", *own), partial(state.set, value)),
            "session": (("session",), partial(session.update, lambda found: value)),
            "memory": (("memory", *own), partial(memory.write, name, value)),
            "remove": (("memory", *own), partial(memory.remove, name)),
        }
        key, write = writes[kind]
        try:
            done = await write()
        except bk.LookAhead:
            assert self.latest_ms.get(key, -1) > when_ms
        else:
            assert self.latest_ms.get(key, -1) <= when_ms, (key, when_ms, self.latest_ms)
            if done is not False:
                self.latest_ms[key] = when_ms

    async def do_once(self, when_ms: int) -> None:
        start_ms = when_ms - when_ms % (5 * 60_000)
        window_ms, taken_ms = self.window or (-1, -1)
        mine = self.mode == "live" or self.latest_ms.get(("due",), -1) >= taken_ms
        used = start_ms <= window_ms and (mine or taken_ms <= when_ms)
        assert bool(await self.due(self.minute(when_ms))) is not used
        if not used:
            self.window = (start_ms, when_ms)
            self.latest_ms["due",] = when_ms

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
            found = door.list(when=when_ms, mode=self.mode, run=self.run_id)
            values = [value.get("value", value) async for _, value in found]
            assert all(value["written_at"] <= when_ms for value in values)


EXAMPLES = {"memory": size(20, 60), MONGO: size(2, 5)}


@pytest.mark.sampled
@pytest.mark.parametrize("store", [*STORES, MONGO])
def test_nothing_of_a_later_moment_is_seen(
    store: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(max_examples=EXAMPLES.get(store, size(4, 12)))
    @example([("once", LATER, None, "a"), ("again", 0, None, "a"), ("once", 0, None, "a")], 0, None, "backtest")
    @example([("once", LATER, None, "a"), ("once", 0, None, "a")], 0, None, "backtest")
    @example([("session", LATER, None, "a"), ("session", 0, None, "a")], 0, None, "backtest")
    @given(st.lists(WRITES, max_size=20), TIMES, HELD, MODES)
    def law(writes: list[tuple[str, int, str | None, str]], when_ms: int, held_id: str | None, mode: Mode) -> None:
        async def check(address: str, place: Path) -> None:
            kit = kit_on(address, place)
            reader = Reader(kit, mode)
            for write in writes:
                await reader.write(*write)
            await reader.look(when_ms, held_id)
            await reader.look_through(when_ms)
            for name in "abc":
                answer = await reader.ask(reader.minute(when_ms), name)
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
