"""`Feed`: many records in append-only files of lines, `log/00000001.jsonl` and so on.

A line is the checksum and the record with the tick of its write. A new version of a record is a new line;
the older one is garbage. When a segment is full the next one is begun and the full one gets an index: for
each line the hash of its key, its tick, its place and its revision. Opening a feed looks at the names and
reads the last segment; the index of another one is read when a key may be there, or a listing comes to it. When
garbage outweighs data neighbouring segments are merged without it, as `00000001-00000007.jsonl`. Of a full
segment whose lines are forgotten a smaller one is made, under a name of its own, so that whoever knows the old
one notices.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np

from backtest_kit.errors import Damaged
from backtest_kit.persist.backends.file_feed_damage import FeedDamage
from backtest_kit.persist.backends.file_feed_index import FeedIndex, View, newest_in_tail, place_of, rows_of
from backtest_kit.persist.backends.file_segments import (
    SUFFIX,
    Line,
    Place,
    Row,
    Tail,
    Unsound,
    has_index,
    hash_of,
    index_name,
    join_lines,
    last_number,
    merge,
    merged_name,
    next_name,
    read_index,
    segment_name,
    segments_of,
    split_lines,
    write_index,
)
from backtest_kit.persist.codec import NewerSchema, open_envelope, parse, unseal_line
from backtest_kit.persist.contracts import Contract, WriteRule
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.files import Disk, has_lost_blocks
from backtest_kit.persist.locks import LockSet
from backtest_kit.persist.quarantine import Quarantine
from backtest_kit.persist.store import Key, Record

T = TypeVar("T")

SEGMENT_BYTES: Final = 8 << 20
"""A segment that has reached this size is full. What opening a feed has to parse is at most one of it."""


class Feed:
    """One directory of segments. Methods block; the lock of the feed is taken before its guard."""

    def __init__(
        self,
        root: str,
        path: str,
        contract: Contract,
        disk: Disk,
        locks: LockSet,
        quarantine: Quarantine,
        *,
        read_only: bool = False,
    ) -> None:
        self._directory = f"{root}/{path}"
        self.path = path
        self.contract = contract
        self._disk = disk
        self._locks = locks
        self._quarantine = quarantine
        self._read_only = read_only
        self._guard = threading.RLock()
        self._loaded = False
        self._damage = FeedDamage(root, path, contract, disk, quarantine, read_only=read_only)
        self._index = FeedIndex(self._rows_of)
        self._made: dict[str, Any] = {}
        """Indexes that cannot be written, because the root is read-only."""

    def find(self, key: Key, *, locked: bool = False, despite_block: bool = False) -> Record | None:
        """The newest line under `key`. `locked` says that the caller holds the lock of the feed.

        Raises:
            Damaged: a line of the key is in quarantine, or one of which nobody knows the key.
        """
        return self._ask(lambda: self._find(key, despite_block=despite_block), locked=locked)

    def _find(self, key: Key, *, despite_block: bool) -> Record | None:
        known = hash_of(key)
        if not despite_block:
            self._damage.refuse(known)
        found = None
        for place in self._index.candidates(known):
            record = self._read([place])[0]
            if record.key == key:
                found = record
                break
        if not despite_block:  # what was read to find it may have been damaged
            self._damage.refuse(known)
        return found

    def absent(self, keys: Sequence[Key]) -> set[Key]:
        """Those of `keys` that certainly have no line: not all that have none. The caller holds the lock."""
        wanted = np.array([hash_of(key) for key in keys], np.uint64)
        held = self._ask(lambda: self._index.may_hold(wanted), locked=True)
        with self._guard:
            return set() if self._damage.found else {key for key, some in zip(keys, held, strict=True) if not some}

    def count(self) -> int:
        """How many records there are, removed ones left out."""
        return self._ask(self._count, locked=False)

    def _count(self) -> int:
        view, blocked = self._index.view(), self._damage.blocked()
        found = sum(1 for row in newest_in_tail(view, newest_first=True) if not row[5] and row[0] not in blocked)
        left_out = np.array([*blocked], np.uint64)
        for name in view.names:
            rows = self._index.newest(name, view)
            found += int(np.count_nonzero(~rows["removed"] & ~np.isin(rows["hash"], left_out)))
        return found

    def places(self, *, newest_first: bool, include_removed: bool) -> Iterator[Place]:
        """The newest line of every key that there is now, in order of writing, or in the reverse of it.

        Raises:
            Damaged: a line was found that is not sound. It is told once; the line is in quarantine then, its
                key is left out, and `damage` tells of it. Where nobody knows its key, every listing raises.
        """
        until = last = None
        while True:
            self.refresh()
            with self._guard:
                view = self._index.view()
            began = max(view.last_tick, time.time_ns())
            try:
                for place in self._listed(view, newest_first=newest_first, include_removed=include_removed):
                    # After a move it goes on where it was, without what was written since.
                    if until is not None and place.tick > until:
                        continue
                    if last is None or (place.tick < last if newest_first else place.tick > last):
                        last = place.tick
                        yield place
            except _Moved as moved:
                until = began if until is None else until
                self._make_up(moved, locked=False)
            else:
                return

    def _listed(self, view: View, *, newest_first: bool, include_removed: bool) -> Iterator[Place]:
        for name in (view.tail.name, *reversed(view.names)) if newest_first else (*view.names, view.tail.name):
            with self._guard:
                rows: Iterable[Row]
                if name == view.tail.name:
                    rows = newest_in_tail(view, newest_first=newest_first)
                else:
                    newest = self._index.newest(name, view)
                    rows = (row.item() for row in (newest[::-1] if newest_first else newest))
                blocked = self._damage.blocked()
            for row in rows:
                if row[0] not in blocked and (include_removed or not row[5]):
                    yield place_of(name, row)

    def damage(self) -> Damaged | None:
        """What to say of the lines that are in quarantine, which no listing has; None if there are none."""
        with self._guard:
            return self._damage.undecided()

    def read(self, places: Sequence[Place]) -> list[Record]:
        """The records at `places`, in their order, without those that have a newer line by now if they moved.

        Raises:
            Damaged: a line of one of their keys is not sound, or in quarantine.
        """
        while True:
            try:
                return self._read(places)
            except _Moved:
                pass
            except Unsound as unsound:
                self._set_aside(unsound, locked=False)
            places = self._ask(partial(self._moved, places), locked=False)

    def _moved(self, places: Sequence[Place]) -> list[Place]:
        for place in places:
            self._damage.refuse(place.hash)
        now = (next(self._index.candidates(place.hash), None) for place in places)
        return [found for place, found in zip(places, now, strict=True) if found and found.tick == place.tick]

    def _ask(self, work: Callable[[], T], *, locked: bool) -> T:
        """Do `work` on an index that is current. `locked` says that the caller holds the lock of the feed."""
        while True:
            try:
                if locked:
                    self.catch_up()
                else:
                    self.refresh()
                with self._guard:
                    return work()
            except _Moved as moved:
                self._make_up(moved, locked=locked)
            except Unsound as unsound:
                self._set_aside(unsound, locked=locked)

    def _read(self, places: Sequence[Place]) -> list[Record]:
        records = []
        for segment, group in itertools.groupby(places, key=lambda place: place.segment):
            wanted = list(group)
            try:
                lines = self._disk.read_spans(
                    f"{self._directory}/{segment}", [(place.offset, place.length) for place in wanted]
                )
            except FileNotFoundError:
                self.forget()
                raise _Moved(None) from None
            for place, line in zip(wanted, lines, strict=True):
                try:
                    records.append(open_envelope(self.contract, None, parse(unseal_line(line))))
                except NewerSchema as error:
                    raise NewerSchema(f"{self._directory}/{segment}: {error}") from None
                except Damaged as error:
                    raise Unsound(segment, place.offset, line, str(error), place.hash) from None
        return records

    def _set_aside(self, unsound: Unsound, *, locked: bool) -> None:
        """Deal with a line of which the index says that it is sound.

        Returns, for the caller to look again, if another process was there first; what it has put into
        quarantine is known after loading anew.

        Raises:
            Damaged: the line is in quarantine.
        """
        with contextlib.nullcontext() if locked else self._hold(), self._guard:
            self._loaded = False
            span = (unsound.offset, len(unsound.line))
            try:
                (line,) = self._disk.read_spans(f"{self._directory}/{unsound.segment}", [span])
            except FileNotFoundError:
                return
            self._disk.discard(f"{self._directory}/{index_name(unsound.segment)}")
            if line == unsound.line and not line.isspace():
                raise self._damage.told(self._damage.put_aside(unsound))

    def refresh(self) -> None:
        """Take in what other processes, or nobody yet, have told of the files."""
        with self._guard:
            if self._loaded and self._is_current():
                return
        with self._hold():
            self.catch_up()

    def _hold(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._read_only else self._locks.hold((self.path,))

    def catch_up(self) -> None:
        """As `refresh`, for a caller that holds the lock of the feed."""
        with self._guard:
            if not self._loaded:
                self._load()
            while not self._is_current():
                size = self._tail_size()
                if size < self._index.tail.size or (size == 0 and self._is_overtaken()):
                    self._load()  # somebody has cut or forgotten what was there
                    return
                self._take_in_tail()
                if self._disk.exists(self._following()):
                    self._seal()
                elif self._read_only:
                    return  # what is behind the last line is not cut off here

    def append(self, lines: Sequence[Line]) -> bool:
        """Write lines; return whether a compaction is due.

        The caller holds the lock of the feed. Nothing of `lines` stays if this raises.
        """
        with self._guard:
            self.catch_up()
            due = False
            if self._index.tail.size >= SEGMENT_BYTES:
                self._seal()
                if self.contract.write_rule is WriteRule.REPLACE:
                    due = self._ask(lambda: self._index.is_mostly_garbage, locked=True)
            data, rows = join_lines(lines, self._index.tail.size)
            fd = self._open_tail()
            try:
                try:
                    self._disk.write_all(fd, data)
                except BaseException:
                    self._disk.truncate(fd, self._index.tail.size)
                    raise
            finally:
                self._disk.close(fd)
            crashpoint("feed.after_append")
            for row in rows:
                self._index.tail.add(row)
            self._index.tail.size += len(data)
            return due

    @property
    def tail_name(self) -> str:
        with self._guard:
            return self._index.tail.name

    def compact(self) -> None:
        """Merge full segments that are neighbours without their garbage. Readers and writers go on meanwhile."""
        for names in self._ask(self._mergeable, locked=False):
            try:
                parts = self._ask(partial(self._without_garbage, names), locked=False)
                merged, index = merge(self._disk, self._directory, parts)
            except Unsound as unsound:
                with contextlib.suppress(Damaged):  # whoever needs the line is told of it
                    self._set_aside(unsound, locked=False)
                return
            except FileNotFoundError:
                return
            target = merged_name(names) if len(names) > 1 else next_name(names[0])
            if not parts or not self._swap(names, target, merged, index, "feed.after_compaction"):
                return

    def _mergeable(self) -> list[list[str]]:
        """Neighbours that without their garbage are no more than one segment, if that makes them fewer or far less."""
        view = self._index.view()
        groups: list[list[str]] = []
        size = 0
        garbage: dict[str, bool] = {}
        for name in view.names:
            rows = self._index.newest(name, view)
            live = int(rows["length"].sum())
            garbage[name] = 2 * len(rows) < len(self._index.rows(name))
            if not groups or (size and size + live > SEGMENT_BYTES):
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += live
        return [names for names in groups if len(names) > 1 or garbage[names[0]]]

    def _without_garbage(self, names: Sequence[str]) -> list[tuple[str, Any]]:
        view = self._index.view()
        return [(name, self._index.newest(name, view)) for name in names] if {*names} <= {*view.names} else []

    def prune(self, revisions: Mapping[Key, int]) -> int:
        """Forget the keys that have these revisions still; return how many those were.

        Readers and writers go on meanwhile. What was written since stays.
        """
        doomed = {hash_of(key): rev for key, rev in revisions.items()}
        with self._locks.hold((self.path,)), self._guard:
            gone, names = self._ask(partial(self._doomed, doomed), locked=True)
            if any(known in self._index.tail.last for known in gone.tolist()):
                self._begin_segment()
                names.append(self._index.names[-1])
        # The oldest first: no older line of a key is to be the newest one at any time.
        for name in names:
            if not self._shrink(name, gone):
                return 0
        return len(gone)

    def _doomed(self, doomed: Mapping[int, int]) -> tuple[Any, list[str]]:
        """The hashes of which the newest line has the revision given, and the full segments with lines of them."""
        tail = self._index.tail
        left = {known: rev for known, rev in doomed.items() if known not in tail.last}
        found = [
            known for known, rev in doomed.items() if known in tail.last and tail.lines[tail.last[known]][4] == rev
        ]
        for name in reversed(self._index.names):
            wanted = np.sort(np.array(list(left), np.uint64))
            if not len(wanted) or not self._index.among(name, wanted).any():
                continue
            rows = self._index.rows(name)
            for known, rev in rows[np.isin(rows["hash"], wanted)][["hash", "rev"]][::-1].tolist():
                if known in left and left.pop(known) == rev:
                    found.append(known)
        gone = np.sort(np.array(found, np.uint64))
        return gone, [name for name in self._index.names if self._index.among(name, gone).any()]

    def _begin_segment(self) -> None:
        """Make the segment that is being written a full one. The caller holds the lock of the feed.

        The next one begins with a blank line, from which others see that it has begun.
        """
        path = self._following()
        fd = self._disk.open_for_append(path)
        try:
            self._disk.write_all(fd, b"\n")
        finally:
            self._disk.close(fd)
        self._disk.sync_directory(self._directory)
        crashpoint("feed.after_begin")
        self._seal()
        self._take_in_tail()

    def _shrink(self, name: str, gone: Any) -> bool:
        """Take the lines with these hashes out of a full segment. False if it is not there any more."""
        try:
            rows = self._index.rows(name)
            rows = rows[~np.isin(rows["hash"], gone)]
            lines, index = merge(self._disk, self._directory, [(name, rows)])
        except (Unsound, FileNotFoundError, _Moved):
            return False
        return self._swap([name], next_name(name) if lines else None, lines, index, "feed.after_prune")

    def _swap(self, names: list[str], target: str | None, lines: bytes, index: Any, point: str) -> bool:
        """Put a segment, or none, in the place of neighbours. False if they are not there any more."""
        temp = None if target is None else self._disk.write_temp(self._directory, lines, sync=True)
        with self._locks.hold((self.path,)), self._guard:
            self.catch_up()
            if not {*names} <= {*self._index.names}:
                if temp is not None:
                    self._disk.discard(temp)
                return False
            if temp is not None and target is not None:
                self._disk.rename(temp, f"{self._directory}/{target}")
                write_index(self._disk, self._directory, target, index, len(lines))
                self._disk.sync_directory(self._directory)
            crashpoint(point)
            for name in names:
                self._remove(name)
            self._index.replace(names, target)
            return True

    def forget(self) -> None:
        """Load everything anew at the next use."""
        with self._guard:
            self._loaded = False

    # -- what is in memory ---------------------------------------------------------------------------

    def _is_current(self) -> bool:
        if self._tail_size() != self._index.tail.size:
            return False
        if not self._index.tail.size:
            return not self._is_overtaken()
        # Only a full segment has one that follows it.
        return not self._disk.exists(self._following())

    def _is_overtaken(self) -> bool:
        """Whether the segment that nobody had begun was begun, filled and replaced meanwhile."""
        number, name = self._index.tail.number, self._index.tail.name
        names = (entry.name for entry in self._disk.entries(self._directory) if entry.name.endswith(SUFFIX))
        return any(last_number(each) >= number and each != name for each in names)

    def _following(self) -> str:
        return f"{self._directory}/{segment_name(self._index.tail.number + 1)}"

    def _tail_size(self) -> int:
        try:
            return self._disk.stat(f"{self._directory}/{self._index.tail.name}").st_size
        except FileNotFoundError:
            return 0

    # -- reading the files ---------------------------------------------------------------------------

    def _load(self) -> None:
        self._index, self._made = FeedIndex(self._rows_of), {}
        self._damage.load()
        segments, leftovers = segments_of(entry.name for entry in self._disk.entries(self._directory))
        for name in leftovers:
            self._remove(name)
        for name in segments:
            self._index.tail = Tail(last_number(name))
            is_tail = name == segments[-1] and name == self._index.tail.name
            if is_tail and not has_index(self._disk, self._directory, name):
                self._take_in_tail()
            else:
                self._index.names.append(name)
                self._index.tail = Tail(self._index.tail.number + 1)
        self._cut_torn_end()
        self._loaded = True

    def _rows_of(self, name: str) -> Any:
        """The index of a full segment.

        Raises:
            _Moved: there is none.
        """
        if name in self._made:
            return self._made[name]
        try:
            rows = read_index(self._disk, self._directory, name)
        except FileNotFoundError:
            self.forget()
            raise _Moved(None) from None
        if rows is None:
            raise _Moved(name)
        return rows

    def _make_up(self, moved: _Moved, *, locked: bool) -> None:
        """Make the index that is missing. What is not there any more is known after loading anew."""
        name = moved.segment
        if name is None:
            return
        with contextlib.nullcontext() if locked else self._hold(), self._guard:
            try:
                data = self._disk.read(f"{self._directory}/{name}")
            except FileNotFoundError:
                self._loaded = False
                return
            whole = data.rfind(b"\n") + 1
            index = rows_of(self._lines(name, data[:whole], 0))
            if self._read_only:
                self._made[name] = index
                return
            if whole < len(data):
                whole += self._damage.cut_torn_end(name, whole, data[whole:])
            write_index(self._disk, self._directory, name, index, whole)

    def _take_in_tail(self) -> None:
        try:
            data = self._disk.read_from(f"{self._directory}/{self._index.tail.name}", self._index.tail.size)
        except FileNotFoundError:
            return
        whole = data.rfind(b"\n") + 1
        for row in self._lines(self._index.tail.name, data[:whole], self._index.tail.size):
            self._index.tail.add(row)
        self._index.tail.size += whole
        if whole < len(data):
            self._cut_torn_end()

    def _lines(self, name: str, data: bytes, start: int) -> Iterator[Row]:
        for row in split_lines(name, data, start):
            if isinstance(row, Unsound):
                # No index vouches for these lines yet: one with lost blocks may never have been durable.
                self._damage.put_aside(row, blocks=not has_lost_blocks(row.line, row.offset))
            else:
                yield row

    def _cut_torn_end(self) -> None:
        tail = self._index.tail
        try:
            torn = self._disk.read_from(f"{self._directory}/{tail.name}", tail.size)
        except FileNotFoundError:
            return
        if not self._read_only:
            tail.size += self._damage.cut_torn_end(tail.name, tail.size, torn)

    def _remove(self, segment: str) -> None:
        self._disk.discard(f"{self._directory}/{segment}")
        self._disk.discard(f"{self._directory}/{index_name(segment)}")

    def _open_tail(self) -> int:
        path = f"{self._directory}/{self._index.tail.name}"
        try:
            return self._disk.open_for_append(path)
        except FileNotFoundError:
            self._disk.make_directories(self._directory, sync=True)
            return self._disk.open_for_append(path)

    def _seal(self) -> None:
        name, index = self._index.tail.name, rows_of(self._index.tail.lines)
        if self._read_only:
            self._made[name] = index
        else:
            write_index(self._disk, self._directory, name, index, self._index.tail.size)
        crashpoint("feed.after_seal")
        self._index.seal(name, index)


class _Moved(Exception):
    """A segment is gone, because another process has merged it, or `segment` has no index that can be trusted."""

    def __init__(self, segment: str | None) -> None:
        super().__init__(segment)
        self.segment = segment
