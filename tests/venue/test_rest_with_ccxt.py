from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import Decimal
from typing import Any

import ccxt.async_support as ccxt_library
import pytest
from tests.venue.conftest import START, advance

from backtest_kit.market import sources
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.venue.client import ccxt_options, connect
from backtest_kit.venue.exchange import Terms
from backtest_kit.venue.orders import Limits
from backtest_kit.venue.server import VenueServer

Serve = Callable[..., Awaitable[VenueServer]]
Trader = Callable[..., Any]


@pytest.fixture
async def trader() -> AsyncIterator[Trader]:
    """Make real ccxt clients of a venue."""
    made: list[Any] = []

    def make(server: VenueServer, kind: str, **options: Any) -> Any:
        exchange = ccxt_library.binance if kind == "spot" else ccxt_library.binanceusdm
        client = exchange({**ccxt_options(server.url, exchange), "enableRateLimit": False, **options})
        made.append(client)
        return client

    yield make
    for client in made:
        await client.close()


def symbol_of(kind: str) -> str:
    return "BTC/USDT" if kind == "spot" else "BTC/USDT:USDT"


@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_markets_load_with_their_steps(serve: Serve, trader: Trader, kind: str) -> None:
    client = trader(await serve(), kind)
    markets = await client.load_markets()
    futures = {"BTC/USDT:USDT", "ETH/USDT:USDT"}
    assert set(markets) == (futures | {"BTC/USDT", "ETH/USDT"} if kind == "spot" else futures)
    market = markets[symbol_of(kind)]
    assert (market["precision"]["price"], market["precision"]["amount"]) == (0.01, 0.00001)
    assert market["limits"]["cost"]["min"] == 5
    assert market["active"] is True


@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_candles_are_those_of_the_source(serve: Serve, trader: Trader, kind: str) -> None:
    server = await serve()
    advance(server, 90)
    client = trader(server, kind)
    rows = await client.fetch_ohlcv(symbol_of(kind), "1m", since=START, limit=90)
    expected = await sources.synthetic(7).fetch("BTCUSDT", "1m", START, START + 90 * MINUTE_MS)
    assert CandleSeries.from_rows(rows) == expected
    hours = await client.fetch_ohlcv(symbol_of(kind), "1h", since=START, limit=5)
    assert hours[0][1:5] == [expected.open[0], expected.high[:60].max(), expected.low[:60].min(), expected.close[59]]
    still_open = await client.fetch_ohlcv(symbol_of(kind), "1m", limit=2)
    assert [row[0] for row in still_open] == [START + 89 * MINUTE_MS, START + 90 * MINUTE_MS]
    assert still_open[1][1:] == [round(expected.close[-1], 2)] * 4 + [0.0]


@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_a_candle_is_closed_by_the_time_of_the_venue(serve: Serve, trader: Trader, kind: str) -> None:
    """This machine's clock is years ahead of this venue's."""
    server = await serve()
    advance(server, 90)
    source = sources.ccxt(trader(server, kind))
    assert await source.server_time_ms() == server.venue.clock.now_ms()
    ours = connect(server.url).source()
    assert await ours.server_time_ms() == server.venue.clock.now_ms()
    await ours.close()
    assert len(await source.fetch("BTCUSDT", "1m", START + 80 * MINUTE_MS, START + 95 * MINUTE_MS)) == 10


@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_a_market_order_is_bought_and_sold(serve: Serve, trader: Trader, kind: str) -> None:
    server = await serve()
    client, symbol = trader(server, kind), symbol_of(kind)
    ticker = await client.fetch_ticker(symbol)
    order = await client.create_order(symbol, "market", "buy", 0.01, params={"newClientOrderId": "first"})
    assert (order["status"], order["filled"], order["clientOrderId"]) == ("closed", 0.01, "first")
    assert order["average"] == pytest.approx(ticker["last"] * 1.0001, abs=0.02)
    trades = await client.fetch_my_trades(symbol)
    assert [(each["amount"], each["side"], each["order"]) for each in trades] == [(0.01, "buy", order["id"])]
    balance = await client.fetch_balance()
    if kind == "spot":
        assert balance["BTC"]["free"] == pytest.approx(0.01 * 0.999)
        assert balance["USDT"]["free"] == pytest.approx(100_000 - order["cost"])
    else:
        (position,) = await client.fetch_positions([symbol])
        assert (position["side"], position["contracts"]) == ("long", 0.01)
        assert position["entryPrice"] == order["average"]
        assert balance["USDT"]["total"] == pytest.approx(100_000 - order["cost"] * 0.001, abs=1)
        await client.create_order(symbol, "market", "sell", 0.05, params={"reduceOnly": True})
        assert await client.fetch_positions([symbol]) == []


@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_an_id_that_was_used_is_refused_under_the_stricter_rule(serve: Serve, trader: Trader, kind: str) -> None:
    server = await serve(terms=Terms(client_ids="ever"))
    client, symbol = trader(server, kind), symbol_of(kind)
    await client.create_order(symbol, "market", "buy", 0.01, params={"newClientOrderId": "once"})
    with pytest.raises(ccxt_library.InvalidOrder, match=r"Duplicate order sent|ClientOrderId is duplicated"):
        await client.create_order(symbol, "market", "buy", 0.01, params={"newClientOrderId": "once"})
    found = await client.fetch_order("", symbol, params={"origClientOrderId": "once"})
    assert (found["filled"], len(await client.fetch_my_trades(symbol))) == (0.01, 1)
    with pytest.raises(ccxt_library.OrderNotFound):
        await client.fetch_order("", symbol, params={"origClientOrderId": "never"})


@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_an_id_may_be_used_again_once_its_order_is_done(serve: Serve, trader: Trader, kind: str) -> None:
    server = await serve()
    client, symbol = trader(server, kind), symbol_of(kind)
    twice = {"newClientOrderId": "twice"}
    filled = [await client.create_order(symbol, "market", "buy", 0.01, params=twice) for _ in range(2)]
    assert [each["filled"] for each in filled] == [0.01, 0.01]
    resting = await client.create_order(symbol, "limit", "buy", 0.01, 20_000, params=twice)
    for type_, price in (("market", None), ("limit", 21_000)):
        with pytest.raises(ccxt_library.InvalidOrder, match=r"Duplicate order sent|ClientOrderId is duplicated"):
            await client.create_order(symbol, type_, "buy", 0.01, price, params=twice)
    await client.cancel_order(resting["id"], symbol)
    latest = await client.create_order(symbol, "market", "sell", 0.01, params=twice)
    found = await client.fetch_order("", symbol, params={"origClientOrderId": "twice"})
    assert found["id"] == latest["id"], "of several with one id, the last is found"


@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_a_limit_order_rests_is_cancelled_and_cannot_be_cancelled_twice(
    serve: Serve, trader: Trader, kind: str
) -> None:
    server = await serve()
    client, symbol = trader(server, kind), symbol_of(kind)
    order = await client.create_order(symbol, "limit", "buy", 0.01, 20_000)
    assert (order["status"], [each["id"] for each in await client.fetch_open_orders(symbol)]) == ("open", [order["id"]])
    locked = (await client.fetch_balance())["USDT"]["used"]
    assert locked == pytest.approx(200 if kind == "spot" else 10)
    assert (await client.cancel_order(order["id"], symbol))["status"] == "canceled"
    assert (await client.fetch_balance())["USDT"]["used"] == 0
    with pytest.raises(ccxt_library.OrderNotFound):
        await client.cancel_order(order["id"], symbol)
    assert await client.fetch_open_orders(symbol) == []


@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_a_filled_order_cannot_be_cancelled(serve: Serve, trader: Trader, kind: str) -> None:
    client, symbol = trader(await serve(), kind), symbol_of(kind)
    order = await client.create_order(symbol, "market", "buy", 0.01)
    with pytest.raises(ccxt_library.OrderNotFound):
        await client.cancel_order(order["id"], symbol)


async def lowest(count: int) -> float:
    candles = await sources.synthetic(7).fetch("BTCUSDT", "1m", START, START + count * MINUTE_MS)
    return float(candles.low.min())


@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_a_limit_order_is_filled_by_the_minute_that_touches_it(serve: Serve, trader: Trader, kind: str) -> None:
    server = await serve()
    client, symbol = trader(server, kind), symbol_of(kind)
    candles = await sources.synthetic(7).fetch("BTCUSDT", "1m", START, START + 600 * MINUTE_MS)
    price = round(float(candles.low.min()) + 1, 2)
    touched = int((candles.low <= price).argmax())
    order = await client.create_order(symbol, "limit", "buy", 0.01, price)
    advance(server, touched)
    assert (await client.fetch_order(order["id"], symbol))["status"] == "open"
    advance(server, 1)
    filled = await client.fetch_order(order["id"], symbol)
    assert (filled["status"], filled["average"]) == ("closed", price)
    assert filled["lastTradeTimestamp"] == START + (touched + 1) * MINUTE_MS


async def test_a_spot_stop_loss_is_triggered(serve: Serve, trader: Trader) -> None:
    server = await serve()
    client = trader(server, "spot")
    await client.create_order("BTC/USDT", "market", "buy", 0.01)
    trigger = round(await lowest(600) + 1, 2)
    order = await client.create_order("BTC/USDT", "market", "sell", 0.009, params={"stopLossPrice": trigger})
    assert (order["status"], order["triggerPrice"]) == ("open", trigger)
    advance(server, 600)
    closed = await client.fetch_order(order["id"], "BTC/USDT")
    assert closed["status"] == "closed"
    assert closed["average"] <= trigger
    assert (await client.fetch_balance())["BTC"]["total"] == pytest.approx(0.00099)


async def test_a_futures_stop_closes_the_position_and_its_take_profit_goes(serve: Serve, trader: Trader) -> None:
    server = await serve()
    client, symbol = trader(server, "futures"), "BTC/USDT:USDT"
    await client.create_order(symbol, "market", "buy", 0.01)
    trigger = round(await lowest(600) + 1, 2)
    close = {"closePosition": True}
    stop = await client.create_order(symbol, "market", "sell", None, params={"stopLossPrice": trigger, **close})
    take = await client.create_order(symbol, "market", "sell", None, params={"takeProfitPrice": 90_000, **close})
    waiting = await client.fetch_open_orders(symbol, params={"trigger": True})
    assert {each["id"] for each in waiting} == {stop["id"], take["id"]}
    assert await client.fetch_open_orders(symbol) == []
    advance(server, 600)
    assert await client.fetch_positions([symbol]) == []
    closed = await client.fetch_order(stop["id"], symbol, params={"trigger": True})
    assert (closed["status"], closed["info"]["actualOrderId"]) == ("closed", stop["id"])
    assert (await client.fetch_order(stop["id"], symbol))["filled"] == 0.01
    assert (await client.fetch_order(take["id"], symbol, params={"trigger": True}))["status"] == "expired"


async def test_a_conditional_order_of_futures_is_cancelled_at_its_own_endpoint(serve: Serve, trader: Trader) -> None:
    client, symbol = trader(await serve(), "futures"), "BTC/USDT:USDT"
    await client.create_order(symbol, "market", "sell", 0.01)
    params = {"stopLossPrice": 90_000, "reduceOnly": True, "clientOrderId": "stop-1"}
    await client.create_order(symbol, "market", "buy", 0.01, params=params)
    with pytest.raises(ccxt_library.OrderNotFound):
        await client.cancel_order("", symbol, params={"origClientOrderId": "stop-1"})
    await client.cancel_order("", symbol, params={"clientAlgoId": "stop-1", "trigger": True})
    assert await client.fetch_open_orders(symbol, params={"trigger": True}) == []


async def test_leverage_and_modes_of_a_futures_account(serve: Serve, trader: Trader) -> None:
    client, symbol = trader(await serve(), "futures"), "BTC/USDT:USDT"
    assert (await client.set_leverage(3, symbol))["leverage"] == 3
    with pytest.raises(ccxt_library.MarginModeAlreadySet):
        await client.set_margin_mode("cross", symbol)
    with pytest.raises(ccxt_library.BaseError, match="one-way positions only"):
        await client.set_position_mode(True, symbol)
    await client.create_order(symbol, "market", "buy", 0.01)
    with pytest.raises(ccxt_library.InsufficientFunds):
        await client.create_order(symbol, "market", "buy", 50)


@pytest.mark.parametrize(
    ("kind", "order", "error", "said"),
    [
        ("spot", ("limit", "buy", 100, 50_000), ccxt_library.InsufficientFunds, "insufficient balance"),
        ("spot", ("limit", "buy", 0.00001, 10_000), ccxt_library.BaseError, "NOTIONAL"),
        ("futures", ("limit", "buy", 0.00001, 10_000), ccxt_library.InvalidOrder, "-4164"),
    ],
)
async def test_refusals_are_binances(
    serve: Serve, trader: Trader, kind: str, order: Any, error: type[Exception], said: str
) -> None:
    client = trader(await serve(), kind)
    with pytest.raises(error, match=said):
        await client.create_order(symbol_of(kind), *order)


LIMITS = Limits(
    max_quantity=Decimal("0.2"),
    max_market_quantity=Decimal("0.1"),
    max_notional=Decimal(9_000),
    min_price=Decimal("0.01"),
    max_price=Decimal(100_000),
    price_band=(Decimal("0.5"), Decimal("1.5")),
    max_stops=1,
    max_orders=9,
)


@pytest.mark.parametrize(
    ("order", "spot", "futures"),
    [
        (("market", "buy", 0.11), "Filter failure: MARKET_LOT_SIZE", "-4005"),
        (("limit", "buy", 0.21, 40_000), "Filter failure: LOT_SIZE", "-4005"),
        (("limit", "buy", 0.19, 50_000), "Filter failure: NOTIONAL", "-4005"),
        (("limit", "buy", 0.01, 20_000), "Filter failure: PERCENT_PRICE_BY_SIDE", "-4024"),
        (("limit", "sell", 0.01, 90_000), "Filter failure: PERCENT_PRICE_BY_SIDE", "-4016"),
        (("limit", "buy", 0.01, 100_001), "Filter failure: PRICE_FILTER", "-4002"),
    ],
)
@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_orders_beyond_a_filter_are_refused_as_by_binance(
    serve: Serve, trader: Trader, kind: str, order: Any, spot: str, futures: str
) -> None:
    client, symbol = trader(await serve(terms=Terms(limits=LIMITS)), kind), symbol_of(kind)
    with pytest.raises(ccxt_library.BaseError, match=spot if kind == "spot" else futures):
        await client.create_order(symbol, *order)
    assert await client.fetch_my_trades(symbol) == []


@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_stops_beyond_their_number_are_refused_as_by_binance(serve: Serve, trader: Trader, kind: str) -> None:
    client, symbol = trader(await serve(terms=Terms(limits=LIMITS)), kind), symbol_of(kind)
    await client.create_order(symbol, "market", "buy", 0.02)
    await client.create_order(symbol, "market", "sell", 0.001, params={"stopLossPrice": 30_000})
    refused = "MAX_NUM_ALGO_ORDERS" if kind == "spot" else "-4045"
    with pytest.raises(ccxt_library.BaseError, match=refused):
        await client.create_order(symbol, "market", "sell", 0.001, params={"stopLossPrice": 31_000})


@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_limits_are_published(serve: Serve, trader: Trader, kind: str) -> None:
    client = trader(await serve(terms=Terms(limits=LIMITS)), kind)
    await client.load_markets()
    market = client.market(symbol_of(kind))
    assert (market["limits"]["amount"]["max"], market["limits"]["market"]["max"]) == (0.2, 0.1)
    assert (market["limits"]["price"]["min"], market["limits"]["price"]["max"]) == (0.01, 100_000)
    names = {each["filterType"] for each in market["info"]["filters"]}
    band = "PERCENT_PRICE_BY_SIDE" if kind == "spot" else "PERCENT_PRICE"
    assert {band, "MAX_NUM_ALGO_ORDERS", "MAX_NUM_ORDERS", "LOT_SIZE", "MARKET_LOT_SIZE"} <= names


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"apiKey": "stranger"}, ccxt_library.AuthenticationError, "Invalid API-key"),
        ({"secret": "wrong"}, ccxt_library.AuthenticationError, "Signature for this request"),
    ],
)
async def test_strangers_are_sent_away(
    serve: Serve, trader: Trader, options: dict[str, str], error: type[Exception], said: str
) -> None:
    client = trader(await serve(), "futures", **options)
    with pytest.raises(error, match=said):
        await client.fetch_balance()


async def test_a_request_that_is_too_old_or_from_the_future_is_refused(serve: Serve, trader: Trader) -> None:
    client = trader(await serve(), "futures")
    await client.load_markets()
    for shift, said in ((-60_000, "outside of the recvWindow"), (60_000, "ahead of the server")):
        client.nonce = lambda shift=shift: client.milliseconds() + shift
        with pytest.raises(ccxt_library.InvalidNonce, match=said):
            await client.fetch_balance()
    client.nonce = lambda: START + 500  # the time of the venue
    assert (await client.fetch_balance())["USDT"]["total"] == 100_000
