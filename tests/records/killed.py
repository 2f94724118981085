"""Kills a program that keeps records, again and again, and says what the next one found. Run by test_kills.

This process has no threads of its own, so that it can fork its children ready to run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import select
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import msgspec
from tests.records.conftest import Minute, kit_on

OWNER: Final[dict[str, Any]] = {"strategy_name": "trend", "exchange_name": "binance", "symbol": "BTCUSDT"}
KINDS: Final = ("state", "session", "memory")


class Outcome(msgspec.Struct):
    """What a series of kills did to the records."""

    kills: int = 0
    acknowledged: int = 0
    windows: int = 0
    problems: list[str] = []


async def keep_records(address: str, place: Path, effects: Path, pipe: int) -> None:
    """Say what is there, then write for ever: how far each record has come is told after every write."""
    kit = kit_on(address, place)
    state, session = kit.records.state("count", **OWNER), kit.records.session(**OWNER)
    memory = kit.records.memory("notes", **OWNER)
    effect = os.open(effects, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    @kit.records.interval.once("1m", name="work", version="1")
    async def work(ctx: Any) -> None:
        os.write(effect, b"%d\n" % ctx.when_ms)

    def tell(kind: str, count: int) -> None:
        os.write(pipe, f"{kind} {count}\n".encode())

    async def count_on(kind: str, slot: Any, count: int) -> None:
        while True:
            count = await slot.update(lambda found: found + 1, 0)
            tell(kind, count)

    async def note_on(count: int) -> None:
        while True:
            count += 1
            await memory.write(f"n{count}", f"note number{count}")
            tell("memory", count)

    async def use_windows() -> None:
        while True:
            window = int(time.monotonic() * 200)  # every life asks again for those that the last one may have used
            for each in range(window - 3, window + 1):
                await work(Minute(when_ms=each * 60_000))

    notes = await memory.list()
    names = sorted(int(entry.memory_id[1:]) for entry in notes)
    whole = names == list(range(1, len(names) + 1))
    found = await memory.search(f"number{len(names)}") if names else []
    whole = whole and [entry.memory_id for entry in found] == [f"n{last}" for last in names[-1:]]
    tell("state", await state.get(0))
    tell("session", await session.get(0))
    tell("memory", len(names) if whole else -1)
    tell("ready", 0)
    counts = [await state.get(0), await session.get(0)]
    await asyncio.gather(
        count_on("state", state, counts[0]), count_on("session", session, counts[1]), note_on(len(names)), use_windows()
    )


def fork(address: str, place: Path, effects: Path) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        asyncio.run(keep_records(address, place, effects, writing))
    except BaseException as error:
        os.write(writing, f"failed {error!r}\n".encode())
    finally:
        os._exit(1)


def run(address: str, place: Path, kills: int, chance: random.Random) -> Outcome:
    outcome, effects = Outcome(), place / "effects"
    reached = dict.fromkeys(KINDS, 0)
    for _ in range(kills):
        child, pipe = fork(address, place, effects)
        head = b""
        while b"ready" not in head and b"failed" not in head:
            head += os.read(pipe, 1 << 16)
        deadline = time.monotonic() + chance.choice((0.001, 0.02, 0.1)) * chance.random()
        while (left := deadline - time.monotonic()) > 0:
            if select.select([pipe], [], [], left)[0]:
                head += os.read(pipe, 1 << 16)
        os.kill(child, signal.SIGKILL)
        while part := os.read(pipe, 1 << 16):
            head += part
        os.close(pipe)
        os.waitpid(child, 0)
        read, _, written = head.partition(b"ready 0\n")
        for line in read.decode().splitlines():
            kind, text = line.split(" ", 1)
            # A write that was under way may have been stored: one of each kind.
            if kind not in KINDS or not reached[kind] <= int(text) <= reached[kind] + 1:
                outcome.problems.append(f"kill {outcome.kills}: found {line}, acknowledged were {reached}")
                return outcome
            reached[kind] = int(text)
        for line in written.decode().splitlines():
            kind, text = line.split(" ", 1)
            reached[kind] = int(text)
            outcome.acknowledged += 1
        outcome.kills += 1
    used = effects.read_text().split()
    outcome.windows = len(used)
    outcome.problems += [f"window {each} was used twice" for each in sorted(set(used)) if used.count(each) > 1]
    return outcome


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    import_module("sqlite3")
    kit_on(options.store, options.place)  # imports the backend, so that no child has to
    result = run(options.store, options.place, options.kills, random.Random(options.seed))  # noqa: S311
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
