"""`Exchange`: matches orders against minutes. No I/O, no clock, no randomness: the same calls give the same results.

The price of a symbol inside a minute is the previous close.

- A market order is filled immediately, at the price after slippage; so is a limit order that the price has already
  reached, at no worse than its limit.
- Resting orders meet the whole range of each minute when it closes, including the minute in which they were placed:
  a touched limit order is filled at its limit; a stop or take that is hit becomes a market order at its trigger, or at
  the open if the minute opened beyond it. Stops come first, then takes, then the others, each by age.
- After a partial fill, the rest stays open for the following minutes.
- A protective order is inactive until its group has a position, and expires when that is closed.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import Final, Literal

import msgspec

from backtest_kit.venue.account import ZERO, FuturesAccount, SpotAccount
from backtest_kit.venue.limits import check_limits
from backtest_kit.venue.orders import (
    LIMITED,
    TRIGGERED,
    Kind,
    Limits,
    Market,
    NewOrder,
    OrderStatus,
    Refused,
    Side,
    VenueFill,
    VenueOrder,
)

ClientIds = Literal["open", "ever"]
_RANK: Final = {"stop": 0, "stop_limit": 0, "take": 1, "take_limit": 1}


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Fees, slippage and depth of the market."""

    taker_fee_pct: Decimal = Decimal("0.1")
    maker_fee_pct: Decimal = Decimal("0.1")
    slippage_pct: Decimal = Decimal("0.01")
    fill_fraction: Decimal = Decimal(1)
    """The part of an order that is filled each time it meets the market."""
    fees_in: Literal["received", "quote"] = "received"
    """Currency of fees on spot; with `received`, a purchase yields less than was ordered."""
    client_ids: ClientIds = "open"
    """How long a client order id stays in use: while its order is `open`, as on Binance, where an order that is sent
    twice can be filled twice; or for `ever`."""
    balance: Decimal = Decimal(100_000)
    """Quote currency that an account begins with."""
    limits: Limits | None = None
    """The limits of each market; None takes usual ones for its price."""


class ClosedMinute(msgspec.Struct, frozen=True):
    """A minute that has closed."""

    open_ms: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal


class Exchange:
    """The orders and accounts of one kind of market.

    An account is created by its first order. `now_ms` is set by the venue.
    """

    def __init__(self, kind: Kind, markets: Iterable[Market], terms: Terms) -> None:
        self.kind = kind
        self.terms = terms
        self.markets = {market.symbol: market for market in markets}
        self.prices: dict[str, Decimal] = {}
        self.now_ms = 0
        self.orders: dict[int, VenueOrder] = {}
        self.fills: list[VenueFill] = []
        self.accounts: dict[str, SpotAccount | FuturesAccount] = {}
        self._open: dict[str, dict[int, VenueOrder]] = {symbol: {} for symbol in self.markets}
        self._by_client_id: dict[tuple[str, str], int] = {}
        self._groups: dict[tuple[str, str, str], Decimal] = {}
        self._founded: set[tuple[str, str, str]] = set()
        """Groups that were opened by an order of their own, whose id is their name."""
        self._parts: dict[int, tuple[Decimal, bool]] = {}

    # Queries

    def account(self, name: str) -> SpotAccount | FuturesAccount:
        if name not in self.accounts:
            self.accounts[name] = self._new_account()
        return self.accounts[name]

    def open_orders(self, account: str, symbol: str | None = None) -> list[VenueOrder]:
        symbols = self.markets if symbol is None else (self.market(symbol).symbol,)
        found = [order for each in symbols for order in self._open[each].values() if order.account == account]
        return sorted(found, key=lambda order: order.id)

    def find(self, account: str, *, order_id: int | None = None, client_order_id: str | None = None) -> VenueOrder:
        """The order of this account by either id; the latest, if a client id was used again.

        Raises:
            Refused: `unknown_order`.
        """
        if order_id is None and client_order_id is not None:
            order_id = self._by_client_id.get((account, client_order_id))
        order = None if order_id is None else self.orders.get(order_id)
        if order is None or order.account != account:
            raise Refused("unknown_order", f"{account} has no order {order_id or client_order_id}")
        return order

    def market(self, symbol: str) -> Market:
        if symbol not in self.markets:
            raise Refused("unknown_symbol", f"{symbol} is not traded here; {', '.join(sorted(self.markets))} are")
        return self.markets[symbol]

    def held(self, account: str, symbol: str, group: str = "") -> Decimal:
        """Signed quantity of a position, or of the part that a group of orders has built."""
        total = self.account(account).held(self.market(symbol))
        if not group:
            return total
        part = self._groups.get((account, symbol, group), ZERO)
        if self.kind == "futures" and (account, symbol, group) not in self._founded:
            # It was adopted, not opened by an order: it is what no other group has built.
            part = total - sum(self.groups(account, symbol).values(), ZERO)
        if part * total <= 0:
            return ZERO
        return min(part, total, key=abs)

    def groups(self, account: str, symbol: str) -> dict[str, Decimal]:
        """The parts of a position by group, of groups that were opened by an order."""
        names = [key[2] for key in self._groups if key[:2] == (account, symbol) and key in self._founded]
        return {group: held for group in names if (held := self.held(account, symbol, group))}

    # Actions

    def place(
        self, account: str, new: NewOrder, *, part: Decimal | None = None, rest_expires: bool = False
    ) -> VenueOrder:
        """Take an order. `part` of it is filled each time it meets the market, or once, if `rest_expires`.

        Raises:
            Refused: and nothing has changed.
        """
        market = self.market(new.symbol)
        self._check_id(account, new.client_order_id)
        order = self._checked(account, new, market)
        expected = self._expected_price(order, market)
        if new.post_only and self._reached(order):
            raise Refused("would_match", f"{new.client_order_id} would be filled immediately, and may only rest")
        purse = self.account(account)
        if order.type != "reference" and not order.reduce_only:
            purse.reserve(order, market, expected, self.prices)
        order.id = len(self.orders) + 1
        self.orders[order.id] = order
        self._by_client_id[account, new.client_order_id] = order.id
        self._open[new.symbol][order.id] = order
        if order.group == order.client_order_id:
            self._founded.add((account, order.symbol, order.group))
        if part is not None:
            self._parts[order.id] = (part, rest_expires)
        self._meet_price(order, market)
        if new.immediate and order.is_open:
            self._end(order, "expired")
        return order

    def fill_reference(self, account: str, client_order_id: str, price: Decimal, quantity: Decimal) -> VenueOrder:
        """Fill a reference order at a given price.

        Raises:
            Refused: unknown, not open, or no reference order.
        """
        order = self.find(account, client_order_id=client_order_id)
        if order.type != "reference" or not order.is_open:
            raise Refused("not_open", f"{client_order_id} is a {order.type} order and {order.status}")
        order.quantity = quantity
        self._fill(order, price, quantity, maker=False)
        return order

    def cancel(
        self, account: str, symbol: str, *, order_id: int | None = None, client_order_id: str | None = None
    ) -> VenueOrder:
        """Cancel an open order.

        Raises:
            Refused: `unknown_order`, or `not_open` if it is too late.
        """
        self.market(symbol)
        order = self.find(account, order_id=order_id, client_order_id=client_order_id)
        if order.symbol != symbol:
            raise Refused("unknown_order", f"{account} has no order {order.client_order_id} of {symbol}")
        if not order.is_open:
            raise Refused("not_open", f"{order.client_order_id} is {order.status}")
        self._end(order, "cancelled")
        return order

    def set_leverage(self, account: str, symbol: str, leverage: int) -> None:
        """Set how many times its margin a position may be.

        Raises:
            Refused: spot has none, or it is not within 1 .. 125.
        """
        purse = self.account(account)
        if not isinstance(purse, FuturesAccount) or not 1 <= leverage <= 125:
            raise Refused("invalid", f"leverage of {symbol} on {self.kind} is {leverage}: futures take 1 to 125")
        purse.position(self.market(symbol).symbol).leverage = leverage

    def close_minute(self, symbol: str, minute: ClosedMinute) -> None:
        """Match all orders of a symbol against a minute, and set the price to its close."""
        self.prices[symbol] = self.markets[symbol].round_price(minute.close)
        waiting = sorted(self._open[symbol].values(), key=lambda order: (_RANK.get(order.type, 2), order.id))
        for order in waiting:
            if order.is_open:
                self._meet_minute(order, self.markets[symbol], minute)

    def has_open_orders(self, symbol: str) -> bool:
        return bool(self._open[symbol])

    # Matching

    def _new_account(self) -> SpotAccount | FuturesAccount:
        if self.kind == "futures":
            return FuturesAccount(self.terms.balance)
        balances = {market.quote: self.terms.balance for market in self.markets.values()}
        return SpotAccount(balances, fees_in_received=self.terms.fees_in == "received")

    def _check_id(self, account: str, client_order_id: str) -> None:
        known = self._by_client_id.get((account, client_order_id))
        if known is not None and (self.terms.client_ids == "ever" or self.orders[known].is_open):
            raise Refused("duplicate_id", f"{client_order_id} is taken by order {known}")

    def _checked(self, account: str, new: NewOrder, market: Market) -> VenueOrder:
        """The order to be, whose numbers fit the market."""
        if new.type in LIMITED and new.price is None:
            raise Refused("invalid", f"{new.client_order_id} is a {new.type} order without a price")
        if new.type in TRIGGERED and new.trigger is None:
            raise Refused("invalid", f"{new.client_order_id} is a {new.type} order without a trigger")
        order = VenueOrder(
            id=0,
            account=account,
            symbol=new.symbol,
            side=new.side,
            type=new.type,
            client_order_id=new.client_order_id,
            quantity=self._quantity(new, market),
            price=new.price,
            trigger=new.trigger,
            reduce_only=new.reduce_only,
            group=new.group,
            protects=new.protects,
            created_ms=self.now_ms,
            updated_ms=self.now_ms,
        )
        if new.type == "reference":
            return order
        for name, price in (("price", new.price), ("trigger", new.trigger)):
            if price is not None and (price <= 0 or price % market.tick_size):
                raise Refused("price_step", f"{name} is {price}: {new.symbol} moves by {market.tick_size:f}")
        if order.quantity is not None:
            self._check_size(order, market)
        mine = [other for other in self._open[order.symbol].values() if other.account == account]
        check_limits(order, market.limits, self.prices[order.symbol], mine)
        if new.reduce_only and not new.protects and not self._reducible(order):
            raise Refused("nothing_to_reduce", f"{account} holds nothing of {new.symbol} that {new.side} reduces")
        if new.type in TRIGGERED and not new.protects and self._hit(order, self.prices[new.symbol]):
            raise Refused(
                "would_trigger", f"trigger is {new.trigger}, and {new.symbol} at {self.prices[new.symbol]} already"
            )
        return order

    def _quantity(self, new: NewOrder, market: Market) -> Decimal | None:
        if new.quantity is not None or new.cost is None:
            if new.quantity is None and not new.reduce_only:
                raise Refused("invalid", f"{new.client_order_id} has neither quantity nor cost")
            return new.quantity
        price = new.price if new.price is not None else self._worsened(self.prices[new.symbol], new.side, market)
        return market.round_quantity(new.cost / price)

    def _check_size(self, order: VenueOrder, market: Market) -> None:
        quantity = order.quantity or ZERO
        if quantity <= 0 or quantity % market.lot_size:
            raise Refused("quantity_step", f"quantity is {quantity:f}: {order.symbol} moves by {market.lot_size:f}")
        price = order.price or order.trigger or self.prices[order.symbol]
        if not order.reduce_only and quantity * price < market.min_notional:
            raise Refused("min_notional", f"{quantity * price:f} {market.quote} is below {market.min_notional:f}")

    def _expected_price(self, order: VenueOrder, market: Market) -> Decimal:
        if order.type == "limit" and order.price is not None and order.side == "buy" and self._reached(order):
            return min(order.price, self._worsened(self.prices[order.symbol], order.side, market))
        if order.price is not None:
            return order.price
        if order.trigger is not None:
            return order.trigger
        return self._worsened(self.prices[order.symbol], order.side, market)

    def _reached(self, order: VenueOrder) -> bool:
        """Whether a limit order would be filled at the current price."""
        if order.type != "limit" or order.price is None:
            return False
        price = self.prices[order.symbol]
        return price <= order.price if order.side == "buy" else price >= order.price

    def _hit(self, order: VenueOrder, price: Decimal) -> bool:
        assert order.trigger is not None  # noqa: S101  # checked when it was taken
        above = (order.side == "buy") == (order.type in ("stop", "stop_limit"))
        return price >= order.trigger if above else price <= order.trigger

    def _meet_price(self, order: VenueOrder, market: Market) -> None:
        """Match a new order against the current price."""
        price = self.prices[order.symbol]
        if order.type == "market":
            self._fill_part(order, market, self._worsened(price, order.side, market), maker=False)
        elif self._reached(order) and order.price is not None:
            worse = self._worsened(price, order.side, market)
            bounded = min(worse, order.price) if order.side == "buy" else max(worse, order.price)
            self._fill_part(order, market, bounded, maker=False)
        elif order.type in TRIGGERED and self._hit(order, price) and self._reducible(order):
            self._trigger(order, market, price)

    def _meet_minute(self, order: VenueOrder, market: Market, minute: ClosedMinute) -> None:
        if order.type in TRIGGERED and not order.triggered:
            if order.protects and not self._reducible(order):
                return
            assert order.trigger is not None  # noqa: S101  # checked when it was taken
            if self._hit(order, minute.open) and order.created_ms <= minute.open_ms:
                self._trigger(order, market, market.round_price(minute.open))
            elif self._hit(order, minute.high) or self._hit(order, minute.low):
                self._trigger(order, market, order.trigger)
        elif order.type in LIMITED and order.price is not None:
            if minute.low <= order.price if order.side == "buy" else minute.high >= order.price:
                self._fill_part(order, market, order.price, maker=True)
        elif order.type != "reference":
            self._fill_part(order, market, self._worsened(self.prices[order.symbol], order.side, market), maker=False)

    def _trigger(self, order: VenueOrder, market: Market, price: Decimal) -> None:
        order.triggered = True
        order.updated_ms = self.now_ms
        worse = self._worsened(price, order.side, market)
        if order.price is None:
            self._fill_part(order, market, worse, maker=False)
        elif price <= order.price if order.side == "buy" else price >= order.price:
            bounded = min(worse, order.price) if order.side == "buy" else max(worse, order.price)
            self._fill_part(order, market, bounded, maker=False)

    def _worsened(self, price: Decimal, side: Side, market: Market) -> Decimal:
        """`price` after slippage, as a price of the market."""
        slip = price * self.terms.slippage_pct / 100
        return market.round_price(price + slip if side == "buy" else price - slip, side)

    def _fill_part(self, order: VenueOrder, market: Market, price: Decimal, *, maker: bool) -> None:
        """Fill the part of an order that the market gives."""
        if order.reduce_only:
            reducible = self._reducible(order)
            if not reducible:
                return self._end(order, "expired")
            if order.quantity is None or order.remaining > reducible:
                order.quantity = order.filled + reducible
        part, rest_expires = self._parts.get(order.id, (self.terms.fill_fraction, False))
        quantity = order.remaining
        if part < 1 and order.quantity is not None:
            quantity = min(quantity, max(market.lot_size, market.round_quantity(order.quantity * part)))
        purse = self.account(order.account)
        purse.release(order, market)
        if not purse.affordable(order, market, price, quantity, self.prices):
            return self._end(order, "expired")
        self._fill(order, price, quantity, maker=maker)
        if not order.is_open:
            return None
        if rest_expires:
            return self._end(order, "expired")
        try:
            if not order.reduce_only:
                purse.reserve(order, market, order.price or price, self.prices)
        except Refused:
            self._end(order, "expired")
        return None

    def _fill(self, order: VenueOrder, price: Decimal, quantity: Decimal, *, maker: bool) -> None:
        market, purse = self.markets[order.symbol], self.account(order.account)
        rate = self.terms.maker_fee_pct if maker else self.terms.taker_fee_pct
        if order.type == "reference":
            rate = ZERO
        fee, fee_asset, realized = purse.settle(order.side, market, price, quantity, rate / 100)
        in_base = fee_asset == market.base
        order.filled += quantity
        order.filled_cost += price * quantity
        order.fee += fee * price if in_base else fee
        order.fee_in_base += fee if in_base else ZERO
        order.status = "partly_filled" if order.remaining else "filled"
        order.updated_ms = self.now_ms
        if not order.is_open:
            self._open[order.symbol].pop(order.id, None)
        self.fills.append(
            VenueFill(
                id=len(self.fills) + 1,
                order_id=order.id,
                account=order.account,
                client_order_id=order.client_order_id,
                symbol=order.symbol,
                side=order.side,
                price=price,
                quantity=quantity,
                fee=fee,
                fee_asset=fee_asset,
                realized=realized,
                maker=maker,
                time_ms=self.now_ms,
            )
        )
        received = quantity - fee if in_base else quantity
        self._count(order, received if order.side == "buy" else -quantity)

    def _count(self, order: VenueOrder, signed: Decimal) -> None:
        """Count the fill for its group, and drop the protection of closed groups."""
        account, symbol = order.account, order.symbol
        if order.group:
            key = (account, symbol, order.group)
            self._groups[key] = self._groups.get(key, ZERO) + signed
        for other in list(self._open[symbol].values()):
            protected = not other.group or (account, symbol, other.group) in self._groups
            if other.protects and other.account == account and protected and not self._reducible(other):
                self._end(other, "expired")
        if not self.held(account, symbol):
            for key in [key for key in self._groups if key[:2] == (account, symbol)]:
                del self._groups[key]

    def _reducible(self, order: VenueOrder) -> Decimal:
        held = self.held(order.account, order.symbol, order.group)
        if held * (1 if order.side == "buy" else -1) >= 0:
            return ZERO
        return abs(held) if self.kind == "futures" else self.markets[order.symbol].round_quantity(abs(held))

    def _end(self, order: VenueOrder, status: OrderStatus) -> None:
        self.account(order.account).release(order, self.markets[order.symbol])
        self._open[order.symbol].pop(order.id, None)
        order.status = status
        order.updated_ms = self.now_ms
