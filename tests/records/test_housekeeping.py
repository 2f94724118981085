"""Forgetting day by day: it goes on whatever a store does, tells of it, and ends when it is told to."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from tests.records.conftest import NOON_MS
from tests.records.happenings import IDENTITY

import backtest_kit as bk
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.contracts import CONTRACTS, Contract
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
    told = [record for record in caplog.records if "tried again tomorrow" in record.getMessage()]
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


async def ended(kit: bk.Kit, store: Broken) -> None:
    """Closing it ends it, in the middle of whatever it does."""
    async with asyncio.timeout(20):
        await kit.close()
    asked = store.asked
    await asyncio.sleep(0.02)
    assert store.asked == asked
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "retention"]
