"""Cases of forgetting. A store without `Capability.PRUNING` refuses to."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from backtest_kit.errors import UserError
from backtest_kit.persist.contracts import CONTRACTS, Contract, Durability
from backtest_kit.persist.store import ABSENT, Capability, Store, Write
from backtest_kit.persist.testing.harness import (
    MEMORY,
    RECORDS,
    Harness,
    collect,
    each_contract,
    has,
    memory_write,
    names,
    put_all,
    sample_key,
)

LOG = CONTRACTS["log"]
PRUNABLE = [row for row in RECORDS if row.durability is not Durability.MONEY]


class PruneCases(Harness):
    async def test_forgetting_is_refused_unless_declared(self, store: Store) -> None:
        if has(store, Capability.PRUNING):
            return
        for refused in (store.prune(LOG, {}), store.count(LOG), store.namespace("backtest-1").forget()):
            with pytest.raises(UserError, match="does not support"):
                await refused

    @each_contract
    async def test_what_is_forgotten_was_never_written(self, store: Store, contract: Contract) -> None:
        if not has(store, Capability.PRUNING):
            return
        old, kept = sample_key(contract, "-1"), sample_key(contract, "-2")
        await put_all(store, [Write(contract, old, 1), Write(contract, kept, 2)])
        assert await store.count(contract) == 2
        if contract not in PRUNABLE:
            with pytest.raises(UserError, match="money"):
                await store.prune(contract, {old: 1})
            assert await store.get(contract, old) is not None
            return
        assert await store.prune(contract, {old: 1, sample_key(contract, "-3"): 1}) == 1
        assert await store.get(contract, old) is None
        assert [record.key for record in await collect(store.scan(contract, include_removed=True))] == [kept]
        assert await store.count(contract) == 1
        assert (await store.put(Write(contract, old, 3, expect=ABSENT))).rev == 1
        assert [record.value for record in await collect(store.scan(contract))] == [2, 3]

    @each_contract
    async def test_what_was_written_since_stays(self, store: Store, contract: Contract) -> None:
        if not has(store, Capability.PRUNING) or contract not in PRUNABLE or contract is LOG:
            return
        key = sample_key(contract)
        await put_all(store, [Write(contract, key, 1), Write(contract, key, 2)])
        assert await store.prune(contract, {key: 1}) == 0
        await self.expect(store, contract, key, rev=2, value=2)
        assert await store.prune(contract, {key: 2}) == 1
        assert await store.get(contract, key) is None

    async def test_forgetting_part_after_part_keeps_the_order_of_the_rest(self, place: Path, store: Store) -> None:
        if not has(store, Capability.PRUNING):
            return
        for number in range(40):
            await store.put(Write(LOG, (f"line {number:02d}",), number))
        for first in (0, 10, 25):
            assert await store.prune(LOG, {(f"line {number:02d}",): 1 for number in range(first, first + 8)}) == 8
        left = [f"line {n:02d}" for n in range(40) if not any(first <= n < first + 8 for first in (0, 10, 25))]
        assert await names(store.scan(LOG)) == left
        assert await names(store.scan(LOG, newest_first=True, limit=3)) == left[:-4:-1]
        await store.put(Write(LOG, ("line 40",), 40))
        assert await names(store.scan(LOG)) == [*left, "line 40"]
        await store.close()
        if has(store, Capability.DURABLE):
            again = self.make_store(place)
            assert await names(again.scan(LOG)) == [*left, "line 40"]
            await again.close()

    async def test_the_other_side_goes_on(self, place: Path, store: Store) -> None:
        if not has(store, Capability.PRUNING) or not has(store, Capability.SHARED):
            return
        other, idle = self.make_store(place), self.make_store(place)
        assert await names(idle.scan(LOG)) == []  # it has looked, and looks again only after all of this
        written = []
        for turn in range(4):
            for number in range(10):
                written.append(f"{turn}-{number}")
                await (store, other)[number % 2].put(Write(LOG, (written[-1],), number))
            pruner = (store, other)[turn % 2]
            assert await pruner.prune(LOG, {(name,): 1 for name in written[:7]}) == 7
            del written[:7]
            for side in (store, other):
                assert await names(side.scan(LOG)) == written
        assert await other.prune(LOG, {(name,): 1 for name in written}) == len(written)
        await idle.put(Write(LOG, ("last",), 1))
        for side in (store, other, idle):
            assert await names(side.scan(LOG)) == ["last"]
        await other.close()
        await idle.close()

    async def test_writers_go_on_meanwhile(self, store: Store) -> None:
        if not has(store, Capability.PRUNING):
            return
        await put_all(store, [memory_write(str(number), number) for number in range(50)])
        await put_all(store, [Write(LOG, (str(number),), number) for number in range(50)])
        _, notes, *done = await asyncio.gather(
            put_all(store, [Write(LOG, (str(number),), number) for number in range(50, 90)]),
            store.prune(MEMORY, {("signal-1", "notes", str(number)): 1 for number in range(25)}),
            *(store.prune(LOG, {(str(number),): 1 for number in range(start, start + 5)}) for start in (0, 5, 10)),
        )
        assert notes == 25
        assert await names(store.scan(MEMORY)) == [str(number) for number in range(25, 50)]
        left = await names(store.scan(LOG))
        assert left[-75:] == [str(number) for number in range(15, 90)]
        assert len(left) == 90 - sum(filter(None, done))

    async def test_a_namespace_is_forgotten_with_those_in_it_and_nothing_else(self, store: Store) -> None:
        if not has(store, Capability.PRUNING):
            return
        run, twin = store.namespace("backtest-1"), store.namespace("backtest-11")
        for space in (store, run, twin, run.namespace("inner")):
            await put_all(space, [Write(row, sample_key(row), "kept") for row in RECORDS])
        await run.forget()
        for row in RECORDS:
            assert await run.get(row, sample_key(row)) is None
            assert await run.namespace("inner").get(row, sample_key(row)) is None
            for space in (store, twin):
                found = await space.get(row, sample_key(row))
                assert found is not None
                assert found.rev == 1
        if has(store, Capability.LISTING):
            assert await store.namespaces() == [("backtest-11",)]
        await run.forget()
        assert (await run.put(Write(MEMORY, sample_key(MEMORY), "anew"))).rev == 1
        with pytest.raises(UserError, match="namespace"):
            await store.forget()
