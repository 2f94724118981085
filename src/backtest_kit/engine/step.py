"""The state machine: one pure step from minute to minute, the same in backtest, paper and live.

```
Flat -- admit --> Holding -- step --> Flat
  |                  ^
  +----> Resting ----+  (or back to Flat: timeout, price_reject)
```

A step at minute t knows the candles that closed by t. It makes at most one transition; what follows
from that transition is decided at t + 1 minute at the earliest.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import msgspec

from backtest_kit.engine.pnl import effective_price, profit
from backtest_kit.engine.validation import enters_now
from backtest_kit.model.event import (
    EntryCancelled,
    EntryScheduled,
    Event,
    Identity,
    PositionClosed,
    PositionOpened,
)
from backtest_kit.model.interval import MINUTE_MS, floor_ms, to_datetime
from backtest_kit.model.position import CloseReason, Entry, Extreme, Position, RestingEntry, Trade
from backtest_kit.model.signal import Signal
from backtest_kit.settings import Settings

Fill = Literal["vwap", "ohlc"]


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What stays the same during a run."""

    identity: Identity
    settings: Settings
    fill: Fill = "vwap"
    """How levels are touched. "vwap": by the current price, filled at the level. "ohlc": by the wicks of
    the last minute, stop before take, a gap through the level filled at the open."""
    interval_ms: int
    """Length of a decision slot; a slot has one decision."""
    start_ms: int = 0
    """First minute of the frame, the origin of its grid."""
    grid_ms: int = MINUTE_MS
    """Decisions are taken only every so often from `start_ms`."""
    stop_ms: float = math.inf
    """Last minute of the frame: what is still open there closes with `frame_end`. `inf` when live."""


class Tick(msgspec.Struct, frozen=True):
    """One minute as a step sees it: the current price, and the last closed candle."""

    when_ms: int
    price: float
    open: float
    high: float
    low: float
    close: float


class Flat(msgspec.Struct, frozen=True):
    """Nothing is held and nothing rests."""

    last_slot_ms: int = -1
    """Start of the decision slot that was used last."""
    last_signal_id: str = ""
    """The signal that was acted on last; the same id again is ignored."""


class Resting(msgspec.Struct, frozen=True):
    """A limit order waits for its price."""

    entry: RestingEntry
    last_slot_ms: int


class Holding(msgspec.Struct, frozen=True):
    """A position is open."""

    position: Position
    last_slot_ms: int


State = Flat | Resting | Holding


def decision_due(state: Flat, when_ms: int, rules: Rules) -> bool:
    """Whether the strategy is asked at this minute: a new slot, on the frame's grid, before its last minute."""
    return (
        floor_ms(when_ms, rules.interval_ms) != state.last_slot_ms
        and (when_ms - rules.start_ms) % rules.grid_ms == 0
        and when_ms < rules.stop_ms
    )


def step(state: State, tick: Tick, rules: Rules) -> tuple[State, tuple[Event, ...]]:
    """What time and price do to the state at one minute. Deciding is not part of it: see `admit`."""
    if isinstance(state, Holding):
        return _step_holding(state, tick, rules)
    if isinstance(state, Resting):
        return _step_resting(state, tick, rules)
    return state, ()


def admit(state: Flat, signal: Signal | None, tick: Tick, rules: Rules) -> tuple[State, tuple[Event, ...]]:
    """Use up the decision slot, and act on the checked signal that the strategy answered, if any."""
    slot = floor_ms(tick.when_ms, rules.interval_ms)
    if signal is None or (signal.id is not None and signal.id == state.last_signal_id):
        return Flat(slot, state.last_signal_id), ()
    identity, settings = rules.identity, rules.settings
    entry = RestingEntry(
        signal_id=signal.id or make_signal_id(identity, tick.when_ms),
        symbol=identity.symbol,
        strategy_name=identity.strategy_name,
        exchange_name=identity.exchange_name,
        frame_name=identity.frame_name,
        position=signal.position,
        price_open=float(tick.price if signal.price_open is None else signal.price_open),
        price_take_profit=float(signal.price_take_profit),
        price_stop_loss=float(signal.price_stop_loss),
        minutes=float(settings.CC_MAX_SIGNAL_LIFETIME_MINUTES if signal.minutes is None else signal.minutes),
        cost=float(settings.CC_POSITION_ENTRY_COST if signal.cost is None else signal.cost),
        scheduled_at_ms=tick.when_ms,
        note=signal.note,
    )
    if enters_now(signal, tick.price):
        return _open(entry, slot, tick, rules)
    return Resting(entry, slot), (
        EntryScheduled(identity=identity, when_ms=tick.when_ms, price=tick.price, entry=entry),
    )


def make_signal_id(identity: Identity, when_ms: int) -> str:
    """The id of a signal that brings none: the same run makes the same ids, and a venue takes it as order id.

    At most 32 characters out of letters, digits and dashes.
    """
    scope = "\0".join((identity.symbol, identity.strategy_name, identity.exchange_name))
    digest = hashlib.blake2b(scope.encode(), digest_size=4).hexdigest()
    symbol = "".join(letter for letter in identity.symbol[:10] if letter.isascii() and letter.isalnum())
    return f"{symbol}-{to_datetime(when_ms):%Y%m%d%H%M}-{digest}"


def _open(entry: RestingEntry, slot: int, tick: Tick, rules: Rules) -> tuple[State, tuple[Event, ...]]:
    entries = (Entry(entry.price_open, entry.cost, tick.when_ms),)
    pct, cost = profit(entry.position, entries, (), entry.price_open, rules.settings)
    position = Position(
        signal_id=entry.signal_id,
        symbol=entry.symbol,
        strategy_name=entry.strategy_name,
        exchange_name=entry.exchange_name,
        frame_name=entry.frame_name,
        position=entry.position,
        price_open=entry.price_open,
        price_take_profit=entry.price_take_profit,
        price_stop_loss=entry.price_stop_loss,
        minutes=entry.minutes,
        scheduled_at_ms=entry.scheduled_at_ms,
        opened_at_ms=tick.when_ms,
        entries=entries,
        peak=Extreme(entry.price_open, tick.when_ms, 0.0, 0.0),
        fall=Extreme(entry.price_open, tick.when_ms, pct, cost),
        note=entry.note,
    )
    return Holding(position, slot), (
        PositionOpened(identity=rules.identity, when_ms=tick.when_ms, price=tick.price, position=position),
    )


def _step_resting(state: Resting, tick: Tick, rules: Rules) -> tuple[State, tuple[Event, ...]]:
    entry = state.entry
    long = entry.position == "long"
    reason: Literal["timeout", "price_reject", "frame_end"] | None = None
    if tick.when_ms - entry.scheduled_at_ms >= rules.settings.CC_SCHEDULE_AWAIT_MINUTES * MINUTE_MS:
        reason = "timeout"
    elif tick.low <= entry.price_stop_loss if long else tick.high >= entry.price_stop_loss:
        reason = "price_reject"
    elif tick.low <= entry.price_open if long else tick.high >= entry.price_open:
        if tick.when_ms < rules.stop_ms:
            return _open(entry, state.last_slot_ms, tick, rules)
        reason = "frame_end"
    elif tick.when_ms >= rules.stop_ms:
        reason = "frame_end"
    if reason is None:
        return state, ()
    cancelled = EntryCancelled(
        identity=rules.identity, when_ms=tick.when_ms, price=tick.price, entry=entry, reason=reason
    )
    return Flat(state.last_slot_ms, entry.signal_id), (cancelled,)


def _step_holding(state: Holding, tick: Tick, rules: Rules) -> tuple[State, tuple[Event, ...]]:
    position = state.position
    fill = _level_fill(position, tick, rules.fill)
    if tick.when_ms >= position.expires_at_ms:
        fill = "time_expired", tick.price
    elif fill is None and tick.when_ms >= rules.stop_ms:
        fill = "frame_end", tick.price
    if fill is None:
        return Holding(watch(position, tick.price, tick.when_ms, rules.settings), state.last_slot_ms), ()
    reason, price = fill
    trade = close_trade(position, reason, price, tick.when_ms, rules.settings)
    closed = PositionClosed(identity=rules.identity, when_ms=tick.when_ms, price=tick.price, trade=trade)
    return Flat(state.last_slot_ms, position.signal_id), (closed,)


def _level_fill(position: Position, tick: Tick, fill: Fill) -> tuple[CloseReason, float] | None:
    """Which level this minute touched, and the price that it fills at."""
    take, stop = position.take_profit, position.stop_loss
    long = position.position == "long"
    if fill == "vwap":
        if tick.price >= take if long else tick.price <= take:
            return "take_profit", take
        if tick.price <= stop if long else tick.price >= stop:
            return "stop_loss", stop
        return None
    # Inside one candle nobody knows which wick came first: the worse one is taken to have.
    if tick.low <= stop if long else tick.high >= stop:
        return "stop_loss", min(stop, tick.open) if long else max(stop, tick.open)
    if tick.high >= take if long else tick.low <= take:
        return "take_profit", max(take, tick.open) if long else min(take, tick.open)
    return None


def watch(position: Position, price: float, when_ms: int, settings: Settings) -> Position:
    """The position with its peak and fall brought up to `price`."""
    entry = effective_price(position.entries, position.reductions)
    sign = 1.0 if position.position == "long" else -1.0
    if sign * price > sign * entry and sign * price > sign * position.peak.price:
        pct, cost = profit(position.position, position.entries, position.reductions, price, settings)
        return msgspec.structs.replace(position, peak=Extreme(price, when_ms, pct, cost))
    if sign * price < sign * entry and sign * price < sign * position.fall.price:
        pct, cost = profit(position.position, position.entries, position.reductions, price, settings)
        return msgspec.structs.replace(position, fall=Extreme(price, when_ms, pct, cost))
    return position


def close_trade(position: Position, reason: CloseReason, price: float, when_ms: int, settings: Settings) -> Trade:
    """The trade that a position becomes when all that is left of it is closed at `price`."""
    pct, cost = profit(position.position, position.entries, position.reductions, price, settings)
    return Trade(
        signal_id=position.signal_id,
        symbol=position.symbol,
        strategy_name=position.strategy_name,
        exchange_name=position.exchange_name,
        frame_name=position.frame_name,
        position=position.position,
        scheduled_at_ms=position.scheduled_at_ms,
        opened_at_ms=position.opened_at_ms,
        closed_at_ms=when_ms,
        price_open=effective_price(position.entries, position.reductions),
        price_close=price,
        price_take_profit=position.take_profit,
        price_stop_loss=position.stop_loss,
        original_price_open=position.price_open,
        original_price_take_profit=position.price_take_profit,
        original_price_stop_loss=position.price_stop_loss,
        close_reason=reason,
        cost=position.cost,
        pnl_pct=pct,
        pnl_cost=cost,
        peak_pct=position.peak.pnl_pct,
        fall_pct=position.fall.pnl_pct,
        entries=position.entries,
        reductions=position.reductions,
        note=position.note,
    )
