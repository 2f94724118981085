"""`SqliteFile`: an SQLite database of this program, opened, verified and written in transactions. Methods block.

It has one connection that writes and one that reads; the caller uses each from one thread at a time.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from backtest_kit.errors import Damaged, Outcome, OutOfSpace, RetryLater, UserError
from backtest_kit.persist.backends.sql import Rows
from backtest_kit.persist.backends.sql_dialect import Dialect
from backtest_kit.persist.backends.sqlite_mark import Head, Mark, lost_commits, new_head, unknown_commits, unpack
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.files import Disk, disk_error
from backtest_kit.persist.locks import Locked
from backtest_kit.persist.upkeep import Finding

T = TypeVar("T")

SCHEMA_VERSION: Final = 3
APPLICATION_ID: Final = 0x42_4B_50_79
"""`BKPy` in the header of the file: it is ours, whatever it is called."""

SQLITE: Final = Dialect(
    parameter="?",
    text="TEXT",
    blob="BLOB",
    identity="INTEGER PRIMARY KEY",
    # Of the types that they should have, whatever a damaged page says.
    columns="coalesce(CAST(kept.namespace AS TEXT), ''), coalesce(CAST(kept.contract AS TEXT), ''), "
    "coalesce(CAST(kept.key AS TEXT), ''), kept.removed, coalesce(CAST(kept.record AS BLOB), x'')",
    index="INDEXED BY {}",
    table="NOT INDEXED",
    rebuild="REINDEX records",
    remedy='stop every process, run `python -m sqlite3 {0} "REINDEX"` (Python 3.12 or newer, or the sqlite3 program), '
    "and `backtest-kit store check --store sqlite:{0}` afterwards; if that finds anything, restore a copy of the file",
)
# The last has a single row, see `Head`.
_SCHEMA: Final = (*SQLITE.schema(), "CREATE TABLE store (head BLOB NOT NULL)")
_WAYS_OUT: Final = "restore a copy of the file, or move it away to begin with an empty one; it was not changed"

FAILURES: Final = (sqlite3.Error, UnicodeDecodeError)
"""What a call of SQLite may raise; the second, where its message quotes bytes of a damaged page."""
_DAMAGE: Final = frozenset(
    (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT)
)
"""What a damaged file is to SQLite. The last two stand for a table that is not there, or a row that is there already:
in a sound file, no statement of this program meets either."""


class SqliteFile:
    """The file at `path`. With `existing` it has to be a store, nothing is made in it, and it may be read-only."""

    def __init__(self, path: Path, busy_timeout: float, *, existing: bool = False, disk: Disk | None = None) -> None:
        self.path = path
        self.rows = Rows(SQLITE, str(path))
        self._busy_timeout = busy_timeout
        self._existing = existing
        self._disk = disk or Disk()
        self._mark = Mark(str(path), self._disk)
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._synced: bool | None = None
        """What the writing connection is set to; unknown when it is new."""

    # -- reading and writing -------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True, patience: float | None = None) -> Iterator[sqlite3.Connection]:
        """Commit what the body does; nothing of it stays if it raises. With `durable`, it is on the disk afterwards.

        Raises:
            Locked: another process has kept the file for `patience` seconds, or else as long as this object waits.
            RetryLater, OutOfSpace: with `outcome` UNKNOWN, if it may have been committed all the same.
            Damaged, UserError: nothing was changed.
        """
        connection = self._writer = self._writer or self._open()
        head: Head | None = None
        try:
            if durable != self._synced:
                connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._synced = durable
            wait = self._busy_timeout if patience is None else patience
            connection.execute(f"PRAGMA busy_timeout = {wait * 1000:.0f}")
            connection.execute("BEGIN IMMEDIATE")
            crashpoint("sqlite.after_begin")
            before = connection.total_changes
            yield connection
            if durable and connection.total_changes != before:
                head = self._count_commit(connection)
        except BaseException as error:
            _roll_back(connection)
            if isinstance(error, FAILURES):
                raise self._explain(error) from error
            raise
        crashpoint("sqlite.after_work")
        try:
            connection.execute("COMMIT")
        except FAILURES as error:
            _roll_back(connection)
            refused = _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL)
            # Otherwise the end of the transaction may have reached the log before the sync failed.
            raise self._explain(error, None if refused else Outcome.UNKNOWN) from error
        crashpoint("sqlite.after_commit")
        # Behind the commit, so that it is never ahead of the database, and before the answer. One that was not synced
        # may be lost with the host's power, so it is not noted.
        if head is not None:
            self._mark.note(head)

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work`, which only selects. Unless `existing`, the file has been made by `transaction` before."""
        self._reader = self._reader or self._open_reader()
        try:
            return work(self._reader)
        except FAILURES as error:
            raise self._explain(error) from error

    def close_writer(self) -> None:
        if self._writer is not None:
            connection, self._writer = self._writer, None
            connection.close()
        self._mark.close()

    def close_reader(self) -> None:
        if self._reader is not None:
            connection, self._reader = self._reader, None
            connection.close()

    def check_integrity(self, connection: sqlite3.Connection) -> list[Finding]:
        """What SQLite finds: pages, the order in each tree, every row in every index and nothing else in them."""
        rows = connection.execute("PRAGMA integrity_check").fetchall()
        return [Finding("the database", text) for (text,) in rows if text != "ok"]

    def is_made(self) -> bool:
        """Whether there is something to read, or a mark that knows of something. Makes nothing."""
        if not self.path.is_file():
            return False
        if not self.path.stat().st_size:
            return self._mark.read() is not None
        with self._brief(self._connect_to_look()) as connection:
            return not self._check_owner(connection)

    def require_made(self) -> None:
        """Raise `UserError` if nothing has been made here."""
        if not self.is_made():
            raise self._empty()

    # -- the high-water mark -------------------------------------------------------------------------

    def loss(self) -> str | None:
        """Which commits the database has lost, as far as its mark knows. Changes nothing.

        Raises:
            Damaged, RetryLater, UserError: it cannot be opened.
        """
        known = self._mark.read()
        if not self.is_made():
            return None
        if not self.path.stat().st_size:
            return lost_commits(str(self.path), known, None)
        # Not a connection that writes: when it is closed, it throws away what it could not read of the log.
        with self._brief(self._connect_to_look()) as connection:
            head = _head(connection)
        return unknown_commits(str(self.path)) if head is None else lost_commits(str(self.path), known, head)

    def accept_loss(self) -> str | None:
        """As `Store.accept_loss`: the database gets a new identity, of which no mark knows anything."""
        lost = self.loss()
        if lost is not None:
            with self._brief(self._connect()) as connection:
                self._prepare(connection)
                connection.execute("BEGIN IMMEDIATE")
                _set_head(connection, new_head())
                connection.execute("COMMIT")
        return lost

    def _count_commit(self, connection: sqlite3.Connection) -> Head:
        head = _head(connection)
        if head is None:
            raise Damaged(unknown_commits(str(self.path)))
        self._mark.begin(head)
        head = head._replace(commits=head.commits + 1)
        connection.execute("UPDATE store SET head = ?", (head.pack(),))
        return head

    def _require_whole(self) -> None:
        # Without a mark there is nothing to compare, and a database that another process is making is best left alone.
        lost = self.loss() if self._mark.read() is not None else None
        if lost is not None:
            raise Damaged(lost)

    # -- opening -------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        self._make_file()
        self._require_whole()
        connection = self._connect()
        try:
            self._prepare_patiently(connection)
            # New or not: the process that made it may have died before its name was durable.
            self._disk.sync_directory(str(self.path.parent))
            crashpoint("sqlite.after_directory_fsync")
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError):
                raise disk_error(error, "make durable the name of", self.path) from error
            raise
        self._synced = None
        return connection

    def _make_file(self) -> None:
        directory = self.path.parent
        try:
            self._disk.make_directories(str(directory), sync=True)
            if not directory.is_dir():
                raise NotADirectoryError
            if self.path.is_dir():
                raise UserError(f"{self.path} is a directory: give the SQLite store the path of a file")
            if not self.path.exists():
                self._mark.forget()
            # SQLite gives its log and shared memory the permissions of the database.
            self._disk.make_file(str(self.path))
        except OSError as error:
            in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
            reason = "a directory of its path is a file" if in_the_way else error.strerror
            raise UserError(f"{self.path} cannot be made: {reason}; give another path") from error

    def _prepare_patiently(self, connection: sqlite3.Connection) -> None:
        deadline = time.monotonic() + self._busy_timeout
        while True:
            try:
                self._prepare(connection)
            except FAILURES as error:
                _roll_back(connection)
                # SQLite does not wait by itself while another process switches a new file to WAL.
                if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise self._explain(error) from error
                time.sleep(0.01)
            else:
                return

    def _prepare(self, connection: sqlite3.Connection) -> None:
        is_empty = self._check_owner(connection)
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise UserError(f"{self.path} is on a file system without shared memory for WAL: use a local disk")
        if is_empty:
            self._make_schema(connection)
        # The identity must be in the database itself: with a damaged log, it would else look like one that is new.
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _make_schema(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        if self._check_owner(connection):  # no other process was faster
            for statement in _SCHEMA:
                connection.execute(statement)
            _set_head(connection, new_head())
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            crashpoint("sqlite.after_schema")
        connection.execute("COMMIT")

    def _check_owner(self, connection: sqlite3.Connection) -> bool:
        """True if the file is empty and the schema must be made."""
        with _one_moment(connection):
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            schema = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master")}
        if not application and not schema:
            return True
        if application != APPLICATION_ID:
            raise UserError(f"{self.path} is an SQLite database of another program: give another path")
        if version != SCHEMA_VERSION:
            age = "newer" if version > SCHEMA_VERSION else "older"
            raise Damaged(
                f"{self.path} was written by a {age} version of this program (schema {version}, this one reads "
                f"{SCHEMA_VERSION}): use that version, or give another path; it was not changed"
            )
        if not schema.issuperset(_SCHEMA):
            # A column with another name or type would be read as something else.
            raise Damaged(f"the tables of {self.path} are not those that this program made: {_WAYS_OUT}")
        return False

    def _open_reader(self) -> sqlite3.Connection:
        self._require_whole()
        connection = self._connect_to_look() if self._existing else self._connect()
        try:
            connection.execute("PRAGMA query_only = ON")
            if self._check_owner(connection):
                raise self._empty()
        except BaseException as error:
            connection.close()
            if isinstance(error, FAILURES):
                raise self._explain(error) from error
            raise
        return connection

    def _connect_to_look(self) -> sqlite3.Connection:
        address = f"{self.path.as_uri()}?mode=ro"
        # Reading a log makes files beside it, which a read-only disk does not take; without a log nothing changes.
        if not os.access(self.path.parent, os.W_OK) and not Path(f"{self.path}-wal").exists():
            address += "&immutable=1"
        return self._connect(address, uri=True)

    def _connect(self, address: str | Path | None = None, *, uri: bool = False) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(
                address or self.path,
                uri=uri,
                timeout=self._busy_timeout,
                isolation_level=None,
                check_same_thread=False,
            )
        except FAILURES as error:
            raise self._explain(error) from error
        connection.text_factory = _text
        return connection

    @contextlib.contextmanager
    def _brief(self, connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
        """A connection that is closed after the body, with its failures explained."""
        try:
            yield connection
        except FAILURES as error:
            raise self._explain(error) from error
        finally:
            connection.close()

    def _empty(self) -> UserError:
        return UserError(f"{self.path} is not a store of this program, it is empty: name another one")

    def _explain(self, error: Exception, outcome: Outcome | None = None) -> Exception:
        code = _code(error)
        if code in _DAMAGE or isinstance(error, UnicodeDecodeError):
            return Damaged(f"{self.path} is not a sound SQLite database ({error}): {_WAYS_OUT}", outcome=outcome)
        if code == sqlite3.SQLITE_FULL:
            return OutOfSpace(f"no space left for {self.path}: free some; what is stored is intact", outcome=outcome)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Locked(str(self.path), self._busy_timeout, lambda name: name == self.path.name)
        if code == sqlite3.SQLITE_TOOBIG or isinstance(error, sqlite3.DataError):
            return UserError(f"a value is too large for {self.path}: {error}")
        if isinstance(error, sqlite3.OperationalError):
            return RetryLater(f"{self.path} could not be used ({error}): check the disk and try again", outcome=outcome)
        return error


@contextlib.contextmanager
def _one_moment(connection: sqlite3.Connection) -> Iterator[None]:
    """What is read in the body is of one moment, though another process is making the file."""
    if connection.in_transaction:
        yield
        return
    connection.execute("BEGIN")
    try:
        yield
    finally:
        _roll_back(connection)


def _head(connection: sqlite3.Connection) -> Head | None:
    """How far the database has come; None if that cannot be read."""
    row = connection.execute("SELECT head FROM store").fetchone()
    return None if row is None or not isinstance(row[0], bytes) else unpack(row[0])


def _set_head(connection: sqlite3.Connection, head: Head) -> None:
    connection.execute("DELETE FROM store")
    connection.execute("INSERT INTO store (head) VALUES (?)", (head.pack(),))


def _text(data: bytes) -> str:
    """A text of the database. What a damaged page has instead is shown, and is equal to no name."""
    return data.decode(errors="backslashreplace")


def _code(error: Exception) -> int | None:
    """The primary result code: extended codes say in their higher bits where it came from."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        connection.execute("ROLLBACK")
