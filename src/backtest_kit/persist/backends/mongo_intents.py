"""All or nothing on a server without transactions: an intent, locks that name it, one decision.

The intent is a document with everything that a batch writes. It locks every document that it is going to
change by writing its id into their `hold`; a document that does not exist is made with revision 0, which
stands for nothing. When all are locked at the expected revisions one update of the intent decides: from
then on the batch has happened. Then the documents are written and the intent is removed.

Whoever meets a lock settles its intent first. A decided one is carried out to its end, by anybody and as
often as needed; one that is not decided in a while is given up, and whoever was at it begins anew. So a
process may die anywhere, and it does not matter who comes next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any, Final

from bson.int64 import Int64
from bson.objectid import ObjectId
from pymongo import UpdateOne
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import BulkWriteError

from backtest_kit.persist.backends.mongo_client import Link
from backtest_kit.persist.backends.mongo_documents import (
    ROWS,
    Document,
    Planned,
    fields_of,
)
from backtest_kit.persist.backends.mongo_errors import Patience, is_duplicate
from backtest_kit.persist.codec import SCHEMA_VERSION
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.writing import now_ms

INTENTS: Final = "store-intents"
_LOCKING, _DECIDED = "locking", "decided"
_BLANK: Final = {
    "rev": Int64(0),
    "payload": None,
    "when": None,
    "writtenAt": Int64(0),
    "removed": False,
    "schemaVersion": SCHEMA_VERSION,
}
"""A document that is locked before it has ever been written."""
_COURTESY_SECONDS: Final = 1.0
"""How long an intent that is not decided is left to whoever is at it. Giving it up is always safe."""


async def carry_out(link: Link, planned: Sequence[Planned], writer: str) -> bool:
    """Make all the changes or none; False if a document was not as planned, or the intent was given up by others."""
    intent: Document = {
        "_id": ObjectId(),
        "state": _LOCKING,
        "startedAt": Int64(now_ms()),
        "writes": [
            {
                "contract": each.contract.name,
                "document": each.identity,
                "fields": fields_of(each.change, writer, link.next_tick()),
            }
            for each in planned
        ],
    }
    intents = _intents(link)
    await intents.insert_one(intent)
    crashpoint("mongo.after_intent")
    if not await _lock(link, intent, planned):
        await _give_up(link, intent)
        return False
    crashpoint("mongo.after_locks")
    decided = await intents.update_one({"_id": intent["_id"], "state": _LOCKING}, {"$set": {"state": _DECIDED}})
    if not decided.matched_count:
        return False
    crashpoint("mongo.after_decision")
    await _apply(link, intent)
    return True


async def has_happened(link: Link, writer: str) -> bool:
    """Whether a batch whose outcome is unknown was decided, after settling it."""
    intent = await _intents(link).find_one({"writes.fields.writer": writer})
    if intent is None:
        return False
    if intent["state"] != _DECIDED:
        await _give_up(link, intent)
        return False
    await _apply(link, intent)
    return True


async def settle(link: Link, identity: Any, contract: Contract, patience: Patience) -> None:
    """Bring an intent that holds a document of `contract` to its end.

    Raises:
        RetryLater: the server cannot be asked.
    """
    courtesy = Patience(_COURTESY_SECONDS)
    while True:
        intent = await link.ask("settle a batch", lambda: _intents(link).find_one({"_id": identity}), patience)
        if intent is None:
            # It is over; what it still holds was locked too late to count.
            await link.ask("settle a batch", lambda: _unlock(link, contract, identity), patience)
            return
        if intent["state"] == _DECIDED:
            await link.ask("settle a batch", partial(_apply, link, intent), patience)
            return
        if courtesy.is_over:
            await link.ask("settle a batch", partial(_give_up, link, intent), patience)
            return
        await courtesy.pause()


async def replay(link: Link) -> None:
    """Settle every intent that was left by a process that died."""

    async def question() -> list[Document]:
        return await _intents(link).find({}, ["_id"]).to_list()

    found = await link.ask("settle what was left", question)
    await asyncio.gather(*(_settle_left(link, each["_id"]) for each in found))


async def _settle_left(link: Link, identity: Any) -> None:
    await settle(link, identity, ROWS["signal"], link.patience())


def _intents(link: Link) -> AsyncCollection[Document]:
    return link.named(INTENTS, Durability.MONEY)


def _documents(link: Link, contract: Contract) -> AsyncCollection[Document]:
    """The documents of a contract, always journalled: what was decided must not outlive what it locked."""
    return link.named(contract.collection, Durability.MONEY)


async def _lock(link: Link, intent: Document, planned: Sequence[Planned]) -> bool:
    hold = {"hold": {"intent": intent["_id"]}}
    for contract, group in groupby(planned, lambda each: each.contract):
        locks = [
            UpdateOne(
                each.expected,
                {"$set": hold} if each.rev else {"$set": hold, "$setOnInsert": _BLANK},
                upsert=not each.rev,
            )
            for each in group
        ]
        try:
            done = await _documents(link, contract).bulk_write(locks, ordered=False)
        except BulkWriteError as error:
            if not is_duplicate(error):
                raise
            return False
        if done.matched_count + done.upserted_count < len(locks):
            return False
    return True


async def _apply(link: Link, intent: Document) -> None:
    """Write what a decided intent says. A document that it no longer holds has been written already."""
    held = {"hold.intent": intent["_id"]}
    for name, group in groupby(intent["writes"], lambda each: each["contract"]):
        writes = [
            UpdateOne(
                {"_id": each["document"], **held},
                {"$set": each["fields"], "$inc": {"rev": Int64(1)}, "$unset": {"hold": ""}},
            )
            for each in group
        ]
        await _documents(link, ROWS[name]).bulk_write(writes)
        crashpoint("mongo.between_applies")
    crashpoint("mongo.after_applies")
    await _intents(link).delete_one({"_id": intent["_id"]})


async def _give_up(link: Link, intent: Document) -> None:
    """Undo the locks of an intent, unless it has been decided meanwhile."""
    gone = await _intents(link).delete_one({"_id": intent["_id"], "state": _LOCKING})
    if gone.deleted_count:
        for name in {each["contract"] for each in intent["writes"]}:
            await _unlock(link, ROWS[name], intent["_id"])


async def _unlock(link: Link, contract: Contract, identity: Any) -> None:
    held = {"hold.intent": identity}
    await _documents(link, contract).delete_many({**held, "rev": 0})
    # What was locked as blank after that stays locked, and whoever meets it comes here again.
    await _documents(link, contract).update_many({**held, "rev": {"$ne": 0}}, {"$unset": {"hold": ""}})
