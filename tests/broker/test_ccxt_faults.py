"""What goes wrong between `CcxtBroker` and an exchange: nothing is bought twice, nothing stays without a stop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.broker.conftest import IDS, PRICE, SIGNAL, Bench, Kind, MakeBench, again, order, position, received

from backtest_kit.broker.base import OrderDeleted, OrderRejected, OrderTransient
from backtest_kit.errors import Outcome
from backtest_kit.venue.binance.api import API_SECRET

BOTH = pytest.mark.parametrize("kind", ["spot", "futures"])
LOOK_UPS: dict[str, Any] = {"endpoint": "GET */order", "count": 2}
"""Twice: what asks for something and changes nothing is asked again where an old connection breaks."""


def sale_look_ups(kind: Kind) -> dict[str, Any]:
    """Those of a sale that the exchange has not answered: on a spot market there is a second one, when the sale can
    no longer arrive, before the stop is put back."""
    return LOOK_UPS | {"count": 4} if kind == "spot" else LOOK_UPS


def stop_posts(kind: Kind) -> dict[str, Any]:
    """The requests that place stops, after an entry."""
    return {"endpoint": "POST */order", "skip": 1} if kind == "spot" else {"endpoint": "POST */algoOrder"}


def nothing_is_naked(venue: Bench) -> None:
    assert sum(quantity for _, quantity, _ in venue.stops()) == pytest.approx(abs(venue.held()), abs=0.00002)


def nothing_is_uncovered(venue: Bench) -> None:
    """The stop of a future may be for more than is held: it only reduces."""
    ((_, quantity, _),) = venue.stops()
    assert quantity >= abs(venue.held()) - 0.00002
    if venue.kind == "spot":
        nothing_is_naked(venue)


@BOTH
async def test_an_entry_whose_answer_was_lost_is_found(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    venue.fault("lose_response", "POST */order")
    fill = await broker.open_position(order())
    assert fill is not None
    assert venue.filled_orders() == {IDS.entry: 1}
    assert len(venue.stops()) == 1


@BOTH
async def test_an_entry_that_nobody_could_ask_about_is_not_sent_again(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    venue.fault("lose_response", "POST */order")
    venue.fault("outage", **LOOK_UPS)
    with pytest.raises(OrderTransient, match="ExchangeNotAvailable") as caught:
        await broker.open_position(order())
    assert caught.value.outcome is Outcome.UNKNOWN
    assert venue.stops() == []
    later = await venue.broker()
    report = await later.find(again(order()))
    assert report.status == "filled"
    assert report.fill is not None
    assert report.fill.quantity == pytest.approx(received(venue, 0.02))
    assert await later.open_position(again(order())) == report.fill
    assert venue.filled_orders() == {IDS.entry: 1}
    assert len(venue.stops()) == 1
    nothing_is_naked(venue)


@BOTH
async def test_an_entry_that_never_arrived_is_sent_again(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    venue.fault("lose_request", "POST */order")
    with pytest.raises(OrderTransient) as caught:
        await broker.open_position(order())
    assert caught.value.outcome is Outcome.UNKNOWN
    assert (await broker.find(again(order()))).status == "absent"
    assert await broker.open_position(again(order())) is not None
    assert venue.filled_orders() == {IDS.entry: 1}


@BOTH
async def test_an_order_still_under_way_is_waited_for(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker(timeout_ms=1000, arrival_ms=4000)
    venue.fault("latency", "POST */order", latency_ms=2500)
    with pytest.raises(OrderTransient) as caught:
        await broker.open_position(order())
    assert caught.value.outcome is Outcome.UNKNOWN
    assert venue.fills() == [], "it has not arrived when the first look finds nothing"
    assert (await broker.find(again(order()))).status == "filled"
    assert venue.filled_orders() == {IDS.entry: 1}


async def test_another_program_s_order_still_under_way_is_waited_for(bench: MakeBench) -> None:
    venue = await bench("futures")
    dying = await venue.broker()
    venue.fault("latency", "POST */order", latency_ms=600)
    entering = asyncio.create_task(dying.open_position(order()))
    while not venue.sent():
        await asyncio.sleep(0.01)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    later = await venue.broker(
        arrival_ms=1000
    )  # on a busy machine the order may have arrived by now: it is found all the same
    assert (await later.find(again(order()))).status == "filled"
    assert venue.filled_orders() == {IDS.entry: 1}
    nothing_is_naked(venue)


@BOTH
async def test_a_request_delivered_twice_is_filled_once_where_ids_are_never_taken_again(
    bench: MakeBench, kind: Kind
) -> None:
    venue = await bench(kind, client_ids="ever")
    broker = await venue.broker()
    venue.fault("duplicate", "POST */order")
    fill = await broker.open_position(order())
    assert fill is not None
    assert fill.quantity == pytest.approx(received(venue, 0.02))
    assert venue.filled_orders() == {IDS.entry: 1}
    nothing_is_naked(venue)


@BOTH
@pytest.mark.parametrize("lost", ["lose_response", "lose_request", "duplicate", "rate_limit"])
async def test_one_stop_is_placed_whatever_happens_to_its_request(bench: MakeBench, kind: Kind, lost: str) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    venue.fault(lost, **stop_posts(kind))
    opened = await broker.open_position(order())
    assert len(venue.stops()) == 1
    nothing_is_naked(venue)
    assert await broker.check_position(position(order(), opened)) is None
    assert len(venue.stops()) == 1


async def test_the_stop_is_placed_before_the_fees_are_asked_for(bench: MakeBench) -> None:
    venue = await bench("futures")
    broker = await venue.broker()
    venue.fault("outage", "GET */userTrades", count=2)
    with pytest.raises(OrderTransient):
        await broker.open_position(order())
    nothing_is_naked(venue)
    report = await broker.find(again(order()))
    assert report.fill is not None
    assert report.fill.fee is not None
    assert report.fill.fee > 0


@BOTH
async def test_an_entry_whose_stop_is_refused_is_left_again(
    bench: MakeBench, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    venue.fault("reject", **stop_posts(kind))
    opened = await broker.open_position(order())
    assert opened is not None
    assert abs(venue.held()) < 0.00002
    assert [record.levelname for record in caplog.records if "no stop can be placed" in record.message] == ["ERROR"]
    fill = await broker.check_position(position(order(), opened))
    assert fill is not None
    assert fill.reason == "closed"
    assert fill.quantity == pytest.approx(0.02, abs=0.00003)
    assert venue.open_orders() == []


@BOTH
async def test_a_naked_position_is_an_alarm_and_is_healed_by_the_next_question(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    venue.fault("error", **stop_posts(kind), count=4, status=503, message="try later")
    venue.fault("error", "POST */order", skip=1 if kind == "futures" else 5, status=503, message="try later")
    with pytest.raises(OrderTransient, match="held WITHOUT A STOP and cannot be sold") as caught:
        await broker.open_position(order())
    assert caught.value.outcome is Outcome.UNKNOWN
    assert venue.stops() == []
    assert (await broker.find(again(order()))).status == "filled"
    nothing_is_naked(venue)
    assert venue.filled_orders() == {IDS.entry: 1}


@BOTH
async def test_a_killed_program_s_entry_gets_its_stop(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    venue.fault("lose_request", **stop_posts(kind), latency_ms=500)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ENTER, venue.server.url, kind, cwd=Path(__file__).parents[2]
    )
    while venue.sent() < 2:
        await asyncio.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert await child.wait() == -signal.SIGKILL
    assert venue.filled_orders() == {IDS.entry: 1}
    assert venue.stops() == []
    later = await venue.broker()
    assert (await later.find(again(order()))).status == "filled"
    nothing_is_naked(venue)
    assert await later.open_position(again(order())) is not None
    assert venue.filled_orders() == {IDS.entry: 1}
    assert len(venue.stops()) == 1


ENTER = """
import asyncio, sys
from tests.broker.conftest import order, urls_of
from backtest_kit.broker.ccxt import CcxtBroker

async def main():
    url, kind = sys.argv[1:]
    broker = CcxtBroker("binance" if kind == "spot" else "binanceusdm", market=kind, api_key="bot", secret="simulated",
                        urls=urls_of(url), rate_limit=False)
    await broker.start()
    await broker.open_position(order())

asyncio.run(main())
"""


@BOTH
async def test_a_close_whose_answer_was_lost_is_found(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    await broker.open_position(order())
    close = order("close", quantity=0.02)
    venue.fault("lose_response", "POST */order")
    venue.fault("outage", **sale_look_ups(kind))
    with pytest.raises(OrderTransient):
        await broker.close_position(close)
    report = await broker.find(again(close))
    assert report.status == "filled"
    assert venue.open_orders() == []
    assert venue.filled_orders() == {IDS.entry: 1, IDS.order("close", 0): 1}


async def test_a_stop_that_a_close_has_left_does_not_close_the_next_position(bench: MakeBench) -> None:
    venue = await bench("futures", PRICE, PRICE, PRICE * 0.98)
    broker = await venue.broker()
    await broker.open_position(order(stop_loss=PRICE * 0.99))
    ((left, _, _),) = venue.stops()
    close = order("close", quantity=0.02, stop_loss=PRICE * 0.99)
    venue.fault("error", "DELETE *", count=2, status=503, code=-1001, message="Internal error")
    with pytest.raises(OrderTransient, match=f"cancel {left}"):
        await broker.close_position(close)
    with pytest.raises(OrderTransient, match=f"cancel {left}"):
        await broker.find(again(close))
    assert (await broker.find(again(close))).status == "filled"
    assert venue.open_orders() == []
    later = order(signal_id="next", stop_loss=PRICE * 0.95)
    opened = await broker.open_position(later)
    await venue.advance(4)
    assert await broker.check_position(position(later, opened)) is None
    assert venue.held() == 0.02


UNCERTAIN: list[dict[str, Any]] = [
    {"kind": "error", "status": 503, "code": -1001, "message": "Internal error"},
    {"kind": "lose_request"},
]


@pytest.mark.parametrize("silent", UNCERTAIN, ids=lambda fault: str(fault["kind"]))
@pytest.mark.parametrize("change", ["close", "reduce"])
async def test_a_sale_that_never_arrived_leaves_the_stop_in_place(
    bench: MakeBench, change: Any, silent: dict[str, Any]
) -> None:
    venue = await bench("spot")
    broker = await venue.broker(arrival_ms=200)
    await broker.open_position(order())
    selling = order(change, 0 if change == "close" else 1, cost=500.0, quantity=0.01)
    hook = broker.close_position if change == "close" else broker.reduce_position
    for _ in range(3):
        venue.fault(endpoint="POST */order", **silent)
        with pytest.raises(OrderTransient) as caught:
            await hook(selling)
        assert caught.value.outcome is Outcome.NOT_DONE
        nothing_is_naked(venue)
        assert (await broker.find(selling)).status == "absent"
        selling = again(selling)
    assert await hook(selling) is not None
    assert set(venue.filled_orders()) == {IDS.entry, selling.client_order_id}


async def test_a_sale_that_arrives_late_on_spot_is_seen_before_the_stop_is_put_back(bench: MakeBench) -> None:
    venue = await bench("spot")
    broker = await venue.broker(timeout_ms=1000, arrival_ms=4000)
    await venue.by_hand("buy", 1.0)
    others = venue.held()
    await broker.open_position(order())
    venue.fault("latency", "POST */order", latency_ms=2500)
    fill = await broker.close_position(order("close", quantity=0.02))
    assert fill is not None
    assert fill.quantity == 0.01998
    assert venue.open_orders() == [], "it would sell what the position never had"
    assert venue.held() == pytest.approx(others, abs=0.00001)


async def test_a_sale_on_spot_that_nobody_can_ask_about_is_said_to_have_no_stop(
    bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    venue = await bench("spot")
    broker = await venue.broker(arrival_ms=200)
    await broker.open_position(order())
    venue.fault("lose_request", "POST */order")
    venue.fault("outage", **sale_look_ups("spot"))
    with pytest.raises(OrderTransient) as caught:
        await broker.close_position(order("close", quantity=0.02))
    assert caught.value.outcome is Outcome.UNKNOWN
    told = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1
    assert f"held WITHOUT A STOP until the exchange reports what became of {IDS.order('close', 0)}" in told[0]


@pytest.mark.parametrize("lost", [UNCERTAIN[0], {"kind": "lose_response"}], ids=lambda fault: str(fault["kind"]))
async def test_a_stop_that_may_have_made_room_in_vain_is_put_back(bench: MakeBench, lost: dict[str, Any]) -> None:
    venue = await bench("spot")
    broker = await venue.broker()
    await broker.open_position(order())
    venue.fault(endpoint="DELETE */order", count=2, **lost)
    with pytest.raises(OrderTransient, match="cancel"):
        await broker.close_position(order("close", quantity=0.02))
    assert len(venue.stops()) == 1
    nothing_is_naked(venue)


@BOTH
async def test_a_close_that_is_refused_leaves_the_stop_in_place(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    opened = await broker.open_position(order())
    venue.fault("reject", "POST */order")
    with pytest.raises(OrderRejected, match="The order is rejected"):
        await broker.close_position(order("close", quantity=0.02))
    nothing_is_naked(venue)
    assert await broker.check_position(position(order(), opened)) is None
    assert await broker.close_position(again(order("close", quantity=0.02))) is not None
    assert abs(venue.held()) < 0.00002


@BOTH
async def test_a_close_that_is_filled_in_parts_goes_on_to_the_end(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    await broker.open_position(order())
    venue.fault("partial", "POST */order", fraction=Decimal("0.25"), rest_expires=True, count=2)
    fill = await broker.close_position(order("close", quantity=0.02))
    assert fill is not None
    assert fill.quantity == pytest.approx(0.02, abs=0.00003)
    assert abs(venue.held()) < 0.00002
    assert list(venue.filled_orders()) == [IDS.entry, *(IDS.of(f"{SIGNAL}-c", part) for part in range(3))]
    assert (await broker.find(again(order("close")))).fill == fill


@BOTH
async def test_a_close_that_died_half_way_goes_on(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    await broker.open_position(order())
    close = order("close", quantity=0.02)
    venue.fault("partial", "POST */order", fraction=Decimal("0.25"), rest_expires=True)
    venue.fault("error", "POST */order", skip=1, status=503, message="try later")
    with pytest.raises(OrderTransient):
        await broker.close_position(close)
    assert (await broker.find(again(close))).status == "absent", "there is something left to sell"
    fill = await broker.close_position(again(close))
    assert fill is not None
    assert fill.quantity == pytest.approx(0.02, abs=0.00003)
    assert abs(venue.held()) < 0.00002
    assert set(venue.filled_orders().values()) == {1}


@BOTH
@pytest.mark.parametrize("renamed", [True, False])
async def test_a_close_whose_second_part_is_refused_is_told_with_the_first(
    bench: MakeBench, kind: Kind, renamed: bool
) -> None:
    venue = await bench(kind, PRICE, PRICE * 0.99)
    broker = await venue.broker()
    await broker.open_position(order())
    venue.fault("partial", "POST */order", fraction=Decimal("0.25"), rest_expires=True)
    venue.fault("reject", "POST */order", skip=1)
    close = order("close", quantity=0.02)
    with pytest.raises(OrderRejected, match="The order is rejected"):
        await broker.close_position(close)
    nothing_is_uncovered(venue)
    first = venue.fills()[-1]
    await venue.advance(3)
    report = await broker.find(close)
    assert report.status == "absent", "there is something left to sell"
    fill = await broker.close_position(order("close", 5, quantity=0.02) if renamed else again(close))
    last = venue.fills()[-1]
    assert fill is not None
    assert fill.quantity == pytest.approx(0.02, abs=0.00003)
    assert first.price > last.price * Decimal("1.005")
    assert fill.price == pytest.approx(
        float((first.price * first.quantity + last.price * last.quantity) / (first.quantity + last.quantity))
    )


@BOTH
async def test_a_close_whose_rest_its_stop_has_sold_is_told_with_it(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, PRICE, PRICE * 0.94)
    broker = await venue.broker(arrival_ms=200)
    await broker.open_position(order())
    venue.fault("partial", "POST */order", fraction=Decimal("0.25"), rest_expires=True)
    venue.fault("lose_request", "POST */order", skip=1)
    close = order("close", quantity=0.02)
    with pytest.raises(OrderTransient):
        await broker.close_position(close)
    await venue.advance(3)
    report = await broker.find(close)
    assert report.status == "filled"
    assert report.fill is not None
    assert report.fill.quantity == pytest.approx(0.02, abs=0.00003)
    _, first, last = venue.fills()
    assert last.client_order_id != first.client_order_id
    assert report.fill.price == pytest.approx(
        float((first.price * first.quantity + last.price * last.quantity) / (first.quantity + last.quantity))
    )
    assert await broker.close_position(again(close)) == report.fill


@BOTH
async def test_a_close_that_takes_more_orders_than_one_may_is_not_taken_for_done(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    await broker.open_position(order())
    venue.fault("partial", "POST */order", fraction=Decimal("0.03"), rest_expires=True, count=20)
    close = order("close", quantity=0.02)
    with pytest.raises(OrderRejected, match=r"20 orders have not closed all of .*, 0\.01\d* are left"):
        await broker.close_position(close)
    assert abs(venue.held()) > 0.01
    nothing_is_uncovered(venue)
    assert (await broker.find(again(close))).status == "cancelled", "it goes on under another id"
    fill = await broker.close_position(order("close", 1, quantity=0.02))
    assert fill is not None
    assert fill.quantity == pytest.approx(0.02, abs=0.00003)
    assert abs(venue.held()) < 0.00002
    assert venue.open_orders() == []


@BOTH
@pytest.mark.parametrize("lost", ["lose_response", "lose_request"])
async def test_a_reduction_whose_answer_was_lost_is_made_once(bench: MakeBench, kind: Kind, lost: str) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    await broker.open_position(order())
    reduce = order("reduce", 1, cost=500.0, quantity=0.01)
    venue.fault(lost, "POST */order")
    # On spot the first look-up is that of the entry, to see what is held.
    venue.fault("outage", **sale_look_ups(kind), skip=1 if kind == "spot" else 0)
    with pytest.raises(OrderTransient):
        await broker.reduce_position(reduce)
    report = await broker.find(again(reduce))
    if lost == "lose_request":
        assert report.status == "absent"
        assert await broker.reduce_position(again(reduce)) is not None
    assert venue.filled_orders() == {IDS.entry: 1, IDS.order("reduce", 1): 1}
    nothing_is_naked(venue)


@BOTH
async def test_a_stop_that_was_not_replaced_is_replaced_by_the_next_check(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    opened = await broker.open_position(order())
    post = "POST */order" if kind == "spot" else "POST */algoOrder"
    venue.fault("error", post, count=4, status=503, message="try later")
    with pytest.raises(OrderTransient) as caught:
        await broker.move_stop(order("move_stop", 1, stop_loss=PRICE * 0.97))
    assert "may be held WITHOUT A STOP" in str(caught.value)
    assert len(venue.stops()) == (0 if kind == "spot" else 1), "a future keeps its old stop until it has the new one"
    assert await broker.check_position(position(order(), opened)) is None
    ((_, _, trigger),) = venue.stops()
    assert trigger == PRICE * 0.95
    nothing_is_naked(venue)


@BOTH
async def test_a_stop_filled_while_it_is_replaced_closes_the_position(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, PRICE, PRICE * 0.9)
    broker = await venue.broker()
    opened = await broker.open_position(order())
    cancels = "DELETE */*rder"
    venue.fault("latency", cancels, latency_ms=300)
    moving = asyncio.create_task(broker.move_stop(order("move_stop", 1, stop_loss=PRICE * 0.94)))
    while not venue.sent("DELETE"):
        await asyncio.sleep(0.01)
    await venue.advance(3)
    if kind == "spot":
        with pytest.raises(OrderRejected, match=r"has no position|was filled meanwhile"):
            await moving
    else:
        await asyncio.wait([moving])
        moving.exception()
    fill = await broker.check_position(position(order(), opened))
    assert fill is not None
    assert fill.reason == "stop_loss"
    assert venue.open_orders() == []
    assert abs(venue.held()) < 0.00002


async def test_closed_by_hand_on_futures(bench: MakeBench) -> None:
    venue = await bench("futures", PRICE, PRICE * 1.01)
    broker = await venue.broker()
    opened = await broker.open_position(order())
    await venue.advance(2)
    await venue.by_hand("sell", 0.02)
    fill = await broker.check_position(position(order(), opened))
    assert fill is not None
    assert (fill.reason, fill.quantity) == ("closed", 0.02)
    assert fill.price == pytest.approx(PRICE * 1.01 * 0.9999)
    assert venue.open_orders() == []
    assert await broker.close_position(order("close", quantity=0.02)) == fill


async def test_closed_by_hand_on_spot(bench: MakeBench) -> None:
    venue = await bench("spot")
    broker = await venue.broker()
    opened = await broker.open_position(order())
    await venue.cancel_by_hand(venue.stops()[0][0])
    await venue.by_hand("sell", 0.01998)
    fill = await broker.check_position(position(order(), opened))
    assert fill is not None
    assert (fill.reason, fill.quantity) == ("closed", 0.01998)


@BOTH
async def test_a_stop_cancelled_by_hand_is_placed_again(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    opened = await broker.open_position(order())
    await venue.cancel_by_hand(venue.stops()[0][0])
    assert await broker.check_position(position(order(), opened)) is None
    nothing_is_naked(venue)


@BOTH
async def test_reduced_by_hand_is_followed_and_said_once(
    bench: MakeBench, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    opened = await broker.open_position(order())
    if kind == "spot":
        await venue.cancel_by_hand(venue.stops()[0][0])
    await venue.by_hand("sell", 0.005)
    for _ in range(2):
        assert await broker.check_position(position(order(), opened)) is None
    nothing_is_naked(venue)
    assert sum("it was traded outside of this program" in record.message for record in caplog.records) == 1
    fill = await broker.close_position(order("close", quantity=0.02))
    assert fill is not None
    assert fill.quantity == pytest.approx(0.015, abs=0.00003), "what is held, not what the engine believes"


@BOTH
async def test_a_position_that_the_exchange_does_not_know_is_gone(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    opened = await broker.open_position(order())
    stranger = position(order(signal_id="stranger", direction="short" if kind == "futures" else "long"), opened)
    with pytest.raises(OrderDeleted, match="the position is gone"):
        await broker.check_position(stranger)
    assert len(venue.stops()) == 1, "those of others are left alone"


@BOTH
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cost": 4.0}, r"4 USDT at 50000 are too little: 0\.00008 BTC are worth 3\.80 USDT, and the least is 5"),
        ({"cost": 0.2}, r"below the smallest quantity, 0\.00001"),
        ({"cost": 200_000.0}, r"200000\.00 USDT are needed and 100000\.00 are free"),
    ],
)
async def test_what_cannot_be_bought_is_refused_before_it_is_sent(
    bench: MakeBench, kind: Kind, fields: dict[str, Any], message: str
) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    for sending in (broker.open_position(order(**fields)), broker.place_entry(order("place", **fields))):
        with pytest.raises(OrderRejected, match=message) as caught:
            await sending
        assert caught.value.outcome is Outcome.NOT_DONE
    assert venue.sent() == 0


@BOTH
async def test_a_reduction_must_leave_enough_to_protect(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    await broker.open_position(order(cost=20.0, stop_loss=PRICE * 0.8))
    with pytest.raises(OrderRejected, match="too small a reduction"):
        await broker.reduce_position(order("reduce", 1, quantity=0.000001))
    with pytest.raises(OrderRejected, match=r"the rest would be too small to protect.*close the position"):
        await broker.reduce_position(order("reduce", 1, quantity=0.00039 if kind == "spot" else 0.0004))
    nothing_is_naked(venue)


async def test_spot_cannot_be_sold_short(bench: MakeBench) -> None:
    broker = await (await bench("spot")).broker()
    with pytest.raises(OrderRejected, match=r"cannot be sold short.*market='futures'"):
        await broker.open_position(order(direction="short"))


async def test_a_future_that_somebody_holds_is_not_entered(bench: MakeBench) -> None:
    venue = await bench("futures")
    broker = await venue.broker()
    await venue.by_hand("buy", 0.5)
    with pytest.raises(OrderRejected, match=r"already holds 0\.5\d* long"):
        await broker.open_position(order())
    assert venue.held() == 0.5


@BOTH
async def test_too_many_requests_are_certain_not_to_be_done(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    venue.fault("rate_limit", "POST */order")
    with pytest.raises(OrderTransient, match="429") as caught:
        await broker.open_position(order())
    assert caught.value.outcome is Outcome.NOT_DONE


@BOTH
async def test_an_exchange_that_is_gone_has_done_nothing(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    opened = await broker.open_position(order())
    await venue.server.stop()
    with pytest.raises(OrderTransient, match="ExchangeNotAvailable") as caught:
        await broker.check_position(position(order(), opened))
    assert caught.value.outcome is Outcome.NOT_DONE


@BOTH
async def test_an_outage_of_a_check_changes_nothing(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    opened = await broker.open_position(order())
    stops = venue.stops()
    venue.fault("outage", "*", count=2)
    with pytest.raises(OrderTransient):
        await broker.check_position(position(order(), opened))
    assert await broker.check_position(position(order(), opened)) is None
    assert venue.stops() == stops


@BOTH
async def test_a_clock_that_runs_away_is_compared_again(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    opened = await broker.open_position(order())
    await venue.advance(60)
    assert await broker.check_position(position(order(), opened)) is None


@BOTH
async def test_signal_ids_of_any_kind_find_their_orders(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    odd = order(signal_id="Ärger mit/dem langen Namen einer Idee, die niemand so nennt")
    opened = await broker.open_position(odd)
    assert await broker.open_position(again(odd)) == opened
    assert await broker.check_position(position(odd, opened)) is None
    fill = await broker.close_position(order("close", signal_id=odd.signal_id, quantity=0.02))
    assert fill is not None
    assert set(venue.filled_orders().values()) == {1}
    assert venue.open_orders() == []


async def test_no_secret_is_shown(bench: MakeBench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    venue = await bench("spot")
    broker = await venue.broker()
    venue.fault("error", "POST */order", status=400, code=-2010, message=f"no order with secret {API_SECRET}")
    with pytest.raises(OrderRejected, match="no order with secret") as caught:
        await broker.open_position(order())
    venue.fault("lose_request", **LOOK_UPS)
    with pytest.raises(OrderTransient) as lost:
        await broker.find(order())
    shown = [repr(broker), repr(broker._connection), str(caught.value), repr(caught.value), str(lost.value)]
    shown += [record.getMessage() for record in caplog.records if not record.name.startswith("tests")]
    shown.append(json.dumps([str(each) for each in (caught.value.__cause__, lost.value.__cause__)]))
    assert not [text for text in shown if API_SECRET in text or "signature" in text or "X-MBX-APIKEY" in text]


def test_nothing_of_this_imports_ccxt_before_it_is_used() -> None:
    code = "import sys, backtest_kit.broker.ccxt, backtest_kit.broker.paper; print('ccxt' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "False"
