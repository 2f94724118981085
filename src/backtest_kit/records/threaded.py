"""Functions that are not async, called so that nobody waits for them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backtest_kit.records.notification import Notification

Deliver = Callable[["Notification"], object]


def never_in_the_way(function: Deliver) -> Deliver:
    """A function as it is if it is async; any other in a thread."""
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return function if is_async else _Threaded(function)


class _Threaded:
    """A function that is not async, in a thread of its own, for it may wait and who trades may not.

    A thread cannot be cancelled. One that is given up goes on, and no other is begun until it has ended: a function
    that hangs takes one thread, and none of those that the stores work in.
    """

    def __init__(self, function: Deliver) -> None:
        self._function = function
        self._going_on: tuple[str, Future[object]] | None = None
        """What was given up and has not ended, as far as is known: a notification, and what comes of it."""

    async def __call__(self, notification: Notification) -> object:
        """What the function returns; of a try that was given up, what has come of it meanwhile."""
        name, (former, answer) = notification.notification_id, self._going_on or ("", None)
        if answer is not None and former != name:
            ended = asyncio.wrap_future(answer)
            await asyncio.wait({ended})
            ended.exception()  # seen, and told when it was given up
            answer = None
        if answer is None:
            answer = self._begin(notification)
        self._going_on = name, answer
        taken = asyncio.wrap_future(answer)
        try:
            await asyncio.wait({taken})
        except asyncio.CancelledError:
            # Also where it ended in the same moment, what has come of it is for the next try.
            if not taken.cancel():
                taken.exception()
            raise
        self._going_on = None
        return taken.result()

    def _begin(self, notification: Notification) -> Future[object]:
        answer: Future[object] = Future()
        answer.set_running_or_notify_cancel()  # whoever waits for it may be cancelled, and it cannot
        context = copy_context()

        def work() -> None:
            try:
                answer.set_result(context.run(self._function, notification))
            except BaseException as error:
                answer.set_exception(error)

        # A daemon, which the end of the program does not wait for.
        Thread(target=work, name="notification", daemon=True).start()
        return answer
