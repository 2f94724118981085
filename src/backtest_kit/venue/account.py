"""Accounts of the simulated exchange: currencies on spot, margin and one-way positions on futures."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from backtest_kit.venue.orders import Market, Refused, Side, VenueOrder

ZERO = Decimal(0)


class FuturesPosition:
    """A one-way futures position."""

    __slots__ = ("leverage", "price_open", "quantity")

    def __init__(self) -> None:
        self.quantity = ZERO
        """Below 0 for a short position."""
        self.price_open = ZERO
        self.leverage = 20

    def take(self, signed: Decimal, price: Decimal) -> Decimal:
        """Add `signed` at `price`; returns the realized profit."""
        before, after = self.quantity, self.quantity + signed
        realized = ZERO
        if before * signed >= 0:
            self.price_open = (abs(before) * self.price_open + abs(signed) * price) / abs(after) if after else ZERO
        else:
            closed = min(abs(before), abs(signed))
            realized = (price - self.price_open) * (closed if before > 0 else -closed)
            if before * after <= 0:
                self.price_open = price if after else ZERO
        self.quantity = after
        return realized


class SpotAccount:
    """Currencies, partly locked for orders. A sale locks its quantity, a purchase its highest cost."""

    def __init__(self, balances: Mapping[str, Decimal], *, fees_in_received: bool) -> None:
        self.free: dict[str, Decimal] = dict(balances)
        self.locked: dict[str, Decimal] = {}
        self._fees_in_received = fees_in_received

    def held(self, market: Market) -> Decimal:
        """The base currency, locked or not."""
        return self.free.get(market.base, ZERO) + self.locked.get(market.base, ZERO)

    def reserve(self, order: VenueOrder, market: Market, price: Decimal, prices: Mapping[str, Decimal]) -> None:
        """Lock what `order` still needs at `price`.

        Raises:
            Refused: the balance is too small.
        """
        asset = market.quote if order.side == "buy" else market.base
        needed = order.remaining * price if order.side == "buy" else order.remaining
        if needed > self.free.get(asset, ZERO):
            raise Refused("no_funds", f"{order.account} has {self.free.get(asset, ZERO):f} {asset}, {needed:f} needed")
        self._move(asset, needed)
        order.reserved = needed

    def release(self, order: VenueOrder, market: Market) -> None:
        self._move(market.quote if order.side == "buy" else market.base, -order.reserved)
        order.reserved = ZERO

    def affordable(
        self, order: VenueOrder, market: Market, price: Decimal, quantity: Decimal, prices: Mapping[str, Decimal]
    ) -> bool:
        """Whether the free balance pays for `quantity`. Call it with nothing reserved for the order."""
        if order.side == "buy":
            return quantity * price <= self.free.get(market.quote, ZERO)
        return quantity <= self.free.get(market.base, ZERO)

    def settle(
        self, side: Side, market: Market, price: Decimal, quantity: Decimal, fee_rate: Decimal
    ) -> tuple[Decimal, str, Decimal]:
        """Exchange; returns the fee, its currency, and the profit (none on spot)."""
        paid, received = (market.quote, market.base) if side == "buy" else (market.base, market.quote)
        cost = price * quantity
        self._add(paid, -(cost if side == "buy" else quantity))
        self._add(received, quantity if side == "buy" else cost)
        fee_asset = received if self._fees_in_received else market.quote
        fee = (quantity if fee_asset == market.base else cost) * fee_rate
        self._add(fee_asset, -fee)
        return fee, fee_asset, ZERO

    def _move(self, asset: str, amount: Decimal) -> None:
        self._add(asset, -amount)
        self.locked[asset] = self.locked.get(asset, ZERO) + amount

    def _add(self, asset: str, amount: Decimal) -> None:
        self.free[asset] = self.free.get(asset, ZERO) + amount


class FuturesAccount:
    """Margin in one currency, and a one-way position per symbol. Nothing is liquidated, and no funding is paid."""

    def __init__(self, margin: Decimal) -> None:
        self.wallet = margin
        """Deposits and realized profits, less fees."""
        self.reserved = ZERO
        self.positions: dict[str, FuturesPosition] = {}

    def position(self, symbol: str) -> FuturesPosition:
        return self.positions.setdefault(symbol, FuturesPosition())

    def held(self, market: Market) -> Decimal:
        """Signed quantity of the position."""
        return self.positions[market.symbol].quantity if market.symbol in self.positions else ZERO

    def unrealized(self, symbol: str, prices: Mapping[str, Decimal]) -> Decimal:
        held = self.position(symbol)
        return held.quantity * (prices[symbol] - held.price_open) if held.quantity else ZERO

    def margin_used(self, symbol: str, prices: Mapping[str, Decimal]) -> Decimal:
        held = self.position(symbol)
        return abs(held.quantity) * prices[symbol] / held.leverage if held.quantity else ZERO

    def available(self, prices: Mapping[str, Decimal]) -> Decimal:
        """Margin for new orders."""
        on_positions = sum(
            (self.unrealized(symbol, prices) - self.margin_used(symbol, prices) for symbol in self.positions), ZERO
        )
        return self.wallet + on_positions - self.reserved

    def reserve(self, order: VenueOrder, market: Market, price: Decimal, prices: Mapping[str, Decimal]) -> None:
        """Reserve the margin of what `order` would open at `price`.

        Raises:
            Refused: the margin is too small.
        """
        needed = self._margin(order, market, price, order.remaining)
        if needed > self.available(prices):
            raise Refused(
                "no_funds", f"{order.account} has {self.available(prices):.2f} {market.quote}, {needed:.2f} needed"
            )
        self.reserved += needed
        order.reserved = needed

    def release(self, order: VenueOrder, market: Market) -> None:
        self.reserved -= order.reserved
        order.reserved = ZERO

    def affordable(
        self, order: VenueOrder, market: Market, price: Decimal, quantity: Decimal, prices: Mapping[str, Decimal]
    ) -> bool:
        """Whether the margin suffices for what `quantity` opens. Call it with nothing reserved for the order."""
        needed = self._margin(order, market, price, quantity)
        return not needed or needed <= self.available(prices)

    def settle(
        self, side: Side, market: Market, price: Decimal, quantity: Decimal, fee_rate: Decimal
    ) -> tuple[Decimal, str, Decimal]:
        """Trade; returns the fee, its currency, and the realized profit."""
        realized = self.position(market.symbol).take(quantity if side == "buy" else -quantity, price)
        fee = price * quantity * fee_rate
        self.wallet += realized - fee
        return fee, market.quote, realized

    def _margin(self, order: VenueOrder, market: Market, price: Decimal, quantity: Decimal) -> Decimal:
        held = self.held(market)
        closing = abs(held) if held * (1 if order.side == "buy" else -1) < 0 else ZERO
        opening = ZERO if order.reduce_only else max(ZERO, quantity - closing)
        return opening * price / self.position(market.symbol).leverage
