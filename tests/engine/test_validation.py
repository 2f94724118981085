"""Every rule of a signal, its edge on both sides, and all failures in one error."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from backtest_kit.engine.validation import check_signal, enters_now
from backtest_kit.errors import UserError
from backtest_kit.model.identity import Identity
from backtest_kit.model.signal import Signal
from backtest_kit.settings import Settings, with_settings

IDENTITY = Identity("BTCUSDT", "trend", "binance", "jan", "backtest")
LONG = Signal("long", 102, 99)
SHORT = Signal("short", 98, 101)
WHEN = 1_700_000_000_000


def refusal(
    signal: Signal, *, price: Any = 100.0, identity: Identity = IDENTITY, when: int = WHEN, **config: object
) -> str:
    with pytest.raises(UserError) as refused:
        check_signal(signal, identity, price, when, with_settings(Settings(), config))
    return str(refused.value)


def change(signal: Signal, **fields: Any) -> Signal:
    return msgspec.structs.replace(signal, **fields)


def accept(signal: Signal, *, price: float = 100.0, **config: object) -> None:
    check_signal(signal, IDENTITY, price, WHEN, with_settings(Settings(), config))


@pytest.mark.parametrize("signal", [LONG, SHORT])
def test_a_sound_signal_passes(signal: Signal) -> None:
    accept(signal)
    accept(change(signal, minutes=1440, cost=1e-6, note="why", id="mine"))
    accept(change(signal, minutes=np.float64(60), cost=np.int64(5)))


def test_the_refusal_names_strategy_symbol_and_time() -> None:
    assert "signal of strategy 'trend' for BTCUSDT at 2023-11-14T22:13:20Z is refused" in refusal(change(LONG, cost=-1))


@pytest.mark.parametrize("position", ["LONG", "buy", "", None, 1])
def test_the_position_is_long_or_short(position: Any) -> None:
    assert f"position is {position!r}: use 'long' or 'short'" in refusal(change(LONG, position=position))


def test_long_and_short_can_be_switched_off() -> None:
    assert "CC_ENABLE_LONG_SIGNAL" in refusal(LONG, CC_ENABLE_LONG_SIGNAL=False)
    assert "CC_ENABLE_SHORT_SIGNAL" in refusal(SHORT, CC_ENABLE_SHORT_SIGNAL=False)
    accept(SHORT, CC_ENABLE_LONG_SIGNAL=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0, -1, "100", None, True, [1]])
@pytest.mark.parametrize("field", ["price_take_profit", "price_stop_loss", "price_open"])
def test_prices_are_finite_numbers_above_zero(field: str, value: Any) -> None:
    if field == "price_open" and value is None:
        accept(LONG)
        return
    assert f"{field} is {value!r}: give a finite number above 0" in refusal(change(LONG, **{field: value}))


@pytest.mark.parametrize("price", [math.nan, math.inf, 0.0, -3.0])
def test_the_current_price_is_a_finite_number_above_zero(price: float) -> None:
    assert f"current price is {price!r}" in refusal(LONG, price=price)


def test_levels_lie_on_their_side_of_the_entry() -> None:
    assert "a long takes profit above its entry price 100" in refusal(change(LONG, price_take_profit=99.5))
    assert "a long stops below its entry price 100" in refusal(change(LONG, price_stop_loss=100))
    assert "a short takes profit below its entry price 100" in refusal(change(SHORT, price_take_profit=101))
    assert "a short stops above its entry price 100" in refusal(change(SHORT, price_stop_loss=99))


@pytest.mark.parametrize(
    ("signal", "setting", "edge", "beyond"),
    [
        (LONG, "CC_MIN_TAKEPROFIT_DISTANCE_PERCENT", {"price_take_profit": 100.5}, {"price_take_profit": 100.4999}),
        (SHORT, "CC_MIN_TAKEPROFIT_DISTANCE_PERCENT", {"price_take_profit": 99.5}, {"price_take_profit": 99.5001}),
        (LONG, "CC_MIN_STOPLOSS_DISTANCE_PERCENT", {"price_stop_loss": 99.5}, {"price_stop_loss": 99.5001}),
        (SHORT, "CC_MIN_STOPLOSS_DISTANCE_PERCENT", {"price_stop_loss": 100.5}, {"price_stop_loss": 100.4999}),
        (LONG, "CC_MAX_STOPLOSS_DISTANCE_PERCENT", {"price_stop_loss": 80}, {"price_stop_loss": 79.999}),
        (SHORT, "CC_MAX_STOPLOSS_DISTANCE_PERCENT", {"price_stop_loss": 120}, {"price_stop_loss": 120.001}),
    ],
)
def test_distances_keep_their_limits(
    signal: Signal, setting: str, edge: dict[str, float], beyond: dict[str, float]
) -> None:
    accept(change(signal, **edge))
    assert setting in refusal(change(signal, **beyond))
    accept(change(signal, **beyond), **{setting: 0})


@pytest.mark.parametrize("pct", [0.5, 0.7, 1.1, 19.9, 20])
def test_a_bracket_at_a_limit_passes_whatever_the_last_digit(pct: float) -> None:
    for price in (0.00012345, 1 / 3, 100.1, 43_210.987):
        accept(Signal.bracket("long", price=price, take_profit_pct=0.5, stop_loss_pct=pct), price=price)
        accept(Signal.bracket("short", price=price, take_profit_pct=0.5, stop_loss_pct=pct), price=price)


@pytest.mark.parametrize("minutes", [0, -5, 1.5, math.nan, "60", True])
def test_the_lifetime_is_whole_minutes(minutes: Any) -> None:
    assert "give a whole number of minutes above 0" in refusal(change(LONG, minutes=minutes))


def test_the_lifetime_has_a_limit() -> None:
    accept(change(LONG, minutes=1440))
    assert "the longest life is 1440" in refusal(change(LONG, minutes=1441))
    assert "the longest life is 1440" in refusal(change(LONG, minutes=math.inf))
    accept(change(LONG, minutes=math.inf), CC_MAX_SIGNAL_LIFETIME_MINUTES=math.inf)


@pytest.mark.parametrize("field", ["symbol", "strategy_name", "exchange_name"])
def test_names_are_not_empty(field: str) -> None:
    assert f"{field} is empty" in refusal(LONG, identity=msgspec.structs.replace(IDENTITY, **{field: ""}))


def test_id_note_cost_and_time_are_checked() -> None:
    assert "id is ''" in refusal(change(LONG, id=""))
    assert "id is 7" in refusal(change(LONG, id=7))
    assert "note is 7" in refusal(change(LONG, note=7))
    assert "cost is 0" in refusal(change(LONG, cost=0))
    assert "cost is inf" in refusal(change(LONG, cost=math.inf))
    assert "after 1970" in refusal(LONG, when=0)


def test_an_immediate_entry_must_not_close_at_once() -> None:
    # The market is at or below the wanted entry, so it is taken now, but it is already past the stop.
    signal = change(LONG, price_open=100.0)
    accept(signal, price=99.5)
    assert "would close immediately" in refusal(signal, price=99.0)
    assert "would close immediately" in refusal(change(SHORT, price_open=100.0), price=101.0)


def test_a_resting_entry_needs_its_levels_around_it_only() -> None:
    # The market has not come down to 100 yet; it may be beyond the take profit meanwhile.
    accept(change(LONG, price_open=100.0), price=103.0)
    assert "takes profit above its entry price 103" in refusal(change(LONG, price_open=103.0), price=104.0)


def test_all_failures_come_in_one_error() -> None:
    message = refusal(
        change(LONG, position="up", cost=-1, minutes=0, price_stop_loss=-5, note=3, id=""), price=math.nan
    )
    for part in (
        "position is 'up'",
        "cost is -1",
        "minutes is 0",
        "price_stop_loss is -5",
        "note is 3",
        "id is ''",
        "current price is nan",
    ):
        assert part in message


def test_enters_now() -> None:
    assert enters_now(LONG, 100)
    assert enters_now(change(LONG, price_open=100.0), 100)
    assert enters_now(change(LONG, price_open=100.0), 99)
    assert not enters_now(change(LONG, price_open=100.0), 100.01)
    assert enters_now(change(SHORT, price_open=100.0), 100)
    assert not enters_now(change(SHORT, price_open=100.0), 99.99)
