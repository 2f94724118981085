"""`Observer`: what the events of runs leave behind: signals, the last of them, and notifications."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from backtest_kit.errors import Conflict
from backtest_kit.model.event import Event, Mode
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.store import ANY, Capability, Store, Write
from backtest_kit.persist.writing import put_each
from backtest_kit.records.notification import NOTIFICATION, notification_of, notification_writes
from backtest_kit.records.scope import expectation
from backtest_kit.records.signals import RECENT, STORAGE, signal_writes

if TYPE_CHECKING:
    from backtest_kit.persist.binding import Persistence
    from backtest_kit.records.delivery import Deliveries

ROWS: Final = (STORAGE, RECENT, NOTIFICATION)
KEPT_EVENTS: Final = 5_000
"""Of backtests whose records are in memory and were not asked for yet. Beyond it the oldest runs are let go of."""


class Observer:
    """Is told of events once they have happened for good, and may be told of them again."""

    def __init__(self, persistence: Callable[[], Persistence], deliveries: Deliveries) -> None:
        self._persistence = persistence
        self._deliveries = deliveries
        self._unwritten: OrderedDict[str, list[Event]] = OrderedDict()
        self._count = 0
        self._put_off_whole: set[str] = set()
        """Runs among them of which nothing is written anywhere else."""

    async def observe(self, events: Sequence[Event], mode: Mode, run_id: str | None) -> None:
        """Keep what `events` say, with one write for each record that they change.

        Raises:
            Damaged, OutOfSpace, RetryLater: as `Store.put`. Told again, it is done as if for the first time.
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
        if mode != "backtest":
            await self._deliveries.begin(mode)
        writes = [write for write in _writes(events) if write.contract not in in_memory]
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
        if mode != "backtest" and any(write.contract is NOTIFICATION for write in writes):
            self._deliveries.wake(mode)

    def urge(self, events: Sequence[Event], mode: Mode) -> None:
        """Have people hear of `events` that could not be kept. Kept later, they are not told again."""
        self._deliveries.urge(mode, filter(None, map(notification_of, events)))

    async def _put(
        self, persistence: Persistence, row: Contract, writes: list[Write], mode: Mode, run_id: str | None
    ) -> None:
        if not writes:
            return
        store = persistence.store_for(row, mode, run_id)
        if Capability.COMPARE_AND_SET not in store.capabilities:
            writes = [Write(row, write.key, write.value, write.when, ANY) for write in writes]
        # A backtest that is repeated replaces what it wrote; live, whoever was paused and overtaken may not.
        compares = row is not NOTIFICATION and mode != "backtest" and Capability.COMPARE_AND_SET in store.capabilities
        while writes:
            checked = await asyncio.gather(*(_compared(store, write) for write in writes)) if compares else writes
            news = [write for write in checked if write is not None]
            refused = []
            for write, result in zip(news, await put_each(store, news), strict=True):
                if isinstance(result, Conflict):
                    refused.append(write)
                elif isinstance(result, BaseException):
                    raise result
            # A notification is refused that was told before.
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


def _writes(events: Sequence[Event]) -> list[Write]:
    return [*signal_writes(events), *notification_writes(events)]


async def _compared(store: Store, write: Write) -> Write | None:
    """`write`, expecting what is there now; None where that is the same already, or of a later moment."""
    found = await store.get(write.contract, write.key)
    if found is not None and (found.value == write.value or found.later_than(write.when)):
        return None
    return msgspec.structs.replace(write, expect=expectation(store, found))
