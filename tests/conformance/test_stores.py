"""The conformance suite over every store of the package."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from backtest_kit.persist.backends.dummy import DummyStore
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.store import Capability, Key, Record, Selection, Store, Write
from backtest_kit.persist.testing import StoreConformance
from backtest_kit.persist.wrapper import AdapterStore


class TestMemoryStore(StoreConformance):
    def make_store(self, place: Path) -> Store:
        return MemoryStore()


class TestDummyStore(StoreConformance):
    forgets = True

    def make_store(self, place: Path) -> Store:
        return DummyStore()


class TestSqliteStore(StoreConformance):
    def make_store(self, place: Path) -> Store:
        return SqliteStore(place / "bot.db")

    def obstruct(self, place: Path) -> Callable[[], None]:
        (place / "bot.db").mkdir()
        return (place / "bot.db").rmdir

    def damage(self, place: Path, contract: Contract, text: str) -> bool:
        with closing(sqlite3.connect(place / "bot.db")) as connection, connection:
            connection.execute(
                "UPDATE records SET record = CAST(replace(CAST(record AS TEXT), ?, '?') AS BLOB) WHERE contract = ?",
                (f'"{text}"', contract.name),
            )
        return True


class Unlisted:
    """The adapter of the reference document."""

    def __init__(self) -> None:
        self._store: dict[str, Any] = {}

    async def read_value(self, entity_id: str) -> Any:
        return self._store.get(entity_id)

    async def write_value(self, entity_id: str, entity: Any) -> None:
        self._store[entity_id] = entity


class Listed(Unlisted):
    def list_values(self) -> list[Any]:
        return list(self._store.values())


class OneAdapterEach(Store):
    """A store of all contracts over one adapter per contract, which is how a program binds them."""

    def __init__(self, adapter: type) -> None:
        self._stores = {row.name: AdapterStore(row, adapter) for row in CONTRACTS.values()}
        self.candles = self._stores["candle"].candles

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self._stores["signal"].capabilities

    def keeps(self, contract: Contract) -> bool:
        return contract.name in self._stores

    async def get(self, contract: Contract, key: Key) -> Record | None:
        return await self._stores[contract.name].get(contract, key)

    async def put(self, write: Write) -> Record:
        return await self._stores[write.contract.name].put(write)

    async def batch(self, writes: Sequence[Write]) -> None:
        for name in {write.contract.name for write in writes}:
            await self._stores[name].batch([write for write in writes if write.contract.name == name])

    def select(self, wanted: Selection) -> AsyncGenerator[Record, None]:
        return self._stores[wanted.contract.name].select(wanted)

    def namespace(self, name: str) -> Store:
        if not name:
            return self
        inner = OneAdapterEach.__new__(OneAdapterEach)
        inner._stores = {each: store.namespace(name) for each, store in self._stores.items()}
        inner.candles = inner._stores["candle"].candles
        return inner


class TestAdapterStore(StoreConformance):
    def make_store(self, place: Path) -> Store:
        return OneAdapterEach(Listed)


class TestAdapterStoreWithoutListing(StoreConformance):
    def make_store(self, place: Path) -> Store:
        return OneAdapterEach(Unlisted)
