"""An open position through time: its id, its peak and fall, the levels it reaches, the trade it becomes."""

from __future__ import annotations

from typing import Final
from zlib import crc32

import msgspec

from backtest_kit.engine.pnl import effective_price, profit
from backtest_kit.model.event import Identity
from backtest_kit.model.interval import to_datetime
from backtest_kit.model.position import CloseReason, Extreme, Position, Trade
from backtest_kit.settings import Settings

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


def watch(position: Position, price: float, when_ms: int, settings: Settings) -> Position:
    """The position after a minute at `price`: its peak, its fall, and the levels it has reached."""
    entry = effective_price(position.entries, position.reductions)
    sign = 1.0 if position.position == "long" else -1.0
    gain = sign * (price - entry)
    if gain > 0:
        if sign * price > sign * position.peak.price:
            pct, cost = profit(position.position, position.entries, position.reductions, price, settings)
            position = msgspec.structs.replace(position, peak=Extreme(price, when_ms, pct, cost))
        level = _level(gain, sign * (position.take_profit - entry))
        if level > position.profit_level:
            position = msgspec.structs.replace(position, profit_level=level)
        if not position.breakeven_reached and gain >= entry * breakeven_pct(settings) / 100:
            position = msgspec.structs.replace(position, breakeven_reached=True)
    elif gain < 0:
        if sign * price < sign * position.fall.price:
            pct, cost = profit(position.position, position.entries, position.reductions, price, settings)
            position = msgspec.structs.replace(position, fall=Extreme(price, when_ms, pct, cost))
        level = _level(-gain, sign * (entry - position.stop_loss))
        if level > position.loss_level:
            position = msgspec.structs.replace(position, loss_level=level)
    return position


def breakeven_pct(settings: Settings) -> float:
    """How far a price must have come, in percent of the entry, for a stop at the entry to be safe: the costs of
    the round trip and CC_BREAKEVEN_THRESHOLD."""
    return 2 * (settings.CC_PERCENT_SLIPPAGE + settings.CC_PERCENT_FEE) + settings.CC_BREAKEVEN_THRESHOLD


def _level(gone: float, way: float) -> int:
    """Full tenths of the way, in percent; a level that lies behind the entry price is reached at once."""
    return 100 if way <= gone else int(gone / way * 10) * LEVEL_STEP


def close_trade(
    position: Position, reason: CloseReason, price: float, when_ms: int, settings: Settings, close_note: str = ""
) -> Trade:
    """The trade that a position becomes when all that is left of it is closed at `price`."""
    entry = effective_price(position.entries, position.reductions)
    pct, cost = profit(position.position, position.entries, position.reductions, price, settings)
    sign = 1.0 if position.position == "long" else -1.0
    best, worst = max(sign * entry, sign * position.peak.price), min(sign * entry, sign * position.fall.price)
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
        price_open=entry,
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
        peak_pct=pct if sign * price > best else position.peak.pnl_pct,
        fall_pct=pct if sign * price < worst else position.fall.pnl_pct,
        entries=position.entries,
        reductions=position.reductions,
        note=position.note,
        close_note=close_note,
    )
