"""Cases of listings: order, limits, prefixes by whole components, and writing while reading."""

from __future__ import annotations

from pathlib import Path

import pytest

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.store import Capability, Key, Store, Write
from backtest_kit.persist.testing.harness import (
    MEMORY,
    Harness,
    collect,
    each,
    each_contract,
    either_order,
    has,
    memory_write,
    names,
    put_all,
    sample_key,
    unless,
)

STORAGE = CONTRACTS["storage"]


class ScanCases(Harness):
    async def refuses_scans(self, store: Store) -> bool:
        """True if ordered scans are not declared; then it is tested that they are refused."""
        if has(store, Capability.ORDERED_SCAN):
            return False
        await store.put(memory_write("name", 1))
        if self.forgets:
            assert await collect(store.scan(MEMORY)) == []
        else:
            with pytest.raises(UserError):
                await collect(store.scan(MEMORY))
        return True

    @each_contract
    @unless(refuses_scans)
    async def test_listing_has_every_record_of_its_contract(self, store: Store, contract: Contract) -> None:
        keys = [sample_key(contract, tail) for tail in ("-c", "-a", "-b")]
        await put_all(store, (Write(contract, key, number, when=number) for number, key in enumerate(keys)))
        found = await collect(store.scan(contract))
        assert [record.key for record in found] == keys
        assert [(record.value, record.when, record.rev) for record in found] == [(0, 0, 1), (1, 1, 1), (2, 2, 1)]
        assert [record.key for record in await collect(store.scan(contract, newest_first=True))] == keys[::-1]

    @unless(refuses_scans)
    async def test_empty_listing(self, store: Store) -> None:
        assert await collect(store.scan(MEMORY)) == []
        assert await collect(store.scan(MEMORY, ("nobody",), newest_first=True)) == []

    @unless(refuses_scans)
    async def test_rewritten_record_moves_to_the_end(self, store: Store) -> None:
        await put_all(store, (memory_write(name) for name in "abcab"))
        assert await names(store.scan(MEMORY)) == ["c", "a", "b"]
        assert await names(store.scan(MEMORY, newest_first=True)) == ["b", "a", "c"]

    @either_order
    @unless(refuses_scans)
    async def test_limit(self, store: Store, newest_first: bool) -> None:
        await put_all(store, (memory_write(str(number)) for number in range(10)))
        order = [str(number) for number in range(10)][:: -1 if newest_first else 1]
        for limit in (0, 1, 3, 9, 10, 11, 1_000):
            found = await names(store.scan(MEMORY, limit=limit, newest_first=newest_first))
            assert found == order[:limit], limit

    @unless(refuses_scans)
    async def test_a_limit_below_0_is_refused(self, store: Store) -> None:
        await store.put(memory_write("a"))
        for prefix in ((), memory_write("a").key):
            with pytest.raises(UserError, match="limit is -1"):
                await names(store.scan(MEMORY, prefix, limit=-1))

    @unless(refuses_scans)
    async def test_limit_counts_what_is_listed(self, store: Store) -> None:
        await put_all(store, (memory_write(name) for name in "abcdef"))
        await put_all(store, (memory_write(name, removed=True) for name in "abc"))
        assert await names(store.scan(MEMORY, limit=3)) == ["d", "e", "f"]
        assert await names(store.scan(MEMORY, limit=3, newest_first=True)) == ["f", "e", "d"]
        assert await names(store.scan(MEMORY, limit=4, include_removed=True)) == ["d", "e", "f", "a"]

    @unless(refuses_scans)
    async def test_prefix_is_of_whole_components(self, store: Store) -> None:
        keys: list[Key] = [("a", "a", "1"), ("ab", "a", "2"), ("a", "ab", "3"), ("", "a", "4"), ("A", "a", "5")]
        keys += [("a/a", "a", "6"), ("a", "", "7"), ("a%", "a", "8"), ("a_", "a", "9")]
        await put_all(store, (Write(MEMORY, key, None) for key in keys))
        for prefix in [
            (),
            ("a",),
            ("ab",),
            ("",),
            ("A",),
            ("a", "a"),
            ("a", ""),
            ("a", "ab"),
            ("b",),
            ("a%",),
            keys[0],
        ]:
            expected = [key for key in keys if key[: len(prefix)] == prefix]
            assert [record.key for record in await collect(store.scan(MEMORY, prefix))] == expected
            found = await collect(store.scan(MEMORY, prefix, newest_first=True, limit=2))
            assert [record.key for record in found] == expected[::-1][:2]

    @unless(refuses_scans)
    async def test_prefix_of_long_components(self, store: Store) -> None:
        keys = [("x" * 300, "notes", "1"), ("x" * 299 + "y", "notes", "2"), ("x" * 300, "notes" * 100, "3")]
        await put_all(store, (Write(MEMORY, key, None) for key in keys))
        assert await names(store.scan(MEMORY, ("x" * 300,))) == ["1", "3"]
        assert await names(store.scan(MEMORY, ("x" * 300, "notes"))) == ["1"]

    @unless(refuses_scans)
    async def test_prefix_of_a_mode(self, store: Store) -> None:
        await put_all(store, (Write(STORAGE, (mode, name), None) for name in "ab" for mode in (True, False)))
        assert [record.key for record in await collect(store.scan(STORAGE, (True,)))] == [(True, "a"), (True, "b")]
        assert [record.key for record in await collect(store.scan(STORAGE, (False,)))] == [(False, "a"), (False, "b")]

    async def test_prefix_of_another_shape_is_refused(self, store: Store) -> None:
        prefixes: tuple[Key, ...] = (("a", "b", "c", "d"), (1,), (True,))
        for prefix in prefixes:
            with pytest.raises(UserError):
                await collect(store.scan(MEMORY, prefix))

    @unless(refuses_scans)
    async def test_removed_records_are_listed_on_request(self, store: Store) -> None:
        await put_all(store, (memory_write("a"), memory_write("b"), memory_write("a", removed=True)))
        assert await names(store.scan(MEMORY)) == ["b"]
        listed = await collect(store.scan(MEMORY, include_removed=True))
        assert [(record.key[-1], record.removed) for record in listed] == [("b", False), ("a", True)]

    @unless(refuses_scans)
    async def test_long_listing_is_the_exact_reverse_of_its_reverse(self, store: Store) -> None:
        for start in range(0, 600, 100):
            writes = [memory_write(str(number * 7_919 % 600), number) for number in range(start, start + 100)]
            if has(store, Capability.ATOMIC_BATCH):
                await store.batch(writes)
            else:
                await put_all(store, writes)
        forward = await collect(store.scan(MEMORY))
        assert [record.value for record in forward] == list(range(600))
        assert await collect(store.scan(MEMORY, newest_first=True)) == forward[::-1]

    @either_order
    @unless(refuses_scans)
    async def test_writing_while_listing(self, store: Store, newest_first: bool) -> None:
        await put_all(store, (memory_write(str(number)) for number in range(40)))
        seen: list[object] = []
        async for record in store.scan(MEMORY, newest_first=newest_first):
            seen.append(record.key[-1])
            await store.put(memory_write(str(len(seen) % 10), "again"))
        assert len(seen) == len(set(seen))
        stable = {str(number) for number in range(10, 40)}
        assert stable <= set(seen)

    @unless(refuses_scans)
    async def test_abandoned_listing_holds_nobody_up(self, store: Store) -> None:
        await put_all(store, (memory_write(str(number)) for number in range(40)))
        listing = store.scan(MEMORY)
        await anext(listing)
        for number in range(40):
            await store.put(memory_write(str(number), "again"))
        assert len(await collect(store.scan(MEMORY))) == 40
        rest = await collect(listing)
        assert len(rest) <= 39

    @each("contract", {row.name: row for row in (MEMORY, STORAGE)})
    async def test_every_listing_tells_of_damage(self, place: Path, contract: Contract) -> None:
        """And not only the one that finds it: a listing that lacks a record is no answer."""
        texts = ["first", "damaged", "last"]
        first = self.make_store(place)
        await put_all(first, (Write(contract, sample_key(contract, text), text) for text in texts))
        await first.close()
        if not self.damage(place, contract, "damaged"):
            pytest.skip("this store says that nobody can get at what it keeps: damage() returns False")
        for _ in range(2):
            store = self.make_store(place)
            for newest_first in (False, True, False):
                with pytest.raises(Damaged):
                    await collect(store.scan(contract, newest_first=newest_first))
                with pytest.raises(Damaged):
                    await collect(store.scan(contract, limit=3, include_removed=True))
            assert (await store.get(contract, sample_key(contract, "last"))) is not None
            await store.close()

    async def test_order_survives_reopening(self, place: Path) -> None:
        first = self.make_store(place)
        if await self.refuses_scans(first) or not has(first, Capability.DURABLE):
            await first.close()
            return
        await put_all(first, (memory_write(name) for name in "cabc"))
        await first.close()
        second = self.make_store(place)
        await second.put(memory_write("a"))
        assert await names(second.scan(MEMORY)) == ["b", "c", "a"]
        await second.close()
