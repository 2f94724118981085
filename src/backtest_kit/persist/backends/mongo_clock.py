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


class ServerClock:
    """This machine's time, set right where it is far from that of the server, of which there is one."""

    def __init__(self) -> None:
        self._ahead_us = 0
        self._asked_at = -math.inf
        self._begun_us = 0

    @property
    def is_due(self) -> bool:
        """Whether the server is to be asked: the answer is old, or somebody has set the clock of this machine."""
        moved_us = _now_us() - _running_us() - self._begun_us
        return time.monotonic() - self._asked_at > _AGAIN_SECONDS or abs(moved_us) > _APART_US

    def ask(self) -> int:
        """Note that the server is being asked; what `answered` needs to know of that."""
        self._asked_at = time.monotonic()
        self._begun_us = _now_us() - _running_us()
        return _now_us()

    def answered(self, asked_us: int, hello: Mapping[str, Any]) -> None:
        told = hello.get("localTime")
        if not isinstance(told, datetime):
            return
        under_way_us = _now_us() - asked_us
        ahead_us = round(told.replace(tzinfo=UTC).timestamp() * 1_000_000) - (asked_us + under_way_us // 2)
        self._ahead_us = ahead_us if abs(ahead_us) > _APART_US + under_way_us else 0

    def now_us(self) -> int:
        """Microseconds."""
        return _now_us() + self._ahead_us


def _now_us() -> int:
    return time.time_ns() // 1000


def _running_us() -> int:
    return time.monotonic_ns() // 1000
