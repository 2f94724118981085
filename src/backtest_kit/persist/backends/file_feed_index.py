"""`FeedIndex`: where the lines of a feed are.

Of a full segment only the upper halves of the hashes of its keys stay in memory, 4 bytes a line, and no more than
those of the segments that somebody has searched. Its rows are read when a key may be among them, and a few
segments of them are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from backtest_kit.persist.backends.file_segments import LINE, Place, Row, Tail

_KEPT: Final = 4
"""Segments whose rows stay in memory: some megabytes."""


class View(NamedTuple):
    """The lines that there were at one moment. Later ones do not change it."""

    names: tuple[str, ...]
    tail: Tail
    length: int
    """Lines of the tail."""

    @property
    def last_tick(self) -> int:
        """That of the newest line of the tail."""
        return max((line[1] for line in self.tail.lines[: self.length]), default=0)


class FeedIndex:
    """The lines of the full segments and, as they come, those of the last one. Not safe for threads."""

    def __init__(self, read: Callable[[str], Any]) -> None:
        """`read` returns the rows of a full segment."""
        self.names: list[str] = []
        """Of the full segments."""
        self.tail = Tail(1)
        self._read = read
        self._rows: OrderedDict[str, Any] = OrderedDict()
        self._halves: dict[str, Any] = {}

    def seal(self, name: str, rows: Any) -> None:
        """The tail is a full segment, with these rows; the next one is begun."""
        self.names.append(name)
        self._keep(name, rows)
        self.tail = Tail(self.tail.number + 1)

    def replace(self, names: Sequence[str], name: str | None) -> None:
        """Have one full segment, or none, where others of them were, one after the other."""
        position = self.names.index(names[0])
        self.names[position : position + len(names)] = [] if name is None else [name]
        for gone in names:
            self._rows.pop(gone, None)
            self._halves.pop(gone, None)

    def rows(self, name: str) -> Any:
        """Those of a full segment, in order of writing."""
        if name not in self._rows:
            self._keep(name, self._read(name))
        self._rows.move_to_end(name)
        return self._rows[name]

    def may_hold(self, wanted: Any) -> Any:
        """Which of these hashes any line may have: no false no, and a false yes once in thousands."""
        found = np.array([int(each) in self.tail.last for each in wanted], bool)
        halves = _halves(wanted)
        for name in self.names:
            found |= _within(self._halves_of(name), halves)
        return found

    def among(self, name: str, wanted: Any) -> Any:
        """Which of these hashes a full segment has."""
        found = _within(self._halves_of(name), _halves(wanted))
        if found.any():
            found[found] = np.isin(wanted[found], self.rows(name)["hash"])
        return found

    def newest(self, name: str, view: View) -> Any:
        """The rows of a full segment that are the newest ones of their keys, in order of writing."""
        rows = self.rows(name)
        # Two keys share a hash once in 10**7 feeds of a million records.
        _, last = np.unique(rows["hash"][::-1], return_index=True)
        # In the order of their hashes: a search for sorted ones is several times as fast as for others.
        rows = rows[len(rows) - 1 - last]
        newer = np.array([line[0] for line in view.tail.lines[: view.length]], np.uint64)
        rows = rows[~np.isin(rows["hash"], newer)]
        for later in view.names[view.names.index(name) + 1 :]:
            rows = rows[~self.among(later, rows["hash"])]
        return rows[np.lexsort((rows["offset"], rows["tick"]))]

    def candidates(self, wanted: int) -> Iterator[Place]:
        """The lines of the keys with that hash, newest first."""
        for line in reversed(self.tail.lines) if wanted in self.tail.last else ():
            if line[0] == wanted:
                yield place_of(self.tail.name, line)
        one = np.array([wanted], np.uint64)
        for name in reversed(self.names):
            if self.among(name, one)[0]:
                rows = self.rows(name)
                for row in rows[rows["hash"] == one[0]][::-1].tolist():
                    yield place_of(name, row)

    @property
    def is_mostly_garbage(self) -> bool:
        """Whether of the lines of the full segments more than half have newer ones there."""
        halves = [self._halves_of(name) for name in self.names]
        return bool(halves) and 2 * len(np.unique(np.concatenate(halves))) < sum(map(len, halves))

    def view(self) -> View:
        return View(tuple(self.names), self.tail, len(self.tail.lines))

    def _halves_of(self, name: str) -> Any:
        if name not in self._halves:
            self._halves[name] = np.sort(_halves(self.rows(name)["hash"]))
        return self._halves[name]

    def _keep(self, name: str, rows: Any) -> None:
        self._rows[name] = rows
        if len(self._rows) > _KEPT:
            self._rows.popitem(last=False)


def newest_in_tail(view: View, *, newest_first: bool) -> Iterator[Row]:
    """The newest line of every key of the tail."""
    lines = view.tail.lines
    if newest_first:
        seen = set()
        for index in range(view.length - 1, -1, -1):
            if lines[index][0] not in seen:
                seen.add(lines[index][0])
                yield lines[index]
        return
    last = {lines[index][0]: index for index in range(view.length)}
    for index in sorted(last.values()):
        yield lines[index]


def place_of(name: str, row: Row) -> Place:
    known, tick, offset, length, *_ = row
    return Place(tick, name, offset, length, known)


def rows_of(lines: Iterable[Row]) -> Any:
    return np.array(list(lines), LINE)


def _halves(hashes: Any) -> Any:
    return (hashes >> np.uint64(32)).astype(np.uint32)


def _within(halves: Any, wanted: Any) -> Any:
    if not len(halves):
        return np.zeros(len(wanted), bool)
    places = np.searchsorted(halves, wanted)
    places[places == len(halves)] = 0
    return halves[places] == wanted
