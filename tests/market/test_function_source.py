from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from backtest_kit.errors import UserError
from backtest_kit.market import sources
from backtest_kit.model.candle import COLUMNS, NO_TIME, CandleSeries
from backtest_kit.model.interval import MINUTE_MS

START = 1_640_995_200_000
Make = Callable[..., CandleSeries]


def as_dicts(candles: CandleSeries) -> list[dict[str, float]]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in as_rows(candles)]


def as_rows(candles: CandleSeries) -> list[list[float]]:
    return [list(row) for row in zip(*(candles.columns()[name].tolist() for name in COLUMNS), strict=True)]


@pytest.mark.parametrize("shape", [lambda held: held, as_dicts, as_rows, lambda held: tuple(map(tuple, as_rows(held)))])
async def test_rows_of_every_shape_are_taken(make_candles: Make, shape: Callable[..., Any]) -> None:
    held = make_candles(20)
    asked: list[object] = []

    async def get_candles(*call: object) -> Any:
        asked.append(call)
        return shape(held)

    source = sources.function(get_candles)
    assert await source.fetch("BTCUSDT", "1m", START + 2 * MINUTE_MS, START + 9 * MINUTE_MS) == held
    assert asked == [("BTCUSDT", "1m", START + 2 * MINUTE_MS, 7)]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "returned NoneType: return a CandleSeries or a list of rows with timestamp, open"),
        ({"timestamp": 1}, "returned dict: return a CandleSeries"),
        ([5], "a row is 5: give a dict, or a sequence of timestamp"),
        ([[1, 2, 3]], "a row is [1, 2, 3]"),
        ([{"timestamp": 1, "open": 2}], "a row lacks high, low, close, volume; it has timestamp, open"),
    ],
)
async def test_another_answer_names_the_function(answer: Any, said: str) -> None:
    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> Any:
        return answer

    with pytest.raises(UserError) as caught:
        await sources.function(get_candles).fetch("BTCUSDT", "1m", START, START + MINUTE_MS)
    assert "get_candles() returned" in str(caught.value)
    assert said in str(caught.value)


async def test_cells_that_are_no_numbers_are_left_to_the_caller() -> None:
    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> Any:
        return [
            [START, "high", None, 1, "2.5", 10**400],
            [None, 1, 1, 1, 1, 1],
            [START + 0.5, 1, 1, 1, 1, 1],
            ["soon", 1, 1, 1, 1, 1],
            [1e300, 1, 1, 1, 1, 1],
        ]

    read = await sources.function(get_candles).fetch("BTCUSDT", "1m", START, START + 5 * MINUTE_MS)
    assert read.timestamp.tolist() == [START, NO_TIME, START + 1, NO_TIME, NO_TIME]
    assert [bool(np.isnan(getattr(read, name)[0])) for name in COLUMNS[1:]] == [True, True, False, False, True]
    assert read.close[0] == 2.5


async def test_it_must_be_an_async_function() -> None:
    def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> Any:
        return []

    with pytest.raises(UserError, match=r"get_candles\(\) returned list: write it as `async def`"):
        await sources.function(get_candles).fetch("BTCUSDT", "1m", START, START + MINUTE_MS)
    with pytest.raises(UserError, match="get_candles is 5: give an async function"):
        sources.function(5)  # type: ignore[arg-type]


async def test_its_own_errors_come_through() -> None:
    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await sources.function(get_candles).fetch("BTCUSDT", "1m", START, START + MINUTE_MS)
