"""What a year of one symbol takes: resident memory once its candles are loaded, and while they are replayed.

    python benchmarks/memory.py

A decision every 15 minutes, from the file cache, in this one process. The first reading is taken at the first
decision, when the candles are loaded; what is added until the last one are trades, not candles.
"""

from __future__ import annotations

import asyncio
import os
import resource
import tempfile
import time
from pathlib import Path

import backtest_kit as bk
from backtest_kit.model.interval import DAY_MS, to_ms
from backtest_kit.persist.backends.file_candles import FileCandleStore
from backtest_kit.persist.store import SeriesKey

START = to_ms("2023-01-01")
STOP = START + 365 * DAY_MS
SPELLS = 12


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def fill_cache(dump: Path) -> None:
    """In a process of its own, whose memory is not measured."""
    if os.fork() == 0:
        candles = asyncio.run(bk.sources.synthetic(seed=7).fetch("BTCUSDT", "1m", START - DAY_MS, STOP))
        asyncio.run(FileCandleStore(dump).write(SeriesKey("market", "BTCUSDT", "1m"), candles))
        os._exit(0)
    assert os.wait()[1] == 0


def main() -> None:
    readings: list[tuple[int, float]] = []

    async def get_signal(ctx: bk.Context) -> bk.Signal | None:
        close = (await ctx.candles("1m", 50)).close
        readings.append((ctx.when_ms, resident_mb()))
        side = "long" if close[-1] > close.mean() else "short"
        return bk.Signal.bracket(side, price=ctx.price, take_profit_pct=2, stop_loss_pct=1)

    async def nothing_more(symbol: str, interval: str, since_ms: int, limit: int) -> list[list[float]]:
        return []  # all candles are in the cache

    with tempfile.TemporaryDirectory() as dump:
        fill_cache(Path(dump))
        kit = bk.Kit(dump)
        kit.add_exchange_schema("market", source=bk.sources.function(nothing_more))
        kit.add_frame_schema("year", start_date=START, end_date=STOP)
        kit.add_strategy_schema("trend", interval="15m", get_signal=get_signal)
        before = resident_mb()
        started = time.perf_counter()
        result = kit.backtest.run_sync("BTCUSDT", strategy_name="trend", exchange_name="market", frame_name="year")
        seconds = time.perf_counter() - started
    loaded = readings[0][1]
    print(f"{len(result.trades):,} trades out of {result.candles_used:,} candles in {seconds:.2f} s")
    print(f"before {before:.1f} MB; candles loaded {loaded:.1f} MB; highest ever {peak_mb():.1f} MB")
    for spell in range(SPELLS):
        stop = START + (spell + 1) * (STOP - START) // SPELLS
        now = [mb for when, mb in readings if when <= stop][-1]
        print(f"after month {spell + 1:2}: {now:.1f} MB, {now - loaded:+.2f} MB since the candles were loaded")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
