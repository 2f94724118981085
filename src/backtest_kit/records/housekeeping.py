"""`Housekeeping`: deletes records past their retention, at the start of trading and then daily."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from backtest_kit.errors import BacktestKitError
from backtest_kit.settings import Settings

if TYPE_CHECKING:
    from backtest_kit.persist.binding import Persistence

PAUSE_S: Final = 86_400.0

_log = logging.getLogger(__name__)


class Housekeeping:
    """One task in the event loop of the live runs."""

    def __init__(self, persistence: Callable[[], Persistence], settings: Callable[[], Settings]) -> None:
        self._persistence = persistence
        self._settings = settings
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the task, unless it runs in this loop."""
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done() or self._loop is not loop:
            self._loop = loop
            self._task = loop.create_task(self._run(), name="retention")

    async def close(self) -> None:
        """Stop the task. The next one deletes what is left."""
        task, self._task = self._task, None
        if task is not None and self._loop is asyncio.get_running_loop():
            task.cancel()
            await asyncio.wait({task})

    async def _run(self) -> None:
        while True:
            try:
                await self.compact()
            except Exception as error:  # what fails today may work tomorrow
                _log.exception("old records could not be deleted, trying again tomorrow", extra={"error": error})
            await asyncio.sleep(PAUSE_S)

    async def compact(self) -> None:
        """Delete records past their retention in every store of the program. A store that fails is logged."""
        from backtest_kit.persist.retention import compact, retention_of

        retention = retention_of(self._settings())
        for store in self._persistence().stores():
            try:
                for expired in await compact(store, retention):
                    what = "/".join(filter(None, (*expired.namespace, expired.contract)))
                    _log.info("deleted old records of %s: %d records, %d bytes", what, expired.records, expired.size)
                    if expired.fault:
                        _log.warning("some records of %s could not be checked for their age: %s", what, expired.fault)
            except BacktestKitError as error:
                _log.warning("some old records could not be deleted, trying again tomorrow: %s", error)
            except Exception as error:  # a fault of one store must not stop the others
                _log.exception(
                    "some old records of a %s could not be deleted, trying again tomorrow",
                    type(store).__name__,
                    extra={"error": error},
                )
