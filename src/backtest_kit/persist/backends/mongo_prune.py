"""Forgetting in MongoDB: documents of records that are too old, and whole namespaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from pymongo import DeleteOne

from backtest_kit.errors import Damaged
from backtest_kit.persist.backends.mongo_client import Link
from backtest_kit.persist.backends.mongo_documents import ROWS, Document, matching, name_of, record_of
from backtest_kit.persist.backends.mongo_reading import find_named
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.keys import check_key
from backtest_kit.persist.store import Key

_CHUNK: Final = 256
"""Records in one request."""
_MANY: Final = 5_000
"""Documents of a namespace that are deleted in one request: few enough for a slow server to answer in time."""


async def prune(link: Link, namespace: str, contract: Contract, revisions: Mapping[Key, int]) -> int:
    """As `Store.prune`, in one namespace. What two prune at once, both count."""
    doomed = [(name_of(namespace, contract, check_key(contract, key)), revision) for key, revision in revisions.items()]
    pruned = 0
    for start in range(0, len(doomed), _CHUNK):
        pruned += await _prune(link, contract, doomed[start : start + _CHUNK])
    return pruned


async def forget(link: Link, namespace: str) -> None:
    """Delete every document of a namespace and of those in it."""
    # A slash follows the name of the outer one, and 0 follows the slash.
    inner = {"$gte": f"{namespace}/", "$lt": f"{namespace}0"}
    wanted = {"$or": [{"namespace": namespace}, {"namespace": inner}]}
    for row in ROWS.values():
        while await link.ask("forget a namespace", partial(_delete_some, link, row, wanted)):
            pass


async def _prune(link: Link, contract: Contract, doomed: Sequence[tuple[Document, int]]) -> int:
    collection = link.collection(contract)
    read = await find_named(link, contract, [name for name, _ in doomed], "prune records")
    found = [
        each
        for each, (_, revision) in zip(read, doomed, strict=True)
        if each is not None and each.get("rev") == revision and "hold" not in each and _is_sound(contract, each)
    ]
    if not found:
        return 0
    deletes = [DeleteOne(matching({"_id": each["_id"]}, each["rev"])) for each in found]
    await link.ask("prune records", lambda: collection.bulk_write(deletes, ordered=False))
    left = {"_id": {"$in": [each["_id"] for each in found]}}

    async def count() -> int:
        return len(await collection.find(left, ["_id"]).to_list())

    # Not what the server says to have deleted: it may have been told twice.
    return len(found) - await link.ask("prune records", count)


def _is_sound(contract: Contract, document: Document) -> bool:
    try:
        record_of(contract, document)
    except Damaged:
        return False
    return True


async def _delete_some(link: Link, contract: Contract, wanted: Mapping[str, Any]) -> int:
    collection = link.named(contract.collection, Durability.MONEY)
    ids = [each["_id"] for each in await collection.find(wanted, ["_id"], limit=_MANY).to_list()]
    if ids:
        await collection.delete_many({"_id": {"$in": ids}})
    return len(ids)
