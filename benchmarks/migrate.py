"""How long it takes to move a store: records as a bot has them, and a year of minutes, from one kind to another.

    python benchmarks/migrate.py
    python benchmarks/migrate.py --records 100000 --from sqlite --to file --directory /var/tmp

Prints the figures of each step. The goal is a minute for 100,000 records from files to SQLite.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import numpy as np

from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.comparison import compare_stores
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.migration import migrate_store
from backtest_kit.persist.store import Plain, SeriesKey, Store, Write
from backtest_kit.persist.urls import store_at

ADDRESSES = {"file": "file:{}/dump", "sqlite": "sqlite:{}/bot.db"}
YEAR = 525_600
MINUTE_MS = 60_000
BATCH = 500
VALUE: Plain = {
    "id": "4f2c1a9e-7b1d-4b52-9a53-1d2c3b4a5f60",
    "symbol": "BTCUSDT",
    "position": "long",
    "priceOpen": 47123.45,
    "priceTakeProfit": 48065.919,
    "priceStopLoss": 46652.2155,
    "note": "breakout above the range, volume confirms " * 4,
}
"""About 350 bytes, like a closed signal."""
SHARES = {"storage": 0.4, "notification": 0.3, "log": 0.1, "memory": 0.1, "partial": 0.1}
"""What the records of a year are, by contract: feeds above all, and a file each of the others."""


async def fill(store: Store, records: int) -> None:
    for name, share in SHARES.items():
        row = CONTRACTS[name]
        writes = [
            Write(
                row, tuple(False if field == "backtest" else f"{field}-{n}" for field in row.key_fields), VALUE, when=n
            )
            for n in range(round(records * share))
        ]
        for start in range(0, len(writes), BATCH):
            await store.batch(writes[start : start + BATCH])
    times = 1_640_995_200_000 + np.arange(YEAR) * MINUTE_MS
    prices = 40_000 + np.cumsum(np.random.default_rng(1).normal(0, 5, YEAR))
    await store.candles.write(SeriesKey("binance", "BTCUSDT", "1m"), CandleSeries(times, *([prices] * 5)))


async def measure(directory: Path, records: int, source_kind: str, target_kind: str) -> None:
    source = store_at(ADDRESSES[source_kind].format(directory / "source"))
    target = store_at(ADDRESSES[target_kind].format(directory / "target"))
    for step, name in (
        (lambda: fill(source, records), "filling the source"),
        (lambda: migrate_store(source, target), "migrate"),
        (lambda: migrate_store(source, target), "migrate again, all of it there"),
        (lambda: compare_stores(source, target), "verify"),
    ):
        started = time.perf_counter()
        result = await step()
        took = time.perf_counter() - started
        print(f"{name:32} {took:7.1f} s  {records / took:9,.0f} records a second")
        if name == "verify":
            assert all(item.difference is None for item in result)
    await source.close()
    await target.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--from", dest="source", choices=ADDRESSES, default="file")
    parser.add_argument("--to", dest="target", choices=ADDRESSES, default="sqlite")
    parser.add_argument("--directory", help="where the stores are made; by default the temporary directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="backtest-kit-", dir=options.directory) as directory:
        print(f"{options.records:,} records and {YEAR:,} candles, {options.source} to {options.target}, in {directory}")
        asyncio.run(measure(Path(directory), options.records, options.source, options.target))


if __name__ == "__main__":
    main()
