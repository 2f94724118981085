"""The high-water mark of an SQLite file: a small file next to the database that knows how far it has come.

A damaged frame in the log of SQLite ends its recovery there: every later commit is rolled back without an error. So
each durable commit has a number, which is in the database and, after the commit, in the mark. A database that is
behind its mark has lost commits.

The mark is a head and one byte for each commit since, so its length is the number: a process that was paused between
its commit and its byte can only write where there is a byte already, and takes nothing back. It is not synced: after a
power failure it may be older than the database, never newer, because the commit was synced before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import zlib
from typing import Final, NamedTuple

from backtest_kit.persist.files import Disk

_log = logging.getLogger(__name__)

_FIELDS: Final = struct.Struct("<16sQ")
_HEAD: Final = struct.Struct("<24sI4x")
_LONGEST: Final = 1 << 16


class Head(NamedTuple):
    """How far a database has come."""

    identity: bytes
    """16 random bytes: a mark of another database means nothing here."""
    commits: int

    def pack(self) -> bytes:
        """The value in the database, and the head of a mark; the checksum keeps either from being misread."""
        fields = _FIELDS.pack(*self)
        return _HEAD.pack(fields, zlib.crc32(fields))


def new_head() -> Head:
    """That of a database with an identity that no mark knows."""
    return Head(os.urandom(16), 0)


def unpack(data: bytes) -> Head | None:
    if len(data) != _HEAD.size:
        return None
    fields, checksum = _HEAD.unpack(data)
    return Head(*_FIELDS.unpack(fields)) if zlib.crc32(fields) == checksum else None


class Mark:
    """The mark of one database. Failures are logged: the commits themselves have happened."""

    def __init__(self, database: str, disk: Disk) -> None:
        self.path = f"{database}-mark"
        self._database = database
        self._disk = disk
        self._fd: int | None = None
        self._head = Head(b"", 0)
        """That of the open mark: the commits up to it have no byte there."""

    def read(self) -> Head | None:
        """What it knows; None without one that is whole. Read it before the database, which may be growing."""
        try:
            data = self._disk.read(self.path)
        except OSError:
            return None
        head = unpack(data[: _HEAD.size])
        return head and head._replace(commits=head.commits + len(data) - _HEAD.size)

    def begin(self, head: Head) -> None:
        """Make ready to note the commit that follows `head`. The caller holds the write lock of the database.

        Under that lock no other process begins a new mark. One that is paused before its byte has the old file open,
        and the head of the new one covers what it would have noted there.
        """
        try:
            # A database gets another identity when a loss is accepted, and its mark may be replaced by any process.
            if self._fd is not None and self._head.identity == head.identity:
                found = self._disk.fstat(self._fd)
                if found.st_nlink and found.st_size < _LONGEST:
                    return
            self.close()
            self._head = self._usable(head) or self._replace(head)
            self._fd = self._disk.open_for_update(self.path)
        except OSError as error:
            self._failed(error)

    def note(self, head: Head) -> None:
        """Note a commit that is on the disk, for which `begin` was called."""
        # One byte at the place of its own number: the file never gets shorter, however late this comes.
        behind = head.commits - self._head.commits
        if self._fd is not None and behind > 0:
            try:
                self._disk.overwrite(self._fd, _HEAD.size + behind - 1, b".")
            except OSError as error:
                self._failed(error)

    def forget(self) -> None:
        """Remove the mark of a database that was taken away, before another one is made in its place."""
        known = self.read()
        if known is not None and known.commits:
            commits = f"{known.commits:,}"
            _log.warning("%s is gone, which had %s commits: an empty one takes its place", self._database, commits)
        self._disk.discard(self.path)  # it names that other database, and so means nothing here

    def close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with contextlib.suppress(OSError):
                self._disk.close(fd)

    def _usable(self, head: Head) -> Head | None:
        """The head of the mark that is there, if it is of this database and not too long."""
        try:
            data = self._disk.read(self.path)
        except FileNotFoundError:
            return None
        found = unpack(data[: _HEAD.size])
        return found if found and found.identity == head.identity and len(data) < _LONGEST else None

    def _replace(self, head: Head) -> Head:
        directory = self.path.rpartition("/")[0]
        self._disk.rename(self._disk.write_temp(directory, head.pack(), sync=False), self.path)
        return head

    def _failed(self, error: OSError) -> None:
        _log.warning("%s cannot be written: %s; a lost commit may go unnoticed", self.path, error.strerror)


def lost_commits(database: str, known: Head | None, head: Head | None) -> str | None:
    """What the mark knows of that the database does not have, if there is anything. `head` is None if it is empty."""
    if known is None or (head is not None and known.identity != head.identity):
        return None
    done = 0 if head is None else head.commits
    if known.commits <= done:
        return None
    first, many = done + 1, known.commits - done
    lost = f"commit {first:,}" if many == 1 else f"commits {first:,} to {known.commits:,}"
    return (
        f"{database} has lost {lost}, which had been acknowledged: its log was damaged, or an older copy took its "
        f"place. Nothing was changed. {_ways_out(database)}"
    )


def unknown_commits(database: str) -> str:
    """What is said of a database that does not say how far it has come."""
    return f"{database} does not say which commit was its last, so that none could be missed. {_ways_out(database)}"


def _ways_out(database: str) -> str:
    return (
        f"Restore a newer copy of {database} with its -wal file, or accept the loss: "
        f"`backtest-kit store check --accept-loss --store sqlite:{database}`"
    )
