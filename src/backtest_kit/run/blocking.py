"""The blocking twin of an async call, for scripts and notebooks."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def run_blocking(main: Callable[[], Awaitable[T]], leave: Callable[[], Awaitable[None]]) -> T:
    """Run `main` on an event loop of its own, and then `leave`, which closes what belongs to that loop.

    Where a loop already runs in this thread (a notebook), the new one gets a thread of its own. Ctrl-C cancels
    `main` and raises `KeyboardInterrupt` once it has ended.
    """

    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[T] | None]] = []

    async def whole() -> T:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        try:
            return await main()
        finally:
            await leave()

    try:
        if not _loop_is_running():
            return asyncio.run(whole())
        with _interruptible(), ThreadPoolExecutor(max_workers=1, thread_name_prefix="backtest-kit") as thread:
            outcome = thread.submit(lambda: asyncio.run(whole()))
            try:
                return outcome.result()
            except KeyboardInterrupt:
                # The signal reached this thread only; the loop in the other thread would run on.
                for loop, task in running:
                    if task is not None:
                        loop.call_soon_threadsafe(task.cancel)
                raise
    except KeyboardInterrupt:
        # Where the loop was when it was cancelled is of no use to the user.
        raise KeyboardInterrupt from None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise here: this call blocks the running loop, whose own handler would only record the signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
