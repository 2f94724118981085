"""The steps of the hooks of `CcxtBroker`: entering, leaving, and protecting positions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

from backtest_kit.broker.base import Order, OrderRejected, OrderTransient
from backtest_kit.broker.ccxt_account import Account, status_of
from backtest_kit.broker.ccxt_errors import AlreadyThere, StopReached, order_is_there
from backtest_kit.broker.ccxt_market import ExchangeOrder, Market, Side, Stake
from backtest_kit.broker.ccxt_stops import StopFilled, Stops
from backtest_kit.broker.ccxt_venue import CcxtVenue
from backtest_kit.broker.rounding import exact
from backtest_kit.errors import BacktestKitError, Outcome
from backtest_kit.model.price import price_text

_log = logging.getLogger(__name__)
OPENS: Final = ("open", "place", "activate")
EXITS: Final = ("reduce", "close")
MOST_PARTS: Final = 20
"""The most orders that carry out one order of the engine."""
_NAKED: Final = "held WITHOUT A STOP"


class Dealer:
    def __init__(
        self, venue: CcxtVenue, *, leverage: int | None, max_slippage_pct: float | None, stop_beyond_pct: float
    ) -> None:
        self.account, self.stops = Account(venue), Stops(venue, beyond_pct=stop_beyond_pct)
        self._venue, self._leverage = venue, leverage
        self._max_slippage = None if max_slippage_pct is None else exact(max_slippage_pct) / 100
        self._leverage_set: set[str] = set()

    async def known(self, stake: Stake, client_id: str, order: Order) -> ExchangeOrder | None:
        """The order that an earlier attempt left on the exchange."""
        return await self._venue.order(stake.market, client_id, certain=True) if order.attempt else None

    async def parts(self, stake: Stake, order: Order, *, certain: bool) -> list[ExchangeOrder]:
        """The orders on the exchange that carry out one order: several if an exit was too large for one."""
        found: list[ExchangeOrder] = []
        while len(found) < (MOST_PARTS if order.kind in EXITS else 1):
            client_id = stake.ids.of(order.client_order_id, len(found))
            # The last one may still arrive as well.
            part = await self._venue.order(stake.market, client_id, certain=certain)
            if part is None:
                break
            found.append(part)
        return found

    async def enter(self, stake: Stake, client_id: str, order: Order) -> ExchangeOrder:
        """Buy for `order.cost`, unless it was bought already."""
        found = await self.known(stake, client_id, order)
        if found is None:
            quantity = await self.affordable(stake, order)
            side, limit = stake.entry_side, None
            if self._max_slippage is not None:
                sign = 1 if side == "buy" else -1
                limit = stake.market.price_for(side, exact(order.price) * (1 + sign * self._max_slippage))
            found = await self.send(
                stake.market, client_id, side, quantity, limit=limit, immediate=self._max_slippage is not None
            )
        return self.filled(stake, found)

    async def affordable(self, stake: Stake, order: Order) -> Decimal:
        """What `order.cost` buys, in whole lots.

        Raises:
            OrderRejected: the exchange would refuse it, its stop, or its close.
        """
        market = stake.market
        if stake.direction == "short" and not market.contract:
            message = f"{market.symbol}: a spot market cannot be sold short: use CcxtBroker(..., market='futures')"
            raise OrderRejected(message)
        quantity = market.lots(exact(order.cost) / exact(order.price))
        small = market.too_small(quantity, min(order.price, order.stop_loss))
        if small:
            paid = f"{order.cost:g} {market.quote} at {price_text(order.price)}"
            raise OrderRejected(f"{market.symbol}: {paid} are too little: {small}")
        await self._check_size(stake, order, quantity)
        needed = exact(order.cost)
        if market.contract:
            if order.kind in OPENS:
                await self._check_flat(market)
            if self._leverage is None:
                return quantity
            needed /= self._leverage
            await self._set_leverage(market, self._leverage)
        free, _ = await self._venue.balance(market.quote)
        if free < needed:
            raise OrderRejected(f"{market.symbol}: {needed:.2f} {market.quote} are needed and {free:.2f} are free")
        return quantity

    async def _check_size(self, stake: Stake, order: Order, quantity: Decimal) -> None:
        """Refuse an entry that is too large for one order, or whose position could not be protected and closed."""
        market, price = stake.market, exact(order.price)
        at_market = order.kind != "place" and self._max_slippage is None
        largest = market.largest_order(price, at_market=at_market)
        if largest is not None and quantity > largest:
            kind = "market" if at_market else "limit"
            raise OrderRejected(
                f"{market.symbol}: {quantity:f} {market.base} are more than one {kind} order may have, {largest:f}: "
                f"use a cost of {largest * price:.2f} {market.quote} at most, and add the rest later"
            )
        self.stops.check_level(stake, order.stop_loss, order.price)
        open_orders = await self._venue.open_orders(market)
        others = [each for each in open_orders if stake.ids.kind(each.client_id) is None]
        ours = [each for each in open_orders if stake.ids.stop_number(each.client_id) is not None]
        whole = quantity + sum((stop.remaining for stop in ours), Decimal(0))
        # Of a future a stop is replaced by a second one that is there for a moment next to it.
        stops = len(self.stops.sizes(stake, whole, order.stop_loss)) + market.contract
        room = (
            ("stops", stops, market.max_stops, sum(each.trigger is not None for each in others)),
            ("orders", stops + (order.kind == "place"), market.max_orders, len(others)),
            ("market orders to close it", len(market.parts(whole, price, at_market=True)), MOST_PARTS, 0),
        )
        for what, needed, most, taken in room:
            if most is not None and needed > most - taken:
                raise OrderRejected(
                    f"{market.symbol}: a position of {whole:f} {market.base} needs {needed} {what}, and {most} are the "
                    f"most, of which others take {taken}: use a smaller cost, or cancel open orders"
                )

    async def _set_leverage(self, market: Market, leverage: int) -> None:
        if market.symbol not in self._leverage_set:
            await self._venue.set_leverage(market, leverage)
            self._leverage_set.add(market.symbol)

    async def _check_flat(self, market: Market) -> None:
        exposure = (await self._venue.exposures([market.symbol])).get(market.symbol)
        if exposure is not None:
            raise OrderRejected(
                f"{market.symbol}: the account already holds {exposure.quantity:f} {exposure.direction}: two positions "
                "of one future would be one on the exchange; use one strategy for each future of an account"
            )

    async def send(self, market: Market, client_id: str, side: Side, quantity: Decimal, **how: Any) -> ExchangeOrder:
        """Send an order, or find it if its answer was lost. An order that does not rest is done afterwards."""
        rests = how.get("limit") is not None and not how.get("immediate")
        try:
            return await self._venue.send(market, client_id, side, quantity, **how)
        except AlreadyThere:
            with order_is_there():
                found = await self._venue.order(market, client_id)
                if found is not None:
                    return found if rests else await self._venue.settled(market, found, client_id)
            raise
        except OrderTransient as error:
            if error.outcome is Outcome.NOT_DONE:
                raise
            try:
                found = await self._venue.order(market, client_id)
                if found is not None:
                    return found if rests else await self._venue.settled(market, found, client_id)
            except BacktestKitError:
                raise error from None
            raise

    def filled(self, stake: Stake, order: ExchangeOrder) -> ExchangeOrder:
        """`order`, if something of it was filled.

        Raises:
            OrderRejected: nothing was.
        """
        if not order.filled:
            why = " within max_slippage_pct" if self._max_slippage is not None else ""
            message = f"{stake.market.symbol}: {order.client_id} was not filled{why}: it was {status_of([order])}"
            raise OrderRejected(message)
        return order

    async def activated(self, stake: Stake, order: Order) -> ExchangeOrder:
        """The limit order that has become a position."""
        symbol, client_id = stake.market.symbol, stake.ids.entry
        entry = await self._venue.order(stake.market, client_id, certain=order.attempt > 0)
        if entry is not None and entry.open:
            message = f"{symbol}: of the limit order {client_id} {entry.filled:f} of {entry.quantity:f} are filled"
            raise OrderTransient(message, outcome=Outcome.NOT_DONE)
        if entry is None:
            raise OrderRejected(f"{symbol}: the exchange does not know the limit order {client_id}")
        return self.filled(stake, entry)

    async def left_to_reduce(self, stake: Stake, order: Order, held: Decimal, sold: list[ExchangeOrder]) -> Decimal:
        """What a reduction still has to take out of `held`, in whole lots; 0 if it is done.

        A part that the market did not fill completely ends the reduction.
        """
        market = stake.market
        if any(part.remaining for part in sold) or len(sold) == MOST_PARTS:
            return Decimal(0)
        wanted = exact(order.quantity or 0)
        if order.quantity is None:
            entry = await self._venue.order(market, stake.ids.entry)
            paid = entry.average if entry is not None and entry.average else exact(order.price)
            wanted = exact(order.cost) / paid
        left = market.lots(min(held, wanted - sum((part.filled for part in sold), Decimal(0))))
        return Decimal(0) if sold and market.unsellable(left, order.price) else left

    def check_reduction(self, stake: Stake, order: Order, held: Decimal, quantity: Decimal) -> None:
        """Refuse to take `quantity` out of `held`.

        Raises:
            OrderRejected: that, or what it leaves, is too small for the exchange.
        """
        market = stake.market
        small = market.unsellable(quantity, order.price)
        if small:
            raise OrderRejected(f"{market.symbol}: too small a reduction: {small}")
        small = market.unsellable(held - quantity, min(order.price, order.stop_loss))
        if small:
            message = f"{market.symbol}: the rest would be too small to protect: {small}; close the position instead"
            raise OrderRejected(message)

    async def reduce(
        self, stake: Stake, order: Order, held: Decimal, quantity: Decimal, sold: list[ExchangeOrder]
    ) -> None:
        """Sell `quantity` of `held`, in as many orders as the market needs, added to `sold`."""
        for amount in stake.market.parts(quantity, order.price, at_market=True):
            part = await self.sell(stake, order, amount, held=held, part=len(sold))
            sold.append(part)
            held -= part.filled
            if part.remaining:
                return

    async def sell_out(self, stake: Stake, order: Order, held: Decimal, sold: list[ExchangeOrder]) -> Decimal:
        """Sell all of `held`, in as many orders as the market needs, added to `sold`; returns the rest that cannot be
        sold.

        Raises:
            OrderRejected: it takes more orders than one may.
        """
        while not stake.market.unsellable(held, order.price):
            if len(sold) == MOST_PARTS:
                if not stake.market.contract:
                    await self._put_back(stake, order, held)
                message = f"{stake.market.symbol}: {MOST_PARTS} orders have not closed all of {stake.ids.signal_id}"
                raise OrderRejected(f"{message}, {held:f} are left")
            amount = stake.market.parts(held, order.price, at_market=True)[0]
            part = await self.sell(stake, order, amount, held=held, part=len(sold))
            sold.append(part)
            held -= part.filled
        return held

    async def sell(
        self, stake: Stake, order: Order, quantity: Decimal, *, held: Decimal, part: int = 0
    ) -> ExchangeOrder:
        """Sell `quantity` of `held` at the market. If that fails, restore the stop that was cancelled for it."""
        market, client_id = stake.market, stake.ids.of(order.client_order_id, part)
        try:
            sold = await self._send_exit(stake, client_id, quantity)
            return self.filled(stake, sold)
        except BacktestKitError as error:
            if not market.contract and error.outcome is Outcome.NOT_DONE:
                await self._put_back(stake, order, held)
            elif not market.contract:
                message = "%s: %s may be %s until the exchange reports what became of %s: %s"
                _log.error(message, market.symbol, f"{held:f}", _NAKED, client_id, error)
            raise

    async def _send_exit(self, stake: Stake, client_id: str, quantity: Decimal) -> ExchangeOrder:
        market = stake.market
        try:
            return await self.send(market, client_id, stake.exit_side, quantity, reduce_only=True)
        except OrderTransient as error:
            if market.contract or error.outcome is Outcome.NOT_DONE:
                raise
            # The position has no stop now, and gets none while the sale may still arrive.
            with order_is_there():
                found = await self._venue.order(market, client_id, certain=True)
                if found is not None:
                    return await self._venue.settled(market, found, client_id)
            raise OrderTransient(str(error), outcome=Outcome.NOT_DONE) from None

    async def make_room(self, stake: Stake, order: Order, held: Decimal, live: list[ExchangeOrder]) -> None:
        """Cancel the stops that lock the balance to sell.

        Raises:
            StopFilled: one of them has sold something.
        """
        try:
            await self.stops.cancel(stake.market, live)
        except StopFilled:
            raise
        except BacktestKitError:
            await self._put_back(stake, order, held)
            raise

    async def _put_back(self, stake: Stake, order: Order, held: Decimal) -> None:
        """Restore the stop after a sale that failed."""
        try:
            await self.protect(stake, held, order.stop_loss)
        except BacktestKitError as failed:
            _log.error("%s", failed)

    async def protect(
        self, stake: Stake, held: Decimal, stop_loss: float, live: list[ExchangeOrder] | None = None
    ) -> bool:
        """Place stops for the whole position. If the market is already beyond them, sell instead, and return False: the
        position is closed.

        Raises:
            StopFilled: the previous stop has sold the position, or a part of it.
            OrderTransient: there may be no stop now.
        """
        try:
            await self.stops.put(stake, held, stop_loss, live)
        except StopReached as error:
            _log.warning("%s: leaving at the market: %s", stake.market.symbol, error)
            await self._leave(stake, stake.ids.stop, stop_loss)
            return False
        except StopFilled:
            raise
        except BacktestKitError as error:
            message = f"{stake.market.symbol} may be {_NAKED} until the next check: {error}"
            raise OrderTransient(message, outcome=Outcome.UNKNOWN) from None
        return True

    async def protect_what_is_held(self, stake: Stake, order: Order, *recent: ExchangeOrder) -> bool:
        """The same for the position on the exchange; False if there is none, or only dust.

        Raises:
            OrderTransient: there is no stop now.
        """
        live = await self.stops.live(stake)
        held = await self.account.held(stake, live, recent=recent)
        if stake.market.unsellable(held, order.stop_loss):
            return False
        try:
            return await self.protect(stake, held, order.stop_loss, live)
        except StopFilled:
            return False

    async def leave(self, stake: Stake, entry: ExchangeOrder, stop_loss: float, why: BacktestKitError) -> None:
        """Close an entry that cannot be protected. The next check reports the close.

        Raises:
            OrderTransient: that failed as well.
        """
        symbol = stake.market.symbol
        message = "%s: no stop can be placed for %s, so the position is closed again: %s"
        _log.error(message, symbol, stake.ids.signal_id, why)
        try:
            await self._leave(stake, stake.ids.exit, stop_loss, entry)
        except BacktestKitError as error:
            message = f"{symbol}: {entry.filled:f} are {_NAKED} and cannot be sold: {error}; before that: {why}"
            raise OrderTransient(message, outcome=Outcome.UNKNOWN) from None

    async def clear(self, stake: Stake) -> None:
        """Cancel all open orders of a closed position."""
        for order in await self._venue.open_orders(stake.market):
            if stake.ids.kind(order.client_id) is not None:
                await self._venue.cancel(stake.market, order)

    async def _leave(self, stake: Stake, id_of: Callable[[int], str], price: float, *recent: ExchangeOrder) -> None:
        """Sell the whole position at the market, in as many orders as needed, and cancel all open orders."""
        market, sold = stake.market, list[ExchangeOrder]()
        if not market.contract:
            try:
                await self.stops.cancel(market, await self.stops.live(stake))
            except StopFilled as error:
                _log.info("%s", error)
        held = await self.account.held(stake, recent=recent)
        while not market.unsellable(held, price):
            if len(sold) == MOST_PARTS:
                raise OrderRejected(f"{market.symbol}: {MOST_PARTS} orders did not sell everything, {held:f} are left")
            amount = market.parts(held, price, at_market=True)[0]
            part = await self._send_exit(stake, id_of(self._venue.fresh_number()), amount)
            sold.append(self.filled(stake, part))
            held -= part.filled
        await self.clear(stake)
