"""What a server that speaks MongoDB's protocol can do, what its errors mean, and what time it has.

Servers that are not MongoDB itself, such as FerretDB, differ from it and from each other. What that means for the
store is decided in here, but for one case that `writing.Upsert` names.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from bson.errors import BSONError
from pymongo import errors
from pymongo.read_concern import ReadConcern

from backtest_kit.errors import BacktestKitError, Outcome, OutOfSpace, RetryLater, UserError


class ServerTraits(NamedTuple):
    """What a server says about itself in its answer to `hello`."""

    has_transactions: bool = True
    """Part of a replica set or a cluster. A standalone server has no transactions."""
    is_cluster: bool = False

    @property
    def money_reads(self) -> ReadConcern:
        """A standalone server has nothing to roll back, and some versions reject another concern than the default."""
        return ReadConcern("majority" if self.has_transactions else "local")


def traits_of(hello: Mapping[str, Any]) -> ServerTraits:
    is_cluster = hello.get("msg") == "isdbgrid"
    return ServerTraits(has_transactions=is_cluster or "setName" in hello, is_cluster=is_cluster)


# -- errors ----------------------------------------------------------------------------------------------

FAILURES: Final = (errors.PyMongoError, BSONError, UnicodeError, OverflowError, OSError)
"""Everything that a call of the driver may raise."""

DUPLICATE_KEY: Final = 11000
NAMESPACE_NOT_FOUND: Final = 26
_WRONG_USER: Final = frozenset((13, 18, 8000))
_TOO_LARGE: Final = frozenset((10334, 17280, 17419, 17420))
_DISK_FULL: Final = frozenset((14031,))
_TRANSIENT: Final = frozenset(
    (6, 7, 50, 64, 89, 91, 112, 133, 134, 189, 251, 262, 9001, 10058, 10107, 11600, 11602, 13435, 13436)
)
"""Codes of servers that are stopping, electing, interrupted, too slow or in conflict with another write."""
_NOT_DONE: Final = frozenset((112, 134, 251, 10058, 10107, 13435, 13436))
"""Those of them with which a server says that it has done nothing."""


def is_duplicate(error: BaseException) -> bool:
    """Whether a unique index rejected the write."""
    if isinstance(error, errors.BulkWriteError):
        return any(each.get("code") == DUPLICATE_KEY for each in (error.details or {}).get("writeErrors", ()))
    return isinstance(error, errors.DuplicateKeyError)


def is_transient(error: BaseException, *, saw_server: bool = False) -> bool:
    """Whether the same call may work in a moment.

    The driver has already waited for a server that it cannot find, unless `saw_server`: then the server went away
    during the call, and the wait was no longer than for an answer.
    """
    if isinstance(error, errors.ServerSelectionTimeoutError):
        return saw_server
    if isinstance(error, errors.ConnectionFailure | errors.WTimeoutError | errors.ExecutionTimeout | OSError):
        return True
    return _code(error) in _TRANSIENT or _is_aborted_transaction(error)


def may_have_happened(error: BaseException) -> bool:
    """Whether the server may have done what it did not answer. Without a connection, nothing was sent."""
    if isinstance(error, errors.ServerSelectionTimeoutError | errors.WaitQueueTimeoutError):
        return False
    if isinstance(error, errors.ConnectionFailure | errors.WTimeoutError | errors.ExecutionTimeout | OSError):
        return _code(error) not in _NOT_DONE
    return is_transient(error) and not _is_aborted_transaction(error) and _code(error) not in _NOT_DONE


def translate(error: BaseException, doing: str, where: str, outcome: Outcome = Outcome.NOT_DONE) -> BacktestKitError:
    """The error of this program for one of the driver. `where` is the address without its credentials."""
    code = _code(error)
    if isinstance(error, errors.ServerSelectionTimeoutError):
        return RetryLater(
            f"cannot {doing}: no MongoDB server answers at {where}: start it, or correct CC_MONGO_CONNECTION_STRING",
            outcome=outcome,
        )
    if isinstance(error, errors.ConfigurationError | errors.InvalidURI):
        # Its text may quote the address with the password in it.
        return UserError(f"{where} is not an address of MongoDB: correct CC_MONGO_CONNECTION_STRING")
    if code in _WRONG_USER:
        return UserError(
            f"cannot {doing}: MongoDB at {where} rejected the user: correct user, password and authSource in "
            "CC_MONGO_CONNECTION_STRING, and grant readWrite on the database"
        )
    if isinstance(error, errors.DocumentTooLarge) or code in _TOO_LARGE:
        return UserError(f"cannot {doing}: MongoDB stores at most 16 MiB in one document: split the value")
    if isinstance(error, BSONError | UnicodeError | OverflowError):
        return UserError(f"cannot {doing}: the value cannot be stored: {error}")
    if code in _DISK_FULL:
        return OutOfSpace(f"cannot {doing}: MongoDB at {where} has no space left on its disk", outcome=outcome)
    hint = "it may work later" if is_transient(error) else "see the log of the server"
    if isinstance(error, errors.NetworkTimeout | errors.ExecutionTimeout | TimeoutError):
        hint = "for a slow server, raise CC_MONGO_SOCKET_TIMEOUT_MS and CC_MONGO_OPERATION_TIMEOUT_MS"
    return RetryLater(f"cannot {doing}: MongoDB at {where}: {_text(error)}; {hint}", outcome=outcome)


def _code(error: BaseException) -> int | None:
    if isinstance(error, errors.BulkWriteError):
        details = error.details or {}
        found = [*details.get("writeErrors", ()), *details.get("writeConcernErrors", ())]
        return found[0].get("code") if found else error.code
    return error.code if isinstance(error, errors.OperationFailure) else None


def _is_aborted_transaction(error: BaseException) -> bool:
    return isinstance(error, errors.PyMongoError) and error.has_error_label("TransientTransactionError")


def _text(error: BaseException) -> str:
    if type(error) is TimeoutError:
        return "no answer in time"
    if isinstance(error, errors.OperationFailure):
        return str((error.details or {}).get("errmsg") or error)[:300]
    return f"{type(error).__name__}: {error}"[:300].partition(", Timeout:")[0]


# -- time ------------------------------------------------------------------------------------------------

_APART_US: Final = 100_000
"""Clocks nearer than this to the server's are left alone: a question about the time is no more exact."""
_REFRESH_SECONDS: Final = 600.0
_RETRY_SECONDS: Final = 10.0


class ServerClock:
    """The time by which records that several machines write are in order of writing.

    It is the clock of this machine as it was at the last answer of the server, corrected where it was far from the
    server's. A later change of this machine's clock has no effect until the server was asked again: a tick hours ahead
    would stay above all later ones, and every process that reads it would continue from there.
    """

    def __init__(self) -> None:
        self._due_at = -math.inf
        self._set_to_us = _now_us() - _uptime_us()
        """Wall clock minus uptime of this machine, when the server was asked."""
        self._beyond_us = self._set_to_us
        """The same of this clock."""

    @property
    def is_due(self) -> bool:
        """Whether the server is to be asked: the answer is old, or the clock of this machine was changed."""
        return abs(_now_us() - _uptime_us() - self._set_to_us) > _APART_US or time.monotonic() > self._due_at

    def ask(self) -> int:
        """Note that the server is being asked. Without an answer it is due again soon."""
        self._due_at = time.monotonic() + _RETRY_SECONDS
        self._set_to_us = _now_us() - _uptime_us()
        return _uptime_us()

    def answered(self, asked_us: int, hello: Mapping[str, Any]) -> None:
        """Use an answer to what was asked at `asked_us`, unless it took too long to be exact."""
        took_us = _uptime_us() - asked_us
        if took_us > _APART_US:
            return
        local_time, ahead_us = hello.get("localTime"), 0
        if isinstance(local_time, datetime):
            server_us = round(local_time.replace(tzinfo=UTC).timestamp() * 1_000_000)
            ahead_us = server_us - (asked_us + took_us // 2 + self._set_to_us)
        self._beyond_us = self._set_to_us + (ahead_us if abs(ahead_us) > _APART_US else 0)
        self._due_at = time.monotonic() + _REFRESH_SECONDS

    def now_us(self) -> int:
        """Microseconds."""
        return _uptime_us() + self._beyond_us


def _now_us() -> int:
    return time.time_ns() // 1000


def _uptime_us() -> int:
    # The clock of Linux that goes on while the machine sleeps.
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return (time.monotonic_ns() if clock is None else time.clock_gettime_ns(clock)) // 1000
