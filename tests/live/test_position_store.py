"""What is on the disk: torn batches, stores of the user's own, the emergency file, and every crash point passed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.live.rig import START, Rig
from tests.live.scenario import MINUTES, facts, prepared, without_orders
from tests.samples import sample
from tests.values import make_entry, make_position

import backtest_kit as bk
from backtest_kit.broker.base import Order
from backtest_kit.broker.order_ids import SignalIds
from backtest_kit.engine.step import Holding, Resting
from backtest_kit.errors import OutOfSpace, RetryLater
from backtest_kit.model.event import EntryCancelled
from backtest_kit.model.identity import Identity
from backtest_kit.persist import crashpoints
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.store import Key, Record, Write
from backtest_kit.persist.wrapper import AdapterStore
from backtest_kit.run.live.emergency import SIZE, EmergencyFile
from backtest_kit.run.live.known_records import KnownRecords
from backtest_kit.run.live.orders import Intent
from backtest_kit.run.live.position_state import PositionState
from backtest_kit.run.live.position_store import PositionStore, Unsaved, read_position_state
from backtest_kit.run.schema import RiskSchema

MONEY = ("signal", "schedule", "strategy", "partial", "breakeven", "risk")
SCOPE = ("trend", "demo", "BTCUSDT")


class Slots:
    """A user's own adapter: no batches, no capabilities but what is made for it. It breaks after so many writes."""

    left = 10**9
    data: dict[str, Any]

    def __init__(self) -> None:
        self.data = {}

    async def read_value(self, entity_id: str) -> Any:
        return self.data.get(entity_id)

    async def write_value(self, entity_id: str, entity: Any) -> None:
        if Slots.left <= 0:
            raise RetryLater("the adapter is away")
        Slots.left -= 1
        self.data[entity_id] = entity


class OwnRig(Rig):
    """A rig whose money contracts live in an adapter each."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path, bk.MemoryStore())
        self.own = {name: AdapterStore(CONTRACTS[name], Slots()) for name in MONEY}

    def kit(self, clock: Any) -> bk.Kit:
        kit = super().kit(clock)
        for name, store in self.own.items():
            kit.persistence.bind(name, store)
        return kit


@pytest.mark.sampled
@pytest.mark.parametrize("writes", sample(range(4, 60), 6, "half-way into stores of one's own"))
async def test_a_change_that_got_half_way_into_stores_of_ones_own_heals(tmp_path: Path, writes: int) -> None:
    Slots.left = 10**9
    whole = prepared(OwnRig(tmp_path / "whole"))
    await whole.trade(MINUTES)
    rig = prepared(OwnRig(tmp_path / "torn"))
    Slots.left = writes
    while rig.now_ms < START + MINUTES * 60_000:
        with pytest.MonkeyPatch.context() as patch:
            # Without its emergency file it has nothing but what got through.
            patch.setattr(EmergencyFile, "write", _no_file)
            await rig.trade(1)
        if Slots.left <= 0:
            Slots.left = 10**9
    assert set(rig.venue.times_done.values()) <= {1}
    # What a life has told whose store was away, the next one tells again, word for word.
    assert facts(rig.events) == facts(whole.events)
    trades = {trade.signal_id: trade for trade in rig.trades()}.values()
    # But for the numbers of its orders, which grow with attempts.
    assert without_orders(msgspec.to_builtins([*trades])) == without_orders(msgspec.to_builtins(whole.trades()))
    assert len(rig.trades()) <= 3
    status = (await rig.trade(1)).status
    assert status.position is None
    assert status.entry is None
    assert not status.pending_order


class Answerless(bk.MemoryStore):
    """A server that is away right after it has done a batch: neither the answer comes, nor that to a question."""

    away = False
    answers = True

    async def get(self, contract: Contract, key: Key) -> Record | None:
        if self.away:
            raise RetryLater("the server is away")
        return await super().get(contract, key)

    async def batch(self, writes: Sequence[Write]) -> None:
        if self.away:
            raise RetryLater("the server is away")
        await super().batch(writes)
        if not self.answers:
            self.away = True
            raise RetryLater("the answer did not come")


async def test_a_write_that_was_done_unseen_is_no_other_process(tmp_path: Path) -> None:
    store, kit, file = Answerless(), bk.Kit(), EmergencyFile(tmp_path / "reserve")
    kit.persistence.bind("*", store)
    identity = Identity("BTCUSDT", "trend", "demo", "", "live")
    alarms: Any = SimpleNamespace(store_changed=lambda reason, *, kept: None)
    position_store = PositionStore(kit.persistence, identity, SCOPE, (), 0, file, alarms)
    try:
        await position_store.load("me")
        await position_store.keep(PositionState(owner="me", seen_ms=1), "store")
        store.answers = False
        await position_store.keep(PositionState(owner="me", seen_ms=2), "try")
        assert position_store.degraded
        await position_store.keep(PositionState(owner="me", seen_ms=3), "try")
        store.away, store.answers = False, True
        await position_store.keep(PositionState(owner="me", seen_ms=4), "store")
        assert not position_store.degraded
        assert (await read_position_state(KnownRecords(kit.persistence, "live"), SCOPE)).seen_ms == 4
    finally:
        file.close()
        await kit.close()


async def test_a_profile_is_not_asked_again_about_an_order_that_was_written_down(tmp_path: Path) -> None:
    """The store was away while an order to open was pending, and the profile would refuse it by now."""
    store, kit, file = Answerless(), bk.Kit(), EmergencyFile(tmp_path / "reserve")
    kit.persistence.bind("*", store)
    refusals: list[str] = []
    risk = RiskSchema(name="hours", validations=(lambda request: refusals[0] if refusals else None,))
    identity = Identity("BTCUSDT", "trend", "demo", "", "live")
    alarms: Any = SimpleNamespace(store_changed=lambda reason, *, kept: None)
    position_store = PositionStore(kit.persistence, identity, SCOPE, [risk], 120, file, alarms)
    position = make_position(make_entry("one", identity=identity, at_ms=START))
    signal_ids = SignalIds("one", "a1b2c3")
    order = Order(
        kind="open", client_order_id=signal_ids.order("open", 0), signal_id="one", identity=identity, when_ms=START,
        direction="long", price=100.0, cost=100.0, take_profit=110.0, stop_loss=90.0
    )  # fmt: skip
    pending = PositionState(intent=Intent(order=order, target=Holding(position, START), events=()), seen_ms=START)
    try:
        await position_store.load("me")
        await position_store.keep(PositionState(), "store")
        assert await position_store.refusal(position.entry.signal, 100.0, START) is None
        await position_store.keep(pending, "store")
        store.away = True
        with pytest.raises(Unsaved):
            await position_store.keep(msgspec.structs.replace(pending, paused=True), "store")
        store.away = False
        refusals.append("it is late")
        await position_store.flush()
        assert not position_store.degraded
        found = await read_position_state(KnownRecords(kit.persistence, "live"), SCOPE)
        assert found.intent == pending.intent
    finally:
        file.close()
        await kit.close()


def _no_file(self: EmergencyFile, data: bytes) -> None:
    raise OutOfSpace("no file")


async def test_the_records_are_what_the_contracts_say(rig: Rig) -> None:
    prepared(rig)
    await rig.trade(5)
    kit = rig.kit(None)
    where: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "demo", "symbol": "BTCUSDT"}
    signal = await kit.persistence.signal.read(**where)
    assert signal["entry"]["signal"]["priceOpen"] == pytest.approx(99.8)
    assert len(signal["entries"]) == 2
    reached = await kit.persistence.breakeven.read(**where, signal_id=signal["entry"]["signal"]["id"])
    assert reached == {signal["entry"]["signal"]["id"]: {"reached": True}}
    await rig.trade(5)
    assert await rig.kit(None).persistence.signal.read(**where) is None
    schedule = await rig.kit(None).persistence.schedule.read(**where)
    assert schedule["signal"]["priceOpen"] < 101
    strategy = await rig.kit(None).persistence.strategy.read(**where)
    assert strategy["state"] == {
        "type": "resting", "entry": schedule["signal"]["id"], "lastSlotMs": START + 10 * 60_000, "order": ""
    }  # fmt: skip
    assert strategy["intent"] is None


async def test_a_record_that_is_no_position_stops_the_start_and_stays(rig: Rig) -> None:
    kit = rig.kit(None)
    where: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "demo", "symbol": "BTCUSDT"}
    await kit.persistence.signal.write({"hello": "world"}, **where)
    with pytest.raises(bk.Damaged, match="are not a position of this program"):
        await rig.trade(1)
    assert await kit.persistence.signal.read(**where) == {"hello": "world"}
    assert not rig.venue.calls


async def test_every_crash_point_of_a_live_run_is_passed(memory_rig: Rig) -> None:
    passed = crashpoints.record()
    await prepared(memory_rig).trade(MINUTES)
    live = {name for name in crashpoints.CRASHPOINTS if name.startswith("live.")}
    assert len(live) >= 40
    assert live - set(passed) == {"live.emergency.after_write"}


def test_an_emergency_file_keeps_the_last_whole_write(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    file = EmergencyFile(path)
    file.open()
    assert path.stat().st_size == SIZE
    assert path.stat().st_blocks * 512 >= SIZE
    assert file.read() is None
    file.write(b"one")
    file.write(b"two")
    assert file.read() == b"two"
    file.close()
    again = EmergencyFile(path)
    again.open()
    assert again.read() == b"two"
    again.write(b"three")
    again.close()
    whole = path.read_bytes()
    for cut in (whole.index(b"three"), whole.index(b"three") + 4):
        path.write_bytes(whole[:cut] + b"\xff" + whole[cut + 1 :])
        torn = EmergencyFile(path)
        torn.open()
        assert torn.read() == b"two"
        torn.close()


def test_an_emergency_file_takes_a_write_on_a_full_disk(tmp_path: Path) -> None:
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=200k tmpfs {tmp_path} 2>/dev/null"):  # noqa: S605
        pytest.skip("this machine does not let a test mount a small disk")
    try:
        file = EmergencyFile(tmp_path / "file")
        file.open()
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "filler").write_bytes(bytes(1 << 20))
        file.write(b"kept" * 1000)
        assert file.read() == b"kept" * 1000
        with pytest.raises(OutOfSpace, match=r"takes [\d,]+ bytes, not"):
            file.write(bytes(SIZE))
        file.close()
        with pytest.raises(OutOfSpace, match="cannot reserve"):
            EmergencyFile(tmp_path / "another").open()
    finally:
        os.system(f"umount {tmp_path}")  # noqa: S605


def test_the_emergency_file_keeps_what_is_held_however_much_waits_for_the_records(tmp_path: Path) -> None:
    texts = [secrets.token_hex(600) for _ in range(100)]
    identity = Identity("BTCUSDT", "trend", "demo", "", "live")
    entry = make_entry("one", identity=identity, price=1.0, take=2.0, stop=0.5, cost=10.0, at_ms=START)
    outbox = tuple(
        EntryCancelled(
            identity=identity,
            when_ms=START,
            price=1.0,
            entry=msgspec.structs.replace(entry, signal=msgspec.structs.replace(entry.signal, note=text)),
            reason="user",
        )
        for text in texts
    )
    file = EmergencyFile(tmp_path / "reserve")
    unused: Any = None
    position_store = PositionStore(unused, identity, SCOPE, (), 0, file, unused)
    file.open()
    file.write(position_store._sealed(PositionState(state=Resting(entry, START), outbox=outbox, owner="me", seq=1)))
    kept = file.read()
    file.close()
    assert kept is not None
    found = position_store._newer(kept)
    assert found is not None
    assert found.state == Resting(entry, START)
    assert found.outbox == outbox[-len(found.outbox) :]
    assert found.outbox
