"""The meaning of ccxt's errors for an order that was being sent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from backtest_kit.broker.base import OrderRejected, OrderTransient
from backtest_kit.ccxt_client import redacted
from backtest_kit.errors import BacktestKitError, Outcome


class OrderMissing(OrderRejected):
    """The exchange has no such order, or it is no longer open."""


class AlreadyThere(OrderRejected):
    """The exchange has an order of this client id."""


class StopReached(OrderRejected):
    """A stop would trigger immediately: the market is already beyond it."""


class NoFunds(OrderRejected):
    """The balance does not cover the order."""


class TooManyStops(OrderRejected):
    """The exchange takes no more conditional orders."""


class NotAllowed(OrderRejected):
    """The key, its permissions or the account do not allow it."""


# The first row that fits decides, so the subclasses come before their bases.
_TABLE: Final[tuple[tuple[str, type[BacktestKitError], Outcome], ...]] = (
    ("DuplicateOrderId", AlreadyThere, Outcome.NOT_DONE),
    ("OrderNotFound", OrderMissing, Outcome.NOT_DONE),
    ("OrderImmediatelyFillable", StopReached, Outcome.NOT_DONE),
    ("InsufficientFunds", NoFunds, Outcome.NOT_DONE),
    ("InvalidOrder", OrderRejected, Outcome.NOT_DONE),
    ("RateLimitExceeded", OrderTransient, Outcome.NOT_DONE),  # refused at the door
    ("DDoSProtection", OrderTransient, Outcome.NOT_DONE),
    ("InvalidNonce", OrderTransient, Outcome.NOT_DONE),
    ("RequestTimeout", OrderTransient, Outcome.UNKNOWN),
    ("OnMaintenance", OrderTransient, Outcome.NOT_DONE),
    ("ExchangeNotAvailable", OrderTransient, Outcome.UNKNOWN),
    ("NetworkError", OrderTransient, Outcome.UNKNOWN),
    ("BadResponse", OrderTransient, Outcome.UNKNOWN),
    ("OperationFailed", OrderTransient, Outcome.UNKNOWN),
    ("AuthenticationError", NotAllowed, Outcome.NOT_DONE),
    ("BadRequest", OrderRejected, Outcome.NOT_DONE),  # the base of BadSymbol
    ("ArgumentsRequired", OrderRejected, Outcome.NOT_DONE),
    ("NotSupported", OrderRejected, Outcome.NOT_DONE),
    ("OperationRejected", OrderRejected, Outcome.NOT_DONE),
)
# Errors without a class in ccxt, by the exchange's text or code. Checked first.
_BY_TEXT: Final[tuple[tuple[re.Pattern[str], type[BacktestKitError], Outcome], ...]] = (
    (re.compile(r"duplicate", re.IGNORECASE), AlreadyThere, Outcome.NOT_DONE),
    (re.compile(r'"code":\s*-1021\b'), OrderTransient, Outcome.NOT_DONE),
    (re.compile(r'"code":\s*-(1000|1001|1006|1007|1008|1016)\b'), OrderTransient, Outcome.UNKNOWN),
    (re.compile(r'"code":\s*-(1003|1015)\b'), OrderTransient, Outcome.NOT_DONE),
    (re.compile(r'"code":\s*-2011\b|unknown order', re.IGNORECASE), OrderMissing, Outcome.NOT_DONE),
    (re.compile(r'"code":\s*-2018\b|"code":\s*-2019\b'), NoFunds, Outcome.NOT_DONE),
    (re.compile(r'MAX_NUM_ALGO_ORDERS|"code":\s*-4045\b'), TooManyStops, Outcome.NOT_DONE),
    (re.compile(r"Filter failure"), OrderRejected, Outcome.NOT_DONE),  # Binance's, before it takes an order
    (re.compile(r'"code":\s*-2021\b|trigger immediately|immediately trigger'), StopReached, Outcome.NOT_DONE),
)


def order_error(error: Exception, doing: str, secrets: Iterable[str] = ()) -> BacktestKitError:
    """`error` of ccxt as one of the three that hooks raise.

    An error outside of the table leaves the outcome open: the order is looked up before it is sent again.
    """
    kind, outcome = _meaning(error)
    return kind(f"{doing}: {redacted(error, secrets)}", outcome=outcome)


@contextmanager
def order_is_there() -> Iterator[None]:
    """The exchange has the order of this block. An error of a later request is not about that order, which must be
    looked up."""
    try:
        yield
    except (OrderRejected, OrderTransient) as error:
        raise OrderTransient(str(error), outcome=Outcome.UNKNOWN) from None


def is_clock_skew(error: Exception) -> bool:
    """Whether a request was refused because its timestamp differs from the exchange's clock."""
    return "-1021" in str(error) or type(error).__name__ == "InvalidNonce"


def _meaning(error: Exception) -> tuple[type[BacktestKitError], Outcome]:
    if _never_connected(error):
        return OrderTransient, Outcome.NOT_DONE
    text = str(error)
    for words, kind, outcome in _BY_TEXT:
        if words.search(text):
            return kind, outcome
    names = {each.__name__ for each in type(error).__mro__}
    for name, kind, outcome in _TABLE:
        if name in names:
            return kind, outcome
    return OrderTransient, Outcome.UNKNOWN


def _never_connected(error: Exception) -> bool:
    cause: Any = error
    while cause is not None:
        if any(each.__name__ == "ClientConnectorError" for each in type(cause).__mro__):
            return True
        cause = cause.__cause__
    return False
