"""Documents that cannot be understood: they stay where they are, marked, until an operator decides.

The mark is the field `hold`, with the reason. No write of this program changes a document that has one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from bson.int64 import Int64
from pymongo import ReturnDocument

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist.backends.mongo_candles import MongoCandleStore
from backtest_kit.persist.backends.mongo_client import Link
from backtest_kit.persist.backends.mongo_documents import RECORD_ROWS, ROWS, Document, checksum_of, record_of
from backtest_kit.persist.candle_cache import CandleCache
from backtest_kit.persist.codec import NewerSchema
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.keys import check_key, path_of
from backtest_kit.persist.store import Record
from backtest_kit.persist.upkeep import Finding, Quarantined
from backtest_kit.persist.writing import now_ms

_EVER: Final = (-(2**62), 2**62)
_MARKED: Final = {"hold.damaged": {"$exists": True}}


async def block(link: Link, contract: Contract, document: Document, error: Damaged) -> Damaged:
    """Mark a document that was read and not understood, and return the error to raise.

    One of a newer version is sound, and is not marked: an update of this program frees it.
    """
    where = f"{contract.collection} of {link.database_name} at {link.where}: {path_to(contract, document)}"
    if isinstance(error, NewerSchema):
        return NewerSchema(f"{where}: {error}")
    mark = {"hold": {"damaged": str(error), "foundAt": Int64(now_ms())}}
    as_read = {"_id": document["_id"], "hold": {"$exists": False}, "tick": document.get("tick")}
    collection = link.collection(contract)
    await link.finish(link.ask("mark what is damaged", lambda: collection.update_one(as_read, {"$set": mark})))
    return blocked(link, contract, {**document, **mark})


def blocked(link: Link, contract: Contract, document: Document) -> Damaged:
    """The error that a marked document means."""
    path = path_to(contract, document)
    return Damaged(
        f"{contract.collection} of {link.database_name} at {link.where}: {path}: {_reason(document)}. "
        "The document stays there and its key is blocked: correct it and "
        f"`backtest-kit store quarantine restore {path}`, or `... drop` it"
    )


async def check(link: Link, *, deep: bool) -> list[Finding]:
    """Everything that is wrong in all namespaces. Changes nothing."""
    found = []
    for contract in RECORD_ROWS:
        async for document in _all(link, contract, {"rev": {"$ne": 0}}):
            problem = _problem(contract, document)
            if problem is not None:
                found.append(Finding(path_to(contract, document), problem))
    if deep:
        found += await _check_candles(link)
    return sorted(found, key=lambda finding: finding.path)


async def quarantined(link: Link) -> list[Quarantined]:
    """Every marked document, by path."""
    found: list[Quarantined] = []
    for contract in RECORD_ROWS:
        found += [_quarantined(contract, document) async for document in _all(link, contract, _MARKED)]
    return sorted(found, key=lambda item: item.path)


async def restore(link: Link, path: str) -> Record:
    """Take the mark off a document that is sound again.

    Raises:
        UserError: nothing is called so, or it is still damaged.
    """
    contract, document = await _find(link, path)
    try:
        record_of(contract, document, edited=True)
    except Damaged as error:
        raise UserError(f"{path} is still damaged: {error}; correct its document, or drop it") from None
    collection = link.collection(contract)
    # Nobody who knew the record before the damage may take it for the one that he read.
    sealed = {"checksum": checksum_of(contract, document)}
    update = {"$set": sealed, "$unset": {"hold": ""}, "$inc": {"rev": Int64(1)}}
    restored = await link.ask(
        f"restore {path}",
        lambda: collection.find_one_and_update(
            {"_id": document["_id"], **_MARKED}, update, return_document=ReturnDocument.AFTER
        ),
    )
    if restored is None:
        raise UserError(f"{path} is not in quarantine any more: somebody else has decided")
    return record_of(contract, restored)


async def drop(link: Link, path: str) -> Quarantined:
    """Delete a marked document.

    Raises:
        UserError: nothing is called so.
    """
    contract, document = await _find(link, path)
    collection = link.collection(contract)
    await link.ask(f"drop {path}", lambda: collection.delete_one({"_id": document["_id"], **_MARKED}))
    return _quarantined(contract, document)


def path_to(contract: Contract, document: Document) -> str:
    """A document's name in the operations on the quarantine, in the form that files have theirs."""
    namespace = document.get("namespace")
    above = "".join(f"@{part}/" for part in namespace.split("/")) if isinstance(namespace, str) and namespace else ""
    try:
        key = check_key(contract, [document.get(field) for field in contract.key_fields])
    except UserError:
        return f"{above}{contract.name}/_id/{document['_id']}"
    return f"{above}{contract.name}/{'/'.join(path_of(contract, key))}"


async def _find(link: Link, path: str) -> tuple[Contract, Document]:
    name = next((part for part in path.split("/") if not part.startswith("@")), "")
    if name in ROWS:
        async for document in _all(link, ROWS[name], _MARKED):
            if path_to(ROWS[name], document) == path:
                return ROWS[name], document
    raise UserError(f"nothing in quarantine is called {path!r}: see `backtest-kit store quarantine list`")


async def _all(link: Link, contract: Contract, wanted: Document) -> AsyncIterator[Document]:
    """Every document, in pages by `_id`: no cursor has to live for as long as somebody reads."""
    last: Any = None
    while True:
        after = wanted if last is None else {**wanted, "_id": {"$gt": last}}

        async def question(after: Document = after) -> list[Document]:
            return await link.collection(contract).find(after, sort=[("_id", 1)], limit=1_000).to_list()

        page = await link.ask(f"read {contract.collection}", question)
        for document in page:
            yield document
        if not page:
            return
        last = page[-1]["_id"]


def _problem(contract: Contract, document: Document) -> str | None:
    if _MARKED_FIELD in (document.get("hold") or {}):
        return f"in quarantine, its key is blocked: {_reason(document)}"
    try:
        record_of(contract, document)
    except Damaged as error:
        return str(error)
    return None


_MARKED_FIELD: Final = "damaged"


async def _check_candles(link: Link) -> list[Finding]:
    async def opened() -> Link:
        return link

    found = []
    namespaces = await link.ask("check the candles", lambda: link.collection(ROWS["candle"]).distinct("namespace"))
    for namespace in namespaces:
        candles = MongoCandleStore(opened, namespace, CandleCache(0))
        for series in await candles.series():
            try:
                await candles.read(series, *_EVER)
            except Damaged as error:
                found.append(Finding(f"candle/{series.exchange_name}/{series.symbol}/{series.interval}", str(error)))
            await asyncio.sleep(0)
    return found


def _reason(document: Document) -> str:
    return str((document.get("hold") or {}).get(_MARKED_FIELD))


def _quarantined(contract: Contract, document: Document) -> Quarantined:
    key = [document.get(field) for field in contract.key_fields]
    found_at = (document.get("hold") or {}).get("foundAt", 0)
    return Quarantined(path_to(contract, document), contract.name, key, _reason(document), int(found_at))
