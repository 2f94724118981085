"""`CandleSource`: where candles come from."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import ClassVar, Final

from backtest_kit.model.candle import CandleSeries

ANY_RANGE: Final = sys.maxsize
"""A `page_limit` that never limits: the source answers any range in one call."""


class CandleSource(ABC):
    """Where candles come from: an exchange, a file, a formula.

    A source may be used from one event loop after another. It need not check what it returns, nor
    retry: the feed above it does both.
    """

    cached: ClassVar[bool] = True
    """Whether fetched candles are kept in the candle store; False if they are at hand anyway."""

    page_limit: ClassVar[int | None] = None
    """The most candles of one `fetch`. None means CC_MAX_CANDLES_PER_REQUEST."""

    series_name: str | None = None
    """The name under which candles are cached, instead of the exchange's. For sources whose candles
    depend on parameters: no two sets of parameters may share a cache."""

    @abstractmethod
    async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        """The closed candles that open in `[start_ms, stop_ms)`, as they are published.

        May be fewer than fit: the caller continues after the last one, and takes an empty answer as "nothing there".
        Bad rows are kept, with NaN and NO_TIME for unreadable cells: the caller refuses or repairs them. It ignores
        rows outside of the range.

        Raises:
            UserError: the request can never be answered (unknown symbol, no such file).
            RetryLater: it may be answered later.
        """

    async def verify(self, symbol: str) -> None:
        """Refuse unreadable rows, naming their place. Called before a fetch if bad rows are refused.

        For sources that know more about a row than its time.

        Raises:
            UserError: the first such row.
        """
        return

    async def range(self, symbol: str) -> tuple[int, int] | None:
        """The first open time and the end (last open + 1 minute) of the data, in epoch ms.

        None if unknown. Raises as `fetch`.
        """
        return None

    async def server_time_ms(self) -> int | None:
        """The time at the exchange, to notice that our clock is wrong. None if unknown.

        Raises as `fetch`.
        """
        return None

    async def close(self) -> None:
        """Close connections. Idempotent; a closed source may be used again."""
        return
