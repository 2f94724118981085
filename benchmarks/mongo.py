"""What the Mongo store costs over the raw driver, how many round trips it makes, and what Redis is worth.

    python -m benchmarks.mongo [--rounds 400]

Starts MongoDB and Redis servers of its own; with CC_MONGO_CONNECTION_STRING and CC_REDIS_HOST in the
environment it uses those. Raw and measured calls take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import redis.asyncio
from benchmarks.persist import VALUE, alternate, microseconds, report, timed
from bson.int64 import Int64
from bson.objectid import ObjectId
from pymongo import AsyncMongoClient, ReturnDocument, monitoring
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern
from tests.servers import database_at, mongo_at_hand, redis_at_hand

from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.backends.mongo.connection import database_of
from backtest_kit.persist.backends.mongo.settings import MongoSettings
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import SeriesKey, Write

SIGNAL = CONTRACTS["signal"]
KEY = ("trend", "binance", "BTCUSDT")
NAME = dict(zip(("namespace", *SIGNAL.key_fields), ("", *KEY), strict=True))
OVERHEAD = "at most 1.25"
MINUTES, START_MS = 43_200, 1_640_995_200_000
BULK = "at most 1.15"


class Commands(monitoring.CommandListener):
    """Counts what is sent to MongoDB, by the name of the command."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        self.seen[event.command_name] += 1

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        """Not of interest."""

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        """Not of interest."""


class Raw:
    """The same wire work by the driver alone."""

    def __init__(self, url: str, redis_url: str) -> None:
        self.client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(url)
        database = self.client[database_of(url)]
        journalled = WriteConcern(w="majority", j=True)
        self.signals = database.get_collection("raw-signals", None, None, journalled, ReadConcern("majority"))
        self.candles = database.get_collection("raw-candles", write_concern=WriteConcern(w=1))
        self.redis = redis.asyncio.Redis.from_url(redis_url)
        self.rev = 0

    async def prepare(self) -> None:
        await self.signals.create_index([(name, 1) for name in NAME], unique=True)
        names = ("namespace", "exchangeName", "symbol", "interval", "timestamp")
        await self.candles.create_index([(name, 1) for name in names], unique=True)
        await self.upsert()
        document = await self.signals.find_one(NAME)
        assert document is not None
        await self.redis.set("raw", str(document["_id"]))

    async def read(self) -> Any:
        return await self.signals.find_one(NAME)

    async def read_by_id(self) -> Any:
        identity = await self.redis.get("raw")
        return await self.signals.find_one({"_id": ObjectId(identity.decode())})

    async def upsert(self) -> None:
        await self._write(NAME)

    async def upsert_and_tell(self) -> None:
        document = await self._write(NAME)
        await self.redis.set("raw", str(document["_id"]), ex=604_800)

    async def compare_and_set(self) -> None:
        await self._write({**NAME, "rev": self.rev}, upsert=False)

    async def _write(self, wanted: dict[str, Any], *, upsert: bool = True) -> Any:
        document = await self.signals.find_one_and_update(
            wanted,
            {
                "$set": {"payload": VALUE, "when": None, "writtenAt": Int64(1), "removed": False, "writer": "raw:1"},
                "$inc": {"rev": Int64(1)},
            },
            projection=["rev"],
            upsert=upsert,
            return_document=ReturnDocument.AFTER,
        )
        self.rev = document["rev"]
        return document

    async def write_candles(self, symbol: str, month: CandleSeries) -> None:
        name = {"namespace": "", "exchangeName": "binance", "symbol": symbol, "interval": "1m"}
        columns = [column.tolist() for column in month.columns().values()]
        for start in range(0, len(month), 2_000):
            rows = zip(*(column[start : start + 2_000] for column in columns), strict=True)
            documents = [{**name, **dict(zip(COLUMNS, row, strict=True))} for row in rows]
            await self.candles.insert_many(documents, ordered=False)

    async def read_candles(self, symbol: str) -> int:
        wanted = {"namespace": "", "exchangeName": "binance", "symbol": symbol, "interval": "1m"}
        span = {"$gte": START_MS, "$lt": START_MS + MINUTES * 60_000}
        fields = {"_id": False, **dict.fromkeys(COLUMNS, True)}
        cursor = self.candles.find_raw_batches(
            {**wanted, "timestamp": span}, fields, sort=[("timestamp", 1)], batch_size=10_000
        )
        return sum([len(batch) async for batch in cursor])


async def measure_records(raw: Raw, plain: MongoStore, cached: MongoStore, rounds: int) -> None:
    memory = MemoryStore()
    await memory.put(Write(SIGNAL, KEY, VALUE))

    def guarded(store: MongoStore) -> Callable[[], Awaitable[None]]:
        rev = 0

        async def write() -> None:
            nonlocal rev
            rev = (await store.put(Write(SIGNAL, KEY, VALUE, expect=rev or "any"))).rev

        return write

    pairs: dict[str, tuple[Callable[[], Awaitable[object]], Callable[[], Awaitable[object]]]] = {
        "read by the index, without Redis": (raw.read, lambda: plain.get(SIGNAL, KEY)),
        "read by the id that Redis knows": (raw.read_by_id, lambda: cached.get(SIGNAL, KEY)),
        "upsert, without Redis": (raw.upsert, lambda: plain.put(Write(SIGNAL, KEY, VALUE))),
        "upsert, and Redis is told": (raw.upsert_and_tell, lambda: cached.put(Write(SIGNAL, KEY, VALUE))),
        "compare and set, without Redis": (raw.compare_and_set, guarded(plain)),
    }
    for name, (base, ours) in pairs.items():
        await alternate(20, base, ours)
        if "compare" in name:
            await raw.upsert()
        low, high = await alternate(rounds, base, ours)
        report(f"{name} (raw {microseconds(low)})", microseconds(high), high / low, OVERHEAD)
    (inside,) = await alternate(rounds, lambda: memory.get(SIGNAL, KEY))
    report("read in the process (memory store)", microseconds(inside))


async def measure_candles(raw: Raw, store: MongoStore, rounds: int) -> None:
    column = np.random.default_rng(1).random(MINUTES)
    month = CandleSeries(START_MS + np.arange(MINUTES) * 60_000, column, column, column, column, column)
    numbers, others = iter(range(1_000)), iter(range(1_000))
    low, high = await alternate(
        max(3, rounds // 4),
        lambda: raw.write_candles(f"SYM{next(numbers)}", month),
        lambda: store.candles.write(SeriesKey("binance", f"SYM{next(others)}", "1m"), month),
    )
    report(f"write of {MINUTES} candles (raw {low:.2f} s)", f"{high:.2f} s", high / low, BULK)
    series = SeriesKey("binance", "SYM0", "1m")
    low, high = await alternate(
        rounds,
        lambda: raw.read_candles("SYM0"),
        lambda: store.candles.read(series, START_MS, START_MS + MINUTES * 60_000),
    )
    report(f"read of {MINUTES} candles (raw {low * 1e3:.0f} ms)", f"{high * 1e3:.0f} ms", high / low, BULK)


async def count_round_trips(commands: Commands, store: MongoStore, cache: redis.asyncio.Redis) -> None:
    series = SeriesKey("binance", "SYM0", "1m")
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "upsert": lambda: store.put(Write(SIGNAL, KEY, VALUE)),
        "read": lambda: store.get(SIGNAL, KEY),
        "range of 500 candles": lambda: store.candles.read(series, START_MS, START_MS + 500 * 60_000),
        "range of a month of candles": lambda: store.candles.read(series, START_MS, START_MS + MINUTES * 60_000),
    }
    for name, call in calls.items():
        commands.seen.clear()
        before = (await cache.info("stats"))["total_commands_processed"]
        await timed(call)
        asked = (await cache.info("stats"))["total_commands_processed"] - before - 1
        report(f"round trips of one {name}", f"{sum(commands.seen.values())} + {asked}")


async def main(rounds: int) -> None:
    commands = Commands()
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(database_at(stack.enter_context(mongo_at_hand())))
        redis_url = stack.enter_context(redis_at_hand())
        raw = Raw(url, redis_url)
        monitoring.register(commands)
        # Without candles in this process, or all reads of a range but the first would send nothing.
        plain = MongoStore(url, settings=MongoSettings(CC_REDIS_HOST="", CC_MONGO_CANDLES_IN_MEMORY=0))
        cached = MongoStore(url, settings=MongoSettings(CC_REDIS_URL=redis_url, CC_MONGO_CANDLES_IN_MEMORY=0))
        await raw.prepare()
        await plain.open()
        await cached.open()
        print(f"MongoDB and Redis on this machine, {os.cpu_count()} cores, medians; round trips: MongoDB + Redis")
        await measure_records(raw, plain, cached, rounds)
        await measure_candles(raw, plain, max(3, rounds // 40))
        await count_round_trips(commands, cached, raw.redis)
        await plain.close()
        await cached.close()
        await raw.redis.aclose()
        await raw.client.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    asyncio.run(main(parser.parse_args().rounds))
