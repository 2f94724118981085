"""What a backtest leaves behind is collected for a moment: written once, whole at its end, and never in its way."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.records.conftest import run_of
from tests.records.happenings import closed, opened

import backtest_kit as bk
from backtest_kit.persist.store import Record, Write
from backtest_kit.records import RunRecords
from backtest_kit.records.record_writer import MOST_HELD

RUN = "collected"
HERE = bk.Identity("BTCUSDT", "trend", "binance", "", "backtest")


class Counted(bk.MemoryStore):
    """Counts writes by contract, and can be told to take none."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: Counter[str] = Counter()
        self.refuses = False
        self.waits = asyncio.Event()
        self.waits.set()

    def namespace(self, name: str) -> Counted:
        return self

    async def put(self, write: Write) -> Record:
        await self.waits.wait()
        if self.refuses:
            raise bk.RetryLater("the store takes nothing")
        self.writes[write.contract.name] += 1
        return await super().put(write)


@pytest.fixture
def store() -> Counted:
    return Counted()


@pytest.fixture
def kit(tmp_path: Path, store: Counted) -> bk.Kit:
    kit = bk.Kit(tmp_path)
    kit.persistence.bind("*", store, mode="backtest")
    return kit


@pytest.fixture
def records(kit: bk.Kit) -> RunRecords:
    return run_of(kit, "backtest", RUN)


async def status(kit: bk.Kit, signal_id: str) -> str | None:
    found = await kit.records.storage.get(signal_id, mode="backtest", run_id=RUN)
    return found.status if found else None


async def test_a_signal_that_opens_and_closes_meanwhile_is_written_once(
    kit: bk.Kit, store: Counted, records: RunRecords
) -> None:
    for number in range(20):
        await records.observe([opened(f"s-{number}", 2 * number, HERE)])
        await records.observe([closed(f"s-{number}", 2 * number + 1, HERE)])
    assert not store.writes
    await records.settle()
    assert store.writes == {"storage": 20, "recent": 1, "notification": 40}
    assert {await status(kit, f"s-{number}") for number in range(20)} == {"closed"}
    await kit.close()


async def test_it_is_written_soon_although_nobody_asks(kit: bk.Kit, store: Counted, records: RunRecords) -> None:
    await records.observe([opened("s-1", 0, HERE)])
    async with asyncio.timeout(10):
        while await status(kit, "s-1") is None:
            await asyncio.sleep(0.01)
    await records.observe([closed("s-1", 1, HERE)])
    async with asyncio.timeout(10):
        while await status(kit, "s-1") != "closed":
            await asyncio.sleep(0.01)
    await kit.close()


async def test_a_store_that_is_slow_holds_the_backtest_up_before_memory_grows(
    kit: bk.Kit, store: Counted, records: RunRecords
) -> None:
    store.waits.clear()

    async def replay() -> None:
        for number in range(MOST_HELD + 10):
            await records.observe([opened(f"s-{number}", number, HERE)])

    running = asyncio.create_task(replay())
    done, _ = await asyncio.wait({running}, timeout=0.5)
    assert not done
    store.waits.set()
    await running
    await records.settle()
    assert store.writes["storage"] == MOST_HELD + 10
    await kit.close()


async def test_what_could_not_be_kept_is_told_and_tried_again(kit: bk.Kit, store: Counted, records: RunRecords) -> None:
    store.refuses = True
    await records.observe([opened("s-1", 0, HERE)])
    with pytest.raises(bk.RetryLater, match="takes nothing"):
        await records.settle()
    await records.observe([opened("s-2", 1, HERE)])
    with pytest.raises(bk.RetryLater, match="takes nothing"):
        await records.end()
    store.refuses = False
    await records.settle()
    assert [await status(kit, name) for name in ("s-1", "s-2")] == ["opened", "opened"]
    assert store.writes["notification"] == 2
    await kit.close()


async def test_a_store_that_refuses_fails_the_backtest_and_not_its_error(
    tmp_path: Path, kit: bk.Kit, store: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    store.refuses = True
    kit.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
    kit.add_frame_schema("day", start_date="2024-06-01", end_date="2024-06-02")
    signal: Callable[[bk.Context], bk.Signal] = lambda ctx: bk.Signal.bracket(  # noqa: E731
        "long", price=ctx.price, take_profit_pct=1, stop_loss_pct=1, minutes=60
    )
    kit.add_strategy_schema("always", get_signal=signal)

    def broken(ctx: bk.Context) -> None:
        raise KeyError("nothing")

    kit.add_strategy_schema("broken", get_signal=broken)
    store.candles = bk.MemoryStore().candles
    where: Any = {"exchange_name": "demo", "frame_name": "day"}
    with pytest.raises(bk.RetryLater, match="takes nothing"):
        await kit.backtest.background("BTCUSDT", strategy_name="always", **where)
    with pytest.raises(KeyError, match="nothing"):
        await kit.backtest.background("BTCUSDT", strategy_name="broken", **where)
    assert "are not written yet" in caplog.text
    await kit.close()
    assert "cannot be written" in caplog.text


def test_a_loop_that_ends_in_between_loses_nothing(kit: bk.Kit, store: Counted, records: RunRecords) -> None:
    asyncio.run(records.observe([opened("s-1", 0, HERE)]))  # and the task that would have written it is gone
    assert not store.writes
    asyncio.run(records.settle())
    assert asyncio.run(status(kit, "s-1")) == "opened"
    asyncio.run(kit.close())
