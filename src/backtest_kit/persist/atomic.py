"""One file replaced as a whole: a reader sees the old bytes or the new ones, never a mixture."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path

from backtest_kit.errors import BacktestKitError, Outcome, OutOfSpace, RetryLater


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Make `data` the content of `path`, creating its directories. Blocks: call it in a thread.

    `durable` also makes it survive a loss of power: file and directory are synced before the return.

    Raises:
        OutOfSpace: the disk or the quota is full.
        RetryLater: any other refusal of the system; `outcome` says whether the new bytes may be in place.
    """
    outcome = Outcome.NOT_DONE
    temporary = path.parent / f".tmp-{secrets.token_hex(6)}-{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb", buffering=0) as file:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
            outcome = Outcome.UNKNOWN
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if durable:
            _sync_directory(path.parent)
    except OSError as error:
        raise _mapped(path, error, outcome) from error


def _sync_directory(directory: Path) -> None:
    # Windows opens no directory as a file; its rename is durable with the file system's journal.
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mapped(path: Path, error: OSError, outcome: Outcome) -> BacktestKitError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpace(f"no room to write {path}: {reason}. Free some space and write again", outcome=outcome)
    return RetryLater(f"could not write {path}: {reason}", outcome=outcome)
