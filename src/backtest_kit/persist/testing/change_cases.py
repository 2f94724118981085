"""Cases of changes: revisions, expectations, batches, and many writers at once."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from backtest_kit.errors import Conflict, UserError
from backtest_kit.persist.backends.dummy import DummyStore
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.store import ABSENT, ANY, Capability, Expect, Record, Store, Write
from backtest_kit.persist.testing.harness import (
    MEMORY,
    Harness,
    each,
    each_contract,
    has,
    memory_write,
    names,
    sample_key,
    unless,
)

SIGNAL, LOG = CONTRACTS["signal"], CONTRACTS["log"]
KEY = sample_key(SIGNAL)

CAS, BATCH = Capability.COMPARE_AND_SET, Capability.ATOMIC_BATCH


class ChangeCases(Harness):
    async def refuses_expectations(self, store: Store) -> bool:
        """True if compare-and-set is not declared; then it is tested that it is refused."""
        if has(store, CAS):
            return False
        expectations: tuple[Expect, ...] = (ABSENT, 1)
        for expect in expectations:
            with pytest.raises(UserError, match="not support"):
                await store.put(Write(SIGNAL, KEY, "unwanted", expect=expect))
        assert await store.get(SIGNAL, KEY) is None
        return True

    async def refuses_batches(self, store: Store) -> bool:
        """True if atomic batches are not declared; then it is tested that they are refused."""
        if has(store, BATCH):
            return False
        with pytest.raises(UserError, match="not support"):
            await store.batch([memory_write("a", 1), memory_write("b", 2)])
        for name in "ab":
            assert await store.get(MEMORY, ("signal-1", "notes", name)) is None
        return True

    async def test_revision_counts_every_write(self, store: Store) -> None:
        for number in range(1, 21):
            written = await store.put(Write(SIGNAL, KEY, number, removed=number % 3 == 0))
            assert written.rev == (1 if self.forgets else number)

    @each_contract
    @unless(refuses_expectations)
    async def test_expected_absence(self, store: Store, contract: Contract) -> None:
        key = sample_key(contract)
        written = await store.put(Write(contract, key, "first", expect=ABSENT))
        assert written.rev == 1
        with pytest.raises(Conflict):
            await store.put(Write(contract, key, "second", expect=ABSENT))
        assert await store.get(contract, key) == written

    @unless(refuses_expectations)
    async def test_removed_record_is_not_absent(self, store: Store) -> None:
        await store.put(Write(SIGNAL, KEY, None, removed=True))
        with pytest.raises(Conflict):
            await store.put(Write(SIGNAL, KEY, "new", expect=ABSENT))

    @unless(refuses_expectations)
    async def test_expected_revision_moves_on(self, store: Store) -> None:
        rev = (await store.put(Write(SIGNAL, KEY, 0))).rev
        for number in range(1, 5):
            rev = (await store.put(Write(SIGNAL, KEY, number, expect=rev))).rev
            assert rev == number + 1

    @unless(refuses_expectations)
    async def test_wrong_revision_changes_nothing(self, store: Store) -> None:
        await store.put(Write(SIGNAL, KEY, "first"))
        await store.put(Write(SIGNAL, KEY, "second"))
        before = await store.get(SIGNAL, KEY)
        for expect in (0, 1, 3, 99):
            with pytest.raises(Conflict):
                await store.put(Write(SIGNAL, KEY, "third", expect=expect))
            assert await store.get(SIGNAL, KEY) == before, expect

    @unless(refuses_expectations)
    async def test_revision_of_an_absent_record_is_a_conflict(self, store: Store) -> None:
        with pytest.raises(Conflict):
            await store.put(Write(SIGNAL, KEY, "value", expect=1))
        assert await store.get(SIGNAL, KEY) is None

    @unless(refuses_expectations)
    async def test_conflict_names_the_record_and_both_revisions(self, store: Store) -> None:
        await store.put(Write(SIGNAL, KEY, "value"))
        with pytest.raises(Conflict, match=r"signal.*1.*7"):
            await store.put(Write(SIGNAL, KEY, "value", expect=7))

    @unless(refuses_expectations)
    async def test_one_of_many_racers_wins(self, store: Store) -> None:
        writes = [store.put(Write(SIGNAL, KEY, number, expect=ABSENT)) for number in range(20)]
        results = await asyncio.gather(*writes, return_exceptions=True)
        winners = [result for result in results if not isinstance(result, BaseException)]
        assert len(winners) == 1
        assert all(isinstance(result, Conflict) for result in results if isinstance(result, BaseException))
        assert await store.get(SIGNAL, KEY) == winners[0]

    @unless(refuses_expectations)
    async def test_no_increment_is_lost(self, place: Path, store: Store) -> None:
        other = self.make_store(place) if has(store, Capability.SHARED) else store

        async def increment(through: Store) -> None:
            while True:
                found = await through.get(SIGNAL, KEY)
                assert found is not None
                assert isinstance(found.value, int)
                try:
                    await through.put(Write(SIGNAL, KEY, found.value + 1, expect=found.rev))
                except Conflict:
                    continue
                return

        await store.put(Write(SIGNAL, KEY, 0))
        await asyncio.gather(*(increment(through) for through in (store, other) for _ in range(8)))
        await self.expect(store, SIGNAL, KEY, value=16, rev=17)
        if other is not store:
            await other.close()

    async def test_writes_to_one_key_land_in_the_order_of_their_issue(self, store: Store) -> None:
        await asyncio.gather(*(store.put(Write(SIGNAL, KEY, number)) for number in range(100)))
        await self.expect(store, SIGNAL, KEY, value=99, rev=100)

    async def test_first_of_many_writers_wins_for_ever(self, store: Store) -> None:
        key = ("entry-1",)
        await asyncio.gather(*(store.put(Write(LOG, key, number)) for number in range(16)))
        await self.expect(store, LOG, key, value=0, rev=1)

    async def test_writers_of_many_keys_do_not_disturb_each_other(self, store: Store) -> None:
        await asyncio.gather(*(store.put(memory_write(f"name-{number}", number)) for number in range(64)))
        for number in range(64):
            await self.expect(store, MEMORY, ("signal-1", "notes", f"name-{number}"), value=number, rev=1)

    async def test_cancelled_write_is_old_or_new(self, store: Store) -> None:
        await store.put(Write(SIGNAL, KEY, "old"))
        for steps in range(6):
            writing = asyncio.ensure_future(store.put(Write(SIGNAL, KEY, "new")))
            for _ in range(steps):
                await asyncio.sleep(0)
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            after = await store.put(Write(SIGNAL, KEY, "old"))
            found = await store.get(SIGNAL, KEY)
            if self.expect_kept(found):
                assert found is not None
                assert found.rev >= after.rev

    @pytest.mark.parametrize("seed", range(4))
    async def test_many_at_once_come_out_as_one_after_the_other(self, store: Store, seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311
        expectations: list[Expect] = [ANY, ANY, ABSENT, 1, 2] if has(store, CAS) else [ANY]
        rows = (MEMORY, SIGNAL, LOG, CONTRACTS["storage"])
        model = DummyStore() if self.forgets else MemoryStore()
        for count in (0, 1, 40, 300):
            writes = []
            for number in range(count):
                row = chance.choice(rows)
                key = sample_key(row, str(chance.randrange(1 + count // 4)))
                writes.append(Write(row, key, number, when=number, expect=chance.choice(expectations)))
            for made, due in zip(await store.put_each(writes), await model.put_each(writes), strict=True):
                if not isinstance(made, Record) or not isinstance(due, Record):
                    assert type(made) is type(due), made
                else:
                    assert (made.key, made.value, made.rev, made.when) == (due.key, due.value, due.rev, due.when)
            for row, key in {(write.contract, write.key) for write in writes}:
                stands, right = await store.get(row, key), await model.get(row, key)
                assert (stands and (stands.value, stands.rev)) == (right and (right.value, right.rev))
            if has(store, Capability.ORDERED_SCAN):
                for row in rows:
                    assert await names(store.scan(row)) == await names(model.scan(row))

    async def test_batch_of_none_or_one_is_always_allowed(self, store: Store) -> None:
        await store.batch([])
        await store.batch([Write(SIGNAL, KEY, "alone")])
        await self.expect(store, SIGNAL, KEY, value="alone")

    @unless(refuses_batches)
    async def test_batch_writes_over_contracts(self, store: Store) -> None:
        rows = [row for row in CONTRACTS.values() if row.name != "candle"]
        await store.batch([Write(row, sample_key(row), row.name, when=5) for row in rows])
        for row in rows:
            await self.expect(store, row, sample_key(row), value=row.name, rev=1, when=5)

    @unless(refuses_batches)
    async def test_batch_can_remove(self, store: Store) -> None:
        await store.batch([memory_write("a", 1), memory_write("b", 2)])
        await store.batch([memory_write("a", removed=True), memory_write("b", 3)])
        a = await store.get(MEMORY, ("signal-1", "notes", "a"))
        b = await store.get(MEMORY, ("signal-1", "notes", "b"))
        assert a is not None
        assert b is not None
        assert (a.removed, a.rev, b.value, b.rev) == (True, 2, 3, 2)

    @each("bad", {"first": 0, "middle": 1, "last": 2})
    @unless(refuses_batches)
    @unless(refuses_expectations)
    async def test_batch_with_one_conflict_changes_nothing(self, store: Store, bad: int) -> None:
        keys = [(f"signal-{bad}", "notes", str(number)) for number in range(3)]
        await store.put(Write(MEMORY, keys[0], "before"))
        writes = [Write(MEMORY, key, "after", expect=99 if number == bad else ANY) for number, key in enumerate(keys)]
        with pytest.raises(Conflict):
            await store.batch(writes)
        found = [await store.get(MEMORY, write.key) for write in writes]
        assert [None if record is None else (record.value, record.rev) for record in found] == [
            ("before", 1),
            None,
            None,
        ]

    @unless(refuses_batches)
    @unless(refuses_expectations)
    async def test_batch_honours_expectations(self, store: Store) -> None:
        a = Write(MEMORY, ("signal-1", "notes", "a"), 1, expect=ABSENT)
        b = Write(MEMORY, ("signal-1", "notes", "b"), 1, expect=ABSENT)
        await store.batch([a, b])
        with pytest.raises(Conflict):
            await store.batch([a, b])
        await store.batch([Write(MEMORY, a.key, 2, expect=1), Write(MEMORY, b.key, 2, expect=1)])
        await self.expect(store, MEMORY, a.key, value=2, rev=2)

    @unless(refuses_batches)
    async def test_batch_passes_over_what_was_first_elsewhere(self, store: Store) -> None:
        await store.put(Write(LOG, ("entry-1",), "first"))
        await store.batch([Write(LOG, ("entry-1",), "second"), Write(LOG, ("entry-2",), "other")])
        one, two = await store.get(LOG, ("entry-1",)), await store.get(LOG, ("entry-2",))
        assert one is not None
        assert two is not None
        assert (one.value, one.rev, two.value) == ("first", 1, "other")

    @unless(refuses_batches)
    async def test_batch_with_a_key_twice_is_refused(self, store: Store) -> None:
        with pytest.raises(UserError, match="twice"):
            await store.batch([memory_write("a", 1), memory_write("b", 1), memory_write("a", 2)])
        assert await store.get(MEMORY, ("signal-1", "notes", "b")) is None

    @unless(refuses_batches)
    async def test_batches_do_not_interleave(self, store: Store) -> None:
        await asyncio.gather(*(store.batch([memory_write("a", n), memory_write("b", n)]) for n in range(24)))
        a = await store.get(MEMORY, ("signal-1", "notes", "a"))
        b = await store.get(MEMORY, ("signal-1", "notes", "b"))
        assert a is not None
        assert b is not None
        assert (a.value, a.rev) == (b.value, b.rev) == (23, 24)
