from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Literal

import ccxt.async_support as library
import msgspec
import numpy as np
import pytest
from tests.values import make_entry, make_position

from backtest_kit.broker.base import Fill, Order, OrderKind
from backtest_kit.broker.ccxt import CcxtBroker
from backtest_kit.broker.order_ids import SignalIds
from backtest_kit.market.clock import SteppedClock
from backtest_kit.market.sources import ANY_RANGE, CandleSource
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.identity import Identity
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.position import Entry, Position, RestingEntry
from backtest_kit.model.signal import Direction
from backtest_kit.venue.binance.api import API_KEY, API_SECRET
from backtest_kit.venue.client import ccxt_options
from backtest_kit.venue.exchange import Terms
from backtest_kit.venue.faults import Fault
from backtest_kit.venue.orders import VenueFill, VenueOrder
from backtest_kit.venue.server import VenueServer
from backtest_kit.venue.venue import Venue

START = 1_704_067_200_000
PRICE = 50_000.0
SIGNAL = "BTCUSDT-202401010000-0a1b2c3d"
IDS = SignalIds(SIGNAL)
ARRIVAL_MS = 250
Kind = Literal["spot", "futures"]


class Script(CandleSource):
    """Candles that close at the given prices from START on, and at the last of them ever after."""

    cached = False
    page_limit = ANY_RANGE

    def __init__(self, closes: Sequence[float]) -> None:
        self._closes = closes

    async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        times = np.arange(start_ms, stop_ms, MINUTE_MS, dtype=np.int64)
        closes = np.array([self._close((time - START) // MINUTE_MS) for time in times.tolist()])
        opens = np.array([self._close((time - START) // MINUTE_MS - 1) for time in times.tolist()])
        high, low = np.maximum(opens, closes), np.minimum(opens, closes)
        return CandleSeries(times, opens, high, low, closes, np.ones(len(times)))

    def _close(self, minute: int) -> float:
        return PRICE if minute < 0 else self._closes[min(minute, len(self._closes) - 1)]


class Bench:
    """A simulated exchange on loopback, and brokers on it."""

    def __init__(self, server: VenueServer, kind: Kind) -> None:
        self.server, self.kind = server, kind
        self.brokers: list[CcxtBroker] = []

    async def broker(self, **options: Any) -> CcxtBroker:
        broker = self.unconnected(**options)
        await broker.start()
        return broker

    def unconnected(self, **options: Any) -> CcxtBroker:
        given = {
            "api_key": API_KEY,
            "secret": API_SECRET,
            "urls": urls_of(self.server.url),
            "arrival_ms": ARRIVAL_MS,
            "timeout_ms": 4000,
            "rate_limit": False,
            **options,
        }
        exchange_id = "binance" if self.kind == "spot" else "binanceusdm"
        broker = CcxtBroker(given.pop("exchange_id", exchange_id), market=self.kind, **given)
        self.brokers.append(broker)
        return broker

    @property
    def exchange(self) -> Any:
        return self.server.venue.exchanges[self.kind]

    async def advance(self, minutes: int = 1) -> None:
        clock: Any = self.server.venue.clock
        clock.advance_to(clock.now_ms() + minutes * MINUTE_MS)
        async with self.server.venue.at_now():
            pass

    def fault(self, kind: Any, endpoint: str = "POST */*rder", **fields: Any) -> None:
        self.server.faults.add(Fault(kind=kind, endpoint=endpoint, **fields))

    def fills(self) -> list[VenueFill]:
        return list(self.exchange.fills)

    def filled_orders(self) -> Counter[str]:
        """How many orders of each client id were filled."""
        return Counter(fill.client_order_id for fill in {fill.order_id: fill for fill in self.exchange.fills}.values())

    def stops(self) -> list[tuple[str, float, float]]:
        """Client id, quantity and trigger of the live stops."""
        return [
            (order.client_order_id, float(order.quantity or 0), float(order.trigger))
            for order in self.open_orders()
            if order.trigger is not None
        ]

    def levels(self) -> list[tuple[float, float]]:
        """Quantity and trigger of the live stops."""
        return [(quantity, trigger) for _, quantity, trigger in self.stops()]

    def open_orders(self) -> list[VenueOrder]:
        return list(self.exchange.open_orders(API_KEY))

    def sent(self, method: str = "POST") -> int:
        return sum(each["method"] == method and "rder" in each["path"] for each in self.server.requests)

    def held(self) -> float:
        account = self.exchange.account(API_KEY)
        if self.kind == "spot":
            return float(account.free.get("BTC", 0) + account.locked.get("BTC", 0))
        return float(account.held(self.exchange.markets["BTCUSDT"]))

    async def by_hand(self, side: str, quantity: float) -> None:
        from backtest_kit.venue.http import HttpClient

        client = HttpClient(self.server.url)
        body = {"kind": self.kind, "symbol": "BTCUSDT", "side": side, "quantity": str(quantity)}
        assert (await client.ask("POST", "/sim/trade", body))[0] == 200

    async def cancel_by_hand(self, client_order_id: str) -> None:
        from backtest_kit.venue.http import HttpClient

        client = HttpClient(self.server.url)
        body = {"kind": self.kind, "clientOrderId": client_order_id}
        assert (await client.ask("POST", "/sim/cancel", body))[0] == 200


def received(bench: Bench, quantity: float) -> float:
    """What a purchase brings in: spot takes its fee from it."""
    return quantity * (0.999 if bench.kind == "spot" else 1)


def urls_of(url: str) -> dict[str, str]:
    """The addresses of Binance's interfaces at a simulated exchange."""
    return dict(ccxt_options(url, library.binance)["urls"]["api"])


MakeBench = Callable[..., Awaitable[Bench]]


@pytest.fixture
async def bench() -> AsyncIterator[MakeBench]:
    made: list[Bench] = []

    async def make(kind: Kind, *closes: float, **terms: Any) -> Bench:
        venue = Venue(Script(closes or (PRICE,)), ("BTCUSDT",), SteppedClock(START), terms=Terms(**terms))
        server = VenueServer(venue)
        await server.start()
        made.append(Bench(server, kind))
        return made[-1]

    yield make
    for each in made:
        for broker in each.brokers:
            await broker.stop()
        await each.server.stop()


def order(
    kind: OrderKind = "open",
    number: int = 0,
    *,
    signal_id: str = SIGNAL,
    direction: Direction = "long",
    stop_loss: float | None = None,
    **fields: Any,
) -> Order:
    away = 0.95 if direction == "long" else 1.05
    default = {
        "price": PRICE,
        "cost": 1000.0 if kind in ("open", "place", "activate", "add", "reduce", "close") else 0.0,
        "take_profit": PRICE * (2 - away),
    }
    return Order(
        kind=kind,
        client_order_id=SignalIds(signal_id).order(kind, number),
        signal_id=signal_id,
        identity=Identity("BTCUSDT", "trend", "binance", "", "live"),
        when_ms=START,
        direction=direction,
        stop_loss=PRICE * away if stop_loss is None else stop_loss,
        **{**default, **fields},
    )


def again(first: Order) -> Order:
    return msgspec.structs.replace(first, attempt=first.attempt + 1)


def position(opened: Order, *fills: Fill | None, **fields: Any) -> Position:
    entries = tuple(Entry(fill.price, fill.cost, START) for fill in fills if fill is not None)
    entry = _entry(opened).at(entries[0].price, entries[0].cost)
    return msgspec.structs.replace(make_position(entry, entries=entries), **fields)


def resting(placed: Order) -> RestingEntry:
    return _entry(placed)


def _entry(order: Order) -> RestingEntry:
    return make_entry(
        order.signal_id,
        order.direction,
        price=order.price,
        take=order.take_profit,
        stop=order.stop_loss,
        minutes=1440,
        cost=order.cost,
        at_ms=START,
    )
