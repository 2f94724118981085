"""Hands the events of a live run to the records and to the notification sinks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from backtest_kit.errors import BacktestKitError
from backtest_kit.model.event import Event, Lasting
from backtest_kit.records import RunRecords

PATIENCE_S: Final = 5.0
"""How long a minute waits for the store to write records."""
_MOST: Final = 1000
"""Events that wait for the store at most; beyond it the oldest are dropped."""

EventObserver = Callable[[Sequence[Event]], Awaitable[None]]
"""Writes events into records of its own. May get the same events again."""

_log = logging.getLogger("backtest_kit")


class EventRecorder:
    """Writes events into the records. A store that rejects them does not stop trading: the sinks get them immediately,
    the records at the next minute at which the store works."""

    def __init__(self, records: RunRecords, observers: Sequence[EventObserver]) -> None:
        self._records = records
        self._observers = observers
        self._waiting: list[Event] = []
        self._noting = asyncio.Lock()

    async def take_in(self, events: Sequence[Event]) -> bool:
        """Write the events of the outbox. False if a writer failed: it must get them again, before or after a
        restart."""
        if not await self._observed(events):
            return False
        for observer in self._observers:
            try:
                await observer(events)
            except Exception:
                _log.exception("%d events could not be written into the records yet", len(events))
                return False
        return True

    async def note(self, *events: Event) -> None:
        """Write the events that no position state keeps: refusals, failures, start and end of a run; and what waits."""
        self._waiting += (event for event in events if not isinstance(event, Lasting))
        del self._waiting[:-_MOST]
        async with self._noting:
            noted = {id(event): event for event in self._waiting}
            if noted and await self._observed(tuple(noted.values())):
                self._waiting = [event for event in self._waiting if id(event) not in noted]

    async def begin(self) -> None:
        """The run begins: start sinks and retention."""
        await self._records.begin()

    async def end(self) -> None:
        """The run is over: write its records and its log."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._records.end()
        except (BacktestKitError, TimeoutError) as error:
            _log.warning("lines of the log wait for the store: %s", error)

    async def _observed(self, events: Sequence[Event]) -> bool:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._records.observe(events)
        except (BacktestKitError, TimeoutError) as error:
            _log.warning("%d events could not be written into the records yet: %s", len(events), error)
            self._records.urge(events)
            return False
        return True
