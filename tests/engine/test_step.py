"""The state machine, transition by transition."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from backtest_kit.engine.step import Flat, Holding, Resting, Rules, State, Tick, activates, admit, decision_due, step
from backtest_kit.model.event import (
    BreakevenReached,
    EntryCancelled,
    EntryScheduled,
    EntryWaiting,
    Event,
    FallReached,
    LevelReached,
    PeakReached,
    PositionActive,
    PositionClosed,
    PositionOpened,
)
from backtest_kit.model.identity import Identity
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.position import Position, Trade
from backtest_kit.model.signal import Signal
from backtest_kit.settings import Settings

M = MINUTE_MS
T = 1_704_067_200_000
RULES = Rules(
    identity=Identity("BTCUSDT", "trend", "binance", "jan", "backtest"), settings=Settings(), interval_ms=15 * M
)
OHLC = msgspec.structs.replace(RULES, fill="ohlc")


def tick(
    minute: int, price: float, *, open: float | None = None, high: float | None = None, low: float | None = None
) -> Tick:
    return Tick(T + minute * M, price, open or price, high or price, low or price, price)


def opened(signal: Signal, price: float = 100.0, rules: Rules = RULES) -> Holding:
    state, events = admit(Flat(), signal, tick(0, price), rules)
    assert isinstance(state, Holding)
    assert [type(event) for event in events] == [PositionOpened]
    return state


def closed(state: State, at: Tick, rules: Rules = RULES) -> Trade:
    after, events = step(state, at, rules)
    assert isinstance(after, Flat)
    (event,) = events
    assert isinstance(event, PositionClosed)
    return event.trade


def holds(state: State, at: Tick, rules: Rules = RULES) -> Position:
    after, events = step(state, at, rules)
    assert events == ()
    assert isinstance(after, Holding)
    return after.position


LONG = Signal("long", 102, 99, minutes=60)
SHORT = Signal("short", 98, 101, minutes=60)


def test_flat_stays_flat() -> None:
    assert step(Flat(), tick(0, 100), RULES) == (Flat(), ())


def test_a_signal_without_a_price_opens_at_the_current_one() -> None:
    position = opened(LONG, 100.5).position
    assert (position.price_open, position.opened_at_ms, position.scheduled_at_ms) == (100.5, T, T)
    assert (position.cost, position.minutes) == (100.0, 60.0)
    assert position.peak.pnl_pct == 0
    assert position.fall.pnl_pct == pytest.approx(-0.3996003996)


def test_a_signal_at_a_better_price_opens_at_its_own() -> None:
    assert opened(msgspec.structs.replace(LONG, price_open=100.5), 100).position.price_open == 100.5


def test_defaults_come_from_the_settings() -> None:
    position = opened(Signal("long", 102, 99)).position
    assert (position.minutes, position.cost) == (1440, 100)


@pytest.mark.parametrize(
    ("signal", "price", "reason", "fill"),
    [
        (LONG, 102.0, "take_profit", 102),
        (LONG, 103.7, "take_profit", 102),
        (LONG, 99.0, "stop_loss", 99),
        (LONG, 95.0, "stop_loss", 99),
        (SHORT, 98.0, "take_profit", 98),
        (SHORT, 90.0, "take_profit", 98),
        (SHORT, 101.0, "stop_loss", 101),
        (SHORT, 120.0, "stop_loss", 101),
    ],
)
def test_vwap_fills_at_the_level(signal: Signal, price: float, reason: str, fill: float) -> None:
    trade = closed(opened(signal), tick(1, price))
    assert (trade.close_reason, trade.price_close, trade.closed_at_ms) == (reason, fill, T + M)


@pytest.mark.parametrize("signal", [LONG, SHORT])
def test_vwap_does_not_look_at_wicks(signal: Signal) -> None:
    holds(opened(signal), tick(1, 100, high=150, low=50))


@pytest.mark.parametrize(
    ("signal", "candle", "reason", "fill"),
    [
        (LONG, {"open": 100.0, "high": 102.0, "low": 100.0}, "take_profit", 102),
        (LONG, {"open": 103.0, "high": 104.0, "low": 102.5}, "take_profit", 103),
        (LONG, {"open": 100.0, "high": 100.0, "low": 99.0}, "stop_loss", 99),
        (LONG, {"open": 97.0, "high": 98.0, "low": 96.0}, "stop_loss", 97),
        (LONG, {"open": 100.0, "high": 110.0, "low": 90.0}, "stop_loss", 99),
        (SHORT, {"open": 100.0, "high": 100.0, "low": 98.0}, "take_profit", 98),
        (SHORT, {"open": 97.0, "high": 97.5, "low": 96.0}, "take_profit", 97),
        (SHORT, {"open": 100.0, "high": 101.0, "low": 100.0}, "stop_loss", 101),
        (SHORT, {"open": 104.0, "high": 105.0, "low": 103.0}, "stop_loss", 104),
        (SHORT, {"open": 100.0, "high": 110.0, "low": 90.0}, "stop_loss", 101),
    ],
)
def test_ohlc_fills_by_wicks_stop_first_gaps_at_the_open(
    signal: Signal, candle: dict[str, float], reason: str, fill: float
) -> None:
    trade = closed(opened(signal), tick(1, 100, **candle), OHLC)
    assert (trade.close_reason, trade.price_close) == (reason, fill)


@pytest.mark.parametrize("rules", [RULES, OHLC])
def test_it_expires_at_the_first_minute_of_its_age_and_before_any_level(rules: Rules) -> None:
    state = opened(LONG, rules=rules)
    holds(state, tick(59, 100), rules)
    trade = closed(state, tick(60, 105, high=105, low=90), rules)
    assert (trade.close_reason, trade.price_close, trade.closed_at_ms) == ("time_expired", 105, T + 60 * M)


def test_an_endless_position_does_not_expire() -> None:
    holds(opened(msgspec.structs.replace(LONG, minutes=math.inf)), tick(10_000_000, 100))


def test_the_frame_end_closes_what_no_rule_closed() -> None:
    rules = msgspec.structs.replace(RULES, stop_ms=T + 5 * M)
    state = opened(LONG, rules=rules)
    holds(state, tick(4, 100.7), rules)
    assert (closed(state, tick(5, 100.7), rules).close_reason) == "frame_end"
    assert (closed(state, tick(5, 102.7), rules).close_reason) == "take_profit"


def test_peak_and_fall_follow_the_price_up_to_the_fill_of_the_close() -> None:
    state: State = opened(LONG)
    for minute, price in enumerate((100.2, 101.5, 101.2, 99.5, 99.7, 101.5), start=1):
        state, events = step(state, tick(minute, price), RULES)
        assert events == ()
    assert isinstance(state, Holding)
    assert (state.position.peak.price, state.position.peak.timestamp) == (101.5, T + 2 * M)
    assert (state.position.fall.price, state.position.fall.timestamp) == (99.5, T + 4 * M)
    trade = closed(state, tick(7, 98))
    assert trade.peak_pct == state.position.peak.pnl_pct == pytest.approx(1.0956, abs=1e-3)
    assert trade.fall_pct == trade.pnl_pct == pytest.approx(-1.3966, abs=1e-3)
    trade = closed(state, tick(7, 105))
    assert trade.peak_pct == trade.pnl_pct == pytest.approx(1.5944, abs=1e-3)
    assert trade.fall_pct == state.position.fall.pnl_pct == pytest.approx(-0.8981, abs=1e-3)


def test_after_a_close_the_same_id_is_ignored() -> None:
    signal = msgspec.structs.replace(LONG, id="once")
    after, _ = step(opened(signal), tick(1, 105), RULES)
    assert isinstance(after, Flat)
    again, events = admit(after, signal, tick(15, 100), RULES)
    assert events == ()
    assert again == Flat(T + 15 * M, "once")
    other, _ = admit(after, msgspec.structs.replace(LONG, id="twice"), tick(15, 100), RULES)
    assert isinstance(other, Holding)


def test_a_slot_is_used_up_by_any_answer() -> None:
    assert decision_due(Flat(), T + 3 * M, RULES)
    used, _ = admit(Flat(), None, tick(3, 100), RULES)
    assert isinstance(used, Flat)
    assert [minute for minute in range(4, 46) if decision_due(used, T + minute * M, RULES)] == list(range(15, 46))


def test_decisions_fall_on_the_grid_of_the_frame_and_not_on_its_last_minute() -> None:
    rules = msgspec.structs.replace(RULES, interval_ms=M, start_ms=T + 2 * M, grid_ms=5 * M, stop_ms=T + 22 * M)
    assert [minute for minute in range(2, 30) if decision_due(Flat(), T + minute * M, rules)] == [2, 7, 12, 17]


def resting(signal: Signal, price: float, rules: Rules = RULES) -> Resting:
    state, events = admit(Flat(), signal, tick(0, price), rules)
    assert isinstance(state, Resting)
    assert [type(event) for event in events] == [EntryScheduled]
    return state


WAITING_LONG = msgspec.structs.replace(LONG, price_open=100.0)
WAITING_SHORT = msgspec.structs.replace(SHORT, price_open=100.0)


@pytest.mark.parametrize(
    ("signal", "price", "candle"),
    [(WAITING_LONG, 101.0, {"low": 100.0}), (WAITING_SHORT, 99.0, {"high": 100.0})],
)
def test_a_resting_entry_opens_when_the_last_minute_touched_it(
    signal: Signal, price: float, candle: dict[str, float]
) -> None:
    state = resting(signal, price)
    assert step(state, tick(29, price), RULES) == (state, ())
    after, (event,) = step(state, tick(30, price, **candle), RULES)
    assert isinstance(after, Holding)
    assert isinstance(event, PositionOpened)
    position = after.position
    assert (position.price_open, position.opened_at_ms, position.scheduled_at_ms) == (100, T + 30 * M, T)
    holds(after, tick(89, 100.1))
    assert closed(after, tick(90, 100.1)).close_reason == "time_expired"


def cancelled(state: State, at: Tick, rules: Rules = RULES) -> EntryCancelled:
    after, (event,) = step(state, at, rules)
    assert isinstance(event, EntryCancelled)
    assert after == Flat(T, event.entry.signal_id)
    return event


@pytest.mark.parametrize(
    ("signal", "price", "candle"),
    [(WAITING_LONG, 101.0, {"low": 99.0}), (WAITING_SHORT, 99.0, {"high": 101.0})],
)
def test_a_minute_that_touches_stop_and_entry_cancels(signal: Signal, price: float, candle: dict[str, float]) -> None:
    assert cancelled(resting(signal, price), tick(1, price, **candle)).reason == "price_reject"


def test_a_resting_entry_times_out() -> None:
    state = resting(WAITING_LONG, 101.0)
    assert step(state, tick(119, 101.0), RULES) == (state, ())
    assert cancelled(state, tick(120, 101.0, low=100)).reason == "timeout"


def test_a_resting_entry_ends_with_the_frame() -> None:
    rules = msgspec.structs.replace(RULES, stop_ms=T + 5 * M)
    state = resting(WAITING_LONG, 101.0, rules)
    assert cancelled(state, tick(5, 101.0), rules).reason == "frame_end"
    assert cancelled(state, tick(5, 101.0, low=100), rules).reason == "frame_end"


ALL: frozenset[type[Event]] = frozenset(
    {PositionActive, EntryWaiting, PeakReached, FallReached, LevelReached, BreakevenReached}
)


def happened(state: State, at: Tick, wanted: frozenset[type[Event]] = ALL) -> tuple[State, list[str]]:
    after, events = step(state, at, RULES, wanted)
    names = [f"{event.side} {event.level}" if isinstance(event, LevelReached) else event.action for event in events]
    return after, names


@pytest.mark.parametrize(
    ("signal", "prices"),
    [
        (Signal("long", 110, 90), (100.0, 100.5, 100.61, 103.1, 102.0, 98.9, 99.0, 97.0, 109.9)),
        (Signal("short", 90, 110), (100.0, 99.5, 99.39, 96.9, 98.0, 101.1, 101.0, 103.0, 90.1)),
    ],
)
def test_a_minute_reports_what_it_brought_in_a_fixed_order(signal: Signal, prices: tuple[float, ...]) -> None:
    state: State = opened(signal)
    told = []
    for minute, price in enumerate(prices, start=1):
        state, names = happened(state, tick(minute, price))
        told.append(names)
    assert told == [
        ["active"],
        ["peak", "active"],
        ["peak", "active", "breakeven"],
        ["peak", "active", "profit 10", "profit 20", "profit 30"],
        ["active"],
        ["fall", "active", "loss 10"],
        ["active"],
        ["fall", "active", "loss 20", "loss 30"],
        ["peak", "active", "profit 40", "profit 50", "profit 60", "profit 70", "profit 80", "profit 90"],
    ]


def test_nothing_is_reported_that_nobody_wants_but_all_is_remembered() -> None:
    state, names = happened(opened(Signal("long", 110, 90)), tick(1, 105.0), frozenset())
    assert names == []
    assert isinstance(state, Holding)
    assert (state.position.profit_level, state.position.breakeven_reached) == (50, True)
    assert happened(state, tick(2, 105.5), frozenset({LevelReached, BreakevenReached}))[1] == []


def test_a_command_to_close_comes_before_everything_else() -> None:
    state = msgspec.structs.replace(opened(LONG), closing="enough")
    trade = closed(state, tick(60, 105))
    assert (trade.close_reason, trade.price_close, trade.close_note) == ("closed", 105, "enough")


def test_moved_levels_are_the_ones_in_force() -> None:
    state = opened(Signal("long", 110, 90))
    moved = msgspec.structs.replace(state.position, moved_stop_loss=99.0, moved_take_profit=104.0)
    state = msgspec.structs.replace(state, position=moved)
    holds(state, tick(1, 99.1))
    stopped, taken = closed(state, tick(1, 98.0)), closed(state, tick(1, 105.0))
    assert (stopped.price_close, stopped.price_stop_loss, stopped.original_price_stop_loss) == (99, 99, 90)
    assert (taken.price_close, taken.price_take_profit, taken.original_price_take_profit) == (104, 104, 110)


@pytest.mark.parametrize(
    ("signal", "stop", "price", "reason"),
    [
        (Signal("long", 110, 90), 99.0, 98.0, "stop_loss"),
        (Signal("long", 110, 90), 100.0, 98.0, "stop_loss"),
        (Signal("long", 110, 90), 100.1, 98.0, "trailing_stop"),
        (Signal("short", 90, 110), 101.0, 102.0, "stop_loss"),
        (Signal("short", 90, 110), 100.0, 102.0, "stop_loss"),
        (Signal("short", 90, 110), 99.9, 102.0, "trailing_stop"),
    ],
)
@pytest.mark.parametrize("rules", [RULES, OHLC])
def test_a_stop_moved_past_the_entry_price_is_a_trailing_stop(
    rules: Rules, signal: Signal, stop: float, price: float, reason: str
) -> None:
    state = opened(signal)
    state = msgspec.structs.replace(state, position=msgspec.structs.replace(state.position, moved_stop_loss=stop))
    assert closed(state, tick(1, price), rules).close_reason == reason


def test_commands_to_a_resting_entry_are_carried_out_at_the_next_minute() -> None:
    state = resting(WAITING_LONG, 101.0)
    assert cancelled(msgspec.structs.replace(state, order="cancel"), tick(1, 100.0, low=99)).reason == "user"
    after, (event,) = step(msgspec.structs.replace(state, order="activate"), tick(1, 101.5), RULES)
    assert isinstance(event, PositionOpened)
    assert isinstance(after, Holding)
    assert (after.position.price_open, after.position.opened_at_ms) == (101.5, T + M)
    beyond = msgspec.structs.replace(state, order="activate")
    assert cancelled(beyond, tick(1, 102.5)).reason == "price_reject"


def test_waiting_is_reported_where_it_is_wanted() -> None:
    state = resting(WAITING_LONG, 101.0)
    assert happened(state, tick(1, 101.0)) == (state, ["waiting"])
    assert happened(state, tick(1, 101.0), frozenset()) == (state, [])
    assert activates(state, tick(1, 101.0, low=100), RULES)
    assert not activates(state, tick(1, 101.0), RULES)
    assert not activates(state, tick(1, 101.0, low=98), RULES)
    assert not activates(state, tick(120, 101.0, low=100), RULES)


def test_ids_are_made_from_the_run_and_the_minute() -> None:
    def id_of(rules: Rules, minute: int = 0) -> str:
        state, _ = admit(Flat(), LONG, tick(minute, 100), rules)
        assert isinstance(state, Holding)
        return state.position.signal_id

    def named(**names: Any) -> Rules:
        return msgspec.structs.replace(RULES, identity=msgspec.structs.replace(RULES.identity, **names))

    assert id_of(RULES) == id_of(RULES)
    ids = [
        id_of(RULES),
        id_of(RULES, 15),
        id_of(named(symbol="ETH/USDT:USDT-240927")),
        id_of(named(strategy_name="other")),
    ]
    assert len(set(ids)) == 4
    for each in ids:
        assert len(each) <= 32
        assert each.replace("-", "").isalnum()


def test_events_say_where_they_belong() -> None:
    _, events = admit(Flat(), LONG, tick(0, 100), RULES)
    (event,) = events
    assert isinstance(event, PositionOpened)
    assert (event.symbol, event.action, event.when_ms, event.price) == ("BTCUSDT", "opened", T, 100)
    assert event.when.isoformat() == "2024-01-01T00:00:00+00:00"


def test_a_minute_without_a_candle_of_the_market_touches_fills_and_ends_nothing() -> None:
    def made_up(minute: int, price: float) -> Tick:
        return msgspec.structs.replace(tick(minute, price), real=False)

    for rules in (RULES, OHLC):
        holding = opened(LONG, rules=rules)
        told = msgspec.structs.replace(holding, closing="by hand")
        resting, _ = admit(Flat(), Signal("long", 102, 97, price_open=99, minutes=60), tick(0, 100), rules)
        assert isinstance(resting, Resting)
        for state in (holding, told, resting, msgspec.structs.replace(resting, order="activate")):
            for minute, price in ((1, 103.0), (2, 98.0), (60, 100.0), (500, 100.0)):
                assert step(state, made_up(minute, price), rules, frozenset({PositionActive})) == (state, ())
        assert not activates(resting, made_up(1, 98), rules)
        assert closed(told, tick(3, 100.2), rules).price_close == 100.2
        assert closed(holding, tick(61, 100.1), rules).close_reason == "time_expired"
        # The end of a frame does not wait: what is open there counts at the last price there is.
        ending = msgspec.structs.replace(rules, stop_ms=T + 5 * M)
        assert closed(holding, made_up(5, 103.0), ending).close_reason == "frame_end"
        after, (event,) = step(resting, made_up(5, 98.0), ending)
        assert isinstance(event, EntryCancelled)
        assert (type(after), event.reason) == (Flat, "frame_end")
