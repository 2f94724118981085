"""What records cost on each store: one read or write at a time, and searches among ten thousand notes.

    python benchmarks/records.py [--notes 10000] [--times 500]

Figures are medians of one call; the first search reads and indexes every note.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import backtest_kit as bk
from backtest_kit.persist.urls import store_at

STORES = ("memory:", "file:{place}/dump", "sqlite:{place}/bot.db")
WORDS = [f"word{number}" for number in range(3_000)]


def text(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=40))


async def median_ms(times: int, call: Callable[[], Awaitable[object]]) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        await call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1000


async def measure(address: str, place: Path, notes: int, times: int) -> None:
    chance = random.Random(7)  # noqa: S311
    kit = bk.Kit(place / "files")
    kit.persistence.bind("*", store_at(address.format(place=place)))
    run = kit.records.of_run(bk.Identity("BTCUSDT", "trend", "binance", "", "live"), None)
    state, memory = run.state("plan", 0, None, None, False), run.memory("notes", 0, None, None, False)

    @kit.records.measure.cached("1h", name="ask", version="1")
    async def ask(question: str) -> str:
        return question

    print(f"\n{address.partition(':')[0]}")
    for name, call in (
        ("state.update", lambda: state.update(lambda count: count + 1, 0)),
        ("state.get", state.get),
        ("a cached answer", lambda: ask("up or down?", when=0)),
        ("memory.write", lambda: memory.write("again", text(chance))),
    ):
        print(f"  {name:38} {await median_ms(times, call):8.3f} ms")
    kit.persistence.keep_history("state")
    kept = kit.persistence.state
    slot: dict[str, Any] = {"signal_id": "s-1", "bucket_name": "plan"}
    moments = iter(range(1, times + 1))
    chance_of = iter(chance.choices(range(1, times + 1), k=times))
    for name, call in (
        ("state.update, with history", lambda: state.update(lambda count: count + 1, 0)),
        ("state.write, with history", lambda: kept.write("a plan", when=next(moments), **slot)),
        ("state.read as_of the last moment", lambda: kept.read(as_of=times, **slot)),
        (f"state.read as_of any of {times} moments", lambda: kept.read(as_of=next(chance_of), **slot)),
    ):
        print(f"  {name:38} {await median_ms(times, call):8.3f} ms")
    for start in range(0, notes, 100):
        await asyncio.gather(*(memory.write(f"n{number}", text(chance)) for number in range(start, start + 100)))

    async def note_and_search() -> None:
        await memory.write(f"n{chance.randrange(notes)}", text(chance))
        await memory.search("word1 word17 word40")

    print(f"  {'memory.search, the first':38} {await median_ms(1, note_and_search):8.3f} ms of {notes:,} notes")
    await memory.search("word1")
    print(f"  {'memory.write and memory.search':38} {await median_ms(20, note_and_search):8.3f} ms")
    print(f"  {'memory.list(limit=20)':38} {await median_ms(20, lambda: memory.list(limit=20)):8.3f} ms")
    await kit.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=500)
    given = parser.parse_args()
    for address in STORES:
        with tempfile.TemporaryDirectory() as place:
            asyncio.run(measure(address, Path(place), given.notes, given.times))


if __name__ == "__main__":
    main()
