"""How well an SQLite file serves a store: its place, its settings, its contents, and whether it can be written to."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

from backtest_kit.persist.backends.disk_diagnosis import (
    LOCK_PATIENCE_SECONDS,
    examine_directory,
    examine_permissions,
    user,
)
from backtest_kit.persist.backends.sqlite_file import SqliteFile
from backtest_kit.persist.files import Disk
from backtest_kit.persist.upkeep import Reading, Status


def examine_file(path: Path, samples: int) -> list[Reading]:
    """The place of an SQLite file, and whether it can be written to. Blocks."""
    readings = examine_directory(path.parent, samples, Disk())
    if any(reading.status is Status.FAULT for reading in readings):
        return readings
    if not path.exists():
        return [*readings, Reading("schema", Status.NEW, f"{path} does not exist yet: the first run makes it")]
    if not os.access(path, os.W_OK):
        remedy = f"give the file to this user: chown {user()} {path}*"
        return [*readings, Reading("file", Status.FAULT, f"{path} is not writable", remedy)]
    return [*readings, examine_permissions([path])]


def examine_connection(connection: sqlite3.Connection) -> list[Reading]:
    """The settings of an SQLite file that belong to the file."""
    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    readings = [Reading("schema", Status.OK, f"version {version}, SQLite {sqlite3.sqlite_version}")]
    if mode == "wal":
        says = "journal_mode WAL; money and records are committed with synchronous FULL"
        return [*readings, Reading("journal", Status.OK, says)]
    remedy = "the next run of this program sets WAL; see which other program has the file open"
    return [*readings, Reading("journal", Status.WEAK, f"journal_mode is {mode}, not WAL", remedy)]


def examine_contents(file: SqliteFile, connection: sqlite3.Connection, subject: str = "contents") -> Reading:
    """Whether the database and every record of money class in it are sound. Reads the whole file.

    What is in quarantine is not reported here once more.
    """
    found, last = file.check_integrity(connection), 0
    while not found:
        last, found = file.rows.check(last, connection, money_only=True)
        if not last:
            return Reading(subject, Status.OK, "every index and every record of money class is sound")
    shown = "; ".join(f"{each.path}: {each.problem}" for each in found[:3]) + "; ..." * (len(found) > 3)
    remedy = "see all of it with backtest-kit store check, and restore a copy of the file"
    return Reading(subject, Status.FAULT, f"damaged: {shown}", remedy)


def examine_write_lock(path: Path) -> Reading:
    """Whether a process keeps every other one from writing. Blocks, and writes nothing."""
    started = time.perf_counter()
    connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=LOCK_PATIENCE_SECONDS)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        remedy = f"see which process it is (lsof {path}) and whether it is stopped"
        return Reading("locks", Status.FAULT, f"no process can write: {error}", remedy)
    finally:
        connection.close()
    spent = round((time.perf_counter() - started) * 1000, 3)
    return Reading("locks", Status.OK, "the write lock is free", median_ms=spent)
