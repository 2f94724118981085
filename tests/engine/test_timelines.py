"""Worked timelines through the public API. S is the minute of the signal, M a minute.

A step at t knows the candles that closed by t, so what the candle stamped t does is seen at t + 1 M.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import backtest_kit as bk

M = 60_000
S = 1_704_103_200_000  # 2024-01-01T10:00Z
LEAD = 5
Bars = dict[int, tuple[float, float, float, float]]
"""Open, high, low and close of the candles that are not flat at 100, by the minutes from S to their stamp."""
Decide = Callable[[bk.Context], bk.Signal | None]
Run = Callable[..., AsyncIterator[bk.Event]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def start(
        decide: Decide, bars: Bars, *, minutes: int = 240, interval: str = "1h", begins: int = 0, **options: object
    ) -> AsyncIterator[bk.Event]:
        async def get_candles(symbol: str, candle_interval: str, since_ms: int, limit: int) -> list[list[float]]:
            stamps = range(max((since_ms - S) // M, begins - LEAD), min((since_ms - S) // M + limit, minutes))
            return [[S + n * M, *bars.get(n, (100, 100, 100, 100)), 7] for n in stamps]

        kit = bk.Kit(tmp_path)
        kit.set_config(CC_MAX_SIGNAL_LIFETIME_MINUTES=math.inf)
        kit.add_exchange_schema("market", source=bk.sources.function(get_candles))
        kit.add_frame_schema("frame", start_date=S + begins * M, end_date=S + minutes * M)
        kit.add_risk_schema("never", validations=[lambda request: "not today"])
        kit.add_strategy_schema("strategy", interval=interval, get_signal=decide, **options)  # type: ignore[arg-type]
        return kit.backtest.run("COIN", strategy_name="strategy", exchange_name="market", frame_name="frame")

    return start


def once(signal: bk.Signal) -> Decide:
    """Answer at S, and nothing ever after."""
    return lambda ctx: signal if ctx.when_ms == S else None


def told(event: bk.Event) -> tuple[str, int]:
    return event.action, (event.when_ms - S) // M


def steady(first: int, price: float, minutes: int = 300) -> Bars:
    return dict.fromkeys(range(first, minutes), (price, price, price, price))


async def trade_of(events: AsyncIterator[bk.Event]) -> bk.Trade:
    (trade,) = [event.trade async for event in events if isinstance(event, bk.PositionClosed)]
    return trade


async def test_a_life_of_60_minutes_ends_at_its_60th_at_the_price_of_the_five_minutes_before(run: Run) -> None:
    bars = {n: (100.0, 100.0, 100.0, 100 + n / 1000) for n in range(240)}
    trade = await trade_of(run(once(bk.Signal("long", 110, 90, minutes=60)), bars))
    assert (trade.opened_at_ms, trade.closed_at_ms, trade.close_reason) == (S, S + 60 * M, "time_expired")
    assert trade.price_close == pytest.approx(100 + sum(n / 3000 for n in range(55, 60)) / 5, abs=1e-12)


@pytest.mark.parametrize(("price", "lag"), [(110.5, 1), (105.1, 2), (104, 3), (102.6, 4), (102.01, 5), (101.99, None)])
async def test_a_level_is_touched_by_the_average_so_a_small_move_takes_five_minutes(
    run: Run, price: float, lag: int | None
) -> None:
    trade = await trade_of(run(once(bk.Signal("long", 102, 90, minutes=200)), steady(7, price)))
    assert trade.opened_at_ms == S
    if lag is None:
        assert trade.close_reason == "time_expired"
    else:
        assert (trade.close_reason, trade.price_close) == ("take_profit", 102)
        assert trade.closed_at_ms == S + (7 + lag) * M


async def test_a_resting_entry_opens_when_the_wick_s_candle_has_closed_and_lives_from_there(run: Run) -> None:
    bars: Bars = {29: (100, 100, 99.01, 100), 30: (100, 100, 98.9, 100)}
    signal = bk.Signal("long", 110, 90, price_open=99, minutes=60)
    events = [event async for event in run(once(signal), bars)]
    assert [told(event) for event in events] == [("scheduled", 0), ("opened", 31), ("closed", 91)]
    opened = events[1]
    assert isinstance(opened, bk.PositionOpened)
    assert (opened.position.price_open, opened.position.opened_at_ms) == (99, S + 31 * M)


async def test_a_position_is_first_checked_a_minute_after_it_opened(run: Run) -> None:
    # The price is beyond the take profit at the very minute of the entry: the wick touched 99, the rest traded at 120.
    bars: Bars = dict.fromkeys(range(25, 40), (120, 120, 120, 120)) | {30: (120, 120, 98.9, 120)}
    signal = bk.Signal("long", 110, 90, price_open=99, minutes=60)
    assert [told(event) async for event in run(once(signal), bars)] == [
        ("scheduled", 0),
        ("opened", 31),
        ("closed", 32),
    ]


async def test_an_entry_that_is_never_touched_waits_120_minutes(run: Run) -> None:
    events = [event async for event in run(once(bk.Signal("long", 110, 90, price_open=99)), {})]
    assert [told(event) for event in events] == [("scheduled", 0), ("cancelled", 120)]
    assert isinstance(events[1], bk.EntryCancelled)
    assert events[1].reason == "timeout"


@pytest.mark.parametrize(("stamp", "ends"), [(118, ("opened", 119)), (119, ("cancelled", 120))])
async def test_patience_ends_before_a_touch_in_the_same_minute(run: Run, stamp: int, ends: tuple[str, int]) -> None:
    bars: Bars = {stamp: (100, 100, 98.9, 100)}
    events = [told(event) async for event in run(once(bk.Signal("long", 110, 90, price_open=99)), bars)]
    assert events[1] == ends


@pytest.mark.parametrize(
    ("signal", "bar"),
    [
        (bk.Signal("long", 110, 90, price_open=99), (100.0, 100.0, 90.0, 100.0)),
        (bk.Signal("short", 90, 110, price_open=101), (100.0, 110.0, 100.0, 100.0)),
    ],
)
async def test_the_stop_is_tested_before_the_entry_that_the_same_candle_crosses(
    run: Run, signal: bk.Signal, bar: tuple[float, float, float, float]
) -> None:
    events = [event async for event in run(once(signal), {17: bar})]
    assert [told(event) for event in events] == [("scheduled", 0), ("cancelled", 18)]
    assert isinstance(events[1], bk.EntryCancelled)
    assert events[1].reason == "price_reject"


async def test_the_frame_s_last_minute_closes_what_is_open_at_the_price_of_that_minute(run: Run) -> None:
    trade = await trade_of(run(once(bk.Signal("long", 110, 90, minutes=math.inf)), steady(238, 101), minutes=240))
    assert (trade.closed_at_ms, trade.close_reason) == (S + 240 * M, "frame_end")
    assert trade.price_close == pytest.approx(100.4)


async def test_a_level_touched_at_the_frame_s_last_minute_counts_before_the_end_of_the_frame(run: Run) -> None:
    trade = await trade_of(run(once(bk.Signal("long", 101, 90, minutes=math.inf)), steady(239, 106), minutes=240))
    assert (trade.closed_at_ms, trade.close_reason, trade.price_close) == (S + 240 * M, "take_profit", 101)


async def test_expiry_comes_before_a_level_touched_in_the_same_minute(run: Run) -> None:
    trade = await trade_of(run(once(bk.Signal("long", 102, 90, minutes=60)), steady(59, 120)))
    assert (trade.closed_at_ms, trade.close_reason) == (S + 60 * M, "time_expired")
    assert trade.price_close == pytest.approx(104)


async def asked(run: Run, answer: bk.Signal | None, **options: object) -> list[int]:
    """The minutes from S at which the strategy is asked."""
    minutes = []

    def decide(ctx: bk.Context) -> bk.Signal | None:
        minutes.append((ctx.when_ms - S) // M)
        return answer

    async for _ in run(decide, {}, minutes=31, **options):
        pass
    return minutes


async def test_no_answer_uses_the_slot_up(run: Run) -> None:
    assert await asked(run, None, interval="15m") == [0, 15, 30]


async def test_a_risk_rejection_uses_the_slot_up_like_any_other_answer(run: Run) -> None:
    signal = bk.Signal("long", 110, 90)
    assert await asked(run, signal, interval="15m", risk_name="never") == [0, 15, 30]


async def test_a_slot_that_has_begun_is_asked_at_once_and_the_next_ones_on_time(run: Run) -> None:
    assert await asked(run, None, interval="5m", begins=3) == [3, 5, 10, 15, 20, 25, 30]


async def test_after_a_close_the_next_decision_is_a_minute_later(run: Run) -> None:
    assert await asked(run, bk.Signal("long", 110, 90, minutes=9), interval="1m") == [0, 10, 20, 30]


async def test_a_signal_that_was_acted_on_last_is_ignored(run: Run) -> None:
    signal = bk.Signal("long", 110, 90, minutes=9, id="once")
    assert await asked(run, signal, interval="5m") == [0, 10, 15, 20, 25, 30]


async def test_a_slot_is_used_once_even_if_the_position_was_closed_inside_of_it(run: Run) -> None:
    assert await asked(run, bk.Signal("long", 110, 90, minutes=9), interval="15m") == [0, 15, 30]
