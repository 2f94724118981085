"""Comparisons as a user makes them: ranking, failures, parameter sets, options, errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

import backtest_kit as bk
from backtest_kit.run.replay.walker import ParameterSet, Walker, WalkProgress
from backtest_kit.run.schema import GetSignal

MakeKit = Callable[..., bk.Kit]
WHERE: dict[str, Any] = {"exchange_name": "demo", "frame_name": "day"}


def make_bracket(side: Literal["long", "short"], width: float) -> GetSignal:
    async def get_signal(ctx: bk.Context) -> bk.Signal | None:
        return bk.Signal.bracket(
            side,
            price=ctx.price,
            take_profit_pct=width,
            stop_loss_pct=width,
            minutes=60,
        )

    return get_signal


def broken(ctx: bk.Context) -> None:
    raise KeyError(f"no {ctx.symbol}")


def idle(ctx: bk.Context) -> None:
    return None


@pytest.fixture
def kit(make_kit: MakeKit) -> bk.Kit:
    kit = make_kit(make_bracket("long", 1.0))
    kit.add_strategy_schema("short", interval="15m", get_signal=make_bracket("short", 1.0))
    kit.add_strategy_schema("broken", get_signal=broken)
    kit.add_strategy_schema("idle", get_signal=idle)
    return kit


@pytest.fixture
def walker(kit: bk.Kit) -> Walker:
    return Walker(kit.backtest, lambda: kit.dump / "walker")


def test_each_strategy_is_what_its_own_backtests_are(kit: bk.Kit, walker: Walker) -> None:
    comparison = walker.run_sync(["A", "B"], strategies=["trend", "short"], metric="total_pnl", **WHERE)
    assert {each.strategy_name for each in comparison} == {"trend", "short"}
    for each in comparison:
        alone = [kit.backtest.run_sync(symbol, strategy_name=each.strategy_name, **WHERE) for symbol in ("A", "B")]
        assert [result.symbol for result in each.results] == ["A", "B"]
        assert each.results.trades == bk.Results(alone).trades
        assert each.value == bk.Results(alone).stats.total_pnl
    values = [each.value for each in comparison]
    assert values == sorted(values, key=lambda value: -(value or 0))
    assert comparison.best is comparison[0]


def test_failed_and_idle_strategies_come_last_and_stop_nobody(walker: Walker) -> None:
    comparison = walker.run_sync("A", strategies=["broken", "idle", "trend", "short"], metric="loss_count", **WHERE)
    assert [each.strategy_name for each in comparison][2:] == ["idle", "broken"]
    assert [each.value is None for each in comparison] == [False, False, True, True]
    failure = comparison[3].failure
    assert failure is not None
    assert (failure.symbol, str(failure.error)) == ("A", "'no A'")
    assert any(frame.name == "broken" for frame in _frames(failure.error))
    assert "broken failed on A: KeyError: 'no A'" in str(comparison)


async def test_a_disk_that_fails_is_no_fault_of_a_strategy(kit: bk.Kit, walker: Walker) -> None:
    def unlucky(ctx: bk.Context) -> None:
        raise bk.RetryLater("the store does not answer")

    kit.add_strategy_schema("unlucky", get_signal=unlucky)
    with pytest.raises(bk.RetryLater, match="does not answer"):
        await walker.run(["A", "B"], strategies=["unlucky", "trend"], **WHERE)
    assert len(asyncio.all_tasks()) == 1


def _frames(error: Exception) -> list[Any]:
    import traceback

    return list(traceback.extract_tb(error.__traceback__))


async def test_one_failing_symbol_ends_those_after_it(kit: bk.Kit, walker: Walker) -> None:
    async def fails_on_b(ctx: bk.Context) -> None:
        if ctx.symbol == "B":
            raise ValueError("B is out")
        if ctx.symbol == "C":
            await asyncio.sleep(60)

    kit.add_strategy_schema("partly", get_signal=fails_on_b)
    async with asyncio.timeout(20):
        comparison = await walker.run(["A", "B", "C"], strategies=["partly"], **WHERE)
    assert str(comparison[0].failure) == "B: ValueError: B is out"
    assert comparison.best is None


@pytest.mark.parametrize("late", ["A", "B", "C"])
async def test_of_several_failures_the_first_named_symbol_is_told(kit: bk.Kit, walker: Walker, late: str) -> None:
    async def fails(ctx: bk.Context) -> None:
        if ctx.symbol == late:
            await asyncio.sleep(0.3)
        raise ValueError(f"{ctx.symbol} is out")

    kit.add_strategy_schema("partly", get_signal=fails)
    comparison = await walker.run(["A", "B", "C"], strategies=["partly"], **WHERE)
    assert str(comparison[0].failure) == "A: ValueError: A is out"
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("backtest")]


def test_a_signal_against_the_rules_fails_its_strategy_alone(kit: bk.Kit, walker: Walker) -> None:
    kit.add_strategy_schema("absurd", get_signal=lambda ctx: bk.Signal("long", ctx.price * 0.5, ctx.price * 2))
    comparison = walker.run_sync("A", strategies=["absurd", "trend"], metric="win_rate", **WHERE)
    assert comparison[0].strategy_name == "trend"
    assert comparison[1].failure is not None
    assert isinstance(comparison[1].failure.error, bk.UserError)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric": "profit"}, "metric is 'profit': use one of total_count, .*sharpe_ratio"),
        ({"metric": "trend"}, "metric is 'trend'"),
        ({"strategies": ["trend", "nobody"]}, "strategy 'nobody' is not registered"),
        ({"strategies": []}, "strategies is"),
        ({"strategies": "trend"}, "strategies is 'trend': give a list"),
        ({"strategies": ["trend", "trend"]}, "'trend' is named twice"),
        ({"symbols": []}, "symbols is empty"),
        ({"symbols": ["A", ""]}, "symbol is ''"),
        ({"frame_name": "never"}, "frame 'never' is not registered"),
        ({"exchange_name": "nowhere"}, "exchange 'nowhere' is not registered"),
        ({"fill": "best"}, "fill is 'best'"),
        ({"gaps": "ignore"}, "gaps is 'ignore'"),
        ({"dirty": "ignore"}, "dirty is 'ignore'"),
    ],
)
def test_a_bad_argument_is_named_before_anything_runs(
    kit: bk.Kit, walker: Walker, changes: dict[str, Any], words: str
) -> None:
    asked: list[str] = []
    kit.add_strategy_schema("first", get_signal=lambda ctx: asked.append(ctx.symbol))
    arguments: dict[str, Any] = {"symbols": ["A"], "strategies": ["first", "trend"], **WHERE}
    with pytest.raises(bk.UserError, match=words):
        walker.run_sync(**arguments | changes)
    assert not asked


def test_candles_that_are_missing_are_no_strategy_s_fault(kit: bk.Kit, walker: Walker, tmp_path: Path) -> None:
    path = tmp_path / "short.csv"
    rows = [f"{1_717_200_000_000 + minute * 60_000},1,1,1,1,1" for minute in range(600)]
    path.write_text("\n".join(["timestamp,open,high,low,close,volume", *rows]))
    kit.add_exchange_schema("file", source=bk.sources.csv(path))
    with pytest.raises(bk.UserError, match="frame outside the data"):
        walker.run_sync("A", strategies=["trend", "short"], exchange_name="file", frame_name="day")


async def test_progress_tells_every_start_and_end(walker: Walker) -> None:
    seen: list[WalkProgress] = []
    await walker.run("A", strategies=["trend", "broken"], on_progress=seen.append, **WHERE)
    ends = [each for each in seen if each.finished is not None]
    assert [(each.strategy_name, each.number, each.count, each.fraction) for each in ends] == [
        ("trend", 1, 2, 1.0),
        ("broken", 2, 2, 1.0),
    ]
    assert [each.finished is not None and each.finished.failure is not None for each in ends] == [False, True]
    assert seen[0].finished is None
    assert all(0 <= each.fraction <= 1 for each in seen)
    places = [each.number + each.fraction for each in seen]
    assert places == sorted(places)


async def test_what_progress_raises_ends_the_walk(walker: Walker) -> None:
    def stop(progress: WalkProgress) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        await walker.run("A", strategies=["trend"], on_progress=stop, **WHERE)
    assert len(asyncio.all_tasks()) == 1


async def test_a_cancelled_walk_leaves_nothing_running(kit: bk.Kit, walker: Walker) -> None:
    started = asyncio.Event()

    async def waits(ctx: bk.Context) -> None:
        started.set()
        await asyncio.sleep(60)

    kit.add_strategy_schema("waits", get_signal=waits)
    walk = asyncio.create_task(walker.run(["A", "B"], strategies=["waits"], **WHERE))
    await started.wait()
    walk.cancel()
    with pytest.raises(asyncio.CancelledError):
        await walk
    assert len(asyncio.all_tasks()) == 1
    assert kit.backtest.run_sync("A", strategy_name="trend", **WHERE).trades


def test_a_grid_is_every_combination_that_makes_sense(kit: bk.Kit, walker: Walker) -> None:
    def make(side: Literal["long", "short"], width: float) -> GetSignal | None:
        return None if (side, width) == ("short", 2) else make_bracket(side, width)

    sets = Walker.grid("box", make, interval="15m", parameters={"side": ["long", "short"], "width": [1, 2]})
    assert [each.name for each in sets] == [
        "box(side=long, width=1)",
        "box(side=long, width=2)",
        "box(side=short, width=1)",
    ]
    comparison = walker.run_sync("A", strategies=["trend", *sets], metric="total_pnl", **WHERE)
    by_name = {each.strategy_name: each for each in comparison}
    assert by_name["box(side=short, width=1)"].parameters == {"side": "short", "width": 1}
    assert by_name["trend"].parameters == {}
    # The same rule under two names earned the same, and the registry of the kit has only its own.
    assert by_name["box(side=long, width=1)"].value == by_name["trend"].value
    assert [each.name for each in kit.list_strategy_schemas()] == ["trend", "short", "broken", "idle"]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"width": []}, r"parameter 'width' of 'box' is \[\]: give a list"),
        ({"width": "12"}, "parameter 'width' of 'box' is '12'"),
        ({"width": 5}, "parameter 'width' of 'box' is 5"),
        ({"width": [1, 1]}, r"two combinations of the grid have the name 'box\(width=1\)'"),
        ({"width": [0]}, "the grid of 'box' is empty"),
    ],
)
def test_a_bad_grid_is_refused(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(bk.UserError, match=words):
        Walker.grid("box", lambda width: make_bracket("long", width) if width else None, parameters=parameters)


def test_a_parameter_set_keeps_the_options_of_a_strategy(kit: bk.Kit, walker: Walker) -> None:
    kit.add_risk_schema("never", validations=[lambda request: "no"])
    sets = Walker.grid("box", make_bracket, parameters={"side": ["long"], "width": [1]}, risk_name="never")
    assert isinstance(sets[0], ParameterSet)
    assert walker.run_sync("A", strategies=sets, **WHERE)[0].results.trades == ()


def test_reports_go_beside_those_of_backtests(kit: bk.Kit, walker: Walker) -> None:
    comparison = walker.run_sync("A", strategies=["trend"], **WHERE)
    assert comparison.save_markdown() == kit.dump / "walker" / "day sharpe_ratio.md"
