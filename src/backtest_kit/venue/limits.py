"""The limits of orders on a market of the simulated exchange."""

from __future__ import annotations

from collections.abc import Collection
from decimal import Decimal

from backtest_kit.venue.orders import LIMITED, TRIGGERED, Limits, Reason, Refused, VenueOrder


def check_limits(order: VenueOrder, limits: Limits, price: Decimal, open_orders: Collection[VenueOrder]) -> None:
    """Refuse an order that is outside of `limits`.

    Args:
        price: of the market now.
        open_orders: of the account on the symbol.

    Raises:
        Refused: with the limit and the value.
    """
    _check_size(order, limits)
    _check_prices(order, limits, price)
    # Orders of a group come from this exchange's own interface, which takes any number of them.
    if not order.group and order.type != "market":
        _check_count(order, limits, open_orders)


def _check_size(order: VenueOrder, limits: Limits) -> None:
    quantity = order.quantity or Decimal(0)
    sizes: list[tuple[Reason, Decimal, Decimal | None]] = [("max_quantity", quantity, limits.max_quantity)]
    if order.type not in LIMITED:
        sizes.append(("max_market_quantity", quantity, limits.max_market_quantity))
    if order.price is not None:
        sizes.append(("max_notional", quantity * order.price, limits.max_notional))
    for reason, size, most in sizes:
        if most is not None and size > most:
            raise Refused(reason, f"{order.client_order_id} is of {size:f}: {order.symbol} takes {most:f} at most")


def _check_prices(order: VenueOrder, limits: Limits, price: Decimal) -> None:
    lowest, highest = limits.min_price or Decimal(0), limits.max_price or Decimal("Infinity")
    for name, value in (("price", order.price), ("trigger", order.trigger)):
        if value is not None and not lowest <= value <= highest:
            raise Refused("price_range", f"{name} is {value:f}: {order.symbol} takes {lowest:f} to {highest:f}")
    if order.price is None or limits.price_band is None:
        return
    low, high = (price * multiple for multiple in limits.price_band)
    if not low <= order.price <= high:
        reason: Reason = "price_above_band" if order.price > high else "price_below_band"
        raise Refused(reason, f"price is {order.price:f}: {order.symbol} takes {low:f} to {high:f} now")


def _check_count(order: VenueOrder, limits: Limits, open_orders: Collection[VenueOrder]) -> None:
    stops = sum(other.type in TRIGGERED for other in open_orders)
    if order.type in TRIGGERED and limits.max_stops is not None and stops >= limits.max_stops:
        raise Refused("max_stops", f"{order.account} has {stops} stops and takes open on {order.symbol} already")
    if limits.max_orders is not None and len(open_orders) >= limits.max_orders:
        raise Refused("max_orders", f"{order.account} has {len(open_orders)} orders open on {order.symbol} already")
