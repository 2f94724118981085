"""What a database must have before it is used: its version, and the indexes that the contracts' rows ask for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Final, TypeVar
from uuid import UUID

from pymongo import IndexModel
from pymongo.errors import DuplicateKeyError, OperationFailure

from backtest_kit.errors import UserError
from backtest_kit.persist.backends.mongo_client import Link
from backtest_kit.persist.backends.mongo_documents import ORDER, ROWS, Document
from backtest_kit.persist.backends.mongo_errors import DUPLICATE_KEY
from backtest_kit.persist.codec import SCHEMA_VERSION, NewerSchema
from backtest_kit.persist.contracts import Contract, Durability, Kind
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.writing import now_ms

T = TypeVar("T")

META: Final = "store-meta"
"""Collection of what is said of the database as a whole."""
VERSION: Final = {"_id": "schema"}
_FLUSH: Final = {"_id": "flush"}
_NO_NAMESPACE: Final = 26


def indexes_of(contract: Contract) -> list[IndexModel]:
    """The unique index of a contract's keys, and where its records are listed one that has their order."""
    keys = ("namespace", *contract.key_fields)
    indexes = [IndexModel([(field, 1) for field in keys], name="key", unique=True)]
    if contract.kind in (Kind.FEED, Kind.BUCKET):
        indexes.append(IndexModel([(field, 1) for field in (*keys[:-1], ORDER)], name="order"))
    return indexes


async def prepare(link: Link, *, existing: bool) -> None:
    """Learn what the server is, and make what is missing in the database. May be done by many processes at once.

    With `existing`, or when it is refused, nothing is made.

    Raises:
        UserError: a unique index is forbidden by what is in a collection, or an index of somebody else's refuses or
            deletes records; with `existing`, it is no store.
        NewerSchema: a newer version of this program has written to the database.
        RetryLater: the server cannot be asked.
    """
    hello = await link.ask("open the store", lambda: link.mongo.admin.command("hello"))
    await link.read_time()
    link.has_transactions = "setName" in hello or hello.get("msg") == "isdbgrid"
    meta = link.named(META, Durability.MONEY)
    version = await link.ask("open the store", lambda: meta.find_one(VERSION))
    check_version(link, version)
    if existing:
        if version is None:
            raise UserError(f"the database {link.database_name} at {link.where} is no store: name another one")
        return
    # All is looked at before anything is made: what is refused stays as it was.
    there = [*ROWS.values()]
    if version is None:
        names = await link.ask("list the collections", link.database.list_collection_names)
        there = [row for row in there if row.collection in names]
    missing = dict(zip(there, await _to_the_end([_missing(link, row) for row in there]), strict=True))
    made = {row: missing.get(row, indexes_of(row)) for row in ROWS.values()}
    await _to_the_end([_create(link, row, models) for row, models in made.items() if models])
    crashpoint("mongo.after_indexes")
    if version is None:
        first = {"$setOnInsert": {"schemaVersion": SCHEMA_VERSION, "createdAt": now_ms()}}
        await link.ask("open the store", lambda: _upsert_once(link, first))


async def mend(link: Link) -> list[str]:
    """Make the indexes again that have disappeared while the store was open, and return their collections.

    Raises:
        UserError: as `prepare`; the documents of one name are several now, and are named.
        RetryLater: the server cannot be asked.
    """
    missing = dict(zip(ROWS.values(), await _to_the_end([_missing(link, row) for row in ROWS.values()]), strict=True))
    await _to_the_end([_create(link, row, models) for row, models in missing.items() if models])
    return [row.collection for row, models in missing.items() if models]


async def flush(link: Link) -> None:
    """Return when everything that this link wrote is in the journal: it is written in order."""
    meta = link.named(META, Durability.MONEY)
    touch = {"$currentDate": {"at": True}}
    await link.ask("flush the store", lambda: meta.update_one(_FLUSH, touch, upsert=True))


async def identity(link: Link) -> str | None:
    """What the server calls the collection that every store has. A copy of it has another, also under the same name."""

    async def question() -> list[Any]:
        return await (await link.database.list_collections(filter={"name": META})).to_list()

    for found in await link.ask("look which database it is", question):
        # As bytes or as a UUID, by an option of the address.
        name = found.get("info", {}).get("uuid")
        return name and (name.bytes if isinstance(name, UUID) else bytes(name)).hex()
    return None


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


async def _to_the_end(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Do all of it, also when one fails: none may still be at work on a link that is closed because of it."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]


async def _missing(link: Link, contract: Contract) -> list[IndexModel]:
    """The indexes that a collection has to get.

    Raises:
        UserError: it has one that must not be there, or documents that forbid one.
    """
    found = await link.ask(f"list the indexes of {contract.collection}", lambda: indexes_there(link, contract))
    missing = [model for model in indexes_of(contract) if not any(is_same(index, model) for index in found)]
    taken = [part for model in missing for part in (model.document["name"], _keys(model.document))]
    for index in found:
        harm = harm_of(contract, index)
        if harm is None and (index["name"] in taken or _keys(index) in taken):
            harm = f"{index['name']} is of another form than this version's: {shown_fields(index)}"
        if harm:
            raise UserError(
                f"{_place(link, contract)} has an index of another program or version: {harm}. Drop it, "
                f"{drop_command(contract, index['name'])}, or name a new database in CC_MONGO_CONNECTION_STRING"
            )
    if any(model.document.get("unique") for model in missing):
        await _require_unique(link, contract)
    return missing


async def _require_unique(link: Link, contract: Contract) -> None:
    names = ("namespace", *contract.key_fields)
    # To an index, what is missing is null.
    same: Document = {"_id": {name: {"$ifNull": [f"${name}", None]} for name in names}, "count": {"$sum": 1}}
    steps: list[Document] = [{"$group": same}, {"$match": {"count": {"$gt": 1}}}, {"$limit": 1}]

    async def question() -> list[Document]:
        cursor = await link.collection(contract).aggregate(steps, allowDiskUse=True)
        return await cursor.to_list()

    for found in await link.ask(f"look for duplicates in {contract.collection}", question):
        raise UserError(_duplicates(link, contract, found["_id"]))


async def _create(link: Link, contract: Contract, models: Sequence[IndexModel]) -> None:
    concern = link.named(META, Durability.MONEY).write_concern.document
    indexes = [model.document for model in models]

    async def making() -> None:
        try:
            await link.database.command("createIndexes", contract.collection, indexes=indexes, writeConcern=concern)
        except OperationFailure as error:
            if error.code == DUPLICATE_KEY:
                raise UserError(_duplicates(link, contract, (error.details or {}).get("keyValue"))) from error
            raise

    await link.ask(f"make the indexes of {contract.collection}", making)


async def indexes_there(link: Link, contract: Contract) -> list[Document]:
    """Every index of a collection but that of the ids."""
    try:
        # A collection has 64 indexes at most, so the first part is all of them.
        answer = await link.database.command("listIndexes", contract.collection)
        return [dict(each) for each in answer["cursor"]["firstBatch"] if each["name"] != "_id_"]
    except OperationFailure as error:
        if error.code == _NO_NAMESPACE:
            return []
        raise


def is_same(index: Document, model: IndexModel) -> bool:
    """Whether an index does what one of this program's does, whatever its name: that of a shard key has another."""
    wanted = model.document
    plain = not {"expireAfterSeconds", "partialFilterExpression", "sparse", "collation"} & index.keys()
    return plain and _keys(index) == _keys(wanted) and bool(index.get("unique")) == bool(wanted.get("unique"))


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


def _keys(index: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Fields and directions; one that is no number, such as hashed, stays as it is."""
    return [(field, int(way) if isinstance(way, int | float) else way) for field, way in index["key"].items()]


def _place(link: Link, contract: Contract) -> str:
    return f"the collection {contract.collection} of {link.database_name} at {link.where}"


def _duplicates(link: Link, contract: Contract, values: Any) -> str:
    shown = f", such as {values}" if values else ""
    return (
        f"{_place(link, contract)} has several documents with the same "
        f"({', '.join(('namespace', *contract.key_fields))}){shown}, so its unique index cannot be made: "
        "keep one of each and delete the others, or name a new database in CC_MONGO_CONNECTION_STRING"
    )
