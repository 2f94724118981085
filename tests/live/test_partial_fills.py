"""What the books make of an order that is filled in part."""

from __future__ import annotations

from typing import Any

import pytest
from tests.live.rig import START, Rig
from tests.live.scenario import prepared

import backtest_kit as bk
from backtest_kit.broker.base import Fill, Order, OrderReport
from backtest_kit.model.identity import Identity
from backtest_kit.run.live.orders import judged


def order(kind: Any) -> Order:
    return Order(
        kind=kind,
        client_order_id="s",
        signal_id="s",
        identity=Identity("BTCUSDT", "trend", "venue", "", "live"),
        when_ms=0,
        direction="long",
        price=100.0,
        cost=100.0,
        take_profit=110.0,
        stop_loss=90.0,
    )


PART = Fill(price=100.0, cost=50.0, quantity=0.5)


@pytest.mark.parametrize("kind", ["open", "add", "reduce", "close"])
def test_what_is_still_being_filled_is_waited_for(kind: str) -> None:
    """Counted now, what is filled afterwards would be in nobody's books."""
    assert judged(order(kind), OrderReport(status="partly_filled", fill=PART)) == "open"


def test_an_entry_that_is_being_filled_goes_on_resting() -> None:
    report = OrderReport(status="partly_filled", fill=PART)
    assert judged(order("place"), report) == "done"
    assert judged(order("activate"), report) == "undone"


@pytest.mark.parametrize("kind", ["open", "add", "reduce", "activate"])
def test_what_was_filled_before_the_end_counts(kind: str) -> None:
    assert judged(order(kind), OrderReport(status="cancelled", fill=PART)) == "done"
    assert judged(order(kind), OrderReport(status="cancelled")) == "undone"


def test_a_close_is_done_once_all_is_closed() -> None:
    assert judged(order("close"), OrderReport(status="cancelled", fill=PART)) == "undone"


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("refused", [True, False])
async def test_a_close_in_two_orders_is_booked_at_the_average_of_both(
    memory_rig: Rig, restart: bool, told: bool, refused: bool
) -> None:
    """The first is filled for a quarter and then ended by the venue; the second closes the rest elsewhere."""

    class Torn(bk.Broker):
        reports_fills = True

        def __init__(self) -> None:
            self.closes: list[str] = []
            self.held = 0.0

        async def open_position(self, order: bk.Order) -> bk.Fill:
            self.held = order.cost / order.price
            return bk.Fill(price=order.price, cost=order.cost, quantity=self.held)

        async def close_position(self, order: bk.Order) -> bk.Fill | None:
            self.closes.append(order.client_order_id)
            if len(self.closes) == 1:
                raise bk.OrderRejected("the rest is too much") if refused else bk.OrderTransient("the connection broke")
            rest = self.held * 0.75
            return bk.Fill(price=96.0, cost=rest * 96, quantity=rest) if told else None

        async def find(self, order: bk.Order) -> bk.OrderReport:
            if order.client_order_id != self.closes[0]:
                return bk.OrderReport(status="absent")
            part = self.held * 0.25
            return bk.OrderReport(status="cancelled", fill=bk.Fill(price=92.0, cost=part * 92, quantity=part))

    async def manage(ctx: bk.Context) -> None:
        if ctx.position is not None and ctx.when_ms == START + 3 * 60_000:
            await ctx.position.close()

    prepared(memory_rig).strategy["manage"] = manage
    torn: Any = Torn()
    memory_rig.venue = torn
    if restart:
        await memory_rig.trade(4)
        memory_rig.now_ms += 60_000
    await memory_rig.trade(6)
    (trade,) = memory_rig.trades()
    assert len(set(torn.closes)) == 2
    rest = 96.0 if told else 100.2
    assert trade.price_close == pytest.approx(0.25 * 92 + 0.75 * rest, abs=0.2 if not told else 1e-9)
