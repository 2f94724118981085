"""The high-water mark of an SQLite store: a small file next to the database that knows how far it has come.

A damaged frame in the log of SQLite ends its recovery there: every later commit is rolled back without an error. So
each durable commit has a number, which is in the database and, after the commit, in the mark. A database that is
behind its mark has lost commits.

The mark is a ring of slots, and commit N is written into slot N modulo their number with one write, so a slow process
does not overwrite the number of a faster one, and nothing is locked. It is not synced: after a power failure it may
be older than the database, never newer, because the commit was synced before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import struct
import zlib
from pathlib import Path
from typing import Final, NamedTuple

_log = logging.getLogger(__name__)

_FIELDS: Final = struct.Struct("<16sQ")
_SLOT: Final = struct.Struct("<24sI4x")
_SLOTS: Final = 128
_WRITE: Final = os.O_WRONLY | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class Head(NamedTuple):
    """How far a database has come."""

    identity: bytes
    """16 random bytes: a mark of another database means nothing here."""
    commits: int

    def pack(self) -> bytes:
        """A slot of the mark, and the value in the database; the checksum keeps either from being misread."""
        fields = _FIELDS.pack(*self)
        return _SLOT.pack(fields, zlib.crc32(fields))


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
        mark = os.open(mark_path(database), _WRITE, 0o600)
        try:
            os.lseek(mark, head.commits % _SLOTS * _SLOT.size, os.SEEK_SET)
            os.write(mark, head.pack())
        finally:
            os.close(mark)
    except OSError as error:
        _log.warning("%s cannot be written: %s; a lost commit may go unnoticed", mark_path(database), error.strerror)


def read_head(connection: sqlite3.Connection) -> Head | None:
    """How far the database has come; None if that cannot be read."""
    row = connection.execute("SELECT head FROM store").fetchone()
    return None if row is None or not isinstance(row[0], bytes) else _unpack(row[0])


def write_head(head: Head, connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE store SET head = ?", (head.pack(),))


def replace_head(connection: sqlite3.Connection) -> None:
    """Give the database an identity that no mark knows."""
    connection.execute("DELETE FROM store")
    connection.execute("INSERT INTO store (head) VALUES (?)", (Head(os.urandom(16), 0).pack(),))


def forget_mark(database: Path) -> None:
    """Remove the mark of a database that was taken away, before another one is made in its place."""
    known = max((mark.commits for mark in read_mark(database)), default=0)
    if known:
        _log.warning("%s is gone, which had %s commits: an empty one takes its place", database, f"{known:,}")
    with contextlib.suppress(OSError):  # it names that other database, and so means nothing here
        mark_path(database).unlink(missing_ok=True)


def lost_commits(database: Path, marks: list[Head], head: Head | None) -> str | None:
    """What the marks know of that the database does not have, if there is anything. `head` is None if it is empty."""
    known = max((mark.commits for mark in marks if head is None or mark.identity == head.identity), default=0)
    done = 0 if head is None else head.commits
    if known <= done:
        return None
    first, many = done + 1, known - done
    lost = f"commit {first:,}" if many == 1 else f"commits {first:,} to {known:,}"
    return (
        f"{database} has lost {lost}, which had been acknowledged: its log was damaged, or an older copy took its "
        f"place. Nothing was changed. {ways_out(database)}"
    )


def unknown_commits(database: Path) -> str:
    """What is said of a database that does not say how far it has come."""
    return f"{database} does not say which commit was its last, so that none could be missed. {ways_out(database)}"


def ways_out(database: Path) -> str:
    """How to go on with a database that has lost commits."""
    return (
        f"Restore a newer copy of {database} with its -wal file, or accept the loss: "
        f"`backtest-kit store check --accept-loss --store sqlite:{database}`"
    )


def _unpack(data: bytes) -> Head | None:
    if len(data) != _SLOT.size:
        return None
    fields, checksum = _SLOT.unpack(data)
    return Head(*_FIELDS.unpack(fields)) if zlib.crc32(fields) == checksum else None
