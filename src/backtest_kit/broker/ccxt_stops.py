"""The protective stops of positions on an exchange: exactly one per position, for all of it, at its level.

`put` compares what is there with what should be, and does the difference. So it may be called again after any
error and after a crash between any two of its requests, and it heals what a call before it has left behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from decimal import Decimal
from typing import Final

from backtest_kit.broker.base import OrderRejected, OrderTransient
from backtest_kit.broker.ccxt_errors import AlreadyThere, NoFunds
from backtest_kit.broker.ccxt_market import Market, Stake, VenueOrder
from backtest_kit.broker.ccxt_venue import CcxtVenue
from backtest_kit.broker.rounding import exact
from backtest_kit.errors import BacktestKitError

_PAUSES_S: Final = (0.1, 0.3, 1.0)
_MOST_LOST_TO_FEES: Final = Decimal("0.02")


class StopFilled(OrderRejected):
    """The stop was triggered while it was being replaced: there is nothing left to protect."""


class Stops:
    def __init__(self, venue: CcxtVenue, *, beyond_pct: float) -> None:
        """`beyond_pct`: how far a stop that becomes a limit order lets the price run, in percent."""
        self._venue, self._beyond = venue, exact(beyond_pct) / 100

    async def live(self, stake: Stake) -> list[VenueOrder]:
        orders = await self._venue.open_orders(stake.market)
        return [order for order in orders if stake.ids.stop_number(order.client_id) is not None]

    async def put(
        self,
        stake: Stake,
        quantity: Decimal,
        price: float,
        live: list[VenueOrder] | None = None,
    ) -> None:
        """Leave one live stop for `quantity` at `price`.

        Of a future the new one is placed before the old one is cancelled; on a spot market the old one has to go
        first, because it locks what the new one would sell.

        Raises:
            StopFilled: the old one has closed the position, in part or whole.
            StopReached: the market is beyond `price`.
            OrderTransient, OrderRejected: it cannot be placed; the position may have no stop now.
        """
        market, ids = stake.market, stake.ids
        live = await self.live(stake) if live is None else live
        amount, trigger = market.lots(quantity), market.stop_trigger(stake.direction, price)
        right = next((stop for stop in live if _is(stop, amount, trigger)), None)
        wrong = [stop for stop in live if stop is not right]
        number = max((ids.stop_number(stop.client_id) or 0 for stop in live), default=-1) + 1
        if not market.contract:
            await self.cancel(market, wrong)
        if right is None:
            await self._place(stake, amount, trigger, number)
        if market.contract:
            await self.cancel(market, wrong)

    async def cancel(self, market: Market, stops: list[VenueOrder]) -> None:
        """Raises `StopFilled` where one of them has sold something."""
        filled = []
        for stop in stops:
            last = await self._venue.cancel(market, stop)
            if last.filled:
                filled.append(f"{stop.client_id} of {last.filled:f}")
        if filled:
            raise StopFilled(f"the stop of {market.symbol} was filled meanwhile: {', '.join(filled)}")

    async def _place(self, stake: Stake, amount: Decimal, trigger: Decimal, number: int) -> None:
        market, ids, side, step = stake.market, stake.ids, stake.exit_side, 1
        limit = None
        if not market.market_stop:
            sign = -1 if side == "sell" else 1
            limit = market.price_for(side, trigger * (1 + sign * self._beyond), at_worst=False)
        pauses = iter(_PAUSES_S)
        while True:
            try:
                client_id = ids.stop(number)
                await self._venue.send(market, client_id, side, amount, trigger=trigger, limit=limit, reduce_only=True)
                return
            except AlreadyThere:
                number, step = number + step, step * 2  # of a stop before this one, or of this one: looked at below
            except NoFunds as error:
                amount = await self._covered(market, amount, error)
                await self._pause(pauses, error)
            except OrderTransient as error:
                await self._pause(pauses, error)
            if any(_is(stop, amount, trigger) for stop in await self.live(stake)):
                return

    async def _covered(self, market: Market, amount: Decimal, error: OrderRejected) -> Decimal:
        """What of `amount` the free balance covers: fees that were taken in base currency may not be told yet."""
        if market.contract:
            raise error
        free = market.lots((await self._venue.balance(market.base))[0])
        if free < amount * (1 - _MOST_LOST_TO_FEES):
            told = f"{error}; {free:f} {market.base} are free of {amount:f}: cancel what else locks them"
            raise OrderRejected(told) from None
        return min(free, amount)

    async def _pause(self, pauses: Iterator[float], error: BacktestKitError) -> None:
        pause = next(pauses, None)
        if pause is None:
            raise error
        await asyncio.sleep(pause)


def _is(stop: VenueOrder, amount: Decimal, trigger: Decimal) -> bool:
    return stop.quantity == amount and stop.trigger == trigger and not stop.filled
