"""Feeds in append-only segments."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist.backends import file_feed
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import Write
from backtest_kit.persist.testing.faults import FaultFS

LOG, STORAGE = CONTRACTS["log"], CONTRACTS["storage"]
FIRST, LIVE = "log/00000001.jsonl", "storage/live/00000001.jsonl"


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_feed, "SEGMENT_BYTES", 1000)


def quick(root: Path) -> FileStore:
    return FileStore(root, disk=Disk(FaultFS(sync=False)))


async def log(store: FileStore, *names: str) -> None:
    await asyncio.gather(*(store.put(Write(LOG, (name,), {"text": name})) for name in names))


async def entries(store: FileStore, *, newest_first: bool = False) -> list[str]:
    return [str(record.key[0]) async for record in store.scan(LOG, newest_first=newest_first)]


async def beside_damage(store: FileStore, contract: Contract = LOG, *, newest_first: bool = False) -> list[object]:
    """The last components of what a listing has before it tells of damage, which it has to."""
    found: list[object] = []

    async def read() -> None:
        async for record in store.scan(contract, newest_first=newest_first):
            found.append(record.key[-1])  # noqa: PERF401  (a comprehension would lose them)

    with pytest.raises(Damaged, match="blocked"):
        await read()
    return found


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


async def test_every_listing_tells_of_a_torn_middle_and_has_the_rest(tmp_path: Path) -> None:
    store = quick(tmp_path)
    await log(store, "a", "b", "c")
    await store.close()
    path = tmp_path / FIRST
    line = path.read_bytes().split(b"\n")[1] + b"\n"
    path.write_bytes(path.read_bytes().replace(b'"text":"b"', b'"text":"x"'))
    store = quick(tmp_path)
    with pytest.raises(Damaged, match="checksum"):
        await entries(store)
    for _ in range(2):
        assert await beside_damage(store) == ["a", "c"]
        assert await beside_damage(store, newest_first=True) == ["c", "a"]
    assert [record.key[0] async for record in store.scan(LOG, newest_first=True, limit=2)] == ["c", "a"]
    with pytest.raises(Damaged, match="blocked"):
        await store.get(LOG, ("b",))
    with pytest.raises(Damaged, match="blocked"):
        await store.put(Write(LOG, ("b",), "again"))
    (item,) = await store.quarantined()
    assert (tmp_path / "quarantine" / item.path).read_bytes() == line.replace(b'"text":"b"', b'"text":"x"')
    assert item.key == ["b"]
    await store.close()
    again = quick(tmp_path)
    assert await beside_damage(again) == ["a", "c"]
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


async def versions(root: Path) -> bytes:
    """Two versions of one key and one of another; the bytes of the feed."""
    store = quick(root)
    for name, value in (("a", "old"), ("a", "new"), ("b", "only")):
        await store.put(Write(STORAGE, (False, name), value))
    await store.close()
    return (root / LIVE).read_bytes()


async def answers(store: FileStore) -> list[object]:
    """What the store says of the two keys, and of one that was never written."""
    found: list[object] = []
    for name in "abc":
        try:
            record = await store.get(STORAGE, (False, name))
        except Damaged:
            found.append(Damaged)
        else:
            found.append(None if record is None else record.value)
    return found


async def test_line_whose_json_is_broken_blocks_its_key(tmp_path: Path) -> None:
    whole = await versions(tmp_path)
    lines = whole.splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"key":', b'"key"?')
    (tmp_path / LIVE).write_bytes(b"".join(lines))
    store = quick(tmp_path)
    assert await answers(store) == [Damaged, "only", None]
    for expect in ("any", "absent"):
        with pytest.raises(Damaged, match="blocked"):
            await store.put(Write(STORAGE, (False, "a"), "another", expect=expect))
    assert await beside_damage(store, STORAGE) == ["b"]
    (item,) = await store.quarantined()
    kept = tmp_path / "quarantine" / item.path
    kept.write_bytes(kept.read_bytes().replace(b'"key"?', b'"key":'))
    assert (await store.restore(item.path)) == await store.get(STORAGE, (False, "a"))
    assert await answers(store) == ["new", "only", None]
    await store.close()


async def test_line_of_which_nothing_can_be_read_blocks_the_feed(tmp_path: Path) -> None:
    whole = await versions(tmp_path)
    lines = whole.split(b"\n")
    lines[1] = b"\xff" * len(lines[1])
    (tmp_path / LIVE).write_bytes(b"\n".join(lines))
    for _ in range(2):
        store = quick(tmp_path)
        assert await answers(store) == [Damaged] * 3
        with pytest.raises(Damaged, match="whole feed"):
            await store.put(Write(STORAGE, (False, "c"), 1))
        for _ in range(2):
            with pytest.raises(Damaged, match="whole feed"):
                [record async for record in store.scan(STORAGE)]
        await store.put(Write(STORAGE, (True, "c"), "in another feed"))
        await store.close()
    (item,) = await store.quarantined()
    assert item.key == []
    await store.drop(item.path)
    assert await answers(store) == ["old", "only", None]
    await store.close()


async def test_no_changed_byte_makes_an_old_record_current(tmp_path: Path) -> None:
    whole = await versions(tmp_path)
    for position in sorted({*range(0, len(whole), 9), *(at for at, byte in enumerate(whole) if byte == 10)}):
        for byte in b"\n\0":
            if whole[position] == byte:
                continue
            root = tmp_path / f"{position}-{byte}"
            (root / LIVE).parent.mkdir(parents=True)
            (root / LIVE).write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
            store = quick(root)
            a, b, _ = await answers(store)
            assert (a in ("new", Damaged), b in ("only", Damaged)) == (True, True), (position, byte)
            assert Damaged in (a, b)
            await store.close()


async def test_line_that_another_process_has_put_aside_stays_there(tmp_path: Path) -> None:
    one, two = quick(tmp_path), quick(tmp_path)
    await log(one, "a", "b", "c")
    path = tmp_path / FIRST
    damaged = path.read_bytes().replace(b'"text":"b"', b'"text":"x"')
    path.write_bytes(damaged)
    for store in (two, one, one, two, quick(tmp_path)):
        with pytest.raises(Damaged, match="blocked"):
            await store.get(LOG, ("b",))
        (item,) = await one.quarantined()
        assert (tmp_path / "quarantine" / item.path).read_bytes() == damaged.splitlines(keepends=True)[1]
        assert item.key == ["b"]
        assert await beside_damage(store) == ["a", "c"]
    await two.drop(item.path)
    assert await one.get(LOG, ("b",)) is None
    assert await entries(one) == await entries(two) == ["a", "c"]
    for store in (one, two):
        await store.close()


async def test_every_torn_end_is_kept(tmp_path: Path) -> None:
    store = quick(tmp_path)
    await log(store, "a")
    for torn in (b"0123", b"4567", b"4567", b"89"):
        await store.close()
        with (tmp_path / FIRST).open("ab") as file:
            file.write(torn)
        assert await entries(store) == ["a"]
    kept = {(tmp_path / "quarantine" / item.path).read_bytes() for item in await store.quarantined()}
    assert kept == {b"0123", b"4567", b"89"}
    for item in await store.quarantined():
        with pytest.raises(UserError, match="evidence"):
            await store.restore(item.path)
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
    assert await beside_damage(store) == [name for name in names if name != "entry-1"]
    await store.close()


async def test_listings_tell_of_damage_that_comes_after_they_have_looked(tmp_path: Path) -> None:
    one, two = quick(tmp_path), quick(tmp_path)
    await log(one, "a", "b", "c")
    for store in (one, two):
        assert await entries(store) == ["a", "b", "c"]
    path = tmp_path / FIRST
    path.write_bytes(path.read_bytes().replace(b'"text":"b"', b'"text":"x"'))
    for store in (two, one):
        assert await beside_damage(store) == ["a"]  # it is told where it is met
        assert await beside_damage(store) == ["a", "c"]
    for store in (one, two):
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
