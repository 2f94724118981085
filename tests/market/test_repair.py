from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from backtest_kit.errors import UserError
from backtest_kit.market.integrity import check_order
from backtest_kit.market.repair import Repaired, dirty_rule, repair
from backtest_kit.model.candle import COLUMNS, NO_TIME, PRICE_COLUMNS, CandleSeries
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.repairs import REPAIRS, describe_repairs
from backtest_kit.settings import Settings

START = 1_640_995_200_000
SPAN = 12
"""Minutes that the tests repair."""
NAN, INF = float("nan"), float("inf")
Row = tuple[float, ...]
Make = Callable[..., CandleSeries]


def repaired(rows: Sequence[Row] | CandleSeries, low: float = 0, high: float = SPAN) -> Repaired:
    series = rows if isinstance(rows, CandleSeries) else CandleSeries.from_rows(rows)
    return repair(series, START + int(low * MINUTE_MS), START + int(high * MINUTE_MS), Settings())


def row(minute: float, price: float = 5.0, *, volume: float = 1.0, **cells: float) -> Row:
    values = {"timestamp": START + round(minute * MINUTE_MS), **dict.fromkeys(PRICE_COLUMNS, price), "volume": volume}
    return tuple({**values, **cells}.values())


def rows_of(candles: CandleSeries) -> list[Row]:
    return list(zip(*(candles.columns()[name].tolist() for name in COLUMNS), strict=True))


def test_clean_rows_are_the_same_objects_memory(make_candles: Make) -> None:
    held = make_candles(SPAN)
    found = repaired(held)
    assert found.candles == held
    assert np.shares_memory(found.candles.close, held.close)
    assert not found.repairs
    assert found.published.all()


def test_a_row_off_the_minute_moves_up() -> None:
    """Down would show it before it has closed."""
    found = repaired([row(1), row(2.24, 6.0), row(3.24, 7.0)])
    assert rows_of(found.candles) == [row(1), row(3, 6.0), row(4, 7.0)]
    assert found.repairs == {"moved": 2}
    assert found.published.tolist() == [True, False, False], "what is cached is what was published"


def test_a_row_of_the_minute_before_moves_in_and_the_last_moves_out() -> None:
    found = repaired([row(-0.5), row(0.5), row(SPAN - 0.5)])
    assert found.candles.timestamp.tolist() == [START, START + MINUTE_MS]
    assert found.repairs == {"moved": 2}


def test_rows_for_one_minute_count_once_and_the_first_stays() -> None:
    found = repaired([row(1), row(1), row(2, 6.0), row(2, 7.0), row(2, 6.0), row(3)])
    assert rows_of(found.candles) == [row(1), row(2, 6.0), row(3)]
    assert found.repairs == {"repeated": 2, "conflicting": 1}
    assert found.published.tolist() == [True, False, True]


def test_rows_are_sorted() -> None:
    found = repaired([row(3), row(1), row(2)])
    assert rows_of(found.candles) == [row(1), row(2), row(3)]
    assert found.repairs == {"unsorted": 1}
    assert found.published.all()


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        *(({name: value}, "not_finite") for name in COLUMNS[1:] for value in (NAN, INF, -INF)),
        *(({name: value}, "price") for name in PRICE_COLUMNS for value in (0.0, -1.0)),
        ({"volume": -1.0}, "volume"),
        ({"high": 4.0}, "range"),
        ({"low": 0.001}, "outlier"),
        ({"timestamp": NO_TIME}, "no_time"),
    ],
)
def test_the_minute_of_any_other_bad_row_is_missing(cells: dict[str, float], kind: str) -> None:
    found = repaired([row(1), row(2, **cells), row(3)])
    assert rows_of(found.candles) == [row(1), row(3)]
    assert found.repairs == {kind: 1}
    assert describe_repairs(found.repairs) == f"1 {REPAIRS[kind]}"


def test_a_good_row_takes_the_minute_of_a_bad_one() -> None:
    assert rows_of(repaired([row(1), row(2, close=NAN), row(2, 6.0)]).candles) == [row(1), row(2, 6.0)]


def test_a_price_that_stays_low_is_real() -> None:
    """Of a crash that lasts the first minute is lost, and no later price decides about an earlier one."""
    found = repaired([row(0, 5.0), row(1, 0.001), row(2, 0.001), row(3, 0.001)])
    assert found.candles.timestamp.tolist() == [START + at * MINUTE_MS for at in (0, 2, 3)]
    assert found.repairs == {"outlier": 1}
    slide = [row(at, 5.0 / 10**at) for at in range(8)]
    assert rows_of(repaired(slide).candles) == slide


def test_what_lies_outside_is_neither_returned_nor_counted() -> None:
    found = repaired([row(-1, close=NAN), row(-1, close=NAN), row(0), row(SPAN, close=NAN), row(SPAN + 0.5)])
    assert rows_of(found.candles) == [row(0)]
    assert not found.repairs


def test_the_row_before_the_range_is_what_its_first_is_compared_with() -> None:
    assert not len(repaired([row(-1), row(0, 0.001)]).candles)
    assert len(repaired([row(0, 0.001)]).candles) == 1


def test_no_rows_are_no_candles() -> None:
    assert not len(repaired([]).candles)
    assert not len(repaired([row(1, close=NAN)]).candles)


def test_repairs_are_told_in_one_order() -> None:
    assert describe_repairs({"range": 1, "moved": 1200}) == (
        "1,200 moved up to the next whole minute; 1 dropped: high is below low"
    )
    assert describe_repairs({}) == ""


@pytest.mark.parametrize(("gaps", "rule"), [("error", "refuse"), ("fill", "repair")])
def test_rows_are_repaired_where_minutes_are_filled(gaps: str, rule: str) -> None:
    assert dirty_rule(None, gaps) == rule
    assert dirty_rule("refuse", gaps) == "refuse"
    assert dirty_rule("repair", gaps) == "repair"
    with pytest.raises(UserError, match="dirty is 'drop': use one of refuse, repair"):
        dirty_rule("drop", gaps)  # type: ignore[arg-type]


prices = st.sampled_from([5.0, 6.0, 7.0, 0.004, 4000.0, 0.0, -1.0, NAN, INF])
moments = st.one_of(st.integers(-2, SPAN + 1), st.floats(-2, SPAN + 1, allow_nan=False))


@st.composite
def raw_row(draw: st.DrawFn) -> Row:
    time = NO_TIME if draw(st.integers(0, 15)) == 0 else START + round(draw(moments) * MINUTE_MS)
    price = draw(prices)
    cells = [price if draw(st.integers(0, 3)) else draw(prices) for _ in PRICE_COLUMNS]
    return (time, *cells, draw(st.sampled_from([1.0, 2.0, 0.0, -1.0, NAN])))


raw_rows = st.lists(raw_row(), max_size=25)


@given(raw_rows)
def test_what_was_repaired_is_clean_and_stays_as_it_is(rows: list[Row]) -> None:
    once = repaired(rows)
    check_order(once.candles, what="X")
    again = repaired(once.candles)
    assert again.candles == once.candles
    assert not again.repairs


@given(raw_rows)
def test_no_price_is_invented(rows: list[Row]) -> None:
    """Every candle is a row of the source, at its own minute or moved up by less than one."""
    published = {(-(-each[0] // MINUTE_MS) * MINUTE_MS, *each[1:]) for each in rows}
    found = repaired(rows)
    assert set(rows_of(found.candles)) <= published
    kept_as_they_are = set(rows_of(found.candles.take(found.published)))
    assert kept_as_they_are <= {tuple(map(float, each)) for each in rows}


@given(raw_rows, st.integers(0, SPAN))
def test_nothing_is_known_before_its_time(rows: list[Row], minutes: int) -> None:
    """The candles that have closed by a time are the same whatever the source publishes from then on."""
    now = START + minutes * MINUTE_MS
    known = [each for each in rows if each[0] + MINUTE_MS <= now]
    whole, early = repaired(rows).candles, repaired(known).candles
    assert whole.between(0, now - MINUTE_MS + 1) == early.between(0, now - MINUTE_MS + 1)


@given(raw_rows, st.integers(1, SPAN - 1))
def test_pages_are_repaired_as_one(rows: list[Row], cut: int) -> None:
    """Where a request ends decides nothing: each page is made of its rows and those of the minute before."""
    timed = [each for each in rows if each[0] != NO_TIME]
    whole, first, second = repaired(timed), repaired(timed, 0, cut), repaired(timed, cut, SPAN)
    assert CandleSeries.concat([first.candles, second.candles]) == whole.candles
    assert np.concatenate([first.published, second.published]).tolist() == whole.published.tolist()
    order: dict[str, Any] = {"unsorted": 0}
    assert {**first.repairs + second.repairs, **order} == {**whole.repairs, **order}


@given(st.lists(st.integers(0, SPAN - 1), unique=True).map(sorted), st.integers(1, 9))
def test_clean_rows_pass_unchanged(minutes: list[int], price: int) -> None:
    rows = [row(minute, float(price + minute)) for minute in minutes]
    found = repaired(rows)
    assert rows_of(found.candles) == rows
    assert not found.repairs
