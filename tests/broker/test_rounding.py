from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, strategies as st

from backtest_kit.broker.ccxt_market import Market
from backtest_kit.broker.rounding import exact, lots, price_above, price_below, significant_tick

NUMBERS = st.floats(min_value=1e-9, max_value=1e9, allow_nan=False)
STEPS = st.sampled_from([Decimal(each) for each in ("1", "10", "0.5", "0.25", "0.1", "0.001", "1e-5", "1e-8", "3e-4")])


@given(NUMBERS, STEPS)
def test_quantities_are_whole_lots_and_never_more_than_there_is(number: float, step: Decimal) -> None:
    quantity = exact(number)
    whole = lots(quantity, step)
    assert whole % step == 0
    assert 0 <= quantity - whole < step
    assert lots(whole, step) == whole


@given(NUMBERS, STEPS)
def test_prices_are_the_ticks_on_either_side(number: float, tick: Decimal) -> None:
    price = exact(number)
    below, above = price_below(price, tick), price_above(price, tick)
    assert below % tick == above % tick == 0
    assert below <= price <= above
    assert above - below in (0, tick)
    assert price_below(above, tick) == price_above(above, tick) == above


@given(NUMBERS, st.integers(3, 9))
def test_a_price_of_significant_digits_has_no_more_of_them(number: float, digits: int) -> None:
    price = exact(number)
    below = price_below(price, significant_tick(price, digits))
    assert len(below.normalize().as_tuple().digits) <= digits
    assert below <= price


@given(NUMBERS, STEPS)
def test_what_python_writes_is_what_is_rounded(number: float, step: Decimal) -> None:
    assert lots(exact(repr(number)), step) == lots(exact(number), step)


def market(**fields: object) -> Market:
    return Market(
        **{
            "symbol": "BTC/USDT", "base": "BTC", "quote": "USDT", "contract": False, "contract_size": Decimal(1),
            "lot": Decimal("0.001"), "tick": Decimal("0.5"), "min_quantity": Decimal("0.002"),
            "min_cost": Decimal(10), "market_stop": True, **fields,
        }  # type: ignore[arg-type]
    )  # fmt: skip


@given(NUMBERS)
def test_a_stop_protects_rather_too_early_than_too_late(number: float) -> None:
    assert market().stop_trigger("long", number) >= exact(number)
    assert market().stop_trigger("short", number) <= exact(number)


@given(NUMBERS)
def test_a_limit_at_worst_never_costs_more_and_one_that_must_be_reached_is_not_short_of_it(number: float) -> None:
    price = exact(number)
    assert market().price_for("buy", price) <= price <= market().price_for("sell", price)
    sold = market().price_for("sell", price, at_worst=False)
    bought = market().price_for("buy", price, at_worst=False)
    assert sold <= price <= bought


@pytest.mark.parametrize(
    ("quantity", "price", "why"),
    [
        ("0.001", 50_000.0, "0.001 BTC is below the smallest quantity, 0.002"),
        ("0", 50_000.0, "0 BTC is below the smallest quantity, 0.002"),
        ("0.002", 100.0, "0.002 BTC are worth 0.20 USDT, and the least is 10"),
        ("0.002", 5000.0, ""),
    ],
)
def test_what_is_too_small_is_said_with_the_numbers(quantity: str, price: float, why: str) -> None:
    assert market().too_small(Decimal(quantity), price) == why


def test_closing_a_future_has_no_least_value() -> None:
    assert market(contract=True).unsellable(Decimal("0.0029"), 1.0) == ""
    assert market().unsellable(Decimal("0.0029"), 1.0) == "0.002 BTC are worth 0.00 USDT, and the least is 10"
    assert "smallest quantity" in market(contract=True).unsellable(Decimal("0.0019"), 1.0)
