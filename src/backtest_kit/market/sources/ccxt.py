"""Candles from an exchange, through the ccxt library."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from backtest_kit.ccxt_client import find_market, library, open_client, redacted
from backtest_kit.errors import RetryLater, UserError
from backtest_kit.market.sources.base import CandleSource
from backtest_kit.market.sources.rows import series_of
from backtest_kit.model.candle import NO_TIME, CandleSeries
from backtest_kit.model.interval import MINUTE_MS, floor_ms, interval_ms

T = TypeVar("T")


def ccxt(exchange: Any, **options: Any) -> CandleSource:
    """Candles from a ccxt exchange: its id (`"binance"`) with options for its constructor, or a client.

    A client is an instance of a class of `ccxt.async_support`; it stays the caller's to close. One
    made here is opened by the first request and closed by `close()`. Symbols are written as ccxt does
    (`BTC/USDT`) or as the exchange does (`BTCUSDT`).

    Raises:
        UserError: options come with a client that is already made. Unknown exchanges and a missing
            ccxt package are reported by the first request.
    """
    if isinstance(exchange, str):
        return CcxtSource(exchange, options=options)
    if options:
        raise UserError(f"options {', '.join(options)} come with a ccxt client that is already made: set them on it")
    return CcxtSource(str(getattr(exchange, "id", "exchange")), client=exchange)


class CcxtSource(CandleSource):
    def __init__(self, exchange_id: str, *, options: dict[str, Any] | None = None, client: Any = None) -> None:
        self._id = exchange_id
        self._options = options or {}
        self._given = client
        self._told: tuple[int, float] | None = None
        """The last time that the exchange reported, and the elapsed time at its answer: it is that late
        at least, and a candle that is open is never taken for closed."""
        self._own: WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = WeakKeyDictionary()

    async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        step_ms = interval_ms(interval)
        client = self._client()
        market = await self._market(client, symbol)
        if interval not in (client.timeframes or {}):
            raise UserError(
                f"{self._id} has no {interval} candles; it has {', '.join(client.timeframes or {'none': 0})}"
            )
        limit = (stop_ms - start_ms) // step_ms
        rows = await self._call(lambda: client.fetch_ohlcv(market, interval, since=start_ms, limit=limit))
        # Exchanges add the candle that is still open, and some answer with more than was asked.
        stop_ms = min(stop_ms, self._now_ms(client) - step_ms + 1)
        series = series_of(rows or [])
        return series.take(series.timestamp < stop_ms)

    async def range(self, symbol: str) -> tuple[int, int] | None:
        client = self._client()
        market = await self._market(client, symbol)
        try:
            first = await self._call(lambda: client.fetch_ohlcv(market, "1m", since=0, limit=1))
        except UserError:
            return None  # some exchanges refuse such an old date: their first candle stays unknown
        begins = series_of(first or []).timestamp
        if not len(begins) or begins[0] == NO_TIME:
            return None
        return int(begins[0]), floor_ms(self._now_ms(client), MINUTE_MS)

    async def server_time_ms(self) -> int | None:
        client = self._client()
        if not client.has.get("fetchTime"):
            return None
        told_ms = await self._call(client.fetch_time)
        if told_ms is None:
            return None
        self._told = int(told_ms), time.monotonic()
        return int(told_ms)

    async def close(self) -> None:
        client = self._own.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()

    def _now_ms(self, client: Any) -> int:
        """What time it is there, as far as is known: this machine's clock may be wrong."""
        if self._told is None:
            return int(client.milliseconds())
        told_ms, told_s = self._told
        return told_ms + int((time.monotonic() - told_s) * 1000)

    def _client(self) -> Any:
        if self._given is not None:
            return self._given
        loop = asyncio.get_running_loop()
        # A client holds the connections of its loop: a run in another loop needs another client.
        if loop not in self._own:
            self._own[loop] = open_client(self._id, self._options)
        return self._own[loop]

    async def _market(self, client: Any, symbol: str) -> str:
        await self._call(client.load_markets)
        if not client.markets:
            raise RetryLater(f"{self._id} answered with an empty list of markets, or with one that ccxt cannot read")
        return str(find_market(client, self._id, symbol)["symbol"])

    async def _call(self, request: Callable[[], Awaitable[T]]) -> T:
        errors = library()
        try:
            return await request()
        except errors.OperationFailed as error:  # what passes, by ccxt's own division: the network, or their servers
            raise RetryLater(f"{self._id} did not answer: {redacted(error)}") from error
        except errors.BaseError as error:
            raise UserError(f"{self._id} refused the request: {redacted(error)}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise RetryLater(f"{self._id} gave an answer that ccxt cannot read: {redacted(error)}") from error
