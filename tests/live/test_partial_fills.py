"""What the books make of an order that is filled in part."""

from __future__ import annotations

from typing import Any

import pytest

from backtest_kit.broker.base import Fill, Order, OrderReport
from backtest_kit.model.event import Identity
from backtest_kit.run.orders import judged


def order(kind: Any) -> Order:
    return Order(
        kind=kind,
        client_order_id="s",
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
