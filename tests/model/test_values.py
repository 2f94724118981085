"""Intervals, dates, candles and signals as values."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, strategies as st
from tests.values import IDENTITY, make_entry, make_position, make_trade

from backtest_kit.errors import UserError
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.model.event import (
    EntryCancelled,
    EntryScheduled,
    Lasting,
    PositionChanged,
    PositionClosed,
    PositionOpened,
)
from backtest_kit.model.inner import Inner
from backtest_kit.model.interval import DAY_MS, INTERVAL_MS, floor_ms, interval_ms, iso, to_datetime, to_ms
from backtest_kit.model.position import RestingEntry
from backtest_kit.model.signal import Signal
from backtest_kit.records.signals import StoredSignal
from backtest_kit.run.risk_request import ActivePosition

ROWS = [(60_000 * i, 1.0 + i, 2.0 + i, 0.5 + i, 1.5 + i, 10.0) for i in range(5)]


def test_every_interval_divides_a_day() -> None:
    assert all(DAY_MS % length == 0 for length in INTERVAL_MS.values())
    assert interval_ms("15m") == 900_000


def test_an_unknown_interval_names_the_field_and_the_choice() -> None:
    with pytest.raises(UserError, match=r"interval of frame 'x' is '7m': use one of 1m, 3m"):
        interval_ms("7m", what="interval of frame 'x'")


@pytest.mark.parametrize(
    "value",
    [
        "2022-01-31T10:00",
        "2022-01-31T10:00Z",
        "2022-01-31T12:00+02:00",
        datetime(2022, 1, 31, 10, tzinfo=UTC),
        datetime(2022, 1, 31, 12, tzinfo=timezone(timedelta(hours=2))),
        datetime(2022, 1, 31, 10),  # noqa: DTZ001  # a date without a zone is UTC
        1643623200000,
    ],
)
def test_dates_in_every_form(value: Any) -> None:
    assert to_ms(value) == 1643623200000


@pytest.mark.parametrize("value", ["yesterday", "", None, 1.5, True, []])
def test_what_is_no_date_is_named(value: Any) -> None:
    with pytest.raises(UserError, match="start_date of frame 'x' is "):
        to_ms(value, what="start_date of frame 'x'")


@given(st.integers(0, 4_102_444_800_000))
def test_times_survive_the_round_trip(when_ms: int) -> None:
    assert to_ms(to_datetime(when_ms)) == when_ms
    assert to_ms(iso(floor_ms(when_ms, 60_000))) == floor_ms(when_ms, 60_000)
    assert 0 <= when_ms - floor_ms(when_ms, 60_000) < 60_000


def test_columns_are_read_only_even_where_the_caller_writes() -> None:
    close = np.array([1.0, 2.0])
    series = CandleSeries([0, 60_000], close, close, close, close, close)
    with pytest.raises(ValueError, match="read-only"):
        series.close[0] = 5
    close[0] = 5  # the caller's own array stays his
    assert not series.close.flags.writeable


def test_a_series_is_cut_and_joined() -> None:
    series = CandleSeries.from_rows(ROWS)
    assert [len(series), len(series[1:3]), len(series.between(60_000, 180_000))] == [5, 2, 2]
    assert series.between(60_000, 180_000) == series[1:3]
    assert CandleSeries.concat([series[:2], series[2:]]) == series
    assert CandleSeries.concat([series]) is series
    assert CandleSeries.concat([]) == CandleSeries.empty() == CandleSeries.from_rows([])
    assert list(series.columns()) == list(COLUMNS)
    assert series.take(series.close > 3) == series[2:]
    assert (series != ROWS) is True
    assert repr(series) == "CandleSeries(5 candles, 0 .. 240000)"
    assert repr(CandleSeries.empty()) == "CandleSeries(empty)"
    with pytest.raises(TypeError, match="slice"):
        series[0]  # type: ignore[index]


def test_bad_columns_are_refused() -> None:
    with pytest.raises(UserError, match="'close' has 1 rows, 'timestamp' has 2"):
        CandleSeries([0, 1], [1, 1], [1, 1], [1, 1], [1], [1, 1])
    with pytest.raises(UserError, match="'open' is not numeric"):
        CandleSeries([0], ["x"], [1], [1], [1], [1])
    with pytest.raises(UserError, match="2 dimensions"):
        CandleSeries([0], [[1]], [1], [1], [1], [1])
    with pytest.raises(UserError, match="a candle row has 3 fields"):
        CandleSeries.from_rows([(1, 2, 3)])


@pytest.mark.parametrize(("position", "take", "stop"), [("long", 204, 198), ("short", 196, 202)])
def test_a_bracket_puts_both_levels_at_their_distance(position: Any, take: float, stop: float) -> None:
    signal = Signal.bracket(position, price=200, take_profit_pct=2, stop_loss_pct=1, minutes=60, note="n")
    assert [signal.price_take_profit, signal.price_stop_loss] == pytest.approx([take, stop])
    assert (signal.price_open, signal.minutes, signal.note) == (None, 60, "n")


def test_a_bracket_in_no_direction_is_refused() -> None:
    with pytest.raises(UserError, match="position is 'up': use 'long' or 'short'"):
        Signal.bracket("up", price=1, take_profit_pct=1, stop_loss_pct=1)  # type: ignore[arg-type]


def of_all_kinds() -> list[Any]:
    """One of each that reads values of its parts as its own."""
    position, trade = make_position(), make_trade()
    events: dict[str, Any] = {"identity": IDENTITY, "when_ms": 1, "price": 1.0}
    lasting: list[Lasting] = [
        EntryScheduled(**events, entry=position.entry),
        EntryCancelled(**events, entry=position.entry, reason="user"),
        PositionOpened(**events, position=position),
        PositionChanged(**events, position=position, change="reduced"),
        PositionClosed(**events, trade=trade),
    ]
    parts = [position.entry, position, trade, ActivePosition(entry=position.entry, cost=1.0, opened_at_ms=1)]
    return [*parts, *lasting, *map(StoredSignal, lasting)]


@pytest.mark.parametrize("whole", of_all_kinds(), ids=lambda whole: type(whole).__name__)
def test_what_is_read_of_a_part_is_there_and_of_the_type_that_is_declared(whole: Any) -> None:
    kinds = [kind for kind in type(whole).__mro__ if issubclass(kind, msgspec.Struct)]
    inner = {name: value for kind in kinds for name, value in vars(kind).items() if isinstance(value, Inner)}
    assert {"symbol", "strategy_name", "exchange_name", "frame_name"} <= set(inner)
    for name, declared in inner.items():
        (kind,) = get_args(vars(declared)["__orig_class__"])
        msgspec.convert(getattr(whole, name), kind)
        with pytest.raises(AttributeError):
            setattr(whole, name, None)


def test_the_signal_of_an_entry_leaves_nothing_open() -> None:
    for name in ("id", "price_open", "minutes", "cost"):
        signal = msgspec.structs.replace(make_entry().signal, **{name: None})
        with pytest.raises(ValueError, match=f"the signal of an entry has no {name}"):
            RestingEntry(identity=IDENTITY, signal=signal, scheduled_at_ms=0)
