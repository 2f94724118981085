"""What a database must have before it is used: its version, and the indexes that the contracts' rows ask for."""

from __future__ import annotations

import asyncio
import json
from typing import Final

from pymongo import IndexModel
from pymongo.errors import DuplicateKeyError, OperationFailure

from backtest_kit.errors import UserError
from backtest_kit.persist.backends.mongo_client import Link
from backtest_kit.persist.backends.mongo_documents import ORDER, ROWS, Document
from backtest_kit.persist.codec import SCHEMA_VERSION, NewerSchema
from backtest_kit.persist.contracts import Contract, Durability, Kind
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.writing import now_ms

META: Final = "store-meta"
"""Collection of what is said of the database as a whole."""
VERSION: Final = {"_id": "schema"}
_FLUSH: Final = {"_id": "flush"}
_INDEX_OF_ANOTHER_FORM: Final = frozenset((85, 86))
_DUPLICATES: Final = 11000
_NO_NAMESPACE: Final = 26


def indexes_of(contract: Contract) -> list[IndexModel]:
    """The unique index of a contract's keys, and where its records are listed one that has their order."""
    keys = ("namespace", *contract.key_fields)
    indexes = [IndexModel([(field, 1) for field in keys], name="key", unique=True)]
    if contract.kind in (Kind.FEED, Kind.BUCKET):
        indexes.append(IndexModel([(field, 1) for field in (*keys[:-1], *ORDER)], name="order"))
    return indexes


async def prepare(link: Link, *, existing: bool) -> None:
    """Learn what the server is, and make what is missing in the database. May be done by many processes at once.

    With `existing` nothing is made.

    Raises:
        UserError: a unique index is forbidden by what is in a collection, or an index of somebody else's refuses or
            deletes records; with `existing`, it is no store.
        NewerSchema: a newer version of this program has written to the database.
        RetryLater: the server cannot be asked.
    """
    hello = await link.ask("open the store", lambda: link.mongo.admin.command("hello"))
    link.has_transactions = "setName" in hello or hello.get("msg") == "isdbgrid"
    meta = link.named(META, Durability.MONEY)
    version = await link.ask("open the store", lambda: meta.find_one(VERSION))
    check_version(link, version)
    if existing:
        if version is None:
            raise UserError(f"the database {link.database_name} at {link.where} is no store: name another one")
        return
    # All to their end, also when one fails: none may still be at work on a link that is closed because of it.
    for outcome in await asyncio.gather(*(_make_indexes(link, row) for row in ROWS.values()), return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
    crashpoint("mongo.after_indexes")
    if version is None:
        first = {"$setOnInsert": {"schemaVersion": SCHEMA_VERSION, "createdAt": now_ms()}}
        await link.ask("open the store", lambda: _upsert_once(link, first))


async def flush(link: Link) -> None:
    """Return when everything that this link wrote is in the journal: it is written in order."""
    meta = link.named(META, Durability.MONEY)
    touch = {"$currentDate": {"at": True}}
    await link.ask("flush the store", lambda: meta.update_one(_FLUSH, touch, upsert=True))


async def _upsert_once(link: Link, update: Document) -> None:
    try:
        await link.named(META, Durability.MONEY).update_one(VERSION, update, upsert=True)
    except DuplicateKeyError:
        return  # another process has just done the same


def check_version(link: Link, version: Document | None) -> None:
    number = 0 if version is None else version.get("schemaVersion")
    if not isinstance(number, int) or number > SCHEMA_VERSION:
        raise NewerSchema(
            f"the database {link.database_name} at {link.where} has schema {number!r:.40}, this program reads up to "
            f"{SCHEMA_VERSION}: upgrade, nothing was touched"
        )


async def _make_indexes(link: Link, contract: Contract) -> None:
    doing = f"make the indexes of {contract.collection}"
    try:
        there = await link.ask(doing, lambda: _create(link, contract))
    except _Refused as refused:
        raise UserError(_explain(link, contract, refused.error)) from refused.error
    if there == 1 + len(indexes_of(contract)):
        return  # ours and that of the ids
    for index in await link.ask(doing, lambda: indexes_there(link, contract)):
        if harm := harm_of(contract, index):
            raise UserError(
                f"the collection {contract.collection} of {link.database_name} at {link.where} has an index of another "
                f"program or version: {harm}. Drop it, {drop_command(contract, index['name'])}, or name a new database "
                "in CC_MONGO_CONNECTION_STRING"
            )


async def _create(link: Link, contract: Contract) -> int | None:
    """Make the indexes that are missing; returns how many the collection has now, where the server says so."""
    indexes = [model.document for model in indexes_of(contract)]
    concern = link.named(META, Durability.MONEY).write_concern.document
    try:
        answer: Document = await link.database.command(
            "createIndexes", contract.collection, indexes=indexes, writeConcern=concern
        )
    except OperationFailure as error:
        if error.code in (_DUPLICATES, *_INDEX_OF_ANOTHER_FORM):
            raise _Refused(error) from error
        raise
    return answer.get("numIndexesAfter")


async def indexes_there(link: Link, contract: Contract) -> list[Document]:
    """Every index of a collection but that of the ids."""
    try:
        cursor = await link.database[contract.collection].list_indexes()
        return [dict(each) for each in await cursor.to_list() if each["name"] != "_id_"]
    except OperationFailure as error:
        if error.code == _NO_NAMESPACE:
            return []
        raise


def harm_of(contract: Contract, index: Document) -> str | None:
    """Why an index must not be there: it refuses records that are different ones, or removes them."""
    if "expireAfterSeconds" in index:
        return f"{index['name']} deletes documents after {index['expireAfterSeconds']} s"
    full = {"namespace", *contract.key_fields}
    if index.get("unique") and not full <= set(index["key"]):
        missing = ", ".join(field for field in ("namespace", *contract.key_fields) if field not in index["key"])
        says = f"{index['name']} is unique on {shown_fields(index)}, without {missing}"
        return f"{says}: it refuses the second record that differs only there"
    return None


def shown_fields(index: Document) -> str:
    return f"({', '.join(index['key'])})"


def drop_command(contract: Contract, name: str) -> str:
    """The line that removes an index."""
    return f"mongosh: db[{json.dumps(contract.collection)}].dropIndex({json.dumps(name)})"


class _Refused(Exception):
    """An index cannot be made, and trying again would not help."""

    def __init__(self, error: OperationFailure) -> None:
        super().__init__(str(error))
        self.error = error


def _explain(link: Link, contract: Contract, error: OperationFailure) -> str:
    keys = ", ".join(("namespace", *contract.key_fields))
    where = f"the collection {contract.collection} of {link.database_name} at {link.where}"
    if error.code in _INDEX_OF_ANOTHER_FORM:
        return (
            f"{where} has an index called key or order of another form than ({keys}): "
            f"drop it with db['{contract.collection}'].dropIndex(...), the store makes it again"
        )
    values = (error.details or {}).get("keyValue")
    shown = f", such as {values}" if values else ""
    return (
        f"{where} has several documents with the same ({keys}){shown}, so its unique index cannot be made: "
        "keep one of each and delete the others, or name a new database in CC_MONGO_CONNECTION_STRING"
    )
