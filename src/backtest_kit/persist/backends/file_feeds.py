"""`Feeds`: the feeds of a file store that are replaced by id, as rows of `feeds.db` in its root.

The file is an SQLite store of its own, so `sqlite:dump/feeds.db` opens it. A namespace is called as its directory is,
relative to the root and with a slash at its end.
"""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from backtest_kit.errors import Damaged, OutOfSpace, RetryLater
from backtest_kit.persist.backends.sql import CHUNK, Rows, Suspect
from backtest_kit.persist.backends.sql_dialect import Connection, name_of
from backtest_kit.persist.backends.sqlite_diagnosis import examine_contents
from backtest_kit.persist.backends.sqlite_file import SqliteFile
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.files import Disk
from backtest_kit.persist.locks import Locked
from backtest_kit.persist.store import Key, Record, Selection
from backtest_kit.persist.upkeep import Finding, Quarantined, Reading

T = TypeVar("T")

FILE: Final = "feeds.db"
BUSY_SECONDS: Final = 10.0
NAMES: Final = frozenset((FILE, f"{FILE}-wal", f"{FILE}-shm", f"{FILE}-mark"))
"""What may lie in the root of it."""


class FeedTransaction:
    """What is done in one transaction: everything or nothing."""

    def __init__(self, rows: Rows, connection: Connection) -> None:
        self._rows = rows
        self._connection = connection

    def head(self, contract: Contract, namespace: str, key: Key) -> Record | None:
        """What a key holds now, without its value.

        Raises:
            Damaged: the key is blocked; the transaction can go on without it.
        """
        return self._rows.head(contract, name_of(namespace, contract, key), key, self._connection)

    def write(self, contract: Contract, namespace: str, record: Record, dumped: bytes) -> None:
        """Store what `dump_record` made of `record`, as the last of its feed."""
        self._rows.write(name_of(namespace, contract, record.key), record, dumped, self._connection)

    def replay(self, contract: Contract, namespace: str, record: Record, dumped: bytes) -> bool:
        """Do a write of a journal again, unless a record that is as new or newer is there.

        Returns False if what is there cannot be trusted: it stays, and blocks its key.
        """
        try:
            current = self.head(contract, namespace, record.key)
        except Damaged:
            return False
        # As new or newer: the entry was carried out before the kill, or another process has written since.
        if current is None or current.rev < record.rev:
            self.write(contract, namespace, record, dumped)
        return True


class Feeds:
    """Methods block, and may be called from any thread. The file is made by the first transaction."""

    def __init__(self, root: str, disk: Disk, *, existing: bool = False) -> None:
        self._file = SqliteFile(Path(root, FILE), BUSY_SECONDS, existing=existing, disk=disk)
        self._rows = self._file.rows
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._is_made = False

    def close(self) -> None:
        with self._writing, self._reading:
            self._file.close_reader()
            self._file.close_writer()
            self._is_made = False

    @contextlib.contextmanager
    def transaction(self, patience: float = BUSY_SECONDS) -> Iterator[FeedTransaction]:
        """Commit what the body does: it is on the disk afterwards. Nothing of it stays if the body raises.

        Raises:
            Locked: another process, or another thread of this one, kept the file for `patience` seconds.
            RetryLater: with `outcome` UNKNOWN, the disk failed at the end.
            OutOfSpace, Damaged: nothing was changed.
        """
        with self._alone(patience) as connection:
            yield FeedTransaction(self._rows, connection)

    @contextlib.contextmanager
    def _alone(self, patience: float = BUSY_SECONDS) -> Iterator[Any]:
        if not self._writing.acquire(timeout=patience):
            raise Locked(str(self._file.path), patience, FILE.__eq__)
        try:
            with self._file.transaction(patience=patience) as connection:
                yield connection
        finally:
            self._writing.release()

    # -- reading -------------------------------------------------------------------------------------

    def get(self, contract: Contract, namespace: str, key: Key) -> Record | None:
        try:
            return self._read(partial(self._rows.read, contract, name_of(namespace, contract, key), key))
        except Suspect as suspect:
            raise self._quarantine(suspect) from None

    def numbers(self, wanted: Selection, namespace: str) -> array[int]:
        """The numbers of the rows that are wanted, in order of writing; without a limit, removed ones too."""
        return self._read(partial(self._rows.list_numbers, wanted, namespace)) or array("q")

    def read(self, contract: Contract, namespace: str, numbers: Sequence[int]) -> list[Record | Damaged]:
        """The records in rows that were listed, or why one cannot be trusted. What was pruned since is left out."""
        found = self._read(partial(self._rows.read_all, contract, namespace, numbers)) or []
        return [self._quarantine(each) if isinstance(each, Suspect) else each for each in found]

    def count(self, contract: Contract, namespace: str) -> int:
        return self._read(partial(self._rows.count, contract, namespace)) or 0

    def namespaces(self, above: str) -> list[str]:
        """Those below `above` that have a record."""
        return self._read(partial(self._rows.list_namespaces, above)) or []

    # -- upkeep --------------------------------------------------------------------------------------

    def prune(self, contract: Contract, namespace: str, revisions: Mapping[Key, int]) -> int:
        """As `Store.prune`, in parts, because every writer waits for the end of each."""
        doomed, pruned = [*revisions.items()], 0
        for start in range(0, len(doomed), CHUNK):
            part = doomed[start : start + CHUNK]
            pruned += self._change(partial(self._rows.prune, contract, namespace, part))
        return pruned

    def forget(self, namespace: str) -> None:
        """Forget a namespace and those below it; what is in quarantine stays there."""
        if self.namespaces(""):
            self._change(partial(self._rows.forget, namespace))

    def check(self) -> list[Finding]:
        """Everything that is wrong. Changes nothing."""
        lost = self._file.loss()
        if lost is not None:
            # Nothing can be read until that is decided.
            return [Finding(FILE, lost)]
        found = [Finding(FILE, each.problem) for each in self._read(self._file.check_integrity) or []]
        found += self._read(self._rows.check_quarantine) or []
        last = 0
        while True:
            last, part = self._read(partial(self._rows.check, last)) or (0, [])
            found += part
            if not last:
                return found

    def examine(self) -> Reading | None:
        """Whether the file is sound; None if there is none."""
        return self._read(partial(examine_contents, self._file, subject="feeds"))

    def accept_loss(self) -> str | None:
        return self._file.accept_loss()

    def quarantined(self) -> list[Quarantined]:
        return self._read(self._rows.list_quarantine) or []

    def holds(self, path: str) -> bool:
        """Whether `path` is in quarantine here."""
        return any(item.path == path for item in self.quarantined())

    def restore(self, path: str) -> Record:
        return self._change(partial(self._rows.restore, path))

    def drop(self, path: str) -> Quarantined:
        return self._change(partial(self._rows.drop, path))

    def _read(self, work: Callable[[Any], T]) -> T | None:
        """What `work` selects; None if there is no file yet."""
        with self._reading:
            self._is_made = self._is_made or self._file.is_made()
            return self._file.read(work) if self._is_made else None

    def _change(self, work: Callable[[Any], T]) -> T:
        with self._alone() as connection:
            return work(connection)

    def _quarantine(self, suspect: Suspect) -> Damaged:
        """Keep a copy of what was read, and return what happened."""
        if suspect.is_newer:
            return self._rows.blocked(suspect)
        try:
            return self._change(partial(self._rows.keep_copy, suspect))
        except (RetryLater, OutOfSpace) as error:
            return self._rows.blocked(suspect, error)
