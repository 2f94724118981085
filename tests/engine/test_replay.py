"""A replay that skips and one that visits every minute are the same replay."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tests.samples import size

from backtest_kit.engine import commands
from backtest_kit.engine.replay import Columns, coast, next_minute
from backtest_kit.engine.step import FillModel, Flat, Holding, Resting, Rules, State, Wanted, admit, decision_due, step
from backtest_kit.model.event import (
    BreakevenReached,
    EntryWaiting,
    Event,
    FallReached,
    LevelReached,
    MarketEvent,
    PeakReached,
    PositionActive,
    PositionClosed,
)
from backtest_kit.model.identity import Identity
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.signal import Direction, Signal
from backtest_kit.settings import Settings, with_settings

M = MINUTE_MS
START = 1_704_067_200_000 + 7 * M
SETTINGS = with_settings(Settings(), {"CC_MAX_SIGNAL_LIFETIME_MINUTES": "inf"})
IDENTITY = Identity("BTCUSDT", "trend", "binance", "jan", "backtest")


def market(seed: int, minutes: int, sigma: float, missing: float = 0.0) -> Columns:
    """Random columns with a price that lags the candles a little, as an average does; a part of them is filled."""
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, sigma, minutes)))
    open_ = np.concatenate(([100.0], close[:-1]))
    high = np.maximum(open_, close) * (1 + rng.exponential(sigma, minutes))
    low = np.minimum(open_, close) * (1 - rng.exponential(sigma, minutes))
    prices = (close + open_ + high + low) / 4
    real = rng.random(minutes) >= missing if missing else None
    return Columns(START - 5 * M, prices, open_, high, low, close, real)


def answer(seed: int, when_ms: int, price: float) -> Signal | None:
    """A strategy without memory: what it answers depends on the minute alone."""
    rng = np.random.default_rng((seed, when_ms // M))
    if rng.random() < 0.3:
        return None
    position: Direction = "long" if rng.random() < 0.5 else "short"
    sign = 1 if position == "long" else -1
    entry = price * (1 - sign * rng.uniform(-0.004, 0.01)) if rng.random() < 0.5 else None
    base = price if entry is None else entry
    return Signal(
        position,
        price_take_profit=base * (1 + sign * rng.uniform(0.005, 0.03)),
        price_stop_loss=base * (1 - sign * rng.uniform(0.005, 0.03)),
        price_open=entry,
        minutes=math.inf if rng.random() < 0.2 else int(rng.integers(1, 400)),
    )


def command(seed: int, state: State, event: Event) -> State:
    """A handler without memory: what it does depends on the minute and the event alone."""
    rng = np.random.default_rng((seed, event.when_ms // M, len(event.action)))
    what = rng.choice(["", "close", "reduce", "add", "stop", "take", "cancel", "activate"])
    if isinstance(state, Resting) and what in ("cancel", "activate") and not state.order:
        return msgspec.structs.replace(state, order=what)
    if not isinstance(state, Holding) or not isinstance(event, MarketEvent) or state.closing is not None:
        return state
    position, price, when = state.position, event.price, event.when_ms
    if what == "close":
        return msgspec.structs.replace(state, closing="")
    to = price * (1 + rng.uniform(-0.01, 0.01))
    try:
        if what == "reduce":
            position = commands.reduce(position, price, when, percent=float(rng.uniform(5, 60)))
        elif what == "add":
            position = commands.add(position, price, when, 50, SETTINGS)
        elif what == "stop":
            position = commands.move_stop(position, price, to, SETTINGS)
        elif what == "take":
            position = commands.move_take(position, price, to, SETTINGS)
    except commands.Refused:
        return state
    return msgspec.structs.replace(state, position=position)


def run(
    columns: Columns, rules: Rules, seed: int, *, skip: bool, wanted: Wanted = frozenset(), commanded: bool = True
) -> tuple[list[Event], State, int]:
    events: list[Event] = []
    state: State = Flat()
    when, visited = START - M, 0
    while when < rules.stop_ms:
        until = next_minute(state, columns, when, rules, wanted) if skip else when + M
        if skip:
            state = coast(state, columns, when, until, rules)
        when = until
        visited += 1
        tick = columns.tick(when)
        if not isinstance(state, Flat):
            state, happened = step(state, tick, rules, wanted)
        elif tick.real and decision_due(state, when, rules):
            state, happened = admit(state, answer(seed, when, tick.price), tick, rules)
        else:
            continue
        events += happened
        if wanted and commanded:
            for event in happened:
                state = command(seed, state, event)
    return events, state, visited


@pytest.mark.sampled
@settings(max_examples=size(40, 150), deadline=None)
@given(
    seed=st.integers(0, 2**32),
    minutes=st.integers(30, 3000),
    sigma=st.sampled_from([0.0002, 0.001, 0.004]),
    fill=st.sampled_from(["vwap", "ohlc"]),
    interval=st.sampled_from([1, 5, 15, 60]),
    grid=st.sampled_from([1, 3, 60]),
    missing=st.sampled_from([0.0, 0.02, 0.5, 0.97]),
    wanted=st.frozensets(
        st.sampled_from([PositionActive, EntryWaiting, PeakReached, FallReached, LevelReached, BreakevenReached])
    ),
)
def test_skipping_changes_nothing(
    seed: int, minutes: int, sigma: float, fill: FillModel, interval: int, grid: int, missing: float, wanted: Wanted
) -> None:
    """Whatever is listened to, whatever the listeners then command, and whichever candles are missing."""
    columns = market(seed, minutes, sigma, missing)
    rules = Rules(
        identity=IDENTITY,
        settings=SETTINGS,
        fill=fill,
        interval_ms=interval * M,
        start_ms=START,
        grid_ms=grid * M,
        stop_ms=START + (minutes - 6) * M,
    )
    skipped = run(columns, rules, seed, skip=True, wanted=wanted)
    visited = run(columns, rules, seed, skip=False, wanted=wanted)
    assert skipped[:2] == visited[:2]
    for event in visited[0]:
        assert columns.tick(event.when_ms).real or event.when_ms == rules.stop_ms
        if isinstance(event, PositionClosed) and event.trade.close_reason != "frame_end":
            assert event.trade.fall_pct <= event.trade.pnl_pct <= event.trade.peak_pct


KINDS: list[type[Event]] = [PositionActive, EntryWaiting, PeakReached, FallReached, LevelReached, BreakevenReached]
LIFE = re.compile(r"(opened closed |scheduled (cancelled |opened closed ))*(opened |scheduled (opened )?)?")


@pytest.mark.sampled
@settings(max_examples=size(20, 60), deadline=None)
@given(seed=st.integers(0, 2**32), fill=st.sampled_from(["vwap", "ohlc"]), wanted=st.frozensets(st.sampled_from(KINDS)))
def test_who_listens_changes_neither_what_happens_nor_its_order(seed: int, fill: FillModel, wanted: Wanted) -> None:
    columns = market(seed, 1500, 0.001)
    rules = Rules(
        identity=IDENTITY, settings=SETTINGS, fill=fill, interval_ms=5 * M, start_ms=START, stop_ms=START + 1490 * M
    )
    everything = run(columns, rules, seed, skip=False, wanted=frozenset(KINDS), commanded=False)[0]
    heard = run(columns, rules, seed, skip=True, wanted=wanted, commanded=False)[0]
    assert heard == [event for event in everything if type(event) in wanted or type(event) not in KINDS]


@pytest.mark.sampled
@settings(max_examples=size(20, 60), deadline=None)
@given(seed=st.integers(0, 2**32), fill=st.sampled_from(["vwap", "ohlc"]))
def test_no_transition_leaves_the_state_machine(seed: int, fill: FillModel) -> None:
    """Whatever is commanded: scheduled, opened, closed and cancelled follow each other as they may, a minute apart."""
    columns = market(seed, 2000, 0.002)
    rules = Rules(
        identity=IDENTITY, settings=SETTINGS, fill=fill, interval_ms=M, start_ms=START, stop_ms=START + 1990 * M
    )
    events = run(columns, rules, seed, skip=True, wanted=frozenset(KINDS))[0]
    life = [event for event in events if type(event) not in KINDS]
    assert LIFE.fullmatch("".join(f"{event.action} " for event in life))
    assert all(before.when_ms < after.when_ms for before, after in pairwise(life))


def test_skipping_visits_few_minutes() -> None:
    columns = market(1, 43_205, 0.0008)
    rules = Rules(
        identity=IDENTITY,
        settings=Settings(),
        interval_ms=15 * M,
        start_ms=START,
        stop_ms=START + 43_199 * M,
    )
    events, _, visited = run(columns, rules, 3, skip=True)
    assert len(events) > 200
    assert visited < 43_200 / 15 + 2 * len(events)


def test_a_level_far_away_is_found() -> None:
    minutes = 200_000
    flat = np.full(minutes, 100.0)
    prices = flat.copy()
    prices[150_123] = 102.5
    columns = Columns(START - 5 * M, prices, flat, flat, flat, flat)
    rules = Rules(identity=IDENTITY, settings=Settings(), interval_ms=M, stop_ms=START + (minutes - 6) * M)
    state, _ = admit(Flat(), Signal("long", 102, 99, minutes=math.inf), columns.tick(START), rules)
    found = next_minute(state, columns, START, rules)
    assert columns.index_at(found) == 150_123
    state = coast(state, columns, START, found, rules)
    _, (event,) = step(state, columns.tick(found), rules)
    assert event.action == "closed"


def test_a_copy_of_the_rules_changes_the_answer() -> None:
    # Guards the property above against a replay in which nothing ever happens.
    columns = market(5, 3000, 0.001)
    rules = Rules(identity=IDENTITY, settings=Settings(), interval_ms=15 * M, start_ms=START, stop_ms=START + 2990 * M)
    vwap = run(columns, rules, 9, skip=True)[0]
    ohlc = run(columns, msgspec.structs.replace(rules, fill="ohlc"), 9, skip=True)[0]
    assert {event.action for event in vwap} == {"opened", "closed", "scheduled", "cancelled"}
    assert vwap != ohlc
