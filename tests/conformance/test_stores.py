"""The conformance suite over every store of the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from backtest_kit.persist.backends.dummy import DummyStore
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.store import Store
from backtest_kit.persist.testing import StoreConformance


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
