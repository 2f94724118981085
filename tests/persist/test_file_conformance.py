"""The conformance kit on files."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.store import Store
from backtest_kit.persist.testing import StoreConformance


class TestFileStore(StoreConformance):
    def make_store(self, place: Path) -> Store:
        return FileStore(place / "dump")

    def obstruct(self, place: Path) -> Callable[[], None]:
        (place / "dump").write_text("in the way")
        return (place / "dump").unlink

    def damage(self, place: Path, contract: Contract, text: str) -> bool:
        for path in (place / "dump" / contract.name).rglob("*.json*"):
            data = path.read_bytes()
            path.write_bytes(data.replace(f'"{text}"'.encode(), b"?" * (len(text) + 2)))
        if (place / "dump/feeds.db").exists():
            with closing(sqlite3.connect(place / "dump/feeds.db")) as connection, connection:
                statement = "UPDATE records SET record = CAST(replace(CAST(record AS TEXT), ?, '?') AS BLOB)"
                connection.execute(f"{statement} WHERE contract = ?", (f'"{text}"', contract.name))
        return True
