"""Typed events: which handlers and streams get what, in which order, and who waits for whom."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Final, Generic, TypeVar, cast
from weakref import WeakKeyDictionary

from backtest_kit.errors import UserError
from backtest_kit.model.event import Event

E = TypeVar("E", bound=Event)
T = TypeVar("T")

Handler = Callable[[T], object] | Callable[[T, Any], object]
"""A function of what happened, or of that and the context; sync or async. What it returns is ignored."""

Listener = Callable[[T, object], object]
"""A handler as it is called: always with the context. An answer that can be awaited must be."""


def as_listener(handler: Handler[T], *, given: str = "event") -> Listener[T]:
    """A handler of one or two arguments as a function of two.

    The context goes to a second parameter that is required or named `ctx`; another one with a default, as in
    `lambda event, symbol=symbol: ...`, keeps it. `given` names the first argument in the message.

    Raises:
        UserError: it is not a function, is a generator, or takes other arguments than these.
    """
    shapes = f"({given}) or ({given}, ctx)"
    if not callable(handler):
        raise UserError(f"handler {handler!r} is not a function: give a function of {shapes}")
    name = handler_name(handler)
    if inspect.isgeneratorfunction(handler) or inspect.isasyncgenfunction(handler):
        raise UserError(f"handler {name} has a yield, so that calling it does nothing: return instead")
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError):  # some builtins have no signature; those that can be handlers take one argument
        return _without_context(handler)
    places = [each for each in signature.parameters.values() if each.kind < inspect.Parameter.VAR_POSITIONAL]
    takes_context = len(places) > 1 and (places[1].default is inspect.Parameter.empty or places[1].name == "ctx")
    try:
        signature.bind(*(None, None)[: 1 + takes_context])
    except TypeError:
        raise UserError(f"handler {name} takes {signature}: give a function of {shapes}") from None
    return cast("Listener[T]", handler) if takes_context else _without_context(handler)


def _without_context(handler: Handler[T]) -> Listener[T]:
    call = cast("Callable[[T], object]", handler)
    return lambda value, _: call(value)


def handler_name(handler: object) -> str:
    """What a message calls a handler."""
    return str(getattr(handler, "__qualname__", None) or repr(handler))


class _Delivery:
    """One event on its way to one handler."""

    __slots__ = ("inside", "over", "waits_for")

    def __init__(self, inside: _Delivery | None) -> None:
        self.inside = inside
        """The delivery whose handler this event came about in."""
        self.over = False
        self.waits_for: _Turn | None = None
        """Where an event that came about in its handler is now."""


class _Turn:
    """Whose turn it is with a handler; asyncio's lock is first come, first served."""

    __slots__ = ("holder", "lock")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.holder: _Delivery | None = None


_INSIDE: Final[ContextVar[_Delivery | None]] = ContextVar("backtest_kit_delivery", default=None)


class _Subscription:
    __slots__ = ("end", "kinds", "listener", "live", "name", "once", "strategy_name", "symbol", "turns")

    def __init__(
        self,
        kinds: tuple[type[Event], ...],
        listener: Listener[Any],
        symbol: str | None,
        strategy_name: str | None,
        *,
        name: str,
        once: bool = False,
        end: Callable[[], None] = lambda: None,
    ) -> None:
        given: tuple[object, ...] = kinds
        for kind in given:
            if not (isinstance(kind, type) and issubclass(kind, Event)):
                raise UserError(f"kind is {kind!r}: give event types, such as PositionClosed, or Event for all of them")
        if not kinds:
            raise UserError("no kind of event is given: name some, such as PositionClosed, or Event for all of them")
        for field, value in (("symbol", symbol), ("strategy_name", strategy_name)):
            if not (value is None or isinstance(value, str)):
                raise UserError(f"{field} is {value!r}: give one name, or None for all")
        self.kinds = kinds
        self.listener = listener
        self.symbol = symbol
        self.strategy_name = strategy_name
        self.name = name
        self.once = once
        self.end = end
        self.live = True
        # A blocking run has an event loop of its own, maybe while an outer one stands still in the middle of a turn.
        self.turns: WeakKeyDictionary[asyncio.AbstractEventLoop, _Turn] = WeakKeyDictionary()

    def wants(self, kind: type[Event], symbol: str, strategy_name: str) -> bool:
        return (
            issubclass(kind, self.kinds)
            and self.symbol in (None, symbol)
            and self.strategy_name in (None, strategy_name)
        )

    async def deliver(self, event: Event, ctx: object) -> None:
        loop = asyncio.get_running_loop()
        turn = self.turns.get(loop) or self.turns.setdefault(loop, _Turn())
        inside = _INSIDE.get()
        while inside is not None and inside.over:
            inside = inside.inside
        delivery = _Delivery(inside)
        if inside is not None:
            self._refuse_deadlock(turn, inside, event)
            inside.waits_for = turn
        try:
            async with turn.lock:
                turn.holder = delivery
                # Not reset afterwards: tasks that the handler started have a copy, so `over` must tell anyway.
                _INSIDE.set(delivery)
                try:
                    answer = self.listener(event, ctx)
                    if inspect.isawaitable(answer):
                        await answer
                finally:
                    delivery.over = True
                    turn.holder = None
        finally:
            if inside is not None:
                inside.waits_for = None

    def _refuse_deadlock(self, turn: _Turn, inside: _Delivery, event: Event) -> None:
        """Raise if this turn can only come after a handler that itself waits for this event to be delivered."""
        waiting = set()
        outer: _Delivery | None = inside
        while outer is not None:
            waiting.add(outer)
            outer = outer.inside
        next_turn: _Turn | None = turn
        while next_turn is not None and (holder := next_turn.holder) is not None:
            if holder in waiting:
                raise UserError(
                    f"handler {self.name} would wait for itself: a {type(event).__name__} of "
                    f"{event.identity.strategy_name} {event.symbol} came about while it was busy with the event that "
                    "led to it. Narrow it with symbol= or strategy_name=, or start runs outside of handlers"
                )
            next_turn = holder.waits_for


class EventBus:
    """Hands events to handlers and streams, in order and without losing any.

    Each handler sees one event at a time, in the order in which each run emitted them. The run that emits
    waits for the handlers: a slow handler slows its run, and a handler's commands are done before the run goes on.
    """

    def __init__(self) -> None:
        self._subscriptions: tuple[_Subscription, ...] = ()
        self._some_ended = False
        self._version = 0

    @property
    def version(self) -> int:
        """Changes whenever `wanted` may answer differently."""
        return self._version

    @property
    def listened(self) -> bool:
        """Whether anyone has subscribed to anything."""
        return bool(self._subscriptions)

    def on(
        self,
        kind: type[E] | tuple[type[E], ...],
        handler: Handler[E],
        *,
        symbol: str | None = None,
        strategy_name: str | None = None,
        once: bool = False,
    ) -> Callable[[], None]:
        """Call `handler` with every event of a kind; returns the function that ends it, which may be called twice.

        Starting and ending take effect with the next event that is emitted. An error of a handler is raised to the
        run that emitted the event, and stops a backtest.

        Args:
            kind: A type of event or several; the base `Event` stands for all.
            handler: A function of `(event)` or `(event, ctx)`, sync or async. Its commands
                (`await ctx.position.close()`) take effect before the run continues.
            symbol, strategy_name: Only events of these; None is any.
            once: Only the first such event, even of several runs at once.

        Raises:
            UserError: an argument is wrong.
        """
        kinds = kind if isinstance(kind, tuple) else (kind,)
        listener, name = as_listener(handler), handler_name(handler)
        subscription = _Subscription(kinds, listener, symbol, strategy_name, name=name, once=once)
        self._add(subscription)
        return lambda: self._end(subscription)

    def events(
        self, *kinds: type[E], symbol: str | None = None, strategy_name: str | None = None, limit: int = 1000
    ) -> EventStream[E]:
        """The events of these kinds as an async iterator. It begins with this call.

        Up to `limit` events wait to be read; then the runs wait. So read it in a task of its own, and leave it when
        done: by the end of its `async for`, by `async with`, by `aclose()`, or by dropping the last reference.

        Raises:
            UserError: an argument is wrong.
        """
        given: object = limit
        if not isinstance(given, int) or given < 1:
            raise UserError(f"limit is {limit!r}: give the number of events that may wait to be read, 1 or more")
        queue: _Queue[E] = _Queue(limit)
        subscription = _Subscription(kinds, queue.put, symbol, strategy_name, name="of a stream", end=queue.end)
        self._add(subscription)
        return EventStream(queue, lambda: self._end(subscription))

    def wanted(self, kind: type[Event], *, symbol: str, strategy_name: str) -> bool:
        """Whether anyone would get such an event. The answer holds as long as `version` does."""
        return any(each.wants(kind, symbol, strategy_name) for each in self._current())

    async def emit(
        self,
        event: Event,
        ctx: object = None,
        *,
        failed: Callable[[str, Exception], Awaitable[None]] | None = None,
    ) -> None:
        """Hand an event to all subscribers, one after the other in the order of their registration.

        `failed` is called with a handler's name and its error; unless it raises, the other handlers go on.

        Raises:
            UserError: a handler would wait for itself, because it led to this event and wants it too.
            Exception: what a handler raises; those after it do not get the event.
        """
        kind, identity = type(event), event.identity
        for subscription in self._current():
            if not subscription.wants(kind, identity.symbol, identity.strategy_name):
                continue
            if subscription.once:
                if not subscription.live:
                    continue
                self._end(subscription)
            try:
                await subscription.deliver(event, ctx)
            except Exception as error:
                if failed is None:
                    raise
                await failed(f"handler {subscription.name}", error)

    def close(self) -> None:
        """End all handlers and streams. What a stream holds can still be read."""
        for subscription in self._current():
            self._end(subscription)

    def _add(self, subscription: _Subscription) -> None:
        self._subscriptions = (*self._current(), subscription)
        self._version += 1

    # A stream may be ended by the garbage collector, at any moment and in any thread: that sets flags, no more.
    def _end(self, subscription: _Subscription) -> None:
        if subscription.live:
            subscription.live = False
            self._some_ended = True
            self._version += 1
            subscription.end()

    def _current(self) -> tuple[_Subscription, ...]:
        if self._some_ended:
            self._some_ended = False
            self._subscriptions = tuple(each for each in self._subscriptions if each.live)
        return self._subscriptions


class _Queue(Generic[E]):
    """Events between the runs and a reader."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[E] = deque()
        self._ended = False
        self._waiters: set[asyncio.Future[None]] = set()

    async def put(self, event: E, _: object) -> None:
        await self._until(lambda: len(self._items) < self._limit or self._ended)
        if not self._ended:
            self._items.append(event)
            self._wake()

    async def get(self) -> E:
        await self._until(lambda: bool(self._items) or self._ended)
        if not self._items:
            raise StopAsyncIteration
        event = self._items.popleft()
        self._wake()
        return event

    def end(self) -> None:
        self._ended = True
        self._wake()

    def clear(self) -> None:
        self._items.clear()

    async def _until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                if not ready():  # again: another thread may have ended it before there was a waiter to wake
                    await waiter
            finally:
                self._waiters.discard(waiter)

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.pop()
            with suppress(RuntimeError):  # its loop is closed: no task waits there any more
                waiter.get_loop().call_soon_threadsafe(_resolve, waiter)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class EventStream(AsyncIterator[E]):
    """Events as they come, from `EventBus.events`.

    `async for` reads until it is left, and leaving it ends the stream: a stream without a reader would block
    the runs permanently. `await anext(stream)` reads one event and goes on listening.
    """

    def __init__(self, queue: _Queue[E], end: Callable[[], None]) -> None:
        self._queue = queue
        self._end = end

    def __aiter__(self) -> AsyncIterator[E]:
        return _Loop(self)

    async def __anext__(self) -> E:
        return await self._queue.get()

    async def aclose(self) -> None:
        """Stop listening and forget what was not read. It may be called twice."""
        self._stop()

    async def __aenter__(self) -> EventStream[E]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def __del__(self) -> None:
        self._stop()

    def _stop(self) -> None:
        self._end()
        self._queue.clear()


class _Loop(AsyncIterator[E]):
    """One `async for` over a stream: Python lets go of it when the loop is left, whichever way."""

    def __init__(self, stream: EventStream[E]) -> None:
        self._stream = stream

    async def __anext__(self) -> E:
        try:
            return await anext(self._stream)
        except BaseException:  # a traceback that is kept would keep this object too
            self._stream._stop()
            raise

    def __del__(self) -> None:
        self._stream._stop()
