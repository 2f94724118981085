"""An account on an exchange, through ccxt: its orders, balances and positions, every call with a deadline."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from decimal import Decimal
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from backtest_kit.broker.base import Fill, OrderTransient
from backtest_kit.broker.ccxt_errors import OrderMissing, is_clock_skew, order_error, order_is_there
from backtest_kit.broker.ccxt_market import ExchangeOrder, Market, Side, read_market, read_order
from backtest_kit.broker.ccxt_rules import LISTED_DAYS, VenueRules
from backtest_kit.broker.order_ids import parse
from backtest_kit.broker.rounding import exact
from backtest_kit.ccxt_client import find_market, library, redacted
from backtest_kit.errors import BacktestKitError, Outcome
from backtest_kit.model.signal import Direction

T = TypeVar("T")
_log = logging.getLogger(__name__)
_DAY_MS: Final = 86_400_000
_MINUTE_MS: Final = 60_000
_SETTLING_S: Final = 5.0
_LISTINGS: Final = {
    "fetchOrders": "fetch_orders",
    "fetchClosedOrders": "fetch_closed_orders",
    "fetchCanceledOrders": "fetch_canceled_orders",
    "fetchMyTrades": "fetch_my_trades",
}
_ENDED: Final = ("fetchClosedOrders", "fetchCanceledOrders")
"""The lists of orders that are over, if no list has all orders."""


class Exposure(msgspec.Struct, frozen=True):
    """A position that the exchange keeps, of a future."""

    direction: Direction
    quantity: Decimal
    price_open: float | None


class CcxtVenue:
    """A connected account. Raises what hooks raise: `OrderTransient`, `OrderRejected` and its kinds."""

    def __init__(
        self,
        client: Any,
        exchange_id: str,
        rules: VenueRules,
        *,
        deadline_s: float,
        arrival_s: float,
        secrets: Iterable[str],
    ) -> None:
        self._client, self._id, self._rules = client, exchange_id, rules
        self._deadline_s, self._arrival_s = deadline_s, arrival_s
        self._secrets = tuple(secret for secret in secrets if secret)
        self._markets: dict[str, Market] = {}
        now = asyncio.get_running_loop().time()
        self._others_arrived_at = now + arrival_s
        self._arriving: dict[str, float] = {}
        self._latest_number = 0

    def market(self, symbol: str) -> Market:
        """The market of that name. Raises `UserError` if the exchange has none."""
        if symbol not in self._markets:
            raw, ccxt = find_market(self._client, self._id, symbol), library()
            modes = (ccxt.DECIMAL_PLACES, ccxt.SIGNIFICANT_DIGITS, ccxt.TICK_SIZE)
            market_stop = self._rules.market_stop(raw)
            self._markets[symbol] = read_market(raw, self._client.precisionMode, modes, market_stop=market_stop)
        return self._markets[symbol]

    async def call(self, doing: str, request: Callable[[], Awaitable[T]], *, again: bool = True) -> T:
        """The answer to `request`; sent again once if our clock differs from the exchange's."""
        message = f"{self._id}: {doing}"
        try:
            async with asyncio.timeout(self._deadline_s):
                return await request()
        except TimeoutError:
            message += f": no answer within {self._deadline_s:g} s"
            raise OrderTransient(message, outcome=Outcome.UNKNOWN) from None
        except library().BaseError as error:
            if not (again and is_clock_skew(error)):
                # The error of ccxt contains the signed request: only its text is passed on.
                raise order_error(error, message, self._secrets) from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            message += f": an answer that ccxt cannot read: {redacted(error, self._secrets)}"
            raise OrderTransient(message, outcome=Outcome.UNKNOWN) from None
        await self.call("compare clocks", self._client.load_time_difference, again=False)
        return await self.call(doing, request, again=False)

    async def send(
        self,
        market: Market,
        client_id: str,
        side: Side,
        quantity: Decimal,
        *,
        limit: Decimal | None = None,
        immediate: bool = False,
        trigger: Decimal | None = None,
        reduce_only: bool = False,
    ) -> ExchangeOrder:
        """Send one order. Afterwards it rests, or, for a market order, it is done."""
        params: dict[str, Any] = {"clientOrderId": client_id}
        if trigger is not None:
            params |= {"stopLossPrice": float(trigger), **self._rules.stop_id(client_id)}
        if reduce_only and market.contract:
            params["reduceOnly"] = True
        if immediate:
            params["timeInForce"] = "IOC"
        kind = "market" if limit is None else "limit"
        price = None if limit is None else float(limit)
        amount = float(quantity / market.contract_size)
        doing = f"send {client_id}, {kind} {side} of {quantity:f} {market.base}"
        request = partial(self._client.create_order, market.symbol, kind, side, amount, price, params)
        # Set before the request: a task that is cancelled while it waits does not know what arrived.
        self._arriving[client_id] = asyncio.get_running_loop().time() + self._arrival_s
        try:
            raw = await self.call(doing, request)
        except BacktestKitError as error:
            if error.outcome is Outcome.NOT_DONE:
                self._arriving.pop(client_id, None)
            raise
        self._arriving.pop(client_id, None)
        sent = read_order(raw, market)
        if trigger is not None or (price and not immediate):
            return sent
        with order_is_there():
            return await self.settled(market, sent, client_id)

    async def settled(self, market: Market, order: ExchangeOrder, client_id: str) -> ExchangeOrder:
        """A market order once it is done: some exchanges only confirm its receipt."""
        loop = asyncio.get_running_loop()
        until, pause = loop.time() + _SETTLING_S, 0.05
        while order.open or (order.filled and order.average is None):
            if loop.time() > until:
                message = f"{self._id}: {client_id} is still being filled after {_SETTLING_S:g} s"
                raise OrderTransient(message, outcome=Outcome.UNKNOWN)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)
            order = await self.order(market, client_id) or order
        return order

    async def order(self, market: Market, client_id: str, *, certain: bool = False) -> ExchangeOrder | None:
        """The order of a client id, None if the exchange has none.

        With `certain`, it then waits until no order that was sent under that id can still arrive, and looks again.
        """
        found = await self._look(market, client_id)
        if found is None and certain:
            arrives_at = self._arriving.get(client_id, self._others_arrived_at)
            await asyncio.sleep(max(0.0, arrives_at - asyncio.get_running_loop().time()))
            found = await self._look(market, client_id)
        if found is not None or certain:
            self._arriving.pop(client_id, None)
        return found

    async def _look(self, market: Market, client_id: str) -> ExchangeOrder | None:
        further = self._rules.lookup
        if further is not None:
            params = {"clientOrderId": client_id, **further}
            doing = f"look up {client_id}"
            try:
                raw = await self.call(doing, lambda: self._client.fetch_order(client_id, market.symbol, params))
                return read_order(raw, market)
            except OrderMissing:
                if self._rules.certain:
                    return None
        # "No such order" of any other exchange is believed only if its lists of orders do not have it either.
        recent = self.now_ms() - LISTED_DAYS * _DAY_MS
        listed = [*await self.open_orders(market), *await self.orders_since(market, recent)]
        sought = parse(client_id)
        return next((order for order in listed if sought is not None and parse(order.client_id) == sought), None)

    async def open_orders(self, market: Market) -> list[ExchangeOrder]:
        found: dict[str, ExchangeOrder] = {}
        for params in self._rules.books("fetchOpenOrders"):
            request = partial(self._client.fetch_open_orders, market.symbol, None, None, params)
            raws = await self.call(f"list the open orders of {market.symbol}", request)
            orders = (read_order(raw, market, conditional=bool(params)) for raw in raws)
            # An exchange that ignores the parameters returns the same orders twice.
            found = {order.id: order for order in orders if order.open} | found
        return list(found.values())

    async def orders_since(self, market: Market, since_ms: int) -> list[ExchangeOrder]:
        """All orders of a market from `since_ms` on, oldest first. Triggered stops have the fill of their order."""
        found: dict[str, ExchangeOrder] = {}
        for method in self._lists():
            for params in self._rules.books(method):
                doing = f"list the orders of {market.symbol}"
                for raw in await self._pages(doing, method, market, since_ms, params):
                    order = read_order(raw, market, conditional=bool(params))
                    found.setdefault(order.id, await self._follow(market, order))
        return sorted(found.values(), key=lambda order: order.timestamp)

    async def latest_orders(self, market: Market) -> list[ExchangeOrder]:
        """The latest orders of a market, open ones and others: as many as the exchange lists in one answer."""
        doing, found = f"list the latest orders of {market.symbol}", list[ExchangeOrder]()
        for listing in [getattr(self._client, _LISTINGS[method]) for method in self._lists()]:
            raws = await self.call(doing, partial(listing, market.symbol))
            found += [read_order(raw, market) for raw in raws]
        return found

    def _lists(self) -> list[str]:
        """The methods that together list orders which are over."""
        has = self._client.has
        return ["fetchOrders"] if has.get("fetchOrders") is True else [name for name in _ENDED if has.get(name)]

    async def trades_since(self, market: Market, since_ms: int) -> list[dict[str, Any]]:
        """The account's own trades of a market, as ccxt reports them, oldest first."""
        doing = f"list the trades of {market.symbol}"
        trades = await self._pages(doing, "fetchMyTrades", market, since_ms, {})
        return sorted(trades, key=lambda trade: int(trade["timestamp"]))

    async def _pages(
        self, doing: str, method: str, market: Market, since_ms: int, params: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """All entries of a list from `since_ms` on, in windows as long as the exchange allows."""
        listing = getattr(self._client, _LISTINGS[method])
        found: dict[str, dict[str, Any]] = {}
        now_ms = self.now_ms()
        days_back, window_days = self._rules.days_back(method), self._rules.window_days(method)
        if days_back is not None:
            since_ms = max(since_ms, now_ms - int(days_back * _DAY_MS) + _MINUTE_MS)
        while True:
            until_ms = now_ms + 1 if window_days is None else since_ms + int(window_days * _DAY_MS)
            window = params if until_ms > now_ms else {**params, "until": until_ms - 1}
            page_ms = since_ms
            while True:
                raws = await self.call(doing, partial(listing, market.symbol, page_ms, None, window))
                fresh = [raw for raw in raws if str(raw["id"]) not in found]
                if not fresh:
                    break
                found |= {str(raw["id"]): raw for raw in fresh}
                page_ms = max(page_ms, *(int(raw["timestamp"] or 0) for raw in fresh))
            if until_ms > now_ms:
                return list(found.values())
            since_ms = until_ms

    async def _follow(self, market: Market, order: ExchangeOrder) -> ExchangeOrder:
        """A triggered stop with the fill of the order that it became."""
        if order.filled or order.spawned is None:
            return order
        done = await self.order_by_id(market, order.spawned)
        return msgspec.structs.replace(done, client_id=order.client_id, trigger=order.trigger)

    async def cancel(self, market: Market, order: ExchangeOrder) -> ExchangeOrder:
        """Cancel an order; returns its final state."""
        params = (self._rules.trigger("cancelOrder") or {}) if order.conditional else {}
        doing = f"cancel {order.client_id or order.id}"
        try:
            raw = await self.call(doing, lambda: self._client.cancel_order(order.id, market.symbol, params))
        except OrderMissing:
            return await self.order_by_id(market, order.id, conditional=order.conditional)
        # A conditional order that could be cancelled was never triggered; some exchanges return only its id.
        return (
            read_order(raw, market, conditional=order.conditional)
            if order.conditional or raw.get("filled") is not None
            else await self.order_by_id(market, order.id)
        )

    async def order_by_id(self, market: Market, order_id: str, *, conditional: bool = False) -> ExchangeOrder:
        """An order by the exchange's own id; a triggered stop has the fill of its order.

        Raises:
            OrderRejected: the exchange has none.
        """
        params = (self._rules.trigger("fetchOrder") or {}) if conditional else {}
        doing = f"look up {order_id}"
        raw = await self.call(doing, lambda: self._client.fetch_order(order_id, market.symbol, params))
        return await self._follow(market, read_order(raw, market, conditional=conditional))

    async def balance(self, currency: str) -> tuple[Decimal, Decimal]:
        """The free and the total balance of a currency."""
        raw = await self.call("read the balance", self._client.fetch_balance)
        account = raw.get(currency) or {}
        return exact(account.get("free") or 0), exact(account.get("total") or 0)

    async def exposures(self, symbols: list[str]) -> dict[str, Exposure]:
        """The open positions, of futures, by ccxt's symbol."""
        raws = await self.call("read the positions", lambda: self._client.fetch_positions(symbols))
        found = {}
        for raw in raws:
            quantity = exact(raw.get("contracts") or 0) * exact(raw.get("contractSize") or 1)
            if quantity:
                direction: Direction = "short" if raw["side"] == "short" else "long"
                price = raw.get("entryPrice")
                found[str(raw["symbol"])] = Exposure(direction, quantity, float(price) if price else None)
        return found

    async def executed(self, market: Market, orders: Iterable[ExchangeOrder]) -> Fill:
        """The fills of `orders`, added up, with their fees."""
        orders = [order for order in orders if order.filled]
        quantity = cost = Decimal(0)
        charged: list[Decimal | None] = []
        currencies: dict[str, None] = {}
        timestamp = 0
        for order in orders:
            price = order.average or Decimal(0)
            fees, last_ms = await self._fees(market, order)
            moved = order.filled - (_taken(market, fees) if order.side == "buy" else 0)
            quantity += moved
            cost += moved * price
            charged += [None] if fees is None else [await self._in_quote(market, *fee, price) for fee in fees]
            currencies |= dict.fromkeys(currency for currency, _ in fees or ())
            timestamp = max(timestamp, last_ms)
        known = [each for each in charged if each is not None]
        return Fill(
            price=float(cost / quantity) if quantity else 0.0,
            cost=float(cost),
            quantity=float(quantity),
            fee=float(sum(known)) if orders and len(known) == len(charged) else None,
            fee_currency="+".join(currencies),
            client_order_ids=tuple(order.client_id for order in orders if order.client_id),
            order_ids=tuple(order.id for order in orders),
            timestamp=timestamp,
        )

    async def received(self, market: Market, order: ExchangeOrder) -> Decimal:
        """The base currency that a purchase received: without a fee that was taken in base currency."""
        if market.contract or not order.filled:
            return order.filled
        fees, _ = await self._fees(market, order)
        return order.filled - _taken(market, fees)

    async def _fees(self, market: Market, order: ExchangeOrder) -> tuple[list[tuple[str, Decimal]] | None, int]:
        """The fees of an order, and the time of its last fill. None if the exchange does not report all fees yet."""
        if order.fees is not None:
            return list(order.fees), order.timestamp
        doing = f"read the trades of {order.client_id or order.id}"
        if self._rules.certain:
            by_id = {"orderId": order.id}
            raws = await self.call(doing, lambda: self._client.fetch_my_trades(market.symbol, None, None, by_id))
        elif self._client.has.get("fetchOrderTrades") is True:
            raws = await self.call(doing, lambda: self._client.fetch_order_trades(order.id, market.symbol))
        else:
            raws = await self.trades_since(market, order.timestamp)
        trades = [raw for raw in raws if str(raw.get("order")) == order.id]
        last_ms = max([order.timestamp, *(int(trade["timestamp"] or 0) for trade in trades)])
        fees = [trade.get("fee") or {} for trade in trades]
        listed = sum((exact(trade["amount"]) for trade in trades), Decimal(0)) * market.contract_size
        if listed < order.filled or any(fee.get("cost") is None or not fee.get("currency") for fee in fees):
            return None, last_ms
        return [(str(fee["currency"]), exact(fee["cost"])) for fee in fees], last_ms

    async def _in_quote(self, market: Market, currency: str, amount: Decimal, price: Decimal) -> Decimal | None:
        """A fee in quote currency, converted at the current price; None if there is no price."""
        if currency == market.quote:
            return amount
        if currency == market.base:
            return amount * price
        pair = f"{currency}/{market.quote}"
        pair = pair if pair in self._client.markets else f"{pair}:{market.quote}"
        unknown = f"no market {pair}" if pair not in self._client.markets else ""
        if not unknown:
            try:
                doing = f"read the price of {pair}"
                ticker = await self.call(doing, lambda: self._client.fetch_ticker(pair))
                last = ticker.get("last") or ticker.get("close")
                if last:
                    return amount * exact(last)
                unknown = f"no price of {pair}"
            except BacktestKitError as error:
                # The order is done: an unknown fee must not keep the position out of the books.
                unknown = str(error)
        _log.warning(
            "%s: %s to value a fee of %s %s: CC_PERCENT_FEE is booked instead", self._id, unknown, amount, currency
        )
        return None

    async def set_leverage(self, market: Market, leverage: int) -> None:
        doing = f"set the leverage of {market.symbol} to {leverage}"
        await self.call(doing, lambda: self._client.set_leverage(leverage, market.symbol))

    def fresh_number(self, above: int = 0) -> int:
        """An unused number `above` another one: the exchange's time in hundredths of a second.

        Counted from 0 at each start, it could be the number of an order that is done and would be confused with it:
        Binance accepts the id of such an order again.
        """
        self._latest_number = max(self._latest_number + 1, above + 1, self.now_ms() // 10 % 2**32) % 2**32
        return self._latest_number

    def now_ms(self) -> int:
        """The time at the exchange."""
        return int(self._client.milliseconds()) - int(self._client.options.get("timeDifference") or 0)


def _taken(market: Market, fees: Iterable[tuple[str, Decimal]] | None) -> Decimal:
    """The fees that were taken out of the base currency that was bought."""
    in_base = (amount for currency, amount in fees or () if currency == market.base)
    return Decimal(0) if market.contract else sum(in_base, Decimal(0))
