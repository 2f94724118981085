"""Runs that share something take turns in the order of their own virtual time."""

from __future__ import annotations

import asyncio
import heapq
from contextvars import ContextVar
from itertools import count
from typing import Final

from backtest_kit.errors import UserError

_AROUND: Final[ContextVar[tuple[tuple[Lockstep, int], ...]]] = ContextVar("backtest_kit_runs_around", default=())


class Lockstep:
    """A member acts at a minute only when no other member still has to act at an earlier one.

    At the same minute the member that joined first acts first, so shared state develops the same way every time,
    however fast each member is.
    """

    def __init__(self) -> None:
        self._numbers = count()
        self._floor: dict[int, int] = {}
        """The earliest minute at which each member may still act."""
        self._heap: list[tuple[int, int]] = []
        self._waiting: dict[int, asyncio.Future[None]] = {}

    def join(self, when_ms: int) -> int:
        """Become a member that will not act before `when_ms`; returns its number."""
        member = next(self._numbers)
        self._set(member, when_ms)
        return member

    async def turn(self, member: int, when_ms: int) -> None:
        """Wait for the member's turn at `when_ms`; the turn lasts until the next call.

        Raises:
            UserError: it would wait for a run that cannot go on before this one has ended.
        """
        self._set(member, when_ms)
        self._wake_first()
        while (first := self._first()) != member:
            if any(lockstep is self and each == first for lockstep, each in _AROUND.get()):
                raise UserError(
                    "a run would wait for itself: it was started inside of another run of the same frame (in a "
                    "handler, or in the loop over its events), which cannot go on meanwhile. Give it a frame of its "
                    "own, or start both with Backtest.background"
                )
            waiting = self._waiting[member] = asyncio.get_running_loop().create_future()
            try:
                await waiting
            finally:
                self._waiting.pop(member, None)

    def enter(self, member: int) -> None:
        """Mark this task, and the tasks it starts, as part of the member's run."""
        _AROUND.set((*_AROUND.get(), (self, member)))

    def leave(self, member: int) -> None:
        """Leave. Idempotent."""
        if self._floor.pop(member, None) is not None:
            self._wake_first()

    def __len__(self) -> int:
        return len(self._floor)

    def _set(self, member: int, when_ms: int) -> None:
        self._floor[member] = when_ms
        heapq.heappush(self._heap, (when_ms, member))

    def _first(self) -> int | None:
        while self._heap:
            when_ms, member = self._heap[0]
            if self._floor.get(member) == when_ms:
                return member
            heapq.heappop(self._heap)
        return None

    def _wake_first(self) -> None:
        first = self._first()
        waiting = self._waiting.get(first) if first is not None else None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)
