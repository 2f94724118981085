"""A position's whole life under commands: from `manage`, from handlers, and what becomes of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest

import backtest_kit as bk
from backtest_kit.model.interval import MINUTE_MS, to_ms

MakeKit = Callable[..., bk.Kit]
WHERE: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "demo", "frame_name": "week"}
START = to_ms("2024-06-01")


def wide(ctx: bk.Context) -> bk.Signal:
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=15, stop_loss_pct=15, minutes=600)


def test_manage_is_called_each_minute_that_something_is_held(make_kit: MakeKit) -> None:
    minutes: list[int] = []

    async def manage(ctx: bk.Context) -> None:
        assert ctx.position is not None
        assert ctx.entry is None
        minutes.append(ctx.position.minutes_open)
        assert ctx.position.minutes_left == 600 - minutes[-1]

    result = make_kit(wide, manage=manage).backtest.run_sync("BTCUSDT", **WHERE)
    first = result.trades[0]
    held = (first.closed_at_ms - first.opened_at_ms) // MINUTE_MS
    assert minutes[:held] == list(range(held))
    assert len(minutes) == sum((trade.closed_at_ms - trade.opened_at_ms) // MINUTE_MS for trade in result.trades)


def test_manage_changes_nothing_by_looking(make_kit: MakeKit) -> None:
    watched = make_kit(wide, manage=lambda ctx: None).backtest.run_sync("BTCUSDT", **WHERE)
    assert watched.trades == make_kit(wide).backtest.run_sync("BTCUSDT", **WHERE).trades


def test_commands_of_a_strategy_make_the_trade(make_kit: MakeKit) -> None:
    told: list[bk.CommandOutcome] = []

    async def manage(ctx: bk.Context) -> None:
        position = ctx.position
        assert position is not None
        if position.minutes_open == 10:
            told.append(await position.reduce(percent=50))
            told.append(await position.move_stop(ctx.price * 0.9))
            told.append(await position.move_take(ctx.price * 1.1))
            told.append(await position.reduce(cost=1000))
        if position.minutes_open == 20:
            assert position.remaining_cost == pytest.approx(50)
            assert position.closed_pct == pytest.approx(50)
            told.append(await position.close("enough"))
            told.append(await position.close())
            told.append(await position.reduce(percent=1))

    kit = make_kit(wide, manage=manage)
    changes: list[str] = []
    kit.on(bk.PositionChanged, lambda event: changes.append(event.change))
    trade = kit.backtest.run_sync("BTCUSDT", **WHERE).trades[0]
    assert all(told[:3])
    assert (bool(told[3]), told[3].reason.startswith("cost is 1000")) == (False, True)
    assert [(outcome.accepted, outcome.reason.partition(" ")[0]) for outcome in told[4:7]] == [
        (True, ""),
        (False, "position"),
        (False, "position"),
    ]
    assert changes[:3] == ["reduced", "stop_moved", "take_moved"]
    assert (trade.close_reason, trade.close_note) == ("closed", "enough")
    assert (trade.closed_at_ms - trade.opened_at_ms) // MINUTE_MS == 21
    assert [reduction.percent for reduction in trade.reductions] == [50]
    assert trade.price_stop_loss != trade.original_price_stop_loss


def test_reducing_everything_closes_the_position(make_kit: MakeKit) -> None:
    async def manage(ctx: bk.Context) -> None:
        if ctx.position and ctx.position.minutes_open == 5:
            assert await ctx.position.reduce(percent=100)

    trade = make_kit(wide, manage=manage).backtest.run_sync("BTCUSDT", **WHERE).trades[0]
    assert (trade.close_reason, trade.close_note) == ("closed", "full_partial_close")
    assert (trade.closed_at_ms - trade.opened_at_ms) // MINUTE_MS == 6


def test_adding_lowers_the_entry_price(make_kit: MakeKit) -> None:
    async def manage(ctx: bk.Context) -> None:
        if ctx.position and len(ctx.position.entries) < 3:
            await ctx.position.add(50)

    for trade in make_kit(wide, manage=manage).backtest.run_sync("BTCUSDT", **WHERE).trades:
        prices = [entry.price for entry in trade.entries]
        assert prices == sorted(prices, reverse=True)
        assert trade.cost == 100 + 50 * (len(prices) - 1)
        assert trade.price_open <= trade.original_price_open
        assert trade.fall_pct <= trade.pnl_pct <= trade.peak_pct


def test_breakeven_and_trailing_from_handlers(make_kit: MakeKit) -> None:
    kit = make_kit(wide)
    outcomes: list[bk.CommandOutcome] = []

    async def on_breakeven(event: bk.BreakevenReached, ctx: bk.Context) -> None:
        assert ctx.position is not None
        assert ctx.position.breakeven_possible
        outcomes.append(await ctx.position.breakeven())
        assert not ctx.position.breakeven_possible

    kit.on(bk.BreakevenReached, on_breakeven)
    result = kit.backtest.run_sync("BTCUSDT", **WHERE)
    assert outcomes
    assert all(outcomes)
    saved = [trade for trade in result.trades if trade.price_stop_loss == trade.price_open]
    assert len(saved) == len(outcomes)
    assert all(trade.pnl_pct > -0.5 for trade in saved)


def test_a_view_never_acts_on_another_position(make_kit: MakeKit) -> None:
    kept: list[bk.PositionView] = []
    told: list[bk.CommandOutcome] = []

    async def manage(ctx: bk.Context) -> None:
        position = ctx.position
        assert position is not None
        if not kept:
            kept.append(position)
        elif position.signal_id != kept[0].signal_id and not told:
            told.append(await kept[0].close())
            assert kept[0].signal_id in repr(kept[0].value)

    make_kit(wide, manage=manage).backtest.run_sync("BTCUSDT", **WHERE)
    assert not told[0]
    assert told[0].reason == f"position {kept[0].signal_id} is closed"


@pytest.mark.parametrize(("command", "reason"), [("cancel", "user"), ("activate", None)])
def test_commands_to_a_resting_entry(make_kit: MakeKit, command: str, reason: str | None) -> None:
    told: list[bk.CommandOutcome] = []

    def rest(ctx: bk.Context) -> bk.Signal:
        below = ctx.price * 0.97
        return bk.Signal("long", price_take_profit=ctx.price * 1.05, price_stop_loss=below * 0.97, price_open=below)

    async def manage(ctx: bk.Context) -> None:
        if ctx.entry and ctx.entry.minutes_waiting == 3 and not told:
            told.append(await getattr(ctx.entry, command)())
            told.append(await ctx.entry.cancel())

    kit = make_kit(rest, manage=manage)
    events: list[bk.Event] = []
    kit.on((bk.EntryCancelled, bk.PositionOpened), events.append)
    kit.backtest.run_sync("BTCUSDT", **WHERE)
    assert [outcome.accepted for outcome in told] == [True, False]
    assert "already has the command" in told[1].reason
    first = events[0]
    assert first.when_ms == START + 4 * MINUTE_MS
    if isinstance(first, bk.EntryCancelled):
        assert first.reason == reason
    else:
        assert isinstance(first, bk.PositionOpened)
        assert reason is None
        assert first.position.price_open == first.price


async def test_endless_positions_live_until_the_frame_ends(make_kit: MakeKit) -> None:
    kit = make_kit(
        lambda ctx: bk.Signal.bracket("long", price=ctx.price, take_profit_pct=90, stop_loss_pct=19, minutes=math.inf)
    )
    kit.set_config(CC_MAX_SIGNAL_LIFETIME_MINUTES=math.inf)
    (trade,) = (await kit.backtest.background("BTCUSDT", **WHERE)).trades
    assert trade.close_reason == "frame_end"


async def test_every_event_of_a_run_in_order(make_kit: MakeKit) -> None:
    kit = make_kit(wide)
    told: list[bk.Event] = []
    kit.on(bk.Event, told.append)
    result = await kit.backtest.background("BTCUSDT", **WHERE)
    assert [event.when_ms for event in told] == sorted(event.when_ms for event in told)
    done = told[-1]
    assert isinstance(done, bk.RunDone)
    assert done.trades == result.trades
    progress = [event.fraction for event in told if isinstance(event, bk.Progress)]
    assert progress == sorted(set(progress))
    assert progress[-1] == 1.0
    assert 50 < len(progress) <= 101
    levels = [event for event in told if isinstance(event, bk.LevelReached)]
    seen = [(event.position.signal_id, event.side, event.level) for event in levels]
    assert len(seen) == len(set(seen)) > 3
    assert all(event.level % 10 == 0 for event in levels)


async def test_a_failing_handler_stops_the_run_and_is_reported(make_kit: MakeKit) -> None:
    kit = make_kit(wide)
    failed: list[bk.RunFailed] = []

    def broken(event: bk.PositionOpened) -> None:
        raise ZeroDivisionError("handler")

    kit.on(bk.PositionOpened, broken)
    kit.on(bk.RunFailed, failed.append)
    with pytest.raises(ZeroDivisionError, match="handler"):
        await kit.backtest.background("BTCUSDT", **WHERE)
    assert isinstance(failed[0].error, ZeroDivisionError)


async def test_events_as_an_iterator_beside_the_run(make_kit: MakeKit) -> None:
    kit = make_kit()
    closed: list[str] = []

    async def read() -> None:
        async for event in kit.events(bk.PositionClosed, bk.RunDone):
            if not isinstance(event, bk.PositionClosed):
                return
            closed.append(event.trade.signal_id)

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)
    result = await kit.backtest.background("BTCUSDT", **WHERE)
    await reader
    assert closed == [trade.signal_id for trade in result.trades]


async def test_cron_runs_once_per_boundary_however_many_symbols(make_kit: MakeKit) -> None:
    kit = make_kit()
    ticks: list[int] = []
    kit.cron("daily", interval="1d", handler=lambda tick: ticks.append(tick.when_ms))
    await asyncio.gather(*(kit.backtest.background(f"COIN{n}", **WHERE) for n in range(4)))
    assert sorted(ticks) == [START + day * 86_400_000 for day in range(8)]
    kit.remove_cron("daily")
    kit.backtest.run_sync("BTCUSDT", **WHERE)
    assert len(ticks) == 8


async def test_cron_never_knows_more_than_any_run(make_kit: MakeKit) -> None:
    """What a job has stored at a boundary is seen by no run that is still before it."""
    seen: list[int] = []
    latest = [0]

    async def get_signal(ctx: bk.Context) -> None:
        seen.append(ctx.when_ms - latest[0])
        await asyncio.sleep(0.001 if ctx.symbol == "COIN0" else 0)

    kit = make_kit(get_signal, interval="1h")
    kit.cron("daily", interval="1d", handler=lambda tick: latest.__setitem__(0, tick.when_ms))
    await asyncio.gather(*(kit.backtest.background(f"COIN{n}", **WHERE) for n in range(4)))
    assert len(seen) == 4 * 7 * 24
    assert min(seen) == 0
    assert max(seen) < 86_400_000


async def test_a_command_of_cron_cannot_undo_the_minute_it_sees(make_kit: MakeKit) -> None:
    """A job that closes whenever the last minute has touched the stop comes too late for the stop."""

    async def dodge(tick: bk.CronTick, ctx: bk.Context) -> None:
        if ctx.position and (await ctx.candles("1m", 1)).low[-1] <= ctx.position.stop_loss:
            await ctx.position.close("dodged")

    plain = await make_kit().backtest.background("BTCUSDT", **WHERE, fill="ohlc")
    kit = make_kit()
    kit.cron("every minute", interval="1m", handler=dodge)
    assert (await kit.backtest.background("BTCUSDT", **WHERE, fill="ohlc")).trades == plain.trades


async def test_what_cron_commands_is_told_at_its_minute(make_kit: MakeKit) -> None:
    kit = make_kit(wide)
    accepted: list[int] = []

    async def trim(tick: bk.CronTick, ctx: bk.Context) -> None:
        if ctx.position and await ctx.position.reduce(percent=10):
            accepted.append(tick.when_ms)

    kit.cron("trim", interval="1h", handler=trim)
    told = [event async for event in kit.backtest.run("BTCUSDT", **WHERE)]
    assert [event.when_ms for event in told if isinstance(event, bk.PositionChanged)] == accepted != []


async def test_a_cancelled_run_says_so(make_kit: MakeKit) -> None:
    kit = make_kit(lambda ctx: None, interval="1m")
    done: list[bk.RunDone] = []
    kit.on(bk.RunDone, done.append)
    handle = kit.backtest.background("BTCUSDT", **WHERE)
    while not handle.progress:
        await asyncio.sleep(0)
    handle.cancel()
    with pytest.raises(asyncio.CancelledError):
        await handle
    assert [event.cancelled for event in done] == [True]


@pytest.mark.parametrize("error", [StopIteration, SystemExit, asyncio.CancelledError])
async def test_manage_and_handlers_end_no_loop_that_is_not_theirs(
    make_kit: MakeKit, error: type[BaseException]
) -> None:
    def broken(ctx: bk.Context) -> None:
        raise error

    with pytest.raises(bk.UserError, match="manage of strategy 'trend'") as raised:
        await make_kit(wide, manage=broken).backtest.background("BTCUSDT", **WHERE)
    assert isinstance(raised.value.__cause__, error)
    kit = make_kit(wide)
    kit.on(bk.PositionOpened, lambda event: broken(event))
    with pytest.raises((bk.UserError, RuntimeError)):
        await kit.backtest.background("BTCUSDT", **WHERE)


async def test_a_note_is_a_text_and_a_part_is_something(make_kit: MakeKit) -> None:
    async def manage(ctx: bk.Context) -> None:
        assert ctx.position is not None
        assert not await ctx.position.reduce(percent=1e-12)
        with pytest.raises(bk.UserError, match="note is 5"):
            await ctx.position.close(5)  # type: ignore[arg-type]

    assert (await make_kit(wide, manage=manage).backtest.background("BTCUSDT", **WHERE)).trades
