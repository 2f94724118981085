"""What a result says of how it came about: what it was computed with, and why nothing was opened."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backtest_kit as bk

MakeKit = Callable[..., bk.Kit]
WHERE: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "demo", "frame_name": "day"}


def never(ctx: bk.Context) -> bk.Signal | None:
    return None


def long(ctx: bk.Context) -> bk.Signal:
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=1, stop_loss_pct=1, minutes=60)


def far(ctx: bk.Context) -> bk.Signal:
    price = ctx.price * 0.9
    return bk.Signal("long", price_open=price, price_take_profit=price * 1.01, price_stop_loss=price * 0.99)


def said(kit: bk.Kit) -> str:
    return bk.Results([kit.backtest.run_sync("BTCUSDT", **WHERE)]).remarks()[0]


def test_a_strategy_that_never_wants_anything(make_kit: MakeKit) -> None:
    assert said(make_kit(never)) == ("BTCUSDT has no trades: get_signal was called 96 times; it returned None 96 times")


def test_a_strategy_that_a_risk_profile_keeps_out(make_kit: MakeKit) -> None:
    kit = make_kit(long, interval="1h", risk_name="shy")
    kit.add_risk_schema("shy", validations=[lambda request: "not today"])
    assert said(kit) == "BTCUSDT has no trades: get_signal was called 24 times; risk profile 'shy' rejected 24 signals"


def test_a_strategy_whose_entries_are_never_reached(make_kit: MakeKit) -> None:
    remark = said(make_kit(far, interval="1h"))
    assert remark.startswith("BTCUSDT has no trades: get_signal was called ")
    assert "resting entries were cancelled (timeout)" in remark


def test_what_a_result_was_computed_with_is_saved(make_kit: MakeKit, tmp_path: Path) -> None:
    kit = make_kit(long)
    kit.set_config(CC_PERCENT_FEE=0.05, CC_POSITION_ENTRY_COST=250.0)
    result = kit.backtest.run_sync("BTCUSDT", **WHERE, fill="ohlc")
    setup = result.setup
    assert (setup.gaps, setup.dirty) == ("error", "refuse")
    assert (setup.fill, setup.fee_pct, setup.slippage_pct) == ("ohlc", 0.05, 0.1)
    assert setup.settings == {"CC_POSITION_ENTRY_COST": 250.0}
    assert setup.versions == {
        "backtest-kit": bk.__version__, "python": platform.python_version(), "numpy": np.__version__
    }  # fmt: skip
    (loaded,) = bk.Results.load(result.save(tmp_path / "result.json"))
    assert (loaded.setup, loaded.decisions) == (setup, result.decisions)
    assert bk.Results([loaded]).remarks()[-1] == (
        "Fee 0.05 % and slippage 0.1 % of each fill; fill model ohlc, CC_POSITION_ENTRY_COST=250"
    )


def test_digests_tell_strategies_and_candles_apart(make_kit: MakeKit) -> None:
    def setup(get_signal: object, **options: Any) -> bk.Setup:
        return make_kit(get_signal, **options).backtest.run_sync("BTCUSDT", **WHERE).setup

    first, again = setup(long), setup(long)
    assert (first.strategy_digest, first.candles_digest) == (again.strategy_digest, again.candles_digest)
    assert setup(never).strategy_digest != first.strategy_digest
    assert setup(long, manage=lambda ctx: None).strategy_digest != first.strategy_digest
    assert setup(long, seed=8).candles_digest != first.candles_digest
    assert setup(long, seed=8).strategy_digest == first.strategy_digest


def test_code_without_source_and_objects_that_are_called_have_a_digest(make_kit: MakeKit) -> None:
    class Strategy:
        def __call__(self, ctx: bk.Context) -> bk.Signal | None:
            return None

    made = [eval(text, {}) for text in ("lambda ctx: None", "lambda ctx: ctx and None")]  # noqa: S307
    digests = [
        make_kit(each).backtest.run_sync("BTCUSDT", **WHERE).setup.strategy_digest for each in (*made, Strategy())
    ]
    assert len(set(digests)) == 3
    assert all(len(each) == 16 for each in digests)


@pytest.mark.parametrize("symbols", [("BTCUSDT",), ("BTCUSDT", "ETHUSDT")])
def test_what_all_results_share_is_said_once(make_kit: MakeKit, symbols: tuple[str, ...]) -> None:
    results = bk.Results(make_kit(long).backtest.run_sync(symbol, **WHERE) for symbol in symbols)
    assert sum(remark.startswith("Fee 0.1 %") for remark in results.remarks()) == 1
