"""`Deliveries`: notifications on their way from the store to sinks, beside the trading and across restarts.

A sink has a place in the feed of notifications, which is stored; behind it is what was delivered. However many
processes have the sink and the store, one of them delivers what all of them tell (`records.place`). However long a
sink is dead, what is still to be delivered lies in the store, and nothing waits in memory. The exception is what the
store does not take, because the disk is full or the server is away: people must hear of just that, and get it at once.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import msgspec

from backtest_kit.errors import BacktestKitError, RetryLater, UserError
from backtest_kit.persist.codec import decode_as
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Key, Record, Store
from backtest_kit.records.place import Place, Reached
from backtest_kit.records.state import STATE
from backtest_kit.records.threaded import Deliver as Deliver, never_in_the_way
from backtest_kit.settings import Settings

if TYPE_CHECKING:
    from backtest_kit.model.identity import Mode
    from backtest_kit.persist.binding import Persistence
    from backtest_kit.records.notification import Notification

NOTIFICATION: Final = CONTRACTS["notification"]
CHUNK: Final = 256
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 300.0
DRAIN_S: Final = 5.0
GRACE_S: Final = 1.0
"""How long a sink that is cancelled may take to end before it is left to itself, and one that is closed to close."""
LOOK_S: Final = 1.0
"""After which the store is asked for what other processes have told."""
SETTLE_S: Final = 15.0
"""For how long something may still come in before what was delivered already: longer than a store tries a write."""
LATELY: Final = 32
"""Of how many that were delivered last whoever goes on after this process knows that they were."""
URGENT: Final = 1000
"""How many notifications that the store does not take wait for a sink; beyond it the oldest are let go of."""

_log = logging.getLogger(__name__)


class Refused(BacktestKitError):
    """A sink that will never take this notification: the next one is delivered instead."""


@runtime_checkable
class Sink(Protocol):
    """Where notifications go.

    A sink whose `name` says not all of that has also a `destination`: a text that is the same in every process that
    sends to the same receiver, and that is no secret. Sinks of one name and destination are one to the store.
    """

    @property
    def name(self) -> str: ...

    async def deliver(self, notification: Notification) -> None:
        """Hand it over; raise if that failed and is to be tried again, `Refused` if it is not.

        It is cancelled, and tried again, after `CC_MAX_NOTIFICATION_DELIVERY_SECONDS`.
        """
        ...

    async def close(self) -> None:
        """Let go of connections. It may be used again afterwards."""
        ...


class _Route(msgspec.Struct, frozen=True):
    name: str
    destination: str
    deliver: Deliver
    close: Callable[[], Awaitable[None]] | None
    kinds: tuple[str, ...]


class Deliveries:
    """The sinks of a program, and a task for each of them in every event loop and mode that has notifications."""

    def __init__(self, persistence: Callable[[], Persistence], settings: Callable[[], Settings]) -> None:
        self._persistence = persistence
        self._settings = settings
        self._routes: dict[str, _Route] = {}
        self._workers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, Mode], _Worker]] = (
            WeakKeyDictionary()
        )

    def add(self, sink: Sink | Deliver, name: str | None, kinds: tuple[str, ...]) -> None:
        if isinstance(sink, Sink):
            destination = str(getattr(sink, "destination", ""))
            route = _Route(name or sink.name, destination, sink.deliver, sink.close, kinds)
        elif callable(sink):
            route = _Route(name or str(getattr(sink, "__qualname__", "")), "", sink, None, kinds)
        else:
            raise UserError(f"sink is {sink!r}: give one of backtest_kit.sinks, or a function of a notification")
        if not route.name:
            raise UserError("the sink has no name: give name=, under which its progress is kept")
        if route.name in self._routes:
            raise UserError(f"a sink is called {route.name!r} already: give this one another name=")
        self._routes[route.name] = route

    async def begin(self, mode: Mode) -> None:
        """Have every sink go on where it was, in this event loop. What it has missed is delivered.

        Where the store does not tell a sink's place, it is asked again beside the trading.
        """
        workers = self._workers.setdefault(asyncio.get_running_loop(), {})
        for route in self._routes.values():
            if (route.name, mode) not in workers:
                worker = _Worker(
                    route,
                    self._persistence().store_for(NOTIFICATION, mode),
                    self._persistence().store_for(STATE, mode, history=False),
                    self._settings,
                )
                try:
                    await worker.place.find()
                except BacktestKitError as error:
                    _log.warning("sink %s: its place is not known yet: %s", worker, error)
                if workers.setdefault((route.name, mode), worker) is worker:
                    worker.start()

    def wake(self, mode: Mode) -> None:
        """Something was told."""
        for worker in self._of(mode):
            worker.news.set()

    def urge(self, mode: Mode, notifications: Iterable[Notification]) -> None:
        """Hand over what the store does not take. Once it does, each sink that had it then is spared it."""
        told = list(notifications)
        for worker in self._of(mode):
            worker.urge(told)

    def _of(self, mode: Mode) -> list[_Worker]:
        workers = self._workers.get(asyncio.get_running_loop(), {})
        return [worker for (_, of_mode), worker in workers.items() if of_mode == mode]

    async def close(self) -> None:
        """Deliver what can be delivered within `DRAIN_S` and end the tasks of this loop. The rest stays stored."""
        workers = self._workers.pop(asyncio.get_running_loop(), {})
        await asyncio.gather(*(worker.end() for worker in workers.values()))
        if workers:
            await asyncio.gather(*(_let_go(route) for route in self._routes.values()))


class _Worker:
    """Hands the notifications of one mode to one sink, the oldest first."""

    def __init__(self, route: _Route, store: Store, places: Store, settings: Callable[[], Settings]) -> None:
        self.news = asyncio.Event()
        self._hurried = asyncio.Event()
        self._route = route
        self._deliver_to = never_in_the_way(route.deliver)
        self._settings = settings
        self._store = store
        self.place = Place(places, route.name, route.destination, self._take_over)
        self._urgent: dict[str, Notification] = {}
        """What the store does not take and this sink has not got, by its id."""
        self._handed: dict[str, None] = {}
        """What it got without the store, by its id."""
        self._passed: dict[str, None] = {}
        """What of the newest it got, by its id, since this process delivers or before."""
        self._settled_at = 0.0
        self._ending = False
        self._task: asyncio.Task[None] | None = None
        self._stuck: asyncio.Task[None] | None = None
        """A try that goes on although it was cancelled."""

    def urge(self, notifications: Iterable[Notification]) -> None:
        for each in notifications:
            if each.notification_id not in self._handed:
                _remember(self._urgent, each.notification_id, each)
        self.news.set()
        self._hurried.set()

    def _take_over(self) -> None:
        """From now on this process delivers."""
        self._passed.clear()  # others may have delivered since
        self.news.set()

    def start(self) -> None:
        self.news.set()
        self.place.start()
        self._task = asyncio.create_task(self._run(), name=f"notifications to {self._route.name}")

    async def end(self) -> None:
        self._ending = True
        self.news.set()
        try:
            if self._task is not None:
                done, _ = await asyncio.wait({self._task}, timeout=DRAIN_S)
                if not done:
                    _log.warning("sink %s: not everything was delivered, the rest follows after the next start", self)
                    self._task.cancel()
                    await asyncio.wait({self._task})
        finally:
            await self.place.leave()

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                self.news.clear()
                await self._deliver_urgent()
                if self._ending:
                    await self.place.known()
                if await self.place.is_mine():
                    delivered = await self._deliver_some()
                    failures = 0
                    if delivered:
                        continue
                if self._ending and not self.news.is_set():  # else something was told while this looked
                    return
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S if self.place.is_shared else None):
                        await self.news.wait()
            except Exception as error:  # whatever a sink or its store raises, it may work later
                failures += 1
                if failures == 1 or failures % 10 == 0:
                    _log.warning("sink %s: attempt %d failed: %s", self, failures, _describe(error))
                pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures - 1, 20))
                with suppress(TimeoutError):
                    # What comes meanwhile is tried at once: a store that is away does not hold up what is urgent.
                    async with asyncio.timeout(pause * random.uniform(0.5, 1.0)):  # noqa: S311
                        await self._hurried.wait()
                self.place.start()

    async def _deliver_urgent(self) -> None:
        """Deliver what the store does not take."""
        self._hurried.clear()
        for name, notification in list(self._urgent.items()):
            await self._hand_over(notification)
            self._urgent.pop(name, None)
            _remember(self._handed, name, None)

    async def _deliver_some(self) -> bool:
        """Deliver the oldest of what is to be delivered by this process; False if there was nothing."""
        waiting = await self._oldest()
        late = await self._late(waiting) if self.place.is_shared else []
        for record in (*late, *waiting):
            if not await self.place.is_mine():
                return False
            await self._deliver(record)
            if record not in late:
                lately = tuple(list(self._passed)[-LATELY:])
                await self.place.move(Reached(record.written_at, str(record.key[1]), lately))
        return bool(late or waiting)

    async def _late(self, waiting: Sequence[Record]) -> list[Record]:
        """What has come in before something that was delivered already, the oldest first.

        Of two that write at once a server may show the later one first.
        """
        place = await self.place.find()
        last_id = place.last_id
        begins = not self._passed
        if not begins and time.monotonic() > self._settled_at:
            return []
        newest = [record async for record in self._store.scan(NOTIFICATION, newest_first=True, limit=CHUNK)]
        names = [str(record.key[1]) for record in newest]
        behind = names.index(last_id) if last_id in names else len(names)
        if begins:
            ahead = {str(record.key[1]) for record in waiting}
            # What lies among the last that were delivered, and is none of them, has come in since.
            known = [names.index(name) for name in place.lately if name in names]
            unknown = set(names[behind : max(known, default=behind)]).difference(place.lately)
            passed = [name for name in reversed(names) if name not in ahead and name not in unknown]
            self._passed = dict.fromkeys([*passed, last_id])
        return [record for record in reversed(newest[behind:]) if record.key[1] not in self._passed]

    async def _oldest(self) -> list[Record]:
        """The `CHUNK` oldest notifications behind the place of the sink, however many there are."""
        place = await self.place.find()
        # The clock is asked only where there is no last one, or it is forgotten by now: clocks are set back.
        last = (False, place.last_id)
        known = bool(place.last_id) and await self._store.get(NOTIFICATION, last) is not None
        for limit in (1, CHUNK):  # mostly there are none or few, and to list all is dear
            found, whole = await self._newest(last, None if known else place.since_ms, limit)
            if whole:
                return found
        return (await self._newest(last, None if known else place.since_ms, None))[0]

    async def _newest(self, last: Key, since_ms: int | None, limit: int | None) -> tuple[list[Record], bool]:
        """Among the newest `limit` notifications those behind `last`, the oldest first; and whether that is all."""
        oldest: deque[Record] = deque(maxlen=CHUNK)
        seen = 0
        async for record in self._store.scan(NOTIFICATION, newest_first=True, limit=limit):
            if record.key == last or (since_ms is not None and record.written_at < since_ms):
                return list(reversed(oldest)), True
            oldest.append(record)
            seen += 1
        return list(reversed(oldest)), seen != limit

    async def _deliver(self, record: Record) -> None:
        from backtest_kit.records.notification import Notification

        notification = decode_as(Notification, record.value)
        if notification.notification_id not in self._handed:
            self._urgent.pop(notification.notification_id, None)
            try:
                await self._hand_over(notification)
            except Exception:
                await self.place.leave()  # what this process is kept from, another one may be able to do
                raise
        _remember(self._passed, notification.notification_id, None)
        self._settled_at = time.monotonic() + SETTLE_S

    async def _hand_over(self, notification: Notification) -> None:
        if self._route.kinds and notification.kind not in self._route.kinds:
            return
        try:
            await self._try(notification, self._settings().CC_MAX_NOTIFICATION_DELIVERY_SECONDS)
        except Refused as error:
            _log.error("sink %s: %s was refused for good: %s", self, notification.notification_id, error)

    async def _try(self, notification: Notification, bound_s: float) -> None:
        """Have the sink take it, in a task of its own, which is over when this is: for good, or cancelled.

        Raises:
            RetryLater: it took longer than `bound_s` seconds.
            Exception: what the sink raises.
        """
        if self._stuck is not None and not (await asyncio.wait({self._stuck}, timeout=bound_s))[0]:
            raise RetryLater("it was cancelled and goes on all the same: it is tried again once that has ended")
        self._stuck = None
        taking = asyncio.create_task(self._take(notification), name=f"notification to {self._route.name}")
        try:
            in_time, _ = await asyncio.wait({taking}, timeout=bound_s)
        finally:
            if not taking.done():
                taking.cancel()
                await asyncio.wait({taking}, timeout=GRACE_S)
                self._stuck = None if taking.done() else taking
        if not in_time:
            if taking.done() and not taking.cancelled():
                taking.exception()  # seen, and no news: it came too late
            raise RetryLater(f"it has not answered within {bound_s:g} s: it is tried again")
        if taking.cancelled():
            raise RetryLater("it has cancelled itself: it is tried again")
        taking.result()

    async def _take(self, notification: Notification) -> None:
        answer: Any = self._deliver_to(notification)
        while inspect.isawaitable(answer):  # what a thread brings may be another one: of a lambda around a call
            answer = await answer

    def __str__(self) -> str:
        return self._route.name


async def _let_go(route: _Route) -> None:
    """Close a sink. One that fails to, or does not come to an end, keeps nobody from the rest."""
    if route.close is None:
        return
    try:
        async with asyncio.timeout(GRACE_S):
            await route.close()
    except Exception as error:  # whatever a sink raises, it is over
        _log.warning("sink %s: it could not be closed: %s", route.name, _describe(error))


def _remember(kept: dict[str, Any], name: str, value: object) -> None:
    kept[name] = value
    if len(kept) > URGENT:
        del kept[next(iter(kept))]


def _describe(error: Exception) -> str:
    """Our own messages are free of secrets; of others only the kind is told, for a URL may be a secret."""
    if isinstance(error, BacktestKitError):
        return str(error)
    return type(error).__name__
