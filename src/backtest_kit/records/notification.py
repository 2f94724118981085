"""`Notification`: one event of a run, as people hear of it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Final, Literal
from zlib import crc32

import msgspec

from backtest_kit.model.event import (
    ClockJumped,
    EntryCancelled,
    EntryScheduled,
    Event,
    MinutesMissed,
    Mode,
    OrderFailed,
    OrphanFound,
    Paused,
    PositionChanged,
    PositionClosed,
    PositionOpened,
    Recovered,
    RiskRejected,
    RunDone,
    RunFailed,
    StoreDegraded,
    StoreRecovered,
    StrategyFailed,
)
from backtest_kit.model.interval import MINUTE_MS, floor_ms, iso, to_datetime
from backtest_kit.model.price import price_text
from backtest_kit.persist.codec import encode
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import ABSENT, Write

Severity = Literal["info", "warning", "alarm"]

NOTIFICATION: Final = CONTRACTS["notification"]


class Notification(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One thing that people should know. The same event always makes the same one, with the same id."""

    notification_id: str
    kind: str
    """What happened, as `Event.action` says it: opened, closed, changed, scheduled, cancelled, rejected, failed, ..."""
    severity: Severity
    """An alarm needs a look now; a warning says that something was refused."""
    mode: Mode
    symbol: str
    strategy_name: str
    exchange_name: str
    frame_name: str
    when_ms: int
    signal_id: str = ""
    """Empty where it is about no signal."""
    price: float | None = None
    pnl_pct: float | None = None
    """Of a closed position, in percent after costs."""
    pnl_cost: float | None = None
    reason: str = ""
    text: str
    """One line for people, with the mode: on paper nothing was won or lost."""

    @property
    def when(self) -> datetime:
        return to_datetime(self.when_ms)


def notification_of(event: Event) -> Notification | None:
    """The notification of `event`, or None if people need not know of it."""
    match event:
        case EntryScheduled():
            entry = event.entry
            what = f"{entry.position} entry at {price_text(entry.price_open)}"
            return _about(event, what, signal_id=entry.signal_id, price=event.price)
        case EntryCancelled():
            what = f"entry cancelled: {event.reason}"
            return _about(event, what, signal_id=event.entry.signal_id, price=event.price, reason=event.reason)
        case PositionOpened():
            held = event.position
            start, take, stop = map(price_text, (held.price_open, held.take_profit, held.stop_loss))
            what = f"{held.position} at {start}, take {take}, stop {stop}"
            return _about(event, what, signal_id=held.signal_id, price=event.price)
        case PositionChanged():
            what = event.change.replace("_", " ")
            now = event.position
            state = f"{len(now.entries)} {len(now.reductions)} {now.take_profit} {now.stop_loss}"
            return _about(event, what, signal_id=now.signal_id, price=event.price, reason=event.change, state=state)
        case PositionClosed():
            trade = event.trade
            what = f"{trade.close_reason.replace('_', ' ')} at {price_text(trade.price_close)}, {trade.pnl_pct:+.2f} %"
            told = _about(event, what, signal_id=trade.signal_id, price=event.price, reason=trade.close_reason)
            return msgspec.structs.replace(told, pnl_pct=trade.pnl_pct, pnl_cost=trade.pnl_cost)
        case RiskRejected():
            what = f"refused by {event.risk_name}: {event.reason}"
            signal_id = event.signal.id or ""
            return _about(event, what, "warning", signal_id=signal_id, price=event.price, reason=event.reason)
        case RunFailed():
            reason = f"{type(event.error).__name__}: {event.error}"
            return _about(event, reason, "alarm", reason=reason)
        case _:
            return _of_trading(event)


def _of_trading(event: Event) -> Notification | None:
    """The same for what only happens live and on paper: to the run, its orders, its store and its exchange."""
    match event:
        case Recovered():
            held = "with a position" if event.position is not None else "with an entry" if event.entry else "flat"
            steps = "".join(f"; {step}" for step in event.steps)
            return _about(event, f"{held}, after {event.down_ms // MINUTE_MS} minutes{steps}")
        case OrderFailed():
            what = f"{event.kind} {event.client_order_id}: {event.reason}; {event.next_step}"
            severity: Severity = "alarm" if event.alarm else "warning"
            return _about(event, what, severity, reason=event.reason, state=str(event.attempt))
        case StrategyFailed():
            reason = f"{type(event.error).__name__}: {event.error}"
            return _about(event, f"{event.what} raised {reason}", "alarm", reason=reason)
        case StoreDegraded():
            lacks = "" if event.kept else "; what it lacks is only in this process"
            return _about(event, f"nothing is opened: {event.reason}{lacks}", "alarm", reason=event.reason)
        case StoreRecovered():
            return _about(event, "the store has everything again")
        case OrphanFound():
            what = f"{event.what.replace('_', ' ')}: {event.reason}; {event.next_step}"
            return _about(event, what, "alarm", reason=event.what)
        case MinutesMissed():
            return _about(event, f"{event.count} minutes: {event.reason}", "warning", reason=event.reason)
        case ClockJumped():
            return _about(event, f"the wall clock was moved by {event.by_ms} ms", "warning")
        case Paused():
            return _about(event, "asks for no signals" if event.paused else "asks for signals again")
        case RunDone():
            how = "cancelled" if event.cancelled else "ended"
            return _about(event, f"{how}, {len(event.trades)} trades")
        case _:
            return None


def notification_writes(events: Iterable[Event]) -> list[Write]:
    """One write for each event that has a notification. It does nothing if that was written before."""
    told = filter(None, map(notification_of, events))
    return [
        Write(NOTIFICATION, (each.mode == "backtest", each.notification_id), encode(each), each.when_ms, ABSENT)
        for each in {each.notification_id: each for each in told}.values()
    ]


def _about(
    event: Event,
    what: str,
    severity: Severity = "info",
    *,
    signal_id: str = "",
    price: float | None = None,
    reason: str = "",
    state: str = "",
) -> Notification:
    """`state` separates what can happen several times in one minute."""
    identity = event.identity
    # What does not belong to a signal belongs to the run; the minute separates two of them.
    names = (identity.strategy_name, identity.exchange_name, identity.symbol)
    whose = signal_id or "-".join(names)
    minute = floor_ms(event.when_ms, MINUTE_MS)
    # With the names in it: those of another run can be the same text once they are joined.
    detail = f"-{crc32(f'{names} {what} {state}'.encode()):08x}" if state or not signal_id else ""
    return Notification(
        notification_id=f"{whose}-{event.action}-{minute}{detail}",
        kind=event.action,
        severity=severity,
        mode=identity.mode,
        symbol=identity.symbol,
        strategy_name=identity.strategy_name,
        exchange_name=identity.exchange_name,
        frame_name=identity.frame_name,
        when_ms=event.when_ms,
        signal_id=signal_id,
        price=price,
        reason=reason,
        text=f"{iso(event.when_ms)} {identity.mode} {identity.symbol} {identity.strategy_name}: {event.action} {what}",
    )
