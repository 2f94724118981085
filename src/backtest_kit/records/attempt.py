"""`Attempts`: calls of a sink, one at a time, each with a time limit. None of them delays trading."""

from __future__ import annotations

import asyncio
import inspect
from concurrent.futures import Future
from contextvars import copy_context
from threading import Thread
from typing import Any, Final

from backtest_kit.errors import RetryLater
from backtest_kit.records.notification import Notification
from backtest_kit.records.sinks import Deliver

GRACE_S: Final = 1.0
"""How long a cancelled call may take to end before it is left alone."""


class Attempts:
    """Calls of one sink.

    A call that exceeds its time is cancelled if it is async; a thread cannot be cancelled. No other call begins until
    it has ended. So a function that hangs takes one thread, and none of those that the stores work in.
    """

    def __init__(self, deliver: Deliver, name: str) -> None:
        self._deliver = deliver
        self._is_async = any(map(inspect.iscoroutinefunction, (deliver, type(deliver).__call__)))
        self._name = name
        self._unended: tuple[str, asyncio.Task[None]] | None = None
        """A call that was given up, and the id of its notification."""

    async def hand_over(self, notification: Notification, bound_s: float) -> None:
        """Call the sink. A blocking function that took this notification after it was given up is not called again.

        Raises:
            RetryLater: it took longer than `bound_s` seconds, or the call before it still runs.
            Exception: what the sink raises.
        """
        if self._unended is not None:
            former, call = self._unended
            if not (await asyncio.wait({call}, timeout=bound_s))[0]:
                raise RetryLater("a call that was given up still runs: it is tried again once that has ended")
            self._unended = None
            if former == notification.notification_id and not self._is_async:
                return _raise_error(call)
        call = asyncio.create_task(self._take(notification), name=f"notification to {self._name}")
        call.add_done_callback(_retrieve)
        self._unended = notification.notification_id, call
        try:
            in_time, _ = await asyncio.wait({call}, timeout=bound_s)
        finally:
            if self._is_async and not call.done():
                call.cancel()
                await asyncio.wait({call}, timeout=GRACE_S)
                if call.done():
                    self._unended = None
        if not in_time:
            raise RetryLater(f"it has not answered within {bound_s:g} s: it is tried again")
        self._unended = None
        return _raise_error(call)

    async def _take(self, notification: Notification) -> None:
        answer: Any = self._deliver(notification) if self._is_async else await self._in_thread(notification)
        while inspect.isawaitable(answer):  # a thread can return an awaitable: a lambda around an async call
            answer = await answer

    def _in_thread(self, notification: Notification) -> asyncio.Future[object]:
        answer: Future[object] = Future()
        answer.set_running_or_notify_cancel()  # a waiting task can be cancelled, the thread cannot
        context = copy_context()

        def work() -> None:
            try:
                answer.set_result(context.run(self._deliver, notification))
            except BaseException as error:
                answer.set_exception(error)

        # A daemon: the end of the program does not wait for it.
        Thread(target=work, name="notification", daemon=True).start()
        return asyncio.wrap_future(answer)


def _raise_error(call: asyncio.Task[None]) -> None:
    if call.cancelled():
        raise RetryLater("it has cancelled itself: it is tried again")
    call.result()


def _retrieve(call: asyncio.Task[None]) -> None:
    """Mark the error of a call as retrieved: if it was given up, it came too late."""
    if not call.cancelled():
        call.exception()
