"""A minute without a candle costs that minute at most, in every mode; a start waits for what passes."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
from tests.live.rig import START, WHERE, Rig, UntilClock

import backtest_kit as bk
from backtest_kit.model.interval import MINUTE_MS

PRICES = [100.0] * 12 + [103.0] * 48
"""The take profit of the position that is opened at minute 5 is beyond the step at minute 12."""
NEVER = math.inf
Row = list[float]


def row(minute: int) -> Row:
    return [START + minute * MINUTE_MS, *[PRICES[max(0, min(minute, 59))]] * 4, 1.0]


class Market:
    """A source whose candles may be missing, for good or up to a minute, and whose answers may be garbled."""

    def __init__(self, missing: dict[int, float] | None = None) -> None:
        self.missing = missing or {}
        """The minute from which on the candle of a minute is there."""
        self.clock: UntilClock | None = None
        self.answers: list[Callable[[], Any]] = []
        """What the next requests get instead of candles."""

    async def candles(self, symbol: str, interval: str, since_ms: int, limit: int) -> list[Row]:
        if self.answers:
            return self.answers.pop(0)()  # type: ignore[no-any-return]
        first = (since_ms - START) // MINUTE_MS
        now = 1e9 if self.clock is None else (self.clock.now_ms() - START) / MINUTE_MS
        return [row(at) for at in range(first, first + limit) if self.missing.get(at, 0) <= now and at + 1 <= now]


def opens_once(asked: list[int]) -> Callable[[bk.Context], Any]:
    def get_signal(ctx: bk.Context) -> bk.Signal | None:
        asked.append((ctx.when_ms - START) // MINUTE_MS)
        if ctx.when_ms < START + 5 * MINUTE_MS or ctx.price > 100.5:
            return None
        return bk.Signal("long", price_take_profit=102, price_stop_loss=98, minutes=30)

    return get_signal


@pytest.fixture
def market(memory_rig: Rig) -> Market:
    market = Market()
    memory_rig.source = bk.sources.function(market.candles)
    return market


async def traded(rig: Rig, market: Market, minutes: float, begin: int = 0, **options: Any) -> bk.LiveStatus:
    market.clock = clock = UntilClock(START + begin * MINUTE_MS, START + int(minutes * MINUTE_MS))
    handle = rig.kit(clock).live.background("BTCUSDT", **{**WHERE, **options})
    over = asyncio.ensure_future(clock.over.wait())
    await asyncio.wait({over, handle.task}, return_when=asyncio.FIRST_COMPLETED)
    over.cancel()
    assert not handle.done(), handle.task.exception()
    status = handle.status
    handle.cancel()
    await asyncio.wait({handle.task})
    return status


HOLES: list[dict[int, float]] = [
    {},
    {3: NEVER},
    {4: NEVER},  # the decision waits a minute
    {6: NEVER, 7: NEVER, 9: NEVER},
    dict.fromkeys(range(11, 16), NEVER),  # the first candle beyond the take profit is not there
    dict.fromkeys(range(10, 30), NEVER),
    {-3: NEVER, -2: NEVER, -5: NEVER},  # before the first price
    {at: NEVER for at in range(-5, 40) if at % 3 == 0},
]


@pytest.mark.parametrize("fill", ["vwap", "ohlc"])
@pytest.mark.parametrize("missing", HOLES, ids=lambda each: ".".join(map(str, each))[:20])
async def test_live_paper_and_backtest_agree_on_what_is_missing(
    memory_rig: Rig, market: Market, missing: dict[int, float], fill: Any
) -> None:
    market.missing = missing
    found = {}
    for mode in ("backtest", "paper", "live"):
        memory_rig.events.clear()
        asked: list[int] = []
        memory_rig.strategy = {"get_signal": opens_once(asked), "interval": "1m"}
        if mode == "backtest":
            market.clock = None
            kit = memory_rig.kit(None)
            kit.add_frame_schema("frame", start_date=START, end_date=START + 45 * MINUTE_MS)
            where: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "demo", "frame_name": "frame"}
            async for _ in kit.backtest.run("BTCUSDT", **where, fill=fill, gaps="fill"):
                pass
        else:
            status = await traded(memory_rig, market, 44, paper=mode == "paper", fill=fill)
            inside = sum(at < 44 for at in missing if at >= 0)
            assert status.missed == inside
            assert status.waiting == ""
        trades = [(t.opened_at_ms, t.closed_at_ms, t.close_reason, t.price_close) for t in memory_rig.trades()]
        found[mode] = (asked, trades)
        assert [reason for *_, reason, _ in trades] == ["take_profit"]
    assert found["live"] == found["paper"] == found["backtest"]
    assert not any(at - 1 in missing for at in found["live"][0])


async def test_a_hole_is_logged_when_it_begins_and_reported_once_when_it_ends(
    memory_rig: Rig, market: Market, caplog: pytest.LogCaptureFixture
) -> None:
    market.missing = {3: NEVER, 4: NEVER, 5: 8.5, 9: NEVER}
    memory_rig.strategy = {"get_signal": lambda ctx: None, "interval": "1m"}
    with caplog.at_level(logging.WARNING, "backtest_kit"):
        status = await traded(memory_rig, market, 12)
    holes = [
        ((event.first_ms - START) // MINUTE_MS, event.count, (event.when_ms - START) // MINUTE_MS)
        for event in memory_rig.of(bk.MinutesMissed)
    ]
    assert holes == [(4, 3, 7), (10, 1, 11)]
    assert (status.missed, status.gaps_filled) == (4, 3)
    assert [text.split(":")[1] for text in caplog.messages] == [
        " no decision at 2024-06-01T10",
        " missed 3 minutes from 2024-06-01T10",
        " no decision at 2024-06-01T10",
        " missed 1 minute from 2024-06-01T10",
    ]


async def test_a_candle_of_another_symbol_that_does_not_come_is_filled(memory_rig: Rig, market: Market) -> None:
    """It is waited for, but not for longer than some seconds: the decision is about the run's own symbol."""
    read: list[tuple[int, list[float]]] = []

    async def candles(symbol: str, interval: str, since_ms: int, limit: int) -> list[Row]:
        rows = await market.candles(symbol, interval, since_ms, limit)
        return rows if symbol == "BTCUSDT" else [each for each in rows if each[0] not in gone]

    async def get_signal(ctx: bk.Context) -> None:
        volume = (await ctx.candles("1m", 3, symbol="ETHUSDT")).volume
        assert market.clock is not None
        read.append((market.clock.now_ms() - ctx.when_ms, volume.tolist()))

    gone = {START + 3 * MINUTE_MS, START + 4 * MINUTE_MS}
    memory_rig.source = bk.sources.function(candles)
    memory_rig.strategy = {"get_signal": get_signal, "interval": "1m"}
    status = await traded(memory_rig, market, 6)
    assert status.missed == 0
    assert not memory_rig.of(bk.StrategyFailed)
    whole = (0, [1.0, 1.0, 1.0])
    filled = [(10_000, [1.0, 1.0, 0.0]), (10_000, [1.0, 0.0, 0.0]), (0, [0.0, 0.0, 1.0])]
    assert read == [*[whole] * 4, *filled]


async def test_a_bad_answer_about_the_past_costs_the_decisions_of_its_minutes(memory_rig: Rig, market: Market) -> None:
    """Where candles begin is asked again: an exchange that shows nothing of the past may do so for a while."""
    decided: list[int] = []

    async def candles(symbol: str, interval: str, since_ms: int, limit: int) -> list[Row]:
        assert market.clock is not None
        if since_ms < START - 20 * MINUTE_MS and market.clock.now_ms() < START + 2 * MINUTE_MS:
            return []
        return await market.candles(symbol, interval, since_ms, limit)

    async def get_signal(ctx: bk.Context) -> None:
        assert (await ctx.candles("1m", 100)).volume.sum() == 100
        decided.append((ctx.when_ms - START) // MINUTE_MS)

    memory_rig.source = bk.sources.function(candles)
    memory_rig.strategy = {"get_signal": get_signal, "interval": "1m"}
    await traded(memory_rig, market, 5)
    assert decided == [2, 3, 4, 5]


async def test_a_decision_that_an_absent_source_prevents_is_taken_once_it_is_back(
    memory_rig: Rig, market: Market
) -> None:
    """It does not use up its slot, is told of once, and the status says what is waited for."""
    decided: list[int] = []

    async def candles(symbol: str, interval: str, since_ms: int, limit: int) -> list[Row]:
        assert market.clock is not None
        if symbol == "ETHUSDT" and START + 15 * MINUTE_MS <= market.clock.now_ms() < START + 18 * MINUTE_MS:
            raise ConnectionError("reset")
        return await market.candles(symbol, interval, since_ms, limit)

    async def get_signal(ctx: bk.Context) -> None:
        await ctx.candles("1m", 3, symbol="ETHUSDT")
        decided.append((ctx.when_ms - START) // MINUTE_MS)

    memory_rig.source = bk.sources.function(candles)
    memory_rig.strategy = {"get_signal": get_signal, "interval": "15m"}
    status = await traded(memory_rig, market, 17.5)
    assert "ConnectionError: reset" in status.waiting
    assert len(memory_rig.of(bk.StrategyFailed)) == 1
    status = await traded(memory_rig, market, 31, 18)
    assert status.waiting == ""
    assert decided == [0, 18, 30]


def raises(error: Exception) -> Callable[[], Any]:
    def answer() -> Any:
        raise error

    return answer


GARBLED: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "short": lambda: [[START - MINUTE_MS, 100.0]],
    "text": lambda: [[START - MINUTE_MS, "a", "b", "c", "d", "e"]],
    "nan": lambda: [[START - MINUTE_MS, float("nan"), 1.0, 1.0, 1.0, 1.0]],
    "backwards": lambda: [row(-1), row(-2), row(-3)],
    "key": raises(KeyError("data")),
    "type": raises(TypeError("'NoneType' object is not subscriptable")),
    "away": raises(ConnectionError("reset")),
    "later": raises(bk.RetryLater("busy")),
}


@pytest.mark.parametrize("answer", list(GARBLED))
@pytest.mark.parametrize("held", [False, True])
async def test_a_start_survives_every_garbled_answer(
    memory_rig: Rig, market: Market, answer: str, held: bool, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    memory_rig.strategy = {"get_signal": opens_once(asked), "interval": "1m"}
    if held:
        await traded(memory_rig, market, 6)
        asked.clear()
    caplog.clear()
    market.answers = [GARBLED[answer]] * 150
    status = await traded(memory_rig, market, 19, 10)
    waiting = [text for text in caplog.messages if "the start of BTCUSDT waits for candles" in text]
    assert len(waiting) == 1
    assert status.waiting == ""
    assert status.when_ms == START + 19 * MINUTE_MS
    (missed,) = memory_rig.of(bk.MinutesMissed)
    assert missed.count == 2
    assert len(memory_rig.trades()) == 1
    assert asked


async def test_what_no_waiting_mends_ends_a_start_with_nothing_open_and_no_other(
    memory_rig: Rig, market: Market
) -> None:
    memory_rig.strategy = {"get_signal": opens_once([]), "interval": "1m"}
    unknown = raises(bk.UserError("there is no market BTCUSDT"))
    market.answers = [unknown]
    handle = memory_rig.kit(UntilClock(START, START + 9 * MINUTE_MS)).live.background("BTCUSDT", **WHERE)
    with pytest.raises(bk.UserError, match="no market BTCUSDT"):
        await handle
    await traded(memory_rig, market, 6)
    market.answers = [unknown] * 100
    status = await traded(memory_rig, market, 19, 10)
    assert len(memory_rig.trades()) == 1
    assert status.when_ms == START + 19 * MINUTE_MS


@pytest.mark.parametrize("step", ["store", "broker"])
async def test_a_start_waits_for_what_is_away_and_says_so_once(
    memory_rig: Rig, market: Market, step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A second of real time for each attempt."""
    memory_rig.strategy = {"get_signal": lambda ctx: None, "interval": "1m"}
    monkeypatch.setattr("backtest_kit.run.live.possession._AGAIN_S", 0.0)
    market.clock = clock = UntilClock(START, START + 2 * MINUTE_MS)
    where: dict[str, Any] = {"store": memory_rig.store, "broker": memory_rig.venue}
    name = "get" if step == "store" else "start"
    call, tries = getattr(where[step], name), 0

    async def away(*given: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries <= 5:
            seen.append(handle.status.waiting)
            raise bk.RetryLater(f"the {step} is too slow, for the {tries}th time")
        return await call(*given)

    seen: list[str] = []
    monkeypatch.setattr(where[step], name, away)
    handle = memory_rig.kit(clock).live.background("BTCUSDT", **WHERE)
    await clock.over.wait()
    assert seen[:1] == [""]
    assert seen[-1] == f"the {step} is too slow, for the 4th time"
    assert (handle.status.waiting, handle.status.missed) == ("", 0)
    assert sum("the start of BTCUSDT waits" in text for text in caplog.messages) == 1
    handle.cancel()
    await asyncio.wait({handle.task})
