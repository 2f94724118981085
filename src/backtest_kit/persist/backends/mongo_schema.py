"""What a database must have before it is used: its version, and the indexes that the contracts' rows ask for."""

from __future__ import annotations

import asyncio
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
        UserError: a unique index is forbidden by what is in a collection; with `existing`, it is no store.
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
    await asyncio.gather(*(_make_indexes(link, contract) for contract in ROWS.values()))
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
    collection = link.collection(contract).with_options(write_concern=link.named(META, Durability.MONEY).write_concern)
    try:
        await link.ask(f"make the indexes of {contract.collection}", lambda: _create(collection, contract))
    except _Refused as refused:
        raise UserError(_explain(link, contract, refused.error)) from refused.error


async def _create(collection: object, contract: Contract) -> None:
    try:
        await collection.create_indexes(indexes_of(contract))  # type: ignore[attr-defined]
    except OperationFailure as error:
        if error.code in (_DUPLICATES, *_INDEX_OF_ANOTHER_FORM):
            raise _Refused(error) from error
        raise


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
