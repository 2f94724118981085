from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, strategies as st

from backtest_kit.errors import UserError
from backtest_kit.market.price import resample, vwap
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import CANDLE_INTERVALS, INTERVAL_MS, MINUTE_MS

Row = tuple[float, float, float, float, float, float]
PRICE = st.floats(1e-6, 1e6)
VOLUME = st.one_of(st.just(0.0), st.floats(1e-6, 1e9))


@st.composite
def series(draw: st.DrawFn, size: st.SearchStrategy[int]) -> CandleSeries:
    values = draw(st.tuples(PRICE, PRICE, PRICE, PRICE, VOLUME))
    rows: list[Row] = []
    for minute in range(draw(size)):
        if draw(st.booleans()):
            values = draw(st.tuples(PRICE, PRICE, PRICE, PRICE, VOLUME))
        a, b, open_, close, volume = values
        rows.append((minute * MINUTE_MS, open_, max(a, b), min(a, b), close, volume))
    return CandleSeries.from_rows(rows)


def one_price(candles: CandleSeries) -> float:
    """The definition, in plain Python, in the order of time."""
    typical = [
        (high + low + close) / 3
        for high, low, close in zip(candles.high.tolist(), candles.low.tolist(), candles.close.tolist(), strict=True)
    ]
    volumes = candles.volume.tolist()
    total = sum(volumes)
    if total == 0:
        return float(sum(candles.close.tolist()) / len(candles))
    return float(sum(price * volume for price, volume in zip(typical, volumes, strict=True)) / total)


@given(series(st.integers(0, 30)), st.integers(1, 8), st.integers(0, 25))
def test_vwap_is_its_definition_and_depends_on_its_own_window_only(
    candles: CandleSeries, window: int, cut: int
) -> None:
    prices = vwap(candles, window)
    assert len(prices) == len(candles)
    assert np.isnan(prices[: window - 1]).all()
    for at in range(window - 1, len(candles)):
        assert prices[at] == one_price(candles[at - window + 1 : at + 1])
    later = vwap(candles[cut:], window)
    assert np.array_equal(later[window - 1 :], prices[cut + window - 1 :]), "bit for bit, whatever comes before"


def test_vwap_keeps_its_digits_behind_a_year_of_huge_volumes(make_candles: Callable[..., CandleSeries]) -> None:
    quiet = make_candles(10)
    loud = CandleSeries(*(np.repeat(column[:1], 500_000) for column in quiet.columns().values()))
    loud = CandleSeries(loud.timestamp, loud.open, loud.high, loud.low, loud.close, np.full(500_000, 1e12))
    assert np.array_equal(vwap(CandleSeries.concat((loud, quiet)), 5)[-6:], vwap(quiet, 5)[-6:])


@given(series(st.integers(1, 4).map(lambda steps: steps * 15)), st.sampled_from((1, 3, 5, 15)))
def test_resample_is_the_naive_one(candles: CandleSeries, size: int) -> None:
    step_ms = size * MINUTE_MS
    result = resample(candles, step_ms)
    assert len(result) == len(candles) // size
    for at in range(len(result)):
        part = candles[at * size : (at + 1) * size]
        assert result.timestamp[at] == part.timestamp[0]
        assert result.open[at] == part.open.tolist()[0]
        assert result.high[at] == max(part.high.tolist())
        assert result.low[at] == min(part.low.tolist())
        assert result.close[at] == part.close.tolist()[-1]
        assert result.volume[at] == pytest.approx(math.fsum(part.volume.tolist()), rel=1e-12)
        assert resample(part, step_ms) == result[at : at + 1], "bit for bit, whatever stands beside it"


@pytest.mark.parametrize("interval", CANDLE_INTERVALS)
def test_every_interval_can_be_made(make_candles: Callable[..., CandleSeries], interval: str) -> None:
    candles = make_candles(2 * 1440)
    step_ms = INTERVAL_MS[interval]
    result = resample(candles, step_ms)
    assert np.array_equal(result.timestamp, np.arange(candles.timestamp[0], candles.timestamp[-1] + 1, step_ms))
    assert result.volume.sum() == pytest.approx(candles.volume.sum())


def test_resample_refuses_parts_of_steps(make_candles: Callable[..., CandleSeries]) -> None:
    candles = make_candles(60)
    for part in (candles[:59], candles[1:16]):
        with pytest.raises(UserError, match="whole, aligned steps"):
            resample(part, 15 * MINUTE_MS)
    with pytest.raises(UserError, match="90000 ms"):
        resample(candles, 90_000)
