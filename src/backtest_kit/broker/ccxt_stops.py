"""The protective stops of positions on an exchange: together they cover the whole position.

One stop is enough if the exchange takes one order for the whole; a larger position has as few as possible. `put`
compares the live stops with the wanted ones and does the difference. So it may be called again after any error and
after a crash between any two of its requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from decimal import Decimal
from typing import Final

from backtest_kit.broker.base import OrderRejected, OrderTransient
from backtest_kit.broker.ccxt_errors import AlreadyThere, NoFunds, TooManyStops
from backtest_kit.broker.ccxt_market import ExchangeOrder, Market, Stake
from backtest_kit.broker.ccxt_venue import CcxtVenue
from backtest_kit.broker.rounding import exact
from backtest_kit.errors import BacktestKitError

_PAUSES_S: Final = (0.1, 0.3, 1.0)
_MOST_LOST_TO_FEES: Final = Decimal("0.02")


class StopFilled(OrderRejected):
    """The stop was triggered while it was being replaced: nothing is left to protect."""


class Stops:
    def __init__(self, venue: CcxtVenue, *, beyond_pct: float) -> None:
        """`beyond_pct`: how far the limit of a stop is beyond its trigger, in percent."""
        self._venue, self._beyond = venue, exact(beyond_pct) / 100

    async def live(self, stake: Stake) -> list[ExchangeOrder]:
        orders = await self._venue.open_orders(stake.market)
        return [order for order in orders if stake.ids.stop_number(order.client_id) is not None]

    async def put(
        self,
        stake: Stake,
        quantity: Decimal,
        price: float,
        live: list[ExchangeOrder] | None = None,
    ) -> None:
        """Have live stops for `quantity` at `price`, and no others.

        On a future a new stop is placed before the old one is cancelled. On a spot market the old ones are cancelled
        first, because they lock the balance.

        Raises:
            StopFilled: an old stop has closed the position, in part or whole.
            StopReached: the market is beyond `price`.
            OrderTransient, OrderRejected: a stop cannot be placed; a part of the position may have none now.
        """
        market = stake.market
        live = await self.live(stake) if live is None else live
        lacking, wrong = self.difference(stake, quantity, price, live)
        if not market.contract:
            await self.cancel(market, wrong)
            wrong = []
        trigger = market.stop_trigger(stake.direction, price)
        # The clock of an earlier program may have been ahead of ours.
        latest = max((stake.ids.stop_number(stop.client_id) or 0 for stop in live), default=0)
        for amount in lacking:
            try:
                await self._place(stake, amount, trigger, quantity, latest)
            except TooManyStops:
                if not wrong:
                    raise
                # There is no room for the new one next to the old ones.
                await self.cancel(market, [wrong.pop()])
                await self._place(stake, amount, trigger, quantity, latest)
        await self.cancel(market, wrong)

    def difference(
        self, stake: Stake, quantity: Decimal, price: float, live: list[ExchangeOrder]
    ) -> tuple[list[Decimal], list[ExchangeOrder]]:
        """The sizes of missing stops, and the live stops to cancel."""
        trigger = stake.market.stop_trigger(stake.direction, price)
        lacking, wrong = self.sizes(stake, quantity, price), list[ExchangeOrder]()
        for stop in live:
            if stop.trigger == trigger and not stop.filled and stop.quantity in lacking:
                lacking.remove(stop.quantity)
            else:
                wrong.append(stop)
        return lacking, wrong

    async def cancel(self, market: Market, stops: list[ExchangeOrder]) -> None:
        """Cancel stops. Raises `StopFilled` if one of them has sold something."""
        filled = []
        for stop in stops:
            last = await self._venue.cancel(market, stop)
            if last.filled:
                filled.append(f"{stop.client_id} of {last.filled:f}")
        if filled:
            raise StopFilled(f"the stop of {market.symbol} was filled meanwhile: {', '.join(filled)}")

    def sizes(self, stake: Stake, quantity: Decimal, price: float) -> list[Decimal]:
        """The sizes of the stops that a position of `quantity` needs at `price`."""
        trigger = stake.market.stop_trigger(stake.direction, price)
        level = self._limit_of(stake, trigger) or trigger
        return stake.market.parts(quantity, level, at_market=stake.market.market_stop)

    def check_level(self, stake: Stake, stop_loss: float, price: float) -> None:
        """Refuse a stop that the exchange would reject while the market is at `price`.

        Raises:
            OrderRejected: its trigger or its limit is too far away.
        """
        market, trigger = stake.market, stake.market.stop_trigger(stake.direction, stop_loss)
        limit = self._limit_of(stake, trigger)
        for each in (trigger, limit):
            if each is not None and (bounds := market.outside(each)):
                raise OrderRejected(f"{market.symbol}: a stop at {each:f} is refused, {bounds}: use a level inside")
        if limit is not None and (bounds := market.too_far(stake.exit_side, limit, price)):
            raise OrderRejected(
                f"{market.symbol}: a stop at {trigger:f} with its limit at {limit:f} is refused, {bounds}: move the "
                "stop closer to the price, or use a smaller stop_beyond_pct"
            )

    def _limit_of(self, stake: Stake, trigger: Decimal) -> Decimal | None:
        """The limit of a stop that becomes a limit order; None for one that becomes a market order."""
        if stake.market.market_stop:
            return None
        side, sign = stake.exit_side, -1 if stake.exit_side == "sell" else 1
        return stake.market.price_for(side, trigger * (1 + sign * self._beyond), at_worst=False)

    async def _place(self, stake: Stake, amount: Decimal, trigger: Decimal, whole: Decimal, latest: int) -> None:
        """Place one stop for `amount` of the `whole`, numbered after the `latest` of those that are live."""
        market, side, limit = stake.market, stake.exit_side, self._limit_of(stake, trigger)
        number, pauses = self._venue.fresh_number(latest), iter(_PAUSES_S)
        while True:
            try:
                client_id = stake.ids.stop(number)
                await self._venue.send(market, client_id, side, amount, trigger=trigger, limit=limit, reduce_only=True)
                return
            except NoFunds as error:
                amount = await self._covered(market, amount, whole, error)
                await self._pause(pauses, error)
            except (AlreadyThere, OrderTransient) as error:
                await self._pause(pauses, error)
                if any(stake.ids.stop_number(stop.client_id) == number for stop in await self.live(stake)):
                    return
                # One that may still arrive keeps its id: while it is open, the exchange refuses a second one.
                number = self._venue.fresh_number() if isinstance(error, AlreadyThere) else number

    async def _covered(self, market: Market, amount: Decimal, whole: Decimal, error: OrderRejected) -> Decimal:
        """`amount`, or the free balance if only fees in base currency, which may not be reported yet, are missing."""
        if market.contract:
            raise error
        free = market.lots((await self._venue.balance(market.base))[0])
        if free < amount - whole * _MOST_LOST_TO_FEES:
            message = f"{error}; {free:f} {market.base} are free of {amount:f}: cancel the orders that lock them"
            raise OrderRejected(message) from None
        return min(free, amount)

    async def _pause(self, pauses: Iterator[float], error: BacktestKitError) -> None:
        pause = next(pauses, None)
        if pause is None:
            raise error
        await asyncio.sleep(pause)
