"""A live run as text: its state in one line, its events with the line of the strategy that raised."""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec

from backtest_kit.cli.strategy_file import where
from backtest_kit.format import DESCRIBED, count, describe, error_text
from backtest_kit.model.event import Event, RunFailed, StrategyFailed
from backtest_kit.model.interval import iso
from backtest_kit.model.price import price_text
from backtest_kit.run.live.status import LiveStatus

SHOWN: Final = tuple(kind for kind in DESCRIBED if kind is not RunFailed)
"""The kinds of events that are shown. The error by which a run fails is shown at its end."""


def words(event: Event) -> str:
    """The event as text, with the place in the strategy file if it failed."""
    return describe(event) + (where(event.error) if isinstance(event, StrategyFailed) else "")


def document(event: Event) -> dict[str, Any]:
    """All fields of an event, for a line of JSON."""
    fields = msgspec.to_builtins(event, enc_hook=error_text)
    return {"action": event.action, "symbol": event.symbol, "when": iso(event.when_ms), **fields}


def standing(status: LiveStatus) -> str:
    """The status of a run in one line."""
    parts = [f"at {price(status.price)}", side(status)]
    if status.position is not None:
        parts.append(f"{status.pnl_pct:+.2f} %")
    if status.to_take_profit_pct is not None:
        parts.append(f"{status.to_take_profit_pct:.2f} % to its take profit")
        parts.append(f"{status.to_stop_loss_pct:.2f} % to its stop loss")
    return ", ".join(parts + troubles(status))


def side(status: LiveStatus) -> str:
    """The open position or resting entry."""
    if status.position is not None:
        return f"{status.direction} from {price(status.price_open)}"
    if status.entry is not None:
        return f"{status.direction} waits for {price(status.price_open)}"
    return "no position"


def troubles(status: LiveStatus) -> list[str]:
    """What is unusual about a run."""
    found = []
    if status.degraded:
        found.append("DEGRADED")
    if status.no_entry:
        found.append("NO ENTRIES")
    if lost(status):
        found.append("LEASE LOST")
    if status.pending_order:
        found.append(f"order {status.pending_order} pending")
    if status.ended:
        found.append("ended")
    elif status.stopping:
        found.append("stopping")
    if status.paused:
        found.append("paused")
    if status.waiting and not status.ended:
        found.append(f"waiting: {status.waiting}")
    if status.missed:
        found.append(f"{count(status.missed, 'minute')} missed")
    if status.written_ms > status.when_ms > 0:
        found.append(f"the clock is behind the last write, of {iso(status.written_ms)}")
    return [*found, *status.notes]


def lost(status: LiveStatus) -> bool:
    """Whether another process may trade the position by now."""
    return bool(status.holder) and not status.held and not status.ended


def awaited(status: LiveStatus) -> str:
    """What a stopping run waits for."""
    if status.pending_order:
        return f"for the outcome of order {status.pending_order}"
    if status.position is not None:
        ends = status.position.expires_at_ms
        until = "" if math.isinf(ends) else f", or {iso(int(ends))}"
        levels = f"{price(status.position.take_profit)} or {price(status.position.stop_loss)}"
        return f"until its {status.direction} position closes: at {levels}{until}"
    if status.entry is not None:
        return "for the next minute, to cancel its resting entry"
    return "for its start to finish" if not status.when_ms else "for nothing"


def price(value: float | None) -> str:
    """A price as text."""
    return "-" if value is None else price_text(value)
