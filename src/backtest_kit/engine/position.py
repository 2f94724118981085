"""An open position through time: its id, its peak and fall, the levels it reaches, the trade it becomes."""

from __future__ import annotations

from typing import Final
from zlib import crc32

import msgspec

from backtest_kit.engine.pnl import effective_price, profit, result
from backtest_kit.model.identity import Identity
from backtest_kit.model.interval import to_datetime
from backtest_kit.model.position import (
    CloseReason,
    Entry,
    Execution,
    Extreme,
    Position,
    RestingEntry,
    Trade,
)
from backtest_kit.settings import Settings

_ROUNDING: Final = 1e-9
_NO_MARKS: Final = str.maketrans("", "", "-:T")
LEVEL_STEP: Final = 10
"""Levels of the way to take profit and stop loss are tenths, in percent."""


def make_signal_id(identity: Identity, when_ms: int) -> str:
    """The id of a signal that brings none: the same run makes the same ids, and a venue takes it as order id.

    At most 32 characters out of letters, digits and dashes.
    """
    symbol = identity.symbol[:10]
    if not (symbol.isascii() and symbol.isalnum()):
        symbol = "".join(letter for letter in symbol if letter.isascii() and letter.isalnum())
    scope = f"{identity.symbol}\0{identity.strategy_name}\0{identity.exchange_name}"
    minute = to_datetime(when_ms).isoformat(timespec="minutes")[:16].translate(_NO_MARKS)
    return f"{symbol}-{minute}-{crc32(scope.encode()):08x}"


def open_position(
    entry: RestingEntry, when_ms: int, settings: Settings, execution: Execution | None = None
) -> Position:
    """The position that an entry becomes when it is filled at its price."""
    entries = (Entry(entry.price_open, entry.cost, when_ms, execution),)
    pct, cost = profit(entry.side, entries, (), entry.price_open, settings)
    return Position(
        entry=entry,
        opened_at_ms=when_ms,
        entries=entries,
        peak=Extreme(entry.price_open, when_ms, 0.0, 0.0),
        fall=Extreme(entry.price_open, when_ms, pct, cost),
    )


def watch(position: Position, price: float, when_ms: int, settings: Settings) -> Position:
    """The position after a minute at `price`: its peak, its fall, and the levels it has reached."""
    entry = effective_price(position.entries, position.reductions)
    sign = 1.0 if position.side == "long" else -1.0
    gain = sign * (price - entry)
    position = _with_extremes(position, entry, price, when_ms, settings)
    if gain > 0:
        level = _level(gain, sign * (position.take_profit - entry))
        if level > position.profit_level:
            position = msgspec.structs.replace(position, profit_level=level)
        if not position.breakeven_reached and gain >= entry * breakeven_pct(settings) / 100:
            position = msgspec.structs.replace(position, breakeven_reached=True)
    elif gain < 0:
        level = _level(-gain, sign * (entry - position.stop_loss))
        if level > position.loss_level:
            position = msgspec.structs.replace(position, loss_level=level)
    return position


def is_simple(position: Position) -> bool:
    """Whether it is one entry, of which nothing was taken: the better the price, the better it is off."""
    return len(position.entries) == 1 and not position.reductions


def _with_extremes(position: Position, entry: float, price: float, when_ms: int, settings: Settings) -> Position:
    """With a new peak or a new fall, if the position has never been so well, or so badly, off.

    For a simple position the prices show that. What was added or taken moves the profit at a price, so
    then profits are compared. The first step to the side of profit takes the place of the opening.
    """
    sign = 1.0 if position.side == "long" else -1.0
    peak, fall = position.peak, position.fall
    better, worse = sign * price > sign * peak.price, sign * price < sign * fall.price
    if is_simple(position) and not better and not worse:
        return position
    pct, cost = profit(position.side, position.entries, position.reductions, price, settings)
    if not is_simple(position):
        opening = peak.timestamp == position.opened_at_ms and sign * (price - entry) > 0
        better, worse = pct > peak.pnl_pct or opening, pct < fall.pnl_pct
    if better:
        position = msgspec.structs.replace(position, peak=Extreme(price, when_ms, pct, cost))
    if worse:
        position = msgspec.structs.replace(position, fall=Extreme(price, when_ms, pct, cost))
    return position


def breakeven_pct(settings: Settings) -> float:
    """How far a price must have come, in percent of the entry, for a stop at the entry to be safe: the costs of
    the round trip and CC_BREAKEVEN_THRESHOLD."""
    return 2 * (settings.CC_PERCENT_SLIPPAGE + settings.CC_PERCENT_FEE) + settings.CC_BREAKEVEN_THRESHOLD


def _level(gone: float, way: float) -> int:
    """Full tenths of the way, in percent; a level behind the entry price is reached immediately."""
    return 100 if way <= gone else int(gone / way * 10) * LEVEL_STEP


def close_trade(
    position: Position,
    reason: CloseReason,
    price: float,
    when_ms: int,
    settings: Settings,
    close_note: str = "",
    execution: Execution | None = None,
) -> Trade:
    """The trade that a position becomes when all that is left of it is closed at `price`."""
    entries, reductions = position.entries, position.reductions
    entry = effective_price(entries, reductions)
    fee = None if execution is None else execution.fee
    pct, cost, fees = result(position.side, entries, reductions, price, settings, fee)
    position = _with_extremes(position, entry, price, when_ms, settings)
    if reason in ("stop_loss", "trailing_stop"):
        reason = _stop_reason(position, entry)
    return Trade(
        position=position,
        closed_at_ms=when_ms,
        price_open=entry,
        price_close=price,
        close_reason=reason,
        pnl_pct=pct,
        pnl_cost=cost,
        fees=fees,
        execution=execution,
        close_note=close_note,
    )


def _stop_reason(position: Position, entry: float) -> CloseReason:
    moved, sign = position.moved_stop_loss, 1.0 if position.side == "long" else -1.0
    # A stop at breakeven is at the entry price, which adding up the rest of the position may round anew.
    beyond = moved is not None and sign * (moved - entry) > _ROUNDING * entry
    return "trailing_stop" if beyond else "stop_loss"
