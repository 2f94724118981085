"""The actual size of a position on an exchange, and the fill that closed it: read from its own orders.

Only its client id assigns an order to a position: coins and orders of other strategies, or of the owner of the
account, are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, Final, Literal

import msgspec

from backtest_kit.broker.base import Fill, OrderDeleted
from backtest_kit.broker.ccxt_market import ExchangeOrder, Market, Stake
from backtest_kit.broker.ccxt_venue import CcxtVenue
from backtest_kit.broker.order_ids import ADD, CLOSE, ENTRY, EXIT, STOP, parse
from backtest_kit.broker.rounding import exact
from backtest_kit.model.position import Position

_CLOSE_ENOUGH: Final = Decimal("0.02")
"""Fees in base currency and lots keep the actual quantity below the model by less than this share."""
_CLOSES: Final = (STOP, CLOSE, EXIT)
_ENTERS: Final = (ENTRY, ADD)
_LISTED_AFTER_MS: Final = 60_000
"""Lists of orders lag behind the book; the orders of trades older than this are listed."""


def model_quantity(position: Position) -> Decimal:
    """The quantity in base currency after all fills that the engine knows."""
    quantity = Decimal(0)
    taken = 0
    for reduction in position.reductions:
        quantity += _bought(position, taken, reduction.entry_count)
        taken = reduction.entry_count
        quantity *= 1 - exact(reduction.percent) / 100
    return quantity + _bought(position, taken, len(position.entries))


def _bought(position: Position, first: int, stop: int) -> Decimal:
    return sum((exact(entry.cost) / exact(entry.price) for entry in position.entries[first:stop]), Decimal(0))


def agrees(market: Market, held: Decimal, model: Decimal) -> bool:
    """Whether `held` equals the model, but for fees and lots."""
    return abs(model - held) <= max(model * _CLOSE_ENOUGH, market.lot)


class Account:
    def __init__(self, venue: CcxtVenue) -> None:
        self._venue = venue

    async def held(
        self,
        stake: Stake,
        live: Sequence[ExchangeOrder] = (),
        *,
        model: Decimal | None = None,
        recent: Sequence[ExchangeOrder] = (),
    ) -> Decimal:
        """The size of the position in base currency: of a future as reported, on a spot market what its own orders
        bought and did not sell, at most the balance.

        Args:
            live: its live stops. If they agree with `model`, their quantity is the answer: they lock the balance.
            recent: new orders, which the exchange may not list yet.
        """
        market = stake.market
        if market.contract:
            exposure = (await self._venue.exposures([market.symbol])).get(market.symbol)
            return exposure.quantity if exposure and exposure.direction == stake.direction else Decimal(0)
        protected = sum((stop.remaining for stop in live), Decimal(0))
        if protected and model is not None and agrees(market, protected, model):
            return protected
        orders = _of(stake, await self._listed(stake, recent))
        left = Decimal(0)
        for order, kind in orders:
            left += await self._venue.received(market, order) if kind in _ENTERS else -order.filled
        return min(left, (await self._venue.balance(market.base))[1]) if left > 0 else Decimal(0)

    async def closing_fill(
        self, stake: Stake, *, recent: Sequence[ExchangeOrder] = (), position: Position | None = None
    ) -> Fill:
        """The fill that closed a position.

        Args:
            recent: new orders, which the exchange may not list yet.
            position: the position, for the time and quantity of the fills; an adopted position has no own entry.

        Raises:
            OrderDeleted: no order and no trade explains it.
        """
        listed = await self._listed(stake, recent, position)
        orders = _of(stake, listed)
        exits = [(order, kind) for order, kind in orders if order.filled and kind in _CLOSES]
        if exits:
            stopped = any(kind == STOP for _, kind in exits)
            fill = await self._venue.executed(stake.market, [order for order, _ in exits])
            return msgspec.structs.replace(fill, reason="stop_loss" if stopped else "closed")
        by_hand = await self._closed_by_hand(stake, orders, listed, position)
        if by_hand is None:
            raise OrderDeleted(
                f"{stake.market.symbol}: the position is gone, and neither an order nor a trade after the entry of "
                f"{stake.ids.signal_id} explains it: it was closed or withdrawn outside of this program"
            )
        return by_hand

    async def _listed(
        self, stake: Stake, recent: Sequence[ExchangeOrder] = (), position: Position | None = None
    ) -> list[ExchangeOrder]:
        """All orders on the market since the position's entry; none if neither that nor `position` is known."""
        market = stake.market
        entry = await self._venue.order(market, stake.ids.entry)
        if entry is not None:
            since_ms, recent = entry.timestamp, (entry, *recent)
        elif position is not None:
            since_ms = position.opened_at_ms
        else:
            return []
        listed = {order.id: order for order in await self._venue.orders_since(market, since_ms)}
        listed |= {order.id: order for order in recent}
        for order_id in await self._unlisted(stake, listed, since_ms):
            order = await self._venue.order_by_id(market, order_id)
            listed[order.id] = order
        return list(listed.values())

    async def _unlisted(self, stake: Stake, listed: dict[str, ExchangeOrder], since_ms: int) -> set[str]:
        """Orders that have just traded and are not listed yet."""
        recent_ms = max(since_ms, self._venue.now_ms() - _LISTED_AFTER_MS)
        trades = await self._venue.trades_since(stake.market, recent_ms)
        return {str(trade["order"]) for trade in trades if trade.get("order")} - set(listed)

    async def _closed_by_hand(
        self,
        stake: Stake,
        orders: Sequence[tuple[ExchangeOrder, str]],
        listed: Sequence[ExchangeOrder],
        position: Position | None,
    ) -> Fill | None:
        ours = {order.id for order in listed if parse(order.client_id) is not None}
        left = sum((order.filled if kind in _ENTERS else -order.filled for order, kind in orders), Decimal(0))
        if any(kind == ENTRY for _, kind in orders):
            since_ms = orders[0][0].timestamp
        elif position is not None:
            since_ms, left = position.opened_at_ms, model_quantity(position)
        else:
            return None
        quantity = cost = Decimal(0)
        timestamp = 0
        trades: list[dict[str, Any]] = await self._venue.trades_since(stake.market, since_ms)
        for trade in reversed(trades):
            if str(trade.get("order")) in ours or trade["side"] != stake.exit_side or quantity >= left:
                continue
            part = min(exact(trade["amount"]) * stake.market.contract_size, left - quantity)
            quantity += part
            cost += part * exact(trade["price"])
            timestamp = max(timestamp, int(trade["timestamp"]))
        if not quantity:
            return None
        price = float(cost / quantity)
        return Fill(price=price, cost=float(cost), quantity=float(quantity), timestamp=timestamp, reason="closed")


def _of(stake: Stake, listed: Iterable[ExchangeOrder]) -> list[tuple[ExchangeOrder, str]]:
    """The orders of the position with their kinds, oldest first."""
    ours = [(order, kind) for order in listed if (kind := stake.ids.kind(order.client_id)) is not None]
    return sorted(ours, key=lambda each: each[0].timestamp)


def status_of(
    orders: Iterable[ExchangeOrder],
) -> Literal["resting", "partly_filled", "filled", "cancelled", "rejected"]:
    """The status of the orders that carry out one order of the engine."""
    orders = list(orders)
    filled = any(order.filled for order in orders)
    if any(order.open for order in orders):
        return "partly_filled" if filled else "resting"
    if filled:
        return "filled"
    return "rejected" if any(order.rejected for order in orders) else "cancelled"
