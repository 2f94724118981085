from __future__ import annotations

import ccxt as library
import pytest

from backtest_kit.broker.base import OrderRejected, OrderTransient
from backtest_kit.broker.ccxt_errors import AlreadyThere, NoFunds, NotAllowed, OrderMissing, StopReached, order_error
from backtest_kit.errors import BacktestKitError, Outcome

KNOWN, UNKNOWN = Outcome.NOT_DONE, Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("error", "kind", "outcome"),
    [
        (library.RequestTimeout("slow"), OrderTransient, UNKNOWN),
        (library.ExchangeNotAvailable("503"), OrderTransient, UNKNOWN),
        (library.NetworkError("reset"), OrderTransient, UNKNOWN),
        (library.BadResponse("half"), OrderTransient, UNKNOWN),
        (library.NullResponse("none"), OrderTransient, UNKNOWN),
        (library.OperationFailed("?"), OrderTransient, UNKNOWN),
        (library.ExchangeError("?"), OrderTransient, UNKNOWN),
        (library.RateLimitExceeded("429"), OrderTransient, KNOWN),
        (library.DDoSProtection("418"), OrderTransient, KNOWN),
        (library.OnMaintenance("closed"), OrderTransient, KNOWN),
        (library.InvalidNonce("time"), OrderTransient, KNOWN),
        (library.InsufficientFunds("poor"), NoFunds, KNOWN),
        (library.InvalidOrder("bad"), OrderRejected, KNOWN),
        (library.OrderNotFound("where"), OrderMissing, KNOWN),
        (library.OrderImmediatelyFillable("now"), StopReached, KNOWN),
        (library.DuplicateOrderId("twice"), AlreadyThere, KNOWN),
        (library.BadSymbol("delisted"), OrderRejected, KNOWN),
        (library.MarketClosed("night"), OrderRejected, KNOWN),
        (library.AuthenticationError("key"), NotAllowed, KNOWN),
        (library.PermissionDenied("ip"), NotAllowed, KNOWN),
        (library.AccountSuspended("you"), NotAllowed, KNOWN),
        (library.InvalidOrder('binance {"code":-2010,"msg":"Duplicate order sent."}'), AlreadyThere, KNOWN),
        (library.ExchangeError('{"code":-4116,"msg":"ClientOrderId is duplicated."}'), AlreadyThere, KNOWN),
        (library.ExchangeError('{"code":-1007,"msg":"Timeout waiting for response"}'), OrderTransient, UNKNOWN),
        (library.InvalidOrder('{"code":-1015,"msg":"Too many new orders."}'), OrderTransient, KNOWN),
        (library.BadRequest('{"code":-1021,"msg":"Timestamp"}'), OrderTransient, KNOWN),
        (library.ExchangeError('{"code":-2011,"msg":"Unknown order sent."}'), OrderMissing, KNOWN),
        (library.OperationFailed('{"code":-2019,"msg":"Margin is insufficient."}'), NoFunds, KNOWN),
        (library.InvalidOrder('{"code":-2010,"msg":"Stop price would trigger immediately."}'), StopReached, KNOWN),
    ],
)
def test_each_error_says_what_is_known_of_the_order(
    error: Exception, kind: type[BacktestKitError], outcome: Outcome
) -> None:
    meant = order_error(error, "binance: send X")
    assert type(meant) is kind
    assert meant.outcome is outcome
    assert str(meant).startswith(f"binance: send X: {type(error).__name__}: ")


def test_a_signed_request_and_a_secret_are_left_out() -> None:
    error = library.RequestTimeout("GET https://api.example/x?apiKey=ME&signature=abc timed out for sesame")
    text = str(order_error(error, "ask", ["sesame"]))
    assert "apiKey" not in text
    assert "signature" not in text
    assert "sesame" not in text
    assert "timed out" in text
