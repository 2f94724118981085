from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, strategies as st

from backtest_kit.errors import UserError
from backtest_kit.model.interval import DAY_MS, MINUTE_MS
from backtest_kit.report import Statistics, compute_statistics, equity_curve

START = 1_640_995_200_000
PNL = [2.0, -1.0, 3.0, 0.0, 1.0, 1.0, -2.0, -1.0, 4.0, -1.0]
"""Sum 6, wins 2+3+1+1+4 = 11 over 5, losses -5 over 4, squares 38, downside squares 7."""


def columns(pnl: list[float], *, every_days: float = 2.0, minutes: float = 90.0) -> dict[str, Any]:
    """Trade i opens i x `every_days` after the start and lasts `minutes`."""
    opened = [START + round(i * every_days * DAY_MS) for i in range(len(pnl))]
    return {
        "pnl_pct": pnl,
        "opened_at_ms": opened,
        "closed_at_ms": [time + round(minutes * MINUTE_MS) for time in opened],
    }


def spanning(pnl: list[float], days: float) -> dict[str, Any]:
    """The first trade opens at the start and the last one closes `days` later."""
    last = START + round(days * DAY_MS)
    opened = [START + i * MINUTE_MS for i in range(len(pnl))]
    return {
        "pnl_pct": pnl,
        "opened_at_ms": opened,
        "closed_at_ms": [time + MINUTE_MS for time in opened[:-1]] + [last],
    }


def test_every_formula_by_hand() -> None:
    stats = compute_statistics(
        **columns(PNL), peak_pct=[3.0, math.nan, 4.0] + [math.nan] * 7, fall_pct=[-0.5, math.nan, -1.5] + [math.nan] * 7
    )
    deviation = math.sqrt((38 - 10 * 0.6**2) / 9)
    span = 18 + 90 / 1440
    per_year = 10 / span * 365
    equity = 1.02 * 0.99 * 1.03 * 1.01 * 1.01 * 0.98 * 0.99 * 1.04 * 0.99
    # The peak 1.02 x .99 x 1.03 x 1.01^2 is followed by .98 and .99.
    drawdown = (1 - 0.98 * 0.99) * 100
    expected = {
        "total_count": 10,
        "win_count": 5,
        "loss_count": 4,
        "win_rate": 5 / 9 * 100,
        "avg_pnl": 0.6,
        "total_pnl": 6.0,
        "median_pnl": 0.5,
        "std_dev": deviation,
        "sharpe_ratio": 0.6 / deviation,
        "span_days": span,
        "trades_per_year": per_year,
        "annualized_sharpe_ratio": 0.6 / deviation * math.sqrt(per_year),
        "equity_final": equity,
        "max_drawdown": drawdown,
        "expected_yearly_returns": None,  # 232 %
        "certainty_ratio": (11 / 5) / (5 / 4),
        "expectancy": 0.6,
        "sortino_ratio": 0.6 / math.sqrt(7 / 10),
        "calmar_ratio": None,
        "recovery_factor": (equity - 1) * 100 / drawdown,
        "avg_peak_pnl": 3.5,
        "avg_fall_pnl": -1.0,
        "avg_duration": 90.0,
        "avg_win_duration": 90.0,
        "avg_loss_duration": 90.0,
        "avg_consecutive_win_pnl": (2 + 3 + 2 + 4) / 4,
        "avg_consecutive_loss_pnl": (-1 - 3 - 1) / 3,
        "profit_factor": 11 / 5,
        "avg_win": 11 / 5,
        "avg_loss": -5 / 4,
        "max_win_streak": 2,
        "max_loss_streak": 2,
        "peak_profit_pnl": 4.0,
        "max_drawdown_pnl": -1.5,
    }
    found = msgspec.structs.asdict(stats)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert [found[name] for name in found if name not in expected] == [None] * 9  # no closing prices, no profile


def test_no_trades_is_not_zero_profit() -> None:
    stats = msgspec.structs.asdict(compute_statistics(pnl_pct=[], opened_at_ms=[], closed_at_ms=[]))
    counts = ("total_count", "win_count", "loss_count", "win_rate", "max_win_streak", "max_loss_streak")
    assert {name: value for name, value in stats.items() if value is not None} == dict.fromkeys(counts, 0)


GATED = ("std_dev", "sharpe_ratio", "trades_per_year", "certainty_ratio", "expectancy", "sortino_ratio")


@pytest.mark.parametrize(("count", "known"), [(9, False), (10, True)])
def test_ten_trades_open_the_ratios(count: int, known: bool) -> None:
    pnl = PNL[:count]
    stats = compute_statistics(**columns(pnl), close_price=[100.0 + i for i in range(count)])
    gated = (*GATED, "recovery_factor", "median_step_size", "trend", "trend_strength")
    assert {name: getattr(stats, name) is not None for name in gated} == dict.fromkeys(gated, known)
    free = ("avg_pnl", "total_pnl", "median_pnl", "avg_duration", "avg_consecutive_win_pnl", "profit_factor")
    assert all(getattr(stats, name) is not None for name in free)


@pytest.mark.parametrize(("days", "known"), [(13.99, False), (14.0, True)])
def test_fourteen_days_open_the_year(days: float, known: bool) -> None:
    stats = compute_statistics(**spanning(PNL, days))
    assert stats.span_days == pytest.approx(days)
    assert (stats.trades_per_year is not None) is known
    assert (stats.annualized_sharpe_ratio is not None) is known


@pytest.mark.parametrize(("days", "expected"), [(20.0, 365.0), (20 - 0.0006, None)])
def test_a_year_holds_365_trades_at_most(days: float, expected: float | None) -> None:
    assert compute_statistics(**spanning([*PNL, *PNL], days)).trades_per_year == expected


@pytest.mark.parametrize(("yearly", "known"), [(99.99, True), (100.01, False)])
def test_yearly_returns_beyond_a_doubling_are_not_stated(yearly: float, known: bool) -> None:
    # Ten equal trades over one year: the equity at the end is the yearly return.
    each = ((1 + yearly / 100) ** 0.1 - 1) * 100
    stats = compute_statistics(**spanning([each] * 10, 365))
    assert stats.expected_yearly_returns == (pytest.approx(yearly) if known else None)


@pytest.mark.parametrize(("spread", "known"), [(0.9e-9, False), (1.1e-9, True)])
def test_a_spread_of_nothing_gives_no_sharpe(spread: float, known: bool) -> None:
    # Half of them +a, half -a: the sample deviation is a x sqrt(10 / 9).
    a = spread / math.sqrt(10 / 9)
    stats = compute_statistics(**columns([a, -a] * 5))
    assert stats.std_dev == pytest.approx(spread)
    assert (stats.sharpe_ratio is not None) is known


def test_without_losses_nothing_is_divided_by_them() -> None:
    stats = compute_statistics(**columns([1.0, 2.0] * 5))
    assert (stats.certainty_ratio, stats.sortino_ratio, stats.profit_factor, stats.avg_loss) == (None, None, None, None)
    assert stats.recovery_factor is None  # no drawdown either
    assert stats.calmar_ratio is None
    assert stats.expectancy == pytest.approx(1.5)
    assert stats.max_drawdown == 0


@pytest.mark.parametrize(("loss", "known"), [(-1e-9, False), (-2e-9, True)])
def test_a_loss_of_nothing_is_no_denominator(loss: float, known: bool) -> None:
    stats = compute_statistics(**columns([1.0] * 9 + [loss]))
    assert (stats.certainty_ratio is not None) is known
    assert (stats.profit_factor is not None) is known


@pytest.mark.parametrize(("loss", "known"), [(-3.1e-9, False), (-3.2e-9, True)])
def test_a_downside_of_nothing_gives_no_sortino(loss: float, known: bool) -> None:
    # One loss among ten: the downside is abs(loss) / sqrt(10).
    assert (compute_statistics(**columns([1.0] * 9 + [loss])).sortino_ratio is not None) is known


def test_without_wins_the_average_win_counts_as_zero() -> None:
    stats = compute_statistics(**columns([-1.0, -2.0] * 5))
    assert stats.certainty_ratio == 0
    assert stats.expectancy == pytest.approx(-1.5)
    assert (stats.win_rate, stats.profit_factor, stats.avg_win) == (0, None, None)


def test_break_even_trades_decide_nothing() -> None:
    stats = compute_statistics(**columns([0.0] * 10))
    assert (stats.win_rate, stats.win_count, stats.loss_count) == (0, 0, 0)
    assert (stats.avg_consecutive_win_pnl, stats.avg_consecutive_loss_pnl, stats.sharpe_ratio) == (None, None, None)
    assert (stats.equity_final, stats.expectancy) == (1, 0)


def test_a_break_even_trade_ends_a_streak() -> None:
    stats = compute_statistics(**columns([1.0, 1.0, 0.0, 2.0, -1.0, -3.0, 0.0, -1.0]))
    assert (stats.max_win_streak, stats.max_loss_streak) == (2, 2)
    assert stats.avg_consecutive_win_pnl == pytest.approx((2 + 2) / 2)
    assert stats.avg_consecutive_loss_pnl == pytest.approx((-4 - 1) / 2)


def test_streaks_follow_arrival_and_equity_follows_close() -> None:
    closes = [START + 3 * DAY_MS, START + 1 * DAY_MS, START + 2 * DAY_MS]
    stats = compute_statistics(pnl_pct=[10.0, -50.0, 20.0], opened_at_ms=[START] * 3, closed_at_ms=closes)
    assert (stats.max_win_streak, stats.avg_consecutive_win_pnl) == (1, 15)
    curve = equity_curve(pnl_pct=[10.0, -50.0, 20.0], opened_at_ms=[START] * 3, closed_at_ms=closes)
    assert curve.closed_at_ms.tolist() == sorted(closes)
    assert curve.equity == pytest.approx([0.5, 0.6, 0.66])
    assert curve.drawdown_pct == pytest.approx([50, 50, 40])


def test_the_worst_price_within_a_trade_is_part_of_the_drawdown() -> None:
    curve = equity_curve(**columns([10.0, 5.0]), fall_pct=[-20.0, -30.0])
    # 1 falls to .8 before 1.1; 1.1 falls to .77, 30 % below its peak, before 1.155.
    assert curve.equity == pytest.approx([1.1, 1.155])
    assert curve.drawdown_pct == pytest.approx([20, 30])
    assert compute_statistics(**columns([10.0, 5.0]), fall_pct=[-20.0, -30.0]).max_drawdown == pytest.approx(30)


def test_a_positive_or_unknown_worst_price_has_no_trough() -> None:
    assert equity_curve(**columns([10.0, 5.0]), fall_pct=[5.0, math.nan]).drawdown_pct.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("pnl", "fall", "blown"),
    [(-100.0, None, True), (-99.99, None, False), (5.0, -100.0, True), (5.0, -99.99, False), (-250.0, None, True)],
)
def test_an_account_at_zero_is_blown_and_stays_so(pnl: float, fall: float | None, blown: bool) -> None:
    series = spanning([*([0.1] * 5), pnl, *([0.1] * 4)], 365)
    falls = [math.nan] * 10
    falls[5] = math.nan if fall is None else fall
    stats = compute_statistics(**series, fall_pct=falls)
    assert (stats.equity_final == 0) is blown
    if blown:
        assert (stats.max_drawdown, stats.expected_yearly_returns, stats.calmar_ratio) == (100, -100, -1)
        assert stats.recovery_factor is None
        curve = equity_curve(**series, fall_pct=falls)
        assert curve.equity[5:].tolist() == [0] * 5
        assert curve.drawdown_pct[5:].tolist() == [100] * 5
    else:
        assert stats.recovery_factor is not None


def test_ratios_are_capped_at_a_thousand() -> None:
    stats = compute_statistics(**spanning([*([5.0] * 9), -1e-4], 365))
    assert (stats.calmar_ratio, stats.recovery_factor) == (1000, 1000)


def test_a_trade_without_its_times_is_left_out() -> None:
    series = columns([1.0, 50.0, -1.0, 70.0, 90.0])
    series["opened_at_ms"][1] = 0
    series["closed_at_ms"][3] = 0
    series["closed_at_ms"][4] = math.nan
    assert compute_statistics(**series) == compute_statistics(
        pnl_pct=[1.0, -1.0],
        opened_at_ms=[series["opened_at_ms"][0], series["opened_at_ms"][2]],
        closed_at_ms=[series["closed_at_ms"][0], series["closed_at_ms"][2]],
    )


def test_price_profile_by_hand() -> None:
    prices = [100.0, 110.0, 99.0, 99.0, 108.9, 119.79, 119.79, 131.769, 118.5921, 130.45131]
    # Steps: +10 % five times, -10 % twice, 0 twice.
    stats = compute_statistics(**columns([1.0] * 10), close_price=prices)
    assert stats.median_step_size == pytest.approx(10)
    assert (stats.buyer_pressure, stats.seller_pressure) == pytest.approx((5 / 7, 2 / 7))
    assert (stats.buyer_strength, stats.seller_strength) == pytest.approx((5 / 7, 2 / 7))
    assert stats.pressure_imbalance == pytest.approx(3 / 7)


def test_strength_weighs_the_size_of_the_steps() -> None:
    prices = [100.0, *[100.0 * 1.01**i for i in range(1, 9)], 100.0 * 1.01**8 * 0.5]
    stats = compute_statistics(**columns([1.0] * 10), close_price=prices)
    assert stats.buyer_pressure == pytest.approx(8 / 9)
    assert stats.buyer_strength == pytest.approx(0.08 / 0.58)
    assert stats.pressure_imbalance == pytest.approx((0.08 - 0.5) / 0.58)


@pytest.mark.parametrize(
    ("per_day", "every_days", "noise", "trend"),
    [
        (0.01, 2.0, 0.0, "bullish"),
        (-0.01, 2.0, 0.0, "bearish"),
        (0.01, 8.0, 0.0, "neutral"),  # a step of 8 % dwarfs a slope of 1 % per day
        (0.001, 1.0, 0.2, "sideways"),
        (0.0, 1.0, 0.0, "sideways"),
    ],
)
def test_trend_needs_fit_and_slope(per_day: float, every_days: float, noise: float, trend: str) -> None:
    prices = [50 * math.exp(per_day * every_days * i + (noise if i % 2 else 0)) for i in range(12)]
    stats = compute_statistics(**columns([1.0] * 12, every_days=every_days), close_price=prices)
    assert stats.trend == trend
    if not noise:
        assert stats.trend_strength == pytest.approx(per_day * 100)
        assert stats.trend_confidence == pytest.approx(1.0 if per_day else 0.0)


@pytest.mark.parametrize("price", [0.1, 3.0, 7e-6, 41_234.5])
def test_a_price_that_never_moves_has_no_trend(price: float) -> None:
    stats = compute_statistics(**columns([1.0] * 11), close_price=[price] * 11)
    assert (stats.trend, stats.trend_confidence) == ("sideways", 0)
    assert (stats.buyer_pressure, stats.pressure_imbalance, stats.median_step_size) == (None, None, 0)


def test_no_time_no_trend() -> None:
    series = {"pnl_pct": [1.0] * 10, "opened_at_ms": [START] * 10, "closed_at_ms": [START + DAY_MS] * 10}
    stats = compute_statistics(**series, close_price=[100.0 + i for i in range(10)])
    assert (stats.trend, stats.trend_strength, stats.trend_confidence) == (None, None, None)
    assert stats.median_step_size is not None


def test_an_unusable_closing_price_does_not_count_towards_ten() -> None:
    prices = [100.0 + i for i in range(9)]
    for bad in (math.nan, 0.0, -5.0, math.inf):
        assert compute_statistics(**columns([1.0] * 10), close_price=[*prices, bad]).median_step_size is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"closed_at_ms": [1]}, "column closed_at_ms has 1 rows, pnl_pct has 2"),
        ({"fall_pct": [1.0, 2.0, 3.0]}, "column fall_pct has 3 rows, pnl_pct has 2"),
        ({"pnl_pct": ["a", "b"]}, "column pnl_pct is not numeric"),
        ({"pnl_pct": [[1.0], [2.0]]}, "column pnl_pct has 2 dimensions"),
    ],
)
def test_bad_columns_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compute_statistics(**{**columns([1.0, 2.0]), **changes})
    if "fall_pct" in changes or "pnl_pct" in changes:
        with pytest.raises(UserError, match=message):
            equity_curve(**{**columns([1.0, 2.0]), **changes})


NUMBERS = st.floats(-90, 90).map(lambda value: round(value, 3))
ROWS = st.lists(
    st.tuples(NUMBERS, st.integers(0, 400), st.integers(1, 60), NUMBERS, st.floats(0.001, 1e6)),
    max_size=40,
    unique_by=lambda row: row[1] + row[2],
)
ORDERED_FIELDS = ("avg_consecutive_win_pnl", "avg_consecutive_loss_pnl", "max_win_streak", "max_loss_streak")


def of_rows(rows: list[tuple[float, int, int, float, float]], scale: float = 1.0) -> Statistics:
    return compute_statistics(
        pnl_pct=[row[0] * scale for row in rows],
        opened_at_ms=[START + row[1] * DAY_MS for row in rows],
        closed_at_ms=[START + (row[1] + row[2]) * DAY_MS for row in rows],
        fall_pct=[row[3] * scale for row in rows],
        close_price=[row[4] for row in rows],
    )


@given(ROWS, st.randoms(use_true_random=False))
def test_only_streaks_depend_on_the_order_of_arrival(
    rows: list[tuple[float, int, int, float, float]], random: Any
) -> None:
    shuffled = random.sample(rows, len(rows))
    first, second = msgspec.structs.asdict(of_rows(rows)), msgspec.structs.asdict(of_rows(shuffled))
    for name in first.keys() - set(ORDERED_FIELDS):
        assert first[name] == (
            pytest.approx(second[name], rel=1e-6, abs=1e-9) if isinstance(second[name], float) else second[name]
        ), name


@given(ROWS)
def test_doubling_every_profit_doubles_sums_and_keeps_ratios(
    rows: list[tuple[float, int, int, float, float]],
) -> None:
    # A power of two scales floats exactly, so only the gates at 1e-9 could part the two.
    one, two = of_rows(rows), of_rows(rows, 2.0)
    doubled = ("avg_pnl", "total_pnl", "median_pnl", "std_dev", "expectancy", "avg_win", "avg_loss")
    for name in (*doubled, "avg_consecutive_win_pnl", "avg_consecutive_loss_pnl", "avg_fall_pnl", "max_drawdown_pnl"):
        value = getattr(one, name)
        assert getattr(two, name) == (None if value is None else pytest.approx(value * 2))
    for name in ("win_rate", "sharpe_ratio", "sortino_ratio", "certainty_ratio", "profit_factor", "max_win_streak"):
        value = getattr(one, name)
        assert getattr(two, name) == (None if value is None else pytest.approx(value))


WILD = st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e308, -1e308, 5e-324]))


@given(st.lists(st.tuples(WILD, WILD, WILD, WILD, WILD, WILD), max_size=30))
def test_every_statistic_is_finite_or_none(rows: list[tuple[float, ...]]) -> None:
    wild = dict(
        zip(
            ("pnl_pct", "opened_at_ms", "closed_at_ms", "peak_pct", "fall_pct", "close_price"),
            np.array(rows, dtype=float).reshape(-1, 6).T,
            strict=True,
        )
    )
    stats = msgspec.structs.asdict(compute_statistics(**wild))
    dated = {**wild, **{name: column for name, column in columns([0.0] * len(rows)).items() if name != "pnl_pct"}}
    stats |= {f"dated {name}": value for name, value in msgspec.structs.asdict(compute_statistics(**dated)).items()}
    bad = {name: value for name, value in stats.items() if isinstance(value, float) and not math.isfinite(value)}
    assert bad == {}


@given(ROWS)
def test_drawdown_is_a_share_of_the_peak(rows: list[tuple[float, int, int, float, float]]) -> None:
    curve = equity_curve(
        pnl_pct=[row[0] for row in rows],
        opened_at_ms=[START + row[1] * DAY_MS for row in rows],
        closed_at_ms=[START + (row[1] + row[2]) * DAY_MS for row in rows],
        fall_pct=[row[3] for row in rows],
    )
    assert ((curve.drawdown_pct >= 0) & (curve.drawdown_pct <= 100)).all()
    assert (np.diff(curve.closed_at_ms) >= 0).all()
    # The same rule, trade by trade.
    equity = peak = 1.0
    for row, expected, drawdown in zip(
        sorted(rows, key=lambda row: row[1] + row[2]), curve.equity, curve.drawdown_pct, strict=True
    ):
        trough = equity * (1 + row[3] / 100) if row[3] < 0 else equity
        below = (peak - trough) / peak * 100
        equity *= 1 + row[0] / 100
        peak = max(peak, equity)
        assert expected == pytest.approx(equity)
        assert drawdown == pytest.approx(max(below, (peak - equity) / peak * 100))
