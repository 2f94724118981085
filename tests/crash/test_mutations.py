"""Thousands of records that went bad, of every form in which they lie on a disk.

What is damaged is refused, or is what was written; it is never another value, and never lost.
"""

from __future__ import annotations

import random
import resource
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.samples import dice, size

from backtest_kit.errors import Damaged
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.backends.file_root import Root
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.codec import seal, unseal
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import Disk, has_lost_blocks
from backtest_kit.persist.journal import written_lines
from backtest_kit.persist.store import Key, Plain, Record, SeriesKey, Write
from backtest_kit.persist.testing.faults import FaultFS

pytestmark = [pytest.mark.crash, pytest.mark.sampled]

SIGNAL, SCHEDULE, LOG = (CONTRACTS[name] for name in ("signal", "schedule", "log"))


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


def test_thousands_of_damaged_files(tmp_path: Path) -> None:
    """Each is refused as damaged, kept byte for byte, and blocks its key; the program goes on."""
    seed = dice("mutations").randrange(1 << 30)
    chance = random.Random(seed)  # noqa: S311
    root = Root(tmp_path, Disk(FaultFS(sync=False)))
    root.open()
    (tmp_path / "signal/s/e").mkdir(parents=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    for number in range(size(1_500, 10_000)):
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


@pytest.fixture
def chance() -> random.Random:
    seed = dice("mutations").randrange(1 << 30)
    print(f"seed {seed}")  # pytest shows it where a test fails
    return random.Random(seed)  # noqa: S311


async def test_hundreds_of_damaged_rows(tmp_path: Path, chance: random.Random) -> None:
    """SQLite: a copy of the bytes is in quarantine, the row stays as it is and blocks its key."""
    store = SqliteStore(tmp_path / "bot.db")
    keys: list[Key] = [("s", "e", f"P{number}") for number in range(size(400, 2_000))]
    await store.batch([Write(SIGNAL, key, "x" * chance.randrange(300)) for key in keys])
    connection = sqlite3.connect(store.path)
    rows = dict(connection.execute("SELECT key, record FROM records").fetchall())
    damaged: dict[str, bytes] = {}
    for key in keys:
        # The name of a column comes from the key as a file name does: P gets no mark, being a capital symbol.
        name = "/".join(map(str, key))
        damaged[name] = chance.choice(MUTATIONS)(rows[name], rows["s/e/P0"], chance)
    with connection:
        connection.executemany("UPDATE records SET record = ? WHERE key = ?", [(v, k) for k, v in damaged.items()])
    expected = {}
    for key in keys:
        name = "/".join(map(str, key))
        if damaged[name] == rows[name]:
            continue
        expected[name] = damaged[name]
        with pytest.raises(Damaged):
            await store.get(SIGNAL, key)
        if len(expected) % 20 == 0:
            with pytest.raises(Damaged):
                await store.put(Write(SIGNAL, key, "other"))
    assert len(expected) > size(360, 1_900)
    assert dict(connection.execute("SELECT key, record FROM quarantine").fetchall()) == expected
    assert dict(connection.execute("SELECT key, record FROM records").fetchall()) == damaged
    connection.close()
    await store.close()


async def test_hundreds_of_damaged_months(tmp_path: Path, chance: random.Random) -> None:
    """Candles: each file is refused and kept byte for byte, and blocks its month."""
    store = FileStore(tmp_path, disk=Disk(FaultFS(sync=False)))
    series = [SeriesKey("e", f"S{number}", "1m") for number in range(2)]
    for number, name in enumerate(series):
        stamps = np.arange(50 + number) * 60_000
        await store.candles.write(name, CandleSeries(stamps, *(stamps / 7 for _ in COLUMNS[1:])))
    path = "candle/e/S0/1m/1970-01.candles"
    sound, other = ((tmp_path / f"candle/e/S{number}/1m/1970-01.candles").read_bytes() for number in range(2))
    kept = tmp_path / "quarantine" / path
    for number in range(size(200, 1_000)):
        data = chance.choice(MUTATIONS)(sound, other, chance)
        if data == sound:
            continue
        (tmp_path / path).unlink(missing_ok=True)  # a new file, as a reader knows one by its inode
        (tmp_path / path).write_bytes(data)
        for _ in range(2):
            with pytest.raises(Damaged):
                await store.candles.read(series[0], 0, 1 << 40)
        assert kept.read_bytes() == data, number
        await store.drop(path)
    await store.close()


async def test_hundreds_of_damaged_journals(tmp_path: Path, chance: random.Random) -> None:
    """The opening never fails over one; every record is one that was written; a bad line is kept as evidence."""
    written: dict[str, set[object]] = {name: set() for name in "AB"}
    files: list[bytes] = []
    for place in ("one", "two"):
        store = FileStore(tmp_path / place, disk=Disk(FaultFS(sync=False)))
        for version in range(4):
            for name, values in written.items():
                value = f"{place}-{name}-{version}"
                values.add(value)
                await store.batch([Write(row, ("s", "e", name), value) for row in (SIGNAL, SCHEDULE)])
        (journal,) = (tmp_path / place / ".backtest-kit/journal").iterdir()
        files.append(journal.read_bytes())
        await store.close()
    sound, other = files
    for number in range(size(100, 500)):
        root = tmp_path / str(number)
        (root / ".backtest-kit/journal").mkdir(parents=True)
        data = chance.choice(MUTATIONS)(sound, other, chance)
        journal = root / ".backtest-kit/journal/1.journal"
        journal.write_bytes(data)
        store = FileStore(root, disk=Disk(FaultFS(sync=False)))
        for name, values in written.items():
            found = [await store.get(row, ("s", "e", name)) for row in (SIGNAL, SCHEDULE)]
            values_found = {record and record.value for record in found}
            assert len(values_found) == 1, (number, found)
            assert values_found <= {None, *values}
            if data == sound:
                assert values_found == {f"one-{name}-3"}
        kept = Path(f"{journal}.damaged")
        assert not journal.exists()
        assert not kept.exists() or kept.read_bytes() == data
        whole = data.endswith(b"\n") and all(line in sound + other for line in written_lines(data))
        if b"\n" in data.rstrip(b"\n") and not whole and data.endswith(b"\n"):
            assert kept.exists(), number
        await store.close()


async def test_hundreds_of_damaged_lines(tmp_path: Path, chance: random.Random) -> None:
    """Log: no read has another value, or nothing; the bytes stay in the log or in quarantine."""
    store = FileStore(tmp_path, disk=Disk(FaultFS(sync=False)))
    for name in ("first", "middle", "last"):
        await store.put(Write(LOG, (name,), f"the {name} one"))
    await store.close()
    (log,) = (tmp_path / "log").iterdir()
    first, middle, last = log.read_bytes().splitlines(keepends=True)
    for number in range(size(200, 1_000)):
        line = chance.choice((flip, blank, insert, cut))(middle[:-1], last, chance)
        if not line or line.isspace() or line == middle[:-1]:
            continue
        if has_lost_blocks(line + b"\n", len(first)):
            continue  # as it would be if it had never been durable
        root = tmp_path / str(number)
        (root / "log").mkdir(parents=True)
        (root / "log" / log.name).write_bytes(first + line + b"\n" + last)
        store = FileStore(root, disk=Disk(FaultFS(sync=False)))
        for _ in range(2):
            with pytest.raises(Damaged):
                await store.get(LOG, ("middle",))
            with pytest.raises(Damaged):
                [record async for record in store.scan(LOG)]
        evidence = [path.read_bytes() for path in root.rglob("*") if path.is_file()]
        assert any(line.rstrip() in data for data in evidence), number
        await store.close()
