"""Who owns a position: races, lapses, takeovers and clocks that lie."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.samples import size

from backtest_kit.errors import Conflict, Damaged, Outcome, OutOfSpace, RetryLater, UserError
from backtest_kit.persist import holder as holder_module, lease as lease_module
from backtest_kit.persist.backends.dummy import DummyStore
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.contracts import CONTRACTS, LEASE, Contract, Durability
from backtest_kit.persist.holder import Holder
from backtest_kit.persist.lease import Lapsed, Sightings, acquire, claim
from backtest_kit.persist.possession import renew_through_lapses
from backtest_kit.persist.store import ABSENT, Key, Record, Store, Write
from backtest_kit.persist.urls import store_at
from backtest_kit.seams import Seams

SCOPE = ("trend", "binance", "BTCUSDT")
SIGNAL = CONTRACTS["signal"]


class Time(Seams):
    """A clock that only its sleepers move."""

    def __init__(self) -> None:
        self.seconds = 1_000.0
        self.slept: list[float] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def elapsed(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds
        self.meanwhile()
        await asyncio.sleep(0)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def clock() -> Time:
    return Time()


def of(store: Store) -> Callable[[Contract], Store]:
    return lambda row: store


def stranger(**changes: object) -> Holder:
    """An owner on another machine."""
    holder = Holder(owner="x", pid=4_000_000, host="elsewhere", since=0, ttl_ms=15_000, machine="other", started=1.0)
    return msgspec.structs.replace(holder, **changes)


async def plant(store: Store, holder: Holder) -> Record:
    return await store.put(Write(LEASE, SCOPE, msgspec.to_builtins(holder)))


async def test_free_position_is_taken_at_once(store: MemoryStore, clock: Time) -> None:
    lease = await acquire(of(store), SCOPE, seams=clock)
    assert lease.held
    assert clock.slept == []
    assert lease.holder.pid == os.getpid()


async def test_released_position_is_taken_at_once_and_nothing_is_rewritten(store: MemoryStore, clock: Time) -> None:
    await store.put(Write(SIGNAL, SCOPE, "open"))
    first = await acquire(of(store), SCOPE, seams=clock)
    await first.release()
    assert not first.held
    second = await acquire(of(store), SCOPE, seams=clock)
    assert second.token > first.token
    assert clock.slept == []
    found = await store.get(SIGNAL, SCOPE)
    assert found is not None
    assert found.rev == 1


async def test_owner_that_renews_keeps_others_out_and_is_named(store: MemoryStore, clock: Time) -> None:
    record = await plant(store, stranger())

    def renew() -> None:
        store._tables["lease"].set(msgspec.structs.replace(record, rev=record.rev + 1))

    clock.meanwhile = renew
    with pytest.raises(Conflict, match=r"BTCUSDT on binance by trend.*process 4000000 on elsewhere, since 1970"):
        await acquire(of(store), SCOPE, seams=clock)
    assert len(clock.slept) == 1


async def test_lapsed_lease_is_taken_after_a_whole_ttl_of_our_own_clock(store: MemoryStore, clock: Time) -> None:
    await plant(store, stranger(ttl_ms=7_000))
    before = clock.elapsed()
    lease = await acquire(of(store), SCOPE, seams=clock)
    assert clock.elapsed() - before >= 7.0
    assert lease.held


async def test_release_during_the_wait_ends_it(store: MemoryStore, clock: Time) -> None:
    record = await plant(store, stranger())
    released = msgspec.to_builtins(stranger(released=True))

    def release() -> None:
        store._tables["lease"].set(msgspec.structs.replace(record, rev=record.rev + 1, value=released))

    clock.meanwhile = release
    await acquire(of(store), SCOPE, seams=clock)
    assert len(clock.slept) == 1


async def test_takeover_moves_every_money_record_on(store: MemoryStore, clock: Time) -> None:
    guarded = {"signal", "schedule", "strategy", "partial", "breakeven"}
    other = ("trend", "binance", "BTCUSD")
    for row in CONTRACTS.values():
        if row.name in guarded:
            tail = ("signal-1",)[: len(row.key_fields) - 3]
            await store.put(Write(row, (*SCOPE, *tail), row.name, when=5))
            await store.put(Write(row, (*other, *tail), row.name))
    await plant(store, stranger())
    await acquire(of(store), SCOPE, seams=clock)
    for row in CONTRACTS.values():
        if row.name in guarded:
            tail = ("signal-1",)[: len(row.key_fields) - 3]
            moved, left = await store.get(row, (*SCOPE, *tail)), await store.get(row, (*other, *tail))
            assert moved is not None
            assert left is not None
            assert (moved.value, moved.when, moved.rev, left.rev) == (row.name, 5, 2, 1)
    covered = {row.name for row in lease_module._GUARDED}
    assert covered == guarded
    assert {row.name for row in CONTRACTS.values() if row.durability is Durability.MONEY} - covered == {"risk"}


async def test_old_owner_is_refused_by_the_store(store: MemoryStore, clock: Time) -> None:
    old = await acquire(of(store), SCOPE, seams=clock)
    opened = await store.put(Write(SIGNAL, SCOPE, "opened by the old one", expect=ABSENT))
    clock.seconds += 100
    assert not old.held
    new = await acquire(of(store), SCOPE, seams=clock)
    assert new.held
    with pytest.raises(Conflict):
        await store.put(Write(SIGNAL, SCOPE, "closed by the old one", expect=opened.rev))
    with pytest.raises(Conflict):
        await store.put(Write(CONTRACTS["schedule"], SCOPE, "first order of the old one", expect=ABSENT))
    with pytest.raises(Conflict, match="traded by process"):
        await old.renew()
    with pytest.raises(Conflict):
        await old.keep()
    await old.release()
    await new.renew()
    assert new.held
    assert not old.held


async def test_dead_owner_of_this_machine_is_followed_at_once(store: MemoryStore, clock: Time) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    await plant(store, stranger(pid=gone.pid, machine=holder_module._machine()))
    await acquire(of(store), SCOPE, seams=clock)
    assert clock.slept == []


async def test_pid_that_was_given_away_again_is_no_owner(store: MemoryStore, clock: Time) -> None:
    await plant(store, stranger(pid=os.getpid(), machine=holder_module._machine(), started=-86_400.0))
    await acquire(of(store), SCOPE, seams=clock)
    assert clock.slept == []


async def test_same_pid_on_another_machine_means_nothing(store: MemoryStore, clock: Time) -> None:
    await plant(store, stranger(pid=4_000_000))
    await acquire(of(store), SCOPE, seams=clock)
    assert sum(clock.slept) >= 15.0


@pytest.mark.parametrize("jump_ms", [-3_600_000, 3_600_000, 4_102_444_800_000, -1_700_000_000_000])
async def test_wall_clock_decides_nothing(
    store: MemoryStore, clock: Time, monkeypatch: pytest.MonkeyPatch, jump_ms: int
) -> None:
    lease = await acquire(of(store), SCOPE, seams=clock)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + jump_ms * 1_000_000)
    await lease.renew()
    assert lease.held
    revisions = [lease.token]
    clock.meanwhile = lambda: None
    with pytest.raises(Conflict):
        await asyncio.gather(acquire(of(store), SCOPE, seams=clock), lease.renew())
    revisions.append(lease.token)
    assert revisions == sorted(set(revisions))


class Flaky(MemoryStore):
    """A store that can be away, before or after a write took effect."""

    def __init__(self) -> None:
        super().__init__()
        self.fail: Outcome | None = None

    async def put(self, write: Write) -> Record:
        if self.fail is Outcome.NOT_DONE:
            raise RetryLater("away")
        record = await super().put(write)
        if self.fail is Outcome.UNKNOWN:
            raise RetryLater("cut off", outcome=Outcome.UNKNOWN)
        return record


async def test_lease_survives_a_short_absence_of_the_store(clock: Time) -> None:
    store = Flaky()
    lease = await acquire(of(store), SCOPE, seams=clock)
    for outcome in (Outcome.NOT_DONE, Outcome.UNKNOWN):
        store.fail = outcome
        with pytest.raises(RetryLater):
            await lease.renew()
        store.fail = None
        await lease.renew()
        assert lease.held


async def test_lease_ends_with_a_long_absence_of_the_store(clock: Time) -> None:
    store = Flaky()
    lease = await acquire(of(store), SCOPE, seams=clock)
    store.fail = Outcome.NOT_DONE
    with pytest.raises(Conflict, match="could not be renewed for 15 s"):
        await lease.keep()
    assert not lease.held
    assert 15.0 <= sum(clock.slept) < 25.0


@pytest.mark.parametrize("taken", [False, True])
async def test_a_lease_that_lapsed_without_its_store_is_found_out_about_once_that_is_back(
    clock: Time, taken: bool
) -> None:
    store = Flaky()
    lease = await acquire(of(store), SCOPE, seams=clock)
    store.fail = Outcome.NOT_DONE
    began, keeping = clock.seconds, asyncio.ensure_future(renew_through_lapses(lease))
    while clock.seconds < began + 45:
        assert lease.held == (clock.seconds < began + 15)
        await asyncio.sleep(0)
    assert not keeping.done()
    with pytest.raises(Lapsed, match="has lapsed and the store does not answer"):
        await lease.confirm()
    store.fail = None
    if taken:
        await plant(store, stranger())
        with pytest.raises(Conflict, match="is traded by process 4000000 on elsewhere"):
            await keeping
        with pytest.raises(Conflict, match="is traded by process 4000000 on elsewhere"):
            await lease.confirm()
    else:
        await lease.confirm()
        assert lease.held
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_store_without_compare_and_set_is_refused() -> None:
    with pytest.raises(UserError, match="compare-and-set"):
        await acquire(of(DummyStore()), SCOPE)


async def test_lease_of_another_making_is_damaged(store: MemoryStore) -> None:
    await store.put(Write(LEASE, SCOPE, {"owner": 1}))
    with pytest.raises(Damaged, match="BTCUSDT on binance by trend"):
        await acquire(of(store), SCOPE)


class Far(MemoryStore):
    """A store whose reads take a while, so that every racer has read before the first one writes."""

    async def get(self, contract: Contract, key: Key) -> Record | None:
        found = await super().get(contract, key)
        await asyncio.sleep(0)
        return found


async def test_thousand_races_in_one_process_have_one_winner_each() -> None:
    store = Far()

    async def race(number: int) -> int:
        scope = ("trend", "binance", str(number))
        entrants = [acquire(of(store), scope, ttl=30.0, seams=Time()) for _ in range(3)]
        results = await asyncio.gather(*entrants, return_exceptions=True)
        assert all(isinstance(result, Conflict) for result in results if isinstance(result, BaseException))
        return sum(not isinstance(result, BaseException) for result in results)

    assert await asyncio.gather(*(race(number) for number in range(1_000))) == [1] * 1_000


RACER = """
import asyncio, sys
from backtest_kit.errors import Conflict
from backtest_kit.persist.lease import acquire
from backtest_kit.persist.urls import store_at

async def main(url, races):
    store = store_at(url)
    await store.open()
    print("ready", flush=True)
    sys.stdin.readline()
    undecided = races

    def decided():
        nonlocal undecided
        undecided -= 1
        if not undecided:
            print("decided", flush=True)

    async def race(number):
        try:
            lease = await acquire(lambda row: store, ("trend", "binance", str(number)), ttl=6.0)
        except Conflict:
            decided()
            return
        print(number, flush=True)
        decided()
        await lease.keep()

    tasks = [asyncio.create_task(race(number)) for number in range(races)]
    await asyncio.to_thread(sys.stdin.readline)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await store.close()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def tell(process: subprocess.Popen[str], line: str = "") -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


SHARED_STORES = ["sqlite:{}/bot.db", "file:{}/dump"]


@pytest.mark.sampled
@pytest.mark.parametrize("url", SHARED_STORES)
async def test_thousand_races_of_two_processes_have_one_winner_each(tmp_path: Path, url: str) -> None:
    races = size(250, 1_000)
    racers = [start(RACER, url.format(tmp_path), races) for _ in range(2)]
    for racer in racers:
        assert hear(racer) == "ready"
    for racer in racers:
        tell(racer)
    wins: list[str] = []
    try:
        async with asyncio.timeout(240):
            for racer in racers:
                while (said := await asyncio.to_thread(hear, racer)) != "decided":
                    assert said, "it has ended"
                    wins.append(said)
            for racer in racers:
                output, _ = await asyncio.to_thread(racer.communicate, "\n")
                assert (racer.returncode, output) == (0, "")
    finally:
        for racer in racers:
            racer.kill()
    assert sorted(map(int, wins)) == list(range(races))


OWNER = """
import asyncio, sys
from backtest_kit.errors import Conflict
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.lease import acquire
from backtest_kit.persist.store import ABSENT, Write
from backtest_kit.persist.urls import store_at

async def main(url):
    store = store_at(url)
    positions = int(sys.argv[2])
    held = []
    for number in range(positions):
        scope = ("trend", "binance", str(number))
        lease = await acquire(lambda row: store, scope, ttl=0.4)
        record = await store.put(Write(CONTRACTS["signal"], scope, "old", expect=ABSENT))
        held.append((lease, record))
    print("owning", flush=True)
    sys.stdin.readline()
    refused = 0
    for number, (lease, record) in enumerate(held):
        for name, expect in (("signal", record.rev), ("schedule", ABSENT)):
            try:
                await store.put(Write(CONTRACTS[name], ("trend", "binance", str(number)), "stale", expect=expect))
            except Conflict:
                refused += 1
    print(refused, flush=True)
    await store.close()

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.sampled
@pytest.mark.parametrize("url", SHARED_STORES)
async def test_owner_that_was_paused_past_its_lease_is_refused(tmp_path: Path, url: str) -> None:
    positions = size(60, 250)
    address = url.format(tmp_path)
    owner = start(OWNER, address, positions)
    assert await asyncio.to_thread(hear, owner) == "owning"
    owner.send_signal(signal.SIGSTOP)
    store = store_at(address)
    scopes = [("trend", "binance", str(number)) for number in range(positions)]
    await asyncio.gather(*(acquire(of(store), scope, ttl=30.0) for scope in scopes))
    owner.send_signal(signal.SIGCONT)
    output, _ = await asyncio.to_thread(owner.communicate, "\n", 30)
    assert (owner.returncode, int(output)) == (0, 2 * positions)
    for scope in scopes:
        found = await store.get(SIGNAL, scope)
        assert found is not None
        assert (found.value, found.rev) == ("old", 2)
    await store.close()


# The last look before an order


async def test_who_has_renewed_lately_need_not_ask(store: MemoryStore, clock: Time) -> None:
    lease = await acquire(of(store), SCOPE, seams=clock)
    token = lease.token
    clock.seconds += 9.9
    await lease.confirm()
    assert lease.token == token
    clock.seconds += 0.2
    await lease.confirm()
    assert lease.token == token + 1


async def test_who_was_paused_is_told_that_another_one_has_it(store: MemoryStore, clock: Time) -> None:
    lease = await acquire(of(store), SCOPE, seams=clock)
    await plant(store, stranger())
    clock.seconds += 3600
    with pytest.raises(Conflict, match="is traded by process 4000000 on elsewhere"):
        await lease.confirm()


@pytest.mark.parametrize(("paused_s", "refused"), [(12, False), (16, True)])
async def test_without_a_store_an_order_is_sent_as_long_as_nobody_else_can_have_the_lease(
    store: MemoryStore, clock: Time, monkeypatch: pytest.MonkeyPatch, paused_s: float, refused: bool
) -> None:
    lease = await acquire(of(store), SCOPE, seams=clock)

    async def away(write: Write) -> Record:
        raise RetryLater("the server is away")

    monkeypatch.setattr(store, "put", away)
    clock.seconds += paused_s
    if refused:
        with pytest.raises(Conflict, match=r"has lapsed and the store does not answer \(the server is away\)"):
            await lease.confirm()
    else:
        await lease.confirm()


@pytest.mark.parametrize("taken", [False, True])
async def test_a_full_disk_keeps_no_owner_from_closing(
    store: MemoryStore, clock: Time, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    lease = await acquire(of(store), SCOPE, seams=clock)
    if taken:
        await plant(store, stranger())

    async def full(write: Write) -> Record:
        raise OutOfSpace("no space left")

    monkeypatch.setattr(store, "put", full)
    clock.seconds += 60
    if taken:
        with pytest.raises(Conflict, match="process 4000000"):
            await lease.confirm()
    else:
        await lease.confirm()


SINK: dict[str, Any] = {"what": "sink 'phone'", "doing": "is delivered to by", "remedy": "wait"}


async def test_what_is_no_position_is_claimed_in_the_same_way(store: MemoryStore, clock: Time) -> None:
    lease = await claim(store, "sink", ("phone", "a@b/c"), **SINK, seams=clock)
    with pytest.raises(Conflict, match=rf"sink 'phone' is delivered to by process {os.getpid()} on .*: wait; if"):
        await claim(store, "sink", ("phone", "a@b/c"), **SINK, watches=lambda holder: False, seams=clock)
    assert clock.slept == []
    await claim(store, "sink", ("phone@a", "b/c"), **SINK, seams=clock)
    await claim(store, "run", ("phone", "a@b/c"), **SINK, seams=clock)
    await lease.release()
    await claim(store, "sink", ("phone", "a@b/c"), **SINK, watches=lambda holder: False, seams=clock)
    assert set(store._tables) == {"claim"}, "no money record is looked at"


@pytest.mark.parametrize("left", [None, stranger(released=True)])
async def test_who_is_cancelled_while_it_takes_a_lease_gives_it_up(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, left: Holder | None
) -> None:
    if left is not None:
        await plant(store, left)
    put, began = store.put, asyncio.Event()

    async def slow(write: Write) -> Record:
        began.set()
        await asyncio.sleep(0.01)
        return await put(write)

    monkeypatch.setattr(store, "put", slow)
    taking = asyncio.create_task(acquire(of(store), SCOPE))
    await began.wait()
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    async with asyncio.timeout(1):
        assert (await acquire(of(store), SCOPE)).held


async def test_who_lives_is_seen_by_his_lease(store: MemoryStore, clock: Time) -> None:
    sightings = Sightings(clock)
    found = await plant(store, stranger())
    for _ in range(3):
        assert sightings.living(found) == stranger()
        clock.seconds += 14
        found = await plant(store, stranger())
    assert sightings.living(found) is not None
    clock.seconds += 15
    assert sightings.living(found) is None
    assert sightings.living(await plant(store, stranger())) is not None
    assert sightings.living(await plant(store, stranger(released=True))) is None


async def test_a_dead_process_of_this_machine_is_no_living_owner(store: MemoryStore) -> None:
    mine = (await acquire(of(store), SCOPE)).holder
    dead = msgspec.structs.replace(mine, started=-86_400.0)
    assert Sightings().living(await plant(store, mine)) == mine
    assert Sightings().living(await plant(store, dead)) is None
