"""Finds calls of the user's code that were never awaited: a command without `await` silently does nothing."""

from __future__ import annotations

import inspect
import linecache
import sys
import traceback
import weakref
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from types import CodeType, CoroutineType
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class _Call(NamedTuple):
    name: str
    code: CodeType
    """Where it was called."""
    line: int
    coroutine: weakref.ref[Coroutine[Any, Any, Any]]

    def __str__(self) -> str:
        return f"{self.name}() ({Path(self.code.co_filename).name}, line {self.line})"


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
        calls[made] = _Call(method.__name__, caller.f_code, caller.f_lineno, weakref.ref(coroutine))
        return coroutine

    return called


def watch(calls: Calls) -> None:
    """Note the calls that are made from here on in this task."""
    if _CALLS.get() is not calls:
        _CALLS.set(calls)


def forgotten(calls: Calls) -> str:
    """Which calls can never be awaited any more, as text; empty if none. Those are taken out.

    One that is still referenced, such as by a task that has not run yet, may be awaited later.
    """
    return _taken_out(calls, [made for made, call in calls.items() if call.coroutine() is None])


def not_begun(calls: Calls) -> str:
    """Which calls were not awaited so far, as text; empty if none. They are taken out."""
    return _taken_out(calls, list(calls))


def used_unawaited(error: BaseException) -> str:
    """Which call made the coroutine that an error in the user's code is about, as text; empty if it is about none.

    `ctx.candles` is called too often to be noted. `.close` of its result is a column, of a coroutine a method.
    """
    for frame, line in traceback.walk_tb(error.__traceback__):
        place = f"({Path(frame.f_code.co_filename).name}, line {line})"
        for value in frame.f_locals.values():
            if type(value) is CoroutineType and inspect.getcoroutinestate(value) == inspect.CORO_CREATED:
                return f"{value.__name__}() {place}"
        text = linecache.getline(frame.f_code.co_filename, line)
        if ".candles(" in text and "await" not in text:
            return f"candles() {place}"
    return "an async method" if "coroutine" in str(error) else ""


def _taken_out(calls: Calls, chosen: list[object]) -> str:
    return " and ".join(str(call) for call in map(calls.pop, chosen))
