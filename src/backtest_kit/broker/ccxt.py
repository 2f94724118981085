"""`CcxtBroker`: spot markets and linear futures of an exchange, through the ccxt library.

There is no state between two calls: positions, stops and the outcome of orders are read from the exchange, by client
order ids that follow from the signal id. A program that died between any two requests reads them again, and
`check_position` repairs, once a minute, what such a death has left.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, ClassVar, Final

from backtest_kit.broker.base import (
    Broker,
    Fill,
    Order,
    OrderDeleted,
    OrderRejected,
    OrderReport,
    OrderTransient,
    VenuePosition,
)
from backtest_kit.broker.ccxt_account import agrees, model_quantity, status_of
from backtest_kit.broker.ccxt_connection import Connection
from backtest_kit.broker.ccxt_dealer import MOST_PARTS, Dealer
from backtest_kit.broker.ccxt_errors import order_is_there
from backtest_kit.broker.ccxt_holdings import Holdings
from backtest_kit.broker.ccxt_market import ExchangeOrder, Market, Stake
from backtest_kit.broker.ccxt_rules import MarketKind
from backtest_kit.broker.ccxt_stops import StopFilled
from backtest_kit.broker.ccxt_venue import CcxtVenue
from backtest_kit.broker.order_ids import SignalIds
from backtest_kit.broker.rounding import exact
from backtest_kit.errors import BacktestKitError, UserError
from backtest_kit.model.position import Position, RestingEntry
from backtest_kit.model.signal import Direction

_log = logging.getLogger(__name__)
_CHECKS: Final = 3
"""How often one check is repeated if a stop is filled during it."""


class CcxtBroker(Broker):
    """Trades an account of an exchange. Each position has a stop on the exchange from its entry to its end.

    The take profit is watched by the engine, minute by minute: only the stop has to work while the program is down.
    """

    reports_fills: ClassVar[bool] = True

    def __init__(
        self,
        exchange_id: str,
        *,
        market: MarketKind = "spot",
        api_key: str | None = None,
        secret: str | None = None,
        password: str | None = None,
        settle: str | None = None,
        leverage: int | None = 1,
        max_slippage_pct: float | None = None,
        stop_beyond_pct: float = 1.0,
        timeout_ms: int = 10_000,
        arrival_ms: int = 5_000,
        rate_limit: bool = True,
        test_network: bool = False,
        urls: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            exchange_id: the name in ccxt: `binance`, `binanceusdm`, ...
            market: `spot`, or `futures` for perpetuals that settle in quote currency.
            api_key: the key; None takes CC_CCXT_API_KEY from the environment when the broker starts.
            secret: likewise, CC_CCXT_SECRET.
            password: likewise, CC_CCXT_PASSWORD, for the few exchanges that have one.
            settle: the currency that futures settle in, if it is not their quote currency.
            leverage: set for each future before an entry; None keeps that of the account.
            max_slippage_pct: enters with a limit order this far beyond the price of the decision, in percent, and
                leaves unfilled what would cost more. None enters at the market. Exits are always at the market.
            stop_beyond_pct: if a market has no stop that becomes a market order, how far beyond its trigger its
                limit is, in percent. A gap wider than that is not protected.
            timeout_ms: of one request.
            arrival_ms: how long a request may take to arrive: until then an order that is not found is not believed
                lost, and never sent again. Binance refuses requests that take longer (recvWindow).
            rate_limit: spaces requests as the exchange requires. A simulated exchange has no limit.
            test_network: trades on the exchange's demo account or test network, with keys made there.
            urls: replaces addresses of ccxt's `urls["api"]`: a test network, a proxy, a simulated exchange.
            options: added to ccxt's own `options`.

        Raises:
            UserError: an argument is invalid.
        """
        if market not in ("spot", "futures"):
            raise UserError(f"market is {market!r}: use 'spot' or 'futures'")
        if leverage is not None and leverage < 1:
            raise UserError(f"leverage is {leverage}: use 1 or more, or None to leave that of the account")
        for name, value in (("max_slippage_pct", max_slippage_pct), ("stop_beyond_pct", stop_beyond_pct)):
            if value is not None and not 0 < value < 100:
                raise UserError(f"{name} is {value}: use a percentage between 0 and 100")
        for name, milliseconds in (("timeout_ms", timeout_ms), ("arrival_ms", arrival_ms)):
            if milliseconds <= 0:
                raise UserError(f"{name} is {milliseconds}: use milliseconds above 0")
        self._connection = Connection(
            exchange_id=exchange_id,
            kind=market,
            credentials={"apiKey": api_key, "secret": secret, "password": password},
            urls=urls or {},
            options=options or {},
            timeout_ms=timeout_ms,
            arrival_ms=arrival_ms,
            rate_limit=rate_limit,
            test_network=test_network,
        )
        self._settle, self._leverage = settle, leverage
        self._max_slippage_pct, self._stop_beyond_pct = max_slippage_pct, stop_beyond_pct
        self._open: tuple[CcxtVenue, Dealer] | None = None
        self._close: Callable[[], Awaitable[None]] | None = None

    def __repr__(self) -> str:
        return f"CcxtBroker({self._connection.exchange_id!r}, market={self._connection.kind!r})"

    def account(self) -> str:
        """As `Broker.account`: by key, market and address."""
        return self._connection.account()

    async def start(self) -> None:
        """Connect, load the markets, check key, permissions, one-way position mode and clock.

        Raises:
            UserError: keys, permissions or account settings make trading impossible.
            RetryLater: the exchange does not answer.
        """
        if self._open is None:
            venue, self._close, self.notes = await self._connection.open()
            dealer = Dealer(
                venue,
                leverage=self._leverage,
                max_slippage_pct=self._max_slippage_pct,
                stop_beyond_pct=self._stop_beyond_pct,
            )
            self._open = venue, dealer

    async def stop(self) -> None:
        close, self._close, self._open = self._close, None, None
        if close is not None:
            await close()

    async def find(self, order: Order) -> OrderReport:
        """Look up `order`, and complete it: after an entry, an addition or a reduction the position has its stop, and
        after a close no order is left open."""
        venue, dealer, stake = self._stake_of(order)
        if order.kind == "move_take":
            return OrderReport(status="filled")
        if order.kind in ("move_stop", "breakeven"):
            live = await dealer.stops.live(stake)
            held = await dealer.account.held(stake, live)
            lacking, wrong = dealer.stops.difference(stake, held, order.stop_loss, live)
            return OrderReport(status="filled" if live and not lacking and not wrong else "absent")
        if order.kind == "cancel":
            entry = await venue.order(stake.market, stake.ids.entry)
            gone = entry is not None and not entry.open and not entry.filled
            return OrderReport(status="cancelled" if gone else "absent")
        parts = await dealer.parts(stake, order, certain=True)
        if not any(part.filled for part in parts):
            return OrderReport(status=status_of(parts) if parts else "absent")
        if order.kind == "close":
            left = await dealer.account.held(stake, recent=parts)
            if not stake.market.unsellable(left, order.price):
                # Called again, `close_position` sells the rest and returns the fill of all parts.
                return OrderReport(status="cancelled" if len(parts) == MOST_PARTS else "absent")
            # A crash cut the close off: a stop that is left would sell the next position.
            await dealer.clear(stake)
            return OrderReport(status=status_of(parts), fill=await self._closed(stake, order, parts))
        await dealer.protect_what_is_held(stake, order, *parts)
        if order.kind == "reduce":
            held = await dealer.account.held(stake, recent=parts)
            if await dealer.left_to_reduce(stake, order, held, parts):
                # Called again, `reduce_position` sells the rest and returns the fill of all parts.
                return OrderReport(status="absent")
        return OrderReport(status=status_of(parts), fill=await venue.executed(stake.market, parts))

    async def open_position(self, order: Order) -> Fill | None:
        """Enter and place the stop. An entry that cannot be protected is closed again, and logged as an error."""
        venue, dealer, stake = self._stake_of(order)
        if order.kind == "activate":
            entry = await dealer.activated(stake, order)
        else:
            entry = await dealer.enter(stake, stake.ids.entry, order)
        with order_is_there():
            received = await venue.received(stake.market, entry)
            try:
                if order.attempt or order.kind == "activate":
                    await dealer.protect_what_is_held(stake, order, entry)
                else:
                    await dealer.protect(stake, received, order.stop_loss)
            except StopFilled as error:
                _log.info("%s", error)
            except BacktestKitError as error:
                await dealer.leave(stake, entry, order.stop_loss, error)
            return await venue.executed(stake.market, [entry])

    async def place_entry(self, order: Order) -> None:
        _, dealer, stake = self._stake_of(order)
        market, client_id = stake.market, stake.ids.entry
        sent = await dealer.known(stake, client_id, order)
        if sent is None:
            quantity = await dealer.affordable(stake, order)
            limit = market.price_for(stake.entry_side, exact(order.price))
            sent = await dealer.send(market, client_id, stake.entry_side, quantity, limit=limit)
        if not sent.open and not sent.filled:
            raise OrderRejected(f"{market.symbol}: the limit order {client_id} was {status_of([sent])} there")

    async def cancel_entry(self, order: Order) -> Fill | None:
        venue, dealer, stake = self._stake_of(order)
        entry = await venue.order(stake.market, stake.ids.entry, certain=True)
        if entry is None:
            return None
        last = await venue.cancel(stake.market, entry) if entry.open else entry
        if not last.filled:
            return None
        await dealer.protect_what_is_held(stake, order, last)
        return await venue.executed(stake.market, [last])

    async def close_position(self, order: Order) -> Fill | None:
        """Sell what is really held, and cancel all open orders of the position."""
        _, dealer, stake = self._stake_of(order)
        market, account = stake.market, dealer.account
        live = await dealer.stops.live(stake)
        model = None if order.quantity is None else exact(order.quantity)
        sold = await dealer.parts(stake, order, certain=True) if order.attempt else []
        held = await account.held(stake, live, model=None if sold else model, recent=sold)
        if not market.contract and live:
            try:
                await dealer.make_room(stake, order, held, live)
            except StopFilled:
                held = await account.held(stake)
        try:
            left = await dealer.sell_out(stake, order, held, sold)
        except OrderRejected:
            # The stop of a future was faster: there is nothing left to reduce.
            if not market.contract or not market.unsellable(await account.held(stake), order.price):
                raise
            left = Decimal(0)
        await dealer.clear(stake)
        if sold:
            return await self._closed(stake, order, sold)
        if left:
            small = market.unsellable(left, order.price)
            _log.warning("%s: the rest of %s is too small to sell: %s", market.symbol, stake.ids.signal_id, small)
        try:
            return await account.closing_fill(stake)
        except OrderDeleted as error:
            _log.warning("%s", error)
            return None

    async def _closed(self, stake: Stake, order: Order, parts: list[ExchangeOrder]) -> Fill:
        """The fill that closed the position: of `parts`, and of what its stop or another id of the close sold."""
        venue, dealer = self._connected()
        sold = sum((part.filled for part in parts), Decimal(0))
        if order.quantity is not None and not agrees(stake.market, sold, exact(order.quantity)):
            try:
                return await dealer.account.closing_fill(stake, recent=parts)
            except OrderDeleted:
                _log.warning(
                    "%s: the fills that closed %s are known only in part: its entry is no longer known",
                    stake.market.symbol,
                    stake.ids.signal_id,
                )
        return await venue.executed(stake.market, parts)

    async def add_to_position(self, order: Order) -> Fill | None:
        """Buy, then widen the stop: the position stays protected all the time."""
        venue, dealer, stake = self._stake_of(order)
        added = await dealer.enter(stake, stake.ids.of(order.client_order_id), order)
        with order_is_there():
            await dealer.protect_what_is_held(stake, order, added)
            return await venue.executed(stake.market, [added])

    async def reduce_position(self, order: Order) -> Fill | None:
        """Sell, then narrow the stop. On a spot market the stop is cancelled first, because it locks the balance."""
        venue, dealer, stake = self._stake_of(order)
        sold = await dealer.parts(stake, order, certain=True) if order.attempt else []
        live = await dealer.stops.live(stake)
        held = await dealer.account.held(stake, recent=sold)
        quantity = await dealer.left_to_reduce(stake, order, held, sold)
        if not sold:
            dealer.check_reduction(stake, order, held, quantity)
        try:
            if quantity and not stake.market.contract:
                await dealer.make_room(stake, order, held, live)
            await dealer.reduce(stake, order, held, quantity, sold)
        except OrderRejected as error:
            if not any(part.filled for part in sold):
                raise
            _log.warning("%s: %s was reduced only in part: %s", stake.market.symbol, order.client_order_id, error)
        dealer.filled(stake, sold[0])
        with order_is_there():
            await dealer.protect_what_is_held(stake, order, *sold)
            return await venue.executed(stake.market, sold)

    async def move_stop(self, order: Order) -> None:
        _, dealer, stake = self._stake_of(order)
        dealer.stops.check_level(stake, order.stop_loss, order.price)
        if not await dealer.protect_what_is_held(stake, order):
            raise OrderRejected(f"{stake.market.symbol}: {stake.ids.signal_id} has no position any more")

    async def check_position(self, position: Position) -> Fill | None:
        """None while the position is open; its stop is repaired if necessary.

        Raises:
            OrderDeleted: there is no position, and the exchange has no fill that explains it.
            OrderTransient: the exchange does not answer, or the position could not be protected.
        """
        stake = self._stake(position.symbol, self._ids(position.signal_id), position.side)
        _, dealer = self._connected()
        model, stop_loss = model_quantity(position), position.stop_loss
        for _ in range(_CHECKS):
            live = await dealer.stops.live(stake)
            held = await dealer.account.held(stake, live, model=model)
            if stake.market.unsellable(held, stop_loss):
                await dealer.clear(stake)
                return await dealer.account.closing_fill(stake, position=position)
            protected = stake.market.lots(held) == sum(stop.quantity for stop in live)
            if not protected and not agrees(stake.market, held, model):
                message = (
                    "%s: %s of %s are held, %s by its fills: it was traded outside of this program; "
                    "the stop follows the actual quantity"
                )
                _log.warning(message, stake.market.symbol, f"{held:f}", position.signal_id, f"{model:.8f}")
            try:
                if await dealer.protect(stake, held, stop_loss, live):
                    return None
            except StopFilled as error:
                _log.info("%s", error)
        raise OrderTransient(f"{stake.market.symbol}: the stop of {position.signal_id} is just being filled")

    async def check_entry(self, entry: RestingEntry) -> Fill | None:
        """None while the limit order rests, or its fill. A partial fill gets its stop immediately."""
        venue, dealer = self._connected()
        stake = self._stake(entry.symbol, self._ids(entry.signal_id), entry.side)
        order = await venue.order(stake.market, stake.ids.entry, certain=True)
        if order is None or (not order.open and not order.filled):
            what = "is unknown there" if order is None else f"was {status_of([order])} there"
            raise OrderDeleted(f"{stake.market.symbol}: the limit order {stake.ids.entry} {what}")
        if not order.filled:
            return None
        held = await dealer.account.held(stake, recent=[order])
        if not stake.market.unsellable(held, entry.price_stop_loss):
            try:
                await dealer.protect(stake, held, entry.price_stop_loss)
            except StopFilled as error:
                _log.info("%s", error)
        return None if order.open else await venue.executed(stake.market, [order])

    async def holdings(self, symbols: Sequence[str]) -> list[VenuePosition]:
        """Of a future the whole position; of a spot market what orders of this program bought and did not sell again.

        On a spot market it is read from the latest orders, as many as the exchange lists in one answer (Binance: 500).
        An older position has a live stop, which is listed as long as it rests. A balance alone may be the owner's
        savings.
        """
        venue, _ = self._connected()
        held = [await Holdings(venue).of(symbol, self._market(symbol)) for symbol in symbols]
        return [each for each in held if each is not None]

    def _connected(self) -> tuple[CcxtVenue, Dealer]:
        if self._open is None:
            raise UserError(f"{self!r} is not connected: await its start() first")
        return self._open

    def _market(self, symbol: str) -> Market:
        futures = self._connection.kind == "futures"
        if futures and "/" in symbol and ":" not in symbol:
            symbol = f"{symbol}:{self._settle or symbol.partition('/')[2]}"
        market = self._connected()[0].market(symbol)
        if market.contract is not futures:
            other = "spot" if futures else "futures"
            raise UserError(f"{symbol} is not a {self._connection.kind} market: use CcxtBroker(..., market={other!r})")
        return market

    def _stake(self, symbol: str, ids: SignalIds, direction: Direction) -> Stake:
        return Stake(self._market(symbol), ids, direction)

    def _stake_of(self, order: Order) -> tuple[CcxtVenue, Dealer, Stake]:
        stake = self._stake(order.identity.symbol, self._ids(order.signal_id), order.direction)
        return *self._connected(), stake

    def _ids(self, signal_id: str) -> SignalIds:
        return SignalIds(signal_id, self.store_id)
