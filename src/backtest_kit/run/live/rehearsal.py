"""Commands that are given again, because a crash has cut off the minute in which they were given."""

from __future__ import annotations

from backtest_kit.broker.base import OrderKind
from backtest_kit.run.live.position_state import Commanded, PositionState


class Rehearsal:
    """What the run before has commanded in the minute in which this one begins, for as long as that minute lasts."""

    def __init__(self) -> None:
        self._commands: list[Commanded] = []

    def begin(self, found: PositionState, when_ms: int) -> bool:
        """Know the commands of this very minute when they are given again, by a strategy that is called again because
        the run before has died in the minute; whether there were any."""
        if found.command_ms < when_ms:
            return False
        self._commands = list(found.commands)
        return True

    def outcome(self, kind: OrderKind, now: PositionState, when_ms: int) -> Commanded | None:
        """What became of a command of this kind in the run before; each is returned once.

        By its kind alone: its amount may follow from a price or a position that the first one has changed, and
        better is one too few, which the next minute can give again, than one twice.
        """
        if when_ms != now.command_ms:
            self._commands.clear()
        for known in self._commands:
            if known.kind == kind:
                self._commands.remove(known)
                return known
        return None
