"""Binance's orders: placing, looking up and cancelling them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from backtest_kit.venue.binance import words as words
from backtest_kit.venue.binance.call import ApiError, Call
from backtest_kit.venue.orders import Kind, NewOrder, OrderType, Refused, Side, VenueOrder

_CLIENT_ID: Final = re.compile(r"[.A-Z:/a-z0-9_-]{1,36}")


async def place_spot(call: Call) -> Any:
    new = _new_order(call, words.SPOT_TYPES, "newClientOrderId", "stopPrice")
    async with call.venue.at_now():
        before = len(call.exchange.fills)
        order = call.place(new)
        return words.spot_order(order, call.exchange.fills[before:])


async def place_futures(call: Call) -> Any:
    if call.params.get("type") in words.ALGO_TYPES:
        raise ApiError(
            -4120, "Order type not supported for this endpoint. Please use the Algo Order API endpoints instead."
        )
    new = _new_order(call, words.FUTURES_TYPES, "newClientOrderId", "stopPrice")
    async with call.venue.at_now():
        return words.futures_order(call.place(new))


async def place_algo(call: Call) -> Any:
    new = _new_order(call, words.ALGO_TYPES, "clientAlgoId", "triggerPrice")
    async with call.venue.at_now():
        return words.algo_order(call.place(new))


def _new_order(call: Call, types: Mapping[str, OrderType], client_id_name: str, trigger_name: str) -> NewOrder:
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


async def order(call: Call) -> Any:
    async with call.venue.at_now():
        return _word(call.kind, _found(call))


async def algo_order(call: Call) -> Any:
    order_id, client_order_id = call.order_of("algoId", "clientAlgoId")
    async with call.venue.at_now():
        return words.algo_order(_conditional(call, order_id, client_order_id))


async def cancel(call: Call) -> Any:
    async with call.venue.at_now():
        order = _found(call)
        cancelled = _word(call.kind, call.cancel(order))
    if call.kind == "spot":
        # On spot the cancellation has its own id, and the id of the order has another name.
        own_id = call.params.get("newClientOrderId", f"cancel-{order.id}")
        return cancelled | {"origClientOrderId": order.client_order_id, "clientOrderId": own_id}
    return cancelled


async def cancel_algo(call: Call) -> Any:
    order_id, client_order_id = call.order_of("algoId", "clientAlgoId")
    async with call.venue.at_now():
        order = call.cancel(_conditional(call, order_id, client_order_id))
    return {"algoId": order.id, "clientAlgoId": order.client_order_id, "code": "200", "msg": "success"}


async def cancel_all(call: Call) -> Any:
    symbol = call.symbol()
    async with call.venue.at_now():
        orders = [each for each in call.exchange.open_orders(call.account, symbol) if not _waits_apart(call, each)]
        cancelled = [_word(call.kind, call.cancel(order)) for order in orders]
    if call.kind == "futures":
        return {"code": 200, "msg": "The operation of cancel all open order is done."}
    if not cancelled:
        raise Refused("unknown_order", f"{call.account} has no open order of {symbol}")
    return cancelled


async def open_orders(call: Call) -> Any:
    symbol = call.symbol() if "symbol" in call.params else None
    async with call.venue.at_now():
        orders = call.exchange.open_orders(call.account, symbol)
        return [_word(call.kind, order) for order in orders if not _waits_apart(call, order)]


async def open_algo_orders(call: Call) -> Any:
    symbol = call.symbol() if "symbol" in call.params else None
    async with call.venue.at_now():
        orders = call.exchange.open_orders(call.account, symbol)
        return [words.algo_order(order) for order in orders if _is_waiting(order)]


async def all_orders(call: Call) -> Any:
    async with call.venue.at_now():
        return [_word(call.kind, order) for order in _history(call) if not _waits_apart(call, order)]


async def all_algo_orders(call: Call) -> Any:
    async with call.venue.at_now():
        return [words.algo_order(order) for order in _history(call) if order.trigger is not None]


async def trades(call: Call) -> Any:
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


def _word(kind: Kind, order: VenueOrder) -> dict[str, Any]:
    return words.spot_order(order) if kind == "spot" else words.futures_order(order)


def _is_waiting(order: VenueOrder) -> bool:
    """Whether it is a conditional order that was not triggered yet."""
    return order.trigger is not None and not order.triggered


def _waits_apart(call: Call, order: VenueOrder) -> bool:
    return call.kind == "futures" and _is_waiting(order)


def _found(call: Call) -> VenueOrder:
    """The order that a request names; conditional orders of futures are apart."""
    order_id, client_order_id = call.order_of("orderId", "origClientOrderId")
    symbol = call.symbol()
    order = call.exchange.find(call.account, order_id=order_id, client_order_id=client_order_id)
    if order.symbol != symbol or _waits_apart(call, order):
        raise Refused("unknown_order", f"{call.account} has no order {order_id or client_order_id} of {symbol}")
    return order


def _conditional(call: Call, order_id: int | None, client_order_id: str | None) -> VenueOrder:
    order = call.exchange.find(call.account, order_id=order_id, client_order_id=client_order_id)
    if order.trigger is None:
        raise Refused("unknown_order", f"{order.client_order_id} is not a conditional order")
    return order


def _history(call: Call) -> list[VenueOrder]:
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
