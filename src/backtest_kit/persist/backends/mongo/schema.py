"""What a database must have before it is used: its version, and the indexes that the contracts need."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Final, TypeVar
from uuid import UUID

from pymongo import IndexModel
from pymongo.errors import DuplicateKeyError, OperationFailure

from backtest_kit.errors import UserError
from backtest_kit.persist.backends.mongo.connection import Connection
from backtest_kit.persist.backends.mongo.documents import ORDER, ROWS, Document
from backtest_kit.persist.backends.mongo.server import DUPLICATE_KEY, NAMESPACE_NOT_FOUND, traits_of
from backtest_kit.persist.codec import SCHEMA_VERSION, NewerSchema
from backtest_kit.persist.contracts import Contract, Durability, Kind
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.writing import now_ms

T = TypeVar("T")

META: Final = "store-meta"
"""The collection of what concerns the database as a whole."""
VERSION: Final = {"_id": "schema"}
_FLUSH: Final = {"_id": "flush"}


def indexes_of(contract: Contract) -> list[IndexModel]:
    """The unique index of a contract's keys and, where its records are listed, one in their order."""
    keys = ("namespace", *contract.key_fields)
    indexes = [IndexModel([(field, 1) for field in keys], name="key", unique=True)]
    if contract.kind in (Kind.FEED, Kind.BUCKET):
        indexes.append(IndexModel([(field, 1) for field in (*keys[:-1], ORDER)], name="order"))
    return indexes


async def prepare(connection: Connection, *, existing: bool) -> None:
    """Learn what the server is, and make what is missing in the database. Many processes may do so at once.

    With `existing`, or if it raises, nothing is made.

    Raises:
        UserError: a collection has duplicates and cannot get its unique index, or an index of another program rejects
            or deletes records; with `existing`, the database is not a store.
        NewerSchema: a newer version of this program has written to the database.
        RetryLater: the server does not answer.
    """
    hello = await connection.ask("open the store", lambda: connection.mongo.admin.command("hello"))
    await connection.read_time()
    connection.server.traits = traits_of(hello)
    meta = connection.named(META, Durability.MONEY)
    version = await connection.ask("open the store", lambda: meta.find_one(VERSION))
    check_version(connection, version)
    if existing:
        if version is None:
            raise UserError(
                f"the database {connection.database_name} at {connection.where} is not a store: name another one"
            )
        return
    # Everything is checked before anything is made, so that a database that is rejected stays as it was.
    there = [*ROWS.values()]
    if version is None:
        names = await connection.ask("list the collections", connection.database.list_collection_names)
        there = [row for row in there if row.collection in names]
    missing = dict(zip(there, await _all_done([_missing(connection, row) for row in there]), strict=True))
    made = {row: missing.get(row, indexes_of(row)) for row in ROWS.values()}
    await _all_done([_create(connection, row, models) for row, models in made.items() if models])
    crashpoint("mongo.after_indexes")
    if version is None:
        first = {"$setOnInsert": {"schemaVersion": SCHEMA_VERSION, "createdAt": now_ms()}}
        await connection.ask("open the store", lambda: _upsert_once(connection, first))


async def mend(connection: Connection) -> list[str]:
    """Make the indexes again that disappeared while the store was open, and return their collections.

    Raises:
        UserError: as `prepare`, such as for documents that have the same name now.
        RetryLater: the server does not answer.
    """
    missing = dict(
        zip(ROWS.values(), await _all_done([_missing(connection, row) for row in ROWS.values()]), strict=True)
    )
    await _all_done([_create(connection, row, models) for row, models in missing.items() if models])
    return [row.collection for row, models in missing.items() if models]


async def flush(connection: Connection) -> None:
    """Return when everything written before is in the journal. A server writes it in order, so one more write does."""
    meta = connection.named(META, Durability.MONEY)
    touch = {"$currentDate": {"at": True}}
    await connection.ask("flush the store", lambda: meta.update_one(_FLUSH, touch, upsert=True))


async def identity(connection: Connection) -> str | None:
    """The server's UUID of the collection that every store has. A copy of a database has another one."""

    async def question() -> list[Any]:
        return await (await connection.database.list_collections(filter={"name": META})).to_list()

    for found in await connection.ask("identify the database", question):
        # Bytes or a UUID, depending on an option of the address.
        name = found.get("info", {}).get("uuid")
        return name and (name.bytes if isinstance(name, UUID) else bytes(name)).hex()
    return None


async def _upsert_once(connection: Connection, update: Document) -> None:
    try:
        await connection.named(META, Durability.MONEY).update_one(VERSION, update, upsert=True)
    except DuplicateKeyError:
        return  # another process was first


def check_version(connection: Connection, version: Document | None) -> None:
    number = 0 if version is None else version.get("schemaVersion")
    if not isinstance(number, int) or number > SCHEMA_VERSION:
        raise NewerSchema(
            f"the database {connection.database_name} at {connection.where} has schema {number!r:.40}, this program "
            f"reads up to {SCHEMA_VERSION}: upgrade; nothing was changed"
        )


async def _all_done(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Wait for all of it, also if one fails: the failure may close the connection that the others still use."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]


async def _missing(connection: Connection, contract: Contract) -> list[IndexModel]:
    """The indexes that a collection lacks.

    Raises:
        UserError: it has one that must not be there, or duplicates.
    """
    found = await connection.ask(
        f"list the indexes of {contract.collection}", lambda: indexes_there(connection, contract)
    )
    missing = [model for model in indexes_of(contract) if not any(is_same(index, model) for index in found)]
    taken = [part for model in missing for part in (model.document["name"], _keys(model.document))]
    for index in found:
        harm = harm_of(contract, index)
        if harm is None and (index["name"] in taken or _keys(index) in taken):
            harm = f"{index['name']} is of another form than this version's: {shown_fields(index)}"
        if harm:
            raise UserError(
                f"{_place(connection, contract)} has an index of another program or version: {harm}. Drop it, "
                f"{drop_command(contract, index['name'])}, or name a new database in CC_MONGO_CONNECTION_STRING"
            )
    if any(model.document.get("unique") for model in missing):
        await _require_unique(connection, contract)
    return missing


async def _require_unique(connection: Connection, contract: Contract) -> None:
    names = ("namespace", *contract.key_fields)
    # An index takes a missing field as null.
    same: Document = {"_id": {name: {"$ifNull": [f"${name}", None]} for name in names}, "count": {"$sum": 1}}
    steps: list[Document] = [{"$group": same}, {"$match": {"count": {"$gt": 1}}}, {"$limit": 1}]

    async def question() -> list[Document]:
        cursor = await connection.collection(contract).aggregate(steps, allowDiskUse=True)
        return await cursor.to_list()

    for found in await connection.ask(f"look for duplicates in {contract.collection}", question):
        raise UserError(_duplicates(connection, contract, found["_id"]))


async def _create(connection: Connection, contract: Contract, models: Sequence[IndexModel]) -> None:
    concern = connection.named(META, Durability.MONEY).write_concern.document
    indexes = [model.document for model in models]

    async def making() -> None:
        try:
            await connection.database.command(
                "createIndexes", contract.collection, indexes=indexes, writeConcern=concern
            )
        except OperationFailure as error:
            if error.code == DUPLICATE_KEY:
                raise UserError(_duplicates(connection, contract, (error.details or {}).get("keyValue"))) from error
            raise

    await connection.ask(f"make the indexes of {contract.collection}", making)


async def indexes_there(connection: Connection, contract: Contract) -> list[Document]:
    """Every index of a collection except that of `_id`."""
    try:
        # A collection has at most 64 indexes: the first batch has all of them.
        answer = await connection.database.command("listIndexes", contract.collection)
        return [dict(each) for each in answer["cursor"]["firstBatch"] if each["name"] != "_id_"]
    except OperationFailure as error:
        if error.code == NAMESPACE_NOT_FOUND:
            return []
        raise


def is_same(index: Document, model: IndexModel) -> bool:
    """Whether an index serves as `model`, under any name: that of a shard key has its own."""
    wanted = model.document
    plain = not {"expireAfterSeconds", "partialFilterExpression", "sparse", "collation"} & index.keys()
    return plain and _keys(index) == _keys(wanted) and bool(index.get("unique")) == bool(wanted.get("unique"))


def harm_of(contract: Contract, index: Document) -> str | None:
    """Why an index must not be there: it rejects records that are not duplicates, or deletes some."""
    if "expireAfterSeconds" in index:
        return f"{index['name']} deletes documents after {index['expireAfterSeconds']} s"
    full = {"namespace", *contract.key_fields}
    if index.get("unique") and not full <= set(index["key"]):
        missing = ", ".join(field for field in ("namespace", *contract.key_fields) if field not in index["key"])
        unique = f"{index['name']} is unique on {shown_fields(index)}, without {missing}"
        return f"{unique}: it rejects a second record that differs only there"
    return None


def shown_fields(index: Document) -> str:
    return f"({', '.join(index['key'])})"


def drop_command(contract: Contract, name: str) -> str:
    """The line for mongosh that removes an index."""
    return f"mongosh: db[{json.dumps(contract.collection)}].dropIndex({json.dumps(name)})"


def _keys(index: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Fields and directions; a direction that is not a number, such as `hashed`, stays as it is."""
    return [(field, int(way) if isinstance(way, int | float) else way) for field, way in index["key"].items()]


def _place(connection: Connection, contract: Contract) -> str:
    return f"the collection {contract.collection} of {connection.database_name} at {connection.where}"


def _duplicates(connection: Connection, contract: Contract, values: Any) -> str:
    shown = f", such as {values}" if values else ""
    return (
        f"{_place(connection, contract)} has several documents with the same "
        f"({', '.join(('namespace', *contract.key_fields))}){shown}, so its unique index cannot be made: "
        "keep one of each and delete the others, or name a new database in CC_MONGO_CONNECTION_STRING"
    )
