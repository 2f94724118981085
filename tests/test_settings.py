"""Settings: types, ranges, contradictions, and all errors together."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from backtest_kit.errors import UserError
from backtest_kit.settings import Settings, from_environment, with_settings


def test_the_environment_is_read_by_name_and_type() -> None:
    settings = from_environment(
        {
            "CC_PERCENT_FEE": "0.05",
            "CC_MAX_SIGNAL_LIFETIME_MINUTES": "inf",
            "CC_ENABLE_SHORT_SIGNAL": "no",
            "CC_MAX_CANDLES_PER_REQUEST": "500",
            "CC_MONGO_CONNECTION_STRING": "not ours",
            "PATH": "/bin",
        }
    )
    assert settings.CC_PERCENT_FEE == 0.05
    assert math.inf == settings.CC_MAX_SIGNAL_LIFETIME_MINUTES
    assert settings.CC_ENABLE_SHORT_SIGNAL is False
    assert settings.CC_MAX_CANDLES_PER_REQUEST == 500


def test_the_defaults_are_sound() -> None:
    assert with_settings(Settings(), {}) == Settings()


def test_all_errors_come_together_and_nothing_changes() -> None:
    with pytest.raises(UserError) as refused:
        with_settings(
            Settings(),
            {
                "CC_PERCENT_FEE": -1,
                "CC_GET_CANDLES_RETRY_COUNT": 0,
                "CC_NONSENSE": 1,
                "CC_PERCENT_SLIPPAGE": "much",
                "CC_ENABLE_LONG_SIGNAL": 3,
                "CC_POSITION_ENTRY_COST": 0,
            },
        )
    message = str(refused.value)
    assert message.count(";") >= 5
    for part in (
        "CC_PERCENT_FEE is -1: it must be at least 0",
        "CC_GET_CANDLES_RETRY_COUNT is 0: it must be at least 1",
        "CC_NONSENSE is not a setting",
        "CC_PERCENT_SLIPPAGE is 'much': give a number",
        "CC_ENABLE_LONG_SIGNAL is 3: give true or false",
        "CC_POSITION_ENTRY_COST is 0: it must be above 0",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("CC_MAX_SIGNAL_LIFETIME_MINUTES", 1.5, "whole minutes, or inf"),
        ("CC_MAX_CANDLES_PER_REQUEST", 10.5, "give a whole number"),
        ("CC_MAX_CANDLES_PER_REQUEST", math.inf, "give a whole number"),
        ("CC_PERCENT_FEE", math.nan, "give a number"),
        ("CC_PERCENT_FEE", math.inf, "must be finite"),
        ("CC_PERCENT_FEE", True, "give a number"),
        ("CC_PERCENT_FEE", None, "give a number"),
        ("CC_PERCENT_FEE", 5, "2 x (CC_PERCENT_SLIPPAGE + CC_PERCENT_FEE) = 10.2"),
        ("CC_MIN_TAKEPROFIT_DISTANCE_PERCENT", 0.3, "2 x (CC_PERCENT_SLIPPAGE + CC_PERCENT_FEE) = 0.4"),
        ("CC_MIN_STOPLOSS_DISTANCE_PERCENT", 20, "below CC_MAX_STOPLOSS_DISTANCE_PERCENT = 20"),
    ],
)
def test_values_out_of_range(name: str, value: Any, problem: str) -> None:
    with pytest.raises(UserError) as refused:
        with_settings(Settings(), {name: value})
    assert problem in str(refused.value)
    assert name in str(refused.value)


def test_a_rule_of_zero_is_off() -> None:
    off = {"CC_MIN_TAKEPROFIT_DISTANCE_PERCENT": 0, "CC_MAX_STOPLOSS_DISTANCE_PERCENT": 0}
    assert with_settings(Settings(), off).CC_MIN_TAKEPROFIT_DISTANCE_PERCENT == 0


def test_every_setting_is_documented_and_settable_from_text() -> None:
    for field in msgspec.structs.fields(Settings):
        text = str(field.default)
        assert getattr(from_environment({field.name: text}), field.name) == field.default
