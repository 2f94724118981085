"""Risk profiles over several runs: the limit is a limit, the same in every run, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import backtest_kit as bk

MakeKit = Callable[..., bk.Kit]
WHERE: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "demo", "frame_name": "week"}
SYMBOLS = [f"COIN{n}" for n in range(6)]


def at_most(limit: int) -> Callable[[bk.RiskRequest], str | None]:
    return lambda request: f"{limit} are open" if len(request.positions) >= limit else None


def largest_overlap(results: bk.Results) -> int:
    edges = sorted(
        [(trade.opened_at_ms, 1) for trade in results.trades] + [(trade.closed_at_ms, -1) for trade in results.trades]
    )
    largest = open_now = 0
    for _, step in edges:
        open_now += step
        largest = max(largest, open_now)
    return largest


async def run_all(kit: bk.Kit) -> bk.Results:
    return bk.Results(await asyncio.gather(*(kit.backtest.background(symbol, **WHERE) for symbol in SYMBOLS)))


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_a_limit_holds_over_all_symbols(make_kit: MakeKit, limit: int) -> None:
    kit = make_kit(risk_name="few")
    kit.add_risk_schema("few", validations=[at_most(limit)])
    results = await asyncio.wait_for(run_all(kit), 60)
    assert largest_overlap(results) == limit
    free = await run_all(make_kit())
    assert largest_overlap(free) == 6


async def test_the_outcome_does_not_depend_on_who_is_slow(make_kit: MakeKit) -> None:
    async def trades(delays: dict[str, float]) -> list[tuple[bk.Trade, ...]]:
        async def get_signal(ctx: bk.Context) -> bk.Signal:
            await asyncio.sleep(delays.get(ctx.symbol, 0))
            return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=1, stop_loss_pct=1, minutes=600)

        kit = make_kit(get_signal, risk_name="few", interval="1h")
        kit.add_risk_schema("few", validations=[at_most(2)])
        return [result.trades for result in await run_all(kit)]

    assert await trades({}) == await trades({"COIN0": 0.002}) == await trades({"COIN5": 0.002, "COIN3": 0.001})


async def test_strategies_share_a_profile_too(make_kit: MakeKit) -> None:
    kit = make_kit(risk_name="one")
    kit.add_risk_schema("one", validations=[at_most(1)])
    kit.add_strategy_schema(
        "other",
        interval="5m",
        risk_names=["one"],
        get_signal=lambda ctx: bk.Signal.bracket("short", price=ctx.price, take_profit_pct=1, stop_loss_pct=1),
    )
    results = bk.Results(
        await asyncio.gather(
            kit.backtest.background("BTCUSDT", **WHERE),
            kit.backtest.background("BTCUSDT", **{**WHERE, "strategy_name": "other"}),
        )
    )
    assert largest_overlap(results) == 1
    assert {trade.strategy_name for trade in results.trades} == {"trend", "other"}


async def test_a_resting_entry_holds_its_place_and_does_not_count_itself(make_kit: MakeKit) -> None:
    seen: list[int] = []

    def rest(ctx: bk.Context) -> bk.Signal:
        below = ctx.price * 0.998
        return bk.Signal("long", price_take_profit=below * 1.02, price_stop_loss=below * 0.98, price_open=below)

    def only_one(request: bk.RiskRequest) -> str | None:
        seen.append(len(request.positions))
        return "one is open" if request.positions else None

    kit = make_kit(rest, risk_name="one")
    kit.add_risk_schema("one", validations=[only_one])
    opened: list[bk.PositionOpened] = []
    kit.on(bk.PositionOpened, opened.append)
    results = await run_all(kit)
    assert len(opened) == len(results.trades) > 3
    assert largest_overlap(results) == 1
    assert max(seen) == 1


async def test_a_refusal_at_activation_is_reported(make_kit: MakeKit) -> None:
    def rest(ctx: bk.Context) -> bk.Signal:
        below = ctx.price * 0.998
        return bk.Signal("long", price_take_profit=below * 1.02, price_stop_loss=below * 0.98, price_open=below)

    asked: list[int] = []

    def first_time_only(request: bk.RiskRequest) -> str | None:
        asked.append(request.when_ms)
        return "changed its mind" if len(asked) % 2 == 0 else None

    kit = make_kit(rest, risk_name="fickle")
    kit.add_risk_schema("fickle", validations=[first_time_only])
    events = [event async for event in kit.backtest.run("BTCUSDT", **WHERE)]
    rejected = [event for event in events if isinstance(event, bk.RiskRejected)]
    cancelled = [event for event in events if isinstance(event, bk.EntryCancelled) and event.reason == "risk"]
    assert [event.when_ms for event in rejected if event.reason == "changed its mind"]
    assert {event.when_ms for event in cancelled} <= {event.when_ms for event in rejected}
    assert cancelled


async def test_the_same_strategy_and_symbol_twice_is_two_positions(make_kit: MakeKit) -> None:
    kit = make_kit(risk_name="one")
    kit.add_risk_schema("one", validations=[at_most(1)])
    runs = [kit.backtest.background("BTCUSDT", **WHERE, fill=fill) for fill in ("vwap", "ohlc")]
    assert largest_overlap(bk.Results(await asyncio.gather(*runs))) == 1


async def test_a_run_inside_of_a_run_is_refused_before_it_hangs(make_kit: MakeKit) -> None:
    kit = make_kit(risk_name="one")
    kit.add_risk_schema("one", validations=[at_most(1)])

    async def nested(event: bk.PositionOpened) -> None:
        if event.symbol == "COIN0":
            await kit.backtest.background("COIN1", **WHERE)

    kit.on(bk.PositionOpened, nested)
    with pytest.raises(bk.UserError, match="would wait for itself"):
        await asyncio.wait_for(kit.backtest.background("COIN0", **WHERE), 30)

    two = make_kit(risk_name="one")
    two.add_risk_schema("one", validations=[at_most(1)])

    async def side_by_side_in_one_task() -> None:
        async for _ in two.backtest.run("COIN0", **WHERE):
            async for _ in two.backtest.run("COIN1", **WHERE):
                pass

    with pytest.raises(bk.UserError, match="would wait for itself"):
        await asyncio.wait_for(side_by_side_in_one_task(), 30)


async def test_all_profiles_or_none(make_kit: MakeKit) -> None:
    """The first profile allows and the second refuses: nothing may stay reserved in the first."""
    kit = make_kit(risk_names=["wide", "never"])
    kit.add_risk_schema("wide", validations=[at_most(1)])
    kit.add_risk_schema("never", validations=[lambda request: "never"])
    kit.add_strategy_schema(
        "free", risk_name="wide", interval="1h",
        get_signal=lambda ctx: bk.Signal.bracket("long", price=ctx.price, take_profit_pct=1, stop_loss_pct=1),
    )  # fmt: skip
    refused, free = await asyncio.gather(
        kit.backtest.background("BTCUSDT", **WHERE),
        kit.backtest.background("BTCUSDT", **{**WHERE, "strategy_name": "free"}),
    )
    assert refused.trades == ()
    assert len(free.trades) > 3


async def test_a_run_that_fails_or_is_cancelled_holds_nobody_up(make_kit: MakeKit) -> None:
    async def get_signal(ctx: bk.Context) -> bk.Signal:
        if ctx.symbol == "COIN1":
            raise ZeroDivisionError
        return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=1, stop_loss_pct=1)

    kit = make_kit(get_signal, risk_name="few")
    kit.add_risk_schema("few", validations=[at_most(1)])
    handles = [kit.backtest.background(symbol, **WHERE) for symbol in SYMBOLS[:4]]
    handles[2].cancel()  # before its first step
    results = await asyncio.wait_for(asyncio.gather(*handles, return_exceptions=True), 60)
    assert isinstance(results[1], ZeroDivisionError)
    assert isinstance(results[2], asyncio.CancelledError)
    assert isinstance(results[0], bk.BacktestResult)
    assert isinstance(results[3], bk.BacktestResult)
    assert results[0].trades


async def test_runs_one_after_another_start_from_nothing(make_kit: MakeKit) -> None:
    kit = make_kit(risk_name="one")
    kit.add_risk_schema("one", validations=[at_most(1)])
    first = await kit.backtest.background("COIN0", **WHERE)
    second = await kit.backtest.background("COIN1", **WHERE)
    assert first.trades
    assert second.trades == (await make_kit().backtest.background("COIN1", **WHERE)).trades


def test_threads_with_loops_of_their_own_do_not_wait_for_each_other(make_kit: MakeKit) -> None:
    kit = make_kit(risk_name="one")
    kit.add_risk_schema("one", validations=[at_most(1)])
    kit.cron("daily", interval="1d", handler=lambda tick: None)
    with ThreadPoolExecutor(4) as threads:
        runs = [threads.submit(kit.backtest.run_sync, "COIN0", **WHERE) for _ in range(4)]
        assert len({run.result(timeout=60).trades for run in runs}) == 1
