"""`Writes`: files below a root put in place whole, in directories that are durable in those above them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

from backtest_kit.errors import Outcome
from backtest_kit.persist.backends.file_paths import NEXT
from backtest_kit.persist.files import Disk, disk_error


class Writes:
    """Methods block. Paths are relative to the root, with `/`; the caller holds their locks."""

    def __init__(self, root: str, disk: Disk, note: Callable[[Sequence[str], Sequence[str]], None]) -> None:
        """`note` gets the files and directories, and the successors, to make durable within the delay of a record."""
        self._root = root
        self._disk = disk
        self._note = note
        self._anchored: set[str] = set()
        self._noted: set[str] = set()

    def forget(self) -> None:
        """Take no directory for durable any more."""
        self._anchored.clear()
        self._noted.clear()

    def write_durably(self, path: str, data: bytes, tick: int) -> None:
        """Replace `path`; it is on the disk when this returns.

        Raises:
            OSError: nothing has changed.
            RetryLater, OutOfSpace: with an unknown outcome, it may have changed.
        """
        target = f"{self._root}/{path}"
        directory = target.rpartition("/")[0]
        self._disk.rename(self._write_anchored(directory, data, tick, sync=True), target)
        try:
            self._disk.sync_directory(directory)
        except OSError as error:
            raise disk_error(error, "make durable", target, Outcome.UNKNOWN) from error

    def write(self, path: str, data: bytes, tick: int, *, preallocate: bool = False) -> None:
        """Replace `path`; it survives the process. When the power fails it may be lost, old value and new."""
        target = f"{self._root}/{path}"
        directory = target.rpartition("/")[0]
        try:
            temp = self._disk.write_temp(directory, data, sync=False, mtime_ns=tick, preallocate=preallocate)
        except FileNotFoundError:
            self._disk.make_directories(directory, sync=False)
            temp = self._disk.write_temp(directory, data, sync=False, mtime_ns=tick, preallocate=preallocate)
        self._disk.rename(temp, target)

    def write_temps(self, files: Sequence[tuple[str, bytes, int]]) -> list[tuple[str, str]]:
        """Lay ready the (path, data, tick) of `files`; return the path and the temporary file of each."""
        temps: list[tuple[str, str]] = []
        try:
            for path, data, tick in files:
                directory = f"{self._root}/{path}".rpartition("/")[0]
                temps.append((path, self._write_anchored(directory, data, tick, sync=False)))
        except BaseException:
            self.discard(temp for _, temp in temps)
            raise
        return temps

    def put_in_place(self, temp: str, path: str) -> None:
        self._disk.rename(temp, f"{self._root}/{path}")

    def discard(self, temps: Iterable[str]) -> None:
        for temp in temps:
            self._disk.discard(temp)

    def remove(self, path: str) -> None:
        """Remove the file of a record, and the directory that it leaves empty."""
        for file in (path, f"{path}{NEXT}"):  # in this order: without its successor an older revision would be seen
            with contextlib.suppress(FileNotFoundError):
                self._disk.remove(f"{self._root}/{file}")
        directory = f"{self._root}/{path}".rpartition("/")[0]
        self._disk.discard_directory(directory)
        self._anchored.discard(directory)
        self._noted.discard(directory)

    def forget_below(self, prefix: str) -> None:
        """Remove a directory and all that is in it."""
        directory = f"{self._root}/{prefix}"
        for known in (self._anchored, self._noted):
            known.difference_update([path for path in known if f"{path}/".startswith(directory)])
        self._disk.remove_tree(directory)

    def write_successor(self, path: str, data: bytes, tick: int) -> None:
        """Replace `path` within the delay of a record, in an order that no loss of power can break."""
        self.write(f"{path}{NEXT}", data, tick, preallocate=True)
        self._note(self._directories_of(path), [path])

    def sync_soon(self, path: str) -> None:
        """Make a file durable within the delay of a record, and the directories above it, if they may be new."""
        self._note([f"{self._root}/{path}", *self._directories_of(path)], ())

    def _directories_of(self, path: str) -> list[str]:
        """The directory of `path`, and those above it if nothing has synced their entries yet."""
        directory = f"{self._root}/{path}".rpartition("/")[0]
        if directory in self._anchored or directory in self._noted:
            return [directory]
        self._noted.add(directory)
        return [directory, *self._levels(directory)]

    def _write_anchored(self, directory: str, data: bytes, tick: int, *, sync: bool) -> str:
        """A temporary file, synced or about to be journalled, in a directory that is durable in those above it."""
        if directory in self._anchored:
            with contextlib.suppress(FileNotFoundError):  # somebody has removed the directory
                return self._disk.write_temp(directory, data, sync=sync, mtime_ns=tick, preallocate=not sync)
        # Once per process even if the directory exists: who made it may not have come to syncing it.
        self._disk.make_directories(directory, sync=False)
        for level in self._levels(directory):
            self._disk.sync_directory(level)
        self._anchored.add(directory)
        return self._disk.write_temp(directory, data, sync=sync, mtime_ns=tick, preallocate=not sync)

    def _levels(self, directory: str) -> list[str]:
        """The directories from the root to the one above `directory`."""
        parts = directory.removeprefix(self._root).strip("/").split("/")
        return ["/".join((self._root, *parts[:count])) for count in range(len(parts))]
