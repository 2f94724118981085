"""Finds what the user's code has called and never awaited: without `await` a command is silently not carried out."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class _Call(NamedTuple):
    text: str
    """Such as `close()`."""
    place: str
    """File and line of the call."""
    coroutine: weakref.ref[Coroutine[Any, Any, Any]]


Calls = dict[object, _Call]
"""Calls that were made and have not begun yet."""
_CALLS: Final[ContextVar[Calls | None]] = ContextVar("backtest_kit_calls", default=None)


def must_await(method: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Have `forgotten` report a call of this async method that is dropped without `await`."""

    @wraps(method)
    def called(*args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        calls = _CALLS.get()
        if calls is None:
            return method(*args, **kwargs)
        made = object()

        async def begun() -> R:
            calls.pop(made, None)
            return await method(*args, **kwargs)

        begun.__qualname__ = method.__qualname__
        coroutine, caller = begun(), sys._getframe(1)
        place = f"{Path(caller.f_code.co_filename).name}, line {caller.f_lineno}"
        calls[made] = _Call(f"{method.__name__}()", place, weakref.ref(coroutine))
        return coroutine

    return called


def watch(calls: Calls) -> None:
    """Note the calls that are made from here on in this task."""
    if _CALLS.get() is not calls:
        _CALLS.set(calls)


def forgotten(calls: Calls) -> str:
    """Which calls can never be awaited any more, in words; empty if none. Those are taken out.

    One that somebody still holds, such as a task that has not had its turn yet, may be awaited later.
    """
    return _taken_out(calls, [made for made, call in calls.items() if call.coroutine() is None])


def not_begun(calls: Calls) -> str:
    """Which calls were not awaited so far, in words; empty if none. They are taken out."""
    return _taken_out(calls, list(calls))


def _taken_out(calls: Calls, chosen: list[object]) -> str:
    return " and ".join(f"{call.text} ({call.place})" for call in map(calls.pop, chosen))
