"""`RecordWriter`: writes the records of a run's events: signals, the last signal, and notifications."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from backtest_kit.errors import BacktestKitError, Conflict
from backtest_kit.model.event import Event
from backtest_kit.model.identity import Mode
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.store import ANY, Capability, Store, Write
from backtest_kit.records.notification import NOTIFICATION, notification_of, notification_writes
from backtest_kit.records.scope import expectation
from backtest_kit.records.signals import RECENT, STORAGE, follows, signal_writes

if TYPE_CHECKING:
    from backtest_kit.persist.binding import Persistence
    from backtest_kit.records.delivery import Deliveries

ROWS: Final = (STORAGE, RECENT, NOTIFICATION)
TOGETHER_S: Final = 0.05
"""How long events of a backtest are collected: a signal that opens and closes meanwhile is written once."""
MOST_HELD: Final = 2_000
"""Events of a backtest that wait for a store; the backtest waits with them then."""
KEPT_EVENTS: Final = 5_000
"""Of backtests whose records are in memory and were not read yet. Beyond it the oldest runs are dropped."""


_log = logging.getLogger("backtest_kit")


class RecordWriter:
    """Gets events once they are final, and may get the same ones again."""

    def __init__(self, persistence: Callable[[], Persistence], deliveries: Deliveries) -> None:
        self._persistence = persistence
        self._deliveries = deliveries
        self._unwritten: OrderedDict[str, list[Event]] = OrderedDict()
        self._count = 0
        self._put_off_whole: set[str] = set()
        """Runs among them of which nothing is written anywhere else."""
        self._held: dict[str, _Held] = {}

    async def observe(self, events: Sequence[Event], mode: Mode, run_id: str | None) -> None:
        """Write the records of `events`, with one write for each record that they change.

        A backtest is faster than any store, so its events are written together a moment later: `settle` waits for that.

        Raises:
            Damaged, OutOfSpace, RetryLater: as `Store.put`; in a backtest for earlier events. The same events can
                be passed again.
        """
        if run_id in self._put_off_whole:
            # The common case, in the middle of a replay: nothing is looked up.
            self._unwritten[run_id].extend(events)
            self._count += len(events)
            return
        persistence = self._persistence()
        in_memory = [row for row in ROWS if run_id is not None and persistence.in_memory(row, mode)]
        if run_id is not None and in_memory:
            self._put_off(events, run_id, persistence)
            if len(in_memory) == len(ROWS):
                self._put_off_whole.add(run_id)
                return
        if run_id is not None:
            await self._hold(events, run_id)
            return
        await self._deliveries.begin(mode)
        writes = await self._keep(events, mode, None)
        if any(write.contract is NOTIFICATION for write in writes):
            self._deliveries.wake(mode)

    async def settle(self, run_id: str) -> None:
        """Wait until all records of a backtest are written. Raises as `observe`."""
        if run_id in self._held:
            await self._held[run_id].settle()

    async def close(self) -> None:
        """Write what can be written of the records of backtests."""
        for run_id, held in list(self._held.items()):
            if not held.is_here:
                continue
            try:
                await held.settle()
            except BacktestKitError as error:
                _log.warning("records of run %s cannot be written: %s", run_id, error)

    async def _hold(self, events: Sequence[Event], run_id: str) -> None:
        held = self._held.get(run_id)
        if held is None:

            async def keep(waiting: Sequence[Event]) -> None:
                await self._keep(waiting, "backtest", run_id)

            held = self._held[run_id] = _Held(keep, lambda: self._held.pop(run_id, None))
        await held.take(events)

    async def _keep(self, events: Sequence[Event], mode: Mode, run_id: str | None) -> list[Write]:
        persistence = self._persistence()
        writes = [
            write for write in _writes(events) if run_id is None or not persistence.in_memory(write.contract, mode)
        ]
        results = await asyncio.gather(
            *(
                self._put(persistence, row, [write for write in writes if write.contract is row], mode, run_id)
                for row in ROWS
            ),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return writes

    def urge(self, events: Sequence[Event], mode: Mode) -> None:
        """Notify people of `events` that could not be written. Written later, they are not delivered again."""
        self._deliveries.urge(mode, filter(None, map(notification_of, events)))

    async def _put(
        self, persistence: Persistence, row: Contract, writes: list[Write], mode: Mode, run_id: str | None
    ) -> None:
        if not writes:
            return
        store = persistence.store_for(row, mode, run_id)
        if Capability.COMPARE_AND_SET not in store.capabilities:
            writes = [Write(row, write.key, write.value, write.when, ANY) for write in writes]
        # A repeated backtest replaces its records. A live process that was paused and overtaken must not.
        compares = row is not NOTIFICATION and mode != "backtest" and Capability.COMPARE_AND_SET in store.capabilities
        while writes:
            checked = await asyncio.gather(*(_compared(store, write) for write in writes)) if compares else writes
            news = [write for write in checked if write is not None]
            refused = []
            for write, result in zip(news, await store.put_each(news), strict=True):
                if isinstance(result, Conflict):
                    refused.append(write)
                elif isinstance(result, BaseException):
                    raise result
            # A notification that is refused was written before.
            writes = [msgspec.structs.replace(write, expect=ANY) for write in refused] if compares else []

    def _put_off(self, events: Sequence[Event], run_id: str, persistence: Persistence) -> None:
        if run_id not in self._unwritten:
            self._unwritten[run_id] = []
            persistence.defer(run_id, partial(self._make, run_id, persistence))
        self._unwritten[run_id].extend(events)
        self._count += len(events)
        while self._count > KEPT_EVENTS and len(self._unwritten) > 1:
            oldest, dropped = self._unwritten.popitem(last=False)
            self._put_off_whole.discard(oldest)
            self._count -= len(dropped)

    def _make(self, run_id: str, persistence: Persistence) -> list[Write]:
        events = self._unwritten.pop(run_id, [])
        self._put_off_whole.discard(run_id)
        self._count -= len(events)
        made: dict[tuple[str, object], Write] = {}
        for write in _writes(events):
            if persistence.in_memory(write.contract, "backtest"):
                made[write.contract.name, write.key] = Write(write.contract, write.key, write.value, write.when)
        return list(made.values())


class _Held:
    """The events of one run that wait to be written, and the task that writes them."""

    def __init__(self, keep: Callable[[Sequence[Event]], Awaitable[None]], is_over: Callable[[], object]) -> None:
        self._keep = keep
        self._is_over = is_over
        self._events: list[Event] = []
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    @property
    def is_here(self) -> bool:
        """Whether the running event loop is the one that writes them: another thread does so itself."""
        return self._task is None or self._task.done() or self._task.get_loop() is asyncio.get_running_loop()

    async def take(self, events: Sequence[Event]) -> None:
        self._events += events
        if self._task is not None and self._task.done():
            self._end(self._task)
        if self._task is None:
            self._start()
        if len(self._events) >= MOST_HELD:
            await self.settle()

    async def settle(self) -> None:
        if self._task is None or self._task.cancelled():
            self._start()
        while (task := self._task) is not None:
            self._hurry.set()
            await asyncio.wait([task])
            # Another caller can have waited for it as well, and started the next one.
            if self._task is task:
                self._end(task)

    def _start(self) -> None:
        # A loop that has ended may have taken the task before this one with it.
        self._hurry = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name="backtest-kit records of a backtest")

    async def _run(self) -> None:
        while self._events:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), TOGETHER_S)
            waiting, self._events = self._events, []
            try:
                await self._keep(waiting)
            except BaseException:
                self._events = waiting + self._events
                raise
        self._is_over()

    def _end(self, task: asyncio.Task[None]) -> None:
        """The task is over: raise why it could not write, which the next one tries again."""
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


def _writes(events: Sequence[Event]) -> list[Write]:
    return [*signal_writes(events), *notification_writes(events)]


async def _compared(store: Store, write: Write) -> Write | None:
    """`write`, expecting the current record; None if that is equal or newer."""
    found = await store.get(write.contract, write.key)
    if found is not None and (found.value == write.value or not follows(write, found)):
        return None
    return msgspec.structs.replace(write, expect=expectation(store, found))
