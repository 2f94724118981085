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

import math
from collections.abc import Iterator
from typing import Final, Literal

import msgspec

from backtest_kit.engine.position import LEVEL_STEP, close_trade, make_signal_id, open_position, watch
from backtest_kit.engine.validation import enters_now
from backtest_kit.model.event import (
    BreakevenReached,
    CancelReason,
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
from backtest_kit.model.inner import Inner
from backtest_kit.model.interval import MINUTE_MS, floor_ms
from backtest_kit.model.position import CloseReason, Position, RestingEntry
from backtest_kit.model.signal import Signal
from backtest_kit.settings import Settings

FillModel = Literal["vwap", "ohlc"]


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What stays the same during a run."""

    identity: Identity
    settings: Settings
    fill: FillModel = "vwap"
    """How levels are touched. "vwap": by the current price, filled at the level. "ohlc": by the wicks of
    the last minute, stop before take, a gap through the level filled at the open."""
    interval_ms: int
    """Length of a decision slot; a slot has one decision."""
    start_ms: int = 0
    """First minute of the frame, the origin of its grid."""
    grid_ms: int = MINUTE_MS
    """Decisions are taken only every so often from `start_ms`."""
    stop_ms: float = math.inf
    """Last minute of the frame: a position that is still open closes with `frame_end`. `inf` when live."""


class Tick(msgspec.Struct, frozen=True):
    """One minute as a step sees it: the current price, and the last closed candle."""

    when_ms: int
    price: float
    open: float
    high: float
    low: float
    close: float
    real: bool = True
    """False if the market published no candle, and the closed one was filled: nothing is decided,
    touched or filled then. Only the end of a frame does not wait."""

    @classmethod
    def flat(cls, when_ms: int, price: float) -> Tick:
        """A minute of which one price is known."""
        return cls(when_ms, price, price, price, price, price)


class Flat(msgspec.Struct, frozen=True, tag="flat", rename="camel"):
    """Nothing is held and nothing rests."""

    last_slot_ms: int = -1
    """Start of the decision slot that was used last."""
    last_signal_id: str = ""
    """The signal that was acted on last; the same id again is ignored."""


class Resting(msgspec.Struct, frozen=True, tag="resting", rename="camel"):
    """A limit order waits for its price."""

    entry: RestingEntry
    last_slot_ms: int
    order: Literal["", "cancel", "activate", "refuse"] = ""
    """What the next step carries out: a command, or the refusal of a risk profile."""


class Holding(msgspec.Struct, frozen=True, tag="holding", rename="camel"):
    """A position is open."""

    position: Position
    last_slot_ms: int
    closing: str | None = None
    """The note of a command to close, which the next step carries out; None without one."""

    entry = Inner[RestingEntry]("position.entry")


State = Flat | Resting | Holding
Wanted = frozenset[type[Event]]
"""The events on demand that have a listener."""

_NOTHING: Final[Wanted] = frozenset()


def decision_due(state: Flat, when_ms: int, rules: Rules) -> bool:
    """Whether the strategy is called at this minute: a new slot, on the frame's grid, before its last minute."""
    return (
        floor_ms(when_ms, rules.interval_ms) != state.last_slot_ms
        and (when_ms - rules.start_ms) % rules.grid_ms == 0
        and when_ms < rules.stop_ms
    )


def step(state: State, tick: Tick, rules: Rules, wanted: Wanted = _NOTHING) -> tuple[State, tuple[Event, ...]]:
    """What time, price and waiting commands do to the state at one minute. Deciding is `admit`'s part.

    Events that end or begin something are always made; those of a minute that changes nothing for
    good (active, waiting, peak, fall, level, breakeven) only where `wanted` has their type.
    """
    if not tick.real and tick.when_ms < rules.stop_ms:
        return state, ()
    if isinstance(state, Holding):
        return _step_holding(state, tick, rules, wanted)
    if isinstance(state, Resting):
        return _step_resting(state, tick, rules, wanted)
    return state, ()


def activates(state: Resting, tick: Tick, rules: Rules) -> bool:
    """Whether a step at this minute would open the resting entry."""
    return _cancel_reason(state, tick, rules) is None and _enters(state, tick)


def admit(state: Flat, signal: Signal | None, tick: Tick, rules: Rules) -> tuple[State, tuple[Event, ...]]:
    """Use up the decision slot, and act on the checked signal that the strategy answered, if any."""
    slot = floor_ms(tick.when_ms, rules.interval_ms)
    if signal is None or (signal.id is not None and signal.id == state.last_signal_id):
        return Flat(slot, state.last_signal_id), ()
    identity = rules.identity
    entry = RestingEntry(identity=identity, signal=_complete(signal, tick, rules), scheduled_at_ms=tick.when_ms)
    if enters_now(signal, tick.price):
        return _open(entry, slot, tick, rules)
    return Resting(entry, slot), (
        EntryScheduled(identity=identity, when_ms=tick.when_ms, price=tick.price, entry=entry),
    )


def _complete(signal: Signal, tick: Tick, rules: Rules) -> Signal:
    """The signal with all that it leaves to the settings and the market, in plain numbers."""
    settings = rules.settings
    return Signal(
        position=signal.position,
        price_take_profit=float(signal.price_take_profit),
        price_stop_loss=float(signal.price_stop_loss),
        price_open=float(tick.price if signal.price_open is None else signal.price_open),
        minutes=float(settings.CC_MAX_SIGNAL_LIFETIME_MINUTES if signal.minutes is None else signal.minutes),
        cost=float(settings.CC_POSITION_ENTRY_COST if signal.cost is None else signal.cost),
        note=signal.note,
        id=signal.id or make_signal_id(rules.identity, tick.when_ms),
    )


def _open(entry: RestingEntry, slot: int, tick: Tick, rules: Rules) -> tuple[State, tuple[Event, ...]]:
    position = open_position(entry, tick.when_ms, rules.settings)
    return Holding(position, slot), (
        PositionOpened(identity=rules.identity, when_ms=tick.when_ms, price=tick.price, position=position),
    )


def _step_resting(state: Resting, tick: Tick, rules: Rules, wanted: Wanted) -> tuple[State, tuple[Event, ...]]:
    entry, identity = state.entry, rules.identity
    reason = _cancel_reason(state, tick, rules)
    if reason is not None:
        cancelled = EntryCancelled(
            identity=identity, when_ms=tick.when_ms, price=tick.price, entry=entry, reason=reason
        )
        return Flat(state.last_slot_ms, entry.signal_id), (cancelled,)
    if _enters(state, tick):
        if state.order == "activate":
            # No one sells below the market: an entry that does not wait for its price takes today's.
            entry = entry.at(tick.price)
        return _open(entry, state.last_slot_ms, tick, rules)
    if EntryWaiting in wanted:
        return state, (EntryWaiting(identity=identity, when_ms=tick.when_ms, price=tick.price, entry=entry),)
    return state, ()


def _cancel_reason(state: Resting, tick: Tick, rules: Rules) -> CancelReason | None:
    entry = state.entry
    over = tick.when_ms >= rules.stop_ms
    if not tick.real:
        return "frame_end" if over else None
    if state.order in ("cancel", "refuse"):
        return "user" if state.order == "cancel" else "risk"
    if state.order == "activate":
        if not _between_levels(entry, tick.price):
            return "price_reject"
        return "frame_end" if over else None
    if tick.when_ms - entry.scheduled_at_ms >= rules.settings.CC_SCHEDULE_AWAIT_MINUTES * MINUTE_MS:
        return "timeout"
    if tick.low <= entry.price_stop_loss if entry.side == "long" else tick.high >= entry.price_stop_loss:
        return "price_reject"
    return "frame_end" if over else None


def _enters(state: Resting, tick: Tick) -> bool:
    entry = state.entry
    touched = tick.low <= entry.price_open if entry.side == "long" else tick.high >= entry.price_open
    return tick.real and (touched or state.order == "activate")


def _between_levels(entry: RestingEntry, price: float) -> bool:
    sign = 1.0 if entry.side == "long" else -1.0
    return sign * entry.price_stop_loss < sign * price < sign * entry.price_take_profit


def _step_holding(state: Holding, tick: Tick, rules: Rules, wanted: Wanted) -> tuple[State, tuple[Event, ...]]:
    position = state.position
    fill = _fill(state, tick, rules)
    if fill is not None:
        reason, price = fill
        trade = close_trade(position, reason, price, tick.when_ms, rules.settings, state.closing or "")
        closed = PositionClosed(identity=rules.identity, when_ms=tick.when_ms, price=tick.price, trade=trade)
        return Flat(state.last_slot_ms, position.signal_id), (closed,)
    watched = watch(position, tick.price, tick.when_ms, rules.settings)
    events = tuple(_progress(position, watched, tick, rules.identity, wanted)) if wanted else ()
    return Holding(watched, state.last_slot_ms), events


def _fill(state: Holding, tick: Tick, rules: Rules) -> tuple[CloseReason, float] | None:
    """Why and at what price the position closes at this minute."""
    if not tick.real:
        return "frame_end", tick.price
    if state.closing is not None:
        return "closed", tick.price
    if tick.when_ms >= state.position.expires_at_ms:
        return "time_expired", tick.price
    touched = _level_fill(state.position, tick, rules.fill)
    if touched is None and tick.when_ms >= rules.stop_ms:
        return "frame_end", tick.price
    return touched


def _progress(before: Position, position: Position, tick: Tick, identity: Identity, wanted: Wanted) -> Iterator[Event]:
    """The wanted events of one more open minute."""
    if PeakReached in wanted and position.peak is not before.peak:
        yield PeakReached(identity=identity, when_ms=tick.when_ms, price=tick.price, position=position)
    if FallReached in wanted and position.fall is not before.fall:
        yield FallReached(identity=identity, when_ms=tick.when_ms, price=tick.price, position=position)
    if PositionActive in wanted:
        yield PositionActive(identity=identity, when_ms=tick.when_ms, price=tick.price, position=position)
    if BreakevenReached in wanted and position.breakeven_reached and not before.breakeven_reached:
        yield BreakevenReached(identity=identity, when_ms=tick.when_ms, price=tick.price, position=position)
    if LevelReached in wanted:
        sides: tuple[tuple[Literal["profit", "loss"], int, int], ...] = (
            ("profit", before.profit_level, position.profit_level),
            ("loss", before.loss_level, position.loss_level),
        )
        for side, old, new in sides:
            for level in range(old + LEVEL_STEP, new + LEVEL_STEP, LEVEL_STEP):
                yield LevelReached(
                    identity=identity,
                    when_ms=tick.when_ms,
                    price=tick.price,
                    position=position,
                    side=side,
                    level=level,
                )


def _level_fill(position: Position, tick: Tick, fill: FillModel) -> tuple[CloseReason, float] | None:
    """Which level this minute touched, and the price that it fills at."""
    take, stop = position.take_profit, position.stop_loss
    long = position.side == "long"
    if fill == "vwap":
        if tick.price >= take if long else tick.price <= take:
            return "take_profit", take
        if tick.price <= stop if long else tick.price >= stop:
            return "stop_loss", stop
        return None
    # Inside one candle it is unknown which wick came first: the worse one is taken to have.
    if tick.low <= stop if long else tick.high >= stop:
        return "stop_loss", min(stop, tick.open) if long else max(stop, tick.open)
    if tick.high >= take if long else tick.low <= take:
        return "take_profit", max(take, tick.open) if long else min(take, tick.open)
    return None
