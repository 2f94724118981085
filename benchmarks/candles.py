"""The candle cache on disk: first write, warm read, and the size of a year.

python benchmarks/candles.py
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from backtest_kit.market.sources import synthetic
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import DAY_MS, to_ms
from backtest_kit.persist.backends.file_candles import FileCandleStore
from backtest_kit.persist.store import SeriesKey

START = to_ms("2023-01-01")
RUNS = 15


async def month_of_symbol(root: Path, candles: CandleSeries, run: int) -> tuple[float, float, float]:
    """Milliseconds of the first write, of the first read by a new store, and of a warm read."""
    series = SeriesKey("benchmark", f"RUN{run}", "1m")
    stop = START + 30 * DAY_MS
    started = time.perf_counter()
    await FileCandleStore(root).write(series, candles)
    written = time.perf_counter()
    store = FileCandleStore(root)
    first = await store.read(series, START, stop)
    opened = time.perf_counter()
    warm = await store.read(series, START, stop)
    ended = time.perf_counter()
    assert len(first) == len(warm) == 43_200
    assert float(warm.close.sum()) == float(candles.close.sum())
    return (written - started) * 1000, (opened - written) * 1000, (ended - opened) * 1000


async def main() -> None:
    year = await synthetic(seed=7).fetch("BTCUSDT", "1m", START, START + 365 * DAY_MS)
    month = year.between(START, START + 30 * DAY_MS)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder)
        await month_of_symbol(root, month, -1)
        rows = [await month_of_symbol(root, month, run) for run in range(RUNS)]
        for (name, limit), column in zip(
            (("first write, 30 days", 100), ("first read by a new store", 5), ("warm read", 5)),
            zip(*rows, strict=True),
            strict=True,
        ):
            print(f"{name:28} median {statistics.median(column):6.2f} ms  (limit {limit})")
        series = SeriesKey("benchmark", "YEAR", "1m")
        store = FileCandleStore(root)
        await store.write(series, year)
        files = [path for path in (root / "candle/benchmark/YEAR").rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
        started = time.perf_counter()
        await store.read(series, START, START + 365 * DAY_MS)
        print(f"{'a year':28} {len(files)} files (limit 13), {size:.1f} MB (limit 30), "
              f"first read {(time.perf_counter() - started) * 1000:.1f} ms")  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main())
