"""Backtests as a user runs them: results, handles, options, errors."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import backtest_kit as bk
from backtest_kit.model.interval import MINUTE_MS, to_ms

MakeKit = Callable[..., bk.Kit]
WHERE: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "demo", "frame_name": "week"}
START, STOP = to_ms("2024-06-01"), to_ms("2024-06-08")


def test_a_backtest_is_the_same_every_time(make_kit: MakeKit) -> None:
    first = make_kit().backtest.run_sync("BTCUSDT", **WHERE)
    again = make_kit().backtest.run_sync("BTCUSDT", **WHERE)
    assert len(first.trades) > 10
    assert first.trades == again.trades
    assert first.trades != make_kit(seed=8).backtest.run_sync("BTCUSDT", **WHERE).trades


def test_trades_follow_each_other(make_kit: MakeKit) -> None:
    trades = make_kit().backtest.run_sync("BTCUSDT", **WHERE).trades
    assert trades[0].opened_at_ms == START
    for before, after in pairwise(trades):
        assert before.opened_at_ms < before.closed_at_ms < after.opened_at_ms
    assert all(trade.closed_at_ms <= STOP for trade in trades)
    assert all(trade.fall_pct <= trade.peak_pct for trade in trades)
    assert len({trade.signal_id for trade in trades}) == len(trades)


def test_what_is_open_at_the_last_minute_closes_there(make_kit: MakeKit) -> None:
    async def hold(ctx: bk.Context) -> bk.Signal:
        return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=80, stop_loss_pct=15)

    kit = make_kit(hold)
    kit.set_config(CC_MAX_SIGNAL_LIFETIME_MINUTES="inf")
    (trade,) = kit.backtest.run_sync("BTCUSDT", **WHERE).trades
    assert (trade.opened_at_ms, trade.closed_at_ms, trade.close_reason) == (START, STOP, "frame_end")


async def test_run_yields_events_in_order(make_kit: MakeKit) -> None:
    events = [event async for event in make_kit().backtest.run("BTCUSDT", **WHERE)]
    assert [event.action for event in events] == ["opened", "closed"] * (len(events) // 2)
    assert [event.when_ms for event in events] == sorted(event.when_ms for event in events)
    opened, closed = events[:2]
    assert isinstance(opened, bk.PositionOpened)
    assert isinstance(closed, bk.PositionClosed)
    assert closed.trade.signal_id == opened.position.signal_id


async def test_run_can_be_left_early(make_kit: MakeKit) -> None:
    async for event in make_kit().backtest.run("BTCUSDT", **WHERE):
        assert event.action == "opened"
        break


async def test_nine_symbols_in_one_process(make_kit: MakeKit) -> None:
    kit = make_kit()
    symbols = [f"COIN{n}USDT" for n in range(9)]
    handles = [kit.backtest.background(symbol, **WHERE) for symbol in symbols]
    results = bk.Results(await asyncio.gather(*handles))
    assert [result.symbol for result in results] == symbols
    assert all(handle.done() and handle.progress == 1 for handle in handles)
    alone = await make_kit().backtest.background(symbols[3], **WHERE)
    assert alone.trades == results[3].trades
    table = str(results)
    assert all(symbol in table for symbol in symbols)
    assert len(results.to_pandas()) == len(results.trades) == sum(len(result.trades) for result in results)


async def test_stop_opens_nothing_more_and_ends_what_is_open(make_kit: MakeKit) -> None:
    kit = make_kit()
    asked: list[int] = []

    async def get_signal(ctx: bk.Context) -> bk.Signal:
        asked.append(ctx.when_ms)
        if len(asked) == 3:
            handle.stop()
        return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=1, stop_loss_pct=1, minutes=600)

    kit.add_strategy_schema("trend", interval="15m", get_signal=get_signal, replace=True)
    handle = kit.backtest.background("BTCUSDT", **WHERE)
    result = await handle
    assert (len(asked), len(result.trades)) == (3, 2)
    assert handle.done()
    assert result.stopped
    assert result.stop_ms == asked[-1] < STOP


async def test_stop_carries_an_open_position_to_its_end_and_cancels_a_resting_entry(make_kit: MakeKit) -> None:
    kit = make_kit()
    handle = kit.backtest.background("BTCUSDT", **WHERE)
    kit.on(bk.PositionOpened, lambda event: handle.stop())
    (trade,) = (await handle).trades
    assert trade.close_reason in ("take_profit", "stop_loss", "time_expired")

    resting = make_kit(lambda ctx: bk.Signal("long", ctx.price, ctx.price * 0.9, price_open=ctx.price * 0.95))
    waiting = resting.backtest.background("BTCUSDT", **WHERE)
    cancelled: list[bk.EntryCancelled] = []
    resting.on(bk.EntryScheduled, lambda event: waiting.stop())
    resting.on(bk.EntryCancelled, cancelled.append)
    assert (await waiting).trades == ()
    assert [(event.reason, event.when_ms) for event in cancelled] == [("user", START + MINUTE_MS)]


async def test_a_paused_strategy_is_not_asked(make_kit: MakeKit) -> None:
    asked: list[int] = []
    kit = make_kit(lambda ctx: asked.append(ctx.when_ms))
    handle = kit.backtest.background("BTCUSDT", **WHERE)
    kit.cron("noon", interval="12h", handler=lambda tick: handle.pause() if tick.when.hour else handle.resume())
    await handle
    assert {when % 86_400_000 // 3_600_000 for when in asked} == set(range(12))


async def test_a_replay_lets_other_tasks_run(make_kit: MakeKit) -> None:
    handle = make_kit(lambda ctx: None, interval="1m").backtest.background("BTCUSDT", **WHERE)
    seen = set()
    while not handle.done():
        seen.add(handle.progress)
        await asyncio.sleep(0)
    await handle
    assert len(seen) > 2


async def test_a_cancelled_backtest_leaves_nothing_behind(make_kit: MakeKit) -> None:
    kit = make_kit(interval="1m")
    handle = kit.backtest.background("BTCUSDT", **WHERE)
    await asyncio.sleep(0)  # it has begun
    handle.cancel()
    with pytest.raises(asyncio.CancelledError):
        await handle
    assert (await kit.backtest.background("ETHUSDT", **WHERE)).trades


def test_a_strategy_may_be_a_plain_function(make_kit: MakeKit) -> None:
    def get_signal(ctx: bk.Context) -> bk.Signal | None:
        return (
            None if ctx.price < 0 else bk.Signal.bracket("short", price=ctx.price, take_profit_pct=1, stop_loss_pct=1)
        )

    assert make_kit(get_signal).backtest.run_sync("BTCUSDT", **WHERE).trades[0].side == "short"


async def test_run_sync_works_where_a_loop_is_running(make_kit: MakeKit) -> None:
    kit = make_kit()
    assert (
        kit.backtest.run_sync("BTCUSDT", **WHERE).trades == (await kit.backtest.background("BTCUSDT", **WHERE)).trades
    )


def test_background_without_a_loop_says_so(make_kit: MakeKit) -> None:
    with pytest.raises(bk.UserError, match="needs a running event loop"):
        make_kit().backtest.background("BTCUSDT", **WHERE)


def test_the_strategy_s_own_error_comes_through(make_kit: MakeKit) -> None:
    async def broken(ctx: bk.Context) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as raised:
        make_kit(broken).backtest.run_sync("BTCUSDT", **WHERE)
    assert any(frame.name == "broken" for frame in traceback.extract_tb(raised.tb))


@pytest.mark.parametrize("answer", [42, "long", {"position": "long"}, True])
def test_a_wrong_answer_is_named(make_kit: MakeKit, answer: object) -> None:
    with pytest.raises(
        bk.UserError, match=r"get_signal of strategy 'trend' for BTCUSDT at 2024-06-01T00:00Z returned "
    ):
        make_kit(lambda ctx: answer).backtest.run_sync("BTCUSDT", **WHERE)


def test_a_bad_signal_is_refused_with_all_it_breaks(make_kit: MakeKit) -> None:
    inverted = bk.Signal("long", price_take_profit=1, price_stop_loss=10**9, minutes=-1)
    with pytest.raises(bk.UserError) as refused:
        make_kit(lambda ctx: inverted).backtest.run_sync("BTCUSDT", **WHERE)
    for part in ("takes profit above", "stops below", "minutes is -1"):
        assert part in str(refused.value)


def test_a_strategy_that_takes_too_long_is_stopped(make_kit: MakeKit) -> None:
    async def slow(ctx: bk.Context) -> None:
        await asyncio.sleep(30)

    kit = make_kit(slow)
    kit.set_config(CC_MAX_SIGNAL_GENERATION_SECONDS=0.01)
    with pytest.raises(bk.UserError, match=r"for BTCUSDT at 2024-06-01T00:00Z took longer than 0\.01 s"):
        kit.backtest.run_sync("BTCUSDT", **WHERE)


def test_a_timeout_of_the_strategy_itself_is_its_own(make_kit: MakeKit) -> None:
    async def slow(ctx: bk.Context) -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        make_kit(slow).backtest.run_sync("BTCUSDT", **WHERE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy_name": "tredn"}, r"strategy 'tredn' is not registered \(registered: 'trend'\)"),
        ({"exchange_name": "binance"}, r"exchange 'binance' is not registered \(registered: 'demo'\)"),
        ({"frame_name": "june"}, r"frame 'june' is not registered \(registered: 'day', 'week'\)"),
        ({"fill": "best"}, "fill is 'best': use one of vwap, ohlc"),
        ({"gaps": "ignore"}, "gaps is 'ignore': use one of error, fill"),
        ({"dirty": "ignore"}, "dirty is 'ignore': use one of refuse, repair"),
    ],
)
def test_names_and_options_are_checked(make_kit: MakeKit, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(bk.UserError, match=message):
        make_kit().backtest.run_sync("BTCUSDT", **{**WHERE, **changes})


@pytest.mark.parametrize("symbol", ["", None, 7])
def test_the_symbol_is_a_text(make_kit: MakeKit, symbol: Any) -> None:
    with pytest.raises(bk.UserError, match="symbol is "):
        make_kit().backtest.run_sync(symbol, **WHERE)


def test_a_frame_stops_at_now(make_kit: MakeKit) -> None:
    kit = make_kit()
    now = bk.Kit(kit.dump, now_ms=lambda: to_ms("2024-06-03T12:00:30"))
    now.add_exchange_schema("demo", source=bk.sources.synthetic())
    now.add_frame_schema("week", start_date="2024-06-01", end_date="2024-06-08")
    now.add_frame_schema("later", start_date="2024-06-04", end_date="2024-06-08")
    now.add_strategy_schema("trend", interval="15m", get_signal=lambda ctx: None)
    assert now.backtest.run_sync("BTCUSDT", **WHERE).stop_ms == to_ms("2024-06-03T12:00")
    with pytest.raises(bk.UserError, match="in the future"):
        now.backtest.run_sync("BTCUSDT", **{**WHERE, "frame_name": "later"})


def test_the_fill_model_changes_what_is_touched(make_kit: MakeKit) -> None:
    vwap = make_kit().backtest.run_sync("BTCUSDT", **WHERE)
    ohlc = make_kit().backtest.run_sync("BTCUSDT", **WHERE, fill="ohlc")
    assert vwap.trades[0].opened_at_ms == ohlc.trades[0].opened_at_ms
    assert vwap.trades[0].closed_at_ms > ohlc.trades[0].closed_at_ms


def test_settings_reach_the_engine_and_running_tests_keep_theirs(make_kit: MakeKit) -> None:
    kit = make_kit()
    dear = kit.backtest.run_sync("BTCUSDT", **WHERE)
    kit.set_config(CC_PERCENT_FEE=0, CC_PERCENT_SLIPPAGE=0)
    free = kit.backtest.run_sync("BTCUSDT", **WHERE)
    for expensive, cheap in zip(dear.trades, free.trades, strict=True):
        assert cheap.pnl_pct - expensive.pnl_pct == pytest.approx(0.4, abs=0.02)


def test_a_context_shows_its_minute_and_cannot_be_changed(make_kit: MakeKit) -> None:
    seen: list[bk.Context] = []
    kit = make_kit(lambda ctx: seen.append(ctx))
    kit.backtest.run_sync("BTCUSDT", **WHERE)
    context = seen[4]
    assert context.when_ms == START + 60 * MINUTE_MS
    assert context.when.isoformat() == "2024-06-01T01:00:00+00:00"
    names = (context.symbol, context.strategy_name, context.exchange_name, context.frame_name, context.mode)
    assert names == ("BTCUSDT", "trend", "demo", "week", "backtest")
    assert "BTCUSDT" in repr(context)
    with pytest.raises(bk.UserError, match=r"ctx.price is read-only"):
        context.price = 5


def test_a_strategy_cannot_read_its_future(make_kit: MakeKit) -> None:
    async def peek(ctx: bk.Context) -> None:
        closed = await ctx.candles("5m", 3, until=ctx.when_ms - 3_600_000)
        assert closed.timestamp[-1] + 300_000 <= ctx.when_ms - 3_600_000
        await ctx.candles("1m", 5, until=ctx.when_ms + MINUTE_MS)

    with pytest.raises(bk.LookAhead, match="2024-06-01T00:01Z were requested at 2024-06-01T00:00Z"):
        make_kit(peek).backtest.run_sync("BTCUSDT", **WHERE)


def test_a_strategy_reads_other_symbols_at_its_own_minute(make_kit: MakeKit) -> None:
    seen: list[tuple[int, int]] = []

    async def watch(ctx: bk.Context) -> None:
        other = await ctx.candles("1h", 24, symbol="ETHUSDT")
        seen.append((ctx.when_ms, int(other.timestamp[-1])))

    make_kit(watch).backtest.run_sync("BTCUSDT", **WHERE)
    assert all(last == when - when % 3_600_000 - 3_600_000 for when, last in seen)
    assert len(seen) == 7 * 96


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda ctx: ctx.candles("7m", 5), "interval is '7m'"),
        (lambda ctx: ctx.candles("12h", 5), "interval is '12h'"),
        (lambda ctx: ctx.candles("1m", 0), "limit is 0"),
        (lambda ctx: ctx.candles("1m", 5, until="soon"), "until is 'soon'"),
    ],
)
def test_bad_questions_are_answered_with_the_way_out(make_kit: MakeKit, ask: Any, message: str) -> None:
    with pytest.raises(bk.UserError, match=message):
        make_kit(ask).backtest.run_sync("BTCUSDT", **WHERE)


class TestRisk:
    def test_a_refused_signal_is_not_acted_on_and_uses_up_its_slot(self, make_kit: MakeKit) -> None:
        kit = make_kit(risk_name="mornings")
        kit.add_risk_schema(
            "mornings", validations=[lambda request: "too late" if request.when_ms % 86_400_000 >= 43_200_000 else None]
        )

        async def collect() -> list[bk.Event]:
            return [event async for event in kit.backtest.run("BTCUSDT", **WHERE)]

        events = asyncio.run(collect())
        rejected = [event for event in events if isinstance(event, bk.RiskRejected)]
        assert rejected
        assert {(event.reason, event.risk_name) for event in rejected} == {("too late", "mornings")}
        assert all(event.when_ms % 86_400_000 >= 43_200_000 for event in rejected)
        assert len({event.when_ms // 900_000 for event in rejected}) == len(rejected)
        opened = [event for event in events if event.action == "opened"]
        assert all(event.when_ms % 86_400_000 < 43_200_000 for event in opened)

    def test_all_profiles_must_agree_and_may_be_async(self, make_kit: MakeKit) -> None:
        requests: list[bk.RiskRequest] = []

        async def reward_over_risk(request: bk.RiskRequest) -> str | None:
            requests.append(request)
            reward = request.signal.price_take_profit - request.price_open
            return "not worth it" if reward < 2 * (request.price_open - request.signal.price_stop_loss) else ""

        kit = make_kit(risk_name="one", risk_names=["two", "one"])
        kit.add_risk_schema("one", validations=[lambda request: None])
        kit.add_risk_schema("two", validations=[lambda request: "", reward_over_risk])
        assert kit.backtest.run_sync("BTCUSDT", **WHERE).trades == ()
        assert requests[0].identity.symbol == "BTCUSDT"

    def test_an_unknown_profile_and_a_wrong_answer_are_named(self, make_kit: MakeKit) -> None:
        kit = make_kit(risk_name="nowhere")
        with pytest.raises(bk.UserError, match="risk 'nowhere' is not registered"):
            kit.backtest.run_sync("BTCUSDT", **WHERE)
        kit.add_risk_schema("nowhere", validations=[lambda request: False])  # type: ignore[list-item,return-value]
        with pytest.raises(bk.UserError, match="a validation of risk 'nowhere' returned False"):
            kit.backtest.run_sync("BTCUSDT", **WHERE)


class TestLoops:
    """Several event loops at once: a notebook's and the one of `run_sync`, or one in each thread."""

    async def test_run_sync_beside_a_backtest_that_is_loading(self, make_kit: MakeKit) -> None:
        kit = make_kit()
        handle = kit.backtest.background("BTCUSDT", **WHERE)
        await asyncio.sleep(0)
        assert kit.backtest.run_sync("BTCUSDT", **WHERE).trades == (await handle).trades

    def test_run_sync_in_many_threads(self, make_kit: MakeKit) -> None:
        kit = make_kit()
        with ThreadPoolExecutor(8) as threads:
            runs = [threads.submit(kit.backtest.run_sync, "BTCUSDT", **WHERE) for _ in range(8)]
            results = [run.result(timeout=60) for run in runs]
        assert len({result.trades for result in results}) == 1

    async def test_the_source_is_closed_by_the_last_run_of_its_loop(self, make_kit: MakeKit) -> None:
        closed: list[int] = []

        class Source(type(bk.sources.synthetic())):  # type: ignore[misc]
            async def close(self) -> None:
                closed.append(len(asyncio.all_tasks()))

        kit = make_kit()
        kit.add_exchange_schema("demo", source=Source(7, 50_000.0, 0.0008), replace=True)
        await asyncio.gather(*(kit.backtest.background(f"COIN{n}", **WHERE) for n in range(3)))
        assert len(closed) == 1
        await kit.backtest.background("COIN0", **WHERE)
        assert len(closed) == 2


class TestErrorsThatWouldEndMoreThanTheRun:
    @pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration, SystemExit, asyncio.CancelledError])
    @pytest.mark.parametrize("is_async", [True, False])
    async def test_they_are_the_strategy_s(self, make_kit: MakeKit, error: type[BaseException], is_async: bool) -> None:
        def plain(ctx: bk.Context) -> None:
            raise error

        async def awaited(ctx: bk.Context) -> None:
            raise error

        with pytest.raises((bk.UserError, RuntimeError)) as raised:
            await make_kit(awaited if is_async else plain).backtest.background("BTCUSDT", **WHERE)
        assert isinstance(raised.value.__cause__, error)


def test_what_an_exchange_publishes_is_replayed_and_told(tmp_path: Path) -> None:
    """Binance, February 2018: whole minutes, an outage, and minutes that open at 14 s; one row came twice."""
    first = 1_518_048_000_000
    times = [first + at * MINUTE_MS for at in range(30)] + [first + at * MINUTE_MS + 14_789 for at in range(90, 180)]
    times.insert(5, times[5])
    rows = "".join(f"{time},100,101,99,100,5\n" for time in times)
    (tmp_path / "x.csv").write_text("time,open,high,low,close,volume\n" + rows)
    kit = bk.Kit(tmp_path / "dump")
    kit.add_exchange_schema("demo", source=bk.sources.csv(tmp_path / "x.csv"))
    kit.add_frame_schema("week", start_date=first + 10 * MINUTE_MS, end_date=first + 170 * MINUTE_MS)
    kit.add_strategy_schema("trend", get_signal=lambda ctx: None)
    with pytest.raises(bk.UserError, match="do not open on a whole 60 s step"):
        kit.backtest.run_sync("BTCUSDT", **WHERE)
    result = kit.backtest.run_sync("BTCUSDT", **WHERE, gaps="fill")
    assert result.gaps_filled == {"BTCUSDT": 61}
    assert result.repairs["BTCUSDT"]["moved"] == 79
    with pytest.raises(bk.UserError, match="61 minutes of BTCUSDT are missing"):
        kit.backtest.run_sync("BTCUSDT", **WHERE, dirty="repair")
    with pytest.raises(bk.UserError, match="do not open on a whole 60 s step"):
        kit.backtest.run_sync("BTCUSDT", **WHERE, gaps="fill", dirty="refuse")


def test_candles_that_a_strategy_looks_back_at_are_repaired_too(tmp_path: Path) -> None:
    first = 1_640_995_200_000
    prices = [100.0 + at % 7 for at in range(3000)]
    prices[1000] = 0.0

    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> list[list[float]]:
        low = max(0, (since_ms - first) // MINUTE_MS)
        return [[first + at * MINUTE_MS, *[prices[at]] * 4, 1.0] for at in range(low, min(low + limit, len(prices)))]

    async def get_signal(ctx: bk.Context) -> None:
        await ctx.candles("1m", 2000)

    kit = bk.Kit(tmp_path / "dump")
    kit.add_exchange_schema("demo", source=bk.sources.function(get_candles))
    kit.add_frame_schema("week", start_date=first + 2500 * MINUTE_MS, end_date=first + 2600 * MINUTE_MS)
    kit.add_strategy_schema("trend", get_signal=get_signal)
    result = kit.backtest.run_sync("BTCUSDT", **WHERE, gaps="fill")
    assert result.repairs == {"BTCUSDT": {"price": 1}}
    assert result.gaps_filled == {"BTCUSDT": 1}
