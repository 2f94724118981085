"""Named places at which a process can be made to die, to prove that nothing is lost there."""

from __future__ import annotations

import os
import signal
from typing import Final

VARIABLE: Final = "BACKTEST_KIT_CRASH"
"""`name` or `name:3` in the environment kills the process when it passes that point (the third time), and
`name:3:STOP` lets it stand still there until it is sent SIGCONT."""

_ORDERS: Final = (
    *("open", "place", "activate", "cancel", "add", "reduce", "close", "move_stop", "move_take", "breakeven"),
)
CRASHPOINTS: Final = (
    "file.after_mkdir",
    "file.after_create",
    "file.after_write",
    "file.after_fsync",
    "file.after_rename",
    "file.after_directory_fsync",
    "file.after_acknowledge",
    "journal.after_append",
    "journal.after_fsync",
    "journal.between_renames",
    "journal.after_apply",
    "journal.after_checkpoint",
    "log.after_append",
    "log.after_prune",
    "sqlite.after_begin",
    "sqlite.after_work",
    "sqlite.after_commit",
    "sqlite.after_schema",
    "sqlite.after_directory_fsync",
    "quarantine.after_reason",
    "quarantine.after_move",
    "mongo.after_indexes",
    "mongo.before_write",
    "mongo.after_write",
    "mongo.after_cache",
    "mongo.between_candles",
    "mongo.after_transaction_writes",
    "mongo.after_batch",
    "batch.between_writes",
    *(f"live.{kind}.after_{step}" for kind in _ORDERS for step in ("intent", "broker", "commit", "emit")),
    "live.start.after_lease",
    "live.start.after_load",
    "live.start.after_commit",
    "live.start.after_resolve",
    "live.minute.after_commit",
    "live.emergency.after_write",
)
"""Every point there is."""


class _Armed:
    """What the environment asks for; read once, so that an unarmed point costs one comparison."""

    def __init__(self) -> None:
        self.name = ""
        self.left = 0
        self.signal = signal.SIGKILL
        self.passed: dict[str, int] | None = None
        self.arm(os.environ.get(VARIABLE, ""))

    def arm(self, order: str) -> None:
        name, count, kind = (*order.split(":"), "", "")[:3]
        if name and name not in CRASHPOINTS:
            raise ValueError(f"{VARIABLE} names {name!r}: use one of {', '.join(CRASHPOINTS)}")
        self.name, self.left = name, int(count or 1)
        self.signal = signal.Signals[f"SIG{kind or 'KILL'}"]


_armed: Final = _Armed()


def crashpoint(name: str) -> None:
    """Die here if this is the point and the time that was asked for; otherwise do nothing."""
    if _armed.passed is not None:
        _armed.passed[name] = _armed.passed.get(name, 0) + 1
    if name == _armed.name:
        _armed.left -= 1
        if _armed.left == 0:
            os.kill(os.getpid(), _armed.signal)


def arm(order: str) -> None:
    """As if `order` had been in the environment; an empty one disarms. For a child that was forked."""
    _armed.arm(order)


def record() -> dict[str, int]:
    """Count from now on how often each point is passed, in the dict that is returned."""
    _armed.passed = {}
    return _armed.passed
