"""The conformance kit on files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.store import Store
from backtest_kit.persist.testing import StoreConformance


class TestFileStore(StoreConformance):
    def make_store(self, place: Path) -> Store:
        return FileStore(place / "dump")

    def obstruct(self, place: Path) -> Callable[[], None]:
        (place / "dump").write_text("in the way")
        return (place / "dump").unlink
