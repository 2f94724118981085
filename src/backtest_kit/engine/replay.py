"""Skip-ahead: find the next minute at which anything can happen, without visiting the ones between.

The columns are those of `market.History`: element c belongs to the step at
`first_ms + (c + 1) * MINUTE_MS`, whose last closed candle is candle c. `step` then runs at the minute
found, so that a replay that skips and one that does not take the same decisions.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import msgspec
import numpy as np

from backtest_kit.engine.pnl import effective_price
from backtest_kit.engine.position import LEVEL_STEP, breakeven_pct, is_simple, watch
from backtest_kit.engine.step import Flat, Holding, Resting, Rules, State, Tick, Wanted, decision_due
from backtest_kit.model.candle import BoolColumn, FloatColumn
from backtest_kit.model.event import (
    BreakevenReached,
    EntryWaiting,
    FallReached,
    LevelReached,
    PeakReached,
    PositionActive,
)
from backtest_kit.model.interval import MINUTE_MS, floor_ms
from backtest_kit.model.position import Position

_HAIR: Final = 1e-12
# A level is usually near: look at a few hundred minutes first, at more and more while it is not.
_FIRST_LOOK: Final = 256
_LONGEST_LOOK: Final = 16_384


class Columns(NamedTuple):
    """What a replay scans, a value per closed minute."""

    first_ms: int
    prices: FloatColumn
    open: FloatColumn
    high: FloatColumn
    low: FloatColumn
    close: FloatColumn
    real: BoolColumn | None = None
    """Which minutes have a real candle; None if all have. In the others nothing happens."""

    def index_at(self, when_ms: int) -> int:
        """The element that the step at `when_ms` sees last."""
        return (when_ms - self.first_ms) // MINUTE_MS - 1

    def tick(self, when_ms: int) -> Tick:
        c = self.index_at(when_ms)
        return Tick(
            when_ms,
            float(self.prices[c]),
            float(self.open[c]),
            float(self.high[c]),
            float(self.low[c]),
            float(self.close[c]),
            self.real is None or bool(self.real[c]),
        )

    def real_from(self, when_ms: int, stop_ms: int) -> int:
        """The first minute from `when_ms` on with a real candle; `stop_ms` if none has."""
        if self.real is None:
            return when_ms
        ahead = self.real[self.index_at(when_ms) : self.index_at(stop_ms)]
        return when_ms + int(ahead.argmax()) * MINUTE_MS if ahead.any() else stop_ms


def next_minute(state: State, columns: Columns, when_ms: int, rules: Rules, wanted: Wanted = frozenset()) -> int:
    """The first minute after `when_ms` at which a step or a decision can change or report anything.

    Never later than the frame's last minute; that one is always visited. It may be a minute too early
    by the last bit of a float, never too late.
    """
    stop_ms = int(rules.stop_ms)
    return columns.real_from(_next_event(state, columns, when_ms + MINUTE_MS, stop_ms, rules, wanted), stop_ms)


def _next_event(state: State, columns: Columns, after: int, stop_ms: int, rules: Rules, wanted: Wanted) -> int:
    """As `next_minute`, if every candle were real."""
    if isinstance(state, Flat):
        return min(_next_decision(state, after, rules), stop_ms)
    if isinstance(state, Resting):
        if state.order or EntryWaiting in wanted:
            return after
        deadline: float = state.entry.scheduled_at_ms + rules.settings.CC_SCHEDULE_AWAIT_MINUTES * MINUTE_MS
        # The stop lies beyond the entry, so whatever touches it touches the entry too.
        long = state.entry.side == "long"
        above, below = (math.inf, state.entry.price_open) if long else (state.entry.price_open, -math.inf)
        scans = [(columns.low, columns.high, below, above)]
    else:
        if state.closing is not None or PositionActive in wanted:
            return after
        deadline = min(state.position.expires_at_ms, stop_ms)
        scans = _scans(state.position, columns, rules, wanted)
    last = columns.index_at(max(after, int(min(deadline, stop_ms))))
    first = columns.index_at(after)
    for low, high, below, above in scans:
        last = _first_touch(low, high, below, above, first, last)
    return after + (last - first) * MINUTE_MS


def _scans(
    position: Position, columns: Columns, rules: Rules, wanted: Wanted
) -> list[tuple[FloatColumn, FloatColumn, float, float]]:
    """Which columns to scan for a position, below and above which prices."""
    long = position.side == "long"
    take, stop = position.take_profit, position.stop_loss
    levels = (stop, take) if long else (take, stop)
    reports = _report_prices(position, rules, wanted)
    if rules.fill == "vwap":
        below, above = max(levels[0], reports[0]), min(levels[1], reports[1])
        return [(columns.prices, columns.prices, below, above)]
    scans = [(columns.low, columns.high, *levels)]
    if reports != (-math.inf, math.inf):
        scans.append((columns.prices, columns.prices, *reports))
    return scans


def _report_prices(position: Position, rules: Rules, wanted: Wanted) -> tuple[float, float]:
    """Below and above which prices a step has something to report that is wanted."""
    entry = effective_price(position.entries, position.reductions)
    sign = 1.0 if position.side == "long" else -1.0
    to_take, to_stop = sign * (position.take_profit - entry), sign * (entry - position.stop_loss)
    gains, losses = [math.inf], [math.inf]
    if not is_simple(position) and not wanted.isdisjoint((PeakReached, FallReached)):
        return math.inf, -math.inf  # any price may be a new extreme of profit
    if PeakReached in wanted:
        gains.append(max(0.0, sign * (position.peak.price - entry)))
    if FallReached in wanted:
        losses.append(max(0.0, sign * (entry - position.fall.price)))
    if BreakevenReached in wanted and not position.breakeven_reached:
        gains.append(entry * breakeven_pct(rules.settings) / 100)
    if LevelReached in wanted:
        if position.profit_level < 100:
            gains.append(max(0.0, to_take * (position.profit_level + LEVEL_STEP) / 100))
        if position.loss_level < 100:
            losses.append(max(0.0, to_stop * (position.loss_level + LEVEL_STEP) / 100))
    # A hair early is harmless, a hair late would miss the minute.
    gain, loss = min(gains) * (1 - _HAIR) - entry * _HAIR, min(losses) * (1 - _HAIR) - entry * _HAIR
    return (entry - loss, entry + gain) if sign > 0 else (entry - gain, entry + loss)


def coast(state: State, columns: Columns, when_ms: int, until_ms: int, rules: Rules) -> State:
    """The state after the uneventful minutes strictly between the two: only peak and fall have moved."""
    if not isinstance(state, Holding):
        return state
    first, last = columns.index_at(when_ms + MINUTE_MS), columns.index_at(until_ms)
    if first >= last:
        return state
    window = columns.prices[first:last]
    minutes = None if columns.real is None else np.flatnonzero(columns.real[first:last])
    if minutes is not None:
        if not len(minutes):
            return state
        window = window[minutes]
    position = state.position
    for c in sorted({int(window.argmax()), int(window.argmin())}):
        passed = c if minutes is None else int(minutes[c])
        position = watch(position, float(window[c]), when_ms + (passed + 1) * MINUTE_MS, rules.settings)
    return msgspec.structs.replace(state, position=position) if position is not state.position else state


def _next_decision(state: Flat, after: int, rules: Rules) -> int:
    ahead = after + (rules.start_ms - after) % rules.grid_ms
    if decision_due(state, ahead, rules):
        return ahead
    next_slot = floor_ms(ahead, rules.interval_ms) + rules.interval_ms
    return next_slot + (rules.start_ms - next_slot) % rules.grid_ms


def _first_touch(low: FloatColumn, high: FloatColumn, below: float, above: float, first: int, last: int) -> int:
    """The first index in `[first, last)` whose range reaches `above` or `below`, else `last`."""
    look = _FIRST_LOOK
    while first < last:
        end = min(first + look, last)
        touched = high[first:end] >= above
        touched |= low[first:end] <= below
        c = int(touched.argmax())
        if touched[c]:
            return first + c
        first, look = end, min(look * 4, _LONGEST_LOOK)
    return last
