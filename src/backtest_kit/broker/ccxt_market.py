"""One market of an exchange: its ticks, lots and limits; and an order as the exchange reports it."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Literal

import msgspec

from backtest_kit.broker.order_ids import SignalIds
from backtest_kit.broker.rounding import exact, lots, price_above, price_below, significant_tick
from backtest_kit.errors import UserError
from backtest_kit.model.signal import Direction

Side = Literal["buy", "sell"]


class Market(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a market. Quantities are in base currency."""

    symbol: str
    """As in ccxt."""
    base: str
    quote: str
    """The currency to pay with: of a future, its settlement currency."""
    contract: bool
    contract_size: Decimal
    lot: Decimal
    tick: Decimal | None
    """None if prices have a number of significant digits instead."""
    price_digits: int = 0
    min_quantity: Decimal
    min_cost: Decimal
    market_stop: bool
    """Whether a stop may become a market order; otherwise it becomes a limit order a little beyond its trigger."""
    largest: Decimal | None = None
    """Quantity of one order. Here and below None means no limit."""
    largest_at_market: Decimal | None = None
    max_cost: Decimal | None = None
    """Quote currency of one order with a limit price."""
    max_cost_at_market: Decimal | None = None
    min_price: Decimal | None = None
    """Of limits and triggers."""
    max_price: Decimal | None = None
    sell_floor: Decimal | None = None
    """Part of the current price below which no sale may be limited."""
    buy_cap: Decimal | None = None
    """Multiple of the current price above which no purchase may be limited."""
    max_stops: int | None = None
    """Conditional orders of the account on this market that may be open."""
    max_orders: int | None = None

    def lots(self, quantity: Decimal) -> Decimal:
        """`quantity` in whole lots, rounded down."""
        return lots(quantity, self.lot)

    def price_for(self, side: Side, price: Decimal, *, at_worst: bool = True) -> Decimal:
        """`price` in whole ticks. With `at_worst` never worse than `price`, otherwise sure to be reached."""
        down = (side == "buy") is at_worst
        tick = self.tick if self.tick is not None else significant_tick(price, self.price_digits)
        return price_below(price, tick) if down else price_above(price, tick)

    def stop_trigger(self, direction: Direction, price: float) -> Decimal:
        """The trigger of a stop at `price`: the tick at which it protects rather too early than too late."""
        return self.price_for("sell" if direction == "long" else "buy", exact(price))

    def too_small(self, quantity: Decimal, price: float) -> str:
        """Why the exchange would reject an order of `quantity`; empty if it would not."""
        if quantity < self.min_quantity or quantity <= 0:
            least = max(self.min_quantity, self.lot)
            return f"{quantity:f} {self.base} is below the smallest quantity, {least:f}"
        if quantity * exact(price) < self.min_cost:
            worth = f"{quantity:f} {self.base} are worth {quantity * exact(price):.2f} {self.quote}"
            return f"{worth}, and the least is {self.min_cost:f}"
        return ""

    def largest_order(self, price: float | Decimal, *, at_market: bool) -> Decimal | None:
        """The largest quantity of one order at `price`; None without a limit."""
        cost = self.max_cost_at_market if at_market else self.max_cost
        bounds = [self.largest, self.largest_at_market if at_market else None, cost and cost / exact(price)]
        known = [self.lots(bound) for bound in bounds if bound is not None]
        return min(known, default=None)

    def parts(self, quantity: Decimal, price: float | Decimal, *, at_market: bool) -> list[Decimal]:
        """`quantity` in whole lots, split into orders of an exit at `price`: of the largest size, and the rest. The
        same quantity is always split the same way."""
        whole, largest = self.lots(quantity), self.largest_order(price, at_market=at_market)
        if largest is None or largest <= 0 or whole <= largest:
            return [whole] if whole > 0 else []
        count, rest = divmod(whole, largest)
        sizes = [largest] * int(count) + ([rest] if rest else [])
        if rest and self.unsellable(rest, float(price)):
            half = self.lots((largest + rest) / 2)
            sizes[-2:] = [largest + rest - half, half]
        return sizes

    def outside(self, price: Decimal) -> str:
        """The bound that `price` violates as a limit or a trigger; empty if none."""
        low, high = self.min_price, self.max_price
        if low is not None and price < low:
            return f"the lowest price is {low:f}"
        return f"the highest price is {high:f}" if high is not None and price > high else ""

    def too_far(self, side: Side, limit: Decimal, price: float) -> str:
        """The bound that `limit` violates while the market is at `price`; empty if none."""
        if side == "sell" and self.sell_floor is not None and limit < self.sell_floor * exact(price):
            return f"the lowest limit of a sale is {self.sell_floor * exact(price):f} now"
        if side == "buy" and self.buy_cap is not None and limit > self.buy_cap * exact(price):
            return f"the highest limit of a purchase is {self.buy_cap * exact(price):f} now"
        return ""

    def unsellable(self, quantity: Decimal, price: float) -> str:
        """Why an exit of `quantity` would be rejected; empty if it would not. Closing a future has no minimum value."""
        return self.too_small(self.lots(quantity), float("inf") if self.contract else price)


class ExchangeOrder(msgspec.Struct, frozen=True, kw_only=True):
    """An order on the exchange. Quantities are in base currency."""

    id: str
    client_id: str | None
    side: str
    open: bool
    rejected: bool
    quantity: Decimal
    filled: Decimal
    average: Decimal | None
    trigger: Decimal | None
    timestamp: int
    conditional: bool
    """Whether it is in the book of conditional orders, which some exchanges keep apart."""
    spawned: str | None = None
    """The id of the order that a conditional one became when it was triggered."""
    fees: tuple[tuple[str, Decimal], ...] | None = None
    """Currency and amount; None if not reported."""

    @property
    def remaining(self) -> Decimal:
        return self.quantity - self.filled


class Stake(msgspec.Struct, frozen=True):
    """A position on the exchange: a market, a side, and the client ids of its orders."""

    market: Market
    ids: SignalIds
    direction: Direction

    @property
    def entry_side(self) -> Side:
        """The side of entries."""
        return "buy" if self.direction == "long" else "sell"

    @property
    def exit_side(self) -> Side:
        return exit_side(self.direction)


def exit_side(direction: Direction) -> Side:
    return "sell" if direction == "long" else "buy"


def read_market(
    raw: dict[str, Any], precision_mode: int, digits: tuple[int, int, int], *, market_stop: bool = True
) -> Market:
    """A market out of ccxt's description; `digits` are its modes (decimal places, significant digits, tick size).

    Raises:
        UserError: the engine cannot trade it: an inverse contract or an option.
    """
    contract = bool(raw.get("contract"))
    if contract and (not raw.get("linear") or raw.get("option")):
        raise UserError(
            f"{raw['symbol']} is not a linear future: trade spot or contracts that settle in quote currency"
        )
    places, significant, _ = digits
    size = exact(raw.get("contractSize") or 1) if contract else Decimal(1)
    precision, limits = raw.get("precision") or {}, raw.get("limits") or {}

    def step(kind: str) -> Decimal:
        value = precision.get(kind)
        if value is None:
            return Decimal("1e-8")
        return Decimal(1).scaleb(-int(value)) if precision_mode in (places, significant) else exact(value)

    def limit(kind: str, side: str) -> Decimal | None:
        # Binance writes 0 for no limit.
        value = (limits.get(kind) or {}).get(side)
        return exact(value) if value else None

    def quantity(kind: str, side: str) -> Decimal | None:
        value = limit(kind, side)
        return value and value * size

    by_digits = precision_mode == significant
    filters = _filters(raw.get("info") or {})
    bounds = filters.get("NOTIONAL") or {}
    max_cost = limit("cost", "max")
    return Market(
        symbol=raw["symbol"],
        base=raw["base"],
        quote=raw["settle"] if contract else raw["quote"],
        contract=contract,
        contract_size=size,
        lot=step("amount") * size,
        tick=None if by_digits else step("price"),
        price_digits=int(precision.get("price") or 8) if by_digits else 0,
        min_quantity=max(quantity("amount", "min") or Decimal(0), quantity("market", "min") or Decimal(0)),
        min_cost=limit("cost", "min") or Decimal(0),
        market_stop=market_stop,
        largest=quantity("amount", "max"),
        largest_at_market=quantity("market", "max"),
        max_cost=max_cost,
        max_cost_at_market=max_cost if bounds.get("applyMaxToMarket", True) else None,
        min_price=limit("price", "min"),
        max_price=limit("price", "max"),
        sell_floor=_number(filters, "PERCENT_PRICE_BY_SIDE.askMultiplierDown", "PERCENT_PRICE.multiplierDown"),
        buy_cap=_number(filters, "PERCENT_PRICE_BY_SIDE.bidMultiplierUp", "PERCENT_PRICE.multiplierUp"),
        max_stops=_count(filters, "MAX_NUM_ALGO_ORDERS.maxNumAlgoOrders", "MAX_NUM_ALGO_ORDERS.limit"),
        max_orders=_count(filters, "MAX_NUM_ORDERS.maxNumOrders", "MAX_NUM_ORDERS.limit"),
    )


def _filters(info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Binance's filters that ccxt does not translate."""
    found = info.get("filters")
    return {str(each.get("filterType")): each for each in found} if isinstance(found, list) else {}


def _number(filters: dict[str, dict[str, Any]], *paths: str) -> Decimal | None:
    """The first existing `FILTER.field`; None if there is none, or if it is switched off by a 0."""
    for path in paths:
        name, _, field = path.partition(".")
        value = filters.get(name, {}).get(field)
        if value is not None and exact(value):
            return exact(value)
    return None


def _count(filters: dict[str, dict[str, Any]], *paths: str) -> int | None:
    value = _number(filters, *paths)
    return None if value is None else int(value)


def read_order(raw: dict[str, Any], market: Market, *, conditional: bool = False) -> ExchangeOrder:
    """An order out of ccxt's report."""
    info = raw.get("info") or {}
    filled = exact(raw.get("filled") or 0) * market.contract_size
    cost = exact(raw.get("cost") or 0)
    average = raw.get("average")
    fees = [fee for fee in (raw.get("fees") or []) if fee and fee.get("currency") and fee.get("cost") is not None]
    spawned = info.get("actualOrderId")
    status = raw.get("status")
    return ExchangeOrder(
        id=str(raw["id"]),
        # Binance answers a cancellation with the id of the cancellation and the order's own.
        client_id=info.get("origClientOrderId") or raw.get("clientOrderId"),
        side=str(raw.get("side") or ""),
        open=status in ("open", None),
        rejected=status == "rejected",
        quantity=exact(raw.get("amount") or 0) * market.contract_size,
        filled=filled,
        average=exact(average) if average else cost / filled if filled and cost else None,
        trigger=exact(raw["triggerPrice"]) if raw.get("triggerPrice") else None,
        timestamp=int(raw.get("timestamp") or 0),
        conditional=conditional,
        spawned=str(spawned) if spawned and str(spawned) != "0" else None,
        fees=tuple((str(fee["currency"]), exact(fee["cost"])) for fee in fees) or None,
    )
