"""`Root`: the directory of a file store, its opening and recovery, and one record in and out of it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from backtest_kit.errors import BacktestKitError, Damaged, Outcome, RetryLater, UserError
from backtest_kit.persist.backends.file_feed import Feed
from backtest_kit.persist.backends.file_paths import MARKER, NEXT, OWN_DIRECTORY, SUFFIX, key_of, unseal_at
from backtest_kit.persist.backends.file_promises import PATIENCE, Promised, Promises, Target
from backtest_kit.persist.backends.file_successors import Successors, is_lost
from backtest_kit.persist.backends.file_sync import Syncer
from backtest_kit.persist.backends.file_writes import Writes
from backtest_kit.persist.codec import SCHEMA_VERSION, NewerSchema, unseal_head
from backtest_kit.persist.contracts import ALL_CONTRACTS, Contract, Durability, Kind
from backtest_kit.persist.files import Disk, absolute_root, disk_error, require_directory
from backtest_kit.persist.journal import Journal
from backtest_kit.persist.locks import LockSet
from backtest_kit.persist.quarantine import DIRECTORY as QUARANTINE, Quarantine
from backtest_kit.persist.store import Key, Record

_OWN_NAMES: Final = frozenset((*ALL_CONTRACTS, OWN_DIRECTORY, QUARANTINE))
_KEPT_FILES: Final = 128
_CLOCK_STEP_NS: Final = 100_000_000
_GROUP_PATIENCE: Final = 0.05
_RECOVERY_PATIENCE: Final = 60.0

_log = logging.getLogger(__name__)


def is_part_of_store(name: str) -> bool:
    """Whether a name in the root is one that a store gives: the others are the user's."""
    return name in _OWN_NAMES or name.startswith("@")


def newest(current: Record | None, successor: Record | None) -> Record | None:
    """Which of a record and its successor counts."""
    if current is None or (successor is not None and successor.rev >= current.rev):
        return successor
    return current


class _Marker(msgspec.Struct, rename="camel"):
    schema_version: int
    created_at: int


class Root:
    """Methods block. Paths are relative to the root, with `/`; `locked` says that the caller holds their locks."""

    def __init__(self, path: str | os.PathLike[str], disk: Disk, *, existing: bool = False) -> None:
        self.path = absolute_root(path)
        self.disk = disk
        self.quarantine = Quarantine(self.path, disk)
        own = f"{self.path}/{OWN_DIRECTORY}"
        self.locks = LockSet(f"{own}/locks", disk)
        # Of its own, because the lock of a record is taken under it.
        self._recovery_lock = LockSet(f"{own}/recovery", disk, count=1)
        self._journal = Journal(f"{own}/journal", disk)
        self._clock = f"{own}/clock"
        self._guard = threading.RLock()
        self._existing = existing
        self.read_only = False
        self._opened = False
        self._pid = os.getpid()
        self._last_tick = 0
        self._feeds: dict[str, Feed] = {}
        self._replaced: deque[int] = deque()
        # By way of the attribute, because closing puts another syncer in its place.
        self.writes = Writes(self.path, disk, lambda paths, successors: self._syncer.note(paths, successors))
        self.successors = Successors(self.path, disk, self.locks, self.quarantine, self.writes)
        self._syncer = self._make_syncer()
        self._promises = Promises(self.path, disk, self.locks, self.quarantine, self.writes, self.feed)

    # -- life ----------------------------------------------------------------------------------------

    @property
    def is_inherited(self) -> bool:
        """True in a child that was forked after this was made."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raise `UserError` in a child that was forked after this was made."""
        if self.is_inherited:
            raise UserError(f"the store {self.path} was made before this process was forked: make it in the child")

    def open(self) -> None:
        """Make ready and recover what a killed process left. Idempotent.

        Raises:
            UserError: the root cannot be used, is no store where one has to exist, or was opened by the process
                that this one was forked from.
            NewerSchema: a newer version of this program wrote it.
        """
        self.check_process()
        with self._guard:
            if not self._opened:
                if not self._existing or self._must_recover():
                    self._recover()
                self._opened = True
                if not self._existing:
                    self._sweeper = threading.Thread(
                        target=self._sweep, args=(time.time(),), name="backtest-kit-sweep", daemon=True
                    )
                    self._sweeper.start()

    def close(self) -> None:
        """Make everything durable and let go. The next call opens again."""
        with self._guard:
            syncer, self._syncer = self._syncer, self._make_syncer()
            try:
                if self._opened:
                    self._opened = False
                    if not self._existing:
                        self._sweeper.join()
                    self.writes.forget()
                    self._feeds.clear()
                    syncer.close()
            finally:
                self._journal.close()
                self.locks.close()
                self._recovery_lock.close()

    def require_store(self) -> None:
        """Do nothing if there is a store in this directory, or the beginning of one.

        Raises:
            UserError: there is none.
        """
        require_directory(self.path)
        try:
            if not self.disk.exists(f"{self.path}/{OWN_DIRECTORY}"):
                raise UserError(f"{self.path} is no store of this program, it has no {OWN_DIRECTORY}: name another one")
        except OSError as error:
            raise disk_error(error, "look at", self.path) from error

    def _make_syncer(self) -> Syncer:
        return Syncer(self.disk, self._journal, self.successors.promote)

    def _must_recover(self) -> bool:
        """Whether there is a journal in a root that is only opened to look at it, and where nothing is made."""
        self.require_store()
        own = f"{self.path}/{OWN_DIRECTORY}"
        try:
            self.check_marker()
            self.read_only = not self.disk.writable(own)
            return bool(self.disk.entries(f"{own}/journal"))
        except OSError as error:
            raise disk_error(error, "open the store", self.path) from error

    def _recover(self) -> None:
        require_directory(self.path)
        try:
            for directory in (f"{self.path}/{OWN_DIRECTORY}/journal", f"{self.path}/{OWN_DIRECTORY}/locks"):
                self.disk.make_directories(directory, sync=True)
            # Whoever comes second waits until the first one has recovered.
            with self._recovery_lock.hold(("",), _RECOVERY_PATIENCE):
                if not self.check_marker():
                    self._make_marker()
                self._check_clock()
                self._journal.replay(self._promises.redo)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                message = f"the store's root {self.path} is not writable: {error.strerror}; give it to this user"
                raise UserError(message) from error
            raise disk_error(error, "open the store", self.path) from error

    def _sweep(self, opened_at: float) -> None:
        try:
            own = [entry.path for entry in self.disk.entries(self.path) if is_part_of_store(entry.name)]
            left = self.disk.sweep(own, opened_at, find=f"{SUFFIX}{NEXT}")
        except OSError as error:  # they take space and nothing else, and the next opening tries again
            _log.warning("temporary files below %s were not all removed: %s", self.path, error)
            return
        for file in left:
            try:
                self.successors.settle(file.removeprefix(f"{self.path}/").removesuffix(NEXT))
            except (OSError, BacktestKitError) as error:  # it stays as readable as it was
                _log.warning("%s, which a killed process left, did not get its name: %s", file, error)

    def check_marker(self) -> bool:
        """Whether the root has a marker of its schema.

        Raises:
            Damaged: the marker cannot be read.
            NewerSchema: a newer version of this program wrote it.
        """
        path = f"{self.path}/{OWN_DIRECTORY}/{MARKER}"
        try:
            marker = msgspec.json.decode(self.disk.read(path), type=_Marker)
        except FileNotFoundError:
            return False
        except (msgspec.MsgspecError, ValueError) as error:
            raise Damaged(f"{path}: {error}; if this is a store of this program, remove that file") from None
        else:
            if marker.schema_version > SCHEMA_VERSION:
                raise NewerSchema(
                    f"the store {self.path} was written by a newer version of this program (schema "
                    f"{marker.schema_version}, this one reads up to {SCHEMA_VERSION}): upgrade, nothing was touched"
                )

            return True

    def _make_marker(self) -> None:
        marker = _Marker(SCHEMA_VERSION, time.time_ns() // 1_000_000)
        self._replace(f"{self.path}/{OWN_DIRECTORY}/{MARKER}", msgspec.json.encode(marker) + b"\n")

    def _check_clock(self) -> None:
        if not self.disk.exists(self._clock):
            self._replace(self._clock, b"")

    def _replace(self, path: str, data: bytes) -> None:
        directory = path.rpartition("/")[0]
        self.disk.rename(self.disk.write_temp(directory, data, sync=True), path)
        self.disk.sync_directory(directory)

    # -- locks and time ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self, paths: Iterable[str], *, patient: bool) -> Iterator[Iterator[int]]:
        """Hold the locks of `paths`; the ticks it yields are later than that of every earlier write to one of them."""
        if self._promises.carry_out():
            self._journal.finished()
        self._journal.settle()
        with self.locks.hold(paths, PATIENCE if patient else _GROUP_PATIENCE):
            told = self.disk.stat(self._clock).st_mtime_ns
            self._last_tick = max(self._last_tick, told)
            try:
                yield self._ticks()
            finally:
                # Who comes next needs to be told only where its own clock would not tell it.
                if self._last_tick > min(told + _CLOCK_STEP_NS, time.time_ns()):
                    with contextlib.suppress(OSError):
                        self.disk.touch(self._clock, self._last_tick)

    def _ticks(self) -> Iterator[int]:
        while True:
            self._last_tick = max(self._last_tick + 1, time.time_ns())
            yield self._last_tick

    # -- reading -------------------------------------------------------------------------------------

    def load(
        self, row: Contract, key: Key | None, path: str, *, locked: bool = False, head: bool = False
    ) -> Record | None:
        """The record at `path`, which belongs to `key`, or to whatever key has that path.

        `head` is for who is about to replace it: without the value, and the file is let go of in `free_replaced`.

        Raises:
            Damaged, RetryLater: as `Store.get`.
        """
        if row.kind is Kind.FEED and key is not None:
            return self._load_line(row, key, path, locked=locked)
        promised = self._promises.find((path, ()))
        if promised is not None:
            return promised
        try:
            # Before the record: a successor that is gone by now has become the record.
            successor = (
                self.successors.load(row, key, path, locked=locked) if row.durability is Durability.RECORD else None
            )
        except OSError as error:
            raise disk_error(error, "read", f"{self.path}/{path}{NEXT}") from error
        return newest(self._load_file(row, key, path, locked=locked, head=head), successor)

    def _load_file(self, row: Contract, key: Key | None, path: str, *, locked: bool, head: bool) -> Record | None:
        try:
            file = f"{self.path}/{path}"
            keep = head and len(self._replaced) < _KEPT_FILES
            data = self.disk.read_and_keep(file, self._replaced) if keep else self.disk.read(file)
        except (FileNotFoundError, NotADirectoryError):
            self.quarantine.refuse_blocked(path)
            return None
        except IsADirectoryError:
            data = b""
        except OSError as error:
            raise disk_error(error, "read", f"{self.path}/{path}") from error
        try:
            return unseal_head(row, key, data) if head and key is not None else unseal_at(row, key, path, data)
        except NewerSchema as error:
            raise NewerSchema(f"{self.path}/{path}: {error}") from None
        except Damaged as error:
            if is_lost(row, data) and (locked or self.read_only):
                if locked:
                    self.successors.set_aside(row, path, path, data)
                return None
            if locked:
                raise self.quarantine.take(row, key or key_of(row, path), path, str(error)) from None
            if self.read_only:
                raise Damaged(f"{self.path}/{path}: {error}; it stays where it is, the root is read-only") from None
        with self.locks.hold((path,)):
            return self._load_file(row, key, path, locked=True, head=head)

    def _load_line(self, row: Contract, key: Key, path: str, *, locked: bool) -> Record | None:
        promised = self._promises.find((path, key))
        if promised is not None:
            return promised
        try:
            return self.feed(row, path).find(key, locked=locked)
        except OSError as error:
            raise disk_error(error, "read", f"{self.path}/{path}") from error

    def absent(self, row: Contract, path: str, keys: Sequence[Key]) -> set[Key]:
        """Those of `keys` that certainly are not in a feed. The caller holds its lock."""
        if self._promises.any:
            return set()
        try:
            return self.feed(row, path).absent(keys)
        except OSError as error:
            raise disk_error(error, "read", f"{self.path}/{path}") from error

    def feed(self, row: Contract, path: str) -> Feed:
        with self._guard:
            if path not in self._feeds:
                self._feeds[path] = Feed(
                    self.path, path, row, self.disk, self.locks, self.quarantine, read_only=self.read_only
                )
            return self._feeds[path]

    # -- writing -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def journal(self, entries: Sequence[bytes], promised: Mapping[Target, Promised]) -> Iterator[None]:
        """Make `entries` durable, let the body carry them out, and see to it that the files follow.

        If the body fails the promise stands: reads answer with it, and the next write carries it out first.
        """
        files = [f"{self.path}/{path}" for path, key in promised if not key]
        changed = [*files, *{file.rpartition("/")[0] for file in files}]
        with self._journal.request(entries, changed):
            self._promises.add(promised)
            try:
                yield
            except OSError as error:
                raise disk_error(error, "carry out what is in the journal of", self.path, Outcome.UNKNOWN) from error
            finally:
                self._syncer.note_journal()
            self._promises.clear()

    def run_later(self, job: Callable[[], object]) -> None:
        self._syncer.run_later(job)

    def free_replaced(self) -> None:
        """Close, in another thread, the files that were read in order to be replaced."""
        if self._replaced:
            self._syncer.run_later(lambda: self.disk.let_go(self._replaced))

    def checkpoint(self) -> None:
        """Empty the journal of this process."""
        self._journal.checkpoint()

    def require_unjournalled(self, path: str) -> None:
        """Do nothing if no other process has a change of `path` in its journal. The caller holds its lock.

        Raises:
            RetryLater: one has; carried out after its death it would come back over whatever begins anew here.
        """
        found = self._journal.changed_by_others().get(path)
        if found is not None:
            raise RetryLater(
                f"the journal {found} of another process still has {path}: try again in some seconds, "
                "when it is emptied, or stop that process and open the store once"
            )

    def changed_by_others(self) -> set[str]:
        """What must not begin anew now: the journal of another process may bring it back, see above."""
        return set(self._journal.changed_by_others())

    def forget_below(self, prefix: str) -> None:
        """Remove whatever lies in the directory `prefix` of a namespace."""
        with self._guard:
            for path in [path for path in self._feeds if path.startswith(prefix)]:
                del self._feeds[path]
            self.writes.forget_below(prefix)
