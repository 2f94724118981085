"""Runs and their records: a backtest begins without any, goes on with those of a run that is named, costs none."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.records.stores import STORES

import backtest_kit as bk

Backtest = Callable[..., Any]

without_server = pytest.mark.parametrize("address", STORES, indirect=True)
"""What is decided above the stores, and makes thousands of writes that a test server would take half a minute for."""


async def count(ctx: bk.Context) -> None:
    await ctx.state("asked").update(lambda count: count + 1, 0)
    await ctx.session.update(lambda minutes: [*minutes, ctx.when_ms], [])
    await ctx.memory("log").write(ctx.when.isoformat(), "asked")


def asked(kit: bk.Kit, run_id: str, symbol: str = "BTCUSDT") -> Any:
    owner = {"strategy_name": "trend", "exchange_name": "demo", "symbol": symbol}
    return kit.records.state("asked", **owner, mode="backtest", run_id=run_id)


async def test_a_run_begins_without_records(kit: bk.Kit, backtest: Backtest) -> None:
    first, second = await backtest(count, interval="1h"), await backtest(count, interval="1h")
    assert first.run_id != second.run_id
    assert [await asked(kit, each.run_id).get() for each in (first, second)] == [24, 24]
    assert await asked(kit, "another").get() is None


@without_server
async def test_the_runs_that_have_kept_something_are_known(kit: bk.Kit, backtest: Backtest) -> None:
    assert await kit.records.runs() == []
    await backtest(lambda ctx: None, run_id="idle")
    first = await backtest(count)
    await backtest(count, run_id="My run / 2")
    assert await kit.records.runs() == sorted([first.run_id, "My run / 2"])


@without_server
async def test_a_named_run_goes_on_with_its_records(kit: bk.Kit, backtest: Backtest) -> None:
    kit.add_frame_schema("next", start_date="2024-06-02", end_date="2024-06-03")
    first = await backtest(count, run_id="mine")
    assert first.run_id == "mine"
    await backtest(count, run_id="mine", frame="next")
    assert await asked(kit, "mine").get() == 192
    where: Any = {"strategy_name": "trend", "exchange_name": "demo", "symbol": "BTCUSDT"}
    sessions = [
        await kit.records.session(**where, frame_name=frame, mode="backtest", run_id="mine").get()
        for frame in ("day", "next")
    ]
    assert [len(each) for each in sessions] == [96, 96], "a session is of one frame"
    notes = await kit.records.memory("log", **where, mode="backtest", run_id="mine").list()
    assert len(notes) == 192


@without_server
async def test_a_run_over_the_same_days_again_does_not_see_its_own_future(kit: bk.Kit, backtest: Backtest) -> None:
    await backtest(count, run_id="mine")
    seen: list[object] = []

    async def look(ctx: bk.Context) -> None:
        seen.append((await ctx.state("asked").get(), await ctx.session.get(), len(await ctx.memory("log").list())))

    await backtest(look, run_id="mine")
    assert seen[:-1] == [(None, None, number) for number in range(1, 96)]
    assert seen[-1] == (96, await kit.records.session(
        strategy_name="trend", exchange_name="demo", symbol="BTCUSDT", frame_name="day", mode="backtest", run_id="mine"
    ).get(), 96)  # fmt: skip


@without_server
async def test_a_context_that_was_kept_takes_no_minute_back(kit: bk.Kit, backtest: Backtest) -> None:
    kept: list[bk.Context] = []
    reported: list[str] = []

    @kit.records.interval.once("1h", name="hourly")
    async def hourly(ctx: bk.Context) -> None:
        reported.append(ctx.when.isoformat())

    async def get_signal(ctx: bk.Context) -> None:
        kept.append(ctx)
        await count(ctx)
        await hourly(ctx)
        await hourly(kept[0])
        if ctx is not kept[0]:
            with pytest.raises(bk.LookAhead, match=f"later than {kept[0].when:%Y-%m-%dT%H:%MZ}"):
                await kept[0].state("asked").update(lambda asked: asked + 1, 0)

    for _ in range(2):
        kept.clear()
        reported.clear()
        await backtest(get_signal, run_id="mine")
        assert await asked(kit, "mine").get() == 96
        assert len(reported) == 24


async def test_runs_at_the_same_time_see_nothing_of_each_other(kit: bk.Kit, backtest: Backtest) -> None:
    hourly = functools.partial(backtest, count, interval="1h")
    results = await asyncio.gather(*(hourly(symbol=f"S{n}USDT") for n in range(3)), hourly())
    found = [await asked(kit, each.run_id, each.symbol).get() for each in results]
    assert found == [24] * 4
    together = await asyncio.gather(*(hourly(symbol=f"S{n}USDT", run_id="mine") for n in range(3)))
    assert [await asked(kit, "mine", each.symbol).get() for each in together] == [24] * 3


async def test_a_handle_and_a_context_name_their_run(kit: bk.Kit, backtest: Backtest) -> None:
    told: list[str | None] = []
    kit.add_strategy_schema("trend", interval="1h", get_signal=lambda ctx: told.append(ctx.run_id))
    where: Any = {"strategy_name": "trend", "exchange_name": "demo", "frame_name": "day"}
    handle = kit.backtest.background("BTCUSDT", **where)
    assert {(await handle).run_id, handle.run_id} == set(told)
    events = [event async for event in kit.backtest.run("BTCUSDT", **where, run_id="looped")]
    assert events == []
    assert told[-1] == "looped"
    with pytest.raises(bk.UserError, match="run_id is ''"):
        kit.backtest.background("BTCUSDT", **where, run_id="")


def test_a_run_that_keeps_nothing_makes_no_files(tmp_path: Path) -> None:
    kit = bk.Kit(tmp_path / "dump")
    kit.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
    kit.add_frame_schema("day", start_date="2024-06-01", end_date="2024-06-02")
    kit.add_strategy_schema("idle", interval="1h", get_signal=lambda ctx: None)
    kit.backtest.run_sync("BTCUSDT", strategy_name="idle", exchange_name="demo", frame_name="day")
    assert [path.name for path in (tmp_path / "dump").iterdir() if path.name.startswith("@")] == []
    assert {path.name for path in (tmp_path / "dump").iterdir()} <= {"candle", ".backtest-kit"}


def test_the_records_of_a_backtest_lie_in_files_apart_from_those_of_live(tmp_path: Path) -> None:
    kit = bk.Kit(tmp_path / "dump")
    kit.persistence.bind("*", bk.SqliteStore(tmp_path / "bot.db"))
    kit.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
    kit.add_frame_schema("day", start_date="2024-06-01", end_date="2024-06-02")
    kit.add_strategy_schema("trend", interval="1h", get_signal=count)
    kit.backtest.run_sync("BTCUSDT", strategy_name="trend", exchange_name="demo", frame_name="day", run_id="mine")
    own = tmp_path / "dump/@backtest-mine"
    assert {path.name for path in own.iterdir()} == {"state", "session", "memory"}
    asyncio.run(kit.close())


@without_server
async def test_a_resting_entry_and_its_position_share_what_is_noted(kit: bk.Kit, backtest: Backtest) -> None:
    seen: dict[str, list[str]] = {}

    async def get_signal(ctx: bk.Context) -> bk.Signal:
        await ctx.state("steps").set(["asked"])
        below = ctx.price * 0.998
        levels: Any = {"price_take_profit": below * 1.01, "price_stop_loss": below * 0.99}
        return bk.Signal(position="long", price_open=below, **levels, minutes=60)

    async def manage(ctx: bk.Context) -> None:
        step = "rests" if ctx.entry is not None else "held"
        steps = await ctx.state("steps").update(lambda found: found if step in found else [*found, step])
        held = ctx.position
        if held is not None:
            seen[held.signal_id] = steps

    async def closed(event: bk.PositionClosed, ctx: bk.Context) -> None:
        steps = await ctx.state("steps", signal_id=event.trade.signal_id).update(lambda found: [*found, "closed"])
        seen[event.trade.signal_id] = steps
        assert await ctx.state("steps").get() == ["asked"], "nothing is held any more: it is the strategy's"

    kit.on(bk.PositionClosed, closed)
    result = await backtest(get_signal, manage=manage)
    assert [seen[trade.signal_id] for trade in result.trades] == [["asked", "rests", "held", "closed"]] * len(seen)
    assert len(seen) > 2


@without_server
async def test_strategies_that_are_compared_have_runs_of_their_own(kit: bk.Kit, backtest: Backtest) -> None:
    kit.add_strategy_schema("one", interval="1h", get_signal=count)
    kit.add_strategy_schema("two", interval="1h", get_signal=count)
    for _ in range(2):
        comparison = await kit.walker.run(
            ["BTCUSDT", "ETHUSDT"], strategies=["one", "two"], exchange_name="demo", frame_name="day"
        )
        assert [contender.failure for contender in comparison] == [None, None]
    runs = await kit.records.runs()
    assert len(runs) == 8
    for run_id in runs:
        states = [
            kit.records.state("asked", strategy_name=name, exchange_name="demo", symbol=symbol, mode="backtest",
                              run_id=run_id)
            for name in ("one", "two") for symbol in ("BTCUSDT", "ETHUSDT")
        ]  # fmt: skip
        assert sorted([await state.get(0) for state in states]) == [0, 0, 0, 24]


@without_server
async def test_a_run_that_is_under_way_cannot_be_started_again(kit: bk.Kit, backtest: Backtest) -> None:
    await backtest(count, run_id="mine")
    where: Any = {"strategy_name": "trend", "exchange_name": "demo", "frame_name": "day"}
    first = kit.backtest.background("BTCUSDT", **where, run_id="mine")
    with pytest.raises(bk.UserError, match="run 'mine' of strategy 'trend' for BTCUSDT is already running"):
        kit.backtest.background("BTCUSDT", **where, run_id="mine")
    beside = kit.backtest.background("ETHUSDT", **where, run_id="mine")
    await asyncio.gather(first, beside)
    again = kit.backtest.background("BTCUSDT", **where, run_id="mine")
    again.cancel()
    with pytest.raises(asyncio.CancelledError):
        await again
    assert (await kit.backtest.background("BTCUSDT", **where, run_id="mine")).run_id == "mine"
