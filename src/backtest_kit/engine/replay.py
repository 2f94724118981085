"""Skip-ahead: find the next minute at which anything can happen, without visiting the ones between.

The columns are those of `market.History`: element c belongs to the step at
`first_ms + (c + 1) * MINUTE_MS`, whose last closed candle is candle c. `step` then runs at the minute
found, so that a replay that skips and one that does not take the same decisions.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np

from backtest_kit.engine.step import Flat, Holding, Resting, Rules, State, Tick, decision_due, watch
from backtest_kit.model.candle import FloatColumn
from backtest_kit.model.interval import MINUTE_MS, floor_ms

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
        )


def next_minute(state: State, columns: Columns, when_ms: int, rules: Rules) -> int:
    """The first minute after `when_ms` at which a step or a decision can change anything.

    Never later than the frame's last minute; that one is always visited.
    """
    stop_ms = int(rules.stop_ms)
    after = when_ms + MINUTE_MS
    if isinstance(state, Flat):
        return min(_next_decision(state, after, rules), stop_ms)
    if isinstance(state, Resting):
        deadline: float = state.entry.scheduled_at_ms + rules.settings.CC_SCHEDULE_AWAIT_MINUTES * MINUTE_MS
        low, high = columns.low, columns.high
        # The stop lies beyond the entry, so whatever touches it touches the entry too.
        above, below = (
            (math.inf, state.entry.price_open)
            if state.entry.position == "long"
            else (state.entry.price_open, -math.inf)
        )
    else:
        position = state.position
        deadline = min(position.expires_at_ms, stop_ms)
        low, high = (columns.prices, columns.prices) if rules.fill == "vwap" else (columns.low, columns.high)
        take, stop = position.take_profit, position.stop_loss
        above, below = (take, stop) if position.position == "long" else (stop, take)
    end = max(after, int(min(deadline, stop_ms)))
    first, last = columns.index_at(after), columns.index_at(end)
    return after + (_first_touch(low, high, below, above, first, last) - first) * MINUTE_MS


def coast(state: State, columns: Columns, when_ms: int, until_ms: int, rules: Rules) -> State:
    """The state after the uneventful minutes strictly between the two: only peak and fall have moved."""
    if not isinstance(state, Holding):
        return state
    first, last = columns.index_at(when_ms + MINUTE_MS), columns.index_at(until_ms)
    if first >= last:
        return state
    window = columns.prices[first:last]
    position = state.position
    for c in sorted({int(window.argmax()), int(window.argmin())}):
        position = watch(position, float(window[c]), when_ms + (c + 1) * MINUTE_MS, rules.settings)
    return Holding(position, state.last_slot_ms) if position is not state.position else state


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
        touched = (high[first:end] >= above) | (low[first:end] <= below)
        c = int(np.argmax(touched))
        if touched[c]:
            return first + c
        first, look = end, min(look * 4, _LONGEST_LOOK)
    return last
