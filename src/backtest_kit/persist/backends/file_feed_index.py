"""`FeedIndex`: where the lines of a feed are, in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from backtest_kit.persist.backends.file_segments import LINE, Place, Places, Row, Tail


class FeedIndex:
    """The lines of the full segments as columns, those of the last one as they come. Not safe for threads."""

    def __init__(self) -> None:
        self.names: list[str] = []
        """Of the full segments."""
        self.sealed: Any = np.empty(0, LINE)
        self.tail = Tail(1)
        self._order: Any = None

    def add_sealed(self, name: str, index: Any) -> None:
        """Take in the index of a full segment."""
        index["segment"] = len(self.names)
        self.names.append(name)
        self.sealed = np.concatenate((self.sealed, index))

    def latest(self, blocked: Collection[int | None], last: int | None) -> Places:
        """The newest line of every key whose hash is not `blocked`, or the `last` ones of them."""
        left_out = np.array([*self.tail.last, *blocked], np.uint64)
        sealed = self.sealed[self.newest()]
        if len(left_out):
            sealed = sealed[~np.isin(sealed["hash"], left_out)]
        rows = [self.tail.lines[index] for index in sorted(self.tail.last.values())]
        rows = [row for row in rows if row[0] not in blocked]
        if last is not None:
            sealed = sealed[max(0, len(sealed) + len(rows) - last) :]
            rows = rows[-last:]
        return Places(np.concatenate((sealed, np.array(rows, LINE))), (*self.names, self.tail.name))

    def newest(self) -> Any:
        """Which of the sealed lines are the newest of their key. Two keys share a hash once in 10**7 feeds of
        a million records."""
        order = self._by_hash()
        hashes = self.sealed["hash"][order]
        newest = np.zeros(len(order), dtype=bool)
        if len(order):
            newest[order[np.append(hashes[1:] != hashes[:-1], True)]] = True
        return newest

    def _by_hash(self) -> Any:
        if self._order is None or len(self._order) != len(self.sealed):
            self._order = np.argsort(self.sealed["hash"], kind="stable")
        return self._order

    def candidates(self, wanted: int) -> Iterator[Place]:
        """The lines of the keys with that hash, newest first."""
        for line in reversed(self.tail.lines) if wanted in self.tail.last else ():
            if line[0] == wanted:
                yield self.place(line)
        order = self._by_hash()
        hashes = self.sealed["hash"]
        position = int(np.searchsorted(hashes, np.uint64(wanted), side="right", sorter=order)) - 1
        while position >= 0 and int(hashes[order[position]]) == wanted:
            yield self.place(self.sealed[order[position]].item())
            position -= 1

    def place(self, row: Row) -> Place:
        known, tick, offset, length, segment = row
        name = self.names[segment] if segment < len(self.names) else self.tail.name
        return Place(tick, name, offset, length, known)
