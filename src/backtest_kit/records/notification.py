"""`Notification`: an event of a run as a message to people."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Final
from zlib import crc32

import msgspec

from backtest_kit.format import DESCRIBED, Severity, describe, severity
from backtest_kit.model.event import (
    BreakevenReached,
    EntryCancelled,
    EntryScheduled,
    Event,
    MarketEvent,
    MinutesMissed,
    OrderFailed,
    OrphanFound,
    PositionChanged,
    PositionClosed,
    PositionOpened,
    RiskRejected,
    RunFailed,
    StoreDegraded,
    StrategyFailed,
)
from backtest_kit.model.identity import Identity, Mode, OfRun
from backtest_kit.model.inner import Inner
from backtest_kit.model.interval import MINUTE_MS, floor_ms, iso, to_datetime
from backtest_kit.persist.codec import encode
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import ABSENT, Write

NOTIFICATION: Final = CONTRACTS["notification"]


class Notification(OfRun, frozen=True, kw_only=True):
    """A message about a run. The same event always makes the same notification, with the same id."""

    notification_id: str
    kind: str
    """What happened, as in `Event.action`: opened, closed, changed, scheduled, cancelled, rejected, failed, ..."""
    severity: Severity
    """"alarm": look now. "warning": something was refused or went wrong, and was dealt with."""
    identity: Identity
    when_ms: int
    signal_id: str = ""
    """Empty if it is not about a signal."""
    price: float | None = None
    pnl_pct: float | None = None
    """Of a closed position, in percent after costs."""
    pnl_cost: float | None = None
    reason: str = ""
    text: str
    """The message in one line, with the mode: on paper nothing was won or lost."""

    mode = Inner[Mode]("identity.mode")

    @property
    def when(self) -> datetime:
        return to_datetime(self.when_ms)


def notification_of(event: Event) -> Notification | None:
    """The notification of `event`; None for a kind that is not notified."""
    match event:
        case EntryScheduled() | PositionOpened():
            return _about(event, event.entry.signal_id)
        case EntryCancelled(entry=entry, reason=reason):
            return _about(event, entry.signal_id, reason=reason)
        case PositionChanged(position=position, change=change):
            state = f"{len(position.entries)} {len(position.reductions)} {position.take_profit} {position.stop_loss}"
            return _about(event, position.signal_id, reason=change, state=state)
        case PositionClosed(trade=trade):
            closed = _about(event, trade.signal_id, reason=trade.close_reason)
            return msgspec.structs.replace(closed, pnl_pct=trade.pnl_pct, pnl_cost=trade.pnl_cost)
        case RiskRejected(signal=signal, reason=reason):
            return _about(event, signal.id or "", reason=reason)
        case OrderFailed(reason=reason, attempt=attempt):
            return _about(event, reason=reason, state=str(attempt))
        case OrphanFound(what=what):
            return _about(event, reason=what)
        case StrategyFailed(error=error) | RunFailed(error=error):
            return _about(event, reason=f"{type(error).__name__}: {error}")
        case StoreDegraded(reason=reason) | MinutesMissed(reason=reason):
            return _about(event, reason=reason)
        case BreakevenReached():
            return None
        case _:
            return _about(event) if isinstance(event, DESCRIBED) else None


def notification_writes(events: Iterable[Event]) -> list[Write]:
    """A write for each event that is notified. It is refused if the notification was written before."""
    notifications = filter(None, map(notification_of, events))
    return [
        Write(NOTIFICATION, (each.mode == "backtest", each.notification_id), encode(each), each.when_ms, ABSENT)
        for each in {each.notification_id: each for each in notifications}.values()
    ]


def _about(event: Event, signal_id: str = "", *, reason: str = "", state: str = "") -> Notification:
    """`state` distinguishes what can happen several times in one minute."""
    identity, text = event.identity, describe(event)
    # What does not belong to a signal belongs to the run; the minute separates two of them.
    names = (identity.strategy_name, identity.exchange_name, identity.symbol)
    whose = signal_id or "-".join(names)
    minute = floor_ms(event.when_ms, MINUTE_MS)
    # With the names in it: those of another run can be the same text once they are joined.
    detail = f"-{crc32(f'{names} {text} {state}'.encode()):08x}" if state or not signal_id else ""
    return Notification(
        notification_id=f"{whose}-{event.action}-{minute}{detail}",
        kind=event.action,
        severity=severity(event),
        identity=identity,
        when_ms=event.when_ms,
        signal_id=signal_id,
        price=event.price if isinstance(event, MarketEvent) else None,
        reason=reason,
        text=f"{iso(event.when_ms)} {identity.mode} {identity.symbol} {identity.strategy_name}: {text}",
    )
