"""`PositionState`: everything that is stored of one position, and its records.

The position is in `signal`, the resting entry in `schedule`, everything else in `strategy`; `partial` and `breakeven`
repeat the reached levels of the position for other readers.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from backtest_kit.broker.base import OrderKind
from backtest_kit.engine.position import LEVEL_STEP
from backtest_kit.engine.step import Flat, Holding, Resting, State
from backtest_kit.model.event import Lasting
from backtest_kit.model.position import Position, RestingEntry
from backtest_kit.persist.codec import decode, encode
from backtest_kit.persist.store import Plain
from backtest_kit.run.live.orders import Intent, signal_id_of

_HELD_IN: Final = {"signal": ("holding", "position"), "schedule": ("resting", "entry")}
"""By contract: the state whose part it holds, and the name of that part. If a torn batch left both, the entry has
become the position."""


class Commanded(msgspec.Struct, frozen=True, rename="camel"):
    """A command that was carried out, or rejected by the exchange."""

    kind: OrderKind
    refused: str = ""
    """Why it was rejected; empty if it was carried out."""


class PositionState(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Everything that is stored of one position."""

    state: State = Flat()
    paused: bool = False
    when_ms: int = -1
    """The minute of the last transition; there is one per minute."""
    command_ms: int = -1
    """The minute of the last command."""
    commands: tuple[Commanded, ...] = ()
    """The outcomes of the commands in that minute, in their order."""
    seen_ms: int = -1
    """The last minute that was stored."""
    orders: int = 0
    """How many orders were sent in the life of the position."""
    intent: Intent | None = None
    outbox: tuple[Lasting, ...] = ()
    """Events that are not in the records yet."""
    owner: str = ""
    """The process that wrote it: the random name of its lease."""
    store_id: str = ""
    """Part of the client ids of its orders, which are found by it on the exchange."""
    seq: int = 0
    """Grows by one with every change."""

    @property
    def exposure(self) -> Position | RestingEntry | None:
        """The position or the resting entry, or the one that an order is about to open: it counts in risk profiles."""
        return held_by(self.state) or (None if self.intent is None else held_by(self.intent.target))

    @property
    def is_idle(self) -> bool:
        """Whether there is no position, no resting entry and no pending order."""
        return self.intent is None and isinstance(self.state, Flat)

    def with_commands(self, when_ms: int, *commands: Commanded) -> PositionState:
        """With the commands of a minute added, and without those of an earlier one."""
        earlier = self.commands if self.command_ms >= when_ms else ()
        return msgspec.structs.replace(self, command_ms=max(self.command_ms, when_ms), commands=(*earlier, *commands))


def held_by(state: State) -> Position | RestingEntry | None:
    """The position or the resting entry of a state."""
    if isinstance(state, Holding):
        return state.position
    return state.entry if isinstance(state, Resting) else None


def marks_of(state: State) -> dict[str, Plain]:
    """The records `partial` and `breakeven` of a position; nothing without one."""
    if not isinstance(state, Holding):
        return {}
    position = state.position
    levels: Plain = {
        "profitLevels": list(range(LEVEL_STEP, position.profit_level + 1, LEVEL_STEP)),
        "lossLevels": list(range(LEVEL_STEP, position.loss_level + 1, LEVEL_STEP)),
    }
    return {
        "partial": {position.signal_id: levels} if position.profit_level or position.loss_level else {},
        "breakeven": {position.signal_id: {"reached": True}} if position.breakeven_reached else {},
    }


def records_of(position_state: PositionState) -> dict[str, Plain]:
    """The three records of a position state, by contract.

    A position or a resting entry has its own record; in its place, the state in `strategy` has its signal id.
    """
    strategy: Any = encode(position_state)
    records: dict[str, Plain] = dict.fromkeys(_HELD_IN)
    for name, (_, field) in _HELD_IN.items():
        if field in strategy["state"]:
            records[name] = strategy["state"][field]
            strategy["state"][field] = signal_id_of(position_state.state)
    return {**records, "strategy": strategy}


def write_order(before: Plain, records: dict[str, Plain]) -> list[str]:
    """The order in which to write `records`, where `before` is the `strategy` record that they follow.

    A position is written before `strategy`, which removes the intent: after a kill in between, the intent is still
    there and its outcome is known. A position is cleared after `strategy`, which has its trade. A record that
    `strategy` does not name was left by a torn batch; it is cleared first.
    """
    state: Any = before["state"] if isinstance(before, dict) else {}
    over = [name for name, (_, field) in _HELD_IN.items() if records[name] is None and field in state]
    return [*(name for name in _HELD_IN if name not in over), "strategy", *over]


def position_state_of(records: dict[str, Plain]) -> PositionState:
    """The position state of `records`, the inverse of `records_of`; also after a torn batch.

    Raises:
        msgspec.ValidationError, AttributeError, KeyError, TypeError: the records are not a position state.
    """
    found: dict[str, Any] = {name: decode(value) for name, value in records.items()}
    strategy = found["strategy"] or {}
    state: Any = strategy.get("state") or encode(Flat())
    return msgspec.convert({**strategy, "state": _joined(state, found)}, PositionState)


def _joined(state: dict[str, Any], records: dict[str, Any]) -> dict[str, Any]:
    """The state that `strategy` describes, with its position or entry. If they disagree, a batch was torn: the
    position is newer, unless `strategy` has closed it, see `write_order`."""
    for name, (tag, field) in _HELD_IN.items():
        held = records[name]
        if held is None:
            continue
        newer = {"type": tag, "lastSlotMs": state["lastSlotMs"], field: held}
        signal_id = signal_id_of(msgspec.convert(newer, State))
        if state.get("lastSignalId") != signal_id:
            return {**state, field: held} if state.get(field) == signal_id else newer
    over = next((state[field] for _, field in _HELD_IN.values() if field in state), None)
    return state if over is None else {"type": "flat", "lastSlotMs": state["lastSlotMs"], "lastSignalId": over}
