"""`measure.cached`: expensive answers, such as those of a model or an API, are fetched once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from backtest_kit.errors import UserError
from backtest_kit.model.identity import Mode
from backtest_kit.model.interval import floor_ms, interval_ms, to_datetime
from backtest_kit.persist.codec import decode, encode
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Key, Plain
from backtest_kit.records.function import Call, Decorated, Function, Names, R, key_text, scope_of
from backtest_kit.records.scope import Scope, Scopes

_MEASURE: Final = CONTRACTS["measure"]
_WINDOW: Final = "%Y-%m-%dT%H%MZ"

_log = logging.getLogger(__name__)


class Measure:
    """Caches of function calls that survive restarts and are shared by backtest, paper and live."""

    def __init__(self, scopes: Scopes) -> None:
        self._scopes = scopes
        self._names = Names()

    def cached(
        self,
        interval: str | None = None,
        *,
        key: Callable[..., Any] | None = None,
        name: str | None = None,
        version: str | None = None,
    ) -> Callable[[Callable[..., Awaitable[R]]], Cached[R]]:
        """Decorate an async function: repeated calls are answered from the store.

        Args:
            interval: 1m to 1d. An answer is valid to the end of its aligned window, in the time of the call: that of a
                context among its arguments, of `ctx=` or of `when=`; the function need not take the last two. Without
                an interval an answer is valid permanently.
            key: A function of the same arguments that returns what distinguishes calls. By default all arguments do,
                and of a context its exchange and symbol.
            name, version: The name that answers are stored under. By default the function's qualified name and a hash
                of its source: answers of an older source are not found. Functions that it calls are not in the hash, so
                raise `version` when they change the answers. Functions that are given the same name and version share
                answers.

        Answers later than the time of the call are not used. Concurrent callers with the same key share one call; it is
        cancelled only when all of them are. Errors are not cached.

        Raises:
            UserError: the interval is unknown, or the function is not async or has no source to hash; or it has no name
                of its own (name=...) and uses variables of an enclosing function, or a cached function elsewhere has
                the same name and source.
        """
        step_ms = None if interval is None else interval_ms(interval)

        def decorate(function: Callable[..., Awaitable[R]]) -> Cached[R]:
            named = Function("measure.cached", function, name, version, hashed=True)
            self._names.claim(named, whatever_defaults=key is None)  # without a key they are part of it
            return Cached(self._scopes, named, interval, step_ms, key)

        return decorate


class _Flight:
    """A running call, and the number of its callers."""

    __slots__ = ("call", "task", "waiting")

    def __init__(self, call: Call, task: asyncio.Task[Plain]) -> None:
        self.call = call
        self.task = task
        self.waiting = 0

    def serves(self, call: Call) -> bool:
        """Whether its answer is not later than the time of `call`."""
        return call.now_ms is None or self.call.now_ms is None or self.call.now_ms <= call.now_ms


class Cached(Decorated[R]):
    """A function whose answers are cached. Call it like the function; each caller gets its own copy of the answer."""

    def __init__(
        self,
        scopes: Scopes,
        function: Function[R],
        interval: str | None,
        step_ms: int | None,
        key: Callable[..., Any] | None,
    ) -> None:
        super().__init__(scopes, function, key)
        self._interval = interval
        self._step_ms = step_ms
        self._flights: dict[tuple[object, ...], list[_Flight]] = {}

    async def __call__(self, *args: Any, **kwargs: Any) -> R:
        """The cached answer, or that of the function. Answers have passed through the store's codec: tuples become
        lists, structs become dicts.

        Raises:
            UserError: the function has an interval and the call no time, or a value cannot be stored.
            LookAhead: `when` is later than the context.
            Damaged, RetryLater: the store cannot be read.
            Exception: what the function raises.
        """
        call = self._function.call(args, kwargs)
        scope, key = scope_of(self._scopes, call), self._key_of(call)
        name = (asyncio.get_running_loop(), scope.store(_MEASURE), key)
        flights = self._flights.setdefault(name, [])
        flight = next((each for each in flights if each.serves(call)), None)
        if flight is None:
            flight = _Flight(call, asyncio.create_task(self._answer(call, scope, key), name=self._function.title))
            flights.append(flight)
            flight.task.add_done_callback(partial(self._land, name, flight))
        flight.waiting += 1
        try:
            answer: R = decode(await asyncio.shield(flight.task))
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                # Later callers must not wait for an answer that will not come.
                self._land(name, flight)
                flight.task.cancel()
        return answer

    async def list(self, *, mode: Mode = "live") -> dict[str, Any]:
        """The cached answers by key, newest first.

        Raises:
            Damaged, RetryLater: as `Store.scan`.
        """
        store = self._scopes(mode).store(_MEASURE)
        records = store.scan(_MEASURE, (self.bucket,), newest_first=True)
        return {str(record.key[-1]): decode(record.value) async for record in records}

    async def remove(self, *args: Any, **kwargs: Any) -> bool:
        """Forget the answer to a call with these arguments, and return whether there was one.

        Raises:
            As a call.
        """
        call = self._function.call(args, kwargs)
        return await scope_of(self._scopes, call).remove(_MEASURE, self._key_of(call))

    async def clear(self, *, mode: Mode = "live") -> int:
        """Forget every answer, and return how many there were. The store keeps them, marked as removed.

        Raises:
            Damaged, OutOfSpace, RetryLater: as `Store.put`.
        """
        scope = self._scopes(mode)
        keys = [record.key async for record in scope.store(_MEASURE).scan(_MEASURE, (self.bucket,))]
        return sum([await scope.remove(_MEASURE, key) for key in keys])

    async def _answer(self, call: Call, scope: Scope, key: Key) -> Plain:
        """The cached answer, else what the function returns, which is then cached."""
        record = await scope.read(_MEASURE, key)
        if record is not None:
            return record.value
        answer = encode(await self._function(call), f"what {self._function.title} returned")
        try:
            await scope.write(_MEASURE, key, answer)
        except Exception as error:
            # The answer is there; if it cannot be cached, the next caller computes it again.
            _log.warning("an answer of %s could not be cached: %s", self.bucket, error, extra={"error": error})
        return answer

    def _land(self, name: tuple[object, ...], flight: _Flight, ended: asyncio.Task[Plain] | None = None) -> None:
        """Let no more callers join this call. Idempotent."""
        flights = self._flights.get(name, [])
        if flight in flights:
            flights.remove(flight)
            if not flights:
                del self._flights[name]
        if ended is not None and not ended.cancelled():
            ended.exception()  # mark the error as retrieved, even if all callers are gone

    def _key_of(self, call: Call) -> Key:
        function, moment = self._function, call.moment
        if self._key is not None:
            text = key_text(encode(self._key(*call.args, **call.kwargs), f"the key of {function.title}"))
        else:
            place: list[Plain] = [] if moment is None else [moment.exchange_name, moment.symbol]
            text = key_text([*place, function.arguments(call)])
        if self._step_ms is None:
            return (self.bucket, text)
        if call.when_ms is None:
            raise UserError(
                f"{function.title} was called without a time, but its answers are valid for {self._interval}: "
                "pass the strategy's context (as an argument, or as ctx=...), or when=..."
            )
        return (self.bucket, f"{to_datetime(floor_ms(call.when_ms, self._step_ms)):{_WINDOW}} {self._interval} {text}")
