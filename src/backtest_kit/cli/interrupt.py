"""Ctrl-C while a command computes: one line and the exit code of a shell, no traceback."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_until_interrupted(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on an event loop of its own. Ctrl-C cancels it and ends the command with code 130.

    For commands that leave nothing half-done: what they write, they write at the end.
    """
    try:
        return asyncio.run(main)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted: nothing was saved.\n")
        raise KeyboardInterrupt from None
