"""`Feed`: many records in append-only files of lines, `log/00000001.jsonl` and so on.

A line is the checksum and the record with the tick of its write. A new version of a record is a new line;
the older one is garbage. When a segment is full the next one is begun and the full one gets an index: for
each line the hash of its key, its tick and its place. Opening a feed reads the indexes and the last
segment; nothing else is parsed until it is asked for. When garbage outweighs data the full segments are
merged into one, `00000001-00000007.jsonl`, without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from backtest_kit.errors import Damaged
from backtest_kit.persist.codec import NewerSchema, open_envelope, parse, seal_line, unseal_line
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.files import Disk, LockSet
from backtest_kit.persist.quarantine import Quarantine
from backtest_kit.persist.store import Key, Record
from backtest_kit.persist.testing.crashpoints import crashpoint

SEGMENT_BYTES: Final = 8 << 20
"""A segment that has reached this size is full. What opening a feed has to parse is at most one of it."""
SUFFIX: Final = ".jsonl"
INDEX_SUFFIX: Final = ".index"

_MAGIC: Final = b"BKI1"
_LINE: Final = np.dtype([("hash", "<u8"), ("tick", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("segment", "<u4")])


class _Head(msgspec.Struct):
    at: int
    key: dict[str, str | int | bool]


_HEAD: Final = msgspec.json.Decoder(_Head)


class Place(NamedTuple):
    """Where one line is."""

    tick: int
    segment: str
    offset: int
    length: int


class _Tail:
    """The lines of the segment that is being written, newest last."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.size = 0
        self.lines: list[tuple[int, int, int, int, int]] = []
        self.last: dict[int, int] = {}

    @property
    def name(self) -> str:
        return f"{self.number:08d}{SUFFIX}"

    def add(self, line: tuple[int, int, int, int, int]) -> None:
        self.last[line[0]] = len(self.lines)
        self.lines.append(line)


class Feed:
    """One directory of segments. Methods block; the lock of the feed is taken before its guard."""

    def __init__(
        self, root: str, path: str, contract: Contract, disk: Disk, locks: LockSet, quarantine: Quarantine
    ) -> None:
        self._root = root
        self.path = path
        self.contract = contract
        self._disk = disk
        self._locks = locks
        self._quarantine = quarantine
        self._guard = threading.RLock()
        self._loaded = False
        self._unreported: list[Damaged] = []
        self._clear()

    def _clear(self) -> None:
        self._names: list[str] = []
        self._sealed: Any = np.empty(0, _LINE)
        self._order: Any = None
        self._blocked: dict[Key, str] = {}
        self._tail = _Tail(1)

    def find(self, key: Key, *, locked: bool = False) -> Record | None:
        """The newest line under `key`. `locked` says that the caller holds the lock of the feed."""
        while True:
            try:
                if locked:
                    self.catch_up()
                else:
                    self.refresh()
                with self._guard:
                    self._refuse_blocked(key)
                    for place in self._candidates(_hash(key)):
                        record = self._read([place])[0]
                        if record.key == key:
                            return record
                    return None
            except _Moved:
                continue
            except _Unsound as unsound:
                raise self._set_aside(unsound, locked=locked) from None

    def places(self) -> list[Place]:
        """The newest line of every key.

        Raises:
            Damaged: a line was found that is not sound. It is told once; the line is in quarantine then.
        """
        self.refresh()
        with self._guard:
            if self._unreported:
                raise self._unreported.pop()
            sealed = self._sealed[self._newest()]
            if self._tail.last:
                sealed = sealed[~np.isin(sealed["hash"], np.fromiter(self._tail.last, np.uint64))]
            rows = [*sealed.tolist(), *(self._tail.lines[index] for index in sorted(self._tail.last.values()))]
            return [self._place(row) for row in rows]

    def read(self, places: Sequence[Place]) -> list[Record]:
        """The records at `places`, in their order, without those that have a newer line by now if they moved."""
        while True:
            try:
                return self._read(places)
            except _Moved:
                now = {place.tick: place for place in self.places()}
                places = [now[place.tick] for place in places if place.tick in now]
            except _Unsound as unsound:
                raise self._set_aside(unsound, locked=False) from None

    def _read(self, places: Sequence[Place]) -> list[Record]:
        records = []
        for segment, group in itertools.groupby(places, key=lambda place: place.segment):
            wanted = list(group)
            try:
                lines = self._disk.read_spans(
                    f"{self._root}/{self.path}/{segment}", [(place.offset, place.length) for place in wanted]
                )
            except FileNotFoundError:
                self.forget()
                raise _Moved from None
            for place, line in zip(wanted, lines, strict=True):
                try:
                    records.append(open_envelope(self.contract, None, parse(unseal_line(line))))
                except NewerSchema as error:
                    raise NewerSchema(f"{self._root}/{self.path}/{segment}: {error}") from None
                except Damaged as error:
                    raise _Unsound(place, line, str(error)) from None
        return records

    def _set_aside(self, unsound: _Unsound, *, locked: bool) -> Damaged:
        """Deal with a line of which the index says that it is sound."""
        with contextlib.nullcontext() if locked else self._locks.hold((self.path,)), self._guard:
            place = unsound.place
            self._put_aside(place.segment, place.offset, unsound.line, unsound.reason)
            self._disk.discard(f"{self._root}/{self.path}/{_index_name(place.segment)}")
            self._loaded = False
            return self._unreported.pop()

    def refresh(self) -> None:
        """Take in what other processes, or nobody yet, have told of the files."""
        with self._guard:
            if self._loaded and self._is_current():
                return
        with self._locks.hold((self.path,)):
            self.catch_up()

    def catch_up(self) -> None:
        """As `refresh`, for a caller that holds the lock of the feed."""
        with self._guard:
            if not self._loaded:
                self._load()
            while not self._is_current():
                if self._tail_size() < self._tail.size:
                    self._load()  # somebody has cut what was there
                    return
                self._take_in_tail()
                if self._disk.exists(self._following()):
                    self._seal()

    def append(self, lines: Sequence[tuple[int, bytes]]) -> bool:
        """Write records, dumped as JSON and each with its tick; return whether a compaction is due.

        The caller holds the lock of the feed. Nothing of `lines` stays if this raises.
        """
        with self._guard:
            self.catch_up()
            due = False
            if self._tail.size >= SEGMENT_BYTES:
                self._seal()
                due = 2 * int(self._newest().sum()) < len(self._sealed)
            data = b"".join(seal_line(b'{"at":%d,%b' % (tick, dumped[1:])) for tick, dumped in lines)
            fd = self._open_tail()
            try:
                try:
                    self._disk.write_all(fd, data)
                except BaseException:
                    self._disk.truncate(fd, self._tail.size)
                    raise
            finally:
                self._disk.close(fd)
            crashpoint("feed.after_append")
            self._index(data, self._tail.size)
            self._tail.size += len(data)
            return due

    @property
    def tail_name(self) -> str:
        with self._guard:
            return self._tail.name

    def compact(self) -> None:
        """Merge the full segments without their garbage. Readers and writers go on meanwhile."""
        with self._locks.hold((self.path,)):
            self.catch_up()
            with self._guard:
                names = list(self._names)
                rows = self._sealed[self._newest()].copy()
        if not names or "-" in names[-1]:
            return
        merged, index = self._merge(names, rows)
        target = f"{names[0][:8]}-{_last_number(names[-1]):08d}{SUFFIX}"
        directory = f"{self._root}/{self.path}"
        with self._locks.hold((self.path,)), self._guard:
            self.catch_up()
            if self._names[: len(names)] != names or merged is None:
                return
            temp = self._disk.write_temp(directory, merged, sync=True)
            self._disk.rename(temp, f"{directory}/{target}")
            self._write_index(target, index, len(merged))
            self._disk.sync_directory(directory)
            crashpoint("feed.after_compaction")
            for name in names:
                self._remove(name)
            self._loaded = False

    def forget(self) -> None:
        """Load everything anew at the next use."""
        with self._guard:
            self._loaded = False

    # -- what is in memory ---------------------------------------------------------------------------

    def _is_current(self) -> bool:
        if self._tail_size() != self._tail.size:
            return False
        # Only a full segment has one that follows it.
        return self._tail.size < SEGMENT_BYTES or not self._disk.exists(self._following())

    def _following(self) -> str:
        return f"{self._root}/{self.path}/{self._tail.number + 1:08d}{SUFFIX}"

    def _tail_size(self) -> int:
        try:
            return self._disk.stat(f"{self._root}/{self.path}/{self._tail.name}").st_size
        except FileNotFoundError:
            return 0

    def _newest(self) -> Any:
        """Which of the sealed lines are the newest of their key. Two keys share a hash once in 10**7 feeds of
        a million records."""
        order = self._by_hash()
        hashes = self._sealed["hash"][order]
        newest = np.zeros(len(order), dtype=bool)
        if len(order):
            newest[order[np.append(hashes[1:] != hashes[:-1], True)]] = True
        return newest

    def _by_hash(self) -> Any:
        if self._order is None or len(self._order) != len(self._sealed):
            self._order = np.argsort(self._sealed["hash"], kind="stable")
        return self._order

    def _candidates(self, wanted: int) -> Iterator[Place]:
        for line in reversed(self._tail.lines) if wanted in self._tail.last else ():
            if line[0] == wanted:
                yield self._place(line)
        order = self._by_hash()
        hashes = self._sealed["hash"]
        position = int(np.searchsorted(hashes, np.uint64(wanted), side="right", sorter=order)) - 1
        while position >= 0 and int(hashes[order[position]]) == wanted:
            yield self._place(self._sealed[order[position]].item())
            position -= 1

    def _place(self, row: tuple[int, int, int, int, int]) -> Place:
        _, tick, offset, length, segment = row
        name = self._names[segment] if segment < len(self._names) else self._tail.name
        return Place(tick, name, offset, length)

    def _refuse_blocked(self, key: Key) -> None:
        path = self._blocked.get(key)
        if path is not None:
            self._quarantine.refuse_blocked(path)

    # -- reading the files ---------------------------------------------------------------------------

    def _load(self) -> None:
        self._clear()
        self._blocked = self._blocked_keys()
        segments = self._segments()
        for name in segments:
            self._tail = _Tail(_last_number(name))
            if name != self._tail.name or self._disk.exists(f"{self._root}/{self.path}/{_index_name(name)}"):
                self._add_sealed(name, self._read_index(name))
                self._tail = _Tail(self._tail.number + 1)
            else:
                self._take_in_tail()
                if name != segments[-1]:
                    self._seal()
        self._cut_torn_end()
        self._loaded = True

    def _segments(self) -> list[str]:
        """The segments in order. What a merged one covers was left by a crash before it could be removed."""
        directory = f"{self._root}/{self.path}"
        found = sorted(
            (name for name in (entry.name for entry in self._disk.entries(directory)) if name.endswith(SUFFIX)),
            key=lambda name: (name[:8], -_last_number(name), -len(name)),
        )
        segments: list[str] = []
        covered = 0
        for name in found:
            last = _last_number(name)
            if last <= covered:
                self._remove(name)
            else:
                segments.append(name)
                covered = last
        return segments

    def _blocked_keys(self) -> dict[Key, str]:
        reasons = (self._quarantine.reason(f"{self.path}/{name}") for name in self._quarantine.names(self.path))
        return {tuple(reason.key): reason.path for reason in reasons if reason is not None and reason.blocks}

    def _read_index(self, name: str) -> Any:
        path = f"{self._root}/{self.path}/{name}"
        size = self._disk.stat(path).st_size
        try:
            data = self._disk.read(f"{self._root}/{self.path}/{_index_name(name)}")
        except FileNotFoundError:
            data = b""
        body = data[16:]
        if data[:16] == _MAGIC + zlib.crc32(body).to_bytes(4, "little") + size.to_bytes(8, "little"):
            return np.frombuffer(body, _LINE).copy()
        index = np.array(list(self._lines(name, self._disk.read(path), 0)), _LINE)  # an index can be made again
        self._write_index(name, index, size)
        return index

    def _write_index(self, name: str, index: Any, size: int) -> None:
        body = index.tobytes()
        head = _MAGIC + zlib.crc32(body).to_bytes(4, "little") + size.to_bytes(8, "little")
        directory = f"{self._root}/{self.path}"
        self._disk.rename(self._disk.write_temp(directory, head + body, sync=False), f"{directory}/{_index_name(name)}")

    def _add_sealed(self, name: str, index: Any) -> None:
        index["segment"] = len(self._names)
        self._names.append(name)
        self._sealed = np.concatenate((self._sealed, index))

    def _take_in_tail(self) -> None:
        try:
            data = self._disk.read_from(f"{self._root}/{self.path}/{self._tail.name}", self._tail.size)
        except FileNotFoundError:
            return
        whole = data.rfind(b"\n") + 1
        self._index(data[:whole], self._tail.size)
        self._tail.size += whole
        if whole < len(data):
            self._cut_torn_end()

    def _index(self, data: bytes, start: int) -> None:
        for line in self._lines(self._tail.name, data, start):
            self._tail.add(line)

    def _lines(self, name: str, data: bytes, start: int) -> Iterator[tuple[int, int, int, int, int]]:
        segment = len(self._names)
        offset = start
        for line in (part + b"\n" for part in data.split(b"\n")[:-1]):
            if not line.isspace():
                try:
                    head = _HEAD.decode(unseal_line(line))
                    yield _hash(tuple(head.key.values())), head.at, offset, len(line), segment
                except (Damaged, msgspec.MsgspecError) as error:
                    self._put_aside(name, offset, line, str(error))
            offset += len(line)

    def _put_aside(self, name: str, offset: int, line: bytes, reason: str) -> None:
        """Move a damaged line into quarantine; blanks stay in its place, so that no offset changes."""
        path = f"{self.path}/{name}.{offset}"
        key = _key_in(line, self.contract)
        self._unreported.append(self._quarantine.keep(self.contract, key, path, line, reason, blocks=bool(key)))
        if key:
            self._blocked[key] = path
        fd = self._disk.open_for_update(f"{self._root}/{self.path}/{name}")
        try:
            self._disk.overwrite(fd, offset, b" " * (len(line) - 1) + b"\n")
            self._disk.fsync(fd)
        finally:
            self._disk.close(fd)

    def _cut_torn_end(self) -> None:
        """Cut off the end of a line whose write did not get through: it was never acknowledged as durable."""
        path = f"{self.path}/{self._tail.name}"
        try:
            torn = self._disk.read_from(f"{self._root}/{path}", self._tail.size)
        except FileNotFoundError:
            return
        if torn:
            self._quarantine.keep(
                self.contract,
                (),
                f"{path}.{self._tail.size}.torn",
                torn,
                "the write of the line was cut short",
                blocks=False,
            )
            fd = self._disk.open_for_update(f"{self._root}/{path}")
            try:
                self._disk.truncate(fd, self._tail.size)
            finally:
                self._disk.close(fd)

    def _remove(self, segment: str) -> None:
        self._disk.discard(f"{self._root}/{self.path}/{segment}")
        self._disk.discard(f"{self._root}/{self.path}/{_index_name(segment)}")

    # -- segments ------------------------------------------------------------------------------------

    def _open_tail(self) -> int:
        path = f"{self._root}/{self.path}/{self._tail.name}"
        try:
            return self._disk.open_for_append(path)
        except FileNotFoundError:
            self._disk.make_directories(f"{self._root}/{self.path}", sync=True)
            return self._disk.open_for_append(path)

    def _seal(self) -> None:
        index = np.array(self._tail.lines, _LINE) if self._tail.lines else np.empty(0, _LINE)
        self._write_index(self._tail.name, index, self._tail.size)
        crashpoint("feed.after_seal")
        self._add_sealed(self._tail.name, index)
        self._tail = _Tail(self._tail.number + 1)

    def _merge(self, names: list[str], rows: Any) -> tuple[bytes | None, Any]:
        parts: list[bytes] = []
        size = 0
        for number, name in enumerate(names):
            data = self._disk.read(f"{self._root}/{self.path}/{name}")
            for row in np.flatnonzero(rows["segment"] == number):
                offset, length = int(rows["offset"][row]), int(rows["length"][row])
                line = data[offset : offset + length]
                try:
                    unseal_line(line)
                except Damaged:
                    self.forget()
                    return None, rows  # the next reader finds the line; nothing is merged over it
                parts.append(line)
                rows["offset"][row] = size
                size += length
        return b"".join(parts), rows


class _Moved(Exception):
    """A segment is gone, because another process has merged it."""


class _Unsound(Exception):
    """A line is not what its index says."""

    def __init__(self, place: Place, line: bytes, reason: str) -> None:
        super().__init__(reason)
        self.place, self.line, self.reason = place, line, reason


def _last_number(segment: str) -> int:
    return int(segment.removesuffix(SUFFIX)[-8:])


def _index_name(segment: str) -> str:
    return segment.removesuffix(SUFFIX) + INDEX_SUFFIX


def _hash(key: Key) -> int:
    return int.from_bytes(hashlib.blake2b(str(key[-1]).encode(), digest_size=8).digest(), "little")


def _key_in(line: bytes, contract: Contract) -> Key:
    """The key in a damaged line, if it can still be read; else nothing."""
    try:
        return open_envelope(contract, None, parse(line[9:])).key
    except Damaged:
        return ()
