"""A write-ahead journal: it makes several changes of files one change.

An entry is one line with a checksum: all changes of one atomic request, with the revisions that the records will have.
Once the entry is on the disk the request has happened, whatever happens to the process: the next opening of the root
finishes it. Replaying an entry twice changes nothing, because a record as new as the entry or newer stays.

Every process has its own journal file, locked while the process lives. A file whose lock is free has no process, and
the first process to open the root replays it. A process that fails to carry out an entry of its own closes its files
and opens the root again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from backtest_kit.errors import Damaged, Outcome
from backtest_kit.persist.codec import parse, seal_line, unseal_line
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.files import Disk, disk_error, has_lost_blocks
from backtest_kit.persist.locks import in_children, try_lock

SUFFIX: Final = ".journal"

_log = logging.getLogger(__name__)


class _File:
    """One journal file of this process, and the files to sync before it can be removed."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.size = 0
        self.changed: dict[str, None] = {}


class Journal:
    """The journal of one store of one process. Methods block; disk failures raise `BacktestKitError`s."""

    def __init__(self, directory: str, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk
        self._guard = threading.RLock()
        self._current: _File | None = None
        self._retired: list[_File] = []
        self._spoiled = False
        """True if a file may still have an entry whose caller got an error."""
        self._serial = 0
        in_children(self._let_go)

    @contextlib.contextmanager
    def request(self, entries: Sequence[bytes], changed: Iterable[str]) -> Iterator[None]:
        """Make `entries` durable, then let the caller carry them out in the body.

        If the body fails, all journal files of this object are closed: the next opening of the root replays them.
        `changed` are the files and directories that the body writes without syncing them.
        """
        # Held until all is carried out: a checkpoint in between would remove changes not in the files yet.
        with self._guard:
            file = self._write(entries)
            file.changed.update(dict.fromkeys(changed))
            try:
                yield
            except BaseException:
                self.close()
                raise

    def drop_refused(self) -> None:
        """Remove entries whose callers got an error: replayed, they would undo the next writes.

        Raises:
            RetryLater, OutOfSpace: the disk failed; nothing may be acknowledged until this succeeds.
        """
        with self._guard:
            if self._spoiled:
                self.checkpoint()
                self._spoiled = False

    def changed_by_others(self) -> dict[str, str]:
        """The records changed in the journals of other processes, each with its journal file."""
        changed: dict[str, str] = {}
        for path in self.others():
            with contextlib.suppress(FileNotFoundError):
                changed |= {change["path"]: path for change in _changes(self._disk.read(path))}
        return changed

    def has_orphan(self) -> bool:
        """Whether there is a journal file whose process is gone, or has let go of it."""
        for path in self.others():
            with contextlib.suppress(FileNotFoundError):  # its owner has emptied it meanwhile
                fd = self._disk.open_for_update(path)
                try:
                    if try_lock(fd) and self._disk.is_at(fd, path):
                        return True
                finally:
                    self._disk.close(fd)
        return False

    def others(self) -> list[str]:
        """The journal files that are not of this object."""
        own = {file.path for file in self._files}
        paths = (entry.path for entry in self._disk.entries(self._directory) if entry.name.endswith(SUFFIX))
        return [path for path in paths if path not in own]

    def checkpoint(self) -> None:
        """Sync what the entries changed, then forget the entries.

        Raises:
            RetryLater, OutOfSpace: a file could not be synced or removed; its entries stay. Those that could not be
                synced are carried out anew before the next write.
        """
        with self._guard:
            files, self._retired = self._retired, []
            if self._current is not None:
                files.append(self._current)
                self._current = None
        for number, file in enumerate(files):
            synced = False
            try:
                for path in file.changed:
                    self._disk.sync_file(path)
                synced = True
                with contextlib.suppress(FileNotFoundError):
                    self._disk.remove(file.path)
                if self._spoiled:
                    self._disk.sync_directory(self._directory)
            except OSError as error:
                with self._guard:
                    self._retired[:0] = files[number:] if synced else files[number + 1 :]
                if not synced:
                    # Let go of, so that a replay writes all of it to new files: a sync of the same ones that is tried
                    # again reports success for what the kernel has dropped.
                    with contextlib.suppress(OSError):
                        self._disk.close(file.fd)
                raise disk_error(error, "apply and remove the journal", file.path, Outcome.UNKNOWN) from error
            self._disk.close(file.fd)
            crashpoint("journal.after_checkpoint")

    def distrust(self, path: str) -> None:
        """Let go of the entries that changed `path`, whose sync has failed: a replay writes them to new files."""
        with self._guard:
            for file in [each for each in self._files if path in each.changed]:
                if file is self._current:
                    self._current = None
                else:
                    self._retired.remove(file)
                with contextlib.suppress(OSError):
                    self._disk.close(file.fd)

    def close(self) -> None:
        """Close the files; the next process to open the root replays those that a failed checkpoint left."""
        with self._guard:
            for file in self._files:
                self._disk.close(file.fd)
            self._retired, self._current = [], None

    def replay(self, redo: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Pass the changes in each file of a dead process to `redo`, which makes them durable.

        A file with a damaged line, or for which `redo` returned False, is kept as evidence.
        """
        removed = False
        for entry in sorted(self._disk.entries(self._directory), key=lambda entry: entry.name):
            if not entry.name.endswith(SUFFIX):
                continue
            try:
                fd = self._disk.open_for_update(entry.path)
            except FileNotFoundError:
                continue  # its owner has emptied it in the meantime
            try:
                # Locked and still there: an owner removes its file first and releases the lock afterwards.
                if not try_lock(fd) or not self._disk.is_at(fd, entry.path):
                    continue
                data = self._disk.read(entry.path)
                if not redo([*_changes(data)]) or _is_damaged(data):
                    kept = f"{entry.path}.damaged"
                    self._disk.fsync(fd)
                    self._disk.move(entry.path, kept)
                    _log.error("part of a journal could not be replayed: the rest is in %s", kept)
                else:
                    self._disk.remove(entry.path)
                    removed = True
            finally:
                self._disk.close(fd)
        if removed:  # an entry that reappears after a power loss could undo later writes
            self._disk.sync_directory(self._directory)

    def _write(self, entries: Sequence[bytes]) -> _File:
        data = b"".join(map(seal_line, entries))
        try:
            file = self._current or self._start()
        except OSError as error:
            raise disk_error(error, "start a journal in", self._directory) from error
        outcome = Outcome.NOT_DONE
        try:
            self._disk.write_all(file.fd, data)
            crashpoint("journal.after_append")
            outcome = Outcome.UNKNOWN
            self._disk.fsync(file.fd)
            crashpoint("journal.after_fsync")
        except OSError as error:
            # Never written to again: after a failed sync the bytes on the disk are unknown.
            try:
                self._disk.truncate(file.fd, file.size)
            except OSError:
                outcome = Outcome.UNKNOWN
            self._spoiled = True
            self._retired.append(file)
            self._current = None
            raise disk_error(error, "write to the journal", file.path, outcome) from error
        file.size += len(data)
        return file

    @property
    def _files(self) -> list[_File]:
        return [*self._retired, *filter(None, (self._current,))]

    def _start(self) -> _File:
        while self._current is None:
            self._serial += 1
            path = f"{self._directory}/{time.time_ns():020d}-{os.getpid()}-{self._serial}{SUFFIX}"
            fd = self._disk.open_for_append(path)
            try:
                # Until it is locked it looks like that of a dead process: another process that opens the root
                # removes it, and entries in it would be lost. Once it is locked and still there, it is safe.
                safe = try_lock(fd) and self._disk.is_at(fd, path)
                if safe:
                    self._disk.sync_directory(self._directory)
            except BaseException:
                self._disk.close(fd)
                self._disk.discard(path)
                raise
            if safe:
                self._current = _File(path, fd)
            else:
                self._disk.close(fd)
        return self._current

    def _let_go(self) -> None:
        """Close the parent's files after a fork: their locks must end with the parent."""
        for file in self._files:
            with contextlib.suppress(OSError):
                self._disk.close(file.fd)
        self._retired, self._current = [], None


def written_lines(data: bytes) -> Iterator[bytes]:
    """The lines of a journal, without those cut short by a power loss: they were never synced, so never acknowledged.

    Cut short are bytes after the last newline, and lines with zeros where blocks were lost.
    """
    offset = 0
    for line in data.splitlines(keepends=True):
        if line.endswith(b"\n") and not has_lost_blocks(line, offset):
            yield line
        offset += len(line)


def _changes(data: bytes) -> Iterator[dict[str, Any]]:
    """The changes of all complete entries."""
    for line in written_lines(data):
        with contextlib.suppress(Damaged):
            yield from parse(unseal_line(line))["changes"]


def _is_damaged(data: bytes) -> bool:
    """True if a written line is damaged."""
    for line in written_lines(data):
        try:
            unseal_line(line)
        except Damaged:
            return True
    return False
