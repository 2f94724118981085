"""What may be on a disk after the power failed: the states that POSIX allows, from the calls that a program made.

`RecordingFS` is the `os` of a `Disk`; it makes every call and notes those that change something. `Aftermath` picks,
for a moment in between, which of the changes that were not synced survive: any subset of the names given and taken in
a directory, and of a file its size and each of its blocks as they were at any time since its last sync, so that it can
be cut, or have zeros or old bytes in the middle. What was synced always survives.
"""

from __future__ import annotations

import fcntl
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

BLOCK: Final = 4096


class Write(msgspec.Struct, frozen=True):
    """Bytes written to a file at an offset."""

    file: int
    offset: int
    data: bytes


class Truncate(msgspec.Struct, frozen=True):
    """A file cut, or extended by zeros."""

    file: int
    size: int


class Link(msgspec.Struct, frozen=True):
    """A name in a directory that stands for a file (a number), a directory (`None`) or for nothing any more (-1)."""

    directory: str
    name: str
    file: int | None
    replaces: str | None = None
    """The name in the same directory that it had before: both change together."""


class Sync(msgspec.Struct, frozen=True):
    """Everything before this about a file, or about a directory, is on the disk."""

    what: int | str


class Touch(msgspec.Struct, frozen=True):
    """The time of a file, on which the order of listings rests."""

    file: int
    mtime_ns: int


class Mark(msgspec.Struct, frozen=True):
    """Something that the program says about itself: what it begins, what it was acknowledged."""

    label: Any


Change = Write | Truncate | Link | Sync | Touch | Mark


class RecordingFS:
    """The `os` module, with a record of all changes below `root`, in the order in which they were made."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.changes: list[Change] = []
        self.calls: list[tuple[str, str]] = []
        """Every attempt to open a file or to give, change or take a name, with its path."""
        self._guard = threading.RLock()
        self._files: dict[str, int] = {}
        self._opened: dict[int, tuple[str, int | str]] = {}
        self._serial = 0

    def mark(self, label: object) -> None:
        with self._guard:
            self.changes.append(Mark(label))

    def __getattr__(self, call: str) -> Any:
        real = getattr(os, call)
        noted = getattr(type(self), f"_note_{call}", None)
        if noted is None:
            return real

        def perform(*args: Any, **named: Any) -> Any:
            with self._guard:
                return noted(self, real, *args, **named)

        return perform

    def _note_open(self, real: Any, path: str, flags: int, mode: int) -> int:
        is_new = bool(flags & os.O_CREAT) and path not in self._files
        self.calls.append(("open", path))
        fd: int = real(path, flags, mode)
        if os.path.isdir(path):  # noqa: PTH112
            self._opened[fd] = path, path
            return fd
        if is_new:
            self._serial += 1
            self._files[path] = self._serial
            self._link(path, self._serial)
        self._opened[fd] = path, self._files[path]
        return fd

    def _note_close(self, real: Any, fd: int) -> None:
        self._opened.pop(fd, None)
        real(fd)

    def _note_write(self, real: Any, fd: int, data: Any) -> int:
        _, file = self._opened[fd]
        # A file open for appending is written at its end, wherever its position was.
        appends = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
        offset = os.fstat(fd).st_size if appends else os.lseek(fd, 0, os.SEEK_CUR)
        count: int = real(fd, data)
        self.changes.append(Write(int(file), offset, bytes(data[:count])))
        return count

    def _note_fsync(self, real: Any, fd: int) -> None:
        # Nothing is really synced: the changes are what counts, and a test has no use for the disk.
        self.changes.append(Sync(self._opened[fd][1]))

    def _note_ftruncate(self, real: Any, fd: int, size: int) -> None:
        real(fd, size)
        self.changes.append(Truncate(int(self._opened[fd][1]), size))

    def _note_posix_fallocate(self, real: Any, fd: int, offset: int, length: int) -> None:
        real(fd, offset, length)
        self.changes.append(Truncate(int(self._opened[fd][1]), offset + length))

    def _note_utime(self, real: Any, what: Any, *, ns: tuple[int, int]) -> None:
        real(what, ns=ns)
        file = self._opened[what][1] if isinstance(what, int) else self._files[what]
        self.changes.append(Touch(int(file), ns[1]))

    def _note_replace(self, real: Any, source: str, target: str) -> None:
        self.calls.append(("rename", source))
        real(source, target)
        file = self._files.pop(source)
        self._files[target] = file
        above, name = os.path.split(source)
        if above == os.path.dirname(target):  # noqa: PTH120
            self._link(target, file, replaces=name)
        else:  # two directories, each with a sync of its own
            self._link(target, file)
            self._link(source, -1)

    def _note_unlink(self, real: Any, path: str) -> None:
        self.calls.append(("remove", path))
        real(path)
        self._files.pop(path, None)
        self._link(path, -1)

    def _note_mkdir(self, real: Any, path: str, mode: int) -> None:
        self.calls.append(("mkdir", path))
        real(path, mode)
        self._link(path, None)

    def _note_rmdir(self, real: Any, path: str) -> None:
        self.calls.append(("rmdir", path))
        real(path)
        self._link(path, -1)

    def _link(self, path: str, file: int | None, *, replaces: str | None = None) -> None:
        directory, name = os.path.split(path)
        self.changes.append(Link(directory, name, file, replaces))


class Aftermath:
    """One state of the disk below `root` that a loss of power after `changes` may leave."""

    def __init__(self, changes: list[Change], root: str, seed: int) -> None:
        self._root = root
        self._random = random.Random(seed)  # noqa: S311
        # Mostly all or nothing, which is what breaks programs; sometimes anything.
        self._lost_blocks = self._random.choice((0.0, 1.0, 0.5, 0.2, 0.8))
        self._lost_names = self._random.choice((0.0, 1.0, 0.5, 0.2, 0.8))
        self._lost_sizes = self._random.choice((0.0, 1.0, 0.5))
        self._names: dict[str, dict[str, int | None]] = {}
        self._versions: dict[int, list[bytes]] = {}
        """The content of each file at its last sync, and after each change since."""
        self._times: dict[int, int] = {}
        self._apply(changes)

    def _apply(self, changes: list[Change]) -> None:
        last_sync = {change.what: at for at, change in enumerate(changes) if isinstance(change, Sync)}
        for at, change in enumerate(changes):
            if isinstance(change, Link):
                if at < last_sync.get(change.directory, -1) or self._random.random() >= self._lost_names:
                    self._rename(change)
            elif isinstance(change, Write):
                held = bytearray(self._content(change.file))
                held.extend(bytes(max(0, change.offset - len(held))))
                held[change.offset : change.offset + len(change.data)] = change.data
                self._versions[change.file].append(bytes(held))
            elif isinstance(change, Truncate):
                held = bytearray(self._content(change.file)[: change.size])
                self._versions[change.file].append(bytes(held) + bytes(change.size - len(held)))
            elif isinstance(change, Sync) and isinstance(change.what, int):
                self._versions[change.what] = [self._content(change.what)]
            elif isinstance(change, Touch):
                self._times[change.file] = change.mtime_ns

    def _content(self, file: int) -> bytes:
        return self._versions.setdefault(file, [b""])[-1]

    def _rename(self, change: Link) -> None:
        names = self._names.setdefault(change.directory, {})
        if change.replaces is not None:
            names.pop(change.replaces, None)
        if change.file == -1:
            names.pop(change.name, None)
        else:
            names[change.name] = change.file

    def _survivor(self, file: int) -> bytes:
        """What is left of a file: its size, and each block, as it was at some time since the last sync."""
        versions = self._versions.get(file, [b""])
        size = len(self._choose(versions, self._lost_sizes))
        blocks = []
        for low in range(0, size, BLOCK):
            block = self._choose(versions, self._lost_blocks)[low : low + BLOCK]
            blocks.append(block + bytes(BLOCK - len(block)))
        return b"".join(blocks)[:size]

    def _choose(self, versions: list[bytes], lost: float) -> bytes:
        if self._random.random() >= lost:
            return versions[-1]
        return versions[0] if self._random.random() < 0.7 else self._random.choice(versions)

    def build(self, target: Path) -> None:
        """Make it, as `target`."""
        for path, file in self._reachable(self._root):
            place = target / os.path.relpath(path, self._root)
            if file is None:
                place.mkdir(mode=0o700)
            else:
                place.write_bytes(self._survivor(file))
                if file in self._times:
                    os.utime(place, ns=(self._times[file], self._times[file]))

    def _reachable(self, directory: str) -> Iterator[tuple[str, int | None]]:
        """What has a path from the root; what is in a directory whose own name was lost is lost with it."""
        above, name = os.path.split(directory)
        if directory == self._root and name not in self._names.get(above, {}):
            return
        yield directory, None
        for name, file in self._names.get(directory, {}).items():
            if file is None:
                yield from self._reachable(f"{directory}/{name}")
            else:
                yield f"{directory}/{name}", file
