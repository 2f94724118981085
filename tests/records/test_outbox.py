"""What an outbox promises: at least once, in order, by one process at a time, and without reading everything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from tests.records.conftest import kit_on
from tests.records.happenings import observe, opened
from tests.records.receiver import Receiver, hook

import backtest_kit as bk
from backtest_kit.errors import RetryLater
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.codec import decode_as
from backtest_kit.persist.contracts import DELIVERY, Contract
from backtest_kit.persist.migration import migrate_store
from backtest_kit.persist.retention import DAY_MS, compact, retention_of
from backtest_kit.persist.store import Capability, Key, Record, Store, Write
from backtest_kit.persist.urls import store_at
from backtest_kit.persist.wrapper import AdapterStore
from backtest_kit.persist.writing import now_ms
from backtest_kit.records.notification import NOTIFICATION, notification_writes
from backtest_kit.records.outbox import CHUNK, LOOKBACK, SETTLE_S, Mark, Outbox, Pending
from backtest_kit.seams import Seams
from backtest_kit.settings import Settings

TTL_S = 20.0


class Elapsed(Seams):
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def elapsed(self) -> float:
        return self.seconds


class SharedMemory(MemoryStore):
    """One store that several outboxes take for that of several processes."""

    def __init__(self) -> None:
        super().__init__()
        self.records_read = 0
        self.before_scan: Callable[[], Any] | None = None
        self.hidden: set[str] = set()
        """Signals whose notifications are written and not shown yet."""
        self.capabilities |= {Capability.SHARED}

    async def get(self, contract: Contract, key: Key) -> Record | None:
        self.records_read += 1
        return await super().get(contract, key)

    async def scan(self, contract: Contract, prefix: Key = (), **options: Any) -> AsyncIterator[Record]:
        if self.before_scan is not None:
            before, self.before_scan = self.before_scan, None
            await before()
        async for record in super().scan(contract, prefix, **options):
            self.records_read += 1
            if not self.hidden or signals_of([Pending(record, None)])[0] not in self.hidden:
                yield record


async def write(store: Store, *numbers: int) -> None:
    for number in numbers:
        for each in notification_writes([opened(f"s-{number}", number)]):
            await store.put(each)


def outbox(store: Store, clock: Seams | None = None, sink: str = "phone") -> Outbox:
    return Outbox(store, sink, now_ms() + 1, clock or Elapsed())


async def added(store: Store, clock: Seams | None = None) -> Outbox:
    made = outbox(store, clock)
    await made.add()
    return made


def signals_of(pending: Sequence[Pending]) -> list[str]:
    return [str(each.record.value["signalId"]) for each in pending if isinstance(each.record.value, dict)]


async def take(box: Outbox, at_most: int = 10_000) -> list[str]:
    """Hand over what waits, as a sink that takes everything."""
    got: list[str] = []
    while pending := await box.pending():
        for each in pending:
            if len(got) == at_most or not await box.claim(each, TTL_S):
                return got
            got += signals_of([each])
            await box.delivered(each)
    return got


class Processes:
    """Some processes with one store and one sink, one step at a time."""

    def __init__(self) -> None:
        self.store = SharedMemory()
        self.clock = Elapsed()
        self.boxes: dict[int, Outbox] = {}
        self.handing: dict[int, Pending] = {}
        self.written: list[str] = []
        """What is for the sink, in order."""
        self.got: list[str] = []
        self.is_added = False
        self.repeatable = 0
        """How many were cut off after they were handed over and before that was marked."""
        self._next = 0

    async def write(self, process: int) -> None:
        await write(self.store, self._next)
        if self.is_added:
            self.written.append(f"s-{self._next}")
        self._next += 1

    async def start(self, process: int) -> None:
        if process not in self.boxes:
            self.boxes[process] = await added(self.store, self.clock)
            self.is_added = True

    async def claim(self, process: int) -> None:
        if process in self.boxes and process not in self.handing:
            pending = await self.boxes[process].pending()
            if pending and await self.boxes[process].claim(pending[0], TTL_S):
                self.handing[process] = pending[0]
                self.got += signals_of(pending[:1])

    async def mark(self, process: int) -> None:
        if process in self.handing:
            await self.boxes[process].delivered(self.handing.pop(process))

    async def fail(self, process: int) -> None:
        """The sink took it, and what it answered got lost."""
        if process in self.handing:
            del self.handing[process]
            self.repeatable += 1
            await self.boxes[process].release()

    async def kill(self, process: int) -> None:
        self.repeatable += self.handing.pop(process, None) is not None
        self.boxes.pop(process, None)

    async def pause(self, process: int) -> None:
        """Every claim has lapsed, also those of processes that only were too slow."""
        for box in self.boxes.values():
            for each in (await box.pending())[:1]:
                if each.mark is not None and decode_as(Mark, each.mark.value).holder is not None:
                    await box.claim(each, TTL_S)  # sees that it lives
        self.repeatable += len(self.handing)
        self.clock.seconds += TTL_S

    async def finish(self) -> None:
        """All die; one that is started later gets the rest."""
        for process in list(self.boxes):
            await self.kill(process)
        await self.start(9)
        self.got += await take(self.boxes[9])
        self.clock.seconds += TTL_S
        self.got += await take(self.boxes[9])


STEPS = st.tuples(
    st.sampled_from(("write", "write", "start", "claim", "claim", "mark", "mark", "fail", "kill", "pause")),
    st.integers(0, 2),
)


@given(st.lists(STEPS, max_size=60))
def test_whatever_is_killed_everything_arrives_in_order_and_at_least_once(steps: list[tuple[str, int]]) -> None:
    async def run() -> None:
        processes = Processes()
        for name, process in steps:
            await getattr(processes, name)(process)
        await processes.finish()
        first = list(dict.fromkeys(processes.got))
        assert first == processes.written, "everything, in order, and nothing from before the sink was there"
        assert len(processes.got) - len(first) <= processes.repeatable, "only what was cut off comes again"
        box = await added(processes.store, processes.clock)
        assert await box.pending() == []
        await processes.write(0)
        assert signals_of(await box.pending()) == processes.written[-1:]

    asyncio.run(run())


async def test_the_claim_of_another_machine_is_watched_for_its_whole_time() -> None:
    store, clock = SharedMemory(), Elapsed()
    one, other = await added(store, clock), await added(store, clock)
    await write(store, 1)
    (mine,) = await one.pending()
    assert await one.claim(mine, TTL_S)
    for _ in range(4):
        (theirs,) = await other.pending()
        assert not await other.claim(theirs, TTL_S)
        clock.seconds += TTL_S / 4
    (theirs,) = await other.pending()
    assert await other.claim(theirs, TTL_S)
    await one.delivered(mine)  # too late: it is not taken for the mark of the other one
    assert signals_of(await one.pending()) == ["s-1"]
    await other.delivered(theirs)
    assert await one.pending() == await other.pending() == []


async def test_a_start_reads_the_newest_notifications_only() -> None:
    store = SharedMemory()
    await take(await added(store))
    await write(store, *range(1000))
    assert len(await take(await added(store))) == 1000
    store.records_read = 0
    assert await (await added(store)).pending() == []
    assert store.records_read <= 2 * (2 * LOOKBACK + 1)


async def test_what_shows_up_late_while_a_sink_is_slow_is_delivered() -> None:
    store, clock = SharedMemory(), Elapsed()
    box = await added(store, clock)
    assert await box.pending() == []
    store.hidden = {"s-1"}
    await write(store, 0, 1, 2)
    for each in await box.pending():
        assert await box.claim(each, TTL_S)
        store.hidden.clear()
        clock.seconds += SETTLE_S
        await box.delivered(each)
    assert await take(box) == ["s-1"]


async def test_what_is_forgotten_while_it_waits_is_not_delivered() -> None:
    store = SharedMemory()
    box = await added(store)
    await write(store, 0, 1)
    first = (await box.pending())[0].record
    assert await store.prune(NOTIFICATION, {first.key: first.rev}) == 1
    assert signals_of(await box.pending()) == ["s-1"]


async def test_a_process_that_waits_for_another_one_does_not_look_for_the_oldest_again_and_again() -> None:
    store, clock = SharedMemory(), Elapsed()
    one, other = await added(store, clock), await added(store, clock)
    await write(store, *range(2 * CHUNK))
    assert len(await other.pending()) == CHUNK
    got = 0
    for each in await one.pending():
        assert await one.claim(each, TTL_S)
        store.records_read = 0
        pending = await other.pending()
        assert not await other.claim(pending[0], TTL_S)
        assert (
            store.records_read <= 3
        )  # the mark of the one before, the mark of this one, and whether it is still there
        await one.delivered(each)
        got += 1
    assert got == CHUNK
    assert await take(other) == [f"s-{number}" for number in range(CHUNK, 2 * CHUNK)]
    assert await one.pending() == []


async def test_a_long_backlog_is_delivered_in_order_with_a_bounded_part_in_memory() -> None:
    store = SharedMemory()
    box = await added(store)
    await write(store, *range(3 * CHUNK))
    assert len(await box.pending()) == CHUNK
    assert await take(box) == [f"s-{number}" for number in range(3 * CHUNK)]


async def test_one_that_is_replaced_by_id_does_not_come_again_and_hides_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backtest_kit.records.outbox.LOOKBACK", 2)
    store = SharedMemory()
    box = await added(store)
    await write(store, *range(5))
    assert await take(box, at_most=3) == ["s-0", "s-1", "s-2"]
    for record in [record async for record in store.scan(NOTIFICATION, limit=3)]:
        await store.put(Write(NOTIFICATION, record.key, record.value))
    assert await take(await added(store)) == ["s-3", "s-4"]


async def test_what_another_process_writes_while_a_sink_is_added_is_for_it() -> None:
    store = SharedMemory()
    await write(store, 0)

    async def be_faster() -> None:
        await added(store)
        await write(store, 1)

    # The slower one has found no sink, and reads what is there when another process has added it and written more.
    store.before_scan = be_faster
    slower = Outbox(store, "phone", now_ms() + 60_000, Elapsed())
    await slower.add()
    assert signals_of(await slower.pending()) == ["s-1"]


async def test_of_processes_that_add_a_sink_at_the_same_time_the_first_decides_since_when_it_gets_notifications() -> (
    None
):
    store = SharedMemory()
    await write(store, 0)
    added_ms = now_ms() + 1
    first, second = Outbox(store, "phone", added_ms, Elapsed()), Outbox(store, "phone", added_ms + 60_000, Elapsed())
    while now_ms() <= added_ms:
        await asyncio.sleep(0.001)

    async def overtake() -> None:
        await write(store, 1)
        await second.add()

    store.before_scan = overtake
    await first.add()
    assert signals_of(await first.pending()) == signals_of(await second.pending()) == ["s-1"]


@pytest.mark.usefixtures("short_drain")
async def test_that_a_sink_was_added_is_kept_with_its_notifications(tmp_path: Path, receiver: Receiver) -> None:
    """It was lost with a state in memory: what had waited for the sink was taken for older than the sink."""
    answers = iter((500, 200))
    for life in range(2):
        receiver.status = partial(lambda status, _: status, next(answers))
        kit = kit_on("sqlite:{place}/bot.db", tmp_path)
        kit.persistence.bind("state", MemoryStore())
        kit.records.notification.sink(hook(receiver))
        await observe(kit, [opened(f"s-{life}-a", life), opened(f"s-{life}-b", life)])
        await kit.close()
    assert [each["signalId"] for each in receiver.got] == ["s-0-a", "s-0-b", "s-1-a", "s-1-b"]


async def test_a_store_that_does_not_take_the_mark_does_not_make_the_process_deliver_twice(
    tmp_path: Path, receiver: Receiver
) -> None:
    class Refusing(SharedMemory):
        refused = 0

        async def put(self, write: Write) -> Record:
            if write.contract is DELIVERY and write.value["deliveredRev"] and self.refused < 3:  # type: ignore[index, call-overload]
                self.refused += 1
                raise RetryLater("the disk is slow")
            return await super().put(write)

    kit, got, store = bk.Kit(tmp_path), list[str](), Refusing()
    kit.persistence.bind("*", store)

    async def note(notification: bk.Notification) -> None:
        got.append(notification.signal_id)

    kit.records.notification.sink(note)
    await observe(kit, [opened("s-1"), opened("s-2", 1)])
    await receiver.until(lambda: got == ["s-1", "s-2"])
    await kit.close()
    assert store.refused == 3


async def test_what_is_not_a_notification_holds_up_no_sink(
    tmp_path: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    kit = kit_on("memory:", tmp_path)
    kit.records.notification.sink(hook(receiver))
    await kit.records.begin("live")
    await kit.persistence.notification.write({"text": "by hand"}, backtest=False, notification_id="odd")
    await observe(kit, [opened("s-1")])
    await receiver.until(lambda: len(receiver.got) == 1)
    await kit.close()
    assert "odd is not a notification" in caplog.text


class OwnNotifications:
    """A user's own object, for one contract."""

    def __init__(self) -> None:
        self.entities: dict[str, Any] = {}

    def read_value(self, entity_id: str) -> Any:
        return self.entities.get(entity_id)

    def write_value(self, entity_id: str, entity: Any) -> None:
        self.entities[entity_id] = entity

    def list_values(self) -> list[Any]:
        return list(self.entities.values())


async def test_a_sink_gets_what_an_object_of_the_user_keeps(tmp_path: Path, receiver: Receiver) -> None:
    own = OwnNotifications()
    for life in range(2):
        kit = kit_on(f"file:{tmp_path / 'dump'}", tmp_path)
        kit.persistence.bind("notification", AdapterStore(NOTIFICATION, own))
        kit.records.notification.sink(hook(receiver))
        await observe(kit, [opened(f"s-{life}", life)])
        await kit.close()
    assert [each["signalId"] for each in receiver.got] == ["s-0", "s-1"]


async def test_marks_are_forgotten_with_the_notifications() -> None:
    store = MemoryStore()
    box = await added(store)
    await write(store, *range(3))
    await take(box)
    retention = retention_of(Settings(CC_RETENTION_NOTIFICATION_DAYS=90))
    assert await compact(store, retention, at_ms=now_ms() + 89 * DAY_MS) == []
    gone = await compact(store, retention, at_ms=now_ms() + 91 * DAY_MS)
    assert {(each.contract, each.records) for each in gone} == {("notification", 3), ("delivery", 3)}
    await write(store, 5)
    assert await take(await added(store)) == ["s-5"], "it was added for good"


async def test_after_a_migration_a_sink_gets_exactly_what_it_has_not_got(tmp_path: Path) -> None:
    source, target = store_at(f"sqlite:{tmp_path}/old.db"), store_at(f"file:{tmp_path}/new")
    try:
        await write(source, 0)
        box = await added(source)
        await write(source, 1, 2, 3)
        assert await take(box, at_most=2) == ["s-1", "s-2"]
        await migrate_store(source, target)
        assert await take(await added(target)) == ["s-3"]
    finally:
        await source.close()
        await target.close()


@pytest.mark.usefixtures("short_drain")
async def test_a_run_that_is_cancelled_releases_what_it_has_claimed(tmp_path: Path, receiver: Receiver) -> None:
    held, tried = asyncio.Event(), list[str]()

    async def hang(notification: bk.Notification) -> None:
        tried.append(notification.signal_id)
        await held.wait()

    kit = kit_on("sqlite:{place}/bot.db", tmp_path)
    kit.records.notification.sink(hang, name="phone")
    await observe(kit, [opened("s-1")])
    await receiver.until(lambda: tried == ["s-1"])
    await kit.close()
    held.set()
    kit = kit_on("sqlite:{place}/bot.db", tmp_path)  # of a living process: it waits for no claim to lapse
    kit.records.notification.sink(hang, name="phone")
    await kit.records.begin("live")
    await receiver.until(lambda: tried == ["s-1", "s-1"])
    await kit.close()
