"""The state of a live run as a value, for the terminal and the handle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from backtest_kit.engine.pnl import effective_price, profit
from backtest_kit.engine.step import Flat, Holding
from backtest_kit.model.identity import Identity
from backtest_kit.model.position import Position, RestingEntry
from backtest_kit.model.signal import Direction
from backtest_kit.run.live.run import LiveRun


class LiveStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A live run at one moment. Prices are absolute, distances in percent of the current price."""

    identity: Identity
    when_ms: int
    """The current minute."""
    next_ms: int
    """The next minute."""
    next_decision_ms: int | None = None
    """The minute at which `get_signal` is called next; None while a position is open or an entry rests."""
    price: float
    position: Position | None = None
    entry: RestingEntry | None = None
    direction: Direction | None = None
    price_open: float | None = None
    """Effective entry price of the position, or the price that the entry waits for."""
    pnl_pct: float | None = None
    """After fees and slippage, if all were closed now."""
    pnl_cost: float | None = None
    to_take_profit_pct: float | None = None
    """Distance of the price from the take profit in force; below 0 it is beyond."""
    to_stop_loss_pct: float | None = None
    pending_order: str = ""
    """Client order id of an order whose outcome is not known yet."""
    paused: bool = False
    stopping: bool = False
    degraded: str = ""
    """Why the store rejects writes; empty if it works."""
    no_entry: str = ""
    """Why nothing is opened although the store works; empty if entries are allowed."""
    written_ms: int = -1
    """The last minute that was stored."""
    holder: str = ""
    """The process that has the position, and since when."""
    held: bool = False
    """Whether this process still has it."""
    ended: bool = False
    """Whether the run is over."""
    clock_drift_ms: int | None = None
    """How far the exchange's clock is ahead of this machine's, if known. Beyond a second the run uses the exchange's
    time, and logs that."""
    waiting: str = ""
    """Why nothing is decided at the moment, such as a missing candle; empty while the run acts."""
    notes: tuple[str, ...] = ()
    """Notes about the broker."""
    missed: int = 0
    """Minutes that passed without a decision."""
    gaps_filled: int = 0
    """Minutes without a candle that were taken as flat."""
    repairs: Mapping[str, int] = msgspec.field(default_factory=dict)
    """Rows of the exchange that were repaired, by what was done to them: see `REPAIRS`."""
    trades: int = 0
    """Positions that were closed in this run."""


def status_of(run: LiveRun, *, ended: bool) -> LiveStatus:
    now, state, tick = run.position_store.position_state, run.run_state.state, run.run_state.tick
    job, lease = run.job, run.lease
    held: dict[str, Any] = {}
    if isinstance(state, Flat):
        slot_ends = state.last_slot_ms + job.rules.interval_ms if state.last_slot_ms >= 0 else 0
        held = {"next_decision_ms": max(run.next_ms, slot_ends)}
    elif isinstance(state, Holding):
        position = state.position
        pct, cost = profit(position.side, position.entries, position.reductions, tick.price, job.settings)
        held = {
            "position": position,
            "direction": position.side,
            "price_open": effective_price(position.entries, position.reductions),
            "pnl_pct": pct,
            "pnl_cost": cost,
            **_distances(position.side, tick.price, position.take_profit, position.stop_loss),
        }
    else:
        entry = state.entry
        held = {
            "entry": entry,
            "direction": entry.side,
            "price_open": entry.price_open,
            **_distances(entry.side, tick.price, entry.price_take_profit, entry.price_stop_loss),
        }
    return LiveStatus(
        identity=job.identity,
        when_ms=run.when_ms,
        next_ms=run.next_ms,
        price=tick.price,
        pending_order="" if now.intent is None else now.intent.order.client_order_id,
        paused=now.paused,
        stopping=run.flags.stopping,
        degraded=run.position_store.degraded,
        no_entry=run.flags.no_entry if run.began.is_set() else "",
        written_ms=run.position_store.written_ms,
        holder="" if lease is None else str(lease.holder),
        held=lease is not None and lease.held,
        ended=ended,
        clock_drift_ms=run.job.time.drift_ms,
        waiting=run.waiting,
        notes=job.broker.notes,
        missed=run.missed.total,
        gaps_filled=run.candles.filled,
        repairs=run.candles.repairs,
        trades=len(run.hooks.trades),
        **held,
    )


def _distances(direction: Direction, price: float, take: float, stop: float) -> dict[str, float]:
    sign = 1.0 if direction == "long" else -1.0
    if not price:
        return {}
    return {
        "to_take_profit_pct": sign * (take - price) / price * 100,
        "to_stop_loss_pct": sign * (price - stop) / price * 100,
    }
