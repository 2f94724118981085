"""What a start found of the previous run, as an event and in words."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from backtest_kit.engine.step import State
from backtest_kit.format import describe
from backtest_kit.model.event import Recovered
from backtest_kit.model.identity import Identity
from backtest_kit.model.position import Position, RestingEntry
from backtest_kit.run.live.orders import Intent
from backtest_kit.run.live.position_state import PositionState, held_by

_log = logging.getLogger("backtest_kit")


def recovered(identity: Identity, state: State, when_ms: int, seen_ms: int, steps: Sequence[str]) -> Recovered:
    """A run begins with `state`; `seen_ms` is the last minute that the previous run stored."""
    held = held_by(state)
    event = Recovered(
        identity=identity,
        when_ms=when_ms,
        position=held if isinstance(held, Position) else None,
        entry=held if isinstance(held, RestingEntry) else None,
        down_ms=max(0, when_ms - seen_ms) if seen_ms > 0 else 0,
        steps=tuple(steps),
    )
    _log.info("%s of %s: %s", identity.strategy_name, identity.symbol, describe(event), extra={"event": event})
    return event


def what_became_of(intent: Intent, left: Intent | None, *, done: bool) -> str:
    """A sentence about an order that was pending when the run before ended."""
    order, became = intent.order, "carried out" if done else "given up" if left is None else "still open"
    return f"looked up order {order.client_order_id} to {order.kind}: {became}"


def last_price(position_state: PositionState) -> float:
    """The last market price in a position state; 0 if it has none."""
    if position_state.intent is not None:
        return position_state.intent.order.price
    held = held_by(position_state.state)
    if isinstance(held, Position):
        return held.entries[-1].price
    return 0.0 if held is None else held.price_open
