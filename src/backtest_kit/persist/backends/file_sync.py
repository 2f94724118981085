"""`Syncer`: the thread that makes durable a little later what need not be durable at once."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

from backtest_kit.errors import BacktestKitError, Outcome, OutOfSpace, RetryLater
from backtest_kit.persist.files import Disk
from backtest_kit.persist.journal import Journal

RECORD_DELAY_SECONDS: Final = 0.025
"""Half of what is promised for a record: the other half is for the syncing itself."""
CHECKPOINT_SECONDS: Final = 5.0

_log = logging.getLogger(__name__)


class Syncer:
    """Syncs records soon, checkpoints the journal now and then, and does the housekeeping of feeds."""

    def __init__(self, disk: Disk, journal: Journal, promote: Callable[[str], None]) -> None:
        """`promote` syncs the successor of a record and gives it its name."""
        self._disk = disk
        self._journal = journal
        self._promote = promote
        self._wake = threading.Condition()
        self._changed: dict[str, None] = {}
        self._successors: dict[str, None] = {}
        self._jobs: list[Callable[[], object]] = []
        self._due: float | None = None
        self._checkpoint_due: float | None = None
        self._failure: BacktestKitError | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def note(self, paths: Iterable[str], successors: Iterable[str] = ()) -> None:
        """Files and directories that changed, and records that have a successor, to be durable within the delay."""
        with self._wake:
            self._changed.update(dict.fromkeys(paths))
            self._successors.update(dict.fromkeys(successors))
            self._schedule(time.monotonic() + RECORD_DELAY_SECONDS)

    def note_journal(self) -> None:
        with self._wake:
            if self._checkpoint_due is None:
                self._checkpoint_due = time.monotonic() + CHECKPOINT_SECONDS
                self._schedule(self._checkpoint_due)

    def run_later(self, job: Callable[[], object]) -> None:
        with self._wake:
            self._jobs.append(job)
            self._schedule(time.monotonic())

    def close(self) -> None:
        """Sync everything and end the thread.

        Raises:
            RetryLater, OutOfSpace: something that was acknowledged could not be made durable.
        """
        with self._wake:
            self._closing = True
            self._wake.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
        self._pass(checkpoint=True)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _schedule(self, due: float) -> None:
        self._due = due if self._due is None else min(due, self._due)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="backtest-kit-sync", daemon=True)
            self._thread.start()
        else:
            self._wake.notify_all()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._closing:
                    left = None if self._due is None else self._due - time.monotonic()
                    if left is not None and left <= 0:
                        break
                    self._wake.wait(left)
                if self._closing:
                    return
                now = time.monotonic()
                checkpoint = self._checkpoint_due is not None and self._checkpoint_due <= now
                if checkpoint:
                    self._checkpoint_due = None
                self._due = self._checkpoint_due
            self._pass(checkpoint=checkpoint)

    def _pass(self, *, checkpoint: bool) -> None:
        with self._wake:
            changed, self._changed = self._changed, {}
            successors, self._successors = self._successors, {}
            jobs, self._jobs = self._jobs, []
        # Renamed before the directories are synced, which makes the new names durable.
        for path in successors:
            self._attempt(self._promote, path)
        for path in changed:
            self._attempt(self._disk.sync_file, path)
        for job in [*jobs, *([self._journal.checkpoint] if checkpoint else [])]:
            try:
                job()
            except BacktestKitError as error:
                self._failed(error)
            except OSError as error:
                self._failed(RetryLater(f"the housekeeping of a feed failed and changed nothing: {error}"))

    def _attempt(self, work: Callable[[str], None], path: str) -> None:
        try:
            work(path)
        except OSError as error:
            kind = OutOfSpace if error.errno == errno.ENOSPC else RetryLater
            message = f"cannot sync {path}: {error.strerror}; what was last written there may not outlive this host"
            self._failed(kind(f"{message}: write it again", outcome=Outcome.UNKNOWN))
        except BacktestKitError as error:
            self._failed(error)

    def _failed(self, error: BacktestKitError) -> None:
        _log.error("%s (%s)", error, error.outcome.value)
        self._failure = error
