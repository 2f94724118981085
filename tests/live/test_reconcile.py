"""What the exchange holds, next to what all books of a store say: what is unknown, and whether entries wait for it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st
from tests.values import make_entry

from backtest_kit.broker.base import Order, VenuePosition, VenueSignal
from backtest_kit.broker.order_ids import SignalIds
from backtest_kit.engine.position import open_position
from backtest_kit.engine.step import Flat, Holding, Resting, State
from backtest_kit.model.identity import Identity
from backtest_kit.model.position import RestingEntry
from backtest_kit.model.signal import Direction
from backtest_kit.run.live.orders import Intent
from backtest_kit.run.live.position_state import PositionState
from backtest_kit.run.live.reconcile import Difference, Known, compare, known_of
from backtest_kit.settings import Settings

OURS, THEIRS = "aaaaaa", "bbbbbb"
PRICE = 100.0


def entry(signal_id: str, quantity: float, direction: Direction = "long") -> RestingEntry:
    sign = 1 if direction == "long" else -1
    take, stop = PRICE + 10 * sign, PRICE - 10 * sign
    return make_entry(signal_id, direction, price=PRICE, take=take, stop=stop, cost=quantity * PRICE)


def holding(signal_id: str, quantity: float, direction: Direction = "long") -> Holding:
    return Holding(open_position(entry(signal_id, quantity, direction), 0, Settings()), 0)


def resting(signal_id: str, quantity: float) -> Resting:
    return Resting(entry(signal_id, quantity), 0)


def book(state: State, target: State | None = None) -> PositionState:
    intent = None
    if target is not None:
        ids = SignalIds("any", OURS)
        order = Order(
            kind="open", client_order_id=ids.entry, signal_id="any", when_ms=0, direction="long", price=PRICE, cost=0.0,
            take_profit=110.0, stop_loss=90.0, identity=Identity("BTCUSDT", "trend", "demo", "", "live"),
        )  # fmt: skip
        intent = Intent(order=order, target=target, events=())
    return PositionState(state=state, intent=intent)


def on_exchange(quantity: float, *signals: VenueSignal, stop_loss: float | None = 90.0) -> VenuePosition:
    return VenuePosition(
        symbol="BTCUSDT",
        direction="short" if quantity < 0 else "long",
        quantity=abs(quantity),
        stop_loss=stop_loss,
        signals=signals,
    )


def signal(signal_id: str, store_id: str = OURS, *, quantity: float = 0.0, order: str = "stop") -> VenueSignal:
    ids = SignalIds(signal_id, store_id)
    opened = {"stop": (ids.stop(0),), "entry": (ids.entry,), "": ()}[order]
    return VenueSignal(store_id=store_id, digest=ids.digest, quantity=quantity, client_order_ids=opened)


def found(held: VenuePosition | None, *books: PositionState) -> Difference | None:
    known = Known()
    for each in books:
        known += known_of(each, OURS)
    return compare("BTCUSDT", held, known, OURS)


LONG, FLAT = book(holding("a", 2)), book(Flat())


@pytest.mark.parametrize(
    ("held", "books"),
    [
        (None, [FLAT]),
        (on_exchange(2), [LONG]),
        (on_exchange(2, signal("a")), [LONG]),
        (on_exchange(1.97), [LONG]),  # fees were taken in base currency
        (on_exchange(5), [LONG, book(holding("b", 3))]),
        (on_exchange(-1), [LONG, book(holding("b", 3, "short"))]),
        (None, [LONG, book(holding("b", 2, "short"))]),
        # An order whose outcome is not known yet, a limit order that was filled just now, in part or whole.
        (None, [book(Flat(), holding("a", 2))]),
        (on_exchange(2, signal("a")), [book(Flat(), holding("a", 2))]),
        (None, [book(holding("a", 2), Flat())]),
        (on_exchange(1, signal("a")), [book(holding("a", 2), Flat())]),
        (on_exchange(0, signal("a", order="entry"), stop_loss=None), [book(resting("a", 2))]),
        (on_exchange(0.5, signal("a", order="entry"), stop_loss=None), [book(resting("a", 2))]),
        (on_exchange(2, signal("a")), [book(resting("a", 2))]),
    ],
)
def test_what_the_books_know_is_no_difference(held: VenuePosition | None, books: list[PositionState]) -> None:
    assert found(held, *books) is None


@pytest.mark.parametrize(
    ("held", "books", "what"),
    [
        (on_exchange(2), [FLAT], "foreign_position"),
        (on_exchange(-2), [FLAT], "foreign_position"),
        (on_exchange(2, signal("z")), [FLAT], "foreign_position"),
        (on_exchange(4), [LONG], "foreign_position"),
        (on_exchange(2, signal("a", quantity=1), signal("z", quantity=1)), [LONG], "foreign_position"),
        # The same strategy makes the same signal ids in another store.
        (on_exchange(2, signal("a", THEIRS, quantity=2)), [LONG], "foreign_position"),
        (on_exchange(2), [book(resting("a", 1))], "foreign_position"),
        (on_exchange(2), [book(Flat(), holding("a", 1))], "foreign_position"),
        (on_exchange(2), [LONG, book(holding("b", 2, "short"))], "foreign_position"),
        (on_exchange(0, signal("z", order="entry")), [FLAT], "foreign_order"),
        (on_exchange(2, signal("a"), signal("z", order="entry")), [LONG], "foreign_order"),
        (on_exchange(0, signal("z")), [FLAT], "left_stop"),
        (on_exchange(0, signal("a", THEIRS)), [FLAT], "left_stop"),
        (on_exchange(2, signal("a"), signal("z")), [LONG], "left_stop"),
        (on_exchange(0), [FLAT], "left_stop"),  # a broker that does not tell signals apart
        (on_exchange(-2), [LONG], "missing_position"),
    ],
)
def test_while_something_is_unknown_entries_wait(held: VenuePosition, books: list[PositionState], what: str) -> None:
    difference = found(held, *books)
    assert difference is not None
    assert (difference.what, difference.no_entry) == (what, True)


@pytest.mark.parametrize(
    ("held", "what"),
    [
        (None, "missing_position"),
        (on_exchange(2, stop_loss=None), "unprotected_position"),
    ],
)
def test_what_is_known_and_not_as_it_should_be_is_found_and_keeps_no_entry_back(
    held: VenuePosition | None, what: str
) -> None:
    difference = found(held, LONG)
    assert difference is not None
    assert (difference.what, difference.no_entry) == (what, False)


def test_an_order_of_another_store_is_named_as_that() -> None:
    difference = found(on_exchange(2, signal("a", THEIRS, quantity=2)), FLAT)
    assert difference is not None
    assert (
        f"order {SignalIds('a', THEIRS).stop(0)} is from store {THEIRS}, not from this store, {OURS}"
        in difference.reason
    )
    assert "--orphans adopt" in difference.way_out
    lost = found(on_exchange(2, signal("a", quantity=2, order="")), FLAT)
    assert lost is not None
    assert f"order {SignalIds('a', OURS).entry} is from this store, {OURS}, which has no record of it" in lost.reason


QUANTITY = st.floats(0.5, 50)
DIRECTION = st.sampled_from(["long", "short"])


@given(st.lists(st.tuples(QUANTITY, DIRECTION), max_size=5), st.floats(-60, 60), st.integers(0, 5))
def test_of_many_strategies_the_sum_counts(positions: list[tuple[float, Any]], extra: float, unknown: int) -> None:
    books = [book(holding(str(n), quantity, direction)) for n, (quantity, direction) in enumerate(positions)]
    net = sum(quantity if direction == "long" else -quantity for quantity, direction in positions)
    gross = sum(quantity for quantity, _ in positions)
    difference = found(on_exchange(net) if net else None, *books)
    assert difference is None or not difference.no_entry
    held = net + extra
    difference = found(on_exchange(held) if held else None, *books)
    # More than the books say, or on the other side of it, is unknown; less of it is not.
    beyond = held * extra > 0 and abs(extra) > gross * 0.021 and (net * extra >= 0 or abs(held) > gross * 0.021)
    if beyond:
        assert difference is not None and difference.no_entry  # noqa: PT018
    named = [signal(f"unknown-{n}", THEIRS) for n in range(unknown)]
    difference = found(on_exchange(net, *named, stop_loss=90.0 if net else None), *books)
    assert (difference is not None and difference.no_entry) == bool(unknown)
