"""What is asked of each exchange, by ccxt's own description of it and the table of what that does not say."""

from __future__ import annotations

from typing import Any

import ccxt.async_support as library
import pytest
from tests.broker.conftest import MakeBench, order

from backtest_kit.broker.ccxt_rules import MarketKind, VenueRules
from backtest_kit.broker.ccxt_venue import CcxtVenue
from backtest_kit.broker.order_ids import SignalIds
from backtest_kit.broker.rounding import exact
from backtest_kit.errors import BacktestKitError, UserError

DAY_MS = 86_400_000
NOW_MS = 1_704_067_200_000
IDS = SignalIds("idea", "0a1b2c")


def rules(exchange_id: str, kind: MarketKind = "spot") -> VenueRules:
    return VenueRules(getattr(library, exchange_id)(), kind)


@pytest.mark.parametrize(
    ("exchange_id", "kind", "reason"),
    [
        ("gate", "spot", "at most 28 characters"),
        ("gateeu", "futures", "at most 28 characters"),
        ("bitfinex", "spot", "numbers only"),
        ("htx", "futures", "numbers only"),
        ("hyperliquid", "futures", "begin with 0x"),
        ("mexc", "spot", "ccxt places no stop loss"),
    ],
)
def test_an_exchange_that_does_not_take_our_orders_is_refused_with_the_reason(
    exchange_id: str, kind: MarketKind, reason: str
) -> None:
    with pytest.raises(UserError, match=f"{exchange_id} cannot be traded here: .*{reason}"):
        rules(exchange_id, kind).check()


@pytest.mark.parametrize(
    ("exchange_id", "kind"),
    [
        *(("binance", "spot"), ("binanceusdm", "futures"), ("binanceus", "spot"), ("okx", "spot"), ("okx", "futures")),
        *(("bybit", "spot"), ("bybit", "futures"), ("kraken", "spot"), ("krakenfutures", "futures")),
        *(("kucoin", "spot"), ("bitget", "futures"), ("coinbase", "spot"), ("okxus", "spot")),
    ],
)
def test_a_known_exchange_starts_without_a_word(exchange_id: str, kind: MarketKind) -> None:
    assert rules(exchange_id, kind).check() == []


def test_an_unknown_exchange_starts_with_a_warning() -> None:
    (note,) = rules("cryptocom").check()
    assert note.startswith("cryptocom: its rule for client order ids is not known.")


def test_windows_are_as_long_as_the_exchange_takes_them() -> None:
    assert rules("binance").window_days("fetchOrders") == 1, "ccxt says 10,000"
    assert rules("binanceusdm", "futures").window_days("fetchOrders") == 7
    assert rules("bybit").window_days("fetchMyTrades") == 7
    assert rules("okx").window_days("fetchClosedOrders") is None
    assert rules("okx").days_back("fetchClosedOrders") == 90
    assert rules("okx").days_back("fetchCanceledOrders") == pytest.approx(2 / 24)
    assert rules("kraken").days_back("fetchClosedOrders") is None


def test_conditional_orders_are_asked_for_where_they_are_apart() -> None:
    assert rules("binance").books("fetchOpenOrders") == [{}]
    assert rules("kraken").books("fetchOpenOrders") == [{}]
    assert rules("binanceusdm", "futures").books("fetchOpenOrders") == [{}, {"trigger": True}]
    assert rules("okx").books("fetchOpenOrders") == [{}, {"trigger": True, "ordType": "conditional"}]
    assert rules("kucoin", "futures").trigger("fetchOrder") is None
    assert rules("bydfi").books("fetchOpenOrders") == [{}, {"trigger": True}], "ccxt does not say"


def test_stops_are_market_orders_where_the_exchange_has_them() -> None:
    spot, usdm = {"info": {"orderTypes": ["LIMIT", "STOP_LOSS_LIMIT"]}}, {"info": {"orderTypes": ["STOP_MARKET"]}}
    assert not rules("binance").market_stop(spot)
    assert rules("binanceusdm", "futures").market_stop(usdm)
    assert rules("okx").market_stop({"info": {}})
    assert not rules("coinbase").market_stop({})


class Wire:
    """A client of ccxt that goes no further than its request, and what was asked of it."""

    def __init__(self, exchange_id: str, **answers: Any) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.sent: list[str] = []
        wire = self

        class Client(getattr(library, exchange_id)):  # type: ignore[misc]
            async def fetch(self, url: str, method: str = "GET", headers: Any = None, body: Any = None) -> Any:
                wire.sent.append(f"{url} {body or ''}")
                raise library.OnMaintenance("closed")

        self.client = Client({"apiKey": "k", "secret": "c2VjcmV0", "password": "p", "enableRateLimit": False})
        self.client.set_markets([MARKET])
        self.client.milliseconds = lambda: NOW_MS
        for name, rows in answers.items():
            setattr(self.client, name, self._listing(name, rows))

    def _listing(self, name: str, rows: list[dict[str, Any]]) -> Any:
        async def listed(symbol: str, since: int | None = None, limit: int | None = None, params: Any = None) -> Any:
            asked = {} if params is None else params
            self.asked.append((name, {"since": since, **asked}))
            return [each for each in rows if (since or 0) <= each["timestamp"] <= asked.get("until", NOW_MS)]

        return listed

    def venue(self) -> CcxtVenue:
        return CcxtVenue(
            self.client,
            str(self.client.id),
            VenueRules(self.client, "spot"),
            deadline_s=10,
            arrival_s=0.001,
            secrets=(),
        )


MARKET = {
    "id": "BTC-USDT",
    "symbol": "BTC/USDT",
    "base": "BTC",
    "quote": "USDT",
    "baseId": "BTC",
    "quoteId": "USDT",
    "type": "spot",
    "spot": True,
    "swap": False,
    "future": False,
    "option": False,
    "contract": False,
    "margin": False,
    "active": True,
    "linear": None,
    "inverse": None,
    "settle": None,
    "contractSize": None,
    "limits": {"amount": {"min": 0.0001}, "cost": {"min": 1}},
    "info": {},
    "wsId": "BTC/USDT",
    "altname": "XBTUSDT",
    "precision": {"amount": 0.0001, "price": 0.01},
}
FOUND = {
    "id": "7",
    "clientOrderId": IDS.entry.upper(),
    "side": "buy",
    "status": "closed",
    "amount": 1,
    "filled": 1,
    "cost": 100,
    "timestamp": NOW_MS - 20 * DAY_MS,
    "info": {},
}


@pytest.mark.parametrize(
    ("exchange_id", "name"),
    [("okx", "algoClOrdId"), ("kraken", "cl_ord_id")],
)
async def test_a_stop_is_sent_with_the_id_by_which_it_is_known_again(exchange_id: str, name: str) -> None:
    wire = Wire(exchange_id)
    venue = wire.venue()
    with pytest.raises(BacktestKitError):
        await venue.send(venue.market("BTC/USDT"), IDS.stop(3), "sell", exact(1), trigger=exact(90))
    assert any(name in each and IDS.stop(3) in each for each in wire.sent), wire.sent
    await wire.client.close()


async def test_an_order_that_cannot_be_looked_up_by_our_id_is_found_in_the_lists() -> None:
    """Kraken's look-up takes no such id, and an entry may be weeks old."""
    wire = Wire("kraken", fetch_open_orders=[], fetch_closed_orders=[FOUND])
    venue = wire.venue()
    found = await venue.order(venue.market("BTC/USDT"), IDS.entry)
    assert found is not None
    assert found.id == "7"
    assert wire.sent == []
    assert await venue.order(venue.market("BTC/USDT"), IDS.exit(0)) is None
    await wire.client.close()


async def test_lists_are_asked_for_in_windows_that_the_exchange_takes() -> None:
    wire = Wire("bybit", fetch_my_trades=[{"id": str(day), "timestamp": NOW_MS - day * DAY_MS} for day in range(1, 20)])
    venue = wire.venue()
    trades = await venue.trades_since(venue.market("BTC/USDT"), NOW_MS - 15 * DAY_MS)
    assert [int(each["id"]) for each in trades] == list(range(15, 0, -1))
    spans = [asked["until"] + 1 - asked["since"] for _, asked in wire.asked if "until" in asked]
    assert max(spans) == 7 * DAY_MS
    assert "until" not in wire.asked[-1][1]
    await wire.client.close()


async def test_a_list_is_not_asked_for_what_the_exchange_has_forgotten() -> None:
    wire = Wire("okx", fetch_closed_orders=[], fetch_canceled_orders=[])
    venue = wire.venue()
    assert await venue.orders_since(venue.market("BTC/USDT"), 0) == []
    since = {name: NOW_MS - asked["since"] for name, asked in wire.asked}
    assert since["fetch_closed_orders"] == 90 * DAY_MS - 60_000
    assert since["fetch_canceled_orders"] == DAY_MS // 12 - 60_000
    assert not any("until" in asked for _, asked in wire.asked)
    await wire.client.close()


async def test_orders_that_two_books_show_count_once(bench: MakeBench) -> None:
    venue = await bench("futures")
    broker = await venue.broker()
    assert broker.notes == ()
    await broker.open_position(order())
    (held,) = await broker.holdings(["BTCUSDT"])
    assert len(held.client_order_ids) == 1
