"""Segments of a feed: their names, their lines and the index of a full one."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from backtest_kit.errors import Damaged
from backtest_kit.persist.codec import open_envelope, parse, seal_line, unseal_line
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import Key, Record

SUFFIX: Final = ".jsonl"
INDEX_SUFFIX: Final = ".index"
LINE: Final = np.dtype(
    [("hash", "<u8"), ("tick", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("rev", "<u4"), ("removed", "?")]
)
"""A row of an index."""

Row = tuple[int, int, int, int, int, bool]

_MAGIC: Final = b"BKI2"
_HEAD_BYTES: Final = 28
_MARK: Final = re.compile(rb'"mark":"([0-9a-f]{16})([0-9a-f]{8})"')


class _Keyed(msgspec.Struct):
    key: dict[str, str | int | bool]


class _Head(_Keyed):
    at: int
    rev: int
    removed: bool


_KEYED: Final = msgspec.json.Decoder(_Keyed)
_HEAD: Final = msgspec.json.Decoder(_Head)


class Place(NamedTuple):
    """Where one line is."""

    tick: int
    segment: str
    offset: int
    length: int
    hash: int


class Line(NamedTuple):
    """A record that is to be appended, dumped as JSON, and the tick of its write."""

    tick: int
    record: Record
    dumped: bytes


class Unsound(Exception):
    """A line that is not what was written. `hash` is that of its key, None where it cannot be known any more."""

    def __init__(self, segment: str, offset: int, line: bytes, reason: str, hash: int | None) -> None:
        super().__init__(reason)
        self.segment, self.offset, self.line, self.reason, self.hash = segment, offset, line, reason, hash


class Tail:
    """The lines of the segment that is being written, newest last."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.size = 0
        self.lines: list[Row] = []
        self.last: dict[int, int] = {}

    @property
    def name(self) -> str:
        return segment_name(self.number)

    def add(self, line: Row) -> None:
        self.last[line[0]] = len(self.lines)
        self.lines.append(line)


def segment_name(number: int) -> str:
    return f"{number:08d}{SUFFIX}"


def last_number(segment: str) -> int:
    """The number of a segment, or of the last one that a merged segment covers."""
    return int(segment.removesuffix(SUFFIX)[-8:])


def generation(segment: str) -> int:
    """How often lines were taken out of a segment: `00000003.0002-00000003.jsonl` has lost some twice."""
    return int(segment[9 : segment.index("-")] or 0) if "-" in segment else 0


def next_name(segment: str) -> str:
    """What a segment is called after lines were taken out of it."""
    return f"{segment[:8]}.{generation(segment) + 1:04d}-{last_number(segment):08d}{SUFFIX}"


def merged_name(segments: list[str]) -> str:
    return f"{segments[0][:8]}-{last_number(segments[-1]):08d}{SUFFIX}"


def index_name(segment: str) -> str:
    return segment.removesuffix(SUFFIX) + INDEX_SUFFIX


def hash_of(key: Key) -> int:
    """64 bits of the last component; the feed has the others in its path."""
    return int.from_bytes(hashlib.blake2b(str(key[-1]).encode(), digest_size=8).digest(), "little")


def key_in(line: bytes, contract: Contract, known: int | None) -> Key:
    """The key in a damaged line, if it can still be read and has the hash that is known; else nothing."""
    try:
        key = open_envelope(contract, None, parse(line[9:])).key
    except Damaged:
        return ()
    return key if hash_of(key) == known else ()


def hash_in(line: bytes) -> int | None:
    """The hash that the mark of a damaged line tells, or None where the mark or the length of the line is damaged.

    A line of another length may be parts of several, so that one key would not be all that is damaged.
    """
    found = _MARK.search(line)
    return int(found[1], 16) if found and found[2] == _mark_check(found[1], len(line)) else None


def _mark_check(digits: bytes, length: int) -> bytes:
    return b"%08x" % zlib.crc32(b"%b %d" % (digits, length))


def segments_of(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The segments among `names` in order, and those that another one replaces: a crash has left them behind."""
    found = sorted(
        (name for name in names if name.endswith(SUFFIX)),
        key=lambda name: (name[:8], -last_number(name), -generation(name), -len(name)),
    )
    segments: list[str] = []
    leftovers: list[str] = []
    for name in found:
        covered = bool(segments) and last_number(name) <= last_number(segments[-1])
        (leftovers if covered else segments).append(name)
    return segments, leftovers


def join_lines(lines: Iterable[Line], start: int) -> tuple[bytes, list[Row]]:
    """The bytes of `lines` and the row of each, if they are written at byte `start` of a segment.

    The mark of a line is the hash of its key, with a checksum of its own: when the line is damaged it still
    says which key is.
    """
    parts, rows = [], []
    for tick, record, dumped in lines:
        known = hash_of(record.key)
        parts.append(line := _line(tick, known, dumped))
        rows.append((known, tick, start, len(line), record.rev, record.removed))
        start += len(line)
    return b"".join(parts), rows


def _line(tick: int, known: int, dumped: bytes) -> bytes:
    digits = b"%016x" % known
    head = b'{"at":%d,"mark":"%b' % (tick, digits)
    length = len(b"00000000 ") + len(head) + len(b'00000000",') + len(dumped[1:]) + len(b"\n")
    return seal_line(b'%b%b",%b' % (head, _mark_check(digits, length), dumped[1:]))


def split_lines(name: str, data: bytes, start: int) -> Iterator[Row | Unsound]:
    """A row for each line of `data`, which begins at byte `start` of the segment `name`; blank lines have none."""
    offset = start
    for line in (part + b"\n" for part in data.split(b"\n")[:-1]):
        if not line.isspace():
            try:
                head = _HEAD.decode(unseal_line(line))
                yield hash_of(tuple(head.key.values())), head.at, offset, len(line), head.rev, head.removed
            except (Damaged, msgspec.MsgspecError) as error:
                yield Unsound(name, offset, line, str(error), hash_in(line))
        offset += len(line)


def has_index(disk: Disk, directory: str, segment: str) -> bool:
    """Whether there is an index of a full segment, as far as its first bytes tell."""
    path = f"{directory}/{index_name(segment)}"
    try:
        ((head,), size) = disk.read_spans(path, [(0, _HEAD_BYTES)]), disk.stat(path).st_size
    except FileNotFoundError:
        return False
    count = int.from_bytes(head[16:24], "little")
    whole = size == _HEAD_BYTES + count * LINE.itemsize
    return whole and head == _index_head(segment, disk.stat(f"{directory}/{segment}").st_size, count, head[24:])


def read_index(disk: Disk, directory: str, segment: str) -> Any:
    """The index of a full segment, or None if there is none that can be trusted."""
    try:
        data = disk.read(f"{directory}/{index_name(segment)}")
    except FileNotFoundError:
        return None
    size, body = disk.stat(f"{directory}/{segment}").st_size, data[_HEAD_BYTES:]
    sound = data[:_HEAD_BYTES] == _index_head(segment, size, len(body) // LINE.itemsize, _checksum(body))
    return np.frombuffer(body, LINE) if sound else None


def write_index(disk: Disk, directory: str, segment: str, index: Any, size: int) -> None:
    body = index.tobytes()
    temp = disk.write_temp(directory, _index_head(segment, size, len(index), _checksum(body)) + body, sync=True)
    disk.rename(temp, f"{directory}/{index_name(segment)}")


def merge(disk: Disk, directory: str, segments: Iterable[tuple[str, Any]]) -> tuple[bytes, Any]:
    """The lines at some rows of each of `segments`, one after the other, and their index.

    Raises:
        Unsound: one of the lines is.
        FileNotFoundError: one of the segments is gone.
    """
    parts: list[bytes] = []
    indexes = []
    size = 0
    for name, kept in segments:
        data = disk.read(f"{directory}/{name}")
        rows = kept.copy()
        indexes.append(rows)
        for number, (known, _, offset, length, *_) in enumerate(kept.tolist()):
            line = data[offset : offset + length]
            try:
                unseal_line(line)
            except Damaged as error:
                raise Unsound(name, offset, line, str(error), known) from None
            parts.append(line)
            rows["offset"][number] = size
            size += length
    return b"".join(parts), np.concatenate(indexes)


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(4, "little")


def _index_head(segment: str, size: int, count: int, checksum: bytes) -> bytes:
    told = size.to_bytes(8, "little") + count.to_bytes(8, "little") + checksum
    return _MAGIC + zlib.crc32(told, zlib.crc32(segment.encode())).to_bytes(4, "little") + told
