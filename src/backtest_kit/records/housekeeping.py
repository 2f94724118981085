"""`Housekeeping`: deletes what is too old, at the start of trading and daily from then on."""

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
    """One task, in the event loop that trades."""

    def __init__(self, persistence: Callable[[], Persistence], settings: Callable[[], Settings]) -> None:
        self._persistence = persistence
        self._settings = settings
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin, if that has not been done in this loop."""
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done() or self._loop is not loop:
            self._loop = loop
            self._task = loop.create_task(self._run(), name="retention")

    async def close(self) -> None:
        """End it. What is left is deleted the next time."""
        task, self._task = self._task, None
        if task is not None and self._loop is asyncio.get_running_loop():
            task.cancel()
            await asyncio.wait({task})

    async def _run(self) -> None:
        while True:
            try:
                await self.compact()
            except Exception as error:  # whatever goes wrong today can work tomorrow
                _log.exception("what is too old was not forgotten, it is tried again tomorrow", extra={"error": error})
            await asyncio.sleep(PAUSE_S)

    async def compact(self) -> None:
        """Delete what is too old in every store of the program. A store that refuses is logged."""
        from backtest_kit.persist.retention import compact, retention_of

        retention = retention_of(self._settings())
        for store in self._persistence().stores():
            try:
                for expired in await compact(store, retention):
                    what = "/".join(filter(None, (*expired.namespace, expired.contract)))
                    _log.info(
                        "forgot of %s what was too old: %d records, %d bytes", what, expired.records, expired.size
                    )
                    if expired.fault:
                        _log.warning("not all of %s could be looked at for what is too old: %s", what, expired.fault)
            except BacktestKitError as error:
                _log.warning("not all that is too old was forgotten, it is tried again tomorrow: %s", error)
            except Exception as error:  # a fault of one store must not stop the others
                _log.exception(
                    "not all that is too old was forgotten of a %s, it is tried again tomorrow",
                    type(store).__name__,
                    extra={"error": error},
                )
