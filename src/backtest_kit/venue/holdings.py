"""The holdings of an account, as a broker lists them, assigned to signals by the groups of orders."""

from __future__ import annotations

from backtest_kit.broker.base import VenuePosition, VenueSignal
from backtest_kit.broker.order_ids import OrderId, parse
from backtest_kit.venue.account import ZERO, FuturesAccount
from backtest_kit.venue.exchange import Exchange
from backtest_kit.venue.orders import VenueOrder


def holding_of(exchange: Exchange, account_name: str, symbol: str) -> VenuePosition | None:
    """Of a future the whole position, of a spot market what orders of brokers bought; None if that is nothing."""
    orders = exchange.open_orders(account_name, symbol)
    groups = exchange.groups(account_name, symbol)
    account = exchange.account(account_name)
    future = isinstance(account, FuturesAccount)
    held = exchange.held(account_name, symbol) if future else sum(groups.values(), ZERO)
    ours = {order_id: order for order in orders if (order_id := _signal_of(order)) is not None}
    if not held and not ours:
        return None
    signals: dict[tuple[str, str], VenueSignal] = {}
    for order_id in [*(each for name in groups if (each := parse(name)) is not None), *ours]:
        key = order_id.store_id, order_id.digest
        mine = [order for each, order in ours.items() if (each.store_id, each.digest) == key]
        quantity = sum((abs(part) for name, part in groups.items() if _is_of(name, key)), ZERO)
        signals[key] = VenueSignal(
            store_id=order_id.store_id,
            digest=order_id.digest,
            quantity=float(quantity),
            stop_loss=_stop(mine),
            client_order_ids=tuple(order.client_order_id for order in mine),
        )
    price = float(account.position(symbol).price_open) if isinstance(account, FuturesAccount) and held else None
    return VenuePosition(
        symbol=symbol,
        direction="long" if held >= 0 else "short",
        quantity=float(abs(held)),
        price_open=price,
        stop_loss=_stop(orders),
        client_order_ids=tuple(order.client_order_id for order in orders),
        signals=tuple(sorted(signals.values(), key=lambda each: -each.quantity)),
    )


def _signal_of(order: VenueOrder) -> OrderId | None:
    return parse(order.client_order_id) or parse(order.group)


def _is_of(group: str, key: tuple[str, str]) -> bool:
    order_id = parse(group)
    return order_id is not None and (order_id.store_id, order_id.digest) == key


def _stop(orders: list[VenueOrder]) -> float | None:
    return next((float(each.trigger) for each in orders if each.trigger is not None and each.type == "stop"), None)
