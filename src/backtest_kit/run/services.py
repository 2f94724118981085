"""Clocks and brokers of a kit, running while any run needs them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from backtest_kit.persist.upkeep import Reading, Status

_log = logging.getLogger("backtest_kit")


class Service(Protocol):
    """What is connected before use and disconnected afterwards."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class Services:
    """The first run of an event loop that uses a service starts it; the last one stops it."""

    def __init__(self) -> None:
        self._uses: dict[tuple[asyncio.AbstractEventLoop, int], _Use] = {}

    @asynccontextmanager
    async def use(self, service: Service) -> AsyncIterator[None]:
        """Keep `service` started while the block runs. Raises the errors of its `start`; a failed start can be
        retried."""
        key = asyncio.get_running_loop(), id(service)
        use = self._uses.setdefault(key, _Use(service))
        use.users += 1
        try:
            async with use.turn:
                if not use.started:
                    await service.start()
                    use.started = True
            yield
        finally:
            use.users -= 1
            async with use.turn:
                if not use.users:
                    self._uses.pop(key, None)
                    if use.started:
                        use.started = False
                        await service.stop()


class StoreCheck:
    """Whether the stores are fit for live positions: checked by the first run, and valid for the runs next to it."""

    def __init__(self, judge: Callable[[], Awaitable[Sequence[Reading]]]) -> None:
        self._judge = judge

    async def start(self) -> None:
        """Check the stores.

        Raises:
            UserError: they are not fit for live trading.
        """
        for each in await self._judge():
            if each.status in (Status.WARNING, Status.DEGRADED):
                _log.warning("%s is %s: %s %s", each.subject, each.status.value, each.detail, each.remedy)

    async def stop(self) -> None:
        """Does nothing."""


class _Use:
    def __init__(self, service: Service) -> None:
        self.service = service
        """Kept, so that no other service gets its id."""
        self.users = 0
        self.started = False
        self.turn = asyncio.Lock()
