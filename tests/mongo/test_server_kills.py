"""MongoDB killed by SIGKILL in the middle of writes and started again: money is there, once, and nobody has to act.

`make prove` kills three hundred times.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import Any

import pymongo
import pytest
from tests.samples import size
from tests.servers import Server, mongo_server, running

from backtest_kit.persist.backends.mongo.settings import MongoSettings
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Expect, Write

pytestmark = [pytest.mark.crash, pytest.mark.sampled, pytest.mark.slow]

SIGNAL, SCHEDULE, RISK = (CONTRACTS[name] for name in ("signal", "schedule", "risk"))
KILLS = size(3, 100)
"""Of each of three servers."""
AWAY_SECONDS = (0.0, 0.0, 0.0, 0.3, 1.0, 2.0)
BACK_SECONDS = 2.0
PATIENT = MongoSettings(
    CC_REDIS_HOST="", CC_MONGO_SERVER_SELECTION_TIMEOUT_MS=30_000, CC_MONGO_OPERATION_TIMEOUT_MS=60_000
)
"""Longer than a busy machine needs to start the server again."""


class Writer:
    """Writes version after version of one key, or of one key in two contracts at once."""

    def __init__(self, store: MongoStore, name: str, *, is_guarded: bool, is_batch: bool) -> None:
        self.key = ("trend", "binance", name)
        self._store, self._is_guarded, self._is_batch = store, is_guarded, is_batch
        self.attempted = 0
        self.acknowledged = 0
        self._moved = asyncio.Event()

    async def run(self, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            expect: Expect = self.acknowledged if self._is_guarded and self.acknowledged else "any"
            self.attempted += 1
            # No error is expected: whoever waits for the server for a while need not know that it was away.
            if self._is_batch:
                await self._store.batch(
                    [Write(contract, self.key, self.attempted, expect=expect) for contract in (SIGNAL, SCHEDULE)]
                )
            else:
                record = await self._store.put(Write(SIGNAL, self.key, self.attempted, expect=expect))
                assert (record.value, record.rev) == (self.attempted, self.attempted)
            self.acknowledged = self.attempted
            self._moved.set()

    @property
    def has_moved(self) -> bool:
        return self._moved.is_set()

    async def moves(self, times: int) -> None:
        """Return after so many acknowledgements."""
        for _ in range(times):
            self._moved.clear()
            await self._moved.wait()


def require_exactly(database: Any, writers: list[Writer]) -> None:
    """In the server, behind the store's back: every acknowledged version, once, and none that nobody wrote."""
    for writer in writers:
        names = ("signal-items", "schedule-items") if writer._is_batch else ("signal-items",)
        for name in names:
            found = list(database[name].find({"symbol": writer.key[2]}))
            assert [(each["payload"], each["rev"]) for each in found] == [(writer.acknowledged, writer.acknowledged)]
            assert "quarantine" not in found[0]


async def kill_again_and_again(
    server: Server, has_batches: bool, seed: int, starting: asyncio.Lock
) -> tuple[int, float]:
    """The number of writes acknowledged, and the longest time that a writer needed after the server was back.

    `starting` keeps the servers from starting at the same time: what is measured is a reconnection, and no race of
    four new processes for two cores.
    """
    chance = random.Random(seed)  # noqa: S311
    store = MongoStore(f"mongodb://127.0.0.1:{server.port}/db", settings=PATIENT)
    writers = [
        Writer(store, f"w{number}", is_guarded=number % 2 == 1, is_batch=number >= 4)
        for number in range(6 if has_batches else 4)
    ]
    await store.open()
    is_over = asyncio.Event()
    tasks = [asyncio.ensure_future(writer.run(is_over)) for writer in writers]
    failing = asyncio.gather(*tasks)
    slowest = 0.0
    for _ in range(KILLS):
        together = asyncio.gather(*(writer.moves(2) for writer in writers))
        await asyncio.wait([together, failing], return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            break
        await asyncio.sleep(chance.uniform(0, 0.02))
        server.kill()
        await asyncio.sleep(chance.choice(AWAY_SECONDS))
        async with starting:
            await asyncio.to_thread(server.start)
            back = time.monotonic()
            again = asyncio.gather(*(writer.moves(1) for writer in writers))
            await asyncio.wait([again, failing], timeout=30, return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                break
            stuck = [writer.key for writer in writers if not writer.has_moved]
            assert again.done(), f"the server is back, and 30 s later there is no write of {stuck}"
            slowest = max(slowest, time.monotonic() - back)
    is_over.set()
    await failing
    await store.close()
    with pymongo.MongoClient[dict[str, Any]]("127.0.0.1", server.port) as client:
        require_exactly(client["db"], writers)
    return sum(writer.acknowledged for writer in writers), slowest


SERVERS = {
    # The test server takes no notice of the write concern of a commit, so what it acknowledges is journalled here.
    "transactions": (["--sync-on-commit"], True),
    "single writes": ([], False),
    "standalone": (["--standalone"], False),
}
"""Options of each server, and whether batches are written to it."""


async def test_servers_are_killed_in_the_middle_of_writes() -> None:
    with contextlib.ExitStack() as stack:
        runs, starting = [], asyncio.Lock()
        for options, has_batches in SERVERS.values():
            server = stack.enter_context(running(mongo_server(*options)))
            seed = random.randrange(1 << 30)  # noqa: S311
            runs.append(kill_again_and_again(server, has_batches, seed, starting))
        results = await asyncio.gather(*runs)
    for acknowledged, slowest in results:
        assert acknowledged > 4 * 2 * KILLS
        assert slowest < BACK_SECONDS
