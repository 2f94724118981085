"""The candle feeds of a kit, open as long as any run needs them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from backtest_kit.market.fetch import CandleFeed
from backtest_kit.market.sources import CandleSource
from backtest_kit.persist.store import CandleStore
from backtest_kit.run.schema import Registry
from backtest_kit.settings import Settings


class Feeds:
    """One feed per exchange, shared by all runs so that no minute is fetched twice.

    The last run to leave closes the sources: their connections belong to the event loop they were
    opened on, and the next run may be on another.
    """

    def __init__(
        self,
        registry: Registry,
        store: Callable[[], CandleStore],
        now_ms: Callable[[], int],
    ) -> None:
        self._registry = registry
        self._store = store
        self._now_ms = now_ms
        self._open: dict[tuple[str, Settings], tuple[CandleSource, CandleFeed]] = {}
        self._users = 0

    @asynccontextmanager
    async def use(self, exchange_name: str, settings: Settings) -> AsyncIterator[CandleFeed]:
        """The feed of an exchange, for as long as the block runs."""
        source = self._registry.exchanges.get(exchange_name).source
        key = (exchange_name, settings)
        if key not in self._open or self._open[key][0] is not source:
            self._open[key] = source, CandleFeed(exchange_name, source, self._store(), settings, self._now_ms)
        feed = self._open[key][1]
        self._users += 1
        try:
            yield feed
        finally:
            self._users -= 1
            if self._users == 0:
                opened, self._open = self._open, {}
                for source, _ in opened.values():
                    await source.close()
