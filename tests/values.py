"""Signals, entries, positions and trades for tests: a long of BTCUSDT, but for what a test says."""

from __future__ import annotations

import msgspec

import backtest_kit as bk
from backtest_kit.model.identity import Identity
from backtest_kit.model.position import CloseReason, Entry, Extreme, Position, RestingEntry, Trade
from backtest_kit.model.signal import Direction, Signal

IDENTITY = Identity("BTCUSDT", "trend", "binance", "", "live")


def make_entry(
    signal_id: str = "s-1",
    side: Direction = "long",
    *,
    identity: Identity = IDENTITY,
    price: float = 100.0,
    take: float = 110.0,
    stop: float = 90.0,
    minutes: float = 60.0,
    cost: float = 100.0,
    at_ms: int = 0,
    note: str = "",
) -> RestingEntry:
    signal = Signal(side, take, stop, price, minutes, cost, note, signal_id)
    return RestingEntry(identity=identity, signal=signal, scheduled_at_ms=at_ms)


def make_position(
    entry: RestingEntry | None = None, opened_at_ms: int | None = None, entries: tuple[Entry, ...] = ()
) -> Position:
    """What `entry` becomes: by default when it is placed, at its price and for its cost."""
    entry = entry or make_entry()
    at_ms = entry.scheduled_at_ms if opened_at_ms is None else opened_at_ms
    extreme = Extreme(entry.price_open, at_ms, 0.0, 0.0)
    entries = entries or (Entry(entry.price_open, entry.cost, at_ms),)
    return Position(entry=entry, opened_at_ms=at_ms, entries=entries, peak=extreme, fall=extreme)


def make_trade(
    position: Position | None = None,
    *,
    closed_at_ms: int = 0,
    price_close: float = 110.0,
    reason: CloseReason = "take_profit",
    pnl_pct: float = 9.5,
    peak_pct: float | None = None,
    fall_pct: float = 0.0,
    fees: float = 0.1,
) -> Trade:
    position = position or make_position()
    peak, fall = position.peak, position.fall
    position = msgspec.structs.replace(
        position,
        peak=msgspec.structs.replace(peak, pnl_pct=pnl_pct if peak_pct is None else peak_pct),
        fall=msgspec.structs.replace(fall, pnl_pct=fall_pct),
    )
    return bk.Trade(
        position=position,
        closed_at_ms=closed_at_ms,
        price_open=position.price_open,
        price_close=price_close,
        close_reason=reason,
        pnl_pct=pnl_pct,
        pnl_cost=pnl_pct * position.cost / 100,
        fees=fees,
    )
