"""Cases of one record: every contract, every component of its key."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from backtest_kit.errors import UserError
from backtest_kit.persist.contracts import Contract, WriteRule
from backtest_kit.persist.store import Capability, Key, Store, Write
from backtest_kit.persist.testing.harness import (
    MEMORY,
    RECORDS,
    Harness,
    each,
    each_contract,
    has,
    names,
    other_part,
    sample_key,
)

HOSTILE = {
    "empty": "",
    "dot": ".",
    "parent": "..",
    "escape": "../../escape",
    "absolute": "/etc/passwd",
    "slash": "BTC/USDT",
    "backslash": "BTC\\USDT",
    "colon": "BTC:USDT",
    "nul": "a\0b",
    "newline": "a\nb",
    "percent": "%2F",
    "double percent": "%252F",
    "tilde": "a~1",
    "quote": "'; drop table records; --",
    "double quote": '"',
    "dollar": "$set",
    "dotted": "a.b.c",
    "upper": "NAME",
    "lower": "name",
    "mixed": "Name",
    "device": "CON",
    "device with suffix": "nul.json",
    "trailing dot": "name.",
    "trailing space": "name ",
    "composed": "\u00e9",
    "decomposed": "e\u0301",
    "emoji": "\U0001f680",
    "right to left": "\u0634\u0628\u0643\u0629",
    "300 characters": "x" * 300,
    "300 others": "x" * 299 + "y",
    "temporary": ".tmp-0123456789ab-name",
    "star": "*",
    "underscores": "__",
}

FIELDS = {
    f"{row.key_fields[field]} of {row.name}": (row, field) for row in RECORDS for field in range(len(row.key_fields))
}

MISSHAPEN: dict[str, Key] = {
    "none": (),
    "one": ("a",),
    "two": ("a", "b"),
    "four": ("a", "b", "c", "d"),
    "int": ("a", "b", 1),
    "bool": ("a", True, "c"),
    "surrogate": ("a", "b", "\ud800"),
}


class RecordCases(Harness):
    @each_contract
    async def test_absent_record_is_none(self, store: Store, contract: Contract) -> None:
        assert await store.get(contract, sample_key(contract)) is None

    @each_contract
    async def test_record_comes_back_as_written(self, store: Store, contract: Contract) -> None:
        key = sample_key(contract)
        before = time.time_ns() // 1_000_000
        written = await store.put(Write(contract, key, {"price": 1.5, "tags": ["a", None]}, when=1_000))
        assert (written.key, written.rev, written.when) == (key, 1, 1_000)
        found = await store.get(contract, key)
        if not self.expect_kept(found):
            return
        assert found == written
        assert found.value == {"price": 1.5, "tags": ["a", None]}
        assert not found.removed
        assert before - 60_000 <= found.written_at <= before + 600_000
        assert found.key == key
        assert [type(part) for part in found.key] == [type(part) for part in key]

    @each_contract
    async def test_second_write_follows_the_rule_of_the_contract(self, store: Store, contract: Contract) -> None:
        key = sample_key(contract)
        await store.put(Write(contract, key, "first", when=1))
        returned = await store.put(Write(contract, key, "second", when=2))
        found = await store.get(contract, key)
        if not self.expect_kept(found):
            return
        assert found == returned
        if contract.write_rule is not WriteRule.REPLACE:
            assert (found.value, found.rev, found.when) == ("first", 1, 1)
        else:
            assert (found.value, found.rev, found.when) == ("second", 2, 2)

    @each_contract
    async def test_removed_record_stays_and_can_be_revived(self, store: Store, contract: Contract) -> None:
        key = sample_key(contract)
        await store.put(Write(contract, key, "here"))
        await store.put(Write(contract, key, "gone", removed=True))
        removed = await store.get(contract, key)
        if not self.expect_kept(removed):
            return
        kept = contract.write_rule is not WriteRule.REPLACE
        assert removed is not None
        assert (removed.removed, removed.rev) == ((False, 1) if kept else (True, 2))
        if has(store, Capability.ORDERED_SCAN):
            assert await names(store.scan(contract)) == ([key[-1]] if kept else [])
            assert await names(store.scan(contract, include_removed=True)) == [key[-1]]
        revived = await store.put(Write(contract, key, "back"))
        assert (revived.removed, revived.rev) == ((False, 1) if kept else (False, 3))

    @each("component", FIELDS)
    async def test_records_are_apart_by_each_component(self, store: Store, component: tuple[Contract, int]) -> None:
        contract, field = component
        key = sample_key(contract, f"-{field}")
        other: Key = (*key[:field], other_part(contract.key_fields[field], f"-{field}"), *key[field + 1 :])
        await store.put(Write(contract, key, "one"))
        assert await store.get(contract, other) is None
        await store.put(Write(contract, other, "two"))
        one, two = await store.get(contract, key), await store.get(contract, other)
        if not self.expect_kept(one or two):
            return
        assert one is not None
        assert two is not None
        assert (one.value, two.value, one.rev, two.rev) == ("one", "two", 1, 1)

    @each_contract
    async def test_reopened_store_has_what_it_promised(self, place: Path, contract: Contract) -> None:
        key = sample_key(contract)
        first = self.make_store(place)
        await first.put(Write(contract, key, "kept", when=7))
        written = await first.get(contract, key)
        await first.close()
        second = self.make_store(place)
        try:
            found = await second.get(contract, key)
            assert found == (written if has(second, Capability.DURABLE) else None)
        finally:
            await second.close()

    async def test_contracts_are_apart(self, store: Store) -> None:
        same_fields = [row for row in RECORDS if row.key_fields == RECORDS[0].key_fields]
        key = sample_key(same_fields[0])
        for row in same_fields:
            await store.put(Write(row, key, row.name))
        for row in same_fields:
            await self.expect(store, row, key, value=row.name)

    @each("place_in_key", {"first": 0, "middle": 1, "last": 2})
    @each("part", HOSTILE)
    async def test_hostile_component_is_an_ordinary_key(self, store: Store, part: str, place_in_key: int) -> None:
        key = ["signal-1", "notes", "name"]
        key[place_in_key] = part
        await store.put(Write(MEMORY, tuple(key), part))
        await self.expect(store, MEMORY, tuple(key), key=tuple(key), value=part)

    async def test_no_two_hostile_keys_meet(self, store: Store) -> None:
        keys = [(a, b, "name") for a in HOSTILE.values() for b in ("", "..", "Name", "name", "a/b")]
        for number, key in enumerate(keys):
            await store.put(Write(MEMORY, key, number))
        for number, key in enumerate(keys):
            await self.expect(store, MEMORY, key, value=number, rev=1)

    async def test_components_are_not_joined_ambiguously(self, store: Store) -> None:
        pairs = [("a", "b/c", "d"), ("a/b", "c", "d"), ("a", "b", "c/d"), ("a_b", "c", "d"), ("a", "b_c", "d")]
        pairs += [("a", "", "b"), ("", "a", "b"), ("a", "b", "")]
        for number, key in enumerate(pairs):
            await store.put(Write(MEMORY, key, number))
        for number, key in enumerate(pairs):
            await self.expect(store, MEMORY, key, value=number)

    @each("key", MISSHAPEN)
    async def test_key_of_another_shape_is_refused(self, store: Store, key: Key) -> None:
        with pytest.raises(UserError):
            await store.get(MEMORY, key)
        with pytest.raises(UserError):
            await store.put(Write(MEMORY, key, None))
