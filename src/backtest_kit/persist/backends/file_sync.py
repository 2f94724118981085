"""`Syncer`: the thread that makes durable a little later what need not be durable when a write returns."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

from backtest_kit.errors import BacktestKitError, Outcome, OutOfSpace, RetryLater
from backtest_kit.persist.backends.file_slots import Slots
from backtest_kit.persist.files import Disk
from backtest_kit.persist.journal import Journal

RECORD_DELAY_SECONDS: Final = 0.025
"""Half of what is promised for a record: the other half is for the syncing itself."""
CHECKPOINT_SECONDS: Final = 5.0

_log = logging.getLogger(__name__)


class Syncer:
    """Syncs files soon after they were written, and checkpoints the journal now and then.

    `inline`: without a thread, `tidy_up` syncs files after each group of writes, and `close` checkpoints the journal.
    """

    def __init__(self, disk: Disk, slots: Slots, journal: Journal, *, inline: bool = False) -> None:
        self._disk = disk
        self._slots = slots
        self._journal = journal
        self._inline = inline
        self._wake = threading.Condition()
        self._files: dict[str, None] = {}
        self._records: dict[str, None] = {}
        self._due: float | None = None
        self._checkpoint_due: float | None = None
        self._failure: BacktestKitError | None = None
        self._closing = False
        self._frees = False
        self._thread: threading.Thread | None = None

    def tidy_up(self) -> None:
        """Free the files that were read in order to be replaced, beside the writing that goes on.

        Inline, what was noted is synced as well: the locks under which it was written are free by now.
        """
        if self._inline:
            self._slots.free_replaced()
            self._sync()
            return
        with self._wake:
            self._frees = True
            self._start()

    def note(self, files: Iterable[str], record: str | None = None) -> None:
        """Make files and directories durable within the delay, and before them the successor of a record."""
        with self._wake:
            self._files.update(dict.fromkeys(files))
            if record is not None:
                self._records[record] = None
            self._schedule(time.monotonic() + RECORD_DELAY_SECONDS)

    def note_journal(self) -> None:
        """Checkpoint the journal some seconds from now."""
        with self._wake:
            if self._checkpoint_due is None:
                self._checkpoint_due = time.monotonic() + CHECKPOINT_SECONDS
                self._schedule(self._checkpoint_due)

    def close(self) -> None:
        """Sync everything, checkpoint the journal and end the thread.

        Raises:
            RetryLater, OutOfSpace: something that was acknowledged could not be made durable.
        """
        with self._wake:
            self._closing = True
            self._wake.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
        self._slots.free_replaced()
        self._sync()
        self._attempt(self._journal.checkpoint)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _schedule(self, due: float) -> None:
        self._due = due if self._due is None else min(due, self._due)
        if not self._inline:
            self._start()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="backtest-kit-sync", daemon=True)
            self._thread.start()
        else:
            self._wake.notify_all()

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._closing:
                    return
                now = time.monotonic()
                frees, self._frees = self._frees, False
                due = self._due is not None and self._due <= now
                checkpoint = self._checkpoint_due is not None and self._checkpoint_due <= now
                if checkpoint:
                    self._checkpoint_due = None
                if due:
                    self._due = self._checkpoint_due
                if not frees and not due:
                    self._wake.wait(None if self._due is None else self._due - now)
            if frees:
                self._slots.free_replaced()
            if due:
                self._sync()
            if checkpoint:
                self._attempt(self._journal.checkpoint)

    def _sync(self) -> None:
        with self._wake:
            files, self._files = self._files, {}
            records, self._records = self._records, {}
        # Renamed before the directories are synced, which makes the new names durable.
        for record in records:
            self._attempt(self._slots.promote, record)
        for file in files:
            if not self._attempt(self._disk.sync_file, file):
                # The journal would try it again at its checkpoint, and be told that all is well.
                self._journal.distrust(file)

    def _attempt(self, work: Callable[..., object], *paths: str) -> bool:
        try:
            work(*paths)
        except OSError as error:
            kind = OutOfSpace if error.errno == errno.ENOSPC else RetryLater
            what = f"cannot sync {', '.join(paths)}: {error.strerror}"
            message = f"{what}; what was last written there may not outlive this host: write it again"
            self._failed(kind(message, outcome=Outcome.UNKNOWN))
        except BacktestKitError as error:
            error.outcome = Outcome.UNKNOWN  # of what was acknowledged, whatever it was that failed now
            self._failed(error)
        else:
            return True
        return False

    def _failed(self, error: BacktestKitError) -> None:
        _log.error("%s (%s)", error, error.outcome.value)
        self._failure = error
