"""Kills a real process in the middle of its writes, again and again, and compares what is left.

    python -m backtest_kit.persist.testing.driver --store file:/tmp/kills --kills 500 --seed 1
    python -m backtest_kit.persist.testing.driver --store file:/tmp/points --points

A child writes records of every contract, candles too, and says so on a pipe: what it is about to write, and what was
acknowledged. It is killed by SIGKILL at a random moment, or at a crash point. The next child reads back
everything before it writes on. Of every key, what is stored must be at least what was acknowledged and at
most what was attempted. The outcome is printed as one line of JSON.

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
from collections.abc import Callable
from typing import Any, Final

import msgspec

from backtest_kit.errors import BacktestKitError
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.persist import crashpoints
from backtest_kit.persist.contracts import CONTRACTS, Contract, Kind, WriteRule
from backtest_kit.persist.store import Capability, Key, Record, SeriesKey, Store, Write
from backtest_kit.persist.urls import store_at

WRITERS: Final = 4
KILLS_PER_ROOT: Final = 50
_RECORDS: Final = tuple(row for row in CONTRACTS.values() if row.kind is not Kind.SERIES)
_MINUTE_MS: Final = 60_000
_BATCH: Final = ("signal", "schedule", "strategy", "risk", "state", "storage")
"""The contracts that one writer writes together, which must then stand at one version."""


class Outcome(msgspec.Struct):
    """What a series of kills did to the records."""

    seed: int
    kills: int = 0
    acknowledged: int = 0
    recovered: int = 0
    """Writes that were stored though the child died before it could say so."""
    lost: list[str] = []
    phantom: list[str] = []
    unreadable: list[str] = []
    torn: list[str] = []
    points: dict[str, int] = {}
    """By crash point, how many of its passages the child was killed at."""

    @property
    def sound(self) -> bool:
        return not (self.lost or self.phantom or self.unreadable or self.torn)


class Ledger:
    """What the parent knows of every key: the last acknowledged and the last attempted version."""

    def __init__(self) -> None:
        self.acknowledged: dict[str, int] = {}
        self.attempted: dict[str, int] = {}

    def read(self, data: bytes) -> int:
        """Take in what a child wrote to its pipe; return the number of acknowledgements."""
        count = 0
        for line in data.split(b"\n")[:-1]:
            kind, name, version = line.decode().split(" ")
            table = self.acknowledged if kind == "K" else self.attempted
            table[name] = max(table.get(name, 0), int(version))
            count += kind == "K"
        return count

    def compare(self, stored: dict[str, int], outcome: Outcome) -> None:
        for name in sorted({*self.attempted, *stored}):
            found = stored.get(name, 0)
            low, high = self.acknowledged.get(name, 0), self.attempted.get(name, 0)
            if found < low:
                outcome.lost.append(f"{name}: stored {found}, acknowledged {low}, kill {outcome.kills}")
            elif found > high:
                outcome.phantom.append(f"{name}: stored {found}, attempted {high}, kill {outcome.kills}")
            outcome.recovered += found > low
            # What is there now is there for good: a later kill must not take it back.
            self.acknowledged[name] = max(low, found)


def key_of(row: Contract, writer: int, version: int) -> Key:
    """The key of a writer; where the first write wins, every version has its own."""
    last = f"w{writer}" if row.write_rule is WriteRule.REPLACE else f"w{writer}-{version}"
    return tuple(writer % 2 == 0 if field == "backtest" else last for field in row.key_fields)


def name_of(row: Contract, key: Key) -> str:
    return f"{row.name}:{next(part for part in reversed(key) if isinstance(part, str))}"


def value_of(writer: int, version: int) -> Any:
    return {"writer": writer, "version": version, "pad": f"{writer}-{version} " * (version % 40)}


def series_of(writer: int) -> SeriesKey:
    return SeriesKey("exchange", f"w{writer}", "1m")


def candle_of(writer: int, version: int) -> CandleSeries:
    """The one candle that a writer writes as its `version`, at a minute of its own."""
    return CandleSeries([version * _MINUTE_MS], *([float(writer * 1_000_000 + version)] for _ in COLUMNS[1:]))


_FORGOTTEN: Final = "forgotten"


class Child:
    """The process that is going to be killed."""

    def __init__(self, url: str, pipe: int) -> None:
        self._store: Store = store_at(url)
        self._pipe = pipe

    async def read_all(self) -> dict[str, Any]:
        """Every record by name, and what could not be read."""
        stored: dict[str, int] = {}
        unreadable: list[str] = []
        for row in _RECORDS:
            try:
                async for record in self._store.scan(row, include_removed=True):
                    if str(record.key[-1]).startswith(_FORGOTTEN):
                        continue
                    stored[name_of(row, record.key)] = _version(row, record, unreadable)
            except BacktestKitError as error:
                unreadable.append(f"{row.name}: {error}")
        for writer in range(WRITERS):
            try:
                stored |= await self._read_candles(writer, unreadable)
            except BacktestKitError as error:
                unreadable.append(f"candle: {error}")
        return {"stored": stored, "unreadable": unreadable}

    async def _read_candles(self, writer: int, unreadable: list[str]) -> dict[str, int]:
        found = await self._store.candles.read(series_of(writer), 0, 1 << 40)
        versions = [int(stamp) // _MINUTE_MS for stamp in found.timestamp]
        for index, version in enumerate(versions):
            if found[index : index + 1] != candle_of(writer, version):
                unreadable.append(f"candle w{writer} has a minute {version} that nobody wrote")
        return {f"candle:w{writer}-{version}": version for version in versions}

    async def write_for_ever(self, versions: dict[str, int]) -> None:
        await asyncio.gather(*(self._write_on(writer, versions) for writer in range(WRITERS)))

    async def _write_on(self, writer: int, versions: dict[str, int]) -> None:
        rows = list(CONTRACTS.values())
        random.shuffle(rows)
        version = 1 + max((last for name, last in versions.items() if _is_of(name, writer)), default=0)
        while True:
            if writer == 0:
                await self.write([CONTRACTS[name] for name in _BATCH], writer, version)
            else:
                await self.write([rows[version % len(rows)]], writer, version)
            version += 1

    async def write_and_forget(self, row: Contract, version: int) -> None:
        """Write records that no promise is kept of, and forget them: what lies beside them must stay."""
        keys = [(*key_of(row, 0, version)[:-1], f"{_FORGOTTEN}-{version}-{number}") for number in range(3)]
        for key in keys:
            await self._store.put(Write(row, key, "soon forgotten"))
        if Capability.PRUNING in self._store.capabilities:
            await self._store.prune(row, dict.fromkeys(keys, 1))

    async def write(self, rows: list[Contract], writer: int, version: int) -> None:
        if rows[0].kind is Kind.SERIES:
            names = [f"{rows[0].name}:w{writer}-{version}"]
            self._tell("A", names, version)
            await self._store.candles.write(series_of(writer), candle_of(writer, version))
            self._tell("K", names, version)
            return
        writes = [Write(row, key_of(row, writer, version), value_of(writer, version), when=version) for row in rows]
        names = [name_of(write.contract, write.key) for write in writes]
        self._tell("A", names, version)
        if len(writes) == 1:
            await self._store.put(writes[0])
        else:
            await self._store.batch(writes)
        self._tell("K", names, version)

    async def close(self) -> None:
        await self._store.close()

    def _tell(self, kind: str, names: list[str], version: int) -> None:
        os.write(self._pipe, "".join(f"{kind} {name} {version}\n" for name in names).encode())


def _version(row: Contract, record: Record, unreadable: list[str]) -> int:
    value = record.value
    version = value.get("version") if isinstance(value, dict) else None
    writer = value.get("writer") if isinstance(value, dict) else None
    if not isinstance(version, int) or not isinstance(writer, int) or value != value_of(writer, version):
        unreadable.append(f"{row.name} {record.key} has a value that nobody wrote: {str(value)[:80]}")
        return 0
    return version


def _is_of(name: str, writer: int) -> bool:
    return name.partition(":")[2].partition("-")[0] == f"w{writer}"


def _fork(body: Callable[[int], None]) -> tuple[int, int]:
    """Run `body` in a child; return its process id and the end of the pipe that it writes to."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        os.close(reading)
        body(writing)
        status = 0
    except BaseException as error:
        print(f"the child failed: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
    finally:
        os._exit(status)


def _drain(pipe: int) -> bytes:
    parts = []
    while part := os.read(pipe, 1 << 16):
        parts.append(part)
    os.close(pipe)
    return b"".join(parts)


def read_back(url: str) -> dict[str, Any]:
    """What a fresh process finds in the store."""

    def body(pipe: int) -> None:
        async def run() -> bytes:
            child = Child(url, pipe)
            found = await child.read_all()
            await child.close()
            return msgspec.json.encode(found)

        with os.fdopen(pipe, "wb") as file:
            file.write(asyncio.run(run()))

    process, pipe = _fork(body)
    data = _drain(pipe)
    os.waitpid(process, 0)
    found: dict[str, Any] = msgspec.json.decode(data) if data else {"stored": {}, "unreadable": ["the reader died"]}
    return found


def kill_at_random(url: str, kills: int, seed: int, patience: float = 1.0) -> Outcome:
    """Kill a child that writes with four writers, `kills` times; `patience` stretches the lives in between.

    They get longer until one has written something: nobody knows beforehand how slow a disk is.
    """
    chance = random.Random(seed)  # noqa: S311
    outcome = Outcome(seed)
    while outcome.kills < kills:
        root, ledger = f"{url}-{outcome.kills}", Ledger()
        for _ in range(min(KILLS_PER_ROOT, kills - outcome.kills)):
            _kill_once(root, ledger, outcome, chance, patience)
            if not outcome.acknowledged:
                patience *= 2
        _settle(read_back(root), ledger, outcome)
    return outcome


def _kill_once(url: str, ledger: Ledger, outcome: Outcome, chance: random.Random, patience: float) -> None:
    child_seed = chance.randrange(1 << 30)
    delay = chance.choice((0.0005, 0.003, 0.01, 0.03)) * chance.random() * patience

    def body(pipe: int) -> None:
        async def run() -> None:
            random.seed(child_seed)
            child = Child(url, pipe)
            found = await child.read_all()
            report = msgspec.json.encode(found)
            os.write(pipe, b"%d\n" % len(report) + report)
            await child.write_for_ever(found["stored"])

        asyncio.run(run())

    process, pipe = _fork(body)
    head = b""
    while not head.endswith(b"\n"):
        head += os.read(pipe, 1) or b"\n"
    report = b""
    while len(report) < int(head or b"0"):
        report += os.read(pipe, int(head) - len(report))
    _settle(msgspec.json.decode(report), ledger, outcome)
    written = b""
    deadline = time.monotonic() + delay
    while (left := deadline - time.monotonic()) > 0:
        if select.select([pipe], [], [], left)[0]:
            written += os.read(pipe, 1 << 16)
    os.kill(process, signal.SIGKILL)
    outcome.acknowledged += ledger.read(written + _drain(pipe))
    os.waitpid(process, 0)
    outcome.kills += 1


def _settle(found: dict[str, Any], ledger: Ledger, outcome: Outcome) -> None:
    outcome.unreadable += found["unreadable"]
    stored: dict[str, int] = found["stored"]
    ledger.compare(stored, outcome)
    together = {stored.get(name_of(CONTRACTS[name], key_of(CONTRACTS[name], 0, 1)), 0) for name in _BATCH}
    if len(together) > 1:
        outcome.torn.append(f"one batch stands at versions {sorted(together)} after kill {outcome.kills}")


def kill_at_points(url: str, script: Callable[[Child], Any], seed: int = 0, most: int | None = None) -> Outcome:
    """Kill a child at every crash point of `script`, each time over a root of its own: at every passage of it, or
    at `most` of them, which `seed` draws."""
    chance = random.Random(seed)  # noqa: S311
    outcome = Outcome(seed)
    passages = _passages(f"{url}-count", script)
    for point, count in sorted(passages.items()):
        for number in chance.sample(range(1, count + 1), count):
            if outcome.points.get(point, 0) == most:
                break
            root = f"{url}-{point}-{number}"
            ledger = Ledger()

            def body(pipe: int, root: str = root, order: str = f"{point}:{number}") -> None:
                crashpoints.arm(order)
                asyncio.run(_run(script, Child(root, pipe)))

            process, pipe = _fork(body)
            outcome.acknowledged += ledger.read(_drain(pipe))
            _, status = os.waitpid(process, 0)
            if os.WIFSIGNALED(status):  # groups form as threads run, so a passage may not come again
                outcome.kills += 1
                outcome.points[point] = outcome.points.get(point, 0) + 1
            _settle(read_back(root), ledger, outcome)
    return outcome


def _passages(url: str, script: Callable[[Child], Any]) -> dict[str, int]:
    def body(pipe: int) -> None:
        passed = crashpoints.record()
        devnull = os.open(os.devnull, os.O_WRONLY)
        asyncio.run(_run(script, Child(url, devnull)))
        with os.fdopen(pipe, "wb") as file:
            file.write(msgspec.json.encode(passed))

    process, pipe = _fork(body)
    data = _drain(pipe)
    os.waitpid(process, 0)
    return msgspec.json.decode(data, type=dict[str, int])


async def _run(script: Callable[[Child], Any], child: Child) -> None:
    await script(child)
    await child.close()


async def fifty_operations(child: Child) -> None:
    """Writes of every kind, alone, together and in batches."""
    for version in range(1, 4):
        for name in ("signal", "state", "measure", "log", "notification", "candle"):
            await child.write([CONTRACTS[name]], 1, version)
        await child.write([CONTRACTS[name] for name in _BATCH], 0, version)
        await asyncio.gather(
            *(child.write([CONTRACTS[name]], writer, version) for name in ("signal", "risk") for writer in (2, 3)),
            *(child.write([CONTRACTS[name]], 3, version) for name in ("log", "storage", "memory", "recent")),
        )
        await child.write([CONTRACTS["partial"]], 1, version)
        await child.write([CONTRACTS["schedule"]], 1, version)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="address of the store; every run makes others beside it")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--patience", type=float, default=1.0, help="how many times as long a life is, for a slow disk")
    parser.add_argument("--points", action="store_true", help="kill at every crash point instead of at random")
    parser.add_argument("--most", type=int, help="at how many passages of each point; without it, at all of them")
    given = parser.parse_args(arguments)
    store_at(given.store)  # imports the backend, so that no child has to
    if given.points:
        outcome = kill_at_points(given.store, fifty_operations, given.seed, given.most)
    else:
        outcome = kill_at_random(given.store, given.kills, given.seed, given.patience)
    sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")
    return 0 if outcome.sound else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
