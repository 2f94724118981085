"""Events of a live run in words, one line each."""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec

from backtest_kit.cli.strategy_file import where
from backtest_kit.model.event import (
    BreakevenReached,
    ClockJumped,
    EntryCancelled,
    EntryScheduled,
    Event,
    MinutesMissed,
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
from backtest_kit.model.interval import MINUTE_MS, iso
from backtest_kit.model.position import Position, RestingEntry
from backtest_kit.model.price import price_text
from backtest_kit.run.live.alarms import words_of
from backtest_kit.run.live.status import LiveStatus

TOLD: Final = (
    Recovered, EntryScheduled, EntryCancelled, PositionOpened, PositionChanged, PositionClosed, BreakevenReached,
    RiskRejected, OrderFailed, OrphanFound, StoreDegraded, StoreRecovered, StrategyFailed, MinutesMissed, ClockJumped,
    Paused, RunDone,
)  # fmt: skip
"""The kinds of events that have words: what somebody who watches wants to hear of. The error by which
a run fails is told by who awaits it."""


def words(event: Event) -> str:
    """What happened, without its time and its symbol."""
    match event:
        case Recovered():
            return _found(event)
        case EntryScheduled(entry=entry):
            return f"rests an order: {_entry(entry)}"
        case EntryCancelled(entry=entry, reason=reason):
            return f"gives up the {entry.position} entry at {price(entry.price_open)}: {_plain(reason)}"
        case PositionOpened(position=position):
            return f"opened {_position(position)}"
        case PositionChanged(position=position, change=change):
            return f"{_plain(change)}: {_position(position)}"
        case PositionClosed(trade=trade):
            return (
                f"closed {trade.position} at {price(trade.price_close)}, {_plain(trade.close_reason)}: "
                f"{trade.pnl_pct:+.2f} % ({trade.pnl_cost:+.2f})"
            )
        case BreakevenReached():
            return "has earned its costs: a stop at the entry price would not lose"
        case RiskRejected(risk_name=name, reason=reason):
            return f"signal refused by risk profile {name}: {reason}"
        case _:
            return _trouble(event)


def alarming(event: Event) -> bool:
    """Whether somebody should look."""
    if isinstance(event, OrderFailed):
        return event.alarm
    return isinstance(event, OrphanFound | StoreDegraded | StrategyFailed | RunFailed)


def document(event: Event) -> dict[str, Any]:
    """All of an event for a line of JSON."""
    fields = msgspec.to_builtins(event, enc_hook=lambda error: words_of(error))
    return {"action": event.action, "symbol": event.symbol, "when": iso(event.when_ms), **fields}


def standing(status: LiveStatus) -> str:
    """How a run stands, in one line."""
    parts = [f"at {price(status.price)}", side(status)]
    if status.position is not None:
        parts.append(f"{status.pnl_pct:+.2f} %")
    if status.to_take_profit_pct is not None:
        parts.append(f"{status.to_take_profit_pct:.2f} % to its take profit")
        parts.append(f"{status.to_stop_loss_pct:.2f} % to its stop loss")
    return ", ".join(parts + troubles(status))


def side(status: LiveStatus) -> str:
    """What is held."""
    if status.position is not None:
        return f"{status.direction} from {price(status.price_open)}"
    if status.entry is not None:
        return f"{status.direction} waits for {price(status.price_open)}"
    return "nothing held"


def troubles(status: LiveStatus) -> list[str]:
    """What is out of the ordinary."""
    said = []
    if status.degraded:
        said.append("DEGRADED")
    if status.no_entry:
        said.append("NO ENTRIES")
    if lost(status):
        said.append("LEASE LOST")
    if status.under_way:
        said.append(f"order {status.under_way} under way")
    if status.ended:
        said.append("ended")
    elif status.stopping:
        said.append("stopping")
    if status.paused:
        said.append("paused")
    if status.waiting and not status.ended:
        said.append(f"waiting: {status.waiting}")
    if status.missed:
        said.append(f"{_count(status.missed, 'minute')} missed")
    if status.written_ms > status.when_ms > 0:
        said.append(f"the clock is behind the last write, of {iso(status.written_ms)}")
    return [*said, *status.notes]


def lost(status: LiveStatus) -> bool:
    """Whether another process may trade the position by now."""
    return bool(status.holder) and not status.held and not status.ended


def awaited(status: LiveStatus) -> str:
    """What a run that is told to stop waits for."""
    if status.under_way:
        return f"for the outcome of order {status.under_way}"
    if status.position is not None:
        ends = status.position.expires_at_ms
        until = "" if math.isinf(ends) else f", or {iso(int(ends))}"
        levels = f"{price(status.position.take_profit)} or {price(status.position.stop_loss)}"
        return f"until its {status.direction} position ends by itself: at {levels}{until}"
    if status.entry is not None:
        return "for the next minute, to cancel its resting entry"
    return "for its start to be over" if not status.when_ms else "for nothing"


def price(value: float | None) -> str:
    """A price as people read it."""
    return "-" if value is None else price_text(value)


def _trouble(event: Event) -> str:
    match event:
        case OrderFailed(kind="check", reason=reason, next_step=next_step):
            return f"the venue does not tell how it stands there: {reason}; {next_step}"
        case OrderFailed(kind=kind, client_order_id=order_id, reason=reason, next_step=next_step):
            return f"order {order_id} to {_plain(kind)}: {reason}; {next_step}"
        case OrphanFound(what=what, reason=reason, next_step=next_step):
            return f"{_plain(what)}: {reason}; {next_step}"
        case StoreDegraded(reason=reason, kept=kept):
            aside = "the emergency file has what it lacks" if kept else "A CRASH NOW LOSES WHAT IT LACKS"
            return f"degraded, nothing new is opened: {reason}; {aside}"
        case StoreRecovered():
            return "the store has everything again"
        case StrategyFailed(what=what, error=error):
            return f"{what} raised {type(error).__name__}: {error}{where(error)}; the next minute goes on"
        case MinutesMissed(count=count, first_ms=first_ms, reason=reason):
            return f"{_count(count, 'minute')} from {iso(first_ms)} on missed: {reason}"
        case ClockJumped(by_ms=by_ms):
            return f"the wall clock was moved by {by_ms / 1000:+.1f} s"
        case Paused(paused=paused):
            return "paused: the strategy is not asked" if paused else "goes on: the strategy is asked again"
        case RunDone(cancelled=cancelled, trades=trades):
            closed = f"{_count(len(trades), 'position')} closed in this run"
            return f"ended at once and left as it is, {closed}" if cancelled else f"ended, {closed}"
        case RunFailed(error=error):
            return f"ended by an error: {words_of(error)}"
        case _:
            return event.action


def _found(event: Recovered) -> str:
    held = "nothing held"
    if event.position is not None:
        held = f"{_position(event.position)}, opened {iso(event.position.opened_at_ms)}"
    elif event.entry is not None:
        held = f"a resting order, {_entry(event.entry)}"
    down = f" {_count(event.down_ms // MINUTE_MS, 'minute')} after the last write" if event.down_ms else ""
    return "; ".join((f"starts{down}, with {held}", *event.steps))


def _position(position: Position) -> str:
    return (
        f"{position.position} {position.cost:g} from {price(position.price_open)}, "
        f"take profit {price(position.take_profit)}, stop loss {price(position.stop_loss)}"
    )


def _entry(entry: RestingEntry) -> str:
    return (
        f"{entry.position} {entry.cost:g} at {price(entry.price_open)}, "
        f"take profit {price(entry.price_take_profit)}, stop loss {price(entry.price_stop_loss)}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _plain(name: str) -> str:
    return name.replace("_", " ")
