"""The log of a file store: lines by day, read from the end, forgotten in parts, damaged in the middle."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from backtest_kit.errors import Damaged, OutOfSpace, UserError
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import Write
from backtest_kit.persist.testing.faults import FaultFS

LOG = CONTRACTS["log"]
DAY = 86_400


def quick(root: Path) -> FileStore:
    return FileStore(root, disk=Disk(FaultFS(sync=False)))


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[FileStore]:
    store = quick(tmp_path)
    yield store
    await store.close()


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The wall clock in seconds, for tests to set."""
    clock = [1_700_000_000.0]  # 2023-11-14
    real = time.gmtime
    monkeypatch.setattr(time, "gmtime", lambda seconds=None: real(clock[0] if seconds is None else seconds))
    return clock


async def say(store: FileStore, *names: str) -> None:
    await asyncio.gather(*(store.put(Write(LOG, (name,), {"text": name})) for name in names))


async def entries(store: FileStore, *, newest_first: bool = False) -> list[str]:
    return [str(record.key[0]) async for record in store.scan(LOG, newest_first=newest_first)]


async def beside_damage(store: FileStore, *, newest_first: bool = False) -> list[str]:
    """What a listing has before it reports damage, which it has to."""
    found: list[str] = []

    async def read() -> None:
        async for record in store.scan(LOG, newest_first=newest_first):
            found.append(str(record.key[0]))  # noqa: PERF401  (a comprehension would lose them)

    with pytest.raises(Damaged, match="quarantine"):
        await read()
    return found


def file_of(root: Path) -> Path:
    (file,) = (root / "log").glob("*.jsonl")
    return file


def change(file: Path, before: bytes, after: bytes) -> bytes:
    """Change the bytes of a line; returns the line as it is now."""
    data = file.read_bytes()
    assert data.count(before) == 1
    file.write_bytes(data.replace(before, after))
    (line,) = (line for line in file.read_bytes().splitlines(keepends=True) if after in line)
    return line


async def test_every_line_is_json(store: FileStore, tmp_path: Path) -> None:
    await say(store, "a", "b\nc")
    lines = [json.loads(line) for line in file_of(tmp_path).read_bytes().splitlines()]
    assert [(line["key"], line["value"]) for line in lines] == [
        ({"entryId": name}, {"text": name}) for name in ("a", "b\nc")
    ]


async def test_a_day_has_a_file(store: FileStore, tmp_path: Path, today: list[float]) -> None:
    for number in range(4):
        await say(store, f"{number}-a", f"{number}-b")
        today[0] += DAY
    days = [f"2023-11-{day}.jsonl" for day in (14, 15, 16, 17)]
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == days
    names = [f"{number}-{name}" for number in range(4) for name in "ab"]
    for again in (store, quick(tmp_path)):
        assert await entries(again) == names
        assert await entries(again, newest_first=True) == names[::-1]
        assert await again.count(LOG) == 8
        for name in names:
            found = await again.get(LOG, (name,))
            assert found is not None
            assert found.value == {"text": name}
        await again.close()


async def test_a_clock_that_is_set_back_keeps_the_order(store: FileStore, tmp_path: Path, today: list[float]) -> None:
    await say(store, "a")
    today[0] -= 3 * DAY
    await say(store, "b")
    await store.close()
    await say(quick(tmp_path), "c")
    assert await entries(store) == ["a", "b", "c"]


async def test_a_restored_backup_goes_on_in_order(store: FileStore, tmp_path: Path) -> None:
    """Whatever the times of its files say: the order is that of the lines."""
    await say(store, "a", "b")
    await store.close()
    copy = tmp_path / "copy"
    for file in [path for path in tmp_path.rglob("*") if path.is_file()]:
        target = copy / file.relative_to(tmp_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    again = quick(copy)
    await say(again, "c")
    assert await entries(again) == ["a", "b", "c"]
    assert await entries(again, newest_first=True) == ["c", "b", "a"]
    await again.close()


async def test_long_lines_and_many_of_them(store: FileStore) -> None:
    names = [f"{number:04d}" for number in range(300)]
    values = {name: name * (1 + int(name) ** 3 % 20_011) for name in names}
    for name in names:
        await store.put(Write(LOG, (name,), values[name]))
    found = [(record.key[0], record.value) async for record in store.scan(LOG)]
    assert found == list(values.items())
    assert [record.key[0] async for record in store.scan(LOG, newest_first=True)] == names[::-1]
    assert [record.key[0] async for record in store.scan(LOG, newest_first=True, limit=2)] == ["0299", "0298"]


async def test_a_line_that_is_written_again_after_a_cancellation_is_there_once(store: FileStore) -> None:
    for steps in range(20):
        name = f"line-{steps}"
        writing = asyncio.ensure_future(store.put(Write(LOG, (name,), 1)))
        await asyncio.sleep(steps * 0.00005)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await store.put(Write(LOG, (name,), 1))
    assert await entries(store) == [f"line-{steps}" for steps in range(20)]


async def test_two_stores_write_one_log(tmp_path: Path) -> None:
    stores = [quick(tmp_path) for _ in range(3)]
    names = [f"entry-{number}" for number in range(60)]
    for number, name in enumerate(names):
        await say(stores[number % 3], name)
    for each in stores:
        assert await entries(each) == names
        await each.close()


@pytest.mark.parametrize("torn", [b"{", b'{"contract":"log"', b"\0" * 500])
async def test_a_torn_end_is_cut_off_and_kept(tmp_path: Path, torn: bytes) -> None:
    store = quick(tmp_path)
    await say(store, "a", "b")
    await store.close()
    whole = file_of(tmp_path).read_bytes()
    file_of(tmp_path).write_bytes(whole + torn)
    (finding,) = await store.check()
    assert not finding.blocks
    assert await entries(store) == ["a", "b"]
    assert await entries(store, newest_first=True) == ["b", "a"]
    await say(store, "c")
    assert file_of(tmp_path).read_bytes().startswith(whole)
    assert await entries(store) == ["a", "b", "c"]
    (item,) = await store.quarantined()
    assert (item.blocks, (tmp_path / "quarantine" / item.path).read_bytes()) == (False, torn)
    with pytest.raises(UserError, match="evidence"):
        await store.restore(item.path)
    await store.close()


async def test_every_listing_reports_a_damaged_line_and_has_the_rest(store: FileStore, tmp_path: Path) -> None:
    await say(store, "a", "b", "c")
    await store.close()
    line = change(file_of(tmp_path), b'"text":"b"', b'"text":"x"')
    for again in (store, quick(tmp_path)):
        for _ in range(2):
            assert await beside_damage(again) == ["a", "c"]
            assert await beside_damage(again, newest_first=True) == ["c", "a"]
        assert [record.key[0] async for record in again.scan(LOG, newest_first=True, limit=2)] == ["c", "a"]
        with pytest.raises(Damaged, match="quarantine restore"):
            await again.get(LOG, ("b",))
        found = await again.get(LOG, ("c",))
        assert found is not None
    (item,) = await store.quarantined()
    assert (item.key, (tmp_path / "quarantine" / item.path).read_bytes()) == (["b"], line)
    await say(store, "d")  # a log is written on, whatever was damaged in it
    restored = await store.restore(item.path)
    assert restored is not None
    assert (restored.value, restored.rev) == ({"text": "x"}, 2)
    assert await entries(store) == ["a", "c", "d", "b"]
    assert await store.check() == []
    await again.close()


async def test_a_dropped_line_is_gone(store: FileStore, tmp_path: Path) -> None:
    await say(store, "a", "b")
    change(file_of(tmp_path), b'"text":"b"', b'"text":"x"')
    with pytest.raises(Damaged):
        await store.get(LOG, ("b",))
    (item,) = await store.quarantined()
    await store.drop(item.path)
    assert await store.get(LOG, ("b",)) is None
    assert await entries(store) == ["a"]
    assert await store.check() == []


@pytest.mark.parametrize("damage", [b'{"entryId":"x"}', b"\xff" * 15], ids=["another key", "none"])
async def test_a_damaged_line_may_be_of_any_key(store: FileStore, tmp_path: Path, damage: bytes) -> None:
    await say(store, "a", "b", "c")
    change(file_of(tmp_path), b'{"entryId":"b"}', damage)
    for name in ("b", "never written"):
        with pytest.raises(Damaged):
            await store.get(LOG, (name,))
    assert await store.get(LOG, ("a",)) is not None
    (item,) = await store.quarantined()
    await store.drop(item.path)
    for name in ("b", "never written"):
        assert await store.get(LOG, (name,)) is None


async def test_no_changed_byte_hides_a_line(tmp_path: Path) -> None:
    """But the last one, whose write looks cut short then."""
    store = quick(tmp_path)
    await say(store, "a", "b", "last")
    await store.close()
    file = file_of(tmp_path)
    whole = file.read_bytes()
    newlines = [at for at, byte in enumerate(whole[:-1]) if byte == 10]
    for position in {*range(0, newlines[-1], 9), *newlines}:
        for byte in b"\n\0 ":
            if whole[position] == byte:
                continue
            root = tmp_path / f"{position}-{byte}"
            (root / "log").mkdir(parents=True)
            (root / "log" / file.name).write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
            store = quick(root)
            found: list[object] = []
            for name in ("a", "b"):
                try:
                    record = await store.get(LOG, (name,))
                except Damaged:
                    found.append(Damaged)
                else:
                    found.append(record and record.value)
            assert found in ([{"text": "a"}, Damaged], [Damaged, {"text": "b"}], [Damaged, Damaged]), (position, byte)
            await store.close()


async def test_damage_that_two_processes_find_is_put_aside_once(tmp_path: Path) -> None:
    one, two = quick(tmp_path), quick(tmp_path)
    await say(one, "a", "b", "c")
    change(file_of(tmp_path), b'"text":"b"', b'"text":"x"')
    for found in await asyncio.gather(*(beside_damage(each) for each in (one, two, one, two))):
        assert found == ["a", "c"]
    assert len(await one.quarantined()) == 1
    for each in (one, two):
        await each.close()


async def test_forgetting_removes_whole_days_and_lines(store: FileStore, tmp_path: Path, today: list[float]) -> None:
    for number in range(3):
        await say(store, f"{number}-a", f"{number}-b")
        today[0] += DAY
    assert await store.prune(LOG, {(name,): 1 for name in ("0-a", "0-b", "1-a", "unknown")}) == 3
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["2023-11-15.jsonl", "2023-11-16.jsonl"]
    assert await entries(store) == ["1-b", "2-a", "2-b"]
    await say(store, "3-a")
    assert await entries(quick(tmp_path)) == ["1-b", "2-a", "2-b", "3-a"]
    assert await store.prune(LOG, {(name,): 1 for name in ("1-b", "2-a", "2-b", "3-a")}) == 4
    assert list((tmp_path / "log").iterdir()) == []


async def test_forgetting_keeps_what_is_torn_or_damaged(store: FileStore, tmp_path: Path) -> None:
    await say(store, "a", "b", "c")
    line = change(file_of(tmp_path), b'"text":"b"', b'"text":"x"')
    with file_of(tmp_path).open("ab") as file:
        file.write(b"torn")
    assert await store.prune(LOG, {("a",): 1, ("b",): 1}) == 1
    assert file_of(tmp_path).read_bytes().startswith(line)
    assert await beside_damage(store) == ["c"]
    kept = {(tmp_path / "quarantine" / item.path).read_bytes() for item in await store.quarantined()}
    assert kept == {b"torn", line}


@pytest.mark.parametrize("newest_first", [False, True])
async def test_a_listing_goes_on_while_lines_are_forgotten_and_written(tmp_path: Path, newest_first: bool) -> None:
    one, two = quick(tmp_path), quick(tmp_path)
    names = [f"{number:04d}" for number in range(400)]
    for low in range(0, 400, 100):
        await say(one, *names[low : low + 100])
    found: list[str] = []
    async for record in one.scan(LOG, newest_first=newest_first):
        found.append(str(record.key[0]))
        if len(found) == 80:
            assert await two.prune(LOG, {(name,): 1 for name in names[::2]}) == 200
            await say(two, "later")
    assert found == sorted(found, reverse=newest_first)
    assert {*names[1::2]} <= {*found}
    assert await entries(one) == [*names[1::2], "later"]
    for each in (one, two):
        await each.close()


@pytest.mark.parametrize("call", ["write", "fstat", "lseek", "open"])
async def test_a_write_that_fails_leaves_nothing(tmp_path: Path, call: str) -> None:
    faults = FaultFS()
    store = FileStore(tmp_path, disk=Disk(faults))
    await say(store, "a")
    await store.close()
    await store.open()
    before = file_of(tmp_path).read_bytes()
    faults.write_limit = 7
    faults.inject(call, errno.ENOSPC, nth=3 if call == "write" else 1, lasting=True, path="jsonl")
    with pytest.raises(OutOfSpace, match="free some space"):
        await say(store, "b")
    faults.heal()
    assert file_of(tmp_path).read_bytes() == before
    await say(store, "b")
    assert await entries(store) == ["a", "b"]
    await store.close()
    assert faults.opened == {}
