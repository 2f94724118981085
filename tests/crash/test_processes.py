"""Several processes on one root, and thousands of files that went bad."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from backtest_kit.errors import Damaged
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.backends.file_root import Root
from backtest_kit.persist.codec import seal, unseal
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import Plain, Record
from backtest_kit.persist.testing.faults import FaultFS

pytestmark = pytest.mark.crash

STATE, SIGNAL = CONTRACTS["state"], CONTRACTS["signal"]
KEY = ("counter", "shared")

INCREMENT = """
import asyncio, sys
from backtest_kit.errors import Conflict
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import ABSENT, Write

async def main(root, count):
    store = FileStore(root)
    state, key = CONTRACTS["state"], ("counter", "shared")
    done = 0
    while done < count:
        found = await store.get(state, key)
        value, expect = (found.value, found.rev) if found else (0, ABSENT)
        try:
            await store.put(Write(state, key, value + 1, expect=expect))
        except Conflict:
            continue
        done += 1
    await store.close()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment)


async def test_no_increment_of_eight_processes_is_lost(tmp_path: Path) -> None:
    processes = [start(INCREMENT, str(tmp_path), "1000") for _ in range(8)]
    assert [await asyncio.to_thread(process.wait, 240) for process in processes] == [0] * 8
    store = FileStore(tmp_path)
    found = await store.get(STATE, KEY)
    assert found is not None
    assert (found.value, found.rev) == (8000, 8000)
    await store.close()


def flip(data: bytes, other: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data) * 8)
    return data[: place // 8] + bytes([data[place // 8] ^ 1 << place % 8]) + data[place // 8 + 1 :]


def cut(data: bytes, other: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def blank(data: bytes, other: bytes, chance: random.Random) -> bytes:
    start, length = chance.randrange(len(data)), chance.randrange(1, 513)
    return data[:start] + b"\0" * len(data[start : start + length]) + data[start + length :]


def splice(data: bytes, other: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(1, min(len(data), len(other)))
    return data[:place] + other[place:]


def replace(data: bytes, other: bytes, chance: random.Random) -> bytes:
    return other


def scatter(data: bytes, other: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(2000))


def insert(data: bytes, other: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + chance.choice((b"\0", b"\xff", b" ", b'"a":1,"a":1,', b"NaN", b"[" * 100_000)) + data[place:]


Mutation = Callable[[bytes, bytes, random.Random], bytes]
MUTATIONS: tuple[Mutation, ...] = (flip, flip, cut, blank, splice, replace, scatter, insert)


def test_ten_thousand_damaged_files(tmp_path: Path) -> None:
    """Each is refused as damaged, kept byte for byte, and blocks its key; the program goes on."""
    seed = random.randrange(1 << 30)  # noqa: S311
    chance = random.Random(seed)  # noqa: S311
    root = Root(tmp_path, Disk(FaultFS(sync=False)))
    root.open()
    (tmp_path / "signal/s/e").mkdir(parents=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    for number in range(10_000):
        key, path = ("s", "e", f"P{number}"), f"signal/s/e/P{number}.json"
        levels: list[Plain] = [chance.random() for _ in range(chance.randrange(20))]
        value: Plain = {"note": "x" * chance.randrange(400), "levels": levels}
        sound = seal(SIGNAL, Record(key, value, chance.randrange(1, 99), 5, 7))
        other = seal(SIGNAL, Record(("s", "e", "other"), value, 1, 5, 7))
        damaged = chance.choice(MUTATIONS)(sound, other, chance)
        if damaged == sound:
            continue
        said = f"seed {seed}, file {number}"
        (tmp_path / path).write_bytes(damaged)
        for _ in range(2):
            with pytest.raises(Damaged):
                root.load(SIGNAL, key, path)
        assert (tmp_path / "quarantine" / path).read_bytes() == damaged, said
        assert not (tmp_path / path).exists(), said
    assert time.monotonic() - began < 60, "a damaged file may take 6 ms"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 * 1024
    root.close()


def test_a_huge_text_in_a_damaged_file(tmp_path: Path) -> None:
    data = seal(SIGNAL, Record(("s", "e", "P"), "x" * (64 << 20), 1, None, 0))
    began = time.monotonic()
    with pytest.raises(Damaged):
        unseal(SIGNAL, ("s", "e", "P"), data[:-100] + b"y" + data[-99:])
    assert time.monotonic() - began < 5
