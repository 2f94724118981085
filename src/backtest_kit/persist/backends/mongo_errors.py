"""Failures of MongoDB in the words of the house: what can heal, what may have happened, what to do."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Final

from bson.errors import BSONError
from pymongo import errors

from backtest_kit.errors import BacktestKitError, Outcome, OutOfSpace, RetryLater, UserError

FAILURES: Final = (errors.PyMongoError, BSONError, UnicodeError, OverflowError, OSError)
"""Everything that a call of the driver may raise."""

DUPLICATE_KEY: Final = 11000
_WRONG_USER: Final = frozenset((13, 18, 8000))
_TOO_LARGE: Final = frozenset((10334, 17280, 17419, 17420))
_DISK_FULL: Final = frozenset((14031,))
_HEALING: Final = frozenset(
    (6, 7, 50, 64, 89, 91, 112, 133, 134, 189, 251, 262, 9001, 10058, 10107, 11600, 11602, 13435, 13436)
)
"""Codes of servers that are stopping, electing, interrupted, too slow or in each other's way."""
_NOT_DONE: Final = frozenset((112, 134, 251, 10058, 10107, 13435, 13436))
"""Those of them with which a server says that it has done nothing."""


def is_duplicate(error: BaseException) -> bool:
    """Whether a unique index refused the write."""
    if isinstance(error, errors.BulkWriteError):
        return any(each.get("code") == DUPLICATE_KEY for each in (error.details or {}).get("writeErrors", ()))
    return isinstance(error, errors.DuplicateKeyError)


def heals(error: BaseException, *, saw_server: bool = False) -> bool:
    """Whether the same call may work in a moment.

    A server that cannot be found has been waited for already, unless `saw_server`: it went away in the middle of the
    call, and was waited for no longer than for an answer.
    """
    if isinstance(error, errors.ServerSelectionTimeoutError):
        return saw_server
    if isinstance(error, errors.ConnectionFailure | errors.WTimeoutError | errors.ExecutionTimeout | OSError):
        return True
    return _code(error) in _HEALING or _labelled(error)


def may_have_happened(error: BaseException) -> bool:
    """Whether the server may have done what it gave no answer to. Without a connection it was not even asked."""
    if isinstance(error, errors.ServerSelectionTimeoutError | errors.WaitQueueTimeoutError):
        return False
    if isinstance(error, errors.ConnectionFailure | errors.WTimeoutError | errors.ExecutionTimeout | OSError):
        return _code(error) not in _NOT_DONE
    return heals(error) and not _labelled(error) and _code(error) not in _NOT_DONE


def translate(error: BaseException, doing: str, where: str, outcome: Outcome = Outcome.NOT_DONE) -> BacktestKitError:
    """The error of the house. Nothing of the address but its hosts is in the message."""
    code = _code(error)
    if isinstance(error, errors.ServerSelectionTimeoutError):
        return RetryLater(
            f"cannot {doing}: no MongoDB server answers at {where}: start it, or correct CC_MONGO_CONNECTION_STRING",
            outcome=outcome,
        )
    if isinstance(error, errors.ConfigurationError | errors.InvalidURI):
        # Its text may quote the address with the password in it.
        return UserError(f"the address of MongoDB {where} is not one: correct CC_MONGO_CONNECTION_STRING")
    if code in _WRONG_USER:
        return UserError(
            f"cannot {doing}: MongoDB at {where} refused the user: correct user, password and authSource in "
            "CC_MONGO_CONNECTION_STRING, and grant readWrite on the database"
        )
    if isinstance(error, errors.DocumentTooLarge) or code in _TOO_LARGE:
        return UserError(f"cannot {doing}: MongoDB stores at most 16 MiB in one document: split the value")
    if isinstance(error, BSONError | UnicodeError | OverflowError):
        return UserError(f"cannot {doing}: the value cannot be stored: {error}")
    if code in _DISK_FULL:
        return OutOfSpace(f"cannot {doing}: MongoDB at {where} has no space left on its disk", outcome=outcome)
    hint = "it may work later" if heals(error) else "the server's log says more"
    if isinstance(error, errors.NetworkTimeout | errors.ExecutionTimeout | TimeoutError):
        hint = "for a slow server, raise CC_MONGO_SOCKET_TIMEOUT_MS and CC_MONGO_OPERATION_TIMEOUT_MS"
    return RetryLater(f"cannot {doing}: MongoDB at {where}: {_text(error)}; {hint}", outcome=outcome)


_LAST: Final = 0.02
"""Seconds. An attempt with less would end as a timeout, which costs a connection, and may be of a connection."""


class Patience:
    """How long an operation is tried: until `seconds` have passed, with pauses that grow and differ."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._pause = 0.02

    @property
    def left(self) -> float:
        """Seconds, at least those of a last attempt."""
        return max(_LAST, self._until - time.monotonic())

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._until - _LAST

    async def pause(self) -> None:
        """Wait a moment, longer each time; who waits for a server learns soon that it is back."""
        await asyncio.sleep(min(self.left, self._pause * random.uniform(0.5, 1.5)))  # noqa: S311
        self._pause = min(0.25, self._pause * 2)


def _code(error: BaseException) -> int | None:
    if isinstance(error, errors.BulkWriteError):
        details = error.details or {}
        found = [*details.get("writeErrors", ()), *details.get("writeConcernErrors", ())]
        return found[0].get("code") if found else error.code
    return error.code if isinstance(error, errors.OperationFailure) else None


def _labelled(error: BaseException) -> bool:
    return isinstance(error, errors.PyMongoError) and error.has_error_label("TransientTransactionError")


def _text(error: BaseException) -> str:
    if type(error) is TimeoutError:
        return "no answer in time"
    if isinstance(error, errors.OperationFailure):
        return str((error.details or {}).get("errmsg") or error)[:300]
    return f"{type(error).__name__}: {error}"[:300].partition(", Timeout:")[0]
