"""Every hook of `CcxtBroker`, on both kinds of market, against a simulated Binance on a real socket."""

from __future__ import annotations

from decimal import Decimal

import msgspec
import pytest
from tests.broker.conftest import IDS, PRICE, START, Bench, Kind, MakeBench, again, order, position, received, resting

from backtest_kit.broker.base import Fill, OrderDeleted, OrderRejected, OrderTransient
from backtest_kit.errors import Outcome
from backtest_kit.model.position import Reduction
from backtest_kit.model.signal import Direction

BOTH = pytest.mark.parametrize("kind", ["spot", "futures"])
SIDES = pytest.mark.parametrize(("kind", "direction"), [("spot", "long"), ("futures", "long"), ("futures", "short")])


def kept(bench: Bench, quantity: float) -> float:
    """What a purchase leaves on the account: spot takes its fee from it, and a stop takes whole lots."""
    return int(quantity * (0.999 if bench.kind == "spot" else 1) * 1e5 + 1e-6) / 1e5


@SIDES
async def test_an_entry_is_filled_and_has_its_stop(bench: MakeBench, kind: Kind, direction: Direction) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    fill = await broker.open_position(order(direction=direction))
    slip = 1.0001 if direction == "long" else 0.9999
    assert fill is not None
    assert fill.price == pytest.approx(PRICE * slip)
    assert fill.quantity == pytest.approx(received(venue, 0.02))
    assert fill.cost == pytest.approx(fill.quantity * PRICE * slip)
    assert fill.fee == pytest.approx(0.02 * PRICE * slip * 0.001)
    assert fill.fee_currency == ("BTC" if kind == "spot" else "USDT")
    assert fill.timestamp == START
    level = PRICE * (0.95 if direction == "long" else 1.05)
    assert venue.levels() == [(kept(venue, 0.02), level)]
    assert await broker.check_position(position(order(direction=direction), fill)) is None


@SIDES
async def test_a_position_is_closed_and_its_stop_cancelled(bench: MakeBench, kind: Kind, direction: Direction) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    opened = await broker.open_position(order(direction=direction))
    assert opened is not None
    close = order("close", direction=direction, quantity=opened.quantity)
    fill = await broker.close_position(close)
    assert fill is not None
    assert (fill.quantity, fill.reason) == (kept(venue, 0.02), "")
    assert fill.fee is not None
    assert fill.fee > 0
    assert venue.open_orders() == []
    assert abs(venue.held()) < 0.00002
    assert venue.filled_orders() == {IDS.entry: 1, IDS.order("close", 0): 1}
    report = await broker.find(again(close))
    assert (report.status, report.fill) == ("filled", fill)


@SIDES
async def test_a_stop_that_nobody_watched_is_told_at_the_next_check(
    bench: MakeBench, kind: Kind, direction: Direction
) -> None:
    beyond = PRICE * (0.9 if direction == "long" else 1.1)
    venue = await bench(kind, PRICE, beyond)
    broker = await venue.broker()
    opened = await broker.open_position(order(direction=direction))
    await broker.stop()
    await venue.advance(5)
    later = await venue.broker()
    fill = await later.check_position(position(order(direction=direction), opened))
    assert fill is not None
    assert (fill.reason, fill.quantity) == ("stop_loss", kept(venue, 0.02))
    assert fill.price == pytest.approx(PRICE * (0.95 if direction == "long" else 1.05), rel=0.001)
    assert venue.open_orders() == []
    closing = await later.close_position(order("close", direction=direction, quantity=0.02))
    assert closing == fill
    assert IDS.order("close", 0) not in venue.filled_orders()


@BOTH
async def test_adding_widens_the_stop(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    first = await broker.open_position(order())
    add = order("add", 1, cost=500.0)
    second = await broker.add_to_position(add)
    assert second is not None
    assert second.quantity == pytest.approx(received(venue, 0.01))
    ((_, quantity, trigger),) = venue.stops()
    assert quantity == pytest.approx(kept(venue, 0.03), abs=0.000011)
    assert trigger == PRICE * 0.95
    assert await broker.check_position(position(order(), first, second)) is None
    assert (await broker.find(again(add))).fill == second
    assert await broker.add_to_position(again(add)) == second
    assert venue.filled_orders() == {IDS.entry: 1, IDS.order("add", 1): 1}


@BOTH
async def test_reducing_narrows_the_stop(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    opened = await broker.open_position(order())
    reduce = order("reduce", 1, cost=400.0, quantity=0.008)
    fill = await broker.reduce_position(reduce)
    assert fill is not None
    assert fill.quantity == 0.008
    ((_, quantity, _),) = venue.stops()
    assert quantity == pytest.approx(kept(venue, 0.02) - 0.008)
    assert (await broker.find(again(reduce))).fill == fill
    assert await broker.reduce_position(again(reduce)) == fill
    assert venue.filled_orders() == {IDS.entry: 1, IDS.order("reduce", 1): 1}
    reduction = Reduction(40.0, fill.price, 1000.0, 1, START)
    before = venue.sent("DELETE")
    assert await broker.check_position(position(order(), opened, reductions=(reduction,))) is None
    assert venue.sent("DELETE") == before, "the stop fits what is held"


@BOTH
async def test_a_reduction_without_quantity_is_taken_at_cost(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, PRICE, PRICE * 1.2)
    broker = await venue.broker()
    await broker.open_position(order())
    await venue.advance(3)
    fill = await broker.reduce_position(order("reduce", 1, cost=500.0, price=PRICE * 1.2))
    assert fill is not None
    assert fill.quantity == 0.00999, "half of 0.02, at the price that was paid, slippage included"


@SIDES
async def test_the_stop_is_moved(bench: MakeBench, kind: Kind, direction: Direction) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    opened = await broker.open_position(order(direction=direction))
    level = PRICE * (0.97 if direction == "long" else 1.03)
    move = order("move_stop", 1, direction=direction, stop_loss=level)
    assert (await broker.find(again(move))).status == "absent"
    await broker.move_stop(move)
    assert venue.levels() == [(kept(venue, 0.02), level)]
    assert (await broker.find(again(move))).status == "filled"
    await broker.move_stop(again(move))
    assert venue.levels() == [(kept(venue, 0.02), level)]
    moved = position(order(direction=direction), opened, moved_stop_loss=level)
    assert await broker.check_position(moved) is None
    assert venue.levels() == [(kept(venue, 0.02), level)]


@BOTH
async def test_a_stop_that_differs_from_the_engine_s_is_set_right(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    opened = await broker.open_position(order())
    assert await broker.check_position(position(order(), opened, moved_stop_loss=PRICE * 0.96)) is None
    assert venue.levels() == [(kept(venue, 0.02), PRICE * 0.96)]


@BOTH
async def test_moving_a_stop_beyond_the_market_leaves_at_the_market(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    opened = await broker.open_position(order())
    with pytest.raises(OrderRejected, match=r"BTCUSDT-\S+ has no position any more"):
        await broker.move_stop(order("move_stop", 1, stop_loss=PRICE * 1.01))
    fill = await broker.check_position(position(order(), opened))
    assert fill is not None
    assert fill.reason == "stop_loss"
    assert abs(venue.held()) < 0.00002


@SIDES
async def test_a_limit_order_rests_is_filled_and_protected(bench: MakeBench, kind: Kind, direction: Direction) -> None:
    limit = PRICE * (0.98 if direction == "long" else 1.02)
    venue = await bench(kind, PRICE, PRICE, limit)
    broker = await venue.broker()
    placed = order("place", direction=direction, price=limit)
    await broker.place_entry(placed)
    await broker.place_entry(again(placed))
    assert [each.client_order_id for each in venue.open_orders()] == [IDS.entry]
    assert await broker.check_entry(resting(placed)) is None
    assert (await broker.find(again(placed))).status == "resting"
    activate = order("activate", direction=direction, price=limit)
    with pytest.raises(OrderTransient, match=r"0 of 0\.0\d+ are filled") as early:
        await broker.open_position(activate)
    assert early.value.outcome is Outcome.NOT_DONE
    await venue.advance(4)
    fill = await broker.check_entry(resting(placed))
    assert fill is not None
    assert fill.price == limit
    assert fill.quantity == pytest.approx(received(venue, 1000 / limit), abs=1e-5)
    ((_, quantity, trigger),) = venue.stops()
    assert (quantity, trigger) == (int(fill.quantity * 1e5 + 1e-6) / 1e5, placed.stop_loss)
    assert await broker.open_position(activate) == fill
    assert (await broker.find(again(activate))).fill == fill
    assert len(venue.stops()) == 1
    assert venue.filled_orders() == {IDS.entry: 1}


@BOTH
async def test_a_resting_order_is_cancelled(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    placed = order("place", price=PRICE * 0.98)
    await broker.place_entry(placed)
    cancel = order("cancel", price=PRICE)
    assert (await broker.find(again(cancel))).status == "absent"
    assert await broker.cancel_entry(cancel) is None
    assert await broker.cancel_entry(again(cancel)) is None
    assert (await broker.find(again(cancel))).status == "cancelled"
    assert venue.open_orders() == []
    with pytest.raises(OrderDeleted, match="was cancelled there"):
        await broker.check_entry(resting(placed))
    with pytest.raises(OrderRejected, match="was not filled: it was cancelled"):
        await broker.open_position(order("activate"))


@BOTH
async def test_cancelling_too_late_returns_the_fill(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, PRICE, PRICE * 0.98)
    broker = await venue.broker()
    placed = order("place", price=PRICE * 0.98)
    await broker.place_entry(placed)
    await venue.advance(3)
    fill = await broker.cancel_entry(order("cancel"))
    assert fill is not None
    assert fill.price == PRICE * 0.98
    assert len(venue.stops()) == 1


@BOTH
async def test_what_a_partly_filled_entry_has_is_protected_at_once(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, PRICE, PRICE * 0.98)
    broker = await venue.broker()
    placed = order("place", price=PRICE * 0.98)
    venue.fault("partial", fraction=Decimal("0.25"))
    await broker.place_entry(placed)
    await venue.advance(2)
    assert await broker.check_entry(resting(placed)) is None
    report = await broker.find(again(placed))
    assert report.status == "partly_filled"
    assert report.fill is not None
    assert report.fill.quantity == pytest.approx(received(venue, 0.0051))
    ((_, quantity, _),) = venue.stops()
    assert quantity == kept(venue, 0.0051)
    fill = await broker.cancel_entry(order("cancel"))
    assert fill == report.fill
    assert [each.client_order_id for each in venue.open_orders()] == [venue.stops()[0][0]]


@BOTH
async def test_a_limit_on_slippage_leaves_what_is_dearer(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, slippage_pct=Decimal("0.5"))
    broker = await venue.broker(max_slippage_pct=0.2)
    fill = await broker.open_position(order())
    assert fill is not None
    assert fill.price == PRICE * 1.002, "the venue fills no worse than the limit"
    dear = order(signal_id="second", price=PRICE * 0.99)
    if kind == "futures":
        await broker.close_position(order("close"))
    with pytest.raises(OrderRejected, match="was not filled within max_slippage_pct"):
        await broker.open_position(dear)
    assert (await broker.find(again(dear))).status == "cancelled"


async def test_holdings_of_spot_are_what_a_stop_of_ours_protects(bench: MakeBench) -> None:
    venue = await bench("spot")
    broker = await venue.broker()
    await venue.by_hand("buy", 0.5)
    assert await broker.holdings(["BTCUSDT"]) == []
    await broker.open_position(order())
    (held,) = await broker.holdings(["BTCUSDT"])
    assert (held.symbol, held.direction, held.quantity, held.stop_loss) == ("BTCUSDT", "long", 0.01998, PRICE * 0.95)
    assert held.client_order_ids == (venue.stops()[0][0],)


async def test_holdings_of_futures_are_positions(bench: MakeBench) -> None:
    venue = await bench("futures")
    broker = await venue.broker()
    assert await broker.holdings(["BTCUSDT"]) == []
    await venue.by_hand("sell", 0.5)
    (held,) = await broker.holdings(["BTC/USDT"])
    assert (held.symbol, held.direction, held.quantity, held.stop_loss) == ("BTC/USDT", "short", 0.5, None)
    assert held.price_open == pytest.approx(PRICE, rel=0.001)


@pytest.mark.parametrize("direction", ["long", "short"])
async def test_a_stop_of_a_future_that_is_left_of_nothing_is_shown(bench: MakeBench, direction: Direction) -> None:
    venue = await bench("futures")
    broker = await venue.broker()
    opening = order(direction=direction)
    await broker.open_position(opening)
    await venue.by_hand("sell" if direction == "long" else "buy", 0.02)
    (left,) = await broker.holdings(["BTCUSDT"])
    assert (left.direction, left.quantity, left.stop_loss) == (direction, 0, opening.stop_loss)
    assert left.client_order_ids == (venue.stops()[0][0],)


@BOTH
async def test_savings_of_the_owner_are_left_alone(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind)
    if kind == "spot":
        await venue.by_hand("buy", 1.0)
    before = venue.held()
    broker = await venue.broker()
    opened = await broker.open_position(order())
    await broker.add_to_position(order("add", 1))
    await broker.reduce_position(order("reduce", 1, quantity=0.01))
    assert opened is not None
    fill = await broker.close_position(order("close", quantity=0.03))
    assert isinstance(fill, Fill)
    assert venue.held() == pytest.approx(before, abs=0.00002)
    assert venue.held() >= before


def test_copies_of_an_order_differ_in_the_attempt_only() -> None:
    assert msgspec.structs.replace(again(order()), attempt=0) == order()


@BOTH
async def test_an_exchange_that_takes_client_ids_again_is_asked_as_well(bench: MakeBench, kind: Kind) -> None:
    venue = await bench(kind, PRICE, PRICE, PRICE, PRICE * 0.9, fees_in="quote")
    broker = await venue.broker()
    opened = await broker.open_position(order())
    assert await broker.open_position(again(order())) == opened
    await venue.cancel_by_hand(venue.stops()[0][0])
    assert await broker.check_position(position(order(), opened)) is None
    assert venue.levels() == [(0.02, PRICE * 0.95)]
    await venue.advance(6)
    fill = await broker.check_position(position(order(), opened))
    assert fill is not None
    assert (fill.reason, fill.quantity) == ("stop_loss", 0.02)
    assert sorted(venue.filled_orders().values()) == [1, 1], "the entry and its stop"
