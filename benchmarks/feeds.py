"""A million lines of log and a hundred thousand notifications: what they cost to write, and what a start costs then.

    python benchmarks/feeds.py [--store file --store sqlite] [--lines 1000000] [--notifications 100000]

Each step is a process of its own, so that its memory is its own: the peak, and what that is above a process that has
only written one line. "Start" is from the making of the kit to the last fifty lines, or notifications, in hand; the
import of the package is shown apart. Beside the wall clock stands the time of the processor, all threads together,
which says more on a machine that has other work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

_BEGAN = time.perf_counter()

import backtest_kit as bk  # noqa: E402
from backtest_kit.model.position import Extreme  # noqa: E402
from backtest_kit.persist.contracts import CONTRACTS  # noqa: E402
from backtest_kit.persist.retention import compact, retention_of  # noqa: E402
from backtest_kit.persist.urls import store_at  # noqa: E402

IMPORT_S = time.perf_counter() - _BEGAN

STORES = {"file": "file:{place}/dump", "sqlite": "sqlite:{place}/bot.db"}
IDENTITY = bk.Identity("BTCUSDT", "trend", "binance", "", "live")
NOON_MS = 1_717_243_200_000
MINUTE_MS = 60_000
BATCH = 500


def kit_on(address: str) -> bk.Kit:
    kit, store = bk.Kit(), store_at(address)
    for name in CONTRACTS:
        kit.persistence.bind(name, store)
    return kit


def opened(number: int) -> bk.PositionOpened:
    when_ms = NOON_MS + number * MINUTE_MS
    extreme = Extreme(100.0, when_ms, 0.0, 0.0)
    signal = bk.Signal("long", 110.0, 90.0, price_open=100.0, minutes=60.0, cost=50.0, id=f"signal-{number}")
    position = bk.Position(
        entry=bk.RestingEntry(identity=IDENTITY, signal=signal, scheduled_at_ms=when_ms),
        opened_at_ms=when_ms,
        entries=(bk.Entry(100.0, 50.0, when_ms),),
        peak=extreme,
        fall=extreme,
    )
    return bk.PositionOpened(identity=IDENTITY, when_ms=when_ms, price=100.0, position=position)


async def say(kit: bk.Kit, count: int) -> None:
    run = kit.records.of_run(IDENTITY, None)
    for number in range(count):
        run.log(NOON_MS + number * 1000).info("volume is thin", number=number, volume=12.5, note="against the trend")
        if number % BATCH == 0:
            await run.take_breath()


async def tell(kit: bk.Kit, count: int) -> None:
    run = kit.records.of_run(IDENTITY, None)
    for start in range(0, count, BATCH):
        await run.observe([opened(number) for number in range(start, min(start + BATCH, count))])


async def step(name: str, address: str, count: int) -> None:
    began, worked = time.perf_counter(), time.process_time()
    kit = kit_on(address)
    if name == "say":
        await say(kit, count)
    elif name == "tell":
        await tell(kit, count)
    elif name == "lines":
        assert len(await kit.records.log.list(limit=50)) == 50
    elif name == "notifications":
        assert len(await kit.records.notification.list(limit=50)) == 50
    elif name == "forget":
        settings = bk.Settings(CC_RETENTION_LOG_COUNT=count / 2)
        await compact(kit.persistence.store_for(CONTRACTS["log"], "live"), retention_of(settings))
    taken = time.perf_counter() - began
    await kit.close()
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    worked = time.process_time() - worked
    print(json.dumps({"seconds": taken, "worked": worked, "peak_mb": peak_mb, "import": IMPORT_S}))


class Found(NamedTuple):
    """What a step of the benchmark took."""

    seconds: float
    worked: float
    peak_mb: float
    import_s: float


def measure(what: str, name: str, address: str, count: int, base_mb: float = 0.0, *, each: bool = False) -> Found:
    done = subprocess.run(
        [sys.executable, __file__, "--step", name, "--store", address, "--lines", str(count)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = Found(*json.loads(done.stdout).values())
    more = f" (+{found.peak_mb - base_mb:.0f})" if base_mb else ""
    rate = f"{count / found.seconds:9,.0f}/s, {count / found.worked:,.0f} per second of processor" if each else ""
    print(f"{what:36} {found.seconds:8.3f} s {found.worked:8.3f} s {found.peak_mb:4.0f} MB{more:7} {rate}", flush=True)
    return found


def run(store: str, lines: int, notifications: int) -> None:
    print(f"\n{store:36} {'wall':>10} {'processor':>10} {'peak':>7}")
    with tempfile.TemporaryDirectory() as place:
        address = STORES[store].format(place=Path(place))
        first = measure("the first lines", "say", address, 100)
        base = first.peak_mb
        print(f"{'import of the package':36} {first.import_s:8.3f} s")
        measure(f"{lines // 10:,} lines", "say", address, lines // 10, base, each=True)
        measure(f"{lines:,} lines", "say", address, lines, base, each=True)
        measure("start, and the last lines", "lines", address, lines, base)
        measure(f"{notifications:,} notifications", "tell", address, notifications, base, each=True)
        measure("start, and the last notifications", "notifications", address, notifications, base)
        measure("forgetting half of the lines", "forget", address, lines, base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="append", help=f"one of {', '.join(STORES)}; by default all of them")
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--notifications", type=int, default=100_000)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        asyncio.run(step(given.step, given.store[0], given.lines))
        return
    for store in given.store or STORES:
        run(store, given.lines, given.notifications)


if __name__ == "__main__":
    main()
