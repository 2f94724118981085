"""`Root`: the directory of a file store. What is in it, its opening, and recovery, which is part of every opening."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec

from backtest_kit.errors import BacktestKitError, Damaged, Outcome, OutOfSpace, RetryLater, UserError
from backtest_kit.persist.backends.file_feeds import NAMES as FEED_FILES, Feeds
from backtest_kit.persist.backends.file_log import Log
from backtest_kit.persist.backends.file_paths import (
    MARKER,
    NEXT,
    OWN_DIRECTORY,
    SUFFIX,
    is_feed,
    is_log,
    namespace_of,
)
from backtest_kit.persist.backends.file_slots import PATIENCE, Slots
from backtest_kit.persist.backends.file_sync import Syncer
from backtest_kit.persist.codec import SCHEMA_VERSION, NewerSchema, dump_value, open_envelope
from backtest_kit.persist.contracts import ALL_CONTRACTS, Contract
from backtest_kit.persist.files import Disk, absolute_root, disk_error, require_directory
from backtest_kit.persist.journal import Journal
from backtest_kit.persist.locks import Locked, LockSet
from backtest_kit.persist.quarantine import DIRECTORY as QUARANTINE, Quarantine
from backtest_kit.persist.store import Key, Record

_CLOCK_STEP_NS: Final = 100_000_000
GROUP_PATIENCE: Final = 0.05
_RECOVERY_PATIENCE: Final = 60.0
_LOOK_PATIENCE: Final = 0.02
_LOOK_SECONDS: Final = 1.0
"""How long readers may see half of a batch after its process was killed."""

_log = logging.getLogger(__name__)


def is_part_of_store(name: str) -> bool:
    """Whether a name in the root is one that a store gives: the others are the user's."""
    return name in (*ALL_CONTRACTS, *FEED_FILES, OWN_DIRECTORY, QUARANTINE) or name.startswith("@")


class _Marker(msgspec.Struct, rename="camel"):
    schema_version: int
    created_at: int


class Root:
    """Methods block. Paths are relative to the root, with `/`."""

    def __init__(
        self, path: str | os.PathLike[str], disk: Disk, *, existing: bool = False, inline: bool = False
    ) -> None:
        self.path = absolute_root(path)
        self.disk = disk
        self.quarantine = Quarantine(self.path, disk)
        own = f"{self.path}/{OWN_DIRECTORY}"
        self.locks = LockSet(f"{own}/locks", disk)
        # Of its own, because the lock of a record is taken under it.
        self._recovery_lock = LockSet(f"{own}/recovery", disk, count=1)
        self.slots = Slots(self.path, disk, self.locks, self.quarantine)
        self.log = Log(self.path, disk, self.locks, self.quarantine)
        self.feeds = Feeds(self.path, disk, existing=existing)
        self._journal = Journal(f"{own}/journal", disk)
        self._clock = f"{own}/clock"
        self._guard = threading.RLock()
        self._existing = existing
        self._inline = inline
        self._opened = False
        self._recovered = False
        self._look_at = 0.0
        """When a reader looks again for what a killed process left, on the monotonic clock."""
        self._pid = os.getpid()
        self._last_tick = 0
        self._sweeper: threading.Thread | None = None
        self.syncer = self._make_syncer()

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
        """Make ready and recover what a killed process, or a failing disk, left. Idempotent.

        Raises:
            UserError: the root cannot be used, or is not a store where one has to exist.
            NewerSchema: a newer version of this program wrote it.
        """
        with self._guard:
            if not self._recovered:
                if not self._existing or self._must_recover():
                    self._recover()
                self._recovered = True
            if not self._opened:
                self._opened = True
                if not self._existing:
                    self._start_sweep()

    def open_to_read(self, path: str) -> None:
        """Make ready to read what is at `path` or below it: open, and finish what a killed process left since.

        Where the disk does not take that, because it is full, all can be read but what would be half of a batch.

        Raises:
            As `open`.
        """
        try:
            with self._guard:
                if self._recovered and time.monotonic() >= self._look_at:
                    self._look_at = time.monotonic() + _LOOK_SECONDS
                    self._recovered = self.slots.read_only or not self.is_left_unfinished()
                self.open()
        except (OutOfSpace, RetryLater):
            unfinished = [f"{changed}/" for changed in self.changed_by_others()]
            if not self.check_marker() or any(changed.startswith(f"{path}/") for changed in unfinished):
                raise

    def close(self) -> None:
        """Make everything durable and let go. The next call opens again."""
        with self._guard:
            syncer, self.syncer = self.syncer, self._make_syncer()
            try:
                if self._opened:
                    self._opened = False
                    if self._sweeper is not None:
                        self._sweeper.join()
                    self.slots.forget_directories()
                    syncer.close()
            finally:
                self._recovered = False
                self.feeds.close()
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
                raise UserError(
                    f"{self.path} is not a store of this program, it has no {OWN_DIRECTORY}: name another one"
                )
        except OSError as error:
            raise disk_error(error, "look at", self.path) from error

    def _make_syncer(self) -> Syncer:
        return Syncer(self.disk, self.slots, self._journal, inline=self._inline)

    def _must_recover(self) -> bool:
        """Whether there is a journal in a root that is only opened to look at it, and where nothing is made."""
        self.require_store()
        own = f"{self.path}/{OWN_DIRECTORY}"
        try:
            self.check_marker()
            self.slots.read_only = self.log.read_only = not self.disk.writable(own)
            return bool(self.disk.entries(f"{own}/journal"))
        except OSError as error:
            raise disk_error(error, "open the store", self.path) from error

    def _recover(self) -> None:
        require_directory(self.path)
        try:
            for directory in (f"{self.path}/{OWN_DIRECTORY}/journal", f"{self.path}/{OWN_DIRECTORY}/locks"):
                self.disk.make_directories(directory, sync=True)
            # The second process to open waits until the first one has recovered.
            with self._recovery_lock.hold(("",), _RECOVERY_PATIENCE):
                if not self.check_marker():
                    self._make_marker()
                if not self.disk.exists(self._clock):
                    self._replace(self._clock, b"")
                self._journal.replay(self._redo)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                message = f"the store's root {self.path} is not writable: {error.strerror}; give it to this user"
                raise UserError(message) from error
            raise disk_error(error, "open the store", self.path) from error

    def _redo(self, changes: Sequence[dict[str, Any]]) -> bool:
        """Carry out the changes of a journal; False if one could not be, because its key is blocked."""
        known = True
        together: dict[object, tuple[Contract, str, list[dict[str, Any]]]] = {}
        for number, change in enumerate(changes):
            name, path = change["record"]["contract"], change["path"]
            row = ALL_CONTRACTS.get(name)
            if row is None:
                _log.error("not recovered from the journal: %s is of %s, no contract of this program", path, name)
                known = False
                continue
            # The lines of a log in one go, because its file is read and written as a whole.
            together.setdefault(path if is_log(row) else number, (row, path, []))[2].append(change)
        done = [self._redo_at(*each) for each in together.values()]
        return known and all(done)

    def _redo_at(self, row: Contract, path: str, changes: Sequence[dict[str, Any]]) -> bool:
        """Carry out one change, or all lines of a log."""
        records = [(open_envelope(row, None, each["record"]), dump_value(each["record"])) for each in changes]
        ((record, dumped), *_) = records
        try:
            if is_feed(row):
                with self.feeds.transaction() as feeds:
                    return feeds.replay(row, namespace_of(path), record, dumped)
            with self.locks.hold((path,)):
                if is_log(row):
                    self.log.redo(row, path, records)
                else:
                    self.slots.redo(row, path, record, dumped, changes[0]["tick"])
        except Damaged as error:
            _log.error("not recovered from the journal, the operator decides: %s", error)
            return False
        return True

    def _start_sweep(self) -> None:
        if self._inline:
            self._sweep(time.time())
            return
        self._sweeper = threading.Thread(
            target=self._sweep, args=(time.time(),), name="backtest-kit-sweep", daemon=True
        )
        self._sweeper.start()

    def _sweep(self, opened_at: float) -> None:
        try:
            entries = self.disk.entries(self.path)
            own = [entry.path for entry in entries if is_part_of_store(entry.name) and entry.is_dir()]
            left = self.disk.sweep(own, opened_at, find=f"{SUFFIX}{NEXT}")
        except OSError as error:  # they take space and nothing else, and the next opening tries again
            _log.warning("temporary files below %s were not all removed: %s", self.path, error)
            return
        for file in left:
            try:
                self.slots.finish(file.removeprefix(f"{self.path}/").removesuffix(NEXT))
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
        if marker.schema_version > SCHEMA_VERSION:
            raise NewerSchema(
                f"the store {self.path} was written by a newer version of this program (schema "
                f"{marker.schema_version}, this one reads up to {SCHEMA_VERSION}): upgrade, nothing was touched"
            )
        return True

    def _make_marker(self) -> None:
        marker = _Marker(SCHEMA_VERSION, time.time_ns() // 1_000_000)
        self._replace(f"{self.path}/{OWN_DIRECTORY}/{MARKER}", msgspec.json.encode(marker) + b"\n")

    def _replace(self, path: str, data: bytes) -> None:
        directory = path.rpartition("/")[0]
        self.disk.rename(self.disk.write_temp(directory, data, sync=True), path)
        self.disk.sync_directory(directory)

    # -- for writers ---------------------------------------------------------------------------------

    def is_left_unfinished(self) -> bool:
        """Whether a journal waits to be carried out: of a process that was killed, or of a failed disk.

        What is written before `recover` is called would come in between. The caller may hold locks of records, and
        lets go of them before it calls that.
        """
        if not self._journal.others():
            return False
        try:
            # Under this lock, because a file that is looked at here seems to have an owner to who replays it.
            with self._recovery_lock.hold(("",), _LOOK_PATIENCE):
                return self._journal.has_orphan()
        except Locked:
            return True  # one is being replayed, which may wait for the locks that the caller holds

    def recover(self) -> None:
        """Carry out the journals that no process has any more. Raises as `open`."""
        with self._guard:
            self._recover()

    @contextlib.contextmanager
    def locked(self, names: Iterable[str], *, patient: bool) -> Iterator[Iterator[int]]:
        """Hold the locks of `names`; the ticks it yields are later than that of every earlier write under one of them.

        The tick of a record file is its time of modification: listings are in their order.
        """
        self._journal.drop_refused()
        with self.locks.hold(names, PATIENCE if patient else GROUP_PATIENCE):
            noted = self.disk.stat(self._clock).st_mtime_ns
            self._last_tick = max(self._last_tick, noted)
            try:
                yield self._ticks()
            finally:
                # Noted for the next process only where its own clock would be behind.
                if self._last_tick > min(noted + _CLOCK_STEP_NS, time.time_ns()):
                    with contextlib.suppress(OSError):
                        self.disk.touch(self._clock, self._last_tick)

    def _ticks(self) -> Iterator[int]:
        while True:
            self._last_tick = max(self._last_tick + 1, time.time_ns())
            yield self._last_tick

    @contextlib.contextmanager
    def journal(self, entries: Sequence[bytes], changed: Sequence[str]) -> Iterator[None]:
        """Make `entries` durable, and let the body carry them out in the files `changed`, which follow in some seconds.

        If the body fails they have happened all the same: the next call opens the root again, which carries them out.
        """
        files = [f"{self.path}/{path}" for path in changed]
        # Directories after the files, so that a name never comes before what it stands for.
        directories = {file.rpartition("/")[0]: None for file in files}
        is_written = False
        try:
            with self._journal.request(entries, [*files, *directories]):
                is_written = True
                yield
        except BaseException as error:
            if is_written:
                # Not before the journal has let go of its files: an opening in between would pass over them.
                self._recovered = False
            if is_written and isinstance(error, OSError):
                doing = "carry out what is in the journal of"
                raise disk_error(error, doing, self.path, Outcome.UNKNOWN) from error
            if is_written and isinstance(error, BacktestKitError):
                error.outcome = Outcome.UNKNOWN
            raise
        self.syncer.note_journal()

    def checkpoint(self) -> None:
        """Empty the journal of this process, for a caller after whom revisions may begin anew."""
        self._journal.checkpoint()
        try:
            # Else an entry may come back after a loss of power, over what was written since.
            self.disk.sync_directory(f"{self.path}/{OWN_DIRECTORY}/journal")
        except OSError as error:
            raise disk_error(error, "empty the journal of", self.path) from error

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

    # -- reading -------------------------------------------------------------------------------------

    def load(self, row: Contract, key: Key, path: str) -> Record | None:
        """The record of `key`, wherever records of its contract lie. Raises as `Store.get`."""
        if is_feed(row):
            return self.feeds.get(row, namespace_of(path), key)
        if not is_log(row):
            return self.slots.load(row, key, path)
        try:
            return self.log.find(row, path, key)
        except OSError as error:
            raise disk_error(error, "read", f"{self.path}/{path}") from error
