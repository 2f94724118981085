"""A million lines of log and a hundred thousand notifications: what they cost to write, and what a start costs then.

    python benchmarks/feeds.py [--store file] [--lines 1000000] [--notifications 100000]

Each step is a process of its own, so that its memory is its own. "Start" is from the making of the kit to the last
fifty lines, or notifications, in hand.
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

import backtest_kit as bk
from backtest_kit.model.position import Extreme
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.retention import compact, retention_of
from backtest_kit.persist.urls import store_at

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
    position = bk.Position(
        signal_id=f"signal-{number}",
        symbol="BTCUSDT",
        strategy_name="trend",
        exchange_name="binance",
        frame_name="",
        position="long",
        price_open=100.0,
        price_take_profit=110.0,
        price_stop_loss=90.0,
        minutes=60.0,
        scheduled_at_ms=when_ms,
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
    began = time.perf_counter()
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
    print(json.dumps({"seconds": taken, "peak_mb": peak_mb}))


def measure(what: str, name: str, address: str, count: int, each: bool = False) -> None:
    done = subprocess.run(
        [sys.executable, __file__, "--step", name, "--store", address, "--lines", str(count)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    rate = f"{count / found['seconds']:10,.0f} a second" if each else ""
    print(f"{what:44} {found['seconds']:9.3f} s {found['peak_mb']:7.0f} MB {rate}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="file", help=f"one of {', '.join(STORES)}")
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--notifications", type=int, default=100_000)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        asyncio.run(step(given.step, given.store, given.lines))
        return
    with tempfile.TemporaryDirectory() as place:
        address = STORES[given.store].format(place=Path(place))
        measure("the first line", "say", address, 100)
        measure(f"{given.lines // 10:,} lines", "say", address, given.lines // 10, each=True)
        measure(f"{given.lines:,} lines", "say", address, given.lines, each=True)
        measure("start, and the last lines", "lines", address, given.lines)
        measure(f"{given.notifications:,} notifications", "tell", address, given.notifications, each=True)
        measure("start, and the last notifications", "notifications", address, given.notifications)
        measure("forgetting half of the lines", "forget", address, given.lines)


if __name__ == "__main__":
    main()
