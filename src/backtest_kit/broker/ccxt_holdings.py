"""The holdings of an account on a market, assigned to signals by the client ids of the orders.

A future has one position for all orders, and all of it counts. On a spot market a balance may be the owner's savings:
only what orders of this program bought and did not sell again counts, and their open orders.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Final

import msgspec

from backtest_kit.broker.base import VenuePosition, VenueSignal
from backtest_kit.broker.ccxt_market import ExchangeOrder, Market, exit_side
from backtest_kit.broker.ccxt_venue import CcxtVenue, Exposure
from backtest_kit.broker.order_ids import ADD, ENTRY, STOP, OrderId, parse
from backtest_kit.model.signal import Direction

_LOST_TO_FEES: Final = Decimal("0.02")
"""The largest share that fees take: they are taken in base currency, and lists of orders do not show them."""
_NOTHING: Final = Decimal(0)


class Bought(msgspec.Struct, kw_only=True):
    """What the orders of one signal bought on a spot market and did not sell again."""

    total: Decimal = _NOTHING
    cost: Decimal = _NOTHING
    left: Decimal = _NOTHING
    last_ms: int = 0
    """The time of the last purchase."""

    @property
    def price(self) -> float | None:
        """Average purchase price."""
        return float(self.cost / self.total) if self.total and self.cost else None


SignalKey = tuple[str, str]
"""Store id and digest of a signal."""


def _key(order: ExchangeOrder) -> SignalKey | None:
    order_id = parse(order.client_id)
    return None if order_id is None else (order_id.store_id, order_id.digest)


def bought(market: Market, orders: Iterable[ExchangeOrder]) -> dict[SignalKey, Bought]:
    """What is left of the purchases of each signal, by store id and digest, without dust.

    A manual sale after a purchase reduces it, the oldest purchase first: closing by hand is one of the ways out.
    """
    orders = sorted(orders, key=lambda order: order.timestamp)
    found: dict[SignalKey, Bought] = {}
    by_hand: list[ExchangeOrder] = []
    for order in orders:
        order_id = parse(order.client_id)
        if not order.filled:
            continue
        if order_id is None:
            by_hand += [order] if order.side == "sell" else []
            continue
        signal = found.setdefault((order_id.store_id, order_id.digest), Bought())
        if order_id.kind in (ENTRY, ADD):
            signal.total += order.filled
            signal.left += order.filled
            signal.cost += order.filled * (order.average or _NOTHING)
            signal.last_ms = max(signal.last_ms, order.timestamp)
        else:
            signal.left -= order.filled
    for sale in by_hand:
        quantity = sale.filled
        for signal in found.values():
            if signal.last_ms <= sale.timestamp and signal.left > 0:
                part = min(quantity, signal.left)
                signal.left, quantity = signal.left - part, quantity - part
    return {key: signal for key, signal in found.items() if _counts(market, signal)}


def _counts(market: Market, signal: Bought) -> bool:
    """Whether the rest could be sold, even after the highest fees."""
    sure = signal.left - signal.total * _LOST_TO_FEES
    return not market.unsellable(sure, signal.price or float("inf"))


class Holdings:
    """Reads the holdings of an account."""

    def __init__(self, venue: CcxtVenue) -> None:
        self._venue = venue

    async def of(self, symbol: str, market: Market) -> VenuePosition | None:
        """The holdings on one market; None if there are none.

        Takes two requests on a spot market, a third one for coins that no live stop locks, and three on a future: the
        position and both books of open orders.

        Raises:
            OrderTransient: the exchange does not answer.
        """
        if market.contract:
            exposure = (await self._venue.exposures([market.symbol])).get(market.symbol)
            return _position(symbol, exposure, await self._venue.open_orders(market), {})
        # Open orders first: an order that is filled between the two requests is then in the second list, or in both.
        orders = await self._venue.open_orders(market)
        latest = await self._venue.latest_orders(market)
        held = bought(market, {order.id: order for order in [*orders, *latest]}.values())
        held = await self._really(market, held, orders)
        exposure = Exposure("long", sum((each.left for each in held.values()), _NOTHING), None)
        return _position(symbol, exposure, orders, held)

    async def _really(
        self, market: Market, held: dict[SignalKey, Bought], orders: Sequence[ExchangeOrder]
    ) -> dict[SignalKey, Bought]:
        """`held`, limited by the balance. Coins that a stop locks are there, even if their purchase is not listed any
        more; others may have been withdrawn."""
        locked: dict[SignalKey, Decimal] = {}
        for order in orders:
            if order.side == "sell" and (key := _key(order)) is not None:
                locked[key] = locked.get(key, _NOTHING) + order.remaining
        loose = []
        for key in {**held, **locked}:
            each, sure = held.setdefault(key, Bought()), locked.get(key, _NOTHING)
            # A stop that differs by fees alone covers all of it, and shows what is left after fees.
            if each.left - sure > each.total * _LOST_TO_FEES:
                loose.append(each)
            else:
                each.left = sure
        if loose:
            free = (await self._venue.balance(market.base))[1] - sum(locked.values(), _NOTHING)
            for each in loose:
                each.left = max(_NOTHING, min(each.left, free))
                free -= each.left
        return {key: each for key, each in held.items() if _counts(market, each)}


def _position(
    symbol: str, exposure: Exposure | None, orders: Sequence[ExchangeOrder], held: dict[SignalKey, Bought]
) -> VenuePosition | None:
    ours = [(order, order_id) for order in orders if (order_id := parse(order.client_id)) is not None]
    stops = [(order, order_id) for order, order_id in ours if order_id.kind == STOP and order.trigger is not None]
    nothing = exposure is None or not exposure.quantity
    if nothing and not ours:
        return None
    if exposure is None:
        direction: Direction = "short" if any(order.side == "buy" for order, _ in stops) else "long"
        exposure = Exposure(direction, _NOTHING, None)
    guards = [(order, order_id) for order, order_id in stops if order.side == exit_side(exposure.direction)]
    keys = dict.fromkeys([*held, *((order_id.store_id, order_id.digest) for _, order_id in ours)])
    signals = [_signal(key, held.get(key), ours, guards, exposure.direction) for key in keys]
    signals.sort(key=lambda each: -each.quantity)
    price = exposure.price_open
    if len(held) == 1:
        price = next(iter(held.values())).price
    naked = any(each.quantity and each.stop_loss is None for each in signals)
    return VenuePosition(
        symbol=symbol,
        direction=exposure.direction,
        quantity=float(exposure.quantity),
        price_open=price,
        stop_loss=None if naked else _nearest(guards, exposure.direction),
        client_order_ids=tuple(order.client_id for order in orders if order.client_id),
        signals=tuple(signals),
    )


def _signal(
    key: SignalKey,
    held: Bought | None,
    ours: Sequence[tuple[ExchangeOrder, OrderId]],
    guards: Sequence[tuple[ExchangeOrder, OrderId]],
    direction: Direction,
) -> VenueSignal:
    mine = [order for order, order_id in ours if (order_id.store_id, order_id.digest) == key]
    return VenueSignal(
        store_id=key[0],
        digest=key[1],
        quantity=0.0 if held is None else float(held.left),
        price_open=None if held is None else held.price,
        stop_loss=_nearest([each for each in guards if each[0] in mine], direction),
        client_order_ids=tuple(order.client_id for order in mine if order.client_id),
    )


def _nearest(guards: Sequence[tuple[ExchangeOrder, OrderId]], direction: Direction) -> float | None:
    """The trigger that is reached first."""
    triggers = [float(order.trigger or 0) for order, _ in guards]
    return (max if direction == "long" else min)(triggers) if triggers else None
