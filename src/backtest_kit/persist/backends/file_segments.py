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
from backtest_kit.persist.store import Key

SUFFIX: Final = ".jsonl"
INDEX_SUFFIX: Final = ".index"
LINE: Final = np.dtype([("hash", "<u8"), ("tick", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("segment", "<u4")])
"""A row of an index; the segment is the number of its name in the feed that holds it in memory."""

Row = tuple[int, int, int, int, int]

_MAGIC: Final = b"BKI1"
_MARK: Final = re.compile(rb'"mark":"([0-9a-f]{16})([0-9a-f]{8})"')


class _Keyed(msgspec.Struct):
    key: dict[str, str | int | bool]


class _Head(_Keyed):
    at: int


_KEYED: Final = msgspec.json.Decoder(_Keyed)
_HEAD: Final = msgspec.json.Decoder(_Head)


class Place(NamedTuple):
    """Where one line is."""

    tick: int
    segment: str
    offset: int
    length: int
    hash: int


class Places:
    """Many of them, in order of writing, as the rows of an index; a `Place` is made when it is asked for."""

    def __init__(self, rows: Any, names: tuple[str, ...]) -> None:
        self.rows = rows
        self._names = names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Place:
        known, tick, offset, length, segment = self.rows[index].item()
        return Place(tick, self._names[segment], offset, length, known)

    @property
    def ticks(self) -> Any:
        return self.rows["tick"]

    def of(self, hashes: Any) -> list[Place]:
        """Those of the keys with these hashes."""
        return [self[int(index)] for index in np.flatnonzero(np.isin(self.rows["hash"], hashes))]


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


def join_lines(lines: Iterable[tuple[int, bytes]]) -> bytes:
    """Records, dumped as JSON and each with its tick, as lines.

    The mark of a line is the hash of its key, with a checksum of its own: when the line is damaged it still
    says which key is.
    """
    return b"".join(_line(tick, dumped) for tick, dumped in lines)


def _line(tick: int, dumped: bytes) -> bytes:
    digits = b"%016x" % hash_of(tuple(_KEYED.decode(dumped).key.values()))
    head = b'{"at":%d,"mark":"%b' % (tick, digits)
    length = len(b"00000000 ") + len(head) + len(b'00000000",') + len(dumped[1:]) + len(b"\n")
    return seal_line(b'%b%b",%b' % (head, _mark_check(digits, length), dumped[1:]))


def split_lines(name: str, data: bytes, start: int, segment: int) -> Iterator[Row | Unsound]:
    """A row for each line of `data`, which begins at byte `start` of the segment `name`; blank lines have none."""
    offset = start
    for line in (part + b"\n" for part in data.split(b"\n")[:-1]):
        if not line.isspace():
            try:
                head = _HEAD.decode(unseal_line(line))
                yield hash_of(tuple(head.key.values())), head.at, offset, len(line), segment
            except (Damaged, msgspec.MsgspecError) as error:
                yield Unsound(name, offset, line, str(error), hash_in(line))
        offset += len(line)


def read_index(disk: Disk, directory: str, segment: str) -> Any:
    """The index of a full segment, or None if there is none that can be trusted."""
    try:
        data = disk.read(f"{directory}/{index_name(segment)}")
    except FileNotFoundError:
        return None
    size = disk.stat(f"{directory}/{segment}").st_size
    body = data[16:]
    return np.frombuffer(body, LINE).copy() if data[:16] == _index_head(segment, size, body) else None


def write_index(disk: Disk, directory: str, segment: str, index: Any, size: int) -> None:
    body = index.tobytes()
    temp = disk.write_temp(directory, _index_head(segment, size, body) + body, sync=False)
    disk.rename(temp, f"{directory}/{index_name(segment)}")


def merge(disk: Disk, directory: str, segments: list[str], rows: Any) -> tuple[bytes, Any]:
    """The lines at `rows` of `segments`, one after the other, and their index.

    Raises:
        Unsound: one of the lines is.
    """
    parts: list[bytes] = []
    size = 0
    for number, name in enumerate(segments):
        data = disk.read(f"{directory}/{name}")
        for row in np.flatnonzero(rows["segment"] == number):
            offset, length = int(rows["offset"][row]), int(rows["length"][row])
            line = data[offset : offset + length]
            try:
                unseal_line(line)
            except Damaged as error:
                raise Unsound(name, offset, line, str(error), int(rows["hash"][row])) from None
            parts.append(line)
            rows["offset"][row] = size
            size += length
    return b"".join(parts), rows


def _index_head(segment: str, size: int, body: bytes) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(segment.encode()))
    return _MAGIC + checksum.to_bytes(4, "little") + size.to_bytes(8, "little")
