"""Await a user's function for a limited time, at no cost if it does not suspend."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from types import CoroutineType, coroutine
from typing import Any


async def within(deadline: asyncio.Timeout, answer: Awaitable[object]) -> object:
    """The answer, or `TimeoutError` once the deadline has expired, counted from the first suspension.

    Most strategies return without suspending; arming a timer would cost more than the call.
    """
    if not isinstance(answer, CoroutineType):
        async with deadline:
            return await answer
    try:
        waiting_for = answer.send(None)
    except StopIteration as answered:
        return answered.value
    async with deadline:
        return await _go_on(answer, waiting_for)


@coroutine
def _go_on(started: CoroutineType[Any, Any, object], waiting_for: Any) -> Generator[Any, Any, object]:
    """Await a coroutine that was started and has yielded what it waits for."""
    try:
        while True:
            try:
                arrived = yield waiting_for
            except BaseException as error:  # cancelled, or timed out: the coroutine decides what to do
                waiting_for = started.throw(error)
            else:
                waiting_for = started.send(arrived)
    except StopIteration as answered:
        return answered.value
