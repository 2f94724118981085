"""`Successors`: records that are not synced yet, each beside the durable one that it will replace.

When the power fails, the rename of a file can survive and its unsynced bytes not: the record that was durable
before would be gone as well. So a write of the record class goes to `state/s/b.json.next`, where every process
reads it immediately; a moment later that file is synced, renamed to `state/s/b.json`, and the directory synced.
Of the two files the one with the higher revision counts.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Final

from backtest_kit.errors import Damaged
from backtest_kit.persist.backends.file_paths import NEXT, key_of, row_of, unseal_at
from backtest_kit.persist.backends.file_writes import Writes
from backtest_kit.persist.codec import NewerSchema
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.files import Disk, has_lost_blocks
from backtest_kit.persist.locks import LockSet
from backtest_kit.persist.quarantine import Quarantine
from backtest_kit.persist.store import Key, Record

PATIENCE: Final = 2.0

_log = logging.getLogger(__name__)


def is_torn(data: bytes) -> bool:
    """Whether a loss of power explains the bytes of a record file: its end is missing, or parts of it are zeros."""
    return has_lost_blocks(data) or not data.endswith(b"\n}\n")


def is_lost(row: Contract, data: bytes) -> bool:
    """Whether the file of a record was never durable, so that the record reads as absent.

    Never for money, whose files are synced before they get their names.
    """
    if row.durability is Durability.MONEY:
        return False
    return not data.strip(b"\0") or (row.durability is Durability.CACHE and is_torn(data))


class Successors:
    """Methods block. Paths are relative to the root and name the record, not its successor."""

    def __init__(self, root: str, disk: Disk, locks: LockSet, quarantine: Quarantine, writes: Writes) -> None:
        self._root = root
        self._disk = disk
        self._locks = locks
        self._quarantine = quarantine
        self._writes = writes

    def load(self, row: Contract, key: Key | None, path: str, *, locked: bool) -> Record | None:
        """The successor at `path`; one that a loss of power tore reads as absent. `locked`: the caller holds the lock.

        Raises:
            Damaged: it is there and cannot be read.
        """
        try:
            data = self._disk.read(f"{self._root}/{path}{NEXT}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        if is_torn(data):
            if locked:
                self.set_aside(row, path, f"{path}{NEXT}", data)
            return None
        try:
            return unseal_at(row, key, path, data)
        except NewerSchema as error:
            raise NewerSchema(f"{self._root}/{path}{NEXT}: {error}") from None
        except Damaged as error:
            way_out = "it stays where it is and blocks its key: remove it to go back to the value before it"
            raise Damaged(f"{self._root}/{path}{NEXT}: {error}; {way_out}") from None

    def set_aside(self, row: Contract, path: str, file: str, data: bytes) -> None:
        """Move bytes that were never durable out of the way of their key. The caller holds its lock."""
        reason = "it was written shortly before the power failed and never synced"
        kept, _ = self._quarantine.keep(row, key_of(row, path), file, data, reason, blocks=False)
        self._disk.remove(f"{self._root}/{file}")
        _log.warning("%s/%s: %s; the bytes are in %s", self._root, file, reason, self._quarantine.place(kept))

    def promote(self, path: str) -> None:
        """Sync a successor and give it its name; the caller syncs the directory. Nothing is done if there is none.

        Raises:
            OSError: the sync failed, and is not to be tried again; the record before it is as durable as it was.
            Damaged: one of the two cannot be read.
            Locked: another process has kept the lock for too long.
        """
        # At first without the lock, so that writers do not wait for the disk; with it where they were faster.
        for locked in (False, True):
            with self._hold(path) if locked else contextlib.nullcontext():
                try:
                    fd = self._disk.open_for_reading(f"{self._root}/{path}{NEXT}")
                except FileNotFoundError:
                    return
                try:
                    self._disk.fsync(fd)
                    with contextlib.nullcontext() if locked else self._hold(path):
                        if self._disk.is_at(fd, f"{self._root}/{path}{NEXT}"):
                            with contextlib.suppress(FileNotFoundError):  # its whole namespace is being forgotten
                                self._succeed(path)
                            return
                finally:
                    self._disk.close(fd)

    def settle(self, path: str) -> None:
        """Make durable, under its name, what a killed process left. Raises as `promote`."""
        row = row_of(path)
        if row is None or row.durability is not Durability.RECORD:
            return  # what lies in quarantine is not a successor
        with self._hold(path):
            successor = self._load_newer(path)
            if successor is not None:
                # Never by a sync of that file, for the one that the killed process tried may have failed.
                self._writes.write_durably(path, *successor)
            self._disk.discard(f"{self._root}/{path}{NEXT}")

    def _hold(self, path: str) -> contextlib.AbstractContextManager[None]:
        return self._locks.hold((path,), PATIENCE)

    def _succeed(self, path: str) -> None:
        if self._load_newer(path) is None:
            self._disk.discard(f"{self._root}/{path}{NEXT}")
        else:
            self._disk.move(f"{self._root}/{path}{NEXT}", f"{self._root}/{path}")

    def _load_newer(self, path: str) -> tuple[bytes, int] | None:
        """The bytes and the tick of a successor; None if it is none, because a batch has written the record since."""
        row, file = row_of(path), f"{self._root}/{path}"
        successor = None if row is None else self.load(row, None, path, locked=True)
        if row is None or successor is None:
            return None
        try:
            data = self._disk.read(file)
        except FileNotFoundError:
            self._quarantine.refuse_blocked(path)
        else:
            if is_lost(row, data):
                self.set_aside(row, path, path, data)
            elif unseal_at(row, successor.key, path, data).rev > successor.rev:
                return None
        return self._disk.read(f"{file}{NEXT}"), self._disk.stat(f"{file}{NEXT}").st_mtime_ns
