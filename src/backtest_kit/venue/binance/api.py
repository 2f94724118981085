"""`BinanceApi`: the part of Binance's REST interface that a trading client needs, answered by a venue."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl

from backtest_kit.errors import Outcome, RetryLater, UserError
from backtest_kit.venue.binance import account, market, orders
from backtest_kit.venue.binance.call import ApiError, Call
from backtest_kit.venue.binance.words import refusal
from backtest_kit.venue.faults import Strike
from backtest_kit.venue.http import Answer, Request
from backtest_kit.venue.orders import Kind, Refused
from backtest_kit.venue.venue import Venue

API_KEY: Final = "bot"
API_SECRET: Final = "simulated"  # noqa: S105  # of a made-up exchange on loopback
_RECEIVE_WINDOW_MS: Final = 5000
_PATHS: Final = re.compile(r"/(api|fapi|dapi|sapi)/v(\d)/(.+)")


class BinanceApi:
    """Spot under `/api/v3`, USDT futures under `/fapi/v1` to `v3`; `keys` are the secrets by API key.

    The API key names the account. A request is signed as Binance wants it; its timestamp may be the time of the
    venue or that of this machine, since clients of an accelerated venue keep to their own clock.
    """

    def __init__(self, venue: Venue, keys: Mapping[str, str]) -> None:
        self._venue = venue
        self._keys = keys

    def serves(self, path: str) -> bool:
        return _PATHS.fullmatch(path) is not None

    async def answer(self, request: Request, strike: Strike) -> Answer:
        """Carry out a request. A bad request gets an error as its answer."""
        found = _PATHS.fullmatch(request.path)
        routes = _ROUTES.get((found[1], request.method), {}) if found else {}
        route = routes.get(found[3]) if found else None
        if found is None or route is None:
            return Answer({"code": -1000, "msg": f"{request.method} {request.path} is not simulated"}, 404)
        kind: Kind = "spot" if found[1] in ("api", "sapi") else "futures"
        query = request.query if request.method in ("GET", "DELETE") or not request.body else request.body.decode()
        call = Call(self._venue, kind, dict(parse_qsl(query, keep_blank_values=True)), strike)
        try:
            if route.signed:
                call.account = self._signer(request.api_key, query, call.params)
            return Answer(await route.answer(call), headers={"X-MBX-USED-WEIGHT-1M": "1"})
        except ApiError as error:
            return error.answer
        except Refused as refused:
            body = refusal(kind, refused.reason)
            if refused.reason == "unknown_order" and request.method == "GET":
                body = {"code": -2013, "msg": "Order does not exist."}
            return Answer(body, 400)
        except UserError as error:
            return Answer({"code": -1100, "msg": str(error)}, 400)
        except RetryLater as error:
            if error.outcome is Outcome.UNKNOWN:
                return Answer({"code": -1007, "msg": f"Send status unknown; execution status unknown. {error}"}, 504)
            return Answer({"code": -1001, "msg": f"Internal error; unable to process your request. {error}"}, 503)

    def _signer(self, api_key: str, query: str, params: Mapping[str, str]) -> str:
        secret = self._keys.get(api_key)
        if secret is None:
            raise ApiError(-2015, "Invalid API-key, IP, or permissions for action.", 401)
        signed, _, signature = query.rpartition("&signature=")
        expected = hmac.new(secret.encode(), signed.encode(), hashlib.sha256).hexdigest()
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise ApiError(-1022, "Signature for this request is not valid.")
        if not params.get("timestamp", "").isdigit():
            raise ApiError(-1102, "Mandatory parameter 'timestamp' was not sent, was empty/null, or malformed.")
        sent_ms, window_ms = int(params["timestamp"]), int(params.get("recvWindow", _RECEIVE_WINDOW_MS))
        ages_ms = [now_ms - sent_ms for now_ms in (time.time() * 1000, self._venue.clock.now_ms())]
        if not any(-1000 < age_ms <= window_ms for age_ms in ages_ms):
            ahead = all(age_ms < 0 for age_ms in ages_ms)
            raise ApiError(
                -1021,
                "Timestamp for this request was 1000ms ahead of the server's time."
                if ahead
                else "Timestamp for this request is outside of the recvWindow.",
            )
        return api_key


class _Route:
    def __init__(self, answer: Callable[[Call], Awaitable[Any]], *, signed: bool = True) -> None:
        self.answer = answer
        self.signed = signed


_PUBLIC: Final = {
    "ping": _Route(market.ping, signed=False),
    "time": _Route(market.time, signed=False),
    "exchangeInfo": _Route(market.exchange_info, signed=False),
    "klines": _Route(market.klines, signed=False),
    "ticker/price": _Route(market.price, signed=False),
    "ticker/bookTicker": _Route(market.book, signed=False),
    "ticker/24hr": _Route(market.day, signed=False),
}
_ROUTES: Final[dict[tuple[str, str], dict[str, _Route]]] = {
    ("api", "GET"): _PUBLIC
    | {
        "order": _Route(orders.order),
        "openOrders": _Route(orders.open_orders),
        "allOrders": _Route(orders.all_orders),
        "myTrades": _Route(orders.trades),
        "account": _Route(account.account),
    },
    ("api", "POST"): {"order": _Route(orders.place_spot)},
    ("api", "DELETE"): {"order": _Route(orders.cancel), "openOrders": _Route(orders.cancel_all)},
    ("fapi", "GET"): _PUBLIC
    | {
        "order": _Route(orders.order),
        "openOrders": _Route(orders.open_orders),
        "allOrders": _Route(orders.all_orders),
        "algoOrder": _Route(orders.algo_order),
        "openAlgoOrders": _Route(orders.open_algo_orders),
        "allAlgoOrders": _Route(orders.all_algo_orders),
        "userTrades": _Route(orders.trades),
        "account": _Route(account.account),
        "balance": _Route(account.balance),
        "positionRisk": _Route(account.position_risk),
        "leverageBracket": _Route(account.leverage_brackets),
        "positionSide/dual": _Route(account.position_mode),
    },
    ("fapi", "POST"): {
        "order": _Route(orders.place_futures),
        "algoOrder": _Route(orders.place_algo),
        "leverage": _Route(account.leverage),
        "marginType": _Route(account.margin_type),
        "positionSide/dual": _Route(account.set_position_mode),
    },
    ("fapi", "DELETE"): {
        "order": _Route(orders.cancel),
        "allOpenOrders": _Route(orders.cancel_all),
        "algoOrder": _Route(orders.cancel_algo),
    },
    ("dapi", "GET"): {"exchangeInfo": _Route(market.no_markets, signed=False)},
    ("sapi", "GET"): {
        "capital/config/getall": _Route(market.currencies),
        "margin/allPairs": _Route(market.no_pairs),
        "margin/isolated/allPairs": _Route(market.no_pairs),
    },
}
