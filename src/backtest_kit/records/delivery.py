"""`Notifications`: messages to people about runs, and the sinks that get them, next to trading and across restarts.

Each sink has a task that hands over what waits in the store (`records.outbox`). A sink that fails is tried again with
growing pauses; its notifications wait in the store, in order, and no other sink waits for it. The exception is what
the store does not take, because the disk is full or the server is away: that is when people must hear of a closed
position, so the sinks get it directly, at most `URGENT` notifications of it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Unpack
from weakref import WeakKeyDictionary

import msgspec

from backtest_kit.errors import BacktestKitError, Damaged, UserError
from backtest_kit.model.identity import Mode
from backtest_kit.persist.codec import decode_as
from backtest_kit.persist.contracts import DELIVERY
from backtest_kit.persist.writing import now_ms
from backtest_kit.records.attempt import GRACE_S, Attempts
from backtest_kit.records.notification import NOTIFICATION, Notification
from backtest_kit.records.outbox import Outbox, Pending
from backtest_kit.records.scope import Scopes, View
from backtest_kit.records.signals import matching, newest
from backtest_kit.records.sinks import Deliver, Refused, Sink
from backtest_kit.settings import Settings

if TYPE_CHECKING:
    from backtest_kit.persist.binding import Persistence

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 300.0
DRAIN_S: Final = 5.0
RELEASE_S: Final = 5.0
"""How long a store may take to release a claim, and how much longer than the sink a claim lasts."""
LOOK_S: Final = 1.0
"""How often the store is polled for notifications of other processes."""
URGENT: Final = 1000
"""How many notifications that the store does not take wait for a sink. Beyond it the oldest are dropped."""

_log = logging.getLogger(__name__)


class Notifications:
    """The notifications of a program and the sinks that get them: `kit.records.notification`."""

    def __init__(self, scope: Scopes, deliveries: Deliveries) -> None:
        self._scope = scope
        self._deliveries = deliveries

    def sink(self, deliver: Sink | Deliver, *, name: str | None = None, kinds: Sequence[str] = ()) -> None:
        """Hand every notification of live and paper runs to `deliver`, from now on.

        A sink gets them in order, one at a time, while trading goes on. One that raises is called again, as long as
        it takes, also after a restart. So it gets each notification at least once; `notification_id` shows a
        repetition. A sink that is added for the first time gets only what is written from then on.

        Args:
            deliver: One of `backtest_kit.sinks`, or a function of a `Notification`, which is called in a thread
                if it is not async.
            name: The name of its marks in the store; by default that of the sink, or of the function.
            kinds: Only these kinds, such as ["opened", "closed"]; by default all.

        Raises:
            UserError: it is neither, has no name, or the name is taken.
        """
        self._deliveries.add(deliver, name, tuple(kinds))

    async def list(
        self,
        *,
        kind: str | None = None,
        symbol: str | None = None,
        strategy_name: str | None = None,
        limit: int | None = None,
        **view: Unpack[View],
    ) -> list[Notification]:
        """The notifications that match all of this, newest first; no more than `limit`.

        Raises:
            UserError: a backtest without its run id, or `limit` is below 0.
            Damaged, RetryLater: as `Store.scan`.
        """
        wanted = matching(kind=kind, symbol=symbol, strategy_name=strategy_name)
        scope = self._scope(**view)
        return await newest(
            scope, NOTIFICATION, (scope.mode == "backtest",), partial(decode_as, Notification), wanted, limit
        )


class _Route(msgspec.Struct, frozen=True):
    name: str
    destination: str
    deliver: Deliver
    close: Callable[[], Awaitable[None]] | None
    kinds: tuple[str, ...]
    added_ms: int

    @property
    def key(self) -> str:
        """What the sink is called in the store."""
        return f"{self.name} {self.destination}" if self.destination else self.name


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
            route = _Route(name or sink.name, destination, sink.deliver, sink.close, kinds, now_ms())
        elif callable(sink):
            route = _Route(name or str(getattr(sink, "__qualname__", "")), "", sink, None, kinds, now_ms())
        else:
            raise UserError(f"sink is {sink!r}: give one of backtest_kit.sinks, or a function of a notification")
        if not route.name:
            raise UserError("the sink has no name: give name=, the name of its marks in the store")
        if route.name in self._routes:
            raise UserError(f"a sink is called {route.name!r} already: give this one another name=")
        self._routes[route.name] = route

    async def begin(self, mode: Mode) -> None:
        """Start every sink in this event loop: it gets what it has missed.

        A store that does not answer is retried in the background.
        """
        workers = self._workers.setdefault(asyncio.get_running_loop(), {})
        for route in self._routes.values():
            if (route.name, mode) not in workers:
                persistence = self._persistence()
                notifications = persistence.store_for(NOTIFICATION, mode, history=False)
                # A user's object that keeps the notifications keeps nothing else.
                elsewhere = None if notifications.keeps(DELIVERY) else persistence.store_for(DELIVERY, mode)
                outbox = Outbox(notifications, route.key, route.added_ms, persistence.seams, marks=elsewhere)
                try:
                    await outbox.add()
                except BacktestKitError as error:
                    _log.warning("sink %s: it could not be added to the store yet: %s", route.name, error)
                worker = _Worker(route, outbox, self._settings)
                if workers.setdefault((route.name, mode), worker) is worker:
                    worker.start()

    def wake(self, mode: Mode) -> None:
        """A notification was written."""
        for worker in self._of(mode):
            worker.news.set()

    def urge(self, mode: Mode, notifications: Iterable[Notification]) -> None:
        """Hand over what the store does not take. Once it does, a sink that had it is not called again."""
        urgent = list(notifications)
        for worker in self._of(mode):
            worker.urge(urgent)

    def _of(self, mode: Mode) -> list[_Worker]:
        workers = self._workers.get(asyncio.get_running_loop(), {})
        return [worker for (_, of_mode), worker in workers.items() if of_mode == mode]

    async def close(self) -> None:
        """Deliver what can be delivered within `DRAIN_S` and end the tasks of this loop. The rest stays stored."""
        workers = self._workers.pop(asyncio.get_running_loop(), {})
        await asyncio.gather(*(worker.end() for worker in workers.values()))
        if workers:
            await asyncio.gather(*(_close(route) for route in self._routes.values()))


class _Worker:
    """Hands the notifications of one mode to one sink, oldest first."""

    def __init__(self, route: _Route, outbox: Outbox, settings: Callable[[], Settings]) -> None:
        self.news = asyncio.Event()
        self._hurried = asyncio.Event()
        self._route = route
        self._outbox = outbox
        self._settings = settings
        self._attempts = Attempts(route.deliver, route.name)
        self._urgent: dict[str, Notification] = {}
        """What the store does not take and this sink has not got, by its id."""
        self._handed: dict[str, None] = {}
        """What the sink got of this process and the store may not know of, by its id."""
        self._failures = 0
        self._ending = False
        self._task: asyncio.Task[None] | None = None

    def urge(self, notifications: Iterable[Notification]) -> None:
        for each in notifications:
            if each.notification_id not in self._handed:
                _remember(self._urgent, each.notification_id, each)
        self.news.set()
        self._hurried.set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"notifications to {self._route.name}")

    async def end(self) -> None:
        self._ending = True
        self.news.set()
        try:
            if self._task is not None:
                done, _ = await asyncio.wait({self._task}, timeout=DRAIN_S)
                if not done:
                    _log.warning(
                        "sink %s: not everything was delivered, the rest follows after the next start", self._route.name
                    )
        finally:
            if self._task is not None:
                self._task.cancel()
                await asyncio.wait({self._task})
            await self._release()

    async def _run(self) -> None:
        while True:
            try:
                self.news.clear()
                await self._deliver_urgent()
                await self._outbox.add()
                if await self._deliver_pending():
                    continue
                self._failures = 0
                if self._ending and not self.news.is_set():  # else something was written while this looked
                    return
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S if self._outbox.is_shared else None):
                        await self.news.wait()
            except Exception as error:  # a sink or its store may raise anything, and may work later
                await self._release()  # what this process cannot reach, another one may
                await self._pause(error)

    async def _pause(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == 1 or self._failures % 10 == 0:
            _log.warning("sink %s: attempt %d failed: %s", self._route.name, self._failures, _describe(error))
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._failures - 1, 20))
        with suppress(TimeoutError):
            # Urgent ones are tried immediately: a store that is away does not hold them up.
            async with asyncio.timeout(pause * random.uniform(0.5, 1.0)):  # noqa: S311
                await self._hurried.wait()

    async def _deliver_urgent(self) -> None:
        self._hurried.clear()
        for name, notification in list(self._urgent.items()):
            await self._hand_over(notification)
            self._urgent.pop(name, None)

    async def _deliver_pending(self) -> bool:
        """Deliver the oldest that wait. False if none do, or another process is delivering the oldest."""
        pending = await self._outbox.pending()
        for each in pending:
            if not await self._deliver(each):
                return False
            self._failures = 0
        return bool(pending)

    async def _deliver(self, pending: Pending) -> bool:
        try:
            notification = decode_as(Notification, pending.record.value)
        except Damaged as error:
            _log.error("sink %s: %s is not a notification: %s", self._route.name, pending.record.key[1], error)
        else:
            name = notification.notification_id
            if name not in self._handed and self._wants(notification):
                bound_s = self._settings().CC_MAX_NOTIFICATION_DELIVERY_SECONDS + GRACE_S + RELEASE_S
                if not await self._outbox.claim(pending, bound_s):
                    return False
                self._urgent.pop(name, None)
                await self._hand_over(notification)
        await self._outbox.delivered(pending)
        return True

    async def _hand_over(self, notification: Notification) -> None:
        if self._wants(notification):
            try:
                await self._attempts.hand_over(notification, self._settings().CC_MAX_NOTIFICATION_DELIVERY_SECONDS)
            except Refused as error:
                name = notification.notification_id
                _log.error("sink %s: %s was refused permanently: %s", self._route.name, name, error)
        # Even if the store does not take the mark now, this process does not deliver it again.
        _remember(self._handed, notification.notification_id, None)

    def _wants(self, notification: Notification) -> bool:
        return not self._route.kinds or notification.kind in self._route.kinds

    async def _release(self) -> None:
        try:
            async with asyncio.timeout(RELEASE_S):
                await self._outbox.release()
        except (BacktestKitError, TimeoutError) as error:
            _log.info("sink %s: its claim could not be released, it lapses: %s", self._route.name, error)


async def _close(route: _Route) -> None:
    """Close a sink. One that fails to, or does not come to an end, keeps no other from closing."""
    if route.close is None:
        return
    try:
        async with asyncio.timeout(GRACE_S):
            await route.close()
    except Exception as error:  # a sink may raise anything
        _log.warning("sink %s: it could not be closed: %s", route.name, _describe(error))


def _remember(kept: dict[str, Any], name: str, value: object) -> None:
    kept[name] = value
    if len(kept) > URGENT:
        del kept[next(iter(kept))]


def _describe(error: Exception) -> str:
    """Our own messages are free of secrets; of others only the type is logged, because a URL may be a secret."""
    if isinstance(error, BacktestKitError):
        return str(error)
    return type(error).__name__
