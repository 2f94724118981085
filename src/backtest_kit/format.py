"""Numbers, errors and events as text, for the terminal, the log, notifications and pages."""

from __future__ import annotations

import math
from typing import Final, Literal

from backtest_kit.errors import BacktestKitError
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

Severity = Literal["info", "warning", "alarm"]

DESCRIBED: Final = (
    Recovered, EntryScheduled, EntryCancelled, PositionOpened, PositionChanged, PositionClosed, BreakevenReached,
    RiskRejected, OrderFailed, OrphanFound, StoreDegraded, StoreRecovered, StrategyFailed, MinutesMissed, ClockJumped,
    Paused, RunDone, RunFailed,
)  # fmt: skip
"""The kinds of events that `describe` has words for."""

NOT_AVAILABLE: Final = "N/A"

price: Final = price_text


def money(value: float | None) -> str:
    return number(value, 2, signed=True)


def signed_percent(value: float | None) -> str:
    return _with_unit(number(value, 2, signed=True))


def percent(value: float | None) -> str:
    return _with_unit(number(value, 2))


def ratio(value: float | None) -> str:
    return number(value, 3)


def minutes(value: float | None) -> str:
    return number(value, 1)


def negated_percent(value: float | None) -> str:
    return percent(None if value is None else -value)


def share(value: float | None) -> str:
    return percent(None if value is None else value * 100)


def plain(value: object) -> str:
    return NOT_AVAILABLE if value is None else str(value)


def number(value: float | None, decimals: int, *, signed: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return NOT_AVAILABLE
    rounded = round(value, decimals) + 0.0  # adding 0.0 turns -0.0 into 0.0
    return f"{'+' if signed and rounded > 0 else ''}{rounded:.{decimals}f}"


def _with_unit(text: str) -> str:
    return text if text == NOT_AVAILABLE else f"{text} %"


def error_text(error: BaseException) -> str:
    """An error in one line, with its type unless it is one of ours."""
    return str(error) if isinstance(error, BacktestKitError) else f"{type(error).__name__}: {error}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def severity(event: Event) -> Severity:
    """ "alarm": look now. "warning": something was refused or went wrong, and was dealt with."""
    match event:
        case OrderFailed(alarm=alarm):
            return "alarm" if alarm else "warning"
        case OrphanFound() | StoreDegraded() | StrategyFailed() | RunFailed():
            return "alarm"
        case RiskRejected() | MinutesMissed() | ClockJumped():
            return "warning"
        case _:
            return "info"


def describe(event: Event) -> str:
    """What happened, in one line without time and symbol; only the action for kinds outside of `DESCRIBED`."""
    match event:
        case Recovered():
            return _recovered(event)
        case EntryScheduled(entry=entry):
            return f"resting order placed: {_entry(entry)}"
        case EntryCancelled(entry=entry, reason=reason):
            return f"resting {entry.side} order at {price(entry.price_open)} cancelled: {_spaced(reason)}"
        case PositionOpened(position=position):
            return f"opened {_position(position)}"
        case PositionChanged(position=position, change=change):
            return f"{_spaced(change)}: {_position(position)}"
        case PositionClosed(trade=trade):
            return (
                f"closed {trade.side} at {price(trade.price_close)}, {_spaced(trade.close_reason)}: "
                f"{trade.pnl_pct:+.2f} % ({trade.pnl_cost:+.2f})"
            )
        case BreakevenReached():
            return "breakeven reached: a stop at the entry price would not lose"
        case RiskRejected(risk_name=name, reason=reason):
            return f"signal rejected by risk profile {name}: {reason}"
        case _:
            return _describe_run(event)


def _describe_run(event: Event) -> str:
    match event:
        case OrderFailed(kind="check", reason=reason, next_step=next_step):
            return f"the exchange did not report the order: {reason}; {next_step}"
        case OrderFailed(kind=kind, client_order_id=order_id, reason=reason, next_step=next_step):
            return f"order {order_id} to {_spaced(kind)} failed: {reason}; {next_step}"
        case OrphanFound(what=what, reason=reason, next_step=next_step):
            return f"{_spaced(what)}: {reason}; {next_step}"
        case StoreDegraded(reason=reason, kept=kept):
            aside = "the emergency file has the missing writes" if kept else "A CRASH NOW LOSES THE MISSING WRITES"
            return f"degraded, opens nothing new: {reason}; {aside}"
        case StoreRecovered():
            return "recovered: the store has all writes"
        case StrategyFailed(what=what, error=error):
            return f"{what} raised {type(error).__name__}: {error}; the run goes on at the next minute"
        case MinutesMissed(count=missed, first_ms=first_ms, reason=reason):
            return f"missed {count(missed, 'minute')} from {iso(first_ms)}: {reason}"
        case ClockJumped(by_ms=by_ms):
            return f"the system clock moved by {by_ms / 1000:+.1f} s"
        case Paused(paused=paused):
            return "paused: the strategy is not called" if paused else "resumed: the strategy is called again"
        case RunDone(cancelled=cancelled, trades=trades):
            closed = f"{count(len(trades), 'position')} closed in this run"
            return f"ended immediately, open positions left as they are, {closed}" if cancelled else f"ended, {closed}"
        case RunFailed(error=error):
            return f"failed: {error_text(error)}"
        case _:
            return event.action


def _recovered(event: Recovered) -> str:
    state = "no position"
    if event.position is not None:
        state = f"{_position(event.position)}, opened {iso(event.position.opened_at_ms)}"
    elif event.entry is not None:
        state = f"a resting order, {_entry(event.entry)}"
    down = f" {count(event.down_ms // MINUTE_MS, 'minute')} after the last write," if event.down_ms else ""
    return "; ".join((f"starts{down} with {state}", *event.steps))


def _position(position: Position) -> str:
    return (
        f"{position.side} {position.cost:g} from {price(position.price_open)}, "
        f"take profit {price(position.take_profit)}, stop loss {price(position.stop_loss)}"
    )


def _entry(entry: RestingEntry) -> str:
    return (
        f"{entry.side} {entry.cost:g} at {price(entry.price_open)}, "
        f"take profit {price(entry.price_take_profit)}, stop loss {price(entry.price_stop_loss)}"
    )


def _spaced(name: str) -> str:
    return name.replace("_", " ")
