"""The one module that touches the disk: how bytes get there durably.

A durable replacement is: a temporary file in the same directory, written whole, fsync, rename, fsync of
the directory. A failed fsync is never tried again on the same file, because the kernel may have dropped
the pages and would report success: the temporary file is thrown away and the write fails.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import re
import stat
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from backtest_kit.errors import BacktestKitError, Outcome, OutOfSpace, RetryLater, UserError
from backtest_kit.persist.crashpoints import crashpoint

TEMP_PREFIX: Final = ".tmp-"
TEMP_NAME: Final = re.compile(rf"{re.escape(TEMP_PREFIX)}\d+-[0-9a-f]{{12}}-\d+")
"""The full name of a file of `Disk.write_temp`: a file that only begins like it belongs to another program."""
STALE_TEMP_SECONDS: Final = 120
"""A temporary file older than this has no writer."""

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_READ: Final = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_APPEND: Final = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_UPDATE: Final = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_SPACE: Final = frozenset((errno.ENOSPC, errno.EDQUOT))
_UNABLE: Final = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL))


_REMOVALS: Final = 5
"""How often to empty a directory: a file that is renamed in the meantime can be missed once."""
_SECTOR: Final = 512
_ZEROS: Final = re.compile(rb"\0+")


def has_lost_blocks(data: bytes, offset: int = 0) -> bool:
    """Whether text at `offset` of a file has zeros of the kind that a power loss leaves.

    Bytes that were not synced read as zeros from the start of the write, or of a block, to the end of a block or of the
    write. Any other zero is another kind of damage.
    """
    runs = [run.span() for run in _ZEROS.finditer(data)]
    return bool(runs) and all(
        (low == 0 or (offset + low) % _SECTOR == 0) and (high == len(data) or (offset + high) % _SECTOR == 0)
        for low, high in runs
    )


class OsCalls(Protocol):
    """The calls that a `Disk` makes. The `os` module is one; a shim that fails on purpose is another."""

    open: Any
    read: Any
    write: Any
    fsync: Any
    close: Any
    replace: Any
    unlink: Any
    mkdir: Any
    stat: Any
    fstat: Any
    scandir: Any
    ftruncate: Any
    utime: Any
    posix_fallocate: Any
    lseek: Any
    rmdir: Any


def disk_error(error: OSError, doing: str, path: object, outcome: Outcome = Outcome.NOT_DONE) -> BacktestKitError:
    """The `BacktestKitError` for a failed call, to be raised from it."""
    full = error.errno in _SPACE
    if outcome is Outcome.UNKNOWN:
        advice = f"it may have been written anyway: {'free some space, then ' * full}read it before you write again"
    else:
        advice = "free some space, then write again" if full else "nothing was changed, try again"
    message = f"cannot {doing} {path}: {error.strerror or error}; {advice}"
    return (OutOfSpace if full else RetryLater)(message, outcome=outcome)


class Disk:
    """Reading and durable writing over a set of OS calls. Methods block and raise `OSError`.

    With `private`, other users have no access whatever the umask: files are 0600, directories 0700. Without it the
    umask decides, as for any document.
    """

    def __init__(self, calls: OsCalls = os, *, private: bool = True) -> None:
        self._os = calls
        self._file_mode, self._directory_mode = (0o600, 0o700) if private else (0o666, 0o777)
        self._serial = itertools.count()
        self._token = f"{random.randrange(1 << 48):012x}"  # noqa: S311  # a process id can be reused

    def read(self, path: str) -> bytes:
        fd = self._open(path, _READ)
        try:
            return self._read_exactly(fd, self._os.fstat(fd).st_size)
        finally:
            self._os.close(fd)

    def read_and_keep(self, path: str, kept: deque[int]) -> bytes:
        """As `read`, but leave the descriptor open, in `kept`.

        The last close of a replaced file frees its blocks, which takes longer than the rename and can wait.
        """
        fd = self._open(path, _READ)
        try:
            data = self._read_exactly(fd, self._os.fstat(fd).st_size)
        except BaseException:
            self._os.close(fd)
            raise
        if sys.platform == "win32":  # systems that cannot replace an open file
            self._os.close(fd)
        else:
            kept.append(fd)
        return data

    def read_at(self, fd: int, offset: int, length: int) -> bytes:
        self._os.lseek(fd, offset, os.SEEK_SET)
        return self._read_exactly(fd, length)

    def open_for_reading(self, path: str) -> int:
        return self._open(path, _READ)

    def open_for_append(self, path: str) -> int:
        return self._open(path, _APPEND)

    def open_for_update(self, path: str) -> int:
        return self._open(path, _UPDATE)

    def make_file(self, path: str) -> None:
        """Create an empty file, for a library that would create it with other permissions; an existing file stays."""
        with contextlib.suppress(FileExistsError):
            self._os.close(self._open(path, _CREATE))

    def close(self, fd: int) -> None:
        self._os.close(fd)

    def let_go(self, files: deque[int]) -> None:
        """Close files that were only read, so errors do not matter, and forget them."""
        while files:
            with contextlib.suppress(OSError):
                self._os.close(files.popleft())

    def fsync(self, fd: int) -> None:
        self._os.fsync(fd)

    def write_temp(
        self,
        directory: str,
        data: bytes | Iterable[bytes],
        *,
        sync: bool,
        mtime_ns: int | None = None,
        preallocate: bool = False,
    ) -> str:
        """Write `data` to a new temporary file in `directory` and return its path; nothing is left on failure."""
        path = f"{directory}/{TEMP_PREFIX}{os.getpid()}-{self._token}-{next(self._serial)}"
        fd = self._open(path, _CREATE)
        crashpoint("file.after_create")
        try:
            try:
                pieces = (data,) if isinstance(data, bytes) else data
                if preallocate and isinstance(data, bytes) and data and hasattr(self._os, "posix_fallocate"):
                    # Without this ext4 flushes a file that is renamed over another one. Only for data that a journal
                    # makes durable, or that replaces nothing durable: elsewhere that flush is extra safety.
                    self._preallocate(fd, len(data))
                for piece in pieces:
                    self.write_all(fd, piece)
                crashpoint("file.after_write")
                if mtime_ns is not None:
                    self._os.utime(fd, ns=(mtime_ns, mtime_ns))
                if sync:
                    self._os.fsync(fd)
                    crashpoint("file.after_fsync")
            finally:
                self._os.close(fd)
        except BaseException:
            self.discard(path)
            raise
        return path

    def _preallocate(self, fd: int, size: int) -> None:
        try:
            self._os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in _UNABLE:  # some C libraries do not emulate the call where the file system lacks it
                raise

    def rename(self, temp: str, path: str) -> None:
        """Rename a temporary file into place; if that fails, it is removed."""
        try:
            self._os.replace(temp, path)
        except BaseException:
            self.discard(temp)
            raise
        crashpoint("file.after_rename")

    def move(self, source: str, target: str) -> None:
        """Rename a file whose bytes the caller has synced; if that fails, it stays where it is."""
        self._os.replace(source, target)

    def write_all(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._os.write(fd, view) :]

    def overwrite(self, fd: int, offset: int, data: bytes) -> None:
        self._os.lseek(fd, offset, os.SEEK_SET)
        self.write_all(fd, data)

    def truncate(self, fd: int, size: int) -> None:
        self._os.ftruncate(fd, size)

    def discard(self, path: str) -> None:
        """Remove a file of no value, if possible."""
        with contextlib.suppress(OSError):
            self._os.unlink(path)

    def remove(self, path: str) -> None:
        self._os.unlink(path)

    def discard_directory(self, path: str) -> None:
        """Remove a directory, if it is empty."""
        with contextlib.suppress(OSError):
            self._os.rmdir(path)

    def remove_tree(self, path: str) -> None:
        """Remove a directory and all files in it, including those renamed in the meantime. It may not exist."""
        for left in reversed(range(_REMOVALS)):
            try:
                with self._os.scandir(path) as found:
                    entries = list(found)
            except FileNotFoundError:
                return
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    self.remove_tree(entry.path)
                else:
                    with contextlib.suppress(FileNotFoundError):
                        self._os.unlink(entry.path)
            try:
                self._os.rmdir(path)
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno != errno.ENOTEMPTY or not left:
                    raise
            else:
                return

    def sync_file(self, path: str) -> None:
        """Make all writes to `path` durable, through any descriptor; a removed file needs nothing."""
        with contextlib.suppress(FileNotFoundError):
            fd = self._open(path, _READ)
            try:
                self._os.fsync(fd)
            finally:
                self._os.close(fd)

    def sync_directory(self, path: str) -> None:
        if sys.platform != "win32":  # Windows has no such call and orders its directory entries itself
            self.sync_file(path)
            crashpoint("file.after_directory_fsync")

    def make_directories(self, path: str, *, sync: bool) -> None:
        """Create `path` and its missing parents, each level durable in its parent if `sync`."""
        try:
            self._os.mkdir(path, self._directory_mode)
        except FileExistsError:
            return
        except FileNotFoundError:
            parent = str(Path(path).parent)
            self.make_directories(parent, sync=sync)
            self.make_directories(path, sync=sync)
            return
        crashpoint("file.after_mkdir")
        if sync:
            self.sync_directory(str(Path(path).parent))

    def stat(self, path: str) -> os.stat_result:
        result: os.stat_result = self._os.stat(path)
        return result

    def fstat(self, fd: int) -> os.stat_result:
        result: os.stat_result = self._os.fstat(fd)
        return result

    def touch(self, path: str, mtime_ns: int) -> None:
        self._os.utime(path, ns=(mtime_ns, mtime_ns))

    def is_at(self, fd: int, path: str) -> bool:
        """Whether `path` still names the open file, and not another one or none."""
        try:
            return os.path.samestat(self.stat(path), self.fstat(fd))
        except FileNotFoundError:
            return False

    def exists(self, path: str) -> bool:
        try:
            self._os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def entries(self, directory: str) -> list[os.DirEntry[str]]:
        """The names in a directory, without temporary files; empty if it does not exist."""
        try:
            with self._os.scandir(directory) as found:
                return [entry for entry in found if not entry.name.startswith(TEMP_PREFIX)]
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def listing(self, directory: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        """All names in a directory, temporary files included."""
        with self._os.scandir(directory) as found:
            yield found

    def writable(self, path: str) -> bool:
        return os.access(path, os.W_OK)

    def sweep(self, directories: Iterable[str], now: float, *, find: str) -> list[str]:
        """Remove the temporary files under `directories` that are too old at `now` to have a writer.

        Returns the files whose names end in `find` and that were written before that age.
        """
        pending = list(directories)
        others: list[str] = []
        while pending:
            with contextlib.suppress(FileNotFoundError), self._os.scandir(pending.pop()) as found:
                for entry in found:
                    if TEMP_NAME.fullmatch(entry.name):
                        with contextlib.suppress(FileNotFoundError):
                            if now - entry.stat(follow_symlinks=False).st_mtime > STALE_TEMP_SECONDS:
                                self._os.unlink(entry.path)
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif entry.name.endswith(find):
                        with contextlib.suppress(FileNotFoundError):
                            if entry.stat(follow_symlinks=False).st_mtime < now:
                                others.append(entry.path)
        return others

    def _open(self, path: str, flags: int) -> int:
        return int(self._os.open(path, flags, self._file_mode))

    def _read_exactly(self, fd: int, length: int) -> bytes:
        parts: list[bytes] = []
        while length > 0:
            part = self._os.read(fd, length)
            if not part:
                break
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


def absolute_root(root: str | os.PathLike[str]) -> str:
    """The absolute path of a store's root, so a later change of the working directory does not move it."""
    return str(Path(root).expanduser().absolute())


def require_directory(root: str) -> None:
    """Do nothing if `root` is a directory or can become one.

    Raises:
        UserError: it, or something above it, is a file.
    """
    for level in (Path(root), *Path(root).parents):
        try:
            mode = level.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"the store's root {root} cannot be used: {error.strerror}") from error
        if not stat.S_ISDIR(mode):
            raise UserError(f"the store's root {root} cannot be used: {level} is a file, name a directory")
        return
