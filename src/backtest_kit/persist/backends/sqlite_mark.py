"""The high-water mark of an SQLite store: a small file next to the database that knows how far it has come.

A damaged frame in the log of SQLite ends its recovery there: every later commit is rolled back without an error. So
each durable commit has a number, which is in the database and, after the commit, in the mark. A database that is
behind its mark has lost commits.

The mark is a ring of slots, and commit N is written into slot N modulo their number with one write, so a slow process
does not overwrite the number of a faster one, and nothing is locked. It is not synced: after a power failure it may
be older than the database, never newer, because the commit was synced before.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import struct
import zlib
from pathlib import Path
from typing import Final, NamedTuple

from backtest_kit.errors import Damaged

_log = logging.getLogger(__name__)

_FIELDS: Final = struct.Struct("<16sQ")
_SLOT: Final = struct.Struct("<24sI4x")
_SLOTS: Final = 128


class Head(NamedTuple):
    """How far a database has come."""

    identity: bytes
    """16 random bytes: a mark of another database means nothing here."""
    commits: int

    def pack(self) -> bytes:
        """A slot of the mark, and the value in the database; the checksum keeps either from being misread."""
        fields = _FIELDS.pack(*self)
        return _SLOT.pack(fields, zlib.crc32(fields))


def new_head() -> Head:
    return Head(os.urandom(16), 0)


def mark_path(database: Path) -> Path:
    return Path(f"{database}-mark")


def read_mark(database: Path) -> list[Head]:
    """Every slot that is whole: none without a mark. Read it before the database, which may be growing."""
    try:
        data = mark_path(database).read_bytes()
    except OSError:
        return []
    slots = (data[start : start + _SLOT.size] for start in range(0, len(data), _SLOT.size))
    return [head for head in map(_unpack, slots) if head is not None]


def write_mark(database: Path, head: Head) -> None:
    """Note a commit that is on the disk. A failure is logged: the commit itself has happened."""
    try:
        mark = os.open(mark_path(database), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(mark, head.pack(), head.commits % _SLOTS * _SLOT.size)
        finally:
            os.close(mark)
    except OSError as error:
        _log.warning("%s cannot be written: %s; a lost commit may go unnoticed", mark_path(database), error.strerror)


def read_head(connection: sqlite3.Connection) -> Head:
    """How far the database has come.

    Raises:
        Damaged: it does not say.
    """
    row = connection.execute("SELECT head FROM store").fetchone()
    head = None if row is None or not isinstance(row[0], bytes) else _unpack(row[0])
    if head is None:
        raise Damaged("the number of the last commit cannot be read from the database: restore a copy of the file")
    return head


def write_head(head: Head, connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE store SET head = ?", (head.pack(),))


def lost_commits(database: Path, marks: list[Head], head: Head) -> str | None:
    """What the marks know of that the database does not have, if there is anything."""
    known = max((mark.commits for mark in marks if mark.identity == head.identity), default=0)
    if known <= head.commits:
        return None
    first, many = head.commits + 1, known - head.commits
    lost = f"commit {first:,}" if many == 1 else f"commits {first:,} to {known:,}"
    return (
        f"{database} has lost {lost}, which had been acknowledged: its log was damaged, or an older copy took its "
        f"place. Nothing was changed. Restore a newer copy of {database} with its -wal file, or accept the loss: "
        f"`backtest-kit store check --accept-loss --store sqlite:{database}`"
    )


def _unpack(data: bytes) -> Head | None:
    if len(data) != _SLOT.size:
        return None
    fields, checksum = _SLOT.unpack(data)
    return Head(*_FIELDS.unpack(fields)) if zlib.crc32(fields) == checksum else None
