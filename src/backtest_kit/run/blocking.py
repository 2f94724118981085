"""The blocking twin of an async call, for scripts and notebooks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def run_blocking(main: Callable[[], Awaitable[T]], leave: Callable[[], Awaitable[None]]) -> T:
    """Run `main` to its end on an event loop of its own, and then `leave`, which closes what is open for that loop.

    Where a loop already runs in this thread (a notebook), the new one gets a thread of its own.
    """

    async def whole() -> T:
        try:
            return await main()
        finally:
            await leave()

    if not _loop_is_running():
        return asyncio.run(whole())
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="backtest-kit") as thread:
        return thread.submit(lambda: asyncio.run(whole())).result()


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
