"""`Log`: lines that are only ever added, in one file a day: `log/2026-12-01.jsonl`.

A line is the record as JSON, its checksum the last field. There is no index: the ids of lines are unique by
construction, so a write looks for nothing, and the newest lines are read from the end of the newest file. Files are
replaced only to forget lines. The order of lines is that in which they lie there.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from backtest_kit.errors import Damaged
from backtest_kit.persist.codec import NewerSchema, parse, seal_line, unseal_line, unseal_record_line
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.files import Disk, has_lost_blocks
from backtest_kit.persist.locks import LockSet
from backtest_kit.persist.quarantine import Quarantine
from backtest_kit.persist.store import Key, Record

SUFFIX: Final = ".jsonl"
PATIENCE: Final = 2.0
_BLOCK: Final = 1 << 18
_REMEMBERED: Final = 1000
"""Ids of the last lines: more than one caller writes in one go."""

_logger = logging.getLogger(__name__)


class Line(NamedTuple):
    """A line of a log, with its newline."""

    path: str
    offset: int
    data: bytes

    @property
    def is_blank(self) -> bool:
        """Whether it is what is left of a line that is in quarantine."""
        return self.data.isspace()


class _Head(msgspec.Struct):
    removed: bool


_HEAD: Final = msgspec.json.Decoder(_Head)


class Log:
    """Methods block. `path` is the directory of a log, relative to the root; a writer holds its lock."""

    def __init__(self, root: str, disk: Disk, locks: LockSet, quarantine: Quarantine) -> None:
        self._root = root
        self._disk = disk
        self._locks = locks
        self._quarantine = quarantine
        self.read_only = False
        self._remembered: dict[tuple[str, Key], Record] = {}

    # -- reading -------------------------------------------------------------------------------------

    def files(self, path: str) -> list[str]:
        """The files of a log, the oldest first."""
        names = sorted(entry.name for entry in self._disk.entries(f"{self._root}/{path}"))
        return [f"{path}/{name}" for name in names if name.endswith(SUFFIX)]

    def records(self, row: Contract, path: str, *, newest_first: bool = False) -> Iterator[Record]:
        """The records in order of writing, or in the reverse of it.

        Raises:
            Damaged: behind all others, if a line is in quarantine, or was found that has to go there.
        """
        for line in self._lines(path, newest_first=newest_first):
            record = self._read(row, line)
            if record is not None:
                yield record
        self._refuse_damage(path)

    def _refuse_damage(self, path: str) -> None:
        """Raise `Damaged` if a line is in quarantine that an operator has to decide about: its key may be any."""
        for name in sorted(self._quarantine.names(path)):
            self._quarantine.refuse_blocked(f"{path}/{name}")

    def find(self, row: Contract, path: str, key: Key, *, locked: bool = False) -> Record | None:
        """The last line of that key. Reads the log from its end until there is one.

        `locked`: the caller holds the lock, and wants the line whatever else of that key is in quarantine.

        Raises:
            Damaged: there is none, and a line is in quarantine, which may be the one.
        """
        mark = b'"key":' + msgspec.json.encode(dict(zip(row.key_fields, key, strict=True)))
        for line in self._lines(path, newest_first=True):
            # Every line is verified: among those that are damaged there may be the one of this key.
            if mark in line.data or not _is_whole(line):
                record = self._read(row, line, locked=locked)
                if record is not None and record.key == key:
                    return record
        if not locked:
            self._refuse_damage(path)
        return None

    def count(self, path: str) -> int:
        """How many records there are, removed ones left out."""
        lines = (line for line in self._lines(path) if not line.is_blank and _is_whole(line))
        return sum(not _HEAD.decode(line.data).removed for line in lines)

    def lines_of(self, file: str) -> Generator[Line, None, None]:
        """The whole lines of one file, damaged and blank ones too."""
        for lines in self._blocks(file):
            yield from lines

    def _lines(self, path: str, *, newest_first: bool = False) -> Iterator[Line]:
        files = self.files(path)
        for file in reversed(files) if newest_first else files:
            with contextlib.suppress(FileNotFoundError):  # forgotten meanwhile
                for lines in self._blocks(file, newest_first=newest_first):
                    yield from reversed(lines) if newest_first else lines

    def _blocks(self, file: str, *, newest_first: bool = False) -> Iterator[list[Line]]:
        """The lines of one file as it is now, many at a time, whatever is written or forgotten meanwhile."""
        fd = self._disk.open_for_reading(f"{self._root}/{file}")
        try:
            size = self._disk.fstat(fd).st_size
            for offset, block in self._backward(fd, size) if newest_first else self._forward(fd, size):
                yield list(_split(file, offset, block))
        finally:
            self._disk.close(fd)

    def _forward(self, fd: int, size: int) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of pieces that end with a line. What follows the last newline is being written, or torn."""
        offset, rest = 0, b""
        while offset + len(rest) < size:
            begin = offset + len(rest)
            block = self._disk.read_at(fd, begin, min(_BLOCK, size - begin))
            if not block:  # the writer has taken back what it could not write whole
                return
            rest += block
            whole = rest.rfind(b"\n") + 1
            yield offset, rest[:whole]
            offset, rest = offset + whole, rest[whole:]

    def _backward(self, fd: int, size: int) -> Iterator[tuple[int, bytes]]:
        """As `_forward`, from the end."""
        rest = b""
        while size:
            begin = max(0, size - _BLOCK)
            rest = self._disk.read_at(fd, begin, size - begin) + rest
            size = begin
            first = 0 if begin == 0 else rest.find(b"\n") + 1
            if first or begin == 0:
                yield begin + first, rest[first : rest.rfind(b"\n") + 1]
                # The newline stays: it ends the line whose beginning is in the block before.
                rest = rest[:first]

    def _read(self, row: Contract, line: Line, *, locked: bool = False) -> Record | None:
        """The record in a line; None if there is none, or if it is in quarantine now."""
        if line.is_blank:
            return None
        try:
            return unseal_record_line(row, line.data)
        except NewerSchema as error:
            raise NewerSchema(f"{self._root}/{line.path}: {error}") from None
        except Damaged as error:
            self._set_aside(row, line, str(error), locked=locked)
            return None

    def _set_aside(self, row: Contract, line: Line, reason: str, *, locked: bool) -> None:
        """Move a damaged line to quarantine. Blanks stay in its place, so that no offset changes."""
        place = f"{self._root}/{line.path} at byte {line.offset}"
        if self.read_only:
            raise Damaged(f"{place}: {reason}; it stays where it is, the root is read-only")
        path = line.path.rpartition("/")[0]
        with contextlib.nullcontext() if locked else self._locks.hold((path,)):
            try:
                fd = self._disk.open_for_update(f"{self._root}/{line.path}")
            except FileNotFoundError:
                return
            try:
                if self._disk.read_at(fd, line.offset, len(line.data)) != line.data:
                    return  # another process was there first, or has forgotten other lines of the file
                # A line with lost blocks was never durable: its key is as free as if it had not been written.
                blocks = not has_lost_blocks(line.data, line.offset)
                if not blocks:
                    reason = "it was written shortly before the power failed and never synced"
                    _logger.warning("%s: %s", place, reason)
                name = f"{line.path}.{line.offset}"
                self._quarantine.keep(row, _key_in(row, line.data), name, line.data, reason, blocks=blocks)
                self._disk.overwrite(fd, line.offset, b" " * (len(line.data) - 1) + b"\n")
                self._disk.fsync(fd)
            finally:
                self._disk.close(fd)

    # -- writing -------------------------------------------------------------------------------------

    def remembered(self, path: str, key: Key) -> Record | None:
        """The line, if this object has just written it: for a caller that was cancelled and writes it again."""
        return self._remembered.get((path, key))

    def file_of_today(self, path: str) -> str:
        """The file to which lines are added: that of today (UTC), or a newer one if the clock was set back."""
        today = f"{path}/{time.strftime('%Y-%m-%d', time.gmtime())}{SUFFIX}"
        return max([today, *self.files(path)[-1:]])

    def append(self, row: Contract, file: str, lines: Sequence[tuple[Record, bytes]]) -> None:
        """Add records, with what `dump_record` made of them, to a file; nothing of them stays if this raises."""
        path = file.rpartition("/")[0]
        fd = self._open(file)
        try:
            size = self._cut_torn_end(row, fd, file)
            try:
                self._disk.write_all(fd, b"".join(seal_line(dumped) for _, dumped in lines))
            except BaseException:
                self._disk.truncate(fd, size)
                raise
        finally:
            self._disk.close(fd)
        crashpoint("log.after_append")
        self._remember(path, [record for record, _ in lines])

    def _remember(self, path: str, records: Iterable[Record]) -> None:
        self._remembered.update({(path, record.key): record for record in records})
        while len(self._remembered) > _REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    def forget_below(self, prefix: str) -> None:
        """Remember no line of a namespace that is being forgotten."""
        self._remembered = {place: each for place, each in self._remembered.items() if not place[0].startswith(prefix)}

    def redo(self, row: Contract, path: str, lines: Sequence[tuple[Record, bytes]]) -> None:
        """Carry out changes of the journal, durably; lines that are there stay. The caller holds the lock."""
        missing = {record.key: (record, dumped) for record, dumped in lines}
        files = set()
        for line in self._lines(path, newest_first=True):
            if not missing:
                break
            found = self._read(row, line, locked=True)
            if found is not None and missing.pop(found.key, None) is not None:
                files.add(line.path)
        today = self.file_of_today(path)
        for file in sorted({*files, today} if missing else files):
            added = [seal_line(dumped) for _, dumped in missing.values() if file == today]
            # To a new file, also what is there: a sync of the old one may have failed, and is never tried again.
            self._replace(row, file, itertools.chain(self._without(file, ()), added))
        self._remember(path, [record for record, _ in missing.values()])

    def prune(self, row: Contract, path: str, revisions: Mapping[Key, int]) -> int:
        """Forget the lines of these keys; return how many those were. A file that has no others is removed."""
        left, pruned = dict(revisions), 0
        for file in self.files(path):
            if not left:
                break
            with self._locks.hold((path,), PATIENCE), contextlib.suppress(FileNotFoundError):
                gone = self._prune_file(row, file, left)
                pruned += len(gone)
                for key in gone:
                    del left[key]
                    self._remembered.pop((path, key), None)
        return pruned

    def _prune_file(self, row: Contract, file: str, revisions: Mapping[Key, int]) -> set[Key]:
        gone: dict[Key, Line] = {}
        with contextlib.closing(self.lines_of(file)) as lines:
            for line in lines:
                key = _key_of(row, line)
                if key is not None and key in revisions:
                    gone[key] = line
                    if len(gone) == len(revisions):
                        break
        if gone:
            self._replace(row, file, self._without(file, gone.values()))
            crashpoint("log.after_prune")
        return {*gone}

    def _replace(self, row: Contract, file: str, content: Iterator[bytes]) -> None:
        """Durably put `content` in the place of a file, which it may read; nothing is left of one without content."""
        fd = self._open(file)
        try:
            self._cut_torn_end(row, fd, file)
        finally:
            self._disk.close(fd)
        directory = f"{self._root}/{file.rpartition('/')[0]}"
        temp = self._disk.write_temp(directory, content, sync=True)
        if self._disk.stat(temp).st_size:
            self._disk.rename(temp, f"{self._root}/{file}")
        else:
            self._disk.discard(temp)
            self._disk.remove(f"{self._root}/{file}")
        self._disk.sync_directory(directory)

    def _without(self, file: str, gone: Iterable[Line]) -> Iterator[bytes]:
        """The content of a file without some of its lines. What follows the last of them is not looked at."""
        offsets = {line.offset for line in gone}
        last = max(offsets, default=-1)
        for lines in self._blocks(file):
            kept = [line for line in lines if line.offset not in offsets]
            yield b"".join(line.data for line in kept if line.offset > last or not line.is_blank)

    def _open(self, file: str) -> int:
        path = f"{self._root}/{file}"
        try:
            return self._disk.open_for_append(path)
        except FileNotFoundError:
            self._disk.make_directories(path.rpartition("/")[0], sync=True)
            return self._disk.open_for_append(path)

    def _cut_torn_end(self, row: Contract, fd: int, file: str) -> int:
        """Cut off a line whose write did not get through; returns the size of the file after that.

        It was never acknowledged as durable, and is kept as evidence all the same.
        """
        size = self._disk.fstat(fd).st_size
        if not size or self._disk.read_at(fd, size - 1, 1) == b"\n":
            return size
        end = self._end_of_lines(fd, size)
        torn = self._disk.read_at(fd, end, size - end)
        reason = "the write of the line was cut short"
        self._quarantine.keep(row, (), f"{file}.{end}.torn", torn, reason, blocks=False)
        self._disk.truncate(fd, end)
        return end

    def _end_of_lines(self, fd: int, size: int) -> int:
        """Where the last whole line ends."""
        while size:
            begin = max(0, size - _BLOCK)
            found = self._disk.read_at(fd, begin, size - begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            size = begin
        return 0


def _split(file: str, offset: int, block: bytes) -> Iterator[Line]:
    for text in block.split(b"\n")[:-1]:
        line = Line(file, offset, text + b"\n")
        offset += len(line.data)
        yield line


def _is_whole(line: Line) -> bool:
    if line.is_blank:
        return True
    try:
        unseal_line(line.data)
    except Damaged:
        return False
    return True


def _key_of(row: Contract, line: Line) -> Key | None:
    """The key of a line, None if it has no sound record."""
    try:
        return None if line.is_blank else unseal_record_line(row, line.data).key
    except Damaged:
        return None


def _key_in(row: Contract, data: bytes) -> Sequence[object]:
    """As much of the key of a damaged line as can be read: all of it or nothing."""
    with contextlib.suppress(Damaged, AttributeError, KeyError, TypeError):
        key = parse(data)["key"]
        return [key[field] for field in row.key_fields]
    return ()
