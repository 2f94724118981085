"""What the cases of the conformance suite stand on: the store under test, and sample keys and values."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytest_asyncio

from backtest_kit.persist.contracts import CONTRACTS, Contract, Kind
from backtest_kit.persist.store import Capability, Key, KeyPart, Plain, Record, Store, Write

RECORDS = tuple(row for row in CONTRACTS.values() if row.kind is not Kind.SERIES)
"""Every contract whose records pass through `Store` itself."""

MEMORY = CONTRACTS["memory"]
"""The contract of the cases for which any would do: three text components, replaced, removed softly."""

Case = Callable[..., Coroutine[Any, Any, None]]


def each(argument: str, values: Mapping[str, Any]) -> Callable[[Case], Case]:
    """Run a case once for each of `values`, over one store and as one test; a failure names the value.

    A test per value would spend most of its time on opening stores. The case must therefore leave
    nothing behind that it trips over with the next value.
    """

    def over_values(case: Case) -> Case:
        @functools.wraps(case)
        async def whole(self: Harness, **fixtures: Any) -> None:
            for name, value in values.items():
                try:
                    await case(self, **fixtures, **{argument: value})
                except BaseException as error:  # the outcomes of pytest are no Exceptions
                    error.add_note(f"with {argument} {name!r}")
                    raise

        signature = inspect.signature(case)
        asked = [each for each in signature.parameters.values() if each.name != argument]
        whole.__signature__ = signature.replace(parameters=asked)  # type: ignore[attr-defined]
        return whole

    return over_values


each_contract = each("contract", {row.name: row for row in RECORDS})
either_order = each("newest_first", {"oldest first": False, "newest first": True})


def unless(refused: Callable[[Any, Store], Coroutine[Any, Any, bool]]) -> Callable[[Case], Case]:
    """Run a case only over stores that can do what it needs; over the others, `refused` tests that they refuse it."""

    def where_it_can(case: Case) -> Case:
        @functools.wraps(case)
        async def whole(self: Harness, store: Store, **fixtures: Any) -> None:
            if not await refused(self, store):
                await case(self, store=store, **fixtures)

        return whole

    return where_it_can


class Harness:
    """The fixture and the words in which cases are written. See `StoreConformance`."""

    pytestmark = pytest.mark.asyncio

    forgets: ClassVar[bool] = False
    """Of a store that accepts writes and keeps nothing. Cases then expect to find nothing."""

    def make_store(self, place: Path) -> Store:
        """A store over `place` that is not open yet; over the same `place`, the same data."""
        raise NotImplementedError("a subclass of StoreConformance says in make_store how a store is made")

    def obstruct(self, place: Path) -> Callable[[], None] | None:
        """Make the next opening over `place` fail, and return what mends it. None: openings cannot fail."""
        return None

    def damage(self, place: Path, contract: Contract, text: str) -> bool:
        """Change the stored bytes of the record of `contract` whose value is `text`. False: nobody can get at them.

        The store over `place` is closed.
        """
        return False

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        return tmp_path

    @pytest_asyncio.fixture
    async def store(self, place: Path) -> AsyncIterator[Store]:
        store = self.make_store(place)
        await store.open()
        yield store
        await store.close()

    async def expect(self, store: Store, contract: Contract, key: Key, /, **fields: Any) -> None:
        """A record with these fields is under a key, unless the store forgets."""
        found = await store.get(contract, key)
        if self.expect_kept(found):
            assert found is not None, key
            assert {name: getattr(found, name) for name in fields} == fields, key

    def expect_kept(self, found: object) -> bool:
        """True if the store keeps what it is given; else `found` must be nothing, and the case is over."""
        if self.forgets:
            assert not found, f"the store says that it forgets, but has {found!r}"
        return not self.forgets


def has(store: Store, capability: Capability) -> bool:
    return capability in store.capabilities


def sample_key(contract: Contract, tail: str = "") -> Key:
    """An ordinary key of `contract`; `tail` makes others in its text components."""
    return tuple(sample_part(field, tail) for field in contract.key_fields)


def sample_part(field: str, tail: str = "") -> KeyPart:
    if field == "backtest":
        return True
    return 1_640_995_200_000 if field == "timestamp" else f"{field.lower()}{tail}"


def other_part(field: str, tail: str) -> KeyPart:
    """A component that differs from that of `sample_key` as little as possible."""
    if field == "backtest":
        return False
    return 1_640_995_260_000 if field == "timestamp" else f"{field.lower()}{tail}x"


def memory_write(name: str, value: Plain = None, *, removed: bool = False, when: int | None = None) -> Write:
    return Write(MEMORY, ("signal-1", "notes", name), value, when=when, removed=removed)


async def collect(records: AsyncIterator[Record]) -> list[Record]:
    return [record async for record in records]


async def names(records: AsyncIterator[Record]) -> list[KeyPart]:
    """The last component of every record."""
    return [record.key[-1] async for record in records]


async def put_all(store: Store, writes: Iterable[Write]) -> None:
    for write in writes:
        await store.put(write)
