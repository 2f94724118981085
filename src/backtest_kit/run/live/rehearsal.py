"""Recognizes commands that are given again, because a crash cut off their minute."""

from __future__ import annotations

from backtest_kit.broker.base import OrderKind
from backtest_kit.run.live.position_state import Commanded, PositionState


class Rehearsal:
    """The commands of the previous run in the minute in which this one begins, for as long as that minute lasts."""

    def __init__(self) -> None:
        self._commands: list[Commanded] = []

    def begin(self, found: PositionState, when_ms: int) -> bool:
        """Remember the commands of this minute: the strategy is called again and repeats them, because the previous
        run died in it. Returns whether it had reached them."""
        if found.command_ms < when_ms:
            return False
        self._commands = list(found.commands)
        return True

    def outcome(self, kind: OrderKind, now: PositionState, when_ms: int) -> Commanded | None:
        """The outcome of a command of this kind in the previous run; each is returned once.

        Matched by kind alone: the amount may depend on a price or a position that the first one changed. A command
        too few, which the next minute can repeat, is better than one twice.
        """
        if when_ms != now.command_ms:
            self._commands.clear()
        for known in self._commands:
            if known.kind == kind:
                self._commands.remove(known)
                return known
        return None
