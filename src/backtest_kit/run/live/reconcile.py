"""Compares the position on the exchange with the one in the store. Everything here is pure.

An order with an unknown outcome counts both as sent and as not sent. So the store expects a range of quantities, and
only what lies outside of it is unknown.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from backtest_kit.broker.base import VenuePosition, VenueSignal
from backtest_kit.broker.order_ids import ADD, ENTRY, OrderId, SignalIds, parse
from backtest_kit.engine.pnl import effective_price, remaining_cost
from backtest_kit.engine.step import State
from backtest_kit.model.position import RestingEntry
from backtest_kit.run.live.position_state import PositionState, held_by

What = Literal["foreign_position", "foreign_order", "left_stop", "missing_position", "unprotected_position"]

_SLACK: Final = 0.02
"""Share of the expected quantity: fees in base currency, lots and slippage change it by less."""
_WAYS_OUT: Final[dict[What, str]] = {
    "foreign_position": "adopt it (--orphans adopt), close it by hand, or start with the store that opened it",
    "foreign_order": "cancel it by hand, or start with the store that sent it",
    "left_stop": "cancel it by hand: it would close the next position there",
    "missing_position": "check the position on the exchange",
    "unprotected_position": "check the stop on the exchange",
}


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What position states expect of one symbol: a range of its signed quantity in base currency, short below 0."""

    low: float = 0.0
    high: float = 0.0
    gross: float = 0.0
    """The largest quantity, both sides added up."""
    signals: frozenset[tuple[str, str]] = frozenset()
    """Store id and digest of the signals whose orders may be on the exchange."""
    changed_ms: int = -1
    """The last minute in which something was opened, changed or closed."""

    @property
    def slack(self) -> float:
        """The tolerance of the quantity."""
        return self.gross * _SLACK

    def __add__(self, other: Known) -> Known:
        """Two positions next to each other."""
        return Known(
            low=self.low + other.low,
            high=self.high + other.high,
            gross=self.gross + other.gross,
            signals=self.signals | other.signals,
            changed_ms=max(self.changed_ms, other.changed_ms),
        )

    def __or__(self, other: Known) -> Known:
        """One or the other: the same position at two moments."""
        return Known(
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            gross=max(self.gross, other.gross),
            signals=self.signals | other.signals,
            changed_ms=max(self.changed_ms, other.changed_ms),
        )


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A difference between exchange and store."""

    what: What
    held: VenuePosition | None
    foreign: tuple[VenueSignal, ...] = ()
    """Signals that the store does not know."""
    no_entry: bool = False
    """Whether the exchange holds something unknown, so that nothing may be opened."""
    reason: str
    """What differs, in words."""

    @property
    def way_out(self) -> str:
        """What the operator can do."""
        return _WAYS_OUT[self.what]


def known_of(position_state: PositionState, store_id: str) -> Known:
    """What a position state expects, before and after a pending order."""
    state, intent = position_state.state, position_state.intent
    states = [state] if intent is None else [state, intent.target]
    quantities = [quantity for state in states for quantity in _quantities(state)]
    ids = [SignalIds(held.signal_id, store_id) for state in states if (held := held_by(state)) is not None]
    return Known(
        low=min(quantities),
        high=max(quantities),
        gross=max(map(abs, quantities)),
        signals=frozenset((each.store_id, each.digest) for each in ids),
        changed_ms=max(position_state.when_ms, position_state.command_ms),
    )


def _quantities(state: State) -> tuple[float, ...]:
    """The signed quantities of a state: of a resting entry any part may be filled by now."""
    held = held_by(state)
    if held is None:
        return (0.0,)
    sign = 1.0 if held.side == "long" else -1.0
    if isinstance(held, RestingEntry):
        return 0.0, sign * held.cost / held.price_open
    return (sign * remaining_cost(held.entries, held.reductions) / effective_price(held.entries, held.reductions),)


def compare(symbol: str, held: VenuePosition | None, known: Known, store_id: str) -> Difference | None:
    """The worst difference; None if exchange and store agree.

    Args:
        symbol: for the message.
        held: the position on the exchange.
        known: what all position states of the store expect together.
        store_id: of the store, for the message.
    """
    net = 0.0 if held is None else held.quantity if held.direction == "long" else -held.quantity
    foreign = tuple(each for each in held.signals if not _is_known(each, known)) if held is not None else ()
    what = _what(held, net, foreign, known)
    if what is None:
        return None
    excess = not known.low - known.slack <= net <= known.high + known.slack
    unknown = what in ("foreign_position", "foreign_order", "left_stop")
    return Difference(
        what=what,
        held=held,
        foreign=foreign,
        no_entry=unknown or (excess and abs(net) > known.slack),
        reason=_reason(symbol, what, held, foreign, known, store_id),
    )


def _is_known(signal: VenueSignal, known: Known) -> bool:
    return (signal.store_id, signal.digest) in known.signals


def _what(held: VenuePosition | None, net: float, foreign: tuple[VenueSignal, ...], known: Known) -> What | None:
    slack = known.slack
    expected = 1 if known.low > slack else -1 if known.high < -slack else 0
    if expected and net * expected < -slack:
        return "missing_position"
    more = net > max(known.high, 0.0) + slack or net < min(known.low, 0.0) - slack
    if more or any(each.quantity for each in foreign):
        return "foreign_position"
    if foreign:
        return "foreign_order" if any(map(_wants_to_open, foreign)) else "left_stop"
    if expected and abs(net) <= slack:
        return "missing_position"
    if held is None or held.stop_loss is not None:
        left = held is not None and not held.quantity and not held.signals and not known.signals
        return "left_stop" if left else None
    return "unprotected_position" if expected else None


def _wants_to_open(signal: VenueSignal) -> bool:
    kinds = {order_id.kind for each in signal.client_order_ids if (order_id := parse(each)) is not None}
    return bool(kinds & {ENTRY, ADD})


def _reason(
    symbol: str,
    what: What,
    held: VenuePosition | None,
    foreign: tuple[VenueSignal, ...],
    known: Known,
    store_id: str,
) -> str:
    there = "no position" if held is None or not held.quantity else f"{held.direction} {held.quantity:g}"
    text = f"the exchange holds {there} of {symbol}"
    match what:
        case "missing_position":
            text += ", which is not the position in the store"
        case "unprotected_position":
            text += " without a stop"
        case "foreign_position":
            amount = max(abs(known.low), abs(known.high))
            text += f", and this store knows {f'only {amount:g} of it' if amount else 'nothing of it'}"
        case "foreign_order":
            text += " and an open order that this store does not know"
        case "left_stop":
            text += " and a stop that was left by another position"
    return text + "".join(f"; {_order(each, store_id)}" for each in foreign)


def _order(signal: VenueSignal, store_id: str) -> str:
    """The store of an unknown order."""
    ids = signal.client_order_ids
    order_id = ids[0] if ids else str(OrderId(signal.store_id, signal.digest, ENTRY, 0))
    if signal.store_id == store_id:
        return f"order {order_id} is from this store, {store_id}, which has no record of it"
    return f"order {order_id} is from store {signal.store_id}, not from this store, {store_id}"
