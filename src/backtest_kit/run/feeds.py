"""The candle feeds of a kit, open while any run needs them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from backtest_kit.engine.replay import Columns
from backtest_kit.market.fetch import CandleFeed
from backtest_kit.market.history import History
from backtest_kit.market.sources import CandleSource
from backtest_kit.persist.store import CandleStore
from backtest_kit.run.schema import Registry
from backtest_kit.settings import Settings


class Feeds:
    """One feed per exchange and event loop, shared by the runs on it so that no minute is fetched twice.

    The last run of a loop closes what the sources opened there: a connection belongs to one event loop.
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
        self._loops: dict[asyncio.AbstractEventLoop, _OnLoop] = {}

    def source(self, exchange_name: str) -> CandleSource:
        """Where the candles of an exchange come from."""
        return self._registry.exchanges.get(exchange_name).source

    @asynccontextmanager
    async def use(
        self, exchange_name: str, settings: Settings, now_ms: Callable[[], int] | None = None
    ) -> AsyncIterator[CandleFeed]:
        """The feed of an exchange while the block runs; `now_ms` is the exchange's time for a live run."""
        live = now_ms is not None
        now_ms = now_ms or self._now_ms
        loop = asyncio.get_running_loop()
        source = self.source(exchange_name)
        here = self._loops.setdefault(loop, _OnLoop())
        key = (exchange_name, source, settings, now_ms)
        if key not in here.feeds:
            here.feeds[key] = CandleFeed(exchange_name, source, self._store(), settings, now_ms, live=live)
        here.users += 1
        try:
            yield here.feeds[key]
        finally:
            here.users -= 1
            if not here.users:
                del self._loops[loop]
                for each in {source for _, source, *_ in here.feeds}:
                    await each.close()


class _OnLoop:
    """The feeds of one event loop, and how many runs use them."""

    def __init__(self) -> None:
        self.users = 0
        self.feeds: dict[tuple[str, CandleSource, Settings, Callable[[], int]], CandleFeed] = {}


def columns_of(history: History) -> Columns:
    """The columns of a history that a replay scans."""
    candles = history.candles
    return Columns(
        history.first_ms, history.prices, candles.open, candles.high, candles.low, candles.close, history.real
    )
