"""How much to put into a position: the formulas by hand, and the laws every size keeps."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from backtest_kit.engine import sizing
from backtest_kit.errors import UserError
from backtest_kit.model.candle import CandleSeries

FIXED: dict[str, Any] = {"balance": 10_000, "price_open": 50, "price_stop_loss": 48, "risk_pct": 1}
KELLY: dict[str, Any] = {"balance": 10_000, "price_open": 50, "win_rate": 0.6, "win_loss_ratio": 1.5}
ATR: dict[str, Any] = {"balance": 10_000, "price_open": 50, "atr": 1.25, "risk_pct": 1}
METHODS: list[tuple[Callable[..., float], dict[str, Any]]] = [
    (sizing.fixed_percentage, FIXED),
    (sizing.kelly, KELLY),
    (sizing.atr_based, ATR),
]
amounts = st.floats(0.01, 1e6)
percents = st.floats(0, 100)
bounds = st.one_of(st.none(), st.floats(0, 1e6))


def test_each_formula_by_hand() -> None:
    assert sizing.fixed_percentage(**FIXED) == pytest.approx(100 / 2 * 50)
    assert sizing.fixed_percentage(**FIXED | {"price_stop_loss": 52}) == pytest.approx(100 / 2 * 50)
    assert sizing.kelly(**KELLY) == pytest.approx(10_000 * (0.6 - 0.4 / 1.5) * 0.25)
    assert sizing.kelly(**KELLY, multiplier=1) == pytest.approx(10_000 * (0.6 - 0.4 / 1.5))
    assert sizing.kelly(**KELLY | {"win_rate": 0.2}) == 0
    assert sizing.atr_based(**ATR) == pytest.approx(100 / 2.5 * 50)
    assert sizing.atr_based(**ATR, multiplier=4) == pytest.approx(100 / 5 * 50)


@pytest.mark.parametrize(("size", "arguments"), METHODS)
def test_the_bounds_act_in_order(size: Callable[..., float], arguments: dict[str, Any]) -> None:
    assert size(**arguments, min_quantity=1000) == 1000 * 50
    assert size(**arguments, min_quantity=1000, max_position_pct=10) == pytest.approx(1_000)
    assert size(**arguments, min_quantity=1000, max_position_pct=10, max_quantity=3) == 150
    assert size(**arguments, min_quantity=5, max_quantity=3) == 150
    assert size(**arguments, max_quantity=0) == 0


@pytest.mark.parametrize(("size", "arguments"), METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_every_argument_is_checked_and_named(size: Callable[..., float], arguments: dict[str, Any], bad: float) -> None:
    bounded = arguments | {"min_quantity": 1.0, "max_position_pct": 50.0, "max_quantity": 9.0}
    for name in bounded:
        with pytest.raises(UserError, match=rf"^{name} is {bad!r}: give"):
            size(**bounded | {name: bad})


@pytest.mark.parametrize(
    ("size", "arguments", "name"),
    [
        (sizing.fixed_percentage, FIXED, "price_open"),
        (sizing.kelly, KELLY, "win_rate"),
        (sizing.kelly, KELLY, "win_loss_ratio"),
        (sizing.atr_based, ATR, "atr"),
        (sizing.atr_based, ATR, "multiplier"),
    ],
)
def test_what_is_divided_by_is_not_zero(size: Callable[..., float], arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} is 0"):
        size(**arguments | {name: 0})


def test_odd_arguments_of_each_method() -> None:
    with pytest.raises(UserError, match="price_stop_loss is 50, the price_open itself"):
        sizing.fixed_percentage(**FIXED | {"price_stop_loss": 50})
    with pytest.raises(UserError, match="win_rate is 1: give a share above 0 and below 1"):
        sizing.kelly(**KELLY | {"win_rate": 1})


@given(balance=amounts, price=amounts, distance=st.floats(0.001, 0.5), risk=percents)
def test_a_stop_loses_the_risked_share(balance: float, price: float, distance: float, risk: float) -> None:
    stop = price * (1 - distance)
    cost = sizing.fixed_percentage(balance=balance, price_open=price, price_stop_loss=stop, risk_pct=risk)
    assert cost / price * (price - stop) == pytest.approx(balance * risk / 100, rel=1e-6)


@given(balance=amounts, price=amounts, atr=amounts, risk=percents, more=percents, low=bounds, share=bounds, high=bounds)
def test_more_risk_is_never_a_smaller_position_nor_beyond_a_maximum(
    balance: float,
    price: float,
    atr: float,
    risk: float,
    more: float,
    low: float | None,
    share: float | None,
    high: float | None,
) -> None:
    def cost(risk_pct: float) -> float:
        return sizing.atr_based(
            balance=balance,
            price_open=price,
            atr=atr,
            risk_pct=risk_pct,
            min_quantity=low,
            max_position_pct=share,
            max_quantity=high,
        )

    assert 0 <= cost(risk) <= cost(max(risk, more)) * (1 + 1e-12) + 1e-300
    if high is not None:
        assert cost(risk) <= high * price * (1 + 1e-12) + 1e-300
    if share is not None:
        assert cost(risk) <= balance * share / 100 * (1 + 1e-12) + 1e-300
    if low is not None and share is None and high is None:
        assert cost(risk) >= low * price * (1 - 1e-12)


@given(win_rate=st.floats(0.01, 0.99), better=st.floats(0.01, 0.99), ratio=st.floats(0.01, 100))
def test_kelly_bets_more_on_the_better_odds_and_never_more_than_all(
    win_rate: float, better: float, ratio: float
) -> None:
    def share(rate: float) -> float:
        return sizing.kelly(balance=1, price_open=1, win_rate=rate, win_loss_ratio=ratio, multiplier=1)

    low, high = sorted((win_rate, better))
    assert 0 <= share(low) <= share(high) + 1e-12
    assert share(high) <= 1


def candles(rows: list[tuple[float, float, float]]) -> CandleSeries:
    high, low, close = np.array(rows, dtype=float).T
    return CandleSeries(np.arange(len(rows)) * 60_000, close, high, low, close, np.ones(len(rows)))


def test_atr_by_hand() -> None:
    series = candles([(10, 9, 9.5), (11, 10, 10.5), (10.6, 10.4, 10.5), (9, 8, 8.5), (8.6, 8.4, 8.5)])
    # True ranges: 11 - 9.5, 10.6 - 10.4, 10.5 - 8, 8.6 - 8.4.
    first = (1.5 + 0.2) / 2
    second = (first + 2.5) / 2
    assert sizing.atr(series, 2) == pytest.approx((second + 0.2) / 2)
    assert sizing.atr(series[:3], 2) == pytest.approx(first)
    assert sizing.atr(series, 1) == pytest.approx(0.2)


def test_atr_of_even_candles_is_their_range() -> None:
    assert sizing.atr(candles([(11, 10, 10.5)] * 60)) == pytest.approx(1.0)


def test_atr_needs_a_candle_before_its_period() -> None:
    with pytest.raises(UserError, match="candles has 14 rows: an atr of period 14 takes 15 or more"):
        sizing.atr(candles([(11, 10, 10.5)] * 14))
    with pytest.raises(UserError, match="period is 0: give 1 or more"):
        sizing.atr(candles([(11, 10, 10.5)] * 14), 0)


def test_it_is_a_name_of_the_package() -> None:
    code = "import backtest_kit; print(backtest_kit.sizing.__name__)"  # first of all names, in a fresh process
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "backtest_kit.engine.sizing"
