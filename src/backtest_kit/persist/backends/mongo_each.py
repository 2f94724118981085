"""Many new records in one round trip, in the order in which they were written: lines of a log, notifications."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import pymongo
from bson.int64 import Int64
from bson.objectid import ObjectId
from pymongo import UpdateOne
from pymongo.errors import BulkWriteError, ServerSelectionTimeoutError

from backtest_kit.errors import BacktestKitError, Outcome
from backtest_kit.persist.backends.mongo_client import Link
from backtest_kit.persist.backends.mongo_documents import Change, matching, record_of_change, update_of
from backtest_kit.persist.backends.mongo_errors import FAILURES, heals, may_have_happened
from backtest_kit.persist.contracts import Durability
from backtest_kit.persist.store import ABSENT, Record

Alone = Callable[[Change, str, bool], Awaitable[Record]]
"""Does one write by itself: under this name of its writer, and whether it may have been done already."""
Written = Callable[[Mapping[int, ObjectId]], Awaitable[None]]
"""Is told which of the writes have made a document, and its `_id`."""

_DOING: Final = "write many records"


async def insert_each(
    link: Link, changes: Sequence[Change], alone: Alone, written: Written
) -> list[Record | BacktestKitError]:
    """Do writes of one contract that expect nothing to be there: what each has made, or why it was refused.

    Whatever the server does not just do is done `alone`, which tells why.

    Raises:
        RetryLater: the server does not answer; nobody knows which of them took place.
    """
    patience = link.patience()
    collection = link.collection(changes[0].contract)
    writers = [link.next_writer() for _ in changes]
    done: list[Record | BacktestKitError] = []
    is_sent = False

    async def one_by_one(count: int) -> None:
        for change, writer in list(zip(changes, writers, strict=True))[len(done) : len(done) + count]:
            try:
                done.append(await alone(change, writer, is_sent))
            except BacktestKitError as error:
                done.append(error)

    while len(done) < len(changes):
        first = len(done)
        try:
            with pymongo.timeout(patience.left):
                result = await collection.bulk_write(
                    [
                        _insert(change, writer, link.next_tick())
                        for change, writer in list(zip(changes, writers, strict=True))[first:]
                    ]
                )
            made, count = dict(result.upserted_ids or {}), len(changes) - first
        except BulkWriteError as error:
            details: Any = error.details or {}
            if not details.get("writeErrors"):
                raise link.failure(error, _DOING, Outcome.UNKNOWN) from error
            made = {each["index"]: each["_id"] for each in details.get("upserted", ())}
            count = details["writeErrors"][0]["index"]
        except FAILURES as error:
            is_sent = is_sent or may_have_happened(error)
            if isinstance(error, ServerSelectionTimeoutError) or (heals(error) and patience.is_over):
                raise link.failure(error, _DOING, Outcome.UNKNOWN if is_sent else Outcome.NOT_DONE) from error
            if heals(error):
                await patience.pause()
            else:
                await one_by_one(len(changes) - first)
            continue
        if changes[0].contract.durability is not Durability.MONEY:
            link.has_unflushed = True
        done += [record_of_change(change, 1) for change in changes[first : first + count]]
        await written({first + index: identity for index, identity in made.items() if index < count})
        if len(done) < len(changes):
            await one_by_one(1)
    return done


def _insert(change: Change, writer: str, tick: int) -> UpdateOne:
    # As one write alone: a request that arrives late must not undo a later one.
    wanted = {**matching(change.name, ABSENT), "tick": {"$not": {"$gte": Int64(tick)}}}
    return UpdateOne(wanted, update_of(change, writer, tick), upsert=True)
