"""`Slots`: records that are a JSON file each, read and replaced as a whole.

When the power fails, the rename of a file can survive and its unsynced bytes not: the record that was durable
before would be gone as well. So a write of the record class goes to `state/s/b.json.next`, its successor, where every
process reads it immediately; a moment later that file is synced, renamed to `state/s/b.json`, and the directory synced.
Of the two files the one with the higher revision counts.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from backtest_kit.errors import Damaged, Outcome
from backtest_kit.persist.backends.file_paths import NEXT, key_of, row_of, unseal_at
from backtest_kit.persist.codec import NewerSchema, seal_text, unseal, unseal_head
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.files import Disk, disk_error, has_lost_blocks
from backtest_kit.persist.locks import LockSet
from backtest_kit.persist.quarantine import Quarantine
from backtest_kit.persist.store import Key, Record

PATIENCE: Final = 2.0
_KEPT_FILES: Final = 128
_NEVER_SYNCED: Final = "it was written shortly before the power failed and never synced"

_log = logging.getLogger(__name__)


def is_torn(data: bytes) -> bool:
    """Whether a loss of power explains the bytes of a record file: its end is missing, or parts of it are zeros."""
    return has_lost_blocks(data) or not data.endswith(b"\n}\n")


def _is_lost(row: Contract, data: bytes) -> bool:
    """Whether the file of a record was never durable, so that the record reads as absent.

    Never for money, whose files are synced before they get their names.
    """
    if row.durability is Durability.MONEY:
        return False
    return not data.strip(b"\0") or (row.durability is Durability.CACHE and is_torn(data))


def _newer(record: Record | None, successor: Record | None) -> Record | None:
    if record is None or (successor is not None and successor.rev >= record.rev):
        return successor
    return record


class Slots:
    """Methods block. Paths are relative to the root, with `/`, and name the record; `locked`: the caller has its lock.

    A writer holds the lock, against the threads of this process and against other processes.
    """

    def __init__(self, root: str, disk: Disk, locks: LockSet, quarantine: Quarantine) -> None:
        self._root = root
        self._disk = disk
        self._locks = locks
        self._quarantine = quarantine
        self.read_only = False
        self._anchored: set[str] = set()
        """Directories that are durable in those above them."""
        self._noted: set[str] = set()
        """Those that will be, once what `unsynced` returned is synced."""
        self._replaced: deque[int] = deque()

    # -- reading -------------------------------------------------------------------------------------

    def load(
        self, row: Contract, key: Key | None, path: str, *, locked: bool = False, head: bool = False
    ) -> Record | None:
        """The record at `path`, which belongs to `key`, or to whatever key has that path.

        `head` is for a caller that is about to replace it: without the value, the file open until `free_replaced`.

        Raises:
            Damaged, RetryLater: as `Store.get`.
        """
        try:
            # Before the record: a successor that is gone by now has become the record.
            successor = (
                self._load_successor(row, key, path, locked=locked) if row.durability is Durability.RECORD else None
            )
            return _newer(self._load_file(row, key, path, locked=locked, head=head), successor)
        except OSError as error:
            raise disk_error(error, "read", f"{self._root}/{path}") from error

    def _load_file(self, row: Contract, key: Key | None, path: str, *, locked: bool, head: bool) -> Record | None:
        file = f"{self._root}/{path}"
        try:
            keep = head and len(self._replaced) < _KEPT_FILES
            data = self._disk.read_and_keep(file, self._replaced) if keep else self._disk.read(file)
        except (FileNotFoundError, NotADirectoryError):
            self._quarantine.refuse_blocked(path)
            return None
        except IsADirectoryError:
            data = b""
        try:
            return unseal_head(row, key, data) if head and key is not None else unseal_at(row, key, path, data)
        except NewerSchema as error:
            raise NewerSchema(f"{file}: {error}") from None
        except Damaged as error:
            if _is_lost(row, data) and (locked or self.read_only):
                if locked:
                    self._set_aside(row, path, path, data)
                return None
            if locked:
                raise self._quarantine.take(row, key or key_of(row, path), path, str(error)) from None
            if self.read_only:
                raise Damaged(f"{file}: {error}; it stays where it is, the root is read-only") from None
        # Another process may have been replacing it: what is damaged under the lock as well is damaged.
        with self._locks.hold((path,)):
            return self._load_file(row, key, path, locked=True, head=head)

    def _load_successor(self, row: Contract, key: Key | None, path: str, *, locked: bool) -> Record | None:
        """The successor; one that a loss of power tore reads as absent."""
        file = f"{self._root}/{path}{NEXT}"
        try:
            data = self._disk.read(file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if is_torn(data):
            if locked:
                self._set_aside(row, path, f"{path}{NEXT}", data)
            return None
        try:
            return unseal_at(row, key, path, data)
        except NewerSchema as error:
            raise NewerSchema(f"{file}: {error}") from None
        except Damaged as error:
            way_out = "it stays where it is and blocks its key: remove it to go back to the value before it"
            raise Damaged(f"{file}: {error}; {way_out}") from None

    def in_place(self, row: Contract, key: Key, path: str) -> Record | None:
        """The record that is there, whatever of that name lies in quarantine. The caller holds the lock.

        Raises:
            Damaged: it cannot be read; it stays where it is.
        """
        successor = self._load_successor(row, key, path, locked=True)
        try:
            return _newer(unseal_at(row, key, path, self._disk.read(f"{self._root}/{path}")), successor)
        except FileNotFoundError:
            return successor

    def free_replaced(self) -> None:
        """Close the files that were read in order to be replaced.

        The last close of a file that has no name any more frees it, which takes longer than the rename.
        """
        self._disk.let_go(self._replaced)

    # -- writing -------------------------------------------------------------------------------------

    def write_durably(self, path: str, data: bytes, tick: int) -> None:
        """Replace the record; it is on the disk when this returns.

        Raises:
            OSError: nothing has changed.
            RetryLater, OutOfSpace: with an unknown outcome, it may have changed.
        """
        file = f"{self._root}/{path}"
        directory = file.rpartition("/")[0]
        self._disk.rename(self._write_anchored(directory, data, tick, sync=True), file)
        try:
            self._disk.sync_directory(directory)
        except OSError as error:
            raise disk_error(error, "make durable", file, Outcome.UNKNOWN) from error

    def write_unsynced(self, path: str, data: bytes, tick: int) -> None:
        """Replace the record; it survives the process. When the power fails, old value and new may be lost."""
        self._write(path, data, tick, preallocate=False)

    def write_successor(self, path: str, data: bytes, tick: int) -> list[str]:
        """Write what replaces the record once `promote` is called; returns the directories to sync after that."""
        self._write(f"{path}{NEXT}", data, tick, preallocate=True)
        return self.unsynced(path)

    def prepare(self, files: Sequence[tuple[str, bytes, int]]) -> list[tuple[str, str]]:
        """Write the (path, data, tick) of `files` to temporary files; returns the path and the file of each."""
        temps: list[tuple[str, str]] = []
        try:
            for path, data, tick in files:
                directory = f"{self._root}/{path}".rpartition("/")[0]
                temps.append((path, self._write_anchored(directory, data, tick, sync=False)))
        except BaseException:
            self.discard(temps)
            raise
        return temps

    def put_in_place(self, path: str, temp: str) -> None:
        self._disk.rename(temp, f"{self._root}/{path}")

    def discard(self, temps: Iterable[tuple[str, str]]) -> None:
        for _, temp in temps:
            self._disk.discard(temp)

    def remove(self, path: str) -> None:
        """Remove the record, and the directory that it leaves empty."""
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

    def forget_directories(self) -> None:
        """Assume of no directory that it is durable."""
        self._anchored.clear()
        self._noted.clear()

    def unsynced(self, path: str) -> list[str]:
        """The directory of `path`, and those above it if nothing has synced their entries yet."""
        directory = f"{self._root}/{path}".rpartition("/")[0]
        if directory in self._anchored or directory in self._noted:
            return [directory]
        self._noted.add(directory)
        return [directory, *self._levels(directory)]

    def _write(self, path: str, data: bytes, tick: int, *, preallocate: bool) -> None:
        file = f"{self._root}/{path}"
        directory = file.rpartition("/")[0]
        try:
            temp = self._disk.write_temp(directory, data, sync=False, mtime_ns=tick, preallocate=preallocate)
        except FileNotFoundError:
            self._disk.make_directories(directory, sync=False)
            temp = self._disk.write_temp(directory, data, sync=False, mtime_ns=tick, preallocate=preallocate)
        self._disk.rename(temp, file)

    def _write_anchored(self, directory: str, data: bytes, tick: int, *, sync: bool) -> str:
        """A temporary file, synced or about to be journalled, in a directory that is durable in those above it."""
        if directory in self._anchored:
            with contextlib.suppress(FileNotFoundError):  # another process has removed the directory
                return self._disk.write_temp(directory, data, sync=sync, mtime_ns=tick, preallocate=not sync)
        # Once per process even if the directory exists: the process that made it may not have come to syncing it.
        self._disk.make_directories(directory, sync=False)
        for level in self._levels(directory):
            self._disk.sync_directory(level)
        self._anchored.add(directory)
        return self._disk.write_temp(directory, data, sync=sync, mtime_ns=tick, preallocate=not sync)

    def _levels(self, directory: str) -> Iterator[str]:
        """The directories from the root to the one above `directory`."""
        parts = directory.removeprefix(self._root).strip("/").split("/")
        return ("/".join((self._root, *parts[:count])) for count in range(len(parts)))

    # -- what was not synced, or not finished --------------------------------------------------------

    def promote(self, path: str) -> None:
        """Sync a successor and give it its name; the caller syncs the directory. Nothing is done if there is none.

        Raises:
            OSError: the sync failed, and is not to be tried again; the record before it is as durable as it was.
            Damaged: one of the two cannot be read.
            Locked: another process has held the lock for too long.
        """
        with self._locks.hold((path,), PATIENCE), contextlib.suppress(FileNotFoundError):  # a forgotten namespace
            fd = self._disk.open_for_reading(f"{self._root}/{path}{NEXT}")
            try:
                self._disk.fsync(fd)
            finally:
                self._disk.close(fd)
            if self._read_newer(path) is None:
                self._disk.discard(f"{self._root}/{path}{NEXT}")
            else:
                self._disk.move(f"{self._root}/{path}{NEXT}", f"{self._root}/{path}")

    def finish(self, path: str) -> None:
        """Make durable, under its name, the successor that a killed process left. Raises as `promote`."""
        row = row_of(path)
        if row is None or row.durability is not Durability.RECORD:
            return  # what lies in quarantine is not a successor
        with self._locks.hold((path,), PATIENCE):
            successor = self._read_newer(path)
            if successor is not None:
                # Never by a sync of that file: the one that the killed process tried may have failed.
                self.write_durably(path, *successor)
            self._disk.discard(f"{self._root}/{path}{NEXT}")

    def _read_newer(self, path: str) -> tuple[bytes, int] | None:
        """The bytes and the tick of a successor, unless the record is newer because a batch has written it since."""
        row, file = row_of(path), f"{self._root}/{path}"
        successor = None if row is None else self._load_successor(row, None, path, locked=True)
        if row is None or successor is None:
            return None
        try:
            data = self._disk.read(file)
        except FileNotFoundError:
            self._quarantine.refuse_blocked(path)
        else:
            if _is_lost(row, data):
                self._set_aside(row, path, path, data)
            elif unseal_at(row, successor.key, path, data).rev > successor.rev:
                return None
        return self._disk.read(f"{file}{NEXT}"), self._disk.stat(f"{file}{NEXT}").st_mtime_ns

    def redo(self, row: Contract, path: str, record: Record, dumped: bytes, tick: int) -> None:
        """Carry out a change of the journal. The caller holds the lock.

        Raises:
            Damaged: the key is blocked.
        """
        beneath = self._record_beneath(row, record.key, path)
        # An equal one is written again: it may not have been synced. Another one of the same revision
        # was acknowledged after the entry had been given up.
        if beneath is None or beneath.rev < record.rev or beneath == record:
            self.write_durably(path, seal_text(dumped), tick)
        elif beneath.rev == record.rev:
            _log.warning("revision %d of %s/%s is not the one in the journal: kept", beneath.rev, self._root, path)

    def _record_beneath(self, row: Contract, key: Key, path: str) -> Record | None:
        try:
            data = self._disk.read(f"{self._root}/{path}")
        except FileNotFoundError:
            self._quarantine.refuse_blocked(path)
            return None
        try:
            return unseal(row, key, data)
        except NewerSchema:
            raise
        except Damaged as error:
            # Torn because the host went down before it was synced: the journal has the whole of it.
            reason = f"{error} (the journal had the record, which is in its place)"
            self._quarantine.keep(row, key, path, data, reason, blocks=False)
            return None

    def _set_aside(self, row: Contract, path: str, file: str, data: bytes) -> None:
        """Move bytes that were never durable to quarantine, where they do not block the key."""
        kept, _ = self._quarantine.keep(row, key_of(row, path), file, data, _NEVER_SYNCED, blocks=False)
        self._disk.remove(f"{self._root}/{file}")
        _log.warning("%s/%s: %s; the bytes are in %s", self._root, file, _NEVER_SYNCED, self._quarantine.place(kept))
