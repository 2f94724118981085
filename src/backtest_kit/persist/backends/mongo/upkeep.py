"""Upkeep of a database: its check, its quarantine, and forgetting what is old.

No write of this program changes a document in quarantine; only an operator, with `restore` or `drop`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from bson.int64 import Int64
from pymongo import DeleteOne, ReturnDocument

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist.backends.mongo.candles import MongoCandleStore
from backtest_kit.persist.backends.mongo.connection import Connection
from backtest_kit.persist.backends.mongo.documents import (
    QUARANTINE,
    RECORD_ROWS,
    ROWS,
    Document,
    checksum_of,
    matching,
    name_of,
    record_of,
)
from backtest_kit.persist.backends.mongo.reading import find_named, path_to, reason_of
from backtest_kit.persist.candle_cache import CandleCache
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.keys import check_key
from backtest_kit.persist.store import Key, Record
from backtest_kit.persist.upkeep import Finding, Quarantined

_EVER: Final = (-(2**62), 2**62)
_IN_QUARANTINE: Final = {QUARANTINE: {"$exists": True}}
_PAGE: Final = 1_000
_CHUNK: Final = 256
"""Records that one request prunes."""
_MANY: Final = 5_000
"""Documents of a namespace that one request deletes: few enough for a slow server to answer in time."""


async def check(connection: Connection, *, deep: bool) -> list[Finding]:
    """Everything that is wrong in all namespaces. Changes nothing."""
    found: list[Finding] = []
    for contract in RECORD_ROWS:
        found += [
            Finding(path_to(contract, document), problem)
            async for document in _all(connection, contract, {})
            if (problem := _problem(contract, document)) is not None
        ]
    if deep:
        found += await _check_candles(connection)
    return sorted(found, key=lambda finding: finding.path)


async def quarantined(connection: Connection) -> list[Quarantined]:
    """Every document in quarantine, by path."""
    found: list[Quarantined] = []
    for contract in RECORD_ROWS:
        found += [_quarantined(contract, document) async for document in _all(connection, contract, _IN_QUARANTINE)]
    return sorted(found, key=lambda item: item.path)


async def restore(connection: Connection, path: str) -> Record:
    """Free a document that is sound again.

    Raises:
        UserError: no document has this path, or it is still damaged.
    """
    contract, document = await _find(connection, path)
    try:
        record_of(contract, document, edited=True)
    except Damaged as error:
        raise UserError(f"{path} is still damaged: {error}; correct its document, or drop it") from None
    collection = connection.collection(contract)
    # With the next revision: a writer that read the record before the damage gets a conflict.
    sealed = {"checksum": checksum_of(contract, document)}
    update = {"$set": sealed, "$unset": {QUARANTINE: ""}, "$inc": {"rev": Int64(1)}}
    restored = await connection.ask(
        f"restore {path}",
        lambda: collection.find_one_and_update(
            {"_id": document["_id"], **_IN_QUARANTINE}, update, return_document=ReturnDocument.AFTER
        ),
    )
    if restored is None:
        raise UserError(f"{path} is no longer in quarantine: another operator has restored or dropped it")
    return record_of(contract, restored)


async def drop(connection: Connection, path: str) -> Quarantined:
    """Delete a document in quarantine.

    Raises:
        UserError: no document has this path.
    """
    contract, document = await _find(connection, path)
    collection = connection.collection(contract)
    await connection.ask(f"drop {path}", lambda: collection.delete_one({"_id": document["_id"], **_IN_QUARANTINE}))
    return _quarantined(contract, document)


async def _find(connection: Connection, path: str) -> tuple[Contract, Document]:
    name = next((part for part in path.split("/") if not part.startswith("@")), "")
    if name in ROWS:
        async for document in _all(connection, ROWS[name], _IN_QUARANTINE):
            if path_to(ROWS[name], document) == path:
                return ROWS[name], document
    raise UserError(f"{path!r} is not in quarantine: see `backtest-kit store quarantine list`")


async def _all(connection: Connection, contract: Contract, wanted: Document) -> AsyncIterator[Document]:
    """Every document, in pages by `_id`, so that no cursor must live as long as the caller takes."""
    last: Any = None
    while True:
        after = wanted if last is None else {**wanted, "_id": {"$gt": last}}

        async def question(after: Document = after) -> list[Document]:
            return await connection.collection(contract).find(after, sort=[("_id", 1)], limit=_PAGE).to_list()

        page = await connection.ask(f"read {contract.collection}", question)
        for document in page:
            yield document
        if not page:
            return
        last = page[-1]["_id"]


def _problem(contract: Contract, document: Document) -> str | None:
    if QUARANTINE in document:
        return f"in quarantine, its key is blocked: {reason_of(document)}"
    try:
        record_of(contract, document)
    except Damaged as error:
        return str(error)
    return None


async def _check_candles(connection: Connection) -> list[Finding]:
    async def opened() -> Connection:
        return connection

    found = []
    items = connection.collection(ROWS["candle"])
    for namespace in await connection.ask("check the candles", lambda: items.distinct("namespace")):
        candles = MongoCandleStore(opened, namespace, CandleCache(0))
        for series in await candles.series():
            try:
                await candles.read(series, *_EVER)
            except Damaged as error:
                found.append(Finding(f"candle/{series.exchange_name}/{series.symbol}/{series.interval}", str(error)))
            await asyncio.sleep(0)
    return found


def _quarantined(contract: Contract, document: Document) -> Quarantined:
    key = [document.get(field) for field in contract.key_fields]
    found_at = (document.get(QUARANTINE) or {}).get("foundAt", 0)
    return Quarantined(path_to(contract, document), contract.name, key, reason_of(document), int(found_at))


# -- pruning --------------------------------------------------------------------------------------------


async def prune(connection: Connection, namespace: str, contract: Contract, revisions: Mapping[Key, int]) -> int:
    """As `Store.prune`, in one namespace. What two processes prune at once, both count."""
    doomed = [(name_of(namespace, contract, check_key(contract, key)), revision) for key, revision in revisions.items()]
    pruned = 0
    for start in range(0, len(doomed), _CHUNK):
        pruned += await _prune(connection, contract, doomed[start : start + _CHUNK])
    return pruned


async def forget(connection: Connection, namespace: str) -> None:
    """Delete every document of a namespace and of those in it."""
    # Inner namespaces begin with the outer name and a slash; 0 is the character after the slash.
    inner = {"$gte": f"{namespace}/", "$lt": f"{namespace}0"}
    wanted = {"$or": [{"namespace": namespace}, {"namespace": inner}]}
    for row in ROWS.values():
        while await connection.ask("forget a namespace", partial(_delete_some, connection, row, wanted)):
            pass


async def _prune(connection: Connection, contract: Contract, doomed: Sequence[tuple[Document, int]]) -> int:
    collection = connection.collection(contract)
    read = await find_named(connection, contract, [name for name, _ in doomed], "prune records")
    found = [
        each
        for each, (_, revision) in zip(read, doomed, strict=True)
        if each is not None and each.get("rev") == revision and QUARANTINE not in each and _is_sound(contract, each)
    ]
    if not found:
        return 0
    deletes = [DeleteOne(matching({"_id": each["_id"]}, each["rev"])) for each in found]
    await connection.ask("prune records", lambda: collection.bulk_write(deletes, ordered=False))
    left = {"_id": {"$in": [each["_id"] for each in found]}}

    async def count() -> int:
        return len(await collection.find(left, ["_id"]).to_list())

    # Not the count in the answer: the request may have been sent twice.
    return len(found) - await connection.ask("prune records", count)


def _is_sound(contract: Contract, document: Document) -> bool:
    try:
        record_of(contract, document)
    except Damaged:
        return False
    return True


async def _delete_some(connection: Connection, contract: Contract, wanted: Mapping[str, Any]) -> int:
    collection = connection.named(contract.collection, Durability.MONEY)
    ids = [each["_id"] for each in await collection.find(wanted, ["_id"], limit=_MANY).to_list()]
    if ids:
        await collection.delete_many({"_id": {"$in": ids}})
    return len(ids)
