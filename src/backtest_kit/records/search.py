"""`TextIndex`: which texts match a query best, by the BM25 of SQLite's full-text search, which comes with Python."""

from __future__ import annotations

import re
import sqlite3
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Final

from backtest_kit.errors import UserError
from backtest_kit.persist.store import Key, Record

_SCHEMA: Final = (
    "CREATE VIRTUAL TABLE entries USING fts5(text, content='', tokenize='porter unicode61 remove_diacritics 2')"
)
_DELETE: Final = "INSERT INTO entries(entries, rowid, text) VALUES ('delete', ?, ?)"
_BEST: Final = "SELECT rowid FROM entries WHERE entries MATCH ? ORDER BY rank, rowid DESC LIMIT ?"
_WORD: Final = re.compile(r"\w+")
_UNSPACED: Final = re.compile("([\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")
"""Letters of scripts that put no spaces between words: each of them counts as a word."""


class TextIndex:
    """The texts of records, in memory. Each search first indexes the changes since the last one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        weakref.finalize(self, self._connection.close)
        try:
            self._connection.execute(_SCHEMA)
        except sqlite3.OperationalError as error:
            raise UserError(
                f"this Python's SQLite {sqlite3.sqlite_version} cannot search texts ({error}): "
                "use one that is built with FTS5"
            ) from None
        self._rows: dict[Key, tuple[int, int, str]] = {}
        """Row, revision and text of every key."""
        self._keys: dict[int, Key] = {}
        self._last_row = 0

    def search(self, records: Mapping[Key, Record], text_of: Callable[[Record], str], query: str, k: int) -> list[Key]:
        """The keys of the `k` of `records` whose texts have words of `query` and rank best, best first.

        Of equals the newer one comes first. Blocks; may be called from any thread.
        """
        words = " OR ".join(f'"{word}"' for word in _WORD.findall(_spaced(query)))
        with self._lock:
            self._follow(records, text_of)
            rows = self._connection.execute(_BEST, (words, k)).fetchall() if words else ()
            return [self._keys[row] for (row,) in rows]

    def _follow(self, records: Mapping[Key, Record], text_of: Callable[[Record], str]) -> None:
        gone = [key for key, (_, rev, _) in self._rows.items() if key not in records or records[key].rev != rev]
        new = [record for key, record in records.items() if key not in self._rows or self._rows[key][1] != record.rev]
        with self._connection:
            self._connection.execute("BEGIN")
            for key in gone:
                row, _, text = self._rows.pop(key)
                del self._keys[row]
                self._connection.execute(_DELETE, (row, text))
            for record in new:
                self._last_row += 1
                text = _spaced(text_of(record))
                self._connection.execute("INSERT INTO entries(rowid, text) VALUES (?, ?)", (self._last_row, text))
                self._rows[record.key] = self._last_row, record.rev, text
                self._keys[self._last_row] = record.key


def _spaced(text: str) -> str:
    return _UNSPACED.sub(r" \1 ", text)
