"""`BinanceApi`: the part of Binance's REST interface that a trading client needs, answered by a venue."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Final
from urllib.parse import parse_qsl

from backtest_kit.errors import RetryLater, UserError
from backtest_kit.model.interval import DAY_MS, INTERVAL_MS, MINUTE_MS, floor_ms
from backtest_kit.simulation import binance_words as words
from backtest_kit.simulation.account import FuturesAccount, SpotAccount
from backtest_kit.simulation.exchange import Exchange
from backtest_kit.simulation.faults import Strike
from backtest_kit.simulation.http import Answer, Request
from backtest_kit.simulation.journal import Cancel, Place, SetLeverage
from backtest_kit.simulation.orders import Kind, NewOrder, OrderType, Refused, Side, VenueOrder
from backtest_kit.simulation.venue import Venue

_CLIENT_ID: Final = re.compile(r"[.A-Z:/a-z0-9_-]{1,36}")
_RECEIVE_WINDOW_MS: Final = 5000
_PATHS: Final = re.compile(r"/(api|fapi|dapi|sapi)/v(\d)/(.+)")


class ApiError(Exception):
    """An answer in Binance's words for what cannot be done."""

    def __init__(self, code: int, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.answer = Answer({"code": code, "msg": message}, status)


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
        """Do what is asked. What is wrong with a request is an answer, too."""
        found = _PATHS.fullmatch(request.path)
        routes = _ROUTES.get((found[1], request.method), {}) if found else {}
        route = routes.get(found[3]) if found else None
        if found is None or route is None:
            return Answer({"code": -1000, "msg": f"{request.method} {request.path} is not simulated"}, 404)
        kind: Kind = "spot" if found[1] in ("api", "sapi") else "futures"
        query = request.query if request.method in ("GET", "DELETE") or not request.body else request.body.decode()
        call = _Call(self._venue, kind, dict(parse_qsl(query, keep_blank_values=True)), strike)
        try:
            if route.signed:
                call.account = self._signer(request.api_key, query, call.params)
            return Answer(await route.answer(call), headers={"X-MBX-USED-WEIGHT-1M": "1"})
        except ApiError as error:
            return error.answer
        except Refused as refused:
            body = words.refusal(kind, refused.reason)
            if refused.reason == "unknown_order" and request.method == "GET":
                body = {"code": -2013, "msg": "Order does not exist."}
            return Answer(body, 400)
        except UserError as error:
            return Answer({"code": -1100, "msg": str(error)}, 400)
        except RetryLater as error:
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


class _Call:
    """One request that is understood and allowed."""

    def __init__(self, venue: Venue, kind: Kind, params: dict[str, str], strike: Strike) -> None:
        self.venue = venue
        self.kind = kind
        self.params = params
        self.strike = strike
        self.account = ""

    @property
    def exchange(self) -> Exchange:
        return self.venue.exchanges[self.kind]

    def need(self, name: str) -> str:
        if not self.params.get(name):
            raise ApiError(-1102, f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed.")
        return self.params[name]

    def symbol(self) -> str:
        return self.exchange.market(self.need("symbol")).symbol

    def number(self, name: str) -> Decimal | None:
        if name not in self.params:
            return None
        try:
            number = Decimal(self.params[name])
        except InvalidOperation:
            number = Decimal("NaN")
        if not number.is_finite():
            raise ApiError(-1100, f"Illegal characters found in parameter '{name}'.")
        return number

    def whole(self, name: str) -> int | None:
        number = self.number(name)
        return None if number is None else int(number)

    def order_of(self, id_name: str, client_id_name: str) -> tuple[int | None, str | None]:
        order_id, client_order_id = self.whole(id_name), self.params.get(client_id_name)
        if order_id is None and not client_order_id:
            raise ApiError(-1102, f"Param '{client_id_name}' or '{id_name}' must be sent, but both were empty/null!")
        return order_id, client_order_id

    def place(self, new: NewOrder) -> VenueOrder:
        if self.strike.of("reject"):
            raise Refused("rejected", f"{new.client_order_id} is refused on purpose")
        partial = self.strike.of("partial")
        action = Place(new, partial.fraction, partial.rest_expires) if partial else Place(new)
        order = self.venue.do(self.kind, self.account, action)
        assert order is not None  # noqa: S101  # placing returns the order
        return order

    def cancel(self, order: VenueOrder) -> VenueOrder:
        self.venue.do(self.kind, self.account, Cancel(order.symbol, order_id=order.id))
        return order


class _Route:
    def __init__(self, answer: Callable[[_Call], Awaitable[Any]], *, signed: bool = True) -> None:
        self.answer = answer
        self.signed = signed


# Market data


async def _ping(call: _Call) -> Any:
    return {}


async def _time(call: _Call) -> Any:
    return {"serverTime": call.venue.clock.now_ms()}


async def _exchange_info(call: _Call) -> Any:
    return words.exchange_info(call.kind, call.exchange.markets, call.venue.clock.now_ms())


async def _no_markets(call: _Call) -> Any:
    return {"timezone": "UTC", "serverTime": call.venue.clock.now_ms(), "symbols": []}


async def _no_pairs(call: _Call) -> Any:
    return []


async def _currencies(call: _Call) -> Any:
    assets = sorted({asset for market in call.exchange.markets.values() for asset in (market.base, market.quote)})
    return [{"coin": asset, "name": asset, "trading": True, "networkList": []} for asset in assets]


async def _klines(call: _Call) -> Any:
    symbol, interval = call.symbol(), call.need("interval")
    if interval not in INTERVAL_MS:
        raise ApiError(-1120, "Invalid interval.")
    step_ms, now_ms = INTERVAL_MS[interval], call.venue.clock.now_ms()
    limit = min(call.whole("limit") or 500, 1000 if call.kind == "spot" else 1500)
    start_ms, last_ms = call.whole("startTime"), call.whole("endTime")
    stop_ms = min(now_ms, last_ms if last_ms is not None else now_ms) + 1
    if start_ms is None:
        start_ms = floor_ms(stop_ms - 1, step_ms) - (limit - 1) * step_ms
    first_ms = floor_ms(start_ms + step_ms - 1, step_ms)
    stop_ms = min(stop_ms, first_ms + limit * step_ms)
    candles = await call.venue.candles(symbol, interval, first_ms, stop_ms)
    columns = (candles.timestamp, candles.open, candles.high, candles.low, candles.close, candles.volume)
    rows = [_kline(step_ms, *row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    current_ms = floor_ms(now_ms, step_ms)
    if first_ms <= current_ms < stop_ms and len(rows) < limit:
        # The candle that is still open shows the price of now and nothing of what comes.
        async with call.venue.at_now():
            price = float(call.exchange.prices[symbol])
        rows.append(_kline(step_ms, current_ms, price, price, price, price, 0.0))
    return rows


def _kline(step_ms: int, open_ms: int, open_: float, high: float, low: float, close: float, volume: float) -> list[Any]:
    prices = [repr(each) for each in (open_, high, low, close, volume)]
    turnover = repr(volume * close)
    return [open_ms, *prices, open_ms + step_ms - 1, turnover, 100, repr(volume / 2), repr(volume * close / 2), "0"]


async def _price(call: _Call) -> Any:
    async with call.venue.at_now():
        prices = {symbol: words.text(price) for symbol, price in call.exchange.prices.items()}
    if "symbol" in call.params:
        return {"symbol": call.symbol(), "price": prices[call.symbol()], "time": call.exchange.now_ms}
    return [{"symbol": symbol, "price": price} for symbol, price in prices.items()]


async def _book(call: _Call) -> Any:
    """Bid and ask are the price: slippage is charged where orders are filled."""
    symbol = call.symbol()
    async with call.venue.at_now() as now_ms:
        price = words.text(call.exchange.prices[symbol])
    return {
        "symbol": symbol,
        "bidPrice": price,
        "bidQty": "1000.0",
        "askPrice": price,
        "askQty": "1000.0",
        "time": now_ms,
    }


async def _day(call: _Call) -> Any:
    symbol = call.symbol()
    async with call.venue.at_now() as now_ms:
        price = call.exchange.prices[symbol]
    stop_ms = floor_ms(now_ms, MINUTE_MS)
    candles = await call.venue.candles(symbol, "1m", stop_ms - DAY_MS, stop_ms)
    first = float(candles.open[0]) if len(candles) else float(price)
    volume = float(candles.volume.sum())
    turnover = float((candles.volume * candles.close).sum())
    return {
        "symbol": symbol,
        "priceChange": repr(float(price) - first),
        "priceChangePercent": f"{(float(price) / first - 1) * 100:.3f}",
        "weightedAvgPrice": repr(turnover / volume if volume else float(price)),
        "lastPrice": words.text(price),
        "bidPrice": words.text(price),
        "askPrice": words.text(price),
        "openPrice": repr(first),
        "highPrice": repr(float(candles.high.max()) if len(candles) else float(price)),
        "lowPrice": repr(float(candles.low.min()) if len(candles) else float(price)),
        "volume": repr(volume),
        "quoteVolume": repr(turnover),
        "openTime": stop_ms - DAY_MS,
        "closeTime": now_ms,
        "count": len(candles),
    }


# Orders


async def _place_spot(call: _Call) -> Any:
    new = _new_order(call, words.SPOT_TYPES, "newClientOrderId", "stopPrice")
    async with call.venue.at_now():
        before = len(call.exchange.fills)
        order = call.place(new)
        return words.spot_order(order, call.exchange.fills[before:])


async def _place_futures(call: _Call) -> Any:
    if call.params.get("type") in words.ALGO_TYPES:
        raise ApiError(
            -4120, "Order type not supported for this endpoint. Please use the Algo Order API endpoints instead."
        )
    new = _new_order(call, words.FUTURES_TYPES, "newClientOrderId", "stopPrice")
    async with call.venue.at_now():
        return words.futures_order(call.place(new))


async def _place_algo(call: _Call) -> Any:
    new = _new_order(call, words.ALGO_TYPES, "clientAlgoId", "triggerPrice")
    async with call.venue.at_now():
        return words.algo_order(call.place(new))


def _new_order(call: _Call, types: Mapping[str, OrderType], client_id_name: str, trigger_name: str) -> NewOrder:
    word = call.need("type")
    if word not in types:
        raise ApiError(-1116, "Invalid orderType.")
    side = call.need("side").lower()
    if side not in ("buy", "sell"):
        raise ApiError(-1117, "Invalid side.")
    client_order_id = call.need(client_id_name)
    if not _CLIENT_ID.fullmatch(client_order_id):
        raise ApiError(-1100, f"Illegal characters found in parameter '{client_id_name}'.")
    if call.params.get("positionSide", "BOTH") != "BOTH":
        raise ApiError(-4061, "Order's position side does not match user's setting.")
    closes = call.params.get("closePosition", "false").lower() == "true"
    in_force = call.params.get("timeInForce", "GTC")
    quantity, cost = call.number("quantity"), call.number("quoteOrderQty")
    if quantity is None and cost is None and not closes:
        raise ApiError(-1102, "Mandatory parameter 'quantity' was not sent, was empty/null, or malformed.")
    order_side: Side = "buy" if side == "buy" else "sell"
    return NewOrder(
        symbol=call.symbol(),
        side=order_side,
        type=types[word],
        client_order_id=client_order_id,
        quantity=quantity,
        cost=cost if quantity is None else None,
        price=call.number("price"),
        trigger=call.number(trigger_name),
        reduce_only=closes or call.params.get("reduceOnly", "false").lower() == "true",
        protects=closes,
        post_only=word == "LIMIT_MAKER" or in_force == "GTX",
        immediate=in_force in ("IOC", "FOK"),
    )


async def _order(call: _Call) -> Any:
    order_id, client_order_id = call.order_of("orderId", "origClientOrderId")
    symbol = call.symbol()
    async with call.venue.at_now():
        order = call.exchange.find(call.account, order_id=order_id, client_order_id=client_order_id)
        if order.symbol != symbol or (call.kind == "futures" and _is_waiting(order)):
            raise Refused("unknown_order", f"{call.account} has no order {order_id or client_order_id} of {symbol}")
        return _word(call.kind, order)


async def _algo_order(call: _Call) -> Any:
    order_id, client_order_id = call.order_of("algoId", "clientAlgoId")
    async with call.venue.at_now():
        return words.algo_order(_conditional(call, order_id, client_order_id))


async def _cancel(call: _Call) -> Any:
    order_id, client_order_id = call.order_of("orderId", "origClientOrderId")
    symbol = call.symbol()
    async with call.venue.at_now():
        order = call.exchange.find(call.account, order_id=order_id, client_order_id=client_order_id)
        if order.symbol != symbol or (call.kind == "futures" and _is_waiting(order)):
            raise Refused("unknown_order", f"{call.account} has no order {order_id or client_order_id} of {symbol}")
        cancelled = _word(call.kind, call.cancel(order))
    if call.kind == "spot":
        # The cancellation has an id of its own on spot, and that of the order has another name.
        own_id = call.params.get("newClientOrderId", f"cancel-{order.id}")
        return cancelled | {"origClientOrderId": order.client_order_id, "clientOrderId": own_id}
    return cancelled


async def _cancel_algo(call: _Call) -> Any:
    order_id, client_order_id = call.order_of("algoId", "clientAlgoId")
    async with call.venue.at_now():
        order = call.cancel(_conditional(call, order_id, client_order_id))
    return {"algoId": order.id, "clientAlgoId": order.client_order_id, "code": "200", "msg": "success"}


async def _cancel_all(call: _Call) -> Any:
    symbol = call.symbol()
    async with call.venue.at_now():
        orders = [each for each in call.exchange.open_orders(call.account, symbol) if not _waits_apart(call, each)]
        cancelled = [_word(call.kind, call.cancel(order)) for order in orders]
    if call.kind == "futures":
        return {"code": 200, "msg": "The operation of cancel all open order is done."}
    if not cancelled:
        raise Refused("unknown_order", f"{call.account} has no open order of {symbol}")
    return cancelled


async def _open_orders(call: _Call) -> Any:
    symbol = call.symbol() if "symbol" in call.params else None
    async with call.venue.at_now():
        orders = call.exchange.open_orders(call.account, symbol)
        return [_word(call.kind, order) for order in orders if not _waits_apart(call, order)]


async def _open_algo_orders(call: _Call) -> Any:
    symbol = call.symbol() if "symbol" in call.params else None
    async with call.venue.at_now():
        orders = call.exchange.open_orders(call.account, symbol)
        return [words.algo_order(order) for order in orders if _is_waiting(order)]


async def _all_orders(call: _Call) -> Any:
    async with call.venue.at_now():
        return [_word(call.kind, order) for order in _history(call) if not _waits_apart(call, order)]


async def _all_algo_orders(call: _Call) -> Any:
    async with call.venue.at_now():
        return [words.algo_order(order) for order in _history(call) if order.trigger is not None]


async def _trades(call: _Call) -> Any:
    symbol, order_id, from_id = call.symbol(), call.whole("orderId"), call.whole("fromId") or 0
    start_ms, last_ms = call.whole("startTime") or 0, call.whole("endTime")
    async with call.venue.at_now() as now_ms:
        found = [
            fill
            for fill in call.exchange.fills
            if fill.account == call.account
            and fill.symbol == symbol
            and order_id in (None, fill.order_id)
            and fill.id >= from_id
            and start_ms <= fill.time_ms <= (now_ms if last_ms is None else last_ms)
        ]
    limit = min(call.whole("limit") or 500, 1000)
    from_the_end = not (from_id or start_ms)
    return [words.trade(call.kind, fill) for fill in (found[-limit:] if from_the_end else found[:limit])]


# Accounts


async def _account(call: _Call) -> Any:
    async with call.venue.at_now():
        account = call.exchange.account(call.account)
        if isinstance(account, SpotAccount):
            return words.spot_account(account, call.exchange)
        return words.futures_account(account, call.exchange)


async def _balance(call: _Call) -> Any:
    async with call.venue.at_now():
        assets: list[dict[str, Any]] = words.futures_account(_futures(call), call.exchange)["assets"]
    return [asset | {"balance": asset["walletBalance"]} for asset in assets]


async def _position_risk(call: _Call) -> Any:
    async with call.venue.at_now():
        return words.positions(_futures(call), call.exchange, call.params.get("symbol"))


async def _leverage(call: _Call) -> Any:
    symbol, leverage = call.symbol(), call.whole("leverage") or 0
    async with call.venue.at_now():
        try:
            call.venue.do(call.kind, call.account, SetLeverage(symbol, leverage))
        except Refused:
            raise ApiError(-4028, f"Leverage {leverage} is not valid") from None
    return {"symbol": symbol, "leverage": leverage, "maxNotionalValue": "1000000000"}


async def _leverage_brackets(call: _Call) -> Any:
    bracket = {
        "bracket": 1,
        "initialLeverage": 125,
        "notionalCap": 1_000_000_000,
        "notionalFloor": 0,
        "maintMarginRatio": 0.004,
        "cum": 0.0,
    }
    symbols = [call.symbol()] if "symbol" in call.params else list(call.exchange.markets)
    return [{"symbol": symbol, "brackets": [bracket]} for symbol in symbols]


async def _margin_type(call: _Call) -> Any:
    call.symbol()
    if call.need("marginType") != "CROSSED":
        raise ApiError(-4047, "Margin type cannot be changed: this venue has cross margin only.")
    raise ApiError(-4046, "No need to change margin type.")


async def _position_mode(call: _Call) -> Any:
    return {"dualSidePosition": False}


async def _set_position_mode(call: _Call) -> Any:
    if call.need("dualSidePosition").lower() == "true":
        raise ApiError(-4067, "Position side cannot be changed: this venue has one-way positions only.")
    raise ApiError(-4059, "No need to change position side.")


def _futures(call: _Call) -> FuturesAccount:
    account = call.exchange.account(call.account)
    assert isinstance(account, FuturesAccount)  # noqa: S101  # only futures routes come here
    return account


def _word(kind: Kind, order: VenueOrder) -> dict[str, Any]:
    return words.spot_order(order) if kind == "spot" else words.futures_order(order)


def _is_waiting(order: VenueOrder) -> bool:
    """Whether it is a conditional order that has not come to the market."""
    return order.trigger is not None and not order.triggered


def _waits_apart(call: _Call, order: VenueOrder) -> bool:
    return call.kind == "futures" and _is_waiting(order)


def _conditional(call: _Call, order_id: int | None, client_order_id: str | None) -> VenueOrder:
    order = call.exchange.find(call.account, order_id=order_id, client_order_id=client_order_id)
    if order.trigger is None:
        raise Refused("unknown_order", f"{order.client_order_id} is no conditional order")
    return order


def _history(call: _Call) -> list[VenueOrder]:
    """Orders of the symbol by age: from an id or a time on, or else the latest."""
    symbol, limit = call.symbol(), min(call.whole("limit") or 500, 1000)
    from_id, start_ms = call.whole("orderId") or 0, call.whole("startTime") or 0
    last_ms = call.whole("endTime")
    found = [
        order
        for order in call.exchange.orders.values()
        if order.account == call.account
        and order.symbol == symbol
        and order.id >= from_id
        and order.created_ms >= start_ms
        and (last_ms is None or order.created_ms <= last_ms)
    ]
    return found[:limit] if from_id or start_ms else found[-limit:]


_PUBLIC: Final = {
    "ping": _Route(_ping, signed=False),
    "time": _Route(_time, signed=False),
    "exchangeInfo": _Route(_exchange_info, signed=False),
    "klines": _Route(_klines, signed=False),
    "ticker/price": _Route(_price, signed=False),
    "ticker/bookTicker": _Route(_book, signed=False),
    "ticker/24hr": _Route(_day, signed=False),
}
_ROUTES: Final[dict[tuple[str, str], dict[str, _Route]]] = {
    ("api", "GET"): _PUBLIC
    | {
        "order": _Route(_order),
        "openOrders": _Route(_open_orders),
        "allOrders": _Route(_all_orders),
        "myTrades": _Route(_trades),
        "account": _Route(_account),
    },
    ("api", "POST"): {"order": _Route(_place_spot)},
    ("api", "DELETE"): {"order": _Route(_cancel), "openOrders": _Route(_cancel_all)},
    ("fapi", "GET"): _PUBLIC
    | {
        "order": _Route(_order),
        "openOrders": _Route(_open_orders),
        "allOrders": _Route(_all_orders),
        "algoOrder": _Route(_algo_order),
        "openAlgoOrders": _Route(_open_algo_orders),
        "allAlgoOrders": _Route(_all_algo_orders),
        "userTrades": _Route(_trades),
        "account": _Route(_account),
        "balance": _Route(_balance),
        "positionRisk": _Route(_position_risk),
        "leverageBracket": _Route(_leverage_brackets),
        "positionSide/dual": _Route(_position_mode),
    },
    ("fapi", "POST"): {
        "order": _Route(_place_futures),
        "algoOrder": _Route(_place_algo),
        "leverage": _Route(_leverage),
        "marginType": _Route(_margin_type),
        "positionSide/dual": _Route(_set_position_mode),
    },
    ("fapi", "DELETE"): {
        "order": _Route(_cancel),
        "allOpenOrders": _Route(_cancel_all),
        "algoOrder": _Route(_cancel_algo),
    },
    ("dapi", "GET"): {"exchangeInfo": _Route(_no_markets, signed=False)},
    ("sapi", "GET"): {
        "capital/config/getall": _Route(_currencies),
        "margin/allPairs": _Route(_no_pairs),
        "margin/isolated/allPairs": _Route(_no_pairs),
    },
}
