"""Positions larger than one order may be: refused with the numbers, or protected and closed in parts."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st
from tests.broker.conftest import IDS, PRICE, Bench, Kind, MakeBench, again, order, position

from backtest_kit.broker.base import Fill, OrderRejected, OrderTransient
from backtest_kit.broker.ccxt_market import Market, read_market
from backtest_kit.broker.order_ids import SignalIds
from backtest_kit.venue.orders import Limits

BOTH = pytest.mark.parametrize("kind", ["spot", "futures"])
PARTS_OF = Decimal("0.01")
"""The largest market order of the tests: a position of 0.03 takes three of them."""


def limits(**fields: Any) -> Limits:
    return Limits(**{"max_market_quantity": PARTS_OF, **fields})


async def entered(venue: Bench, **options: Any) -> tuple[Any, Fill]:
    """A position of 0.03, entered with a limit order."""
    broker = await venue.broker(max_slippage_pct=0.5, **options)
    fill = await broker.open_position(order(cost=1500.0))
    assert fill is not None
    # On spot a fee of 0.1 % is taken out of what is bought, where there is one.
    assert fill.quantity in (0.03, 0.02997)
    return broker, fill


def assert_protected(venue: Bench, level: float = PRICE * 0.95) -> None:
    stops = venue.stops()
    assert sum(quantity for _, quantity, _ in stops) == pytest.approx(abs(venue.held()), abs=0.00002)
    assert {trigger for *_, trigger in stops} == {level}
    assert max(quantity for _, quantity, _ in stops) <= float(PARTS_OF)
    numbers = [IDS.stop_number(name) for name, _, _ in stops]
    assert None not in numbers, "every stop is known as one of the position"
    assert len(set(numbers)) == len(numbers)


@BOTH
async def test_a_position_is_protected_moved_reduced_and_closed_in_parts(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, limits=limits(max_stops=6))
    broker, opened = await entered(venue)
    assert_protected(venue)
    held = position(order(cost=1500.0), opened)
    before = venue.stops()
    assert await broker.check_position(held) is None
    assert venue.stops() == before, "what is right is left alone"
    await broker.move_stop(order("move_stop", 1, stop_loss=PRICE * 0.97))
    assert_protected(venue, PRICE * 0.97)
    fill = await broker.reduce_position(order("reduce", 2, quantity=0.014, stop_loss=PRICE * 0.97))
    assert fill is not None
    assert fill.quantity == 0.014
    assert_protected(venue, PRICE * 0.97)
    closed = await broker.close_position(order("close", 3, quantity=0.016, stop_loss=PRICE * 0.97))
    assert closed is not None
    assert abs(venue.held()) < 0.00002
    assert venue.open_orders() == []
    assert max(fill.quantity for fill in venue.fills() if fill.side == "sell") <= PARTS_OF
    assert max(venue.filled_orders().values()) == 1


@BOTH
async def test_stops_in_parts_close_the_position_together(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, PRICE, PRICE * 0.9, limits=limits(), fees_in="quote")
    broker, opened = await entered(venue)
    await venue.advance(3)
    fill = await broker.check_position(position(order(cost=1500.0), opened))
    assert fill is not None
    assert (fill.reason, fill.quantity) == ("stop_loss", 0.03)
    assert venue.open_orders() == []


@BOTH
async def test_an_addition_keeps_the_stops_that_are_right(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, limits=limits(), fees_in="quote")
    broker, _ = await entered(venue)
    before = venue.stops()
    await broker.add_to_position(order("add", 1, cost=250.0))
    assert_protected(venue)
    assert [stop for stop in venue.stops() if stop in before] == before, "three full ones stay, the rest is new"
    assert venue.levels() == [(0.01, PRICE * 0.95)] * 3 + [(0.005, PRICE * 0.95)]


@BOTH
async def test_one_part_cancelled_by_hand_is_placed_again(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, limits=limits())
    broker, opened = await entered(venue)
    await venue.cancel_by_hand(venue.stops()[1][0])
    assert await broker.check_position(position(order(cost=1500.0), opened)) is None
    assert_protected(venue)


async def test_a_future_without_room_for_a_second_stop_moves_the_ones_it_has(bench: MakeBench) -> None:
    venue = await bench("futures", limits=limits(max_stops=4))
    broker, _ = await entered(venue)
    async with venue.server.venue.at_now():
        pass
    await stop_by_hand(venue)
    await broker.move_stop(order("move_stop", 1, stop_loss=PRICE * 0.97))
    ours = [stop for stop in venue.stops() if IDS.stop_number(stop[0]) is not None]
    assert [trigger for *_, trigger in ours] == [PRICE * 0.97] * 3


async def stop_by_hand(venue: Bench) -> None:
    """A stop that somebody else has on the market."""
    from backtest_kit.venue.binance.api import API_KEY
    from backtest_kit.venue.journal import Place
    from backtest_kit.venue.orders import NewOrder

    stop = NewOrder(
        symbol="BTCUSDT",
        side="buy",
        type="stop",
        client_order_id=f"by-hand-{len(venue.stops())}",
        quantity=Decimal("0.001"),
        trigger=Decimal(60_000),
    )
    async with venue.server.venue.at_now():
        venue.server.venue.do(venue.kind, API_KEY, Place(stop))


@BOTH
@pytest.mark.parametrize(
    ("limit", "cost", "message"),
    [
        (
            limits(),
            1000.0,
            r"0\.02 BTC are more than one market order may have, 0\.01: use a cost of 500\.00 USDT at most",
        ),
        (
            limits(max_market_quantity=None, max_quantity=Decimal("0.015")),
            1000.0,
            r"may have, 0\.015: use a cost of 750",
        ),
        (
            limits(max_market_quantity=None, min_price=Decimal(49_000)),
            1000.0,
            r"a stop at 47500 .*lowest price is 49000",
        ),
        (limits(max_market_quantity=None, max_stops=1), 1000.0, r"0\.02 BTC needs [12] stops, and 1 are the most"),
        (
            limits(max_market_quantity=None, max_orders=1),
            1000.0,
            r"needs [12] orders, and 1 are the most, .*others take 1",
        ),
    ],
)
async def test_an_entry_that_could_not_be_protected_is_refused_with_the_numbers(
    bench: MakeBench, kind: Kind, limit: Limits, cost: float, message: str
) -> None:
    venue = await bench(kind, limits=limit)
    broker = await venue.broker()
    if limit.max_stops or limit.max_orders:
        await stop_by_hand(venue)
    before = venue.open_orders()
    with pytest.raises(OrderRejected, match=message):
        await broker.open_position(order(cost=cost))
    assert venue.fills() == []
    assert venue.open_orders() == before


@BOTH
async def test_an_addition_is_counted_with_what_is_held(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, limits=limits(max_stops=3 if kind == "spot" else 4))
    broker, _ = await entered(venue)
    with pytest.raises(OrderRejected, match=r"a position of 0\.0\d+ BTC needs [45] stops"):
        await broker.add_to_position(order("add", 1, cost=500.0))
    assert_protected(venue)


@BOTH
async def test_a_resting_entry_is_measured_like_one_at_the_market(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, limits=limits(max_stops=2))
    broker = await venue.broker()
    with pytest.raises(OrderRejected, match=r"needs [34] stops, and 2 are the most"):
        await broker.place_entry(order("place", price=PRICE * 0.98, cost=1470.0))
    assert venue.open_orders() == []


@BOTH
async def test_a_stop_is_not_moved_out_of_the_prices_that_are_taken(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, limits=limits(min_price=Decimal(45_000)))
    broker, _ = await entered(venue)
    with pytest.raises(OrderRejected, match=r"a stop at 40000 is refused, the lowest price is 45000"):
        await broker.move_stop(order("move_stop", 1, stop_loss=40_000.0))
    assert_protected(venue)


@BOTH
async def test_parts_that_cannot_be_placed_leave_nothing_behind(
    bench: MakeBench, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    venue = await bench(kind, limits=limits())
    skip = 2 if kind == "spot" else 1
    endpoint = "POST */order" if kind == "spot" else "POST */algoOrder"
    venue.fault("reject", endpoint, skip=skip)
    _, opened = await entered(venue)
    assert "no stop can be placed" in caplog.text
    assert abs(venue.held()) < 0.00002
    assert venue.open_orders() == []
    fill = await (await venue.broker()).check_position(position(order(cost=1500.0), opened))
    assert fill is not None
    assert fill.reason == "closed"


@BOTH
async def test_a_market_that_is_beyond_the_stop_is_left_in_parts(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, PRICE, PRICE * 0.9, limits=limits(), fees_in="quote")
    broker, opened = await entered(venue)
    for name, _, _ in venue.stops()[:2]:
        await venue.cancel_by_hand(name)
    await venue.advance(3)
    fill = await broker.check_position(position(order(cost=1500.0), opened))
    assert fill is not None
    assert (fill.reason, fill.quantity) == ("stop_loss", 0.03), "what the last stop left was sold at the market"
    assert max(fill.quantity for fill in venue.fills() if fill.side == "sell") <= PARTS_OF
    assert abs(venue.held()) < 0.00002
    assert venue.open_orders() == []


@BOTH
async def test_a_reduction_cut_off_between_its_parts_is_finished(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, limits=limits(max_stops=6))
    broker, _ = await entered(venue, arrival_ms=200)
    reduce = order("reduce", 1, quantity=0.018)
    venue.fault("lose_request", "POST */order", skip=1)
    with pytest.raises(OrderTransient):
        await broker.reduce_position(reduce)
    later = await venue.broker(arrival_ms=200)
    assert (await later.find(again(reduce))).status == "absent", "the rest of it was never sent"
    assert_protected(venue)
    fill = await later.reduce_position(again(reduce))
    assert fill is not None
    assert fill.quantity == pytest.approx(0.018)
    assert_protected(venue)
    assert (await later.find(again(again(reduce)))).status == "filled"
    assert max(venue.filled_orders().values()) == 1


async def test_the_last_part_of_a_close_may_still_be_under_way(bench: MakeBench) -> None:
    venue = await bench("spot", limits=limits(max_market_quantity=Decimal("0.02")), fees_in="quote")
    await venue.by_hand("buy", 0.02)
    await venue.by_hand("buy", 0.02)
    savings = venue.held()
    dying, _ = await entered(venue)
    sent, close = venue.sent(), order("close", 1, quantity=0.03)
    venue.fault("latency", "POST */order", skip=1, latency_ms=2500)
    closing = asyncio.create_task(dying.close_position(close))
    while venue.sent() < sent + 2:
        await asyncio.sleep(0.01)
    closing.cancel()
    await asyncio.wait([closing])
    later = await venue.broker(arrival_ms=5000)
    if (await later.find(again(close))).status == "absent":
        await later.close_position(again(close))
    while any("outcome" not in request for request in venue.server.requests):
        await asyncio.sleep(0.01)
    assert venue.held() == pytest.approx(savings), "the second part was not sold twice"


MARKET = Market(
    symbol="BTC/USDT",
    base="BTC",
    quote="USDT",
    contract=False,
    contract_size=Decimal(1),
    lot=Decimal("0.001"),
    tick=Decimal("0.01"),
    min_quantity=Decimal("0.001"),
    min_cost=Decimal(5),
    market_stop=True,
    largest_at_market=Decimal(5),
)


@given(st.integers(0, 10**6), st.integers(3, 9_000))
def test_parts_are_the_whole_and_none_is_too_small_or_too_large(lots: int, largest: int) -> None:
    market = msgspec.structs.replace(MARKET, largest_at_market=largest * MARKET.lot)
    whole = lots * MARKET.lot
    parts = market.parts(whole, 4_000.0, at_market=True)
    assert sum(parts) == whole
    assert all(part <= largest * MARKET.lot and part % MARKET.lot == 0 for part in parts)
    assert len(parts) == -(-lots // largest)
    if not market.unsellable(whole, 4_000.0):
        assert not any(market.unsellable(part, 4_000.0) for part in parts)


@pytest.mark.parametrize(
    ("fields", "price", "expected"),
    [
        ({}, 100, Decimal(5)),
        ({"largest": Decimal(4)}, 100, Decimal(4)),
        ({"max_cost": Decimal(100)}, 100, Decimal(5)),
        ({"max_cost_at_market": Decimal(100)}, 100, Decimal(1)),
        ({"largest_at_market": None}, 100, None),
    ],
)
def test_the_largest_order_is_the_least_of_its_limits(fields: Any, price: float, expected: Decimal | None) -> None:
    market = msgspec.structs.replace(MARKET, **fields)
    assert market.largest_order(price, at_market=True) == expected


@pytest.mark.parametrize(
    ("side", "limit", "told"),
    [("sell", 79, "lowest limit of a sale is 80"), ("sell", 80, ""), ("buy", 121, "purchase is 120"), ("buy", 120, "")],
)
def test_a_limit_too_far_from_the_price_is_named(side: Any, limit: int, told: str) -> None:
    market = msgspec.structs.replace(MARKET, sell_floor=Decimal("0.8"), buy_cap=Decimal("1.2"))
    found = market.too_far(side, Decimal(limit), 100.0)
    assert (told in found) if told else (found == "")


def test_both_sides_of_every_limit_are_read() -> None:
    filters = [
        {"filterType": "NOTIONAL", "minNotional": "5", "maxNotional": "900", "applyMaxToMarket": False},
        {"filterType": "PERCENT_PRICE_BY_SIDE", "askMultiplierDown": "0.2", "bidMultiplierUp": "5"},
        {"filterType": "MAX_NUM_ALGO_ORDERS", "maxNumAlgoOrders": 5},
        {"filterType": "MAX_NUM_ORDERS", "maxNumOrders": 200},
    ]
    raw = {
        "symbol": "BTC/USDT",
        "base": "BTC",
        "quote": "USDT",
        "limits": {
            "amount": {"min": 0.001, "max": 100.0},
            "market": {"min": 0.0, "max": 9.0},
            "price": {"min": 0.01, "max": 0.0},
            "cost": {"min": 5.0, "max": 900.0},
        },
        "precision": {"amount": 0.001, "price": 0.01},
        "info": {"filters": filters},
    }
    market = read_market(raw, 4, (2, 3, 4))
    least, most = market.min_quantity, market.largest
    assert [str(each) for each in (least, most, market.largest_at_market)] == ["0.001", "100.0", "9.0"]
    assert [str(each) for each in (market.min_cost, market.max_cost, market.max_cost_at_market)] == [
        *("5.0", "900.0", "None")
    ]
    assert [str(each) for each in (market.min_price, market.max_price)] == ["0.01", "None"]
    assert [str(each) for each in (market.sell_floor, market.buy_cap)] == ["0.2", "5"]
    assert (market.max_stops, market.max_orders) == (5, 200)


def test_numbers_of_stops_are_recognised_however_large() -> None:
    ids = SignalIds("BTCUSDT-202401010000-0a1b2c3d")
    for number in (0, 10**6, 2**32 - 1):
        assert ids.stop_number(ids.stop(number)) == number
