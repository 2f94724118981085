"""Feeds in append-only segments."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from backtest_kit.errors import Damaged
from backtest_kit.persist.backends import file_feed
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import Write
from backtest_kit.persist.testing.faults import FaultFS

LOG, STORAGE = CONTRACTS["log"], CONTRACTS["storage"]
FIRST = "log/00000001.jsonl"


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_feed, "SEGMENT_BYTES", 1000)


def quick(root: Path) -> FileStore:
    return FileStore(root, disk=Disk(FaultFS(sync=False)))


async def log(store: FileStore, *names: str) -> None:
    await asyncio.gather(*(store.put(Write(LOG, (name,), {"text": name})) for name in names))


async def entries(store: FileStore, *, newest_first: bool = False) -> list[str]:
    return [str(record.key[0]) async for record in store.scan(LOG, newest_first=newest_first)]


def segments(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.jsonl"))


async def test_torn_end_is_cut_off_and_no_damage(tmp_path: Path) -> None:
    store = quick(tmp_path)
    await log(store, "a", "b")
    await store.close()
    whole = (tmp_path / FIRST).read_bytes()
    for torn in (b"0", whole[:-1], whole[: len(whole) // 2 + 20], b"\0" * 500):
        (tmp_path / FIRST).write_bytes(
            whole + torn[whole.rfind(b"\n", 0, -1) + 1 :] if torn[:8] == whole[:8] else whole + torn
        )
        store = quick(tmp_path)
        assert await entries(store) == ["a", "b"]
        assert (tmp_path / FIRST).read_bytes() == whole
        await store.close()
    store = quick(tmp_path)
    await log(store, "c")
    assert await entries(store) == ["a", "b", "c"]
    assert all(not item.blocks for item in await store.quarantined())
    await store.close()


async def test_torn_middle_is_told_once_and_the_rest_is_read(tmp_path: Path) -> None:
    store = quick(tmp_path)
    await log(store, "a", "b", "c")
    await store.close()
    path = tmp_path / FIRST
    line = path.read_bytes().split(b"\n")[1] + b"\n"
    path.write_bytes(path.read_bytes().replace(b'"text":"b"', b'"text":"x"'))
    store = quick(tmp_path)
    with pytest.raises(Damaged, match="checksum"):
        await entries(store)
    assert await entries(store) == ["a", "c"]
    with pytest.raises(Damaged, match="blocked"):
        await store.get(LOG, ("b",))
    with pytest.raises(Damaged, match="blocked"):
        await store.put(Write(LOG, ("b",), "again"))
    (item,) = await store.quarantined()
    assert (tmp_path / "quarantine" / item.path).read_bytes() == line.replace(b'"text":"b"', b'"text":"x"')
    assert item.key == ["b"]
    await store.close()
    again = quick(tmp_path)
    assert await entries(again) == ["a", "c"]
    with pytest.raises(Damaged):
        await again.get(LOG, ("b",))
    restored = await again.restore(item.path)
    assert restored is not None
    assert (restored.value, restored.rev) == ({"text": "x"}, 2)
    assert await entries(again) == ["a", "c", "b"]
    assert await again.check() == []
    await again.close()


async def test_dropped_line_frees_its_key(tmp_path: Path) -> None:
    store = quick(tmp_path)
    await log(store, "a", "b")
    path = tmp_path / FIRST
    path.write_bytes(path.read_bytes().replace(b'"text":"b"', b'"text":"x"'))
    with pytest.raises(Damaged):
        await store.get(LOG, ("b",))
    (item,) = await store.quarantined()
    await store.drop(item.path)
    assert await store.get(LOG, ("b",)) is None
    await log(store, "b")
    assert await entries(store) == ["a", "b"]
    await store.close()


async def test_line_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    store = quick(tmp_path)
    await log(store, "a", "b", "c")
    await store.close()
    path = tmp_path / FIRST
    lines = path.read_bytes().split(b"\n")
    lines[1] = b"\xff" * len(lines[1])
    path.write_bytes(b"\n".join(lines))
    store = quick(tmp_path)
    with pytest.raises(Damaged):
        await entries(store)
    assert await entries(store) == ["a", "c"]
    assert await store.get(LOG, ("a",)) is not None
    await store.close()


@pytest.mark.usefixtures("small_segments")
async def test_many_segments(tmp_path: Path) -> None:
    names = [f"entry-{number}" for number in range(100)]
    store = quick(tmp_path)
    for low in range(0, 100, 5):
        await log(store, *names[low : low + 5])
    assert len(segments(tmp_path / "log")) >= 10
    for again in (store, quick(tmp_path)):
        assert await entries(again) == names
        assert await entries(again, newest_first=True) == names[::-1]
        for name in names:
            found = await again.get(LOG, (name,))
            assert found is not None
            assert found.value == {"text": name}
        assert (await again.put(Write(LOG, (names[0],), "again"))).value == {"text": names[0]}
        await again.close()


@pytest.mark.usefixtures("small_segments")
async def test_the_last_ones_of_many_of_which_most_are_removed(tmp_path: Path) -> None:
    store = quick(tmp_path)
    ids = [f"id-{number:03d}" for number in range(200)]
    await asyncio.gather(*(store.put(Write(STORAGE, (True, name), 1)) for name in ids))
    await asyncio.gather(*(store.put(Write(STORAGE, (True, name), 2, removed=True)) for name in ids[5:]))
    found = [record.key[1] async for record in store.scan(STORAGE, (True,), newest_first=True, limit=3)]
    assert found == ids[4:1:-1]
    again = store.scan(STORAGE, (True,), newest_first=True, limit=100, include_removed=True)
    assert [record.key[1] async for record in again] == ids[:99:-1]
    await store.close()


@pytest.mark.usefixtures("small_segments")
async def test_lost_or_damaged_index_is_made_again(tmp_path: Path) -> None:
    names = [f"entry-{number}" for number in range(40)]
    store = quick(tmp_path)
    for name in names:
        await log(store, name)
    await store.close()
    indexes = sorted((tmp_path / "log").glob("*.index"))
    indexes[0].unlink()
    indexes[1].write_bytes(b"")
    indexes[2].write_bytes(indexes[2].read_bytes()[:-1] + b"?")
    indexes[3].write_bytes(indexes[4].read_bytes())
    store = quick(tmp_path)
    assert await entries(store) == names
    await store.close()


@pytest.mark.usefixtures("small_segments")
async def test_damage_in_a_full_segment_is_found_when_the_line_is_read(tmp_path: Path) -> None:
    names = [f"entry-{number}" for number in range(40)]
    store = quick(tmp_path)
    for name in names:
        await log(store, name)
    await store.close()
    path = tmp_path / FIRST
    path.write_bytes(path.read_bytes().replace(b'"text":"entry-1"', b'"text":"Entry-1"'))
    store = quick(tmp_path)
    with pytest.raises(Damaged):
        await store.get(LOG, ("entry-1",))
    with pytest.raises(Damaged, match="blocked"):
        await store.get(LOG, ("entry-1",))
    assert await entries(store) == [name for name in names if name != "entry-1"]
    await store.close()


@pytest.mark.usefixtures("small_segments")
async def test_garbage_is_compacted(tmp_path: Path) -> None:
    store, other = quick(tmp_path), quick(tmp_path)
    ids = [f"id-{number}" for number in range(8)]
    for version in range(60):
        await asyncio.gather(*(store.put(Write(STORAGE, (True, name), version)) for name in ids))
        if version % 7 == 0:
            assert [record.value async for record in other.scan(STORAGE)] == [version] * 8
    await asyncio.sleep(0.2)
    directory = tmp_path / "storage/backtest"
    assert sum(path.stat().st_size for path in directory.glob("*.jsonl")) < 12_000
    assert any("-" in name for name in segments(directory))
    for again in (store, other, quick(tmp_path)):
        found = [(record.key[1], record.value, record.rev) async for record in again.scan(STORAGE)]
        assert found == [(name, 59, 60) for name in ids]
        assert (await again.check()) == []
        await again.close()


@pytest.mark.usefixtures("small_segments")
async def test_segments_that_a_merged_one_covers_are_leftovers(tmp_path: Path) -> None:
    store = quick(tmp_path)
    for version in range(30):
        await asyncio.gather(*(store.put(Write(STORAGE, (True, f"id-{n}"), version)) for n in range(4)))
    await asyncio.sleep(0.2)
    await store.close()
    directory = tmp_path / "storage/backtest"
    (merged,) = [name for name in segments(directory) if "-" in name][:1]
    leftover = directory / f"{merged[:8]}.jsonl"
    leftover.write_bytes((directory / merged).read_bytes())
    store = quick(tmp_path)
    assert [record.value async for record in store.scan(STORAGE)] == [29] * 4
    assert not leftover.exists()
    await store.close()


@pytest.mark.usefixtures("small_segments")
async def test_two_stores_append_to_one_feed(tmp_path: Path) -> None:
    stores = [quick(tmp_path) for _ in range(3)]
    for number in range(60):
        await log(stores[number % 3], f"entry-{number}")
    names = [f"entry-{number}" for number in range(60)]
    for store in stores:
        assert await entries(store) == names
    await asyncio.gather(*(log(store, *(f"{number}-{at}" for number in range(40))) for at, store in enumerate(stores)))
    for store in stores:
        found = await entries(store)
        assert len(found) == len(set(found)) == 180
        await store.close()


async def test_feeds_of_two_modes_are_listed_in_order_of_writing(tmp_path: Path) -> None:
    store = quick(tmp_path)
    for number in range(20):
        await store.put(Write(STORAGE, (number % 3 == 0, f"id-{number}"), number))
    assert [record.value async for record in store.scan(STORAGE)] == list(range(20))
    await store.close()


async def test_full_disk_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    faults = FaultFS(sync=False)
    store = FileStore(tmp_path, disk=Disk(faults))
    await log(store, "a")
    before = (tmp_path / FIRST).read_bytes()
    faults.write_limit = 10
    faults.inject("write", 28, nth=3)
    with pytest.raises(Exception, match="free some space"):
        await log(store, "b")
    faults.heal()
    assert (tmp_path / FIRST).read_bytes() == before
    await log(store, "b")
    assert await entries(store) == ["a", "b"]
    await store.close()
