"""Profit and effective price: the check values of the original, and the laws behind them."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, strategies as st

from backtest_kit.engine.pnl import closed_pct, effective_price, profit, remaining_cost, result
from backtest_kit.errors import BacktestKitError
from backtest_kit.model.position import Entry, Execution, Reduction
from backtest_kit.model.signal import Direction
from backtest_kit.settings import Settings, with_settings

SETTINGS = Settings()
FREE = with_settings(SETTINGS, {"CC_PERCENT_FEE": 0, "CC_PERCENT_SLIPPAGE": 0})

prices = st.floats(0.01, 1e6)
costs = st.floats(1, 1e6)
directions: st.SearchStrategy[Direction] = st.sampled_from(["long", "short"])


def entry(price: float, cost: float = 100.0) -> Entry:
    return Entry(price, cost, 0)


@pytest.mark.parametrize(
    ("direction", "entries", "reductions", "price", "pct", "cost", "effective"),
    [
        ("long", [entry(100)], [], 101, 0.597403596404, 0.597403596404, 100),
        ("short", [entry(100)], [], 99, 0.602603603604, 0.602603603604, 100),
        ("long", [entry(100)], [], 100, -0.399600399600, -0.3996004, 100),
        ("long", [entry(100), entry(80)], [], 100, 12.062949550450, 24.1258991009, 88.8888888889),
        ("long", [entry(100)], [Reduction(50, 110, 100, 1, 0)], 120, 14.555459540460, 14.5554595405, 100),
        (
            "long",
            [entry(100), entry(90, 200)],
            [Reduction(50, 110, 100, 1, 0)],
            100,
            8.647287712288,
            25.9418631369,
            91.8367346939,
        ),
        (
            "short",
            [entry(100), entry(110)],
            [Reduction(25, 95, 200, 2, 0)],
            105,
            1.765176426426,
            3.5303528529,
            104.7619047619,
        ),
    ],
)
def test_check_values(
    direction: Direction,
    entries: list[Entry],
    reductions: list[Reduction],
    price: float,
    pct: float,
    cost: float,
    effective: float,
) -> None:
    got_pct, got_cost = profit(direction, entries, reductions, price, SETTINGS)
    assert got_pct == pytest.approx(pct, abs=1e-9)
    assert got_cost == pytest.approx(cost, abs=1e-9)
    assert effective_price(entries, reductions) == pytest.approx(effective, abs=1e-9)


@pytest.mark.parametrize(
    ("entries", "reductions", "closed", "remaining"),
    [
        ([entry(100)], [Reduction(50, 110, 100, 1, 0)], 50, 50),
        ([entry(100), entry(90, 200)], [Reduction(50, 110, 100, 1, 0)], 16.6666666667, 250),
        ([entry(100), entry(110)], [Reduction(25, 95, 200, 2, 0)], 25, 150),
        ([entry(100), entry(90, 50)], [], 0, 150),
    ],
)
def test_what_is_closed_and_what_is_left(
    entries: list[Entry], reductions: list[Reduction], closed: float, remaining: float
) -> None:
    assert closed_pct(entries, reductions) == pytest.approx(closed, abs=1e-9)
    assert remaining_cost(entries, reductions) == pytest.approx(remaining, abs=1e-9)


@given(st.lists(st.builds(entry, prices, costs), min_size=1, max_size=8))
def test_effective_price_is_the_harmonic_mean_weighted_by_cost(entries: list[Entry]) -> None:
    harmonic = math.fsum(e.cost for e in entries) / math.fsum(e.cost / e.price for e in entries)
    assert effective_price(entries) == pytest.approx(harmonic, rel=1e-12)
    assert min(e.price for e in entries) * (1 - 1e-12) <= harmonic <= max(e.price for e in entries) * (1 + 1e-12)


@given(directions, prices, costs, prices, st.lists(st.tuples(st.floats(1, 90), prices), max_size=4))
def test_profit_is_the_sum_of_what_each_part_earned(
    direction: Direction, price_open: float, cost: float, last: float, parts: list[tuple[float, float]]
) -> None:
    reductions, basis, earned = [], cost, 0.0
    for percent, price in parts:
        reductions.append(Reduction(percent, price, basis, 1, 0))
        earned += profit(direction, [entry(price_open, basis * percent / 100)], [], price, SETTINGS)[1]
        basis *= 1 - percent / 100
    earned += profit(direction, [entry(price_open, basis)], [], last, SETTINGS)[1]
    whole = profit(direction, [entry(price_open, cost)], reductions, last, SETTINGS)[1]
    assert whole == pytest.approx(earned, rel=1e-9, abs=cost * 1e-9)


@given(prices, st.floats(-50, 50), costs)
def test_a_long_and_its_mirrored_short_earn_the_same_without_costs(price: float, move: float, cost: float) -> None:
    long = profit("long", [entry(price, cost)], [], price * (1 + move / 100), FREE)
    short = profit("short", [entry(price, cost)], [], price * (1 - move / 100), FREE)
    assert long == pytest.approx(short, rel=1e-9, abs=1e-9 * cost)


@given(directions, prices, costs)
def test_going_nowhere_costs_the_round_trip(direction: Direction, price: float, cost: float) -> None:
    pct, _ = profit(direction, [entry(price, cost)], [], price, SETTINGS)
    assert -0.41 < pct < -0.39


def test_closing_more_than_was_put_in_is_refused() -> None:
    with pytest.raises(BacktestKitError, match="took out 20 more than the 100"):
        profit("long", [entry(100)], [Reduction(60, 100, 100, 1, 0), Reduction(60, 100, 100, 1, 0)], 100, SETTINGS)


def test_a_position_closed_to_the_last_cent_keeps_its_price() -> None:
    whole = [Reduction(100, 110, 100, 1, 0)]
    assert effective_price([entry(100), entry(90)][:1], whole) == 100
    assert remaining_cost([entry(100)], whole) == 0
    assert profit("long", [entry(100)], whole, 55, SETTINGS) == profit("long", [entry(100)], [], 110, SETTINGS)


@given(
    st.lists(st.tuples(st.floats(1, 1e5), st.floats(1, 1e4), st.none() | st.floats(-1, 100)), min_size=1, max_size=4),
    st.lists(st.tuples(st.floats(1, 90), st.floats(1, 1e5), st.none() | st.floats(-1, 100)), max_size=3),
    st.floats(1, 1e5),
    st.none() | st.floats(-1, 100),
    directions,
)
def test_a_fee_that_was_charged_takes_the_place_of_the_model_s(
    bought: list[tuple[float, float, float | None]],
    sold: list[tuple[float, float, float | None]],
    price: float,
    close_fee: float | None,
    side: Direction,
) -> None:
    """Order by order: profit is what was gained before fees, less those that were charged and the model's elsewhere."""
    entries = [Entry(at, cost, 0, Execution(fee=fee)) for at, cost, fee in bought]
    reductions: list[Reduction] = []
    for percent, at, fee in sold:
        held = remaining_cost(entries, reductions)
        reductions.append(Reduction(percent, at, held, len(entries), 0, Execution(fee=fee)))
    settings = with_settings(SETTINGS, {"CC_PERCENT_FEE": 0.1, "CC_PERCENT_SLIPPAGE": 0})
    plain_entries = [msgspec.structs.replace(part, execution=None) for part in entries]
    plain_reductions = [msgspec.structs.replace(part, execution=None) for part in reductions]
    gain = profit(side, plain_entries, plain_reductions, price, FREE)[1]
    opened = effective_price(entries)
    parts = [(part.cost_basis * part.percent / 100, part.price) for part in reductions]
    parts.append((remaining_cost(entries, reductions), price))
    traded = [*(entry.cost for entry in entries), *(cost * at / opened for cost, at in parts)]
    charged = [*(fee for *_, fee in bought), *(fee for *_, fee in sold), close_fee]
    fees = sum(value * 0.001 if fee is None else fee for value, fee in zip(traded, charged, strict=True))
    pct, cost, booked = result(side, entries, reductions, price, settings, close_fee)
    scale = sum(traded) + sum(abs(fee or 0.0) for fee in charged)
    assert booked == pytest.approx(fees, abs=1e-9 * scale)
    assert cost == pytest.approx(gain - fees, abs=1e-9 * scale)
    assert pct == pytest.approx(cost / sum(entry.cost for entry in entries) * 100)
