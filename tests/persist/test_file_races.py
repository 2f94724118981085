"""What another process, or the system, does between two steps of a journal or a lock."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import Disk
from backtest_kit.persist.journal import Journal
from backtest_kit.persist.locks import LockSet
from backtest_kit.persist.store import Write
from backtest_kit.persist.testing.faults import FaultFS

ENTRY = b'{"changes":[{"path":"signal/s/e/A.json"}]}'
posix = pytest.mark.skipif(sys.platform == "win32", reason="nothing can be removed there that is open")


class OnOpen(FaultFS):
    """Calls `between` after the first journal was opened, before anything else is done with it."""

    def __init__(self, between: Callable[[], object]) -> None:
        super().__init__()
        self._between: Callable[[], object] | None = between
        self.open: Any = self._open

    def _open(self, path: str, *args: Any) -> int:
        fd: int = self.__getattr__("open")(path, *args)
        if path.endswith(".journal") and self._between is not None:
            between, self._between = self._between, None
            between()
        return fd


def entries_left(directory: Path) -> list[object]:
    """What a process that opens the root now carries out."""
    found: list[object] = []

    def take(changes: list[dict[str, Any]]) -> bool:
        found.extend(change["path"] for change in changes)
        return True

    Journal(str(directory), Disk()).replay(take)
    return found


@posix
def test_a_journal_that_another_process_took_away_is_not_written_to(tmp_path: Path) -> None:
    faults = OnOpen(lambda: entries_left(tmp_path))
    journal = Journal(str(tmp_path), Disk(faults))
    with journal.request([ENTRY], ()):
        pass
    journal.close()
    assert faults.opened == {}
    assert entries_left(tmp_path) == ["signal/s/e/A.json"]


@posix
def test_a_journal_that_its_owner_empties_is_left_alone(tmp_path: Path) -> None:
    owner = Journal(str(tmp_path), Disk())
    with owner.request([ENTRY], ()):
        pass
    faults = OnOpen(owner.checkpoint)
    Journal(str(tmp_path), Disk(faults)).replay(lambda changes: pytest.fail(f"carried out again: {changes}"))
    assert faults.opened == {}
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_journal_that_its_owner_has_just_removed_is_not_made_again(tmp_path: Path) -> None:
    owner = Journal(str(tmp_path), Disk())
    with owner.request([ENTRY], ()):
        pass
    faults = FaultFS()
    faults.observer = lambda call, path: owner.checkpoint() if path.endswith(".journal") else None
    Journal(str(tmp_path), Disk(faults)).replay(lambda changes: pytest.fail(f"carried out again: {changes}"))
    assert list(tmp_path.iterdir()) == []


def break_lock(faults: FaultFS) -> None:
    """Put something that cannot be unlocked in the place of every open lock file."""
    for fd, path in list(faults.opened.items()):
        if path.endswith(".lock"):
            only_a_name = os.open(path, os.O_PATH)
            os.dup2(only_a_name, fd)
            os.close(only_a_name)


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="the system has no descriptors that cannot be unlocked")
def test_a_lock_that_cannot_be_unlocked_is_free_afterwards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    faults = FaultFS()
    locks, others = LockSet(str(tmp_path), Disk(faults), count=1), LockSet(str(tmp_path), Disk(), count=1)
    with caplog.at_level(logging.WARNING), locks.hold(("a",)):
        break_lock(faults)
    assert "cannot unlock" in caplog.text
    with others.hold(("a",), timeout=0):
        pass
    taken = threading.Event()

    def take() -> None:
        with locks.hold(("a",), timeout=0):
            taken.set()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert taken.is_set()
    locks.close()
    others.close()
    assert faults.opened == {}


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="the system has no descriptors that cannot be unlocked")
async def test_a_write_whose_lock_cannot_be_unlocked_has_happened(file_store: FileStore, faults: FaultFS) -> None:
    signal = CONTRACTS["signal"]
    await file_store.put(Write(signal, ("s", "e", "A"), 1))
    faults.observer = lambda call, path: break_lock(faults) if call == "replace" else None
    assert (await file_store.put(Write(signal, ("s", "e", "A"), 2))).rev == 2
    faults.observer = lambda call, path: None
    found = await file_store.get(signal, ("s", "e", "A"))
    assert found is not None
    assert found.value == 2
    assert (await file_store.put(Write(signal, ("s", "e", "A"), 3, expect=2))).rev == 3
