"""Cases of values: whatever JSON can write down comes back equal and of the same type."""

from __future__ import annotations

from backtest_kit.persist.store import Capability, Plain, Store, Write
from backtest_kit.persist.testing.harness import MEMORY, Harness, collect, each, has, memory_write


def nested(depth: int) -> Plain:
    value: Plain = "bottom"
    for level in range(depth):
        value = [value] if level % 2 else {"in": value}
    return value


VALUES: dict[str, Plain] = {
    "null": None,
    "true": True,
    "false": False,
    "zero": 0,
    "float zero": 0.0,
    "negative zero": -0.0,
    "whole float": 1.0,
    "largest int": 2**63 - 1,
    "smallest int": -(2**63),
    "tiny float": 1e-308,
    "huge float": 1e308,
    "denormal": 5e-324,
    "third": 1 / 3,
    "empty text": "",
    "unicode": "\u00e9 e\u0301 \U0001f680 \u0634 \u2028 \ufeff",
    "control characters": '\0\x01\n\r\t\x7f"\\/',
    "1 MiB text": "x" * (1 << 20),
    "empty list": [],
    "empty dict": {},
    "empty name": {"": {"": []}},
    "hostile names": {"$set": 1, "a.b": 2, "_id": 3, "__proto__": 4, "key": 5, "value": 6, "\0": 7},
    "tag of the codec": {"@float": "inf"},
    "envelope": {"contract": "signal", "key": ["a"], "rev": 9, "removed": True, "value": 1, "checksum": "0"},
    "order of names": {"b": 1, "a": 2, "c": {"z": 1, "y": 2}},
    "deep": nested(90),
    "wide": {f"name-{number}": number / 7 for number in range(2_000)},
    "long list": [0, 1.5, "x", None, True] * 2_000,
}


class ValueCases(Harness):
    @each("value", VALUES)
    async def test_value_comes_back_equal_and_of_the_same_type(self, store: Store, value: Plain) -> None:
        await store.put(memory_write("name", value))
        found = await store.get(MEMORY, ("signal-1", "notes", "name"))
        if not self.expect_kept(found):
            return
        assert found is not None
        assert repr(found.value) == repr(value)

    async def test_written_value_cannot_be_changed_from_outside(self, store: Store) -> None:
        value: Plain = {"levels": [1, 2]}
        key = ("signal-1", "notes", "name")
        returned = await store.put(Write(MEMORY, key, value))
        assert isinstance(value, dict)
        value["levels"] = "changed"
        returned_value = returned.value
        if isinstance(returned_value, dict):
            returned_value["added"] = True
        await self.expect(store, MEMORY, key, value={"levels": [1, 2]})

    async def test_read_value_is_the_readers_own(self, store: Store) -> None:
        await store.put(memory_write("name", {"levels": [1, 2]}))
        key = ("signal-1", "notes", "name")
        first = await store.get(MEMORY, key)
        if not self.expect_kept(first):
            return
        assert first is not None
        assert isinstance(first.value, dict)
        first.value["levels"] = "changed"
        again = await store.get(MEMORY, key)
        assert again is not None
        assert again.value == {"levels": [1, 2]}
        if has(store, Capability.ORDERED_SCAN):
            (listed,) = await collect(store.scan(MEMORY))
            assert listed.value == {"levels": [1, 2]}

    @each("when", {str(when): when for when in (None, 0, 1, 1_640_995_200_000, 4_102_444_800_000, -1)})
    async def test_simulation_time_comes_back(self, store: Store, when: int | None) -> None:
        await store.put(memory_write("name", 1, when=when))
        found = await store.get(MEMORY, ("signal-1", "notes", "name"))
        if self.expect_kept(found):
            assert found is not None
            assert found.when == when
