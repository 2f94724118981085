"""Kits: registration, its checks, and two programs in one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.samples import sample

import backtest_kit as bk


@pytest.fixture
def kit(tmp_path: Path) -> bk.Kit:
    return bk.Kit(tmp_path)


def test_two_kits_never_see_each_other(tmp_path: Path) -> None:
    one, two = bk.Kit(tmp_path), bk.Kit(tmp_path)
    one.add_frame_schema("jan", start_date="2022-01-01", end_date="2022-02-01")
    one.set_config(CC_PERCENT_FEE=0.01)
    assert [frame.name for frame in one.list_frame_schemas()] == ["jan"]
    assert two.list_frame_schemas() == []
    assert two.get_config().CC_PERCENT_FEE == 0.1


def test_the_package_s_functions_act_on_the_default_kit() -> None:
    assert bk.Backtest is bk.default_kit.backtest
    assert bk.add_strategy_schema == bk.default_kit.add_strategy_schema
    assert set(bk.__all__) <= set(dir(bk))


def test_a_taken_name_is_refused_unless_replaced(kit: bk.Kit) -> None:
    kit.add_exchange_schema("demo", source=bk.sources.synthetic())
    with pytest.raises(
        bk.UserError, match="exchange 'demo' is already registered: choose another name, or pass replace"
    ):
        kit.add_exchange_schema("demo", source=bk.sources.synthetic())
    kit.add_exchange_schema("demo", source=bk.sources.synthetic(seed=9), replace=True)
    assert len(kit.list_exchange_schemas()) == 1


@pytest.mark.parametrize("name", ["", "  ", None, 5])
def test_names_are_texts(kit: bk.Kit, name: Any) -> None:
    with pytest.raises(bk.UserError, match="strategy_name is"):
        kit.add_strategy_schema(name, get_signal=lambda ctx: None)
    with pytest.raises(bk.UserError, match="exchange_name is"):
        kit.add_exchange_schema(name, source=bk.sources.synthetic())
    with pytest.raises(bk.UserError, match="frame_name is"):
        kit.add_frame_schema(name, start_date="2022-01-01", end_date="2022-02-01")
    with pytest.raises(bk.UserError, match="risk_name is"):
        kit.add_risk_schema(name, validations=[])


def test_a_source_is_one_of_ours(kit: bk.Kit) -> None:
    with pytest.raises(
        bk.UserError, match=r"source of exchange 'demo' is 'binance': give one of backtest_kit\.sources"
    ):
        kit.add_exchange_schema("demo", source="binance")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interval": "7m"}, "interval of frame 'x' is '7m'"),
        ({"start_date": "soon"}, "start_date of frame 'x' is 'soon'"),
        ({"end_date": None}, "end_date of frame 'x' is None"),
        ({"start_date": 2022}, "start_date of frame 'x' is 2022: a number is taken as epoch milliseconds"),
        ({"start_date": -(10**17)}, "start_date of frame 'x' is -1"),
        ({"end_date": "2021-12-31"}, "end_date must be later"),
        ({"end_date": "2022-01-01T00:00:59"}, "end_date must be later"),
    ],
)
def test_frames_are_checked(kit: bk.Kit, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(bk.UserError, match=message):
        kit.add_frame_schema("x", **{"start_date": "2022-01-01", "end_date": "2022-02-01", **fields})


def test_strategies_are_checked(kit: bk.Kit) -> None:
    with pytest.raises(bk.UserError, match="interval of strategy 'x' is '4h': use one of 1m, 3m, 5m, 15m, 30m, 1h"):
        kit.add_strategy_schema("x", interval="4h", get_signal=lambda ctx: None)
    with pytest.raises(bk.UserError, match="get_signal of strategy 'x' is 3"):
        kit.add_strategy_schema("x", get_signal=3)  # type: ignore[arg-type]
    with pytest.raises(bk.UserError, match="risk_names of strategy 'x' is the text 'a'"):
        kit.add_strategy_schema("x", get_signal=lambda ctx: None, risk_names="a")


def test_risks_are_checked(kit: bk.Kit) -> None:
    with pytest.raises(bk.UserError, match="validations of risk 'x' is"):
        kit.add_risk_schema("x", validations=[3])  # type: ignore[list-item]
    kit.add_risk_schema("x", validations=[lambda request: None])
    assert [risk.name for risk in kit.list_risk_schemas()] == ["x"]


def test_settings_come_from_the_environment_and_from_calls(kit: bk.Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC_PERCENT_FEE", "0.07")
    assert kit.get_config().CC_PERCENT_FEE == 0.07
    kit.set_config(CC_PERCENT_FEE=0.02)
    assert kit.get_config().CC_PERCENT_FEE == 0.02
    with pytest.raises(bk.UserError, match="CC_PERCENT_FEE is -1"):
        kit.set_config(CC_PERCENT_FEE=-1)
    assert kit.get_config().CC_PERCENT_FEE == 0.02


def test_a_bad_environment_is_reported_when_it_is_needed(kit: bk.Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC_PERCENT_FEE", "free")
    with pytest.raises(bk.UserError, match="CC_PERCENT_FEE is 'free': give a number"):
        kit.get_config()


def test_the_dump_can_be_moved(tmp_path: Path) -> None:
    kit = bk.Kit(tmp_path / "a")
    kit.dump = tmp_path / "b"
    assert kit.dump == tmp_path / "b"


FIRST_OF_ALL = """
import os, sys
import msgspec, numpy  # of others, which every name would import again

for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        import backtest_kit
        getattr(backtest_kit, name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name)
"""


@pytest.mark.sampled
def test_every_public_name_can_be_the_first_one_used() -> None:
    names = sample(bk.__all__, 40, "public names")
    done = subprocess.run(
        [sys.executable, "-c", FIRST_OF_ALL, *names, "__version__"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_the_engine_loads_nothing_that_it_does_not_need() -> None:
    optional = ("pyarrow", "pandas", "polars", "ccxt", "rich", "typer", "aiosqlite", "sqlite3")
    code = f"import sys, backtest_kit as bk; bk.Backtest; print([name for name in {optional} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_strategy_takes_the_context(kit: bk.Kit) -> None:
    with pytest.raises(bk.UserError, match="get_signal of strategy 'x' cannot be called with one argument"):
        kit.add_strategy_schema("x", get_signal=lambda: None)  # type: ignore[arg-type,misc]
    with pytest.raises(bk.UserError, match="manage of strategy 'x' cannot be called with one argument"):
        kit.add_strategy_schema("x", get_signal=lambda ctx: None, manage=lambda a, b: None)  # type: ignore[arg-type,misc]
    with pytest.raises(bk.UserError, match="manage of strategy 'x' is 3"):
        kit.add_strategy_schema("x", get_signal=lambda ctx: None, manage=3)  # type: ignore[arg-type]
