"""`Attempts`: calls of a sink, each of which may take only so long, and none of which makes the trading wait."""

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
"""How long a call that was cancelled may take to end before it is left to itself."""


class Attempts:
    """Calls of one sink, one at a time."""

    def __init__(self, deliver: Deliver, name: str) -> None:
        self._deliver = in_thread(deliver)
        self._name = name
        self._stuck: asyncio.Task[None] | None = None
        """A call that goes on although it was cancelled."""

    async def hand_over(self, notification: Notification, bound_s: float) -> None:
        """Call the sink, in a task of its own, which has ended or was cancelled when this returns.

        Raises:
            RetryLater: it took longer than `bound_s` seconds.
            Exception: what the sink raises.
        """
        if self._stuck is not None and not (await asyncio.wait({self._stuck}, timeout=bound_s))[0]:
            raise RetryLater("it was cancelled and goes on all the same: it is tried again once that has ended")
        self._stuck = None
        taking = asyncio.create_task(self._take(notification), name=f"notification to {self._name}")
        try:
            in_time, _ = await asyncio.wait({taking}, timeout=bound_s)
        finally:
            if not taking.done():
                taking.cancel()
                await asyncio.wait({taking}, timeout=GRACE_S)
                self._stuck = None if taking.done() else taking
        if not in_time:
            if taking.done() and not taking.cancelled():
                taking.exception()  # retrieved, and ignored: it came too late
            raise RetryLater(f"it has not answered within {bound_s:g} s: it is tried again")
        if taking.cancelled():
            raise RetryLater("it has cancelled itself: it is tried again")
        taking.result()

    async def _take(self, notification: Notification) -> None:
        answer: Any = self._deliver(notification)
        while inspect.isawaitable(answer):  # a thread can return another one: a lambda around an async call
            answer = await answer


def in_thread(function: Deliver) -> Deliver:
    """The function itself if it is async; otherwise one that calls it in a thread."""
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return function if is_async else _Threaded(function)


class _Threaded:
    """A blocking function, in a thread of its own.

    A thread cannot be cancelled. One that is given up goes on, and no other is begun until it has ended: a function
    that hangs takes one thread, and none of those that the stores work in.
    """

    def __init__(self, function: Deliver) -> None:
        self._function = function
        self._given_up: tuple[str, Future[object]] | None = None
        """The notification of a call that may still go on, and its outcome."""

    async def __call__(self, notification: Notification) -> object:
        """What the function returns; for a call that was given up, its outcome since."""
        name, (former, answer) = notification.notification_id, self._given_up or ("", None)
        if answer is not None and former != name:
            ended = asyncio.wrap_future(answer)
            await asyncio.wait({ended})
            ended.exception()  # retrieved: it was reported when the call was given up
            answer = None
        if answer is None:
            answer = self._begin(notification)
        self._given_up = name, answer
        taken = asyncio.wrap_future(answer)
        try:
            await asyncio.wait({taken})
        except asyncio.CancelledError:
            # If it ended in the same moment, the next call of this notification gets the outcome.
            if not taken.cancel():
                taken.exception()
            raise
        self._given_up = None
        return taken.result()

    def _begin(self, notification: Notification) -> Future[object]:
        answer: Future[object] = Future()
        answer.set_running_or_notify_cancel()  # what waits for it can be cancelled, the thread cannot
        context = copy_context()

        def work() -> None:
            try:
                answer.set_result(context.run(self._function, notification))
            except BaseException as error:
                answer.set_exception(error)

        # A daemon: the end of the program does not wait for it.
        Thread(target=work, name="notification", daemon=True).start()
        return answer
