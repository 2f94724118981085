"""The blocking twin of an async call, for scripts and notebooks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run_blocking(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `main` to its end on an event loop of its own.

    Where a loop already runs in this thread (a notebook), the new one gets a thread of its own.
    """
    if not _loop_is_running():
        return asyncio.run(main())
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="backtest-kit") as thread:
        return thread.submit(lambda: asyncio.run(main())).result()


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
