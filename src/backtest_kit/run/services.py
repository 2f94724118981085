"""Clocks and brokers of a kit, started as long as any run needs them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from backtest_kit.persist.upkeep import Reading, Status

_log = logging.getLogger("backtest_kit")


class Service(Protocol):
    """What is connected before it is used, and let go of afterwards."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class Services:
    """The first run of an event loop to use a service starts it, the last one stops it: no end breaks another run."""

    def __init__(self) -> None:
        self._uses: dict[tuple[asyncio.AbstractEventLoop, int], _Use] = {}

    @asynccontextmanager
    async def use(self, service: Service) -> AsyncIterator[None]:
        """Have `service` started for as long as the block runs. Raises as its `start`, and may be tried again."""
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
    """Whether live positions may be trusted to the stores: asked by the first run, and valid for those beside it."""

    def __init__(self, judge: Callable[[], Awaitable[Sequence[Reading]]]) -> None:
        self._judge = judge

    async def start(self) -> None:
        """Look at the stores.

        Raises:
            UserError: they are not fit for live trading.
        """
        for each in await self._judge():
            if each.status in (Status.WARNING, Status.DEGRADED):
                _log.warning("%s is %s: %s %s", each.subject, each.status.value, each.detail, each.remedy)

    async def stop(self) -> None:
        """Nothing to let go of."""


class _Use:
    def __init__(self, service: Service) -> None:
        self.service = service
        """Kept, so that no other service gets its id."""
        self.users = 0
        self.started = False
        self.turn = asyncio.Lock()
