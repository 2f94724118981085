"""Every store against a model of ordinary dictionaries, under whatever hypothesis thinks of."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from tests.samples import size

from backtest_kit.errors import Conflict
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.contracts import CONTRACTS, Contract, WriteRule
from backtest_kit.persist.store import ABSENT, ANY, Capability, Expect, Key, Store, Write
from backtest_kit.persist.urls import store_at

ROWS = [CONTRACTS[name] for name in ("signal", "memory", "storage", "log", "measure")]
PARTS = st.sampled_from(["", "a", "A", "ab", "a/b", "..", "%", "x" * 200, "\u00e9", "e\u0301"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def names(draw: st.DrawFn) -> tuple[Contract, Key]:
    row = draw(st.sampled_from(ROWS))
    return row, tuple(draw(st.booleans()) if field == "backtest" else draw(PARTS) for field in row.key_fields)


class Model:
    """What a store is, in so many words."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, Key], tuple[int, Any, int | None, bool]] = {}

    def judge(self, write: Write) -> bool:
        entry = self.entries.get((write.contract.name, write.key))
        rev = None if entry is None else entry[0]
        return write.expect == ANY or (rev is None if write.expect == ABSENT else rev == write.expect)

    def apply(self, write: Write) -> None:
        name = (write.contract.name, write.key)
        entry = self.entries.get(name)
        if entry is not None and write.contract.write_rule is not WriteRule.REPLACE:
            return
        self.entries.pop(name, None)
        self.entries[name] = (entry[0] + 1 if entry else 1, write.value, write.when, write.removed)

    def listed(self, row: Contract, prefix: Key, removed: bool) -> list[Key]:
        return [
            key
            for (contract, key), entry in self.entries.items()
            if contract == row.name and key[: len(prefix)] == prefix and (removed or not entry[3])
        ]


class StoreMachine(RuleBasedStateMachine):
    known = Bundle("known")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.place = Path(tempfile.mkdtemp())
        self.store = self.make()
        self.model = Model()

    def make(self) -> Store:
        raise NotImplementedError

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.run(self.store.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.place)

    def write(self, name: tuple[Contract, Key], value: Any, how: str, removed: bool, when: int | None) -> Write:
        entry = self.model.entries.get((name[0].name, name[1]))
        rev = entry[0] if entry else 0
        expect: Expect = {"any": ANY, "absent": ABSENT, "right": rev or ABSENT, "stale": rev + 7}[how]
        return Write(*name, value, when=when, expect=expect, removed=removed)

    def may_write(self, name: tuple[Contract, Key]) -> bool:
        """Ids of what is only appended are unique by construction: files look for no older one."""
        row, key = name
        return row.write_rule is not WriteRule.APPEND or (row.name, key) not in self.model.entries

    @rule(target=known, name=names())
    def learn(self, name: tuple[Contract, Key]) -> tuple[Contract, Key]:
        return name

    @rule(
        name=known,
        value=VALUES,
        how=st.sampled_from(["any", "any", "right", "absent", "stale"]),
        removed=st.booleans(),
        when=st.none() | st.integers(0, 10),
    )
    def put(self, name: tuple[Contract, Key], value: Any, how: str, removed: bool, when: int | None) -> None:
        if not self.may_write(name):
            return
        write = self.write(name, value, how, removed, when)
        if self.model.judge(write):
            self.model.apply(write)
            record = self.run(self.store.put(write))
            assert record.rev == self.model.entries[write.contract.name, write.key][0]
        else:
            try:
                self.run(self.store.put(write))
            except Conflict:
                return
            raise AssertionError("a write was done whose expectation does not hold")

    @rule(chosen=st.lists(st.tuples(known, VALUES, st.sampled_from(["any", "right", "stale"])), max_size=4))
    def batch(self, chosen: list[tuple[tuple[Contract, Key], Any, str]]) -> None:
        if Capability.ATOMIC_BATCH not in self.store.capabilities:
            return
        unique = {
            (name[0].name, name[1]): self.write(name, value, how, False, None)
            for name, value, how in chosen
            if self.may_write(name)
        }
        writes = list(unique.values())
        if all(self.model.judge(write) for write in writes):
            self.run(self.store.batch(writes))
            for write in writes:
                self.model.apply(write)
        else:
            try:
                self.run(self.store.batch(writes))
            except Conflict:
                return
            raise AssertionError("a batch was done of which an expectation does not hold")

    @rule(
        name=known,
        depth=st.integers(0, 3),
        limit=st.none() | st.integers(0, 5),
        newest=st.booleans(),
        removed=st.booleans(),
    )
    def scan(self, name: tuple[Contract, Key], depth: int, limit: int | None, newest: bool, removed: bool) -> None:
        row, key = name
        prefix = key[:depth]

        async def collect() -> list[Key]:
            records = self.store.scan(row, prefix, limit=limit, newest_first=newest, include_removed=removed)
            return [record.key async for record in records]

        expected = self.model.listed(row, prefix, removed)[:: -1 if newest else 1]
        assert self.run(collect()) == expected[:limit]

    @rule()
    def reopen(self) -> None:
        if Capability.DURABLE in self.store.capabilities:
            self.run(self.store.close())
            self.store = self.make()

    @invariant()
    def same_as_the_model(self) -> None:
        for (contract, key), entry in self.model.entries.items():
            record = self.run(self.store.get(CONTRACTS[contract], key))
            assert (record.rev, record.when, record.removed) == (entry[0], entry[2], entry[3])
            assert repr(record.value) == repr(entry[1])


class MemoryMachine(StoreMachine):
    def make(self) -> Store:
        return MemoryStore()


class SqliteMachine(StoreMachine):
    def make(self) -> Store:
        return store_at(f"sqlite:{self.place / 'bot.db'}")


class FileMachine(StoreMachine):
    def make(self) -> Store:
        return store_at(f"file:{self.place / 'dump'}")


OPTIONS = {"deadline": None, "suppress_health_check": list(HealthCheck)}

pytestmark = pytest.mark.sampled

TestMemoryModel = MemoryMachine.TestCase
TestMemoryModel.settings = settings(max_examples=size(20, 60), stateful_step_count=30, **OPTIONS)  # type: ignore[arg-type]
TestSqliteModel = SqliteMachine.TestCase
TestSqliteModel.settings = settings(max_examples=size(10, 30), stateful_step_count=25, **OPTIONS)  # type: ignore[arg-type]
TestFileModel = FileMachine.TestCase
TestFileModel.settings = settings(max_examples=size(10, 30), stateful_step_count=25, **OPTIONS)  # type: ignore[arg-type]
