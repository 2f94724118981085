"""Markets, orders, fills and refusals of the simulated exchange."""

from __future__ import annotations

import math
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, ROUND_UP, Decimal
from typing import Final, Literal

import msgspec

from backtest_kit.errors import BacktestKitError, UserError

Kind = Literal["spot", "futures"]
Side = Literal["buy", "sell"]
OrderType = Literal["market", "limit", "stop", "stop_limit", "take", "take_limit", "reference"]
"""`stop` and `take` become market orders at their trigger, `stop_limit` and `take_limit` limit orders. A
`reference` order never meets the market: it rests until it is filled at a given price."""
OrderStatus = Literal["new", "partly_filled", "filled", "cancelled", "expired"]
Reason = Literal[
    "unknown_symbol",
    "price_step",
    "quantity_step",
    "min_notional",
    "max_quantity",
    "max_market_quantity",
    "max_notional",
    "price_range",
    "price_above_band",
    "price_below_band",
    "max_stops",
    "max_orders",
    "no_funds",
    "duplicate_id",
    "would_trigger",
    "would_match",
    "nothing_to_reduce",
    "unknown_order",
    "not_open",
    "rejected",
    "invalid",
]

TRIGGERED: Final = frozenset({"stop", "stop_limit", "take", "take_limit"})
LIMITED: Final = frozenset({"limit", "stop_limit", "take_limit"})
_QUOTES: Final = ("USDT", "USDC", "FDUSD", "BUSD", "USD", "EUR", "BTC", "ETH")


class Refused(BacktestKitError):
    """The exchange refuses the request, and nothing has changed."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a market; None means no limit."""

    max_quantity: Decimal | None = None
    """Of any order, in base currency."""
    max_market_quantity: Decimal | None = None
    """Of a market order, and of a stop or take that becomes one."""
    max_notional: Decimal | None = None
    """Price times quantity of an order with a limit price, in quote currency."""
    min_price: Decimal | None = None
    """Of limits and triggers."""
    max_price: Decimal | None = None
    price_band: tuple[Decimal, Decimal] | None = None
    """Multiples of the current price between which a limit price must be."""
    max_stops: int | None = None
    """Open stop and take orders of an account on the symbol."""
    max_orders: int | None = None
    """Open orders of an account on the symbol."""


class Market(msgspec.Struct, frozen=True, kw_only=True):
    """What can be traded, and in which steps."""

    symbol: str
    base: str
    quote: str
    tick_size: Decimal
    """Step of prices."""
    lot_size: Decimal
    """Step of quantities, and the smallest one."""
    min_notional: Decimal = Decimal(5)
    """Smallest price times quantity."""
    limits: Limits = Limits()

    @classmethod
    def of(cls, symbol: str, price: float, limits: Limits | None = None) -> Market:
        """A market with the steps and limits that are usual at `price`: BTCUSDT at 50,000 moves by 0.01 and 0.00001,
        and takes market orders of up to 120 BTC.

        Args:
            limits: other ones than usual.

        Raises:
            UserError: the symbol does not end with a known quote currency.
        """
        quote = next((each for each in _QUOTES if symbol.endswith(each) and symbol != each), None)
        if quote is None:
            raise UserError(f"symbol is {symbol!r}: write it as the exchange does, base before {', '.join(_QUOTES)}")
        magnitude = math.floor(math.log10(price))
        tick, lot = Decimal(1).scaleb(magnitude - 6), Decimal(1).scaleb(min(0, -magnitude - 1))
        usual = Limits(
            max_quantity=900_000_000 * lot,
            max_market_quantity=12_000_000 * lot,
            max_notional=Decimal(9_000_000),
            min_price=tick,
            max_price=1_000_000_000 * tick,
            price_band=(Decimal("0.2"), Decimal(5)),
            max_stops=5,
            max_orders=200,
        )
        return cls(
            symbol=symbol,
            base=symbol.removesuffix(quote),
            quote=quote,
            tick_size=tick,
            lot_size=lot,
            limits=usual if limits is None else limits,
        )

    def round_price(self, price: Decimal, side: Side | None = None) -> Decimal:
        """To a tick: the nearest, or for `side` the next worse one."""
        rounding = ROUND_HALF_EVEN if side is None else ROUND_UP if side == "buy" else ROUND_DOWN
        return (price / self.tick_size).quantize(Decimal(1), rounding) * self.tick_size

    def round_quantity(self, quantity: Decimal) -> Decimal:
        """To a lot, down."""
        return (quantity / self.lot_size).quantize(Decimal(1), ROUND_DOWN) * self.lot_size


class NewOrder(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An order as sent."""

    symbol: str
    side: Side
    type: OrderType
    client_order_id: str
    quantity: Decimal | None = None
    """In base currency. None takes `cost`, or for a closing order the whole position."""
    cost: Decimal | None = None
    """In quote currency, for market orders: as many lots as it buys."""
    price: Decimal | None = None
    """Limit, or the price of a reference order."""
    trigger: Decimal | None = None
    reduce_only: bool = False
    """Never opens or reverses a position: the excess is ignored."""
    post_only: bool = False
    """Refused if it would not rest."""
    immediate: bool = False
    """The part that cannot be filled immediately expires."""
    group: str = ""
    """The orders of one position. A reducing order takes no more than its group holds."""
    protects: bool = False
    """Expires as soon as its group holds nothing."""


class VenueOrder(msgspec.Struct, kw_only=True):
    """An order on the exchange."""

    id: int
    account: str
    symbol: str
    side: Side
    type: OrderType
    client_order_id: str
    quantity: Decimal | None
    """None until the quantity to close is known."""
    price: Decimal | None
    trigger: Decimal | None
    reduce_only: bool
    group: str
    protects: bool
    status: OrderStatus = "new"
    triggered: bool = False
    filled: Decimal = Decimal(0)
    filled_cost: Decimal = Decimal(0)
    """In quote currency, without fees."""
    fee: Decimal = Decimal(0)
    """In quote currency."""
    fee_in_base: Decimal = Decimal(0)
    """The part of the fee that was taken in the purchased base currency."""
    reserved: Decimal = Decimal(0)
    """Of the account: quote currency for what buys, base currency for what sells; margin on futures."""
    created_ms: int
    updated_ms: int

    @property
    def is_open(self) -> bool:
        return self.status in ("new", "partly_filled")

    @property
    def remaining(self) -> Decimal:
        return Decimal(0) if self.quantity is None else self.quantity - self.filled

    @property
    def average_price(self) -> Decimal:
        return self.filled_cost / self.filled if self.filled else Decimal(0)


class VenueFill(msgspec.Struct, frozen=True, kw_only=True):
    """One trade of an order."""

    id: int
    order_id: int
    account: str
    client_order_id: str
    symbol: str
    side: Side
    price: Decimal
    quantity: Decimal
    fee: Decimal
    fee_asset: str
    realized: Decimal
    """Realized profit, in quote currency; 0 on spot."""
    maker: bool
    time_ms: int
