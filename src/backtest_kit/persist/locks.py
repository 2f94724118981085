"""Locks that hold between threads and between processes."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from backtest_kit.errors import RetryLater
from backtest_kit.persist.files import Disk

LOCK_TIMEOUT_SECONDS: Final = 10.0

_log = logging.getLogger(__name__)


class Locked(RetryLater):
    """A lock was kept by another process for longer than the caller would wait."""

    def __init__(self, what: str, seconds: float, is_of: Callable[[str], bool]) -> None:
        """`what` was kept for `seconds`; `is_of` says whether it is the lock of a name."""
        way_out = "see which one (lsof) and whether it is stopped, then try again"
        super().__init__(f"another process has held {what} for {seconds:g} s: {way_out}")
        self._what = what
        self._is_of = is_of

    def concerns(self, names: Iterable[str]) -> bool:
        """True if holding `names` takes that lock."""
        return any(map(self._is_of, names))

    def after(self, seconds: float) -> Locked:
        """The same, for a caller that has waited so long."""
        return Locked(self._what, seconds, self._is_of)


class LockSet:
    """Locks by name that hold between threads and between processes, on a fixed set of lock files.

    Two names may share a file: they then wait for each other, no more. The files stay open, because the
    lock of a process goes away with it however it ends.
    """

    def __init__(self, directory: str, disk: Disk, *, count: int = 64) -> None:
        self._directory = directory
        self._disk = disk
        self._count = count
        self._reset()
        in_children(self._let_go)

    def _reset(self) -> None:
        self._guard = threading.Lock()
        self._threads = [threading.Lock() for _ in range(self._count)]
        self._files: dict[int, int] = {}

    @contextlib.contextmanager
    def hold(self, names: Iterable[str], timeout: float = LOCK_TIMEOUT_SECONDS) -> Iterator[None]:
        """Hold the locks of all `names`. Always taken in one order, so that holders cannot wait in a ring.

        Raises:
            Locked: another process kept one of them for `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        held: list[tuple[int, int | None]] = []
        try:
            for shard in sorted({_shard(name, self._count) for name in names}):
                if not self._threads[shard].acquire(timeout=timeout):
                    raise self._timed_out(shard, timeout)
                held.append((shard, None))
                fd = self._file(shard)
                while not try_lock(fd):
                    if time.monotonic() > deadline:
                        raise self._timed_out(shard, timeout)
                    time.sleep(random.uniform(0.0002, 0.002))  # noqa: S311
                held[-1] = shard, fd
            yield
        finally:
            for shard, locked in reversed(held):
                if locked is not None:
                    self._unlock(shard, locked)
                self._threads[shard].release()

    def _unlock(self, shard: int, fd: int) -> None:
        """Let go of a lock, whatever the system says: what was done under it is done, and is not to look undone."""
        try:
            unlock(fd)
        except OSError as error:
            # The lock goes with the file; the next one to need it opens the file again.
            path = f"{self._directory}/{shard:02d}.lock"
            _log.warning("cannot unlock %s: %s; the file was closed instead, which unlocks it", path, error)
            with self._guard:
                del self._files[shard]
            with contextlib.suppress(OSError):  # closed all the same
                self._disk.close(fd)

    def close(self) -> None:
        """Close the files of the locks that are not held."""
        with self._guard:
            for shard, fd in list(self._files.items()):
                if self._threads[shard].acquire(blocking=False):
                    self._disk.close(fd)
                    del self._files[shard]
                    self._threads[shard].release()

    def _let_go(self) -> None:
        """Close the files of the parent: their locks must end with it."""
        for fd in self._files.values():
            with contextlib.suppress(OSError):
                self._disk.close(fd)
        self._reset()

    def _file(self, shard: int) -> int:
        with self._guard:
            fd = self._files.get(shard)
            if fd is None:
                path = f"{self._directory}/{shard:02d}.lock"
                try:
                    fd = self._files[shard] = self._disk.open_for_append(path)
                except FileNotFoundError:
                    self._disk.make_directories(self._directory, sync=False)
                    fd = self._files[shard] = self._disk.open_for_append(path)
        return fd

    def _timed_out(self, shard: int, timeout: float) -> Locked:
        path = f"{self._directory}/{shard:02d}.lock"
        return Locked(path, timeout, lambda name: _shard(name, self._count) == shard)


def in_children(method: Callable[[], None]) -> None:
    """Call a method in every child that is forked while its object lives, before anything else runs there.

    A child shares the open files of its parent, and a lock lasts as long as anybody has its file open.
    """
    weak = weakref.WeakMethod(method)

    def call() -> None:
        bound = weak()
        if bound is not None:
            bound()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)


def _shard(name: str, count: int) -> int:
    return zlib.crc32(name.encode()) % count


if sys.platform == "win32":
    import msvcrt

    def try_lock(fd: int) -> bool:
        """Lock an open file if no other opening has; the lock goes with the last descriptor of this opening."""
        try:
            os.lseek(fd, 0, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def unlock(fd: int) -> None:
        os.lseek(fd, 0, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def try_lock(fd: int) -> bool:
        """Lock an open file if no other opening has; the lock goes with the last descriptor of this opening."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)
