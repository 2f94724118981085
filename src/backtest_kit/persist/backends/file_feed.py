"""`Feed`: many records in append-only files of lines, `log/00000001.jsonl` and so on.

A line is the checksum and the record with the tick of its write. A new version of a record is a new line;
the older one is garbage. When a segment is full the next one is begun and the full one gets an index: for
each line the hash of its key, its tick and its place. Opening a feed reads the indexes and the last
segment; nothing else is parsed until it is asked for. When garbage outweighs data the full segments are
merged into one, `00000001-00000007.jsonl`, without it. Of a full segment whose lines are forgotten a smaller
one is made, under a name of its own, so that whoever knows the old one notices.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from backtest_kit.errors import Damaged
from backtest_kit.persist.backends.file_feed_damage import FeedDamage
from backtest_kit.persist.backends.file_feed_index import FeedIndex
from backtest_kit.persist.backends.file_segments import (
    LINE,
    SUFFIX,
    Place,
    Places,
    Row,
    Tail,
    Unsound,
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
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.files import Disk
from backtest_kit.persist.locks import LockSet
from backtest_kit.persist.quarantine import Quarantine
from backtest_kit.persist.store import Key, Record

SEGMENT_BYTES: Final = 8 << 20
"""A segment that has reached this size is full. What opening a feed has to parse is at most one of it."""
_CHUNK: Final = 1024


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
        self._index = FeedIndex()

    def find(self, key: Key, *, locked: bool = False, despite_block: bool = False) -> Record | None:
        """The newest line under `key`. `locked` says that the caller holds the lock of the feed.

        Raises:
            Damaged: a line of the key is in quarantine, or one of which nobody knows the key.
        """
        while True:
            try:
                if locked:
                    self.catch_up()
                else:
                    self.refresh()
                with self._guard:
                    if not despite_block:
                        self._damage.refuse(hash_of(key))
                    for place in self._index.candidates(hash_of(key)):
                        record = self._read([place])[0]
                        if record.key == key:
                            return record
                    return None
            except _Moved:
                continue
            except Unsound as unsound:
                self._set_aside(unsound, locked=locked)

    def places(self, last: int | None = None) -> Places:
        """The newest line of every key, or the `last` ones of them.

        Raises:
            Damaged: a line was found that is not sound. It is told once; the line is in quarantine then, and
                its key is left out. Where nobody knows its key, every listing raises until it is decided about.
        """
        self.refresh()
        with self._guard:
            return self._index.latest(self._damage.blocked(), last)

    def read(self, places: Sequence[Place]) -> list[Record]:
        """The records at `places`, in their order, without those that have a newer line by now if they moved."""
        while True:
            try:
                return self._read(places)
            except _Moved:
                now = {place.tick: place for place in self.places().of([place.hash for place in places])}
                places = [now[place.tick] for place in places if place.tick in now]
            except Unsound as unsound:
                self._set_aside(unsound, locked=False)

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
                raise _Moved from None
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

    def append(self, lines: Sequence[tuple[int, bytes]]) -> bool:
        """Write records, dumped as JSON and each with its tick; return whether a compaction is due.

        The caller holds the lock of the feed. Nothing of `lines` stays if this raises.
        """
        with self._guard:
            self.catch_up()
            due = False
            if self._index.tail.size >= SEGMENT_BYTES:
                self._seal()
                due = 2 * int(self._index.newest().sum()) < len(self._index.sealed)
            data = join_lines(lines)
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
            self._add_lines(data, self._index.tail.size)
            self._index.tail.size += len(data)
            return due

    @property
    def tail_name(self) -> str:
        with self._guard:
            return self._index.tail.name

    def compact(self) -> None:
        """Merge the full segments without their garbage. Readers and writers go on meanwhile."""
        with self._locks.hold((self.path,)):
            self.catch_up()
            with self._guard:
                names = list(self._index.names)
                rows = self._index.sealed[self._index.newest()].copy()
        if not names or "-" in names[-1]:
            return
        try:
            merged, index = merge(self._disk, self._directory, names, rows)
        except Unsound as unsound:
            with contextlib.suppress(Damaged):  # whoever needs the line is told of it
                self._set_aside(unsound, locked=False)
            return
        target = merged_name(names)
        with self._locks.hold((self.path,)), self._guard:
            self.catch_up()
            if self._index.names[: len(names)] != names:
                return
            temp = self._disk.write_temp(self._directory, merged, sync=True)
            self._disk.rename(temp, f"{self._directory}/{target}")
            write_index(self._disk, self._directory, target, index, len(merged))
            self._disk.sync_directory(self._directory)
            crashpoint("feed.after_compaction")
            for name in names:
                self._remove(name)
            self._loaded = False

    def prune(self, revisions: Mapping[Key, int]) -> int:
        """Forget the keys that have these revisions still; return how many those were.

        Readers and writers go on meanwhile. What was written since stays.
        """
        doomed = self._doomed(revisions)
        with self._locks.hold((self.path,)), self._guard:
            self.catch_up()
            if any(known in self._index.tail.last for known in doomed):
                self._begin_segment()
            newest = self._index.sealed[self._index.newest()]
            gone = [known for known, tick in newest[["hash", "tick"]].tolist() if doomed.get(known) == tick]
            dead = np.isin(self._index.sealed["hash"], np.array(gone, np.uint64))
            rows, numbers = self._index.sealed, np.unique(self._index.sealed["segment"][dead])
            kept = {self._index.names[number]: rows[(rows["segment"] == number) & ~dead] for number in numbers}
        for name, lines in kept.items():
            if not self._shrink(name, lines):
                return 0
        return len(gone)

    def _doomed(self, revisions: Mapping[Key, int]) -> dict[int, int]:
        """The hash of each of these keys and the tick of its newest line, if that has the revision given."""
        doomed: dict[int, int] = {}
        places = self.places().of(np.array([hash_of(key) for key in revisions], np.uint64))
        for start in range(0, len(places), _CHUNK):
            ticks = {place.hash: place.tick for place in places[start : start + _CHUNK]}
            for record in self.read(places[start : start + _CHUNK]):
                if revisions.get(record.key) == record.rev:
                    doomed[hash_of(record.key)] = ticks[hash_of(record.key)]
        return doomed

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

    def _shrink(self, name: str, rows: Any) -> bool:
        """Keep only `rows` of a full segment. False if it is not there any more."""
        rows = rows.copy()
        rows["segment"] = 0
        temp = None
        if len(rows):
            try:
                lines, index = merge(self._disk, self._directory, [name], rows)
            except (Unsound, FileNotFoundError):
                return False
            temp = self._disk.write_temp(self._directory, lines, sync=True)
        with self._locks.hold((self.path,)), self._guard:
            self.catch_up()
            if name not in self._index.names:
                if temp is not None:
                    self._disk.discard(temp)
                return False
            if temp is not None:
                smaller = next_name(name)
                self._disk.rename(temp, f"{self._directory}/{smaller}")
                write_index(self._disk, self._directory, smaller, index, len(lines))
                self._disk.sync_directory(self._directory)
            crashpoint("feed.after_prune")
            self._remove(name)
            self._loaded = False
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
        self._index = FeedIndex()
        self._damage.load()
        segments, leftovers = segments_of(entry.name for entry in self._disk.entries(self._directory))
        for name in leftovers:
            self._remove(name)
        for name in segments:
            self._index.tail = Tail(last_number(name))
            index = read_index(self._disk, self._directory, name)
            if index is None and name == self._index.tail.name:
                self._take_in_tail()
                if name != segments[-1]:
                    self._seal()
            else:
                self._index.add_sealed(name, self._make_index(name) if index is None else index)
                self._index.tail = Tail(self._index.tail.number + 1)
        self._cut_torn_end()
        self._loaded = True

    def _make_index(self, name: str) -> Any:
        data = self._disk.read(f"{self._directory}/{name}")
        index = np.array(list(self._lines(name, data, 0)), LINE)
        if not self._read_only:
            write_index(self._disk, self._directory, name, index, len(data))
        return index

    def _take_in_tail(self) -> None:
        try:
            data = self._disk.read_from(f"{self._directory}/{self._index.tail.name}", self._index.tail.size)
        except FileNotFoundError:
            return
        whole = data.rfind(b"\n") + 1
        self._add_lines(data[:whole], self._index.tail.size)
        self._index.tail.size += whole
        if whole < len(data):
            self._cut_torn_end()

    def _add_lines(self, data: bytes, start: int) -> None:
        for line in self._lines(self._index.tail.name, data, start):
            self._index.tail.add(line)

    def _lines(self, name: str, data: bytes, start: int) -> Iterator[Row]:
        for row in split_lines(name, data, start, len(self._index.names)):
            if isinstance(row, Unsound):
                self._damage.put_aside(row)
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
        index = np.array(self._index.tail.lines, LINE) if self._index.tail.lines else np.empty(0, LINE)
        if not self._read_only:
            write_index(self._disk, self._directory, self._index.tail.name, index, self._index.tail.size)
        crashpoint("feed.after_seal")
        self._index.add_sealed(self._index.tail.name, index)
        self._index.tail = Tail(self._index.tail.number + 1)


class _Moved(Exception):
    """A segment is gone, because another process has merged it."""
