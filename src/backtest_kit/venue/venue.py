"""`Venue`: a running exchange: the candles of a source, a clock and the orders."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Final

import numpy as np

from backtest_kit.errors import UserError
from backtest_kit.market.clock import Clock
from backtest_kit.market.sources import ANY_RANGE, CandleSource
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import DAY_MS, MINUTE_MS, floor_ms, interval_ms, iso
from backtest_kit.venue.exchange import ClosedMinute, Exchange, Terms
from backtest_kit.venue.journal import Action, Cancel, Done, FillReference, Head, Journal, JournalEntry, Place
from backtest_kit.venue.orders import Kind, Market, VenueFill, VenueOrder
from backtest_kit.venue.publishing import Publishing, Row, plain_rows

_PAGE: Final = 500
"""Minutes that are requested from an exchange at a time."""
_PAUSE_S: Final = 1.0
"""The pause before a minute that an exchange does not show yet is requested again."""
KINDS: Final[tuple[Kind, ...]] = ("spot", "futures")


class Venue:
    """A spot and a futures market on the same candles.

    A minute is unknown until it has closed on the clock. Every action happens `at_now`: first all minutes that have
    closed are matched, in the order of time.
    """

    def __init__(
        self,
        source: CandleSource,
        symbols: Sequence[str],
        clock: Clock,
        *,
        terms: Terms | None = None,
        journal: Journal | None = None,
        on_fill: Callable[[Kind, VenueFill], None] | None = None,
        publishing: Publishing | None = None,
    ) -> None:
        if not symbols or len(set(symbols)) != len(symbols):
            raise UserError(f"symbols are {', '.join(symbols) or 'none'}: name at least one, and each once")
        self.clock = clock
        self.symbols = tuple(symbols)
        self.exchanges: dict[Kind, Exchange] = {}
        self._source = source
        self._knows_all = source.page_limit == ANY_RANGE
        self._request_again_s = 0.0
        self._terms = terms or Terms()
        self._journal = journal
        self._on_fill = on_fill
        self._publishing = publishing
        self._turn = asyncio.Lock()
        self._settled_ms = 0
        self._ahead = {symbol: CandleSeries.empty() for symbol in symbols}
        self._requested_until_ms = dict.fromkeys(symbols, 0)
        self._done: list[Done] = []
        self._noted_ms = 0
        self._reported = dict.fromkeys(KINDS, 0)

    async def start(self) -> None:
        """Find the price of each symbol, and replay the journal.

        Raises:
            UserError: the source has no candle just before now, or the journal belongs to another exchange.
            Damaged: the journal cannot be read.
        """
        await self.clock.start()
        kept = await asyncio.to_thread(self._journal.read) if self._journal else None
        start_ms = kept[0].start_ms if kept else floor_ms(self.clock.now_ms(), MINUTE_MS)
        prices = {symbol: await self._price_before(symbol, start_ms) for symbol in self.symbols}
        head = Head(
            candles=self._source.series_name or type(self._source).__name__,
            start_ms=start_ms,
            markets=tuple(Market.of(symbol, price, self._terms.limits) for symbol, price in prices.items()),
            terms=self._terms,
        )
        if kept and kept[0] != head:
            raise UserError(
                f"the stored state is for {', '.join(each.symbol for each in kept[0].markets)} on "
                f"{kept[0].candles} from {iso(kept[0].start_ms)}, or for other terms: start with those, or without it"
            )
        for kind in KINDS:
            exchange = self.exchanges[kind] = Exchange(kind, head.markets, self._terms)
            exchange.prices = {
                market.symbol: market.round_price(_decimal(prices[market.symbol])) for market in head.markets
            }
            exchange.now_ms = start_ms
        self._settled_ms = start_ms
        for entry in kept[1] if kept else ():
            await self._settle(entry.at_ms)
            for each in entry.done:
                self._apply(each.kind, each.account, each.action)
        self._reported = {kind: len(exchange.fills) for kind, exchange in self.exchanges.items()}
        if self._journal:
            await asyncio.to_thread(self._journal.open, head)

    async def stop(self) -> None:
        """Close the source, the clock and the journal."""
        async with self._turn:
            if self._journal:
                self._journal.close()
        await self._source.close()
        await self.clock.stop()

    @asynccontextmanager
    async def at_now(self) -> AsyncIterator[int]:
        """One moment: nothing else happens during the block, and its actions are journalled at its end."""
        async with self._turn:
            now_ms = self.clock.now_ms()
            await self._settle(now_ms)
            try:
                yield now_ms
            finally:
                await self._keep(now_ms)
                self._report_fills()

    def do(self, kind: Kind, account: str, action: Action) -> VenueOrder | None:
        """Do one action, inside `at_now`. It is journalled unless it is refused.

        Raises:
            Refused: and nothing has changed.
        """
        order = self._apply(kind, account, action)
        self._done.append(Done(kind, account, action))
        return order

    async def candles(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        """The candles that open in `[start_ms, stop_ms)` and have closed."""
        step_ms = interval_ms(interval)
        stop_ms = min(floor_ms(stop_ms + step_ms - 1, step_ms), floor_ms(self.clock.now_ms(), step_ms))
        start_ms = floor_ms(start_ms + step_ms - 1, step_ms)
        if stop_ms <= start_ms:
            return CandleSeries.empty()
        minutes = await self._source.fetch(symbol, "1m", start_ms, stop_ms)
        return minutes if step_ms == MINUTE_MS or not len(minutes) else _grouped(minutes, step_ms)

    async def rows(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> list[Row]:
        """The same candles as they are published, with the faults of 1m candles.

        Raises:
            RetryLater: none are served now.
        """
        candles = await self.candles(symbol, interval, start_ms, stop_ms)
        if self._publishing is None or interval != "1m":
            return plain_rows(candles)
        return self._publishing.rows(candles, self.clock.now_ms())

    async def range(self, symbol: str) -> tuple[int, int] | None:
        """The first open time, and the end of the last closed candle; None if the source does not know."""
        known = await self._source.range(symbol)
        return known and (known[0], min(known[1], floor_ms(self.clock.now_ms(), MINUTE_MS)))

    def _apply(self, kind: Kind, account: str, action: Action) -> VenueOrder | None:
        exchange = self.exchanges[kind]
        if isinstance(action, Place):
            return exchange.place(account, action.new, part=action.part, rest_expires=action.rest_expires)
        if isinstance(action, Cancel):
            return exchange.cancel(
                account, action.symbol, order_id=action.order_id, client_order_id=action.client_order_id
            )
        if isinstance(action, FillReference):
            return exchange.fill_reference(account, action.client_order_id, action.price, action.quantity)
        exchange.set_leverage(account, action.symbol, action.leverage)
        return None

    async def _settle(self, now_ms: int) -> None:
        """Match all minutes that have closed by `now_ms`."""
        stop_ms = floor_ms(now_ms, MINUTE_MS)
        if stop_ms > self._settled_ms:
            rows: list[tuple[int, str, ClosedMinute]] = []
            upcoming = {symbol: await self._next_candles(symbol, stop_ms) for symbol in self.symbols}
            if not self._knows_all:
                # An exchange shows a minute some time after its close: until then it counts as open.
                ends = [int(each.timestamp[-1]) + MINUTE_MS if len(each) else 0 for each in upcoming.values()]
                stop_ms = max(self._settled_ms, min(stop_ms, *ends))
            for symbol, fetched in upcoming.items():
                candles = fetched.between(self._settled_ms, stop_ms)
                busy = any(exchange.has_open_orders(symbol) for exchange in self.exchanges.values())
                rows += [(minute.open_ms, symbol, minute) for minute in _minutes(candles if busy else candles[-1:])]
            for open_ms, symbol, minute in sorted(rows, key=lambda row: row[:2]):
                for exchange in self.exchanges.values():
                    exchange.now_ms = open_ms + MINUTE_MS
                    exchange.close_minute(symbol, minute)
            self._settled_ms = stop_ms
        for exchange in self.exchanges.values():
            exchange.now_ms = max(exchange.now_ms, now_ms)

    async def _next_candles(self, symbol: str, stop_ms: int) -> CandleSeries:
        """The candles of `[settled, stop_ms)`; from a source that knows them all, a day is fetched at once."""
        start_ms = self._settled_ms
        if self._knows_all and stop_ms > self._requested_until_ms[symbol]:
            self._requested_until_ms[symbol] = until_ms = max(stop_ms, start_ms + DAY_MS)
            self._ahead[symbol] = await self._source.fetch(symbol, "1m", start_ms, until_ms)
        elif not self._knows_all and time.monotonic() > self._request_again_s:
            stop_ms = min(stop_ms, start_ms + _PAGE * MINUTE_MS)
            self._ahead[symbol] = await self._source.fetch(symbol, "1m", start_ms, stop_ms)
            if symbol == self.symbols[-1]:
                self._request_again_s = time.monotonic() + _PAUSE_S
        return self._ahead[symbol].between(start_ms, stop_ms)

    async def _price_before(self, symbol: str, when_ms: int) -> float:
        candles = await self._source.fetch(symbol, "1m", when_ms - MINUTE_MS, when_ms)
        if not len(candles):
            candles = await self._source.fetch(symbol, "1m", when_ms - DAY_MS, when_ms)
        if not len(candles):
            known = await self._source.range(symbol)
            there = f"its candles are those of {iso(known[0])} .. {iso(known[1])}" if known else "choose another time"
            raise UserError(f"{symbol} has no candle in the day before {iso(when_ms)}: {there}")
        return float(candles.close[-1])

    async def _keep(self, now_ms: int) -> None:
        done, self._done = tuple(self._done), []
        if self._journal and (done or now_ms >= self._noted_ms + MINUTE_MS):
            self._noted_ms = floor_ms(now_ms, MINUTE_MS)
            await self._journal.write([JournalEntry(now_ms, done)], durable=bool(done))

    def _report_fills(self) -> None:
        for kind, exchange in self.exchanges.items():
            fills = exchange.fills[self._reported[kind] :]
            self._reported[kind] += len(fills)
            for fill in fills if self._on_fill else ():
                assert self._on_fill is not None  # noqa: S101  # nothing to loop over otherwise
                self._on_fill(kind, fill)


def _minutes(candles: CandleSeries) -> list[ClosedMinute]:
    columns = (candles.timestamp, candles.open, candles.high, candles.low, candles.close)
    return [
        ClosedMinute(open_ms, *map(_decimal, prices))
        for open_ms, *prices in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _grouped(minutes: CandleSeries, step_ms: int) -> CandleSeries:
    """Candles of `step_ms`, each from its existing minutes."""
    times, first = np.unique(minutes.timestamp - minutes.timestamp % step_ms, return_index=True)
    last = np.append(first[1:], len(minutes)) - 1
    return CandleSeries(
        times,
        minutes.open[first],
        np.maximum.reduceat(minutes.high, first),
        np.minimum.reduceat(minutes.low, first),
        minutes.close[last],
        np.add.reduceat(minutes.volume, first),
    )


def _decimal(number: float) -> Decimal:
    """The number as it is written, not as it is stored."""
    return Decimal(repr(number))
