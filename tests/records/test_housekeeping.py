"""Forgetting day by day: it goes on whatever a store does, tells of it, and ends when it is told to."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from tests.records.conftest import NOON_MS, kit_on, run_of
from tests.records.happenings import IDENTITY, closed, opened

import backtest_kit as bk
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.retention import DAY_MS, compact, retention_of
from backtest_kit.persist.writing import now_ms
from backtest_kit.records import housekeeping
from backtest_kit.records.log import line_of

LOG = CONTRACTS["log"]


class Broken(MemoryStore):
    """A store whose lists fail as often as it is told."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors = list(errors)
        self.asked = 0
        self.intact = asyncio.Event()

    async def count(self, contract: Contract) -> int:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        self.intact.set()
        return await super().count(contract)


def kit_on_both(place: Path, store: Broken) -> tuple[bk.Kit, MemoryStore]:
    """A kit that keeps one line of the log at most, in a store that is intact, and notifications in `store`."""
    kit, intact = bk.Kit(place), MemoryStore()
    kit.set_config(CC_RETENTION_LOG_COUNT=1, CC_RETENTION_NOTIFICATION_COUNT=1)
    kit.persistence.bind("*", store)
    kit.persistence.bind("log", intact)
    return kit, intact


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), KeyError("a bug"), bk.RetryLater("away")], ids=repr
)
async def test_a_store_that_fails_is_told_and_tried_again(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(housekeeping, "PAUSE_S", 0.002)
    store = Broken(error, error)
    kit, intact = kit_on_both(tmp_path, store)
    for number in range(3):
        kit.records.of_run(IDENTITY, None).log(NOON_MS).info(f"line {number}")
    await kit.records.log.flush()
    await kit.records.begin("live")
    async with asyncio.timeout(20):
        await store.intact.wait()
    told = [record for record in caplog.records if "trying again tomorrow" in record.getMessage()]
    assert len(told) == 2
    assert all(record.levelno >= logging.WARNING for record in told)
    assert "away" in caplog.text if isinstance(error, bk.RetryLater) else type(error).__name__ in caplog.text
    assert [line_of(record).message async for record in intact.scan(LOG)] == ["line 2"]
    await ended(kit, store)


async def test_settings_that_cannot_be_read_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(housekeeping, "PAUSE_S", 0.002)
    store = Broken()
    kit, _ = kit_on_both(tmp_path, store)
    tries: list[int] = []

    def settings() -> bk.Settings:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("not today")
        return bk.Settings(CC_RETENTION_NOTIFICATION_COUNT=1)

    upkeep = housekeeping.Housekeeping(lambda: kit.persistence, settings)
    upkeep.start()
    async with asyncio.timeout(20):
        await store.intact.wait()
    assert "not today" in caplog.text
    await upkeep.close()
    await kit.close()


@pytest.mark.parametrize("mode", ["live", "paper"])
async def test_what_a_signal_left_goes_when_it_is_over_and_old(tmp_path: Path, mode: Literal["live", "paper"]) -> None:
    kit = kit_on("file:{place}/dump", tmp_path)
    run, identity = run_of(kit, mode), msgspec.structs.replace(IDENTITY, mode=mode)
    for number in range(3):
        await run.observe([opened(f"s-{number}", identity=identity)])
        await run.state("plan", NOON_MS, f"s-{number}", None, False).set(95)
        await run.memory("notes", NOON_MS, f"s-{number}", None, False).write("why", "because")
    await run.state("plan", NOON_MS, None, None, False).set(1)
    await run.observe([closed("s-0", identity=identity), closed("s-1", identity=identity)])
    (store,) = {id(store): store for store in kit.persistence.stores() if isinstance(store, FileStore)}.values()
    kept = retention_of(bk.Settings(CC_RETENTION_STATE_DAYS=30, CC_RETENTION_MEMORY_DAYS=30))
    gone = await compact(store, kept, at_ms=now_ms() + 31 * DAY_MS)
    assert sorted((each.contract, each.records) for each in gone) == [("memory", 2), ("state", 2)]
    left = [await run.state("plan", NOON_MS, f"s-{number}", None, False).get() for number in range(3)]
    assert left == [1, 1, 95]  # where the signal's is gone it is the strategy's
    await kit.close()


async def ended(kit: bk.Kit, store: Broken) -> None:
    """Closing it ends it, in the middle of whatever it does."""
    async with asyncio.timeout(20):
        await kit.close()
    asked = store.asked
    await asyncio.sleep(0.02)
    assert store.asked == asked
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "retention"]
