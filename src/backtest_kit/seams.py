"""`Seams`: time and chance, as a program takes them from its system."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Final

_ELAPSED: Final = getattr(time, "CLOCK_BOOTTIME", None)


class Seams:
    """What the kit hands down instead of each module taking it from the system. A simulation overrides it."""

    def wall_ms(self) -> int:
        """The wall clock in epoch ms: for people, never for order or decisions."""
        return time.time_ns() // 1_000_000

    def elapsed(self) -> float:
        """Seconds of this machine's own clock, including sleep if the system counts it."""
        return time.clock_gettime(_ELAPSED) if _ELAPSED is not None else time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def random_hex(self, digits: int) -> str:
        """Digits that no other process has, as far as chance goes."""
        return secrets.token_hex(digits)[:digits]


SYSTEM: Final = Seams()
"""The seams of a program that was handed none."""
