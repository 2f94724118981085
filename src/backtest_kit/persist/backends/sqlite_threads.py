"""Threads that own an SQLite connection each, and the two connections of a store.

Writes that wait while a commit is under way go into the next transaction together: one sync to the disk
serves them all, and each has an outcome of its own. Reads have a connection to themselves, and in WAL
mode neither side waits for the other.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from backtest_kit.errors import BacktestKitError, Damaged, Outcome, OutOfSpace, RetryLater, UserError
from backtest_kit.persist.backends.sqlite_mark import (
    Head,
    forget_mark,
    lost_commits,
    read_head,
    read_mark,
    replace_head,
    unknown_commits,
    write_head,
    write_mark,
)
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.files import Disk, disk_error

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

SCHEMA_VERSION: Final = 2
APPLICATION_ID: Final = 0x42_4B_50_79
"""`BKPy` in the header of the file: it is ours, whatever it is called."""

_SCHEMA: Final = (
    """CREATE TABLE records (
        id INTEGER PRIMARY KEY,
        namespace TEXT NOT NULL,
        contract TEXT NOT NULL,
        key TEXT NOT NULL,
        seq INTEGER NOT NULL,
        removed INTEGER NOT NULL,
        record BLOB NOT NULL
    )""",
    "CREATE UNIQUE INDEX records_by_name ON records (namespace, contract, key)",
    # The same once more, in a tree of its own: what a damaged page hides in one of them, the other one still finds.
    "CREATE UNIQUE INDEX records_by_key ON records (key, contract, namespace)",
    "CREATE INDEX records_in_order ON records (namespace, contract, seq)",
    """CREATE TABLE quarantine (
        id INTEGER PRIMARY KEY,
        found_at INTEGER NOT NULL,
        namespace TEXT NOT NULL,
        contract TEXT NOT NULL,
        key TEXT NOT NULL,
        reason TEXT NOT NULL,
        record BLOB NOT NULL,
        UNIQUE (namespace, contract, key, record)
    )""",
    # A single row; see `Head`.
    "CREATE TABLE store (head BLOB NOT NULL)",
)
_WAYS_OUT: Final = "restore a copy of the file, or move it away to begin with an empty one; it was not changed"


FAILURES: Final = (sqlite3.Error, UnicodeDecodeError)
"""What a call of SQLite may raise; the second, where its message quotes bytes of a damaged page."""
_DAMAGE: Final = frozenset(
    (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT)
)
"""What a damaged file is to SQLite. The last two stand for a table that is not there, or a row that is there already:
in a sound file, no statement of this program meets either."""


class Job:
    """Work for a thread, and the task that waits for it. No work means: close the connection."""

    __slots__ = ("durable", "error", "future", "loop", "result", "work")

    def __init__(self, work: Work[Any] | None, *, durable: bool = True) -> None:
        self.work = work
        self.durable = durable
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.result: Any = None
        self.error: BaseException | None = None

    def perform(self, connection: sqlite3.Connection) -> Any:
        return None if self.work is None else self.work(connection)

    def settle(self) -> None:
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class ConnectionThread:
    """One thread, one connection. The thread starts with the first job and ends with `close`."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], sqlite3.Connection],
        serve: Callable[[sqlite3.Connection, list[Job]], None],
    ) -> None:
        self._name = name
        self._connect = connect
        self._serve = serve
        self._jobs: deque[Job] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pid = 0

    async def run(self, job: Job) -> Any:
        with self._wake:
            if self._thread is None:
                self._pid = os.getpid()
                self._thread = threading.Thread(target=self._main, name=self._name, daemon=True)
                self._thread.start()
            self._jobs.append(job)
            self._wake.notify()
        return await job.future

    async def close(self) -> None:
        """Serve what is waiting, then close the connection. A job that comes later opens it again."""
        if self._thread is not None:
            await self.run(Job(None))

    def check_process(self) -> None:
        """Raise `UserError` in a child that was forked while the connection was open."""
        if self._pid not in (0, os.getpid()):
            raise UserError(
                f"{self._name} was opened by process {self._pid} and is used in its fork {os.getpid()}: "
                "make a store of its own after the fork"
            )

    def _main(self) -> None:
        connection: sqlite3.Connection | None = None
        running = True
        while running:
            with self._wake:
                while not self._jobs:
                    self._wake.wait()
                jobs = list(self._jobs)
                self._jobs.clear()
            tasks = [job for job in jobs if job.work is not None]
            try:
                if tasks and connection is None:
                    connection = self._connect()
                if tasks and connection is not None:
                    self._serve(connection, tasks)
            except BaseException as error:  # whoever waits must hear of it, whatever it is
                for job in tasks:
                    job.error = job.error or error
            if len(tasks) < len(jobs):
                if connection is not None:
                    connection.close()
                    connection = None
                with self._wake:
                    running = bool(self._jobs)
                    if not running:
                        self._thread, self._pid = None, 0
            _settle(jobs)


def _settle(jobs: list[Job]) -> None:
    """Wake the waiting tasks, with one call into each loop."""
    for loop in {job.loop for job in jobs}:
        try:
            loop.call_soon_threadsafe(_settle_here, [job for job in jobs if job.loop is loop])
        except RuntimeError:
            # The loop was closed meanwhile: nobody waits there any more.
            continue


def _settle_here(jobs: list[Job]) -> None:
    for job in jobs:
        job.settle()


class Database:
    """An SQLite file with one connection that writes and one that reads."""

    def __init__(self, path: Path, busy_timeout: float, *, existing: bool = False) -> None:
        self.path = path
        self._existing = existing
        self._busy_timeout = busy_timeout
        self._writer = ConnectionThread(f"SQLite store {path} (writer)", self._open, self._commit)
        self._reader = ConnectionThread(f"SQLite store {path} (reader)", self._open_reader, self._answer)
        self._opened = False
        self._synced: bool | None = None
        """What the writing connection is set to; unknown when it is new."""

    async def open(self) -> None:
        if self._existing:
            await self.read(lambda connection: None)
        else:
            await self.write(lambda connection: None)

    async def close(self) -> None:
        self._check_process()
        await self._reader.close()
        await self._writer.close()
        self._opened = False

    async def write(self, work: Work[T], *, durable: bool = True) -> T:
        """Do `work` in a transaction, perhaps with that of others. It changes nothing before it raises.

        With `durable`, the transaction is on the disk before this returns.
        """
        self._check_process()
        result: T = await self._writer.run(Job(work, durable=durable))
        return result

    async def read(self, work: Work[T]) -> T:
        """Do `work`, which only selects."""
        self._check_process()
        if not self._opened and not self._existing:
            await self.open()
        result: T = await self._reader.run(Job(work))
        return result

    def _check_process(self) -> None:
        self._writer.check_process()
        self._reader.check_process()

    def _commit(self, connection: sqlite3.Connection, jobs: list[Job]) -> None:
        try:
            self._transact(connection, jobs)
        except FAILURES as error:
            if len(jobs) == 1 or _code(error) == sqlite3.SQLITE_BUSY:
                for job in jobs:
                    job.error = self._explain(error)
                return
            # One value too large, say, must not fail the others: each alone has its own outcome.
            for job in jobs:
                job.error = None
                self._commit(connection, [job])

    def _transact(self, connection: sqlite3.Connection, jobs: list[Job]) -> None:
        durable = any(job.durable for job in jobs)
        if durable != self._synced:
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._synced = durable
        connection.execute("BEGIN IMMEDIATE")
        crashpoint("sqlite.after_begin")
        head: Head | None = None
        before = connection.total_changes
        try:
            for job in jobs:
                try:
                    job.result = job.perform(connection)
                except BacktestKitError as error:
                    job.error = error
            if durable and connection.total_changes != before:
                head = read_head(connection)
                if head is None:
                    raise Damaged(unknown_commits(self.path))
                head = head._replace(commits=head.commits + 1)
                write_head(head, connection)
        except BaseException:
            _roll_back(connection)
            raise
        crashpoint("sqlite.after_work")
        try:
            connection.execute("COMMIT")
            crashpoint("sqlite.after_commit")
        except FAILURES as error:
            _roll_back(connection)
            if _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL):
                raise
            # The end of the transaction may have reached the log before the sync failed.
            for job in jobs:
                job.error = job.error or self._explain(error, Outcome.UNKNOWN)
            return
        # Behind the commit, so that it is never ahead of the database, and before the answer. One that was not synced
        # may be lost with the host's power, so it is not noted.
        if head is not None:
            write_mark(self.path, head)

    def _answer(self, connection: sqlite3.Connection, jobs: list[Job]) -> None:
        for job in jobs:
            try:
                job.result = job.perform(connection)
            except FAILURES as error:
                job.error = self._explain(error)
            except Exception as error:
                job.error = error

    def _open(self) -> sqlite3.Connection:
        disk, directory = Disk(), self.path.absolute().parent
        try:
            disk.make_directories(str(directory), sync=True)
            if not directory.is_dir():
                raise NotADirectoryError
            if self.path.is_dir():
                raise UserError(f"{self.path} is a directory: give the SQLite store the path of a file")
            if not self.path.exists():
                forget_mark(self.path)
            disk.make_file(str(self.path))  # SQLite gives its log and shared memory the permissions of the database
        except OSError as error:
            in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
            reason = "a directory of its path is a file" if in_the_way else error.strerror
            raise UserError(f"{self.path} cannot be made: {reason}; give another path") from error
        self._require_whole()
        connection = self._connect()
        deadline = time.monotonic() + self._busy_timeout
        while True:
            try:
                self._prepare(connection)
                break
            except BaseException as error:
                _roll_back(connection)
                # SQLite does not wait by itself while another process switches a new file to WAL.
                if isinstance(error, FAILURES):
                    if _code(error) == sqlite3.SQLITE_BUSY and time.monotonic() < deadline:
                        time.sleep(0.01)
                        continue
                    connection.close()
                    raise self._explain(error) from error
                connection.close()
                raise
        try:
            # Whether or not it is new: who made it may not have come to making its name durable.
            disk.sync_directory(str(directory))
            crashpoint("sqlite.after_directory_fsync")
        except OSError as error:
            connection.close()
            raise disk_error(error, "make durable the name of", self.path) from error
        self._opened = True
        self._synced = None
        return connection

    def _open_reader(self) -> sqlite3.Connection:
        if self._existing:
            return self._open_to_look()
        connection = self._connect()
        connection.execute("PRAGMA query_only = ON")
        return connection

    def loss(self) -> str | None:
        """Which commits the database has lost, as far as its mark knows. Blocks, and changes nothing.

        Raises:
            Damaged, RetryLater, UserError: it cannot be opened.
        """
        marks = read_mark(self.path)
        if not self.path.is_file():
            return None
        if not self.path.stat().st_size:
            return lost_commits(self.path, marks, None)
        # Not a connection that writes: when it is closed, it throws away what it could not read of the log.
        connection = self._connect_to_look()
        try:
            if self._check_owner(connection):
                return None
            head = read_head(connection)
            return unknown_commits(self.path) if head is None else lost_commits(self.path, marks, head)
        except FAILURES as error:
            raise self._explain(error) from error
        finally:
            connection.close()

    def accept_loss(self) -> str | None:
        """As `Store.accept_loss`: the database gets a new identity, of which no mark knows anything. Blocks."""
        lost = self.loss()
        if lost is None:
            return None
        connection = self._connect()
        try:
            self._prepare(connection)
            connection.execute("BEGIN IMMEDIATE")
            replace_head(connection)
            connection.execute("COMMIT")
        except FAILURES as error:
            raise self._explain(error) from error
        finally:
            connection.close()
        return lost

    def _require_whole(self) -> None:
        # Without a mark there is nothing to compare, and a new database is best left alone by those who come second.
        lost = self.loss() if read_mark(self.path) else None
        if lost is not None:
            raise Damaged(lost)

    def _open_to_look(self) -> sqlite3.Connection:
        self._require_whole()
        connection = self._connect_to_look()
        try:
            if self._check_owner(connection):
                raise UserError(f"{self.path} is not a store of this program, it is empty: name another one")
        except BaseException as error:
            connection.close()
            if isinstance(error, FAILURES):
                raise self._explain(error) from error
            raise
        return connection

    def _connect_to_look(self) -> sqlite3.Connection:
        address = f"{self.path.as_uri()}?mode=ro"
        # A log that nobody has needs files beside it even to be read; without it nothing changes on a read-only disk.
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

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN")
        self._check_owner(connection)
        connection.execute("COMMIT")
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise UserError(f"{self.path} is on a file system without shared memory for WAL: use a local disk")
        connection.execute("BEGIN IMMEDIATE")
        if self._check_owner(connection):
            for statement in _SCHEMA:
                connection.execute(statement)
            replace_head(connection)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            crashpoint("sqlite.after_schema")
        connection.execute("COMMIT")
        # The identity must be in the database itself: with a damaged log, it would else look like one that is new.
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _check_owner(self, connection: sqlite3.Connection) -> bool:
        """True if the file is empty and the schema must be made. To be asked inside a transaction."""
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        schema = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master")}
        if not application and not schema:
            return True
        if application != APPLICATION_ID:
            raise UserError(f"{self.path} is an SQLite database of another program: give another path")
        if version < SCHEMA_VERSION:
            raise UserError(
                f"{self.path} was written by an older version of this program (schema {version}, this one reads "
                f"{SCHEMA_VERSION}): export it with that version, and import it into a new file"
            )
        if version > SCHEMA_VERSION:
            raise Damaged(
                f"{self.path} was written by a newer version of this program (schema {version}, this one reads "
                f"up to {SCHEMA_VERSION}): upgrade, or give another path; it was not changed"
            )
        if not schema.issuperset(_SCHEMA):
            # A column with another name or type would be read as something else.
            raise Damaged(f"the tables of {self.path} are not those that this program made: {_WAYS_OUT}")
        return False

    def _explain(self, error: Exception, outcome: Outcome | None = None) -> Exception:
        code = _code(error)
        if code in _DAMAGE or isinstance(error, UnicodeDecodeError):
            return Damaged(f"{self.path} is not a sound SQLite database ({error}): {_WAYS_OUT}", outcome=outcome)
        if code == sqlite3.SQLITE_FULL:
            return OutOfSpace(f"no space left for {self.path}: free some; what is stored is intact", outcome=outcome)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return RetryLater(
                f"{self.path} was locked by another process for more than {self._busy_timeout:g} s: try again",
                outcome=outcome,
            )
        if code == sqlite3.SQLITE_TOOBIG or isinstance(error, sqlite3.DataError):
            return UserError(f"a value is too large for {self.path}: {error}")
        if isinstance(error, sqlite3.OperationalError):
            return RetryLater(f"{self.path} could not be used ({error}): check the disk and try again", outcome=outcome)
        return error


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
