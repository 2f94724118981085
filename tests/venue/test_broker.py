from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.values import make_entry, make_position
from tests.venue.conftest import START, advance, order_of

from backtest_kit.broker.base import Broker, OrderDeleted, OrderRejected, OrderTransient
from backtest_kit.broker.order_ids import SignalIds
from backtest_kit.errors import Outcome, RetryLater
from backtest_kit.market import sources
from backtest_kit.model.position import Position, RestingEntry
from backtest_kit.venue.exchange import ClientIds, Terms
from backtest_kit.venue.faults import Fault
from backtest_kit.venue.http import HttpClient
from backtest_kit.venue.server import VenueServer

IDS = SignalIds("s1")
Serve = Callable[..., Awaitable[VenueServer]]
BrokerOf = Callable[..., Broker]


def position(signal_id: str = "s1", direction: Any = "long", opened_at_ms: int = START) -> Position:
    return make_position(entry(signal_id, direction), opened_at_ms)


def entry(signal_id: str = "s1", direction: Any = "long") -> RestingEntry:
    return make_entry(signal_id, direction, price=50_000.0, take=90_000.0, stop=10_000.0, cost=1000.0, at_ms=START)


async def candles(minutes: int) -> Any:
    return await sources.synthetic(7).fetch("BTCUSDT", "1m", START, START + minutes * 60_000)


def orders(server: VenueServer) -> dict[str, str]:
    return {each.client_order_id: each.status for each in server.venue.exchanges["futures"].orders.values()}


def fill_count(server: VenueServer) -> int:
    return len(server.venue.exchanges["futures"].fills)


@pytest.mark.parametrize("direction", ["long", "short"])
async def test_the_life_of_a_position_at_the_venues_prices(serve: Serve, broker_of: BrokerOf, direction: Any) -> None:
    server = await serve()
    broker = broker_of(server)
    levels = {"direction": direction}
    if direction == "short":
        levels |= {"take_profit": 10_000.0, "stop_loss": 90_000.0}
    await broker.start()
    assert broker.reports_fills
    opened = await broker.open_position(order_of("open", **levels))
    assert opened is not None
    assert opened.quantity == pytest.approx(0.018, abs=0.001)
    assert opened.cost == pytest.approx(1000, abs=1)
    assert opened.fee == pytest.approx(opened.cost * 0.001)
    assert await broker.check_position(position(direction=direction)) is None
    (held,) = await broker.holdings(["BTCUSDT", "ETHUSDT"]) or []
    assert (held.symbol, held.direction, held.quantity) == ("BTCUSDT", direction, opened.quantity)
    assert (held.price_open, held.stop_loss) == (opened.price, levels.get("stop_loss", 10_000.0))
    assert held.client_order_ids == (IDS.stop(0), IDS.take(0))

    added = await broker.add_to_position(order_of("add", number=1, cost=500.0, **levels))
    reduced = await broker.reduce_position(order_of("reduce", number=1, cost=750.0, **levels))
    assert added is not None
    assert reduced is not None
    assert reduced.quantity == pytest.approx((opened.quantity + added.quantity) / 2, abs=0.00001)

    stop = 11_000.0 if direction == "long" else 89_000.0
    await broker.move_stop(order_of("move_stop", number=1, **levels | {"stop_loss": stop}))
    await broker.move_stop(order_of("move_stop", number=1, **levels | {"stop_loss": stop}))
    (held,) = await broker.holdings(["BTCUSDT"]) or []
    assert (held.stop_loss, held.client_order_ids) == (stop, (IDS.take(0), IDS.order("move_stop", 1)))

    closed = await broker.close_position(order_of("close", cost=750.0, **levels))
    assert closed is not None
    assert closed.quantity == pytest.approx(opened.quantity + added.quantity - reduced.quantity)
    assert await broker.holdings(["BTCUSDT"]) == []
    assert orders(server) == {
        IDS.entry: "filled",
        IDS.stop(0): "cancelled",
        IDS.take(0): "expired",
        IDS.order("add", 1): "filled",
        IDS.order("reduce", 1): "filled",
        IDS.order("move_stop", 1): "expired",
        IDS.order("close", 0): "filled",
    }


async def test_a_stop_that_the_venue_triggers_is_told_with_its_reason(serve: Serve, broker_of: BrokerOf) -> None:
    server = await serve()
    broker = broker_of(server)
    series = await candles(600)
    stop = round(float(series.low.min()) + 1, 2)
    await broker.open_position(order_of("open", stop_loss=stop))
    advance(server, 600)
    fill = await broker.check_position(position())
    assert fill is not None
    assert (fill.reason, fill.price <= stop) == ("stop_loss", True)
    assert fill.timestamp == int(series.timestamp[(series.low <= stop).argmax()]) + 60_000
    assert await broker.close_position(order_of("close")) == fill
    assert orders(server) == {IDS.entry: "filled", IDS.stop(0): "filled", IDS.take(0): "expired"}


async def test_an_entry_rests_is_filled_and_protected(serve: Serve, broker_of: BrokerOf) -> None:
    server = await serve()
    broker = broker_of(server)
    series = await candles(600)
    price = round(float(series.low.min()) + 1, 2)
    await broker.place_entry(order_of("place", price=price))
    assert (await broker.find(order_of("place", price=price))).status == "resting"
    assert await broker.check_entry(entry()) is None
    with pytest.raises(OrderTransient) as early:
        await broker.open_position(order_of("activate", price=price))
    assert early.value.outcome is Outcome.NOT_DONE
    advance(server, 600)
    fill = await broker.check_entry(entry())
    assert fill is not None
    assert fill.price == price
    assert await broker.open_position(order_of("activate", price=price)) == fill
    assert await broker.cancel_entry(order_of("cancel")) == fill
    assert await broker.check_position(position()) is None
    (held,) = await broker.holdings(["BTCUSDT"]) or []
    assert held.stop_loss == 10_000.0


async def test_a_cancelled_entry_leaves_nothing(serve: Serve, broker_of: BrokerOf) -> None:
    server = await serve()
    broker = broker_of(server)
    await broker.place_entry(order_of("place", price=20_000.0))
    assert await broker.cancel_entry(order_of("cancel")) is None
    assert await broker.cancel_entry(order_of("cancel")) is None
    assert set(orders(server).values()) == {"cancelled"}
    with pytest.raises(OrderDeleted, match="the entry s1 does not rest here"):
        await broker.check_entry(entry())


async def test_what_somebody_else_closes_is_told(
    serve: Serve, broker_of: BrokerOf, http_of: Callable[[VenueServer], HttpClient]
) -> None:
    server = await serve()
    broker = broker_of(server)
    opened = await broker.open_position(order_of("open"))
    assert opened is not None
    trade = {"symbol": "BTCUSDT", "side": "sell", "quantity": str(opened.quantity)}
    status, _ = await http_of(server).ask("POST", "/sim/trade", trade)
    assert status == 200
    fill = await broker.check_position(position())
    assert fill is not None
    assert (fill.quantity, fill.reason) == (opened.quantity, "closed")
    with pytest.raises(OrderDeleted, match="s2 has no position here"):
        await broker.check_position(position("s2", opened_at_ms=fill.timestamp + 1))


async def test_at_reference_everything_is_as_the_engine_decided(serve: Serve, broker_of: BrokerOf) -> None:
    server = await serve()
    broker = broker_of(server, fill_at="reference")
    assert not broker.reports_fills
    opened = await broker.open_position(order_of("open", price=43_210.987))
    assert opened is not None
    assert (opened.price, opened.fee) == (43_210.987, None), "the fee is the one of the settings"
    assert opened.cost == pytest.approx(1000)
    advance(server, 600)  # no level is watched by the venue
    assert await broker.check_position(position()) is None
    await broker.move_stop(order_of("move_stop", number=1, stop_loss=40_000.0))
    added = await broker.add_to_position(order_of("add", price=41_000.123, cost=333.3))
    assert added is not None
    taken = await broker.reduce_position(order_of("reduce", price=42_000.0, cost=100.0))
    closed = await broker.close_position(
        order_of("close", price=44_000.5, quantity=opened.quantity + added.quantity - 0.001)
    )
    assert closed is not None
    assert taken is not None
    assert (closed.price, taken.price) == (44_000.5, 42_000.0)
    assert await broker.holdings(["BTCUSDT"]) == []
    assert await broker.check_position(position()) == closed

    await broker.place_entry(order_of("place", "s2", price=1.0))
    advance(server, 60)
    assert await broker.check_entry(entry("s2")) is None
    activated = await broker.open_position(order_of("activate", "s2", price=40_000.0))
    assert activated is not None
    assert activated.price == 40_000.0
    assert activated.cost == pytest.approx(1000)
    assert await broker.open_position(order_of("activate", "s2", price=40_000.0)) == activated


async def test_a_lost_answer_is_found_and_the_order_is_filled_once(serve: Serve, broker_of: BrokerOf) -> None:
    server = await serve(terms=Terms(client_ids="ever"))
    broker = broker_of(server)
    server.faults.add(Fault(kind="lose_response", endpoint="POST /broker/open"))
    with pytest.raises(OrderTransient) as lost:
        await broker.open_position(order_of("open"))
    assert lost.value.outcome is Outcome.UNKNOWN
    report = await broker.find(order_of("open", attempt=1))
    assert report.status == "filled"
    assert report.fill is not None
    assert fill_count(server) == 1
    with pytest.raises(OrderTransient, match=f"{IDS.entry} is taken by order 1"):
        await broker.open_position(order_of("open", attempt=1))
    assert fill_count(server) == 1


async def test_a_lost_request_was_never_there(serve: Serve, broker_of: BrokerOf) -> None:
    server = await serve()
    broker = broker_of(server)
    server.faults.add(Fault(kind="lose_request", endpoint="POST /broker/open"))
    with pytest.raises(OrderTransient) as lost:
        await broker.open_position(order_of("open"))
    assert lost.value.outcome is Outcome.UNKNOWN
    assert (await broker.find(order_of("open", attempt=1))).status == "absent"
    assert await broker.open_position(order_of("open", attempt=1)) is not None
    assert [each["outcome"] for each in server.requests] == ["lost before it was carried out", 200, 200]


@pytest.mark.parametrize(("rule", "fills"), [("ever", 1), ("open", 2)])
async def test_a_request_delivered_twice_is_done_as_often_as_the_rule_for_ids_allows(
    serve: Serve, broker_of: BrokerOf, rule: ClientIds, fills: int
) -> None:
    server = await serve(terms=Terms(client_ids=rule))
    broker = broker_of(server)
    server.faults.add(Fault(kind="duplicate", endpoint="POST /broker/*", count=0))
    with pytest.raises(OrderTransient) as refused:
        await broker.open_position(order_of("open"))
    assert refused.value.outcome is Outcome.UNKNOWN
    assert (await broker.find(order_of("open"))).status == "filled"
    assert fill_count(server) == fills


async def test_rejections_and_parts(serve: Serve, broker_of: BrokerOf) -> None:
    server = await serve()
    broker = broker_of(server)
    server.faults.add(Fault(kind="reject"))
    with pytest.raises(OrderRejected, match=f"{IDS.entry} is rejected by an injected fault"):
        await broker.open_position(order_of("open"))
    assert (await broker.find(order_of("open"))).status == "absent"

    server.faults.add(Fault(kind="partial", rest_expires=True))
    part = await broker.open_position(order_of("open"))
    assert part is not None
    assert part.cost == pytest.approx(500, abs=2)
    assert (await broker.find(order_of("open"))).fill == part

    server.faults.add(Fault(kind="partial"))
    with pytest.raises(OrderTransient) as going_on:
        await broker.open_position(order_of("open", "s2"))
    assert going_on.value.outcome is Outcome.UNKNOWN
    assert (await broker.find(order_of("open", "s2"))).status == "partly_filled"
    advance(server, 2)
    report = await broker.find(order_of("open", "s2"))
    assert report.status == "filled"
    assert report.fill is not None
    assert report.fill.cost == pytest.approx(1000, abs=5)


async def test_a_venue_that_is_away_is_told_from_one_that_broke_off(serve: Serve, broker_of: BrokerOf) -> None:
    server = await serve()
    broker = broker_of(server)
    server.faults.add(Fault(kind="rate_limit"))
    with pytest.raises(OrderTransient, match="answered 429") as limited:
        await broker.open_position(order_of("open"))
    assert limited.value.outcome is Outcome.NOT_DONE
    await server.stop()
    with pytest.raises(OrderTransient, match="no venue answers") as away:
        await broker.open_position(order_of("open"))
    assert away.value.outcome is Outcome.NOT_DONE
    with pytest.raises(RetryLater, match="no venue answers"):
        await broker.start()


async def test_too_small_an_order_is_rejected_and_none_is_left(serve: Serve, broker_of: BrokerOf) -> None:
    broker = broker_of(await serve())
    with pytest.raises(OrderRejected, match="below 5"):
        await broker.open_position(order_of("open", cost=2.0))
    with pytest.raises(OrderRejected, match="XRPUSDT is not traded here"):
        await broker.holdings(["XRPUSDT"])
    assert await broker.holdings(["BTCUSDT"]) == []


async def test_a_part_at_reference_is_the_whole_fill(serve: Serve, broker_of: BrokerOf) -> None:
    server = await serve()
    broker = broker_of(server, fill_at="reference")
    server.faults.add(Fault(kind="partial"))
    part = await broker.open_position(order_of("open"))
    assert part is not None
    assert (part.price, part.quantity) == (50_000.0, 0.01)
    report = await broker.find(order_of("open"))
    assert (report.status, report.fill) == ("filled", part)
