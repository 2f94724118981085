"""Long feeds: memory that does not grow with them, listings that read no more than they show, forgetting in parts."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.records.stores import SHARED
from tests.samples import sample

import backtest_kit as bk
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import Store, Write
from backtest_kit.persist.testing.faults import FaultFS
from backtest_kit.persist.urls import store_at
from backtest_kit.records.log import LogLine, line_of

LOG, STORAGE = CONTRACTS["log"], CONTRACTS["storage"]
PART = 500
FEW, MANY = 3_000, 9_000
BYTES_OF_A_LINE = 24
"""What a line may cost in memory, of the 16 that a listing keeps of it in a store that numbers its rows."""


def line(number: int) -> Write:
    said = LogLine(entry_id=f"{number:09d}", level="info", message="volume is thin", mode="live", said_at_ms=number)
    return Write(
        LOG,
        (said.entry_id,),
        {"entryId": said.entry_id, "level": "info", "message": said.message, "mode": "live", "saidAtMs": number},
    )


async def say(store: Store, start: int, stop: int) -> None:
    for first in range(start, stop, PART):
        done = await store.put_each([line(number) for number in range(first, min(first + PART, stop))])
        assert [each for each in done if isinstance(each, BaseException)] == []


async def growth(work: Callable[[], Awaitable[None]]) -> int:
    """Bytes that are in use after `work` more than before it."""
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    await work()
    gc.collect()
    return tracemalloc.get_traced_memory()[0] - before


@pytest.mark.sampled
@pytest.mark.parametrize("address", sample(SHARED.values(), 1, "memory of feeds"))
async def test_memory_does_not_grow_with_the_lines(tmp_path: Path, address: str) -> None:
    store = store_at(address.format(place=tmp_path))
    tracemalloc.start()
    try:
        await say(store, 0, FEW)
        grown = await growth(lambda: say(store, FEW, MANY))
        assert grown < BYTES_OF_A_LINE * (MANY - FEW)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        count = 0
        async for record in store.scan(LOG):
            assert line_of(record).entry_id == f"{count:09d}"
            count += 1
        assert count == MANY
        # The chunks that a listing reads are the same for any feed: a thousand records of some kilobytes.
        assert tracemalloc.get_traced_memory()[1] - before < 8 << 20
    finally:
        tracemalloc.stop()
        await store.close()


class Counted:
    """The calls of the operating system, with the number of bytes that were read."""

    def __init__(self) -> None:
        self._calls = FaultFS(sync=False)
        self.read_bytes = 0

    def read(self, fd: int, length: int) -> bytes:
        data = bytes(self._calls.read(fd, length))
        self.read_bytes += len(data)
        return data

    def __getattr__(self, name: str) -> object:
        return getattr(self._calls, name)


async def test_the_last_lines_are_listed_without_a_look_at_the_older_ones(tmp_path: Path) -> None:
    store = FileStore(tmp_path, disk=Disk(FaultFS(sync=False)))
    await say(store, 0, MANY)
    await store.close()
    (log,) = (tmp_path / "log").iterdir()
    assert log.stat().st_size > 3 * 600_000
    calls = Counted()
    again = FileStore(tmp_path, disk=Disk(calls))  # type: ignore[arg-type]
    found = [line_of(record).entry_id async for record in again.scan(LOG, newest_first=True, limit=50)]
    assert found == [f"{number:09d}" for number in range(MANY - 1, MANY - 51, -1)]
    assert calls.read_bytes < 600_000
    await again.close()


async def test_writes_of_one_go_have_outcomes_of_their_own(tmp_path: Path, shared_address: str) -> None:
    store = store_at(shared_address.format(place=tmp_path))
    await store.put(Write(STORAGE, (False, "taken"), 1))
    done = await store.put_each(
        [
            Write(STORAGE, (False, "a"), 1),
            Write(STORAGE, (False, "taken"), 2, expect="absent"),
            Write(STORAGE, (False, "a"), 2),
            line(1),
        ],
    )
    assert [each.rev if not isinstance(each, BaseException) else type(each) for each in done] == [1, bk.Conflict, 2, 1]
    assert [record.value async for record in store.scan(STORAGE)] == [1, 2]
    assert await store.put_each([]) == []
    await store.close()


async def test_new_records_of_one_go_stay_in_order_around_what_was_there(tmp_path: Path, shared_address: str) -> None:
    store = store_at(shared_address.format(place=tmp_path))
    await store.put(line(3))
    await store.put(Write(STORAGE, (False, "b"), "old"))
    assert await store.put_each([line(number) for number in (1, 2, 3, 4, 5, 4)]) == [
        record for name in "123454" async for record in store.scan(LOG) if record.key == (f"{name:0>9}",)
    ]
    assert [record.key[0] async for record in store.scan(LOG)] == [f"{number:09d}" for number in (3, 1, 2, 4, 5)]
    names = ("a", "b", "c", "c", "d")
    done = await store.put_each([Write(STORAGE, (False, name), name, expect="absent") for name in names])
    assert [None if isinstance(each, BaseException) else each.rev for each in done] == [1, None, 1, None, 1]
    assert {type(each) for each in done if isinstance(each, BaseException)} == {bk.Conflict}
    assert [record.value async for record in store.scan(STORAGE)] == ["old", "a", "c", "d"]
    too_large = Write(STORAGE, (False, "large"), "x" * (17 << 20), expect="absent")
    around = [Write(STORAGE, (False, name), name, expect="absent") for name in ("e", "f")]
    done = await store.put_each([around[0], too_large, around[1]])
    assert [isinstance(each, BaseException) for each in (done[0], done[2])] == [False, False]
    assert [await store.get(STORAGE, (False, name)) is not None for name in "ef"] == [True, True]
    await store.close()
