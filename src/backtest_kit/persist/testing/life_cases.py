"""Cases of the life of a store: opening, closing, two of them over one place, namespaces."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from backtest_kit.errors import BacktestKitError
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.store import ABSENT, Capability, Store, Write
from backtest_kit.persist.testing.harness import (
    MEMORY,
    Harness,
    collect,
    each,
    each_contract,
    has,
    memory_write,
    sample_key,
)

SIGNAL = CONTRACTS["signal"]
KEY = sample_key(SIGNAL)


async def value_of(store: Store) -> object:
    found = await store.get(SIGNAL, KEY)
    return None if found is None else found.value


class LifeCases(Harness):
    async def test_opening_twice_is_opening_once(self, store: Store) -> None:
        await store.put(Write(SIGNAL, KEY, "kept"))
        await store.open()
        await asyncio.gather(*(store.open() for _ in range(5)))
        await self.expect(store, SIGNAL, KEY, value="kept")

    async def test_first_access_from_many_tasks(self, place: Path) -> None:
        store = self.make_store(place)
        assert (
            await asyncio.gather(*(store.get(MEMORY, ("a", "b", str(number))) for number in range(20))) == [None] * 20
        )
        await store.close()

    async def test_first_writes_from_many_tasks(self, place: Path) -> None:
        store = self.make_store(place)
        writes = [store.put(memory_write(str(number), number)) for number in range(20)]
        opened = asyncio.gather(*(store.open() for _ in range(5)))
        assert [record.rev for record in await asyncio.gather(*writes)] == [1] * 20
        await opened
        await store.close()

    async def test_failed_opening_is_tried_again(self, place: Path) -> None:
        mend = self.obstruct(place)
        if mend is None:
            pytest.skip("this store says that its opening cannot fail: obstruct() returns None")
        store = self.make_store(place)
        failures = await asyncio.gather(*(store.open() for _ in range(3)), return_exceptions=True)
        assert all(isinstance(failure, BacktestKitError) for failure in failures)
        with pytest.raises(BacktestKitError):
            await store.put(Write(SIGNAL, KEY, "value"))
        mend()
        await store.put(Write(SIGNAL, KEY, "value"))
        assert await value_of(store) == "value"
        await store.close()

    async def test_closing_twice_and_before_opening(self, place: Path) -> None:
        store = self.make_store(place)
        await store.close()
        await store.open()
        await store.close()
        await store.close()

    async def test_closed_store_opens_at_the_next_call(self, store: Store) -> None:
        await store.put(Write(SIGNAL, KEY, "kept"))
        await store.close()
        await self.expect(store, SIGNAL, KEY, value="kept")

    @each_contract
    async def test_closing_flushes_writes_under_way(self, place: Path, contract: Contract) -> None:
        store = self.make_store(place)
        keys = [sample_key(contract, f"-{number}") for number in range(10)]
        await asyncio.gather(*(store.put(Write(contract, key, "kept")) for key in keys))
        await store.close()
        again = self.make_store(place)
        found = [await again.get(contract, key) for key in keys]
        expected = 10 if has(again, Capability.DURABLE) else 0
        assert sum(record is not None for record in found) == expected
        await again.close()

    async def test_two_stores_over_one_place(self, place: Path, store: Store) -> None:
        other = self.make_store(place)
        await other.open()
        shared = has(store, Capability.SHARED)
        await store.put(Write(SIGNAL, KEY, "one"))
        assert await value_of(other) == ("one" if shared else None)
        await other.put(Write(SIGNAL, KEY, "two"))
        await self.expect(store, SIGNAL, KEY, value=("two" if shared else "one"))
        await other.close()
        await self.expect(store, SIGNAL, KEY, value=("two" if shared else "one"))

    async def test_race_between_two_stores_has_one_winner(self, place: Path, store: Store) -> None:
        if not has(store, Capability.SHARED) or not has(store, Capability.COMPARE_AND_SET):
            return
        other = self.make_store(place)
        for number in range(20):
            write = Write(MEMORY, ("race", "notes", str(number)), number, expect=ABSENT)
            results = await asyncio.gather(store.put(write), other.put(write), return_exceptions=True)
            assert sum(not isinstance(result, BaseException) for result in results) == 1
        await other.close()

    async def test_namespaces_are_apart(self, store: Store) -> None:
        spaces = {name: store.namespace(name) for name in ("", "paper", "backtest-1", "backtest-2")}
        assert spaces[""] is store
        for name, space in spaces.items():
            assert await space.get(SIGNAL, KEY) is None
            await space.put(Write(SIGNAL, KEY, name))
            await space.put(memory_write(name or "live", name))
        for name, space in spaces.items():
            if self.expect_kept(await value_of(space)):
                assert await value_of(space) == name
                assert await value_of(store.namespace(name)) == name
                if has(store, Capability.ORDERED_SCAN):
                    assert [record.value for record in await collect(space.scan(MEMORY))] == [name]

    @each(
        "name",
        {name[:9]: name for name in ("..", "a/b", "signal", "PAPER", "paper", ".", "x" * 300, "\U0001f680", "a b")},
    )
    async def test_namespace_may_have_any_name(self, place: Path, name: str) -> None:
        store = self.make_store(place)
        await store.put(Write(SIGNAL, KEY, "outside"))
        await store.namespace(name).put(Write(SIGNAL, KEY, "inside"))
        await store.namespace(name + "x").put(Write(SIGNAL, KEY, "beside"))
        found = tuple([await value_of(store.namespace(each)) for each in ("", name, name + "x")])
        if self.expect_kept(any(found)):
            assert found == ("outside", "inside", "beside")
        await store.close()

    async def test_namespaces_lie_in_each_other(self, store: Store) -> None:
        paths = [("a", "b"), ("b", "a"), ("a/b",), ("a",), ("b",)]
        spaces = []
        for path in paths:
            space: Store = store
            for name in path:
                space = space.namespace(name)
            spaces.append(space)
            await space.put(Write(SIGNAL, KEY, list(path)))
        for path, space in zip(paths, spaces, strict=True):
            await self.expect(space, SIGNAL, KEY, value=list(path))

    async def test_closing_a_namespace_leaves_its_parent_open(self, store: Store) -> None:
        space = store.namespace("paper")
        await space.open()
        await space.put(Write(SIGNAL, KEY, "inside"))
        await store.put(Write(SIGNAL, KEY, "outside"))
        await space.close()
        await space.close()
        if self.expect_kept(await value_of(store)):
            assert await value_of(store) == "outside"
            assert await value_of(store.namespace("paper")) == "inside"
