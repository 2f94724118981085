"""Power that fails at any moment: every state of the disk that POSIX allows opens again with all that was promised."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tests.samples import SEED, size

from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import SeriesKey, Write
from backtest_kit.persist.testing import power
from backtest_kit.persist.testing.faults import FaultFS
from backtest_kit.persist.testing.power import Aftermath, Change, Link, Mark, RecordingFS, Sync

STATES = size(120, 20_000)
"""How many of each workload are tried."""

SIGNAL, SCHEDULE, STRATEGY, STATE, MEASURE, LOG, RISK = (
    CONTRACTS[name] for name in ("signal", "schedule", "strategy", "state", "measure", "log", "risk")
)
SERIES = SeriesKey("e", "A", "1m")
KEY = ("s", "e", "A")
BATCH = (*((row, ("s", "e", "B")) for row in (SIGNAL, SCHEDULE, STRATEGY)), (STATE, ("batch", "x")))


class Began(NamedTuple):
    """Version `number` of what is called `name` is being written."""

    name: str
    number: int


class Durable(NamedTuple):
    """Version `number`, or a later one, survives from here on."""

    name: str
    number: int


def filler(number: int) -> str:
    return f"{number}:" + "x" * (number * 2311 % 6000)


class Program:
    """Writes numbered versions of a few records, and says what it was promised."""

    def __init__(self, root: Path) -> None:
        self.calls = RecordingFS(root)
        self.root = root
        self.store = FileStore(root, disk=Disk(self.calls))
        self._numbers: dict[str, int] = {}
        self._soon: dict[str, int] = {}

    async def write(self, name: str, work: Callable[[int], Awaitable[object]], *, money: bool) -> None:
        number = self._numbers[name] = self._numbers.get(name, 0) + 1
        self.calls.mark(Began(name, number))
        await work(number)
        if money:
            self.calls.mark(Durable(name, number))
        else:
            self._soon[name] = number

    async def reopen(self) -> None:
        """Close, which makes durable whatever was acknowledged."""
        await self.store.close()
        for name, number in self._soon.items():
            self.calls.mark(Durable(name, number))
        self._soon.clear()
        self.store = FileStore(self.root, disk=Disk(self.calls))

    async def money(self) -> None:
        await self.write("money", lambda n: self.store.put(Write(SIGNAL, KEY, filler(n))), money=True)

    async def batch(self) -> None:
        def write(number: int) -> Awaitable[object]:
            return self.store.batch([Write(row, key, filler(number)) for row, key in BATCH])

        await self.write("batch", write, money=True)

    async def record(self, name: str) -> None:
        await self.write(name, lambda n: self.store.put(Write(STATE, ("r", name), filler(n))), money=False)

    async def cache(self) -> None:
        await self.write("cache", lambda n: self.store.put(Write(MEASURE, ("b", "k"), filler(n))), money=False)

    async def log(self) -> None:
        await self.write("log", lambda n: self.store.put(Write(LOG, (f"{n:06d}",), filler(n))), money=False)

    async def lines(self) -> None:
        """A line in a batch with money, which makes it as durable."""

        def write(number: int) -> Awaitable[object]:
            line = Write(LOG, (f"with-{number:06d}",), f"with {number}")
            return self.store.batch([Write(RISK, ("e", "r"), filler(number)), line])

        await self.write("lines", write, money=True)

    async def candles(self) -> None:
        await self.write("candles", lambda n: self.store.candles.write(SERIES, candle(n)), money=False)


def candle(number: int) -> CandleSeries:
    """The candle of a minute; the fifth begins another month."""
    at = 1_643_673_600_000 + (number - 5) * 60_000
    return CandleSeries(np.array([at]), *(np.array([float(number)]) for _ in range(5)))


async def slots(program: Program, choose: random.Random) -> None:
    for _ in range(24):
        await choose.choice((program.money, program.money, program.batch))()
        if choose.random() < 0.15:
            await program.reopen()


async def records(program: Program, choose: random.Random) -> None:
    for _ in range(30):
        await choose.choice((lambda: program.record("a"), lambda: program.record("b"), program.batch, program.cache))()
        if choose.random() < 0.2:
            await program.reopen()


async def logs(program: Program, choose: random.Random) -> None:
    for _ in range(24):
        await choose.choice((program.log, program.log, program.lines))()
        if choose.random() < 0.2:
            await program.reopen()


async def everything(program: Program, choose: random.Random) -> None:
    for _ in range(30):
        kinds = (program.money, program.batch, lambda: program.record("a"), program.log, program.lines, program.candles)
        await choose.choice(kinds)()
        if choose.random() < 0.15:
            await program.reopen()


WORKLOADS = {work.__name__: work for work in (slots, records, logs, everything)}


async def run(work: Any, root: Path, seed: int) -> list[Change]:
    program = Program(root)
    await work(program, random.Random(seed))  # noqa: S311
    await program.reopen()
    await program.store.close()
    return program.calls.changes


def promises(changes: list[Change]) -> dict[str, tuple[int, int]]:
    """For each name the least and the greatest number that may be there now."""
    found: dict[str, tuple[int, int]] = {}
    for change in changes:
        if isinstance(change, Mark):
            least, greatest = found.get(change.label.name, (0, 0))
            if isinstance(change.label, Began):
                greatest = change.label.number
            else:
                least = change.label.number
            found[change.label.name] = least, greatest
    return found


def number_of(value: Any) -> int:
    """The number of a version, whose whole value must be right."""
    number = int(value.partition(":")[0])
    assert value == filler(number)
    return number


async def numbers(store: FileStore) -> dict[str, list[int]]:
    """What can be read, as numbers of versions: 0 is absent."""
    found: dict[str, list[int]] = {}
    for name, row, key in (
        ("money", SIGNAL, KEY),
        *(("batch", row, key) for row, key in BATCH),
        ("a", STATE, ("r", "a")),
        ("b", STATE, ("r", "b")),
        ("cache", MEASURE, ("b", "k")),
        ("lines", RISK, ("e", "r")),
    ):
        record = await store.get(row, key)
        found.setdefault(name, []).append(0 if record is None else number_of(record.value))
    lines = [str(record.value) async for record in store.scan(LOG)]
    found["log"] = [number_of(text) for text in lines if not text.startswith("with")]
    # One for each batch, no more and no less, up to the last one; what the journal brings back is behind the others.
    assert sorted(int(text.split()[1]) for text in lines if text.startswith("with")) == [
        *range(1, found["lines"][0] + 1)
    ]
    rows = await store.candles.read(SERIES, 0, 1 << 50)
    found["candles"] = [int(close) for close in rows.close]
    for number in found["candles"]:
        assert candle(number).timestamp[0] in rows.timestamp
    return found


async def require_legal(root: Path, promised: dict[str, tuple[int, int]], *, go_on: bool) -> None:
    store = FileStore(root, disk=Disk(FaultFS(sync=False)))
    found = await numbers(store)
    for name, (least, greatest) in promised.items():
        values = found[name]
        if name == "log":
            assert values == sorted(set(values)), name
            assert {*range(1, least + 1)} <= {*values} <= {*range(1, greatest + 1)}, (name, least, greatest, values)
        elif name == "candles":
            assert {*values} <= {*range(1, greatest + 1)}, (name, values)
        elif name == "cache":
            assert 0 <= values[0] <= greatest, (name, values)
        else:
            assert len(set(values)) == 1, (name, values)
            assert least <= values[0] <= greatest, (name, least, greatest, values)
    assert [item for item in await store.quarantined() if item.blocks] == []
    if go_on:
        await require_going_on(store, root)
    await store.close()


async def require_going_on(store: FileStore, root: Path) -> None:
    """Whatever was left, writing goes on, and what is written is there."""
    await store.batch([Write(row, key, filler(9)) for row, key in (*BATCH, (SIGNAL, KEY), (STATE, ("r", "a")))])
    await store.put(Write(LOG, ("later",), filler(9)))
    await store.close()
    again = FileStore(root, disk=Disk(FaultFS(sync=False)))
    after = await numbers(again)
    assert (after["money"], {*after["batch"]}, after["a"], after["log"][-1]) == ([9], {9}, [9], 9)
    assert [finding for finding in await again.check() if finding.blocks] == []
    await again.close()


@pytest.mark.sampled
@pytest.mark.parametrize("name", WORKLOADS)
async def test_every_state_after_a_loss_of_power_is_legal(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    runs = size(2, 4)
    for number in range(runs):
        seed = SEED * 1_000 + number
        root = tmp_path / f"run-{number}"
        changes = await run(WORKLOADS[name], root, seed)
        choose = random.Random(seed)  # noqa: S311
        for state in range(STATES // runs):
            until = changes[: choose.randrange(len(changes) + 1)]
            left = tmp_path / "left"
            Aftermath(until, str(root), seed * 1_000_000 + state).build(left)
            if left.exists():
                try:
                    await require_legal(left, promises(until), go_on=state % 4 == 0)
                except Exception as error:
                    error.add_note(f"workload {name}, seed {seed}, state {state}, after {len(until)} changes")
                    raise
                await asyncio.to_thread(shutil.rmtree, left)
        shutil.rmtree(root)


async def test_every_rename_comes_after_a_sync(tmp_path: Path) -> None:
    """Of the file itself, or of a journal that has its content; only what may be lost is renamed without one."""
    changes = [
        *await run(everything, tmp_path / "a", SEED),
        *await run(records, tmp_path / "b", SEED),
        *await run(logs, tmp_path / "c", SEED),
    ]
    unsynced: set[int] = set()
    journals: set[int] = set()
    journalled: set[int] = set()
    renamed = 0
    for change in changes:
        if isinstance(change, Link) and change.file is not None:
            if change.name.endswith(".journal"):
                journals.add(change.file)
            if (
                change.replaces is not None
                and not change.name.endswith(".next")
                and "/measure/" not in change.directory
            ):
                renamed += 1
                assert change.file not in unsynced - journalled, f"{change.directory}/{change.name}"
        elif isinstance(change, power.Write):
            unsynced.add(change.file)
        elif isinstance(change, Sync) and isinstance(change.what, int):
            unsynced.discard(change.what)
            if change.what in journals:
                journalled = set(unsynced)
    assert renamed > 50


AUDITED = """
import asyncio, sys
from collections import Counter
from pathlib import Path

import numpy as np

from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import SeriesKey, Write
from backtest_kit.persist.testing.power import RecordingFS

root = Path(sys.argv[1])
EVENTS = {
    "open": "open", "os.rename": "rename", "os.remove": "remove", "os.mkdir": "mkdir", "os.rmdir": "rmdir",
    "os.link": "link", "os.symlink": "symlink", "shutil.move": "move", "shutil.copyfile": "copy",
}
seen = Counter()

def hook(event, args):
    if event in EVENTS and isinstance(args[0], str | bytes | Path) and str(args[0]).startswith(str(root.parent)):
        seen[EVENTS[event], str(args[0])] += 1

async def live(calls):
    store = FileStore(root, disk=Disk(calls))
    money = [Write(CONTRACTS[name], ("s", "e", "A"), 1) for name in ("signal", "schedule")]
    await store.batch(money)
    for name, key in (("signal", ("s", "e", "A")), ("state", ("s", "b")), ("measure", ("b", "k")), ("log", ("1",))):
        await store.put(Write(CONTRACTS[name], key, 2))
    forgotten = await store.put(Write(CONTRACTS["memory"], ("s", "b", "m"), 1, removed=True))
    await store.prune(CONTRACTS["memory"], {("s", "b", "m"): forgotten.rev})
    await store.candles.write(SeriesKey("e", "A", "1m"), CandleSeries(np.array([0]), *(np.ones(1) for _ in range(5))))
    space = store.namespace("run")
    await space.put(Write(CONTRACTS["state"], ("s", "b"), 1))
    await space.forget()
    await store.close()

calls = RecordingFS(root)
sys.addaudithook(hook)
asyncio.run(live(calls))
recorded = Counter(calls.calls)
print(sum(recorded.values()), sorted((seen - recorded) + (recorded - seen)))
"""


def test_nothing_is_written_past_the_recording(tmp_path: Path) -> None:
    """What the states are made from is all that a store does with files."""
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, str(tmp_path / "dump")], capture_output=True, text=True, check=False
    )
    count, _, difference = done.stdout.strip().partition(" ")
    assert (difference, done.stderr) == ("[]", "")
    assert int(count) > 50
