"""Fifty symbols live in one process: how late decisions are, and what keeping the books costs.

    python benchmarks/live.py --speed 60 --minutes 120

A minute takes a second, so that every symbol ticks once a second. Each strategy is asked at every minute and always
wants a position; a position lives a few minutes and gets a command in most of them. The same minutes are traded on
files and on a store in memory: what the processor does more on files is the price of durable books.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np

import backtest_kit as bk
from backtest_kit.market.clock import AcceleratedClock
from backtest_kit.model.interval import MINUTE_MS, to_ms
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.store import Store

GOAL = 0.05
"""Of a core, for durable books at the pace of a market, where a minute takes a minute."""
START = to_ms("2024-06-01T10:00") - 1000


class Measured(msgspec.Struct):
    """One run of all symbols."""

    store: str
    cpu_s: float
    wall_s: float
    late_ms: dict[str, float]
    """From the begin of a minute to the strategy's decision in it, in real milliseconds."""
    decisions: int
    missed_minutes: int
    trades: int
    changes: int


async def measure(name: str, store: Store, dump: Path, symbols: int, speed: float, minutes: int) -> Measured:
    clock = AcceleratedClock(START, speed)
    end_ms = START + minutes * MINUTE_MS
    late_ms: list[float] = []
    counts = {"missed": 0, "trades": 0, "changes": 0}

    def decided(ctx: bk.Context) -> None:
        late_ms.append((clock.now_ms() - ctx.when_ms) / speed)

    async def get_signal(ctx: bk.Context) -> bk.Signal:
        candles = await ctx.candles("1m", 30)
        decided(ctx)
        side = "long" if candles.close[-1] >= candles.close.mean() else "short"
        return bk.Signal.bracket(side, price=ctx.price, take_profit_pct=2, stop_loss_pct=2, minutes=8)

    async def manage(ctx: bk.Context) -> None:
        decided(ctx)
        if ctx.position is not None and ctx.position.minutes_open % 2:
            await ctx.position.reduce(percent=20)

    kit = bk.Kit(dump)
    kit.persistence.bind("*", store)
    kit.add_exchange_schema("venue", source=bk.sources.synthetic(7), broker=bk.Broker(), clock=clock)
    kit.add_strategy_schema("busy", get_signal=get_signal, manage=manage, interval="1m")
    kit.on(bk.MinutesMissed, lambda event: counts.update(missed=counts["missed"] + event.count))
    kit.on(bk.PositionClosed, lambda event: counts.update(trades=counts["trades"] + 1))
    kit.on(bk.PositionChanged, lambda event: counts.update(changes=counts["changes"] + 1))
    handles = [
        kit.live.background(f"C{number}USDT", strategy_name="busy", exchange_name="venue") for number in range(symbols)
    ]
    await clock.sleep_until(START + 2 * MINUTE_MS)  # what is done once is not what is measured
    late_ms.clear()
    cpu_s, wall_s = time.process_time(), time.monotonic()
    await clock.sleep_until(end_ms)
    cpu_s, wall_s = time.process_time() - cpu_s, time.monotonic() - wall_s
    for handle in handles:
        handle.cancel()
    await asyncio.gather(*(handle.task for handle in handles), return_exceptions=True)
    await kit.close()
    quantiles = np.quantile(late_ms, [0.5, 0.99, 1.0]).round(1).tolist()
    return Measured(
        store=name,
        cpu_s=round(cpu_s, 2),
        wall_s=round(wall_s, 2),
        late_ms=dict(zip(("p50", "p99", "max"), quantiles, strict=True)),
        decisions=len(late_ms),
        missed_minutes=counts["missed"],
        trades=counts["trades"],
        changes=counts["changes"],
    )


async def main(symbols: int, speed: float, minutes: int, directory: Path | None) -> None:
    found: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory(dir=directory) as place:
        stores: dict[str, Store] = {"memory": bk.MemoryStore(), "file": FileStore(Path(place) / "store")}
        for name, store in stores.items():
            found[name] = await measure(name, store, Path(place) / name, symbols, speed, minutes)
            print(json.dumps(msgspec.to_builtins(found[name])))
    file, memory = found["file"], found["memory"]
    more_s = file.cpu_s - memory.cpu_s
    each_ms = more_s * 1000 / (symbols * (minutes - 2))
    share, minute_ms = each_ms * symbols / MINUTE_MS, MINUTE_MS / speed
    on_time = not file.missed_minutes and file.late_ms["max"] < minute_ms
    print(f"durable books: {more_s / file.wall_s:.1%} of a core at this pace, {each_ms:.2f} ms a symbol and minute")
    print(f"at the pace of a market: {share:.2%} of a core (goal: at most {GOAL:.0%}) {verdict(share <= GOAL)}")
    print(
        f"latest decision: {file.late_ms['max']:g} ms into a minute of {minute_ms:g} ms, {file.missed_minutes} missed "
        f"(goal: none later than its minute) {verdict(on_time)}"
    )


def verdict(is_met: bool) -> str:
    return "ok" if is_met else "MISSED"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--symbols", type=int, default=50)
    parser.add_argument("--speed", type=float, default=60.0)
    parser.add_argument("--minutes", type=int, default=120)
    parser.add_argument("--directory", type=Path, help="where the files are")
    given = parser.parse_args()
    asyncio.run(main(given.symbols, given.speed, given.minutes, given.directory))
