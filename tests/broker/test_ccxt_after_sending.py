"""What goes wrong with a question that follows an order: the order is there, and nothing may say that it is not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.broker.conftest import IDS, Kind, MakeBench, again, order

from backtest_kit.broker.base import OrderTransient
from backtest_kit.errors import Outcome

REFUSALS: list[dict[str, Any]] = [
    {"kind": "rate_limit"},
    {"kind": "error", "status": 401, "code": -2015, "message": "Invalid API-key, IP, or permissions for action."},
    {"kind": "error", "status": 400, "code": -1130, "message": "Data sent for parameter is not valid."},
]
AFTER = pytest.mark.parametrize("refusal", REFUSALS, ids=["rate_limit", "not_allowed", "bad_request"])


@AFTER
async def test_an_entry_whose_fees_cannot_be_read_is_not_taken_for_refused(
    bench: MakeBench, refusal: dict[str, Any]
) -> None:
    venue = await bench("futures")
    broker = await venue.broker()
    venue.fault(endpoint="GET */userTrades", count=5, **refusal)
    with pytest.raises(OrderTransient) as caught:
        await broker.open_position(order())
    assert caught.value.outcome is Outcome.UNKNOWN
    venue.server.faults.clear()
    assert (await broker.find(again(order()))).status == "filled"
    assert venue.filled_orders() == {IDS.entry: 1}


@AFTER
@pytest.mark.parametrize("change", ["add", "reduce"])
async def test_a_change_whose_fees_cannot_be_read_is_not_taken_for_undone(
    bench: MakeBench, change: Any, refusal: dict[str, Any]
) -> None:
    venue = await bench("futures")
    broker = await venue.broker()
    await broker.open_position(order())
    venue.fault(endpoint="GET */userTrades", count=5, **refusal)
    changing = order(change, 1, cost=500.0)
    hook = broker.add_to_position if change == "add" else broker.reduce_position
    with pytest.raises(OrderTransient) as caught:
        await hook(changing)
    assert caught.value.outcome is Outcome.UNKNOWN
    assert venue.filled_orders()[changing.client_order_id] == 1


@AFTER
async def test_a_reduction_that_is_still_being_filled_is_not_taken_for_undone(
    bench: MakeBench, refusal: dict[str, Any]
) -> None:
    venue = await bench("futures")
    broker = await venue.broker()
    await broker.open_position(order())
    venue.fault("partial", "POST */order")
    venue.fault(endpoint="GET */order", count=5, **refusal)
    with pytest.raises(OrderTransient) as caught:
        await broker.reduce_position(order("reduce", 1, cost=500.0, quantity=0.01))
    assert caught.value.outcome is Outcome.UNKNOWN
    assert venue.filled_orders()[IDS.order("reduce", 1)] == 1


@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_an_order_that_was_found_again_is_not_done_before_all_of_it_is_filled(
    bench: MakeBench, kind: Kind
) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    venue.fault("partial", "POST */order")
    venue.fault("lose_response", "POST */order")
    opening = asyncio.create_task(broker.open_position(order()))
    while not venue.fills() or venue.server.requests[-1]["method"] != "GET":
        await asyncio.sleep(0.01)
    await venue.advance()
    fill = await opening
    assert fill is not None
    assert fill.quantity == 0.02
    assert venue.held() == pytest.approx(0.02, abs=0.00003)
    assert [quantity for _, quantity, _ in venue.stops()] == pytest.approx([venue.held()], abs=0.00002)
