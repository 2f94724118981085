"""`ServerClock`: the time by which the records of processes on several machines are in order of writing."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

_APART_US: Final = 100_000
"""Clocks nearer than this to the server's are left alone: they tell the order better than a question about it."""
_AGAIN_SECONDS: Final = 600.0
_SOON_SECONDS: Final = 10.0


class ServerClock:
    """The clock of this machine as it was when the server was asked last, set right where it was far from the server's.

    Whoever sets the clock meanwhile changes nothing until the server has been asked again: a tick that is hours ahead
    would be above all that come, and carried on by everybody who sees it.
    """

    def __init__(self) -> None:
        self._due_at = -math.inf
        self._set_to_us = _now_us() - _running_us()
        """What the clock of this machine shows beyond the one that only runs, when the server was asked."""
        self._beyond_us = self._set_to_us
        """The same of this clock."""

    @property
    def is_due(self) -> bool:
        """Whether the server is to be asked: the answer is old, or somebody has set the clock of this machine."""
        return abs(_now_us() - _running_us() - self._set_to_us) > _APART_US or time.monotonic() > self._due_at

    def ask(self) -> int:
        """Note that the server is being asked. Without an answer it will be again soon."""
        self._due_at = time.monotonic() + _SOON_SECONDS
        self._set_to_us = _now_us() - _running_us()
        return _running_us()

    def answered(self, asked_us: int, hello: Mapping[str, Any]) -> None:
        """Go by an answer to what was asked at `asked_us`, unless it was under way for too long to tell anything."""
        under_way_us = _running_us() - asked_us
        if under_way_us > _APART_US:
            return
        told, ahead_us = hello.get("localTime"), 0
        if isinstance(told, datetime):
            told_us = round(told.replace(tzinfo=UTC).timestamp() * 1_000_000)
            ahead_us = told_us - (asked_us + under_way_us // 2 + self._set_to_us)
        self._beyond_us = self._set_to_us + (ahead_us if abs(ahead_us) > _APART_US else 0)
        self._due_at = time.monotonic() + _AGAIN_SECONDS

    def now_us(self) -> int:
        """Microseconds."""
        return _running_us() + self._beyond_us


def _now_us() -> int:
    return time.time_ns() // 1000


def _running_us() -> int:
    # That of Linux which goes on while the machine sleeps.
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return (time.monotonic_ns() if clock is None else time.clock_gettime_ns(clock)) // 1000
