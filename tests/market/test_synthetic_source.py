from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from backtest_kit.errors import UserError
from backtest_kit.market.integrity import check_candles, find_gaps
from backtest_kit.market.sources.synthetic import SyntheticSource, synthetic
from backtest_kit.model.candle import CandleSeries, FloatColumn
from backtest_kit.model.interval import DAY_MS, MINUTE_MS, to_ms
from backtest_kit.settings import Settings

START = 1_640_995_200_000


def candles(source: SyntheticSource, start_ms: int, stop_ms: int, symbol: str = "BTCUSDT") -> CandleSeries:
    return source._candles(symbol, start_ms, stop_ms)


def market(seed: int = 7, sigma: float = 0.0008) -> SyntheticSource:
    return SyntheticSource(seed, 50_000.0, sigma)


@settings(max_examples=40)
@given(
    start=st.integers(0, 3000),
    cuts=st.lists(st.integers(0, 4000), min_size=2, max_size=6).map(sorted),
    seed=st.integers(0, 2**40),
    symbol=st.text(max_size=8),
)
def test_a_candle_is_the_same_whatever_range_it_is_asked_in(
    start: int, cuts: list[int], seed: int, symbol: str
) -> None:
    at = [START + (start + cut) * MINUTE_MS for cut in cuts]
    whole = candles(market(seed), at[0], at[-1], symbol)
    assert len(whole) == cuts[-1] - cuts[0]
    parts = [candles(market(seed), low, high, symbol) for low, high in pairwise(at)]
    assert CandleSeries.concat(parts) == whole


async def test_it_is_a_believable_market() -> None:
    start, stop = to_ms("2021-12-20"), to_ms("2022-02-20")
    held = await synthetic().fetch("BTCUSDT", "1m", start, stop)
    check_candles(held, symbol="BTCUSDT", settings=Settings())
    assert not find_gaps(held, start, stop)
    assert np.array_equal(held.open[1:], held.close[:-1]), "over midnight too"
    assert (held.high >= np.maximum(held.open, held.close)).all()
    assert (held.low <= np.minimum(held.open, held.close)).all()
    assert (held.high > held.low).all()
    assert (held.volume > 0).all()
    assert np.diff(np.log(held.close)).std() == pytest.approx(0.0008, rel=0.02)
    assert [float(f"{price:.8g}") for price in held.close[:500]] == held.close[:500].tolist()


async def test_prices_stay_sane_for_decades() -> None:
    source = synthetic(start_price=50_000)
    for symbol in ("BTCUSDT", "BTC/USDT"):
        for year in range(2015, 2100, 3):
            midnight = to_ms(f"{year}-06-01")
            (price,) = (await source.fetch(symbol, "1m", midnight, midnight + MINUTE_MS)).close
            assert 50_000 / 8 < price < 50_000 * 8


async def test_symbols_and_seeds_have_markets_of_their_own() -> None:
    seen: list[FloatColumn] = []
    for seed, symbol in ((7, "BTCUSDT"), (8, "BTCUSDT"), (7, "BTCEUR"), (7, "ETHUSDT"), (7, "DOGEUSDT")):
        held = await synthetic(seed).fetch(symbol, "1m", START, START + DAY_MS)
        returns = np.diff(np.log(held.close))
        assert all(abs(float(np.corrcoef(returns, other)[0, 1])) < 0.15 for other in seen)
        seen.append(returns)


async def test_a_quiet_market_does_not_move() -> None:
    held = await synthetic(sigma=0).fetch("BTCUSDT", "1m", START, START + DAY_MS)
    assert set(held.close) == set(held.high) == set(held.low) == {50_000.0}


async def test_it_begins_and_ends() -> None:
    source = synthetic()
    assert await source.range("BTCUSDT") == (to_ms("2015-01-01"), to_ms("2100-01-01"))
    held = await source.fetch("BTCUSDT", "1m", to_ms("2014-12-31"), to_ms("2015-01-01T00:03"))
    assert held.timestamp[0] == to_ms("2015-01-01")
    assert len(held) == 3
    assert len(await source.fetch("BTCUSDT", "1m", 0, DAY_MS)) == 0


def test_its_name_tells_its_parameters() -> None:
    assert synthetic().series_name == "synthetic-7"
    assert synthetic(3).series_name == "synthetic-3"
    names = {synthetic().series_name, synthetic(start_price=1).series_name, synthetic(sigma=0.001).series_name}
    assert len(names) == 3


def test_senseless_parameters_are_refused() -> None:
    with pytest.raises(UserError, match="seed is -1"):
        synthetic(-1)
    for price in (0.0, -5.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="start_price is"):
            synthetic(start_price=price)
    for sigma in (-0.1, 0.5, float("nan")):
        with pytest.raises(UserError, match="sigma is"):
            synthetic(sigma=sigma)
