from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from backtest_kit.errors import UserError
from backtest_kit.market.integrity import check_candles, check_grid, fill_gaps, find_gaps
from backtest_kit.model.candle import COLUMNS, NO_TIME, CandleSeries, TimeColumn
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.settings import Settings

START = 1_640_995_200_000
Make = Callable[..., CandleSeries]


def changed(candles: CandleSeries, column: str, at: int, value: float) -> CandleSeries:
    columns = {name: values.copy() for name, values in candles.columns().items()}
    columns[column][at] = value
    return CandleSeries(**columns)


def check(candles: CandleSeries, **settings: Any) -> None:
    check_candles(candles, symbol="BTCUSDT", settings=Settings(**settings))


def refusal(candles: CandleSeries, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        check(candles, **settings)
    return str(caught.value)


def test_good_candles_and_no_candles_pass(make_candles: Make) -> None:
    check(make_candles(100))
    check(make_candles(1))
    check(CandleSeries.empty())


@pytest.mark.parametrize("column", COLUMNS[1:])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused(make_candles: Make, column: str, value: float) -> None:
    message = refusal(changed(make_candles(20), column, 7, value))
    assert f"BTCUSDT: {column} is {value:g} at 2022-01-01T00:07Z" in message
    assert "finite" in message


def test_several_kinds_of_not_finite_at_once_are_refused(make_candles: Make) -> None:
    candles = make_candles(20)
    for at, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        candles = changed(candles, "low", at + 2, value)
    assert "low is nan at 2022-01-01T00:02Z and in 2 more candles" in refusal(candles)


@pytest.mark.parametrize("column", COLUMNS[1:5])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_price_must_be_above_zero(make_candles: Make, column: str, value: float) -> None:
    message = refusal(changed(make_candles(20), column, 3, value))
    assert f"{column} is {value:g} at 2022-01-01T00:03Z" in message
    assert "above 0" in message


def test_volume_may_be_zero_but_not_negative(make_candles: Make) -> None:
    check(changed(make_candles(20), "volume", 3, 0.0))
    assert "volume is -1 at 2022-01-01T00:03Z" in refusal(changed(make_candles(20), "volume", 3, -1.0))


def test_high_below_low_is_refused(make_candles: Make) -> None:
    candles = make_candles(20)
    message = refusal(changed(candles, "high", 4, float(candles.low[4]) * 0.99))
    assert "at 2022-01-01T00:04Z" in message
    assert "high must not be below low" in message


def test_open_and_close_outside_the_range_are_tolerated(make_candles: Make) -> None:
    candles = make_candles(20)
    check(changed(candles, "open", 4, float(candles.high[4]) * 1.5))
    check(changed(candles, "close", 4, float(candles.low[4]) * 0.5))


@pytest.mark.parametrize("column", COLUMNS[1:5])
def test_a_price_far_below_the_typical_one_is_refused(make_candles: Make, column: str) -> None:
    price = np.full(10, 1000.0)
    candles = CandleSeries(make_candles(10).timestamp, price, price, price, price, np.ones(10))
    # high may not go below low, so the whole candle of `high` moves.
    moved = ("low", "high") if column == "high" else (column,)
    for name in moved:
        candles = changed(candles, name, 5, 1.0)
    check(candles)
    for name in moved:
        candles = changed(candles, name, 5, 0.999)
    message = refusal(candles)
    assert "is 0.999 at 2022-01-01T00:05Z" in message
    assert "below 1, the typical 1000" in message
    assert "CC_GET_CANDLES_PRICE_ANOMALY_THRESHOLD_FACTOR = 1000: raise this setting" in message
    check(candles, CC_GET_CANDLES_PRICE_ANOMALY_THRESHOLD_FACTOR=2000)


def test_the_typical_price_is_the_upper_median_of_enough_candles_and_the_mean_of_fewer() -> None:
    times = START + np.arange(4) * MINUTE_MS
    # Sixteen prices: eight of 1, eight of 3000. Upper median 3000, mean 1500.5.
    column = np.array([1.0, 1.0, 3000.0, 3000.0])
    candles = CandleSeries(times, column, column, column, column, np.ones(4))
    assert "typical 3000" in refusal(candles, CC_GET_CANDLES_MIN_CANDLES_FOR_MEDIAN=4)
    assert "typical 1500.5" in refusal(candles, CC_GET_CANDLES_MIN_CANDLES_FOR_MEDIAN=5)


def test_times_must_be_whole_steps_ascending_and_unique(make_candles: Make) -> None:
    candles = make_candles(20)
    late = changed(candles, "timestamp", 9, START + 9 * MINUTE_MS + 1000)
    assert "do not open on a whole 60 s step, the first at 2022-01-01T00:09:01Z" in refusal(late)
    twice = candles.take(np.array([0, 1, 1, 2]))
    assert "2022-01-01T00:01Z appears twice (1 such places)" in refusal(twice)
    swapped = candles.take(np.array([0, 2, 1, 3]))
    assert "2022-01-01T00:01Z comes after the candle of 2022-01-01T00:02Z" in refusal(swapped)
    with pytest.raises(UserError, match="whole 900 s step"):
        check_candles(candles, symbol="X", settings=Settings(), step_ms=15 * MINUTE_MS)


def test_gaps_are_described(make_candles: Make) -> None:
    candles = make_candles(60)
    assert not find_gaps(candles, START, START + 60 * MINUTE_MS)
    holed = candles.take(np.r_[0:5, 6:20, 35:60])
    gaps = find_gaps(holed, START, START + 60 * MINUTE_MS)
    assert gaps.total == 16
    assert gaps.describe("BTCUSDT") == (
        "16 minutes of BTCUSDT are missing in 2 places: 2022-01-01T00:05Z (1 minute), "
        "2022-01-01T00:20Z .. 2022-01-01T00:34Z (15 minutes)"
    )
    every_other = find_gaps(candles.take(np.arange(0, 60, 2)), START, START + 60 * MINUTE_MS)
    assert every_other.describe("X").startswith("30 minutes of X are missing in 30 places")
    assert every_other.describe("X").endswith("00:05Z (1 minute), ...")
    assert find_gaps(CandleSeries.empty(), START, START + MINUTE_MS).describe("X") == (
        "1 minute of X is missing in 1 place: 2022-01-01T00:00Z (1 minute)"
    )


@given(st.sets(st.integers(0, 29)), st.integers(-3, 33), st.integers(-3, 33))
def test_gaps_are_exactly_the_minutes_that_are_not_there(present: set[int], low: int, high: int) -> None:
    rows = [(minute * MINUTE_MS, 1.0, 1.0, 1.0, 1.0, 1.0) for minute in sorted(present)]
    gaps = find_gaps(CandleSeries.from_rows(rows), low * MINUTE_MS, high * MINUTE_MS)
    ranges = list(zip((gaps.start_ms // MINUTE_MS).tolist(), (gaps.stop_ms // MINUTE_MS).tolist(), strict=True))
    missing = [minute for start, stop in ranges for minute in range(start, stop)]
    assert missing == [minute for minute in range(low, high) if minute not in present]
    assert gaps.total == len(missing)
    assert bool(gaps) == bool(missing)
    assert all(stop < start for (_, stop), (start, _) in pairwise(ranges)), "ranges are maximal"


@given(st.sets(st.integers(0, 29), min_size=1), st.integers(0, 35), st.integers(0, 10))
def test_filled_minutes_are_flat_at_the_previous_close(present: set[int], start: int, length: int) -> None:
    rows = {minute: (minute * MINUTE_MS, 5.0, 9.0, 4.0, 6.0 + minute, 7.0) for minute in present}
    candles = CandleSeries.from_rows([rows[minute] for minute in sorted(rows)])
    stop = start + length
    if length and start < min(present):
        with pytest.raises(UserError, match="no close before it"):
            fill_gaps(candles, start * MINUTE_MS, stop * MINUTE_MS)
        return
    expected = []
    for minute in range(start, stop):
        close = rows[max(each for each in present if each <= minute)][4]
        expected.append(rows.get(minute, (minute * MINUTE_MS, close, close, close, close, 0.0)))
    assert fill_gaps(candles, start * MINUTE_MS, stop * MINUTE_MS) == CandleSeries.from_rows(expected)


def at_minutes(*minutes: float) -> TimeColumn:
    return np.array([START + int(minute * MINUTE_MS) for minute in minutes], dtype=np.int64)


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (at_minutes(0, 60, 120), "X has 1h candles: give 1m candles"),
        (at_minutes(180, 60, 120, 60), "X has 1h candles"),
        (at_minutes(0, 60, 180, 540), "X has 1h candles"),
        (at_minutes(0, 1440, 2880), "X has 1d candles"),
        (at_minutes(*range(0, 100, 5)), "X has 5m candles"),
        (at_minutes(*range(0, 100, 3)), "X has 3m candles"),
        (at_minutes(*(each + 0.25 for each in range(0, 600, 60))), "X has 1h candles"),
        (at_minutes(*range(0, 3000, 60), 2977), "X has 1h candles"),
        (at_minutes(*range(0, 1200, 60), 1217, *range(1260, 3000, 60), 2941), "X has 1h candles"),
        (at_minutes(*range(30, 3000, 60), 3001), "X has 1h candles"),
        (
            at_minutes(*range(3000), *range(3000, 6000, 60)),
            r"X has 1h candles from 2022-01-03T02:00Z to 2022-01-05T03:00Z: give 1m candles",
        ),
        (at_minutes(*range(0, 9000, 5), *range(9000, 18_000)), "X has 5m candles from 2022-01-01T00:00Z to 2022-01-07"),
        (at_minutes(*range(1000), *range(1020, 100_000, 60)), "X has 1h candles from 2022-01-01T16:39Z"),
        (at_minutes(*range(3000), *range(3000, 6000, 60), *range(6001, 9000)), "X has 1h candles from 2022-01-03"),
        (at_minutes(*(each / 60 for each in range(180))), "X has a row every 1 s: give 1m candles"),
    ],
)
def test_candles_of_another_length_are_called_what_they_are(times: TimeColumn, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_grid(times, what="X")


@pytest.mark.parametrize(
    "times",
    [
        at_minutes(),
        at_minutes(7),
        at_minutes(0, 60),
        at_minutes(0, 60, 61, 180),
        at_minutes(0, 3, 9),
        at_minutes(0, 30, 31, 90, 120, 150),
        at_minutes(*sorted({each * each % 4099 for each in range(400)})),
        at_minutes(0, 1, 2, 60, 61, 62),
        at_minutes(*range(3000), *range(3000, 4200, 60), *range(4200, 5000)),
        at_minutes(*range(3000), 9000, *range(20_000, 23_000)),
        at_minutes(5, 4, 3, 2, 1),
        at_minutes(0, 0, 1, 1, 2.2, 3.2, 4.2),
        np.array([NO_TIME, START, NO_TIME, START + 60 * MINUTE_MS]),
    ],
)
def test_minutes_with_holes_are_minutes(times: TimeColumn) -> None:
    check_grid(times, what="X")
