"""What records were before, on a server: as of a moment, with two programs that write at once, and over a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.mongo.samples import store_over

import backtest_kit as bk
from backtest_kit.persist.contracts import CONTRACTS, HISTORY

STATE = CONTRACTS["state"]
SLOT: dict[str, Any] = {"signal_id": "s-1", "bucket_name": "plan"}
MINUTE_MS = 60_000


def kit_over(url: str, place: Path) -> bk.Kit:
    kit = bk.Kit(place)
    kit.persistence.bind("*", store_over(url))
    kit.persistence.keep_history("state", "memory")
    return kit


async def test_records_as_of_a_moment(mongo_url: str, tmp_path: Path) -> None:
    kit = kit_over(mongo_url, tmp_path)
    for minute in (1, 2, 3):
        await kit.persistence.state.write({"minute": minute}, when=minute * MINUTE_MS, **SLOT)
    await kit.close()
    kit = kit_over(mongo_url, tmp_path)
    found = [await kit.persistence.state.read(as_of=minute * MINUTE_MS, **SLOT) for minute in range(5)]
    assert [each and each["minute"] for each in found] == [None, 1, 2, 3, 3]
    await kit.close()


async def test_of_two_programs_that_update_at_once_no_revision_is_lost(mongo_url: str, tmp_path: Path) -> None:
    kits = [kit_over(mongo_url, tmp_path / str(number)) for number in range(2)]

    async def count(kit: bk.Kit) -> None:
        await kit.records.state("plan", signal_id="s-1").update(lambda count: count + 1, 0)

    await asyncio.gather(*(count(kit) for kit in kits for _ in range(10)))
    store = kits[0].persistence.store_for(STATE, "live")
    revisions = sorted([record.key[-1] async for record in store.scan(HISTORY)])
    assert revisions == list(range(1, 20))
    assert await kits[1].persistence.state.read(**SLOT) == 20
    for kit in kits:
        await kit.close()
