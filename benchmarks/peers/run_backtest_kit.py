"""Backtest Kit: nine backtests at once in one process, from the file cache, by the public functions.

With the argument `load` it only loads what the replay loads: the difference is the replay alone.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from workload import (
    DAYS,
    FAST_LESS_SLOW,
    FEE_PCT,
    FIELDS,
    FIRST_DECISION,
    HOURS,
    LOOKBACK,
    MINUTE_MS,
    SLIPPAGE_PCT,
    START_MS,
    STOP_PCT,
    SYMBOLS,
    TAKE_PCT,
    candles,
    serve,
)

import backtest_kit as bk
from backtest_kit.market.fetch import CandleFeed
from backtest_kit.market.history import History
from backtest_kit.persist.backends.file_candles import FileCandleStore
from backtest_kit.persist.store import SeriesKey

STOP_MS = START_MS + DAYS * 24 * 60 * MINUTE_MS
FRAME_MS = START_MS + FIRST_DECISION * MINUTE_MS


def series(i: int) -> bk.CandleSeries:
    columns = candles(i)
    times = range(START_MS, STOP_MS, MINUTE_MS)
    return bk.CandleSeries(list(times), *(columns[name] for name in FIELDS))


async def nothing_more(symbol: str, interval: str, since_ms: int, limit: int) -> list[list[float]]:
    return []  # all candles are in the cache


async def get_signal(ctx: bk.Context) -> bk.Signal | None:
    close = (await ctx.candles("1m", LOOKBACK)).close
    return bk.Signal.bracket(
        "long" if close @ FAST_LESS_SLOW > 0 else "short",
        price=ctx.price,
        take_profit_pct=TAKE_PCT,
        stop_loss_pct=STOP_PCT,
        minutes=HOURS * 60,
    )


source = bk.sources.function(nothing_more)


def make_kit(dump: str) -> bk.Kit:
    kit = bk.Kit(dump)
    kit.set_config(CC_PERCENT_FEE=FEE_PCT, CC_PERCENT_SLIPPAGE=SLIPPAGE_PCT)
    kit.add_exchange_schema("market", source=source)
    kit.add_frame_schema("month", start_date=FRAME_MS, end_date=STOP_MS)
    kit.add_strategy_schema("averages", interval="15m", get_signal=get_signal)
    return kit


async def replay(kit: bk.Kit) -> tuple[int, Callable[[], object]]:
    handles = [
        kit.backtest.background(symbol, strategy_name="averages", exchange_name="market", frame_name="month")
        for symbol in SYMBOLS
    ]
    results = await asyncio.gather(*handles)
    return sum(len(result.trades) for result in results), lambda: [result.stats for result in results]


async def load(kit: bk.Kit, store: FileCandleStore) -> tuple[int, Callable[[], object]]:
    settings = kit.get_config()
    feed = CandleFeed("market", source, store, settings, lambda: STOP_MS)

    async def one(symbol: str) -> int:
        window = settings.CC_AVG_PRICE_CANDLES_COUNT
        history = await History.load(feed, symbol, FRAME_MS, STOP_MS, price_window=window)
        return len(await history.window("1m", LOOKBACK, FRAME_MS))

    await asyncio.gather(*map(one, SYMBOLS))
    return 0, lambda: None


def main() -> None:
    with tempfile.TemporaryDirectory() as dump:
        store = FileCandleStore(Path(dump))
        for i, symbol in enumerate(SYMBOLS):
            asyncio.run(store.write(SeriesKey("market", symbol, "1m"), series(i)))
        kit = make_kit(dump)
        serve(lambda: asyncio.run(load(kit, store) if "load" in sys.argv else replay(kit)))


if __name__ == "__main__":
    main()
