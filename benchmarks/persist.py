"""What a store costs: medians of single operations, and their ratio to the raw calls of the same run.

    python benchmarks/persist.py --store file
    python benchmarks/persist.py --store sqlite --directory /var/tmp --quick

Raw and measured operations take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import numpy as np

from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Plain, SeriesKey, Store, Write

SIGNAL, STATE, LOG = CONTRACTS["signal"], CONTRACTS["state"], CONTRACTS["log"]
VALUE: Plain = {
    "id": "4f2c1a9e-7b1d-4b52-9a53-1d2c3b4a5f60",
    "symbol": "BTCUSDT",
    "position": "long",
    "priceOpen": 47123.45,
    "priceTakeProfit": 48065.919,
    "priceStopLoss": 46652.2155,
    "note": "breakout above the range, volume confirms " * 4,
    "_entry": [{"price": 47123.45 + step, "cost": 100.0, "timestamp": 1_640_995_200_000 + step} for step in range(8)],
}
"""About 1 KiB, like a position."""


def make_file(place: Path) -> Store:
    return FileStore(place / "dump")


def make_sqlite(place: Path) -> Store:
    return SqliteStore(place / "bot.db")


STORES: dict[str, Callable[[Path], Store]] = {"file": make_file, "sqlite": make_sqlite}


def raw_file_write(directory: str, data: bytes) -> None:
    temp, target = f"{directory}/.tmp-raw", f"{directory}/raw.json"
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    os.write(fd, data)
    os.fsync(fd)
    os.close(fd)
    os.replace(temp, target)  # noqa: PTH105
    fd = os.open(directory, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def raw_file_read(path: str) -> object:
    with open(path, "rb") as file:  # noqa: PTH123
        return json.loads(file.read())


def raw_sqlite_write(directory: str) -> Callable[[bytes], None]:
    connection = sqlite3.connect(f"{directory}/raw.db", isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE raw (key TEXT PRIMARY KEY, data BLOB)")

    def write(data: bytes) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT OR REPLACE INTO raw VALUES ('trend/binance/BTCUSDT', ?)", (data,))
        connection.execute("COMMIT")

    return write


RAW_WRITES: dict[str, tuple[str, Callable[[str], Callable[[bytes], None]]]] = {
    "file": ("at most 1.15", lambda directory: partial(raw_file_write, directory)),
    "sqlite": ("at most 1.3", raw_sqlite_write),
}
"""What the ratio may be, and what makes the raw write in a directory."""


async def timed(operation: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await operation()
    return time.perf_counter() - start


async def alternate(rounds: int, *operations: Callable[[], Awaitable[object]]) -> list[float]:
    """The median of each operation, in seconds; the operations take turns."""
    times: list[list[float]] = [[] for _ in operations]
    for _ in range(rounds):
        for index, operation in enumerate(operations):
            times[index].append(await timed(operation))
    return [statistics.median(column) for column in times]


def report(name: str, value: str, ratio: float | None = None, limit: str = "") -> None:
    print(f"{name:<58} {value:>14}" + (f"  ratio {ratio:6.2f}  {limit}" if ratio is not None else ""))


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us"


async def measure_money_write(name: str, store: Store, place: Path, rounds: int) -> None:
    limit, make_raw = RAW_WRITES[name]
    data = json.dumps(VALUE, indent=2).encode()
    key = ("trend", "binance", "BTCUSDT")
    await store.put(Write(SIGNAL, key, VALUE))
    directory = place / "raw"
    directory.mkdir()
    raw = make_raw(str(directory))
    base, ours = await alternate(
        rounds,
        lambda: asyncio.to_thread(raw, data),
        lambda: store.put(Write(SIGNAL, key, VALUE)),
    )
    report("raw durable write, in a thread", microseconds(base))
    report("money write", microseconds(ours), ours / base, limit)


async def measure_group(store: Store, seconds: float, rounds: int) -> None:
    async def writer(number: int, until: float) -> int:
        done = 0
        while time.perf_counter() < until:
            await store.put(Write(SIGNAL, ("trend", "binance", f"SYM{number}"), VALUE))
            done += 1
        return done

    async def rate(writers: int) -> float:
        start = time.perf_counter()
        counts = await asyncio.gather(*(writer(number, start + seconds) for number in range(writers)))
        return sum(counts) / (time.perf_counter() - start)

    await rate(32)
    singles, groups = [], []
    for _ in range(rounds):
        singles.append(await rate(1))
        groups.append(await rate(32))
    single, group = statistics.median(singles), statistics.median(groups)
    report("money writes of 1 writer", f"{single:.0f} /s")
    report("money writes of 32 writers", f"{group:.0f} /s", group / single, "at least 5")


async def measure_read(store: Store, place: Path, rounds: int) -> None:
    key = ("signal-1", "bucket")
    await store.put(Write(STATE, key, VALUE))
    path = place / "raw.json"
    path.write_text(json.dumps(VALUE, indent=2))
    base, hop, ours = await alternate(
        rounds,
        lambda: asyncio.sleep(0, raw_file_read(str(path))),
        lambda: asyncio.to_thread(raw_file_read, str(path)),
        lambda: store.get(STATE, key),
    )
    report("raw open + read + JSON parse", microseconds(base))
    report("the same in a thread", microseconds(hop))
    report("record read", microseconds(ours), ours / hop, "at most 3")


async def measure_many(make: Callable[[Path], Store], place: Path, count: int) -> None:
    store = make(place)
    writes = [Write(STATE, (f"signal-{number % 100}", f"bucket-{number}"), VALUE) for number in range(count)]
    start = time.perf_counter()
    for low in range(0, count, 256):
        await asyncio.gather(*(store.put(write) for write in writes[low : low + 256]))
    report(f"{count} record writes, 256 at a time", f"{count / (time.perf_counter() - start):.0f} /s")
    await store.close()
    opening = statistics.median([await timed((again := make(place)).open) for _ in range(5)])
    await again.close()
    report(f"opening a root with {count} records", f"{opening * 1e3:.0f} ms")
    start = time.perf_counter()
    found = 0
    async for _ in again.scan(STATE):
        found += 1
    report(f"scanning {found} records", f"{time.perf_counter() - start:.2f} s")
    start = time.perf_counter()
    findings = await again.check()
    report(f"checking {count} records ({len(findings)} findings)", f"{time.perf_counter() - start:.2f} s")
    await again.close()


async def measure_feed(make: Callable[[Path], Store], place: Path, count: int) -> None:
    store = make(place)
    start = time.perf_counter()
    for low in range(0, count, 1000):
        await asyncio.gather(*(store.put(Write(LOG, (f"entry-{n}",), {"n": n})) for n in range(low, low + 1000)))
    report(f"{count} log lines, 1000 at a time", f"{count / (time.perf_counter() - start):.0f} /s")
    await store.close()
    again = make(place)
    start = time.perf_counter()
    await again.open()
    await again.get(LOG, ("entry-17",))
    report(f"first answer of a feed with {count} lines", f"{(time.perf_counter() - start) * 1e3:.0f} ms")
    start = time.perf_counter()
    last = [record.key async for record in again.scan(LOG, newest_first=True, limit=50)]
    report(f"the last {len(last)} of them", f"{(time.perf_counter() - start) * 1e3:.0f} ms")
    await again.close()


async def measure_candles(store: Store, rounds: int) -> None:
    start_ms, count = 1_640_995_200_000, 43_200
    column = np.random.default_rng(1).random(count)
    month = CandleSeries(start_ms + np.arange(count) * 60_000, column, column, column, column, column)
    first = [
        await timed(lambda n=number: store.candles.write(SeriesKey("binance", f"SYM{n}", "1m"), month))  # type: ignore[misc]
        for number in range(5)
    ]
    report(f"first write of {count} candles", f"{statistics.median(first) * 1e3:.1f} ms")
    series = SeriesKey("binance", "SYM0", "1m")
    (read,) = await alternate(rounds, lambda: store.candles.read(series, start_ms, start_ms + count * 60_000))
    report("reading 30 days of them", f"{read * 1e3:.2f} ms")


async def main(name: str, directory: Path, quick: bool) -> None:
    make = STORES[name]
    place = Path(tempfile.mkdtemp(prefix="backtest-kit-", dir=directory))
    try:
        store = make(place)
        await store.open()
        print(f"{name} store on {place}, {os.cpu_count()} cores")
        await measure_money_write(name, store, place, 200 if quick else 1000)
        await measure_group(store, 0.5 if quick else 2.0, 3)
        await measure_read(store, place, 500 if quick else 3000)
        await measure_candles(store, 50)
        await store.close()
        await measure_many(make, place / "many", 10_000 if quick else 100_000)
        await measure_feed(make, place / "feed", 50_000 if quick else 1_000_000)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=sorted(STORES), default="file")
    parser.add_argument("--directory", type=Path, default=Path.cwd())
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.store, arguments.directory, arguments.quick))
