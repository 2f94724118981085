"""`interval.once`: work that runs once in each window of time, however often it is called."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from backtest_kit.errors import BacktestKitError, Conflict, UserError
from backtest_kit.model.interval import floor_ms, interval_ms
from backtest_kit.persist.codec import encode
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Key, Plain, Record, Write
from backtest_kit.records.function import Call, Decorated, Function, Names, R, RunContext, key_text, scope_of
from backtest_kit.records.scope import Scope, Scopes, expectation

_INTERVAL: Final = CONTRACTS["interval"]


class Windows:
    """Windows of time that are used up, per run and across restarts."""

    def __init__(self, scopes: Scopes) -> None:
        self._scopes = scopes
        self._names = Names()

    def once(
        self,
        interval: str,
        *,
        key: Callable[..., Any] | None = None,
        name: str | None = None,
        version: str | None = None,
    ) -> Callable[[Callable[..., Awaitable[R]]], Once[R]]:
        """Decorate an async function that takes a context (or is called with `ctx=`): it runs once in each window.

        Args:
            interval: 1m to 1d; windows are aligned to UTC, in the time of the run.
            key: A function of the same arguments that returns what has its own windows. By default each strategy has
                its own on each symbol of each exchange, regardless of the other arguments.
            name, version: The name that windows are stored under. By default the function's qualified name, so a
                corrected function does not run again in a used window; a new version does, and so does a renamed
                function. Functions that are given the same name share windows.

        At most once, across processes: the window is taken in the store before the function runs, so a process that is
        killed in between has used it up. If the function raises or is cancelled, the window is free again. Taking a
        window uses up all earlier ones. Every backtest has its own windows.

        Raises:
            UserError: the interval is unknown, or the function is not async; or it has no name of its own (name=...)
                and uses variables of an enclosing function, or another function has its name.
        """
        step_ms = interval_ms(interval)

        def decorate(function: Callable[..., Awaitable[R]]) -> Once[R]:
            named = Function("interval.once", function, name, version, hashed=False)
            self._names.claim(named)
            return Once(self._scopes, named, step_ms, key)

        return decorate


class Once(Decorated[R]):
    """A function that runs once in each window. Called like the function."""

    def __init__(self, scopes: Scopes, function: Function[R], step_ms: int, key: Callable[..., Any] | None) -> None:
        super().__init__(scopes, function, key)
        self._step_ms = step_ms
        self._ending: set[asyncio.Task[None]] = set()

    async def __call__(self, *args: Any, **kwargs: Any) -> R | None:
        """What the function returns, or None if its window is used up.

        Raises:
            UserError: the call has no context.
            LookAhead: `when` is later than the context.
            Damaged, OutOfSpace, RetryLater: the window cannot be taken; the function has not run.
            Exception: what the function raises; the window is free again.
        """
        call = self._function.call(args, kwargs)
        moment = call.moment
        if moment is None:
            raise UserError(
                f"{self._function.title} was called without a context, but its windows belong to a run: "
                "pass the strategy's context, as an argument or as ctx=..."
            )
        start_ms = floor_ms(moment.when_ms if call.when_ms is None else call.when_ms, self._step_ms)
        scope, key, caller = scope_of(self._scopes, call), self._key_of(call, moment), _Caller()
        take = asyncio.create_task(self._take(scope, key, start_ms, caller), name=f"{self._function.title} takes")
        try:
            # Finish even if the caller is cancelled: otherwise a window would stay taken that no caller used.
            taking = await asyncio.shield(take)
            return None if taking is None else await self._function(call)
        except BaseException as error:
            caller.is_gone = True
            # A second cancellation of the caller does not stop it either.
            free = asyncio.create_task(self._give_back(take, error), name=f"{self._function.title} gives back")
            self._ending.add(free)
            free.add_done_callback(self._ending.discard)
            await asyncio.shield(free)
            raise

    async def _give_back(self, take: asyncio.Future[_Taking | None], error: BaseException) -> None:
        """Free the window, if it was taken. A failure is added to `error` as a note."""
        try:
            taking = await take
            if taking is not None:
                async with taking.turn():
                    await taking.give_back()
        except BacktestKitError as failure:
            if failure is not error:
                error.add_note(f"the window of {self._function.title} could not be freed: {failure}")

    async def _take(self, scope: Scope, key: Key, start_ms: int, caller: _Caller) -> _Taking | None:
        """Take a window, unless it or a later one is taken. If the caller is gone by then, the window is freed before
        another caller has its turn.
        """
        store = scope.store(_INTERVAL)
        async with scope.turn(_INTERVAL, key):
            while True:
                found = await store.get(_INTERVAL, key)
                # A repeated backtest ignores only the later windows that an earlier repetition left.
                used = await scope.seen(_INTERVAL, found) if found and scope.is_left(_INTERVAL, found) else found
                if used is not None and not used.removed and start_ms <= _window(used):
                    return None
                value: Plain = {"windowMs": start_ms}
                write = Write(_INTERVAL, key, value, when=scope.when_ms, expect=expectation(store, found))
                try:
                    taking = _Taking(scope, found, await scope.put(store, write))
                except Conflict:
                    continue
                if caller.is_gone:
                    await taking.give_back()
                    return None
                return taking

    def _key_of(self, call: Call, moment: RunContext) -> Key:
        if self._key is None:
            return (self.bucket, key_text([moment.strategy_name, moment.exchange_name, moment.symbol]))
        return (self.bucket, key_text(encode(self._key(*call.args, **call.kwargs), f"the key of {self.bucket}")))


class _Caller:
    """The caller that a window is taken for."""

    __slots__ = ("is_gone",)

    def __init__(self) -> None:
        self.is_gone = False


class _Taking:
    """A window that was taken, and the value before it."""

    def __init__(self, scope: Scope, before: Record | None, taken: Record) -> None:
        self._scope = scope
        self._before = before
        self._taken = taken

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Hold the turn of this process to take or free the window."""
        return self._scope.turn(_INTERVAL, self._taken.key)

    async def give_back(self) -> None:
        """Undo the taking, unless a later window was taken."""
        store, before, key = self._scope.store(_INTERVAL), self._before, self._taken.key
        write = Write(
            _INTERVAL,
            key,
            self._taken.value if before is None else before.value,
            when=self._taken.when if before is None else before.when,
            expect=expectation(store, self._taken),
            removed=before is None or before.removed,
        )
        try:
            await store.put(write)
        except Conflict:
            return


def _window(record: Record) -> int:
    value = record.value
    window_ms = value.get("windowMs") if isinstance(value, dict) else None
    if not isinstance(window_ms, int):
        raise UserError(f"interval {'/'.join(map(str, record.key))} holds {value!r}, which is not a window: remove it")
    return window_ms
