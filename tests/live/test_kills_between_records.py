"""Killed between two records of one change, on a MongoDB without transactions: it ends as the run that was not killed.

There a change of a position is several writes, in an order from which a start recovers. A bot trades the story of
`scripts` under a risk profile, and dies by SIGKILL after each write but the last of each change. Then position, cash,
orders, fills, books, trades and risk profile are those of a run that was not killed: nothing is lost, and nothing was
bought twice.

`make test` plays a sample of these places, `make prove` all of them.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

import pymongo
import pytest
from tests.live.scripts import START, STORY_MINUTES
from tests.live.stage import Forks, differences, forking, stage
from tests.samples import sample
from tests.servers import address_of

from backtest_kit.model.interval import MINUTE_MS

pytestmark = [pytest.mark.crash, pytest.mark.slow, pytest.mark.sampled]

POINT: Final = "batch.between_writes"
SEATS: Final = 4
"""Bots that trade at the same time."""
SAMPLE: Final = 3
LEAST: Final = 60
"""Places of the whole story, at least."""


class Play:
    """Runs of the story on databases of their own."""

    def __init__(self, forks: Forks, place: Path, server: str) -> None:
        self._forks = forks
        self._place = place
        self._server = server
        self._seats = asyncio.Semaphore(SEATS)

    async def run(self, name: str, crashes: list[str]) -> tuple[dict[str, Any], list[str], int]:
        """How it ended, what is wrong whatever came before, and how often the point was passed in the last life."""
        end_ms = START + STORY_MINUTES * MINUTE_MS
        job: dict[str, Any] = {"store": address_of(self._server, f"records-{name}"), "risk_name": "few"}
        async with self._seats, stage(self._forks, self._place / name, end_ms=end_ms, **job) as here:
            await here.trade(crashes)
            wrong = here.check()
            if here.kills != len(crashes):
                wrong.append(f"killed {here.kills} times")
            outcome = {**here.outcome(), "risk": here.end().books["risk"]}
            return outcome, wrong, here.end().passed.get(POINT, 0)


async def test_killed_between_any_two_records_of_a_change(tmp_path: Path, standalone_address: str) -> None:
    try:
        async with forking(CC_REDIS_HOST="") as forks:
            play = Play(forks, tmp_path, standalone_address)
            expected, wrong, passed = await play.run("whole", [])
            assert wrong == []
            assert expected["risk"] == {}, "its last position is closed, and its slot is free again"
            assert passed >= LEAST

            async def die(number: int) -> list[str]:
                found, wrong, _ = await play.run(str(number), [f"{POINT}:{number}"])
                return [f"place {number}: {each}" for each in [*wrong, *differences(expected, found)]]

            places = sample(range(1, passed + 1), SAMPLE, "between records")
            wrong = [each for found in await asyncio.gather(*map(die, places)) for each in found]
    finally:
        with pymongo.MongoClient[dict[str, Any]](standalone_address) as client:
            for name in client.list_database_names():
                if name.startswith("records-"):
                    client.drop_database(name)
    assert not wrong, f"{len(wrong)} differences, the first are\n" + "\n".join(wrong[:20])
