"""One tree of errors, named by what the operator must do.

An error of a write carries `outcome`: whether the write did not happen, or may have happened.
"""

from __future__ import annotations

from enum import Enum


class Outcome(Enum):
    """What is known of the write that raised."""

    NOT_DONE = "the write did not happen"
    UNKNOWN = "the write may have happened"


class BacktestKitError(Exception):
    """Base of every error that this package raises on purpose."""

    outcome: Outcome = Outcome.NOT_DONE

    def __init__(self, message: str, *, outcome: Outcome | None = None) -> None:
        super().__init__(message)
        if outcome is not None:
            self.outcome = outcome


class UserError(BacktestKitError):
    """A bad schema, signal, setting or data file: correct the input named in the message."""


class BadCandles(UserError):
    """A source has answered with what cannot be traded on, or not even be read as candles.

    In a backtest the source is to be corrected. A live run asks again: the next answer may be a good one."""


class RetryLater(BacktestKitError):
    """A store or an exchange is unavailable, too slow or locked: the same call may work later."""


class Conflict(BacktestKitError):
    """The revision moved on, or another process owns the record: re-read, or stop this process."""


class Damaged(BacktestKitError):
    """Stored bytes fail their checksum, envelope or decoding, or come from a newer schema.

    The bytes are kept in quarantine and their key is blocked until the operator decides.
    """


class OutOfSpace(BacktestKitError):
    """The disk or the quota is full: new entries pause, reads and exits go on."""


class LookAhead(BacktestKitError):
    """A read requested something later than its own moment, or a write would have replaced it."""
