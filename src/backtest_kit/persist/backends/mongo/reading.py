"""Reads of documents: by the id that Redis has, by the index, in listings; and the record in a document.

A document that cannot be trusted is marked in its field `quarantine`, which blocks its key until an operator decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, Final
from urllib.parse import quote

from bson.int64 import Int64
from pymongo.asynchronous.cursor import AsyncCursor

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist.backends.mongo.connection import Connection, Deadline
from backtest_kit.persist.backends.mongo.documents import (
    QUARANTINE,
    Document,
    id_from,
    identity_of,
    is_named,
    record_of,
)
from backtest_kit.persist.codec import NewerSchema
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.keys import check_key, path_of
from backtest_kit.persist.store import Record
from backtest_kit.persist.writing import now_ms

_SAFE: Final = ":@+=,"
"""Not escaped in the name of an entry, in addition to what no address escapes."""


async def find(connection: Connection, contract: Contract, name: Document) -> Document | None:
    """The document of a name: by the id that Redis has, if that is right, else by the index."""
    entry = cache_name(contract, name)
    if connection.ids is not None and (text := await connection.ids.get(entry)) is not None:
        identity = id_from(text)
        if identity is not None:
            document = await find_one(connection, contract, {"_id": identity})
            # An entry may be old, or of another program: only the document says what it is.
            if document is not None and is_named(document, name):
                return document
        await connection.ids.drop(entry)
    document = await find_one(connection, contract, name)
    if document is not None and connection.ids is not None:
        await connection.ids.set({entry: str(document["_id"])})
    return document


async def find_one(connection: Connection, contract: Contract, wanted: Document) -> Document | None:
    document = await connection.ask(f"read a {contract.name}", lambda: connection.collection(contract).find_one(wanted))
    connection.saw_tick(document)
    return document


async def find_named(
    connection: Connection,
    contract: Contract,
    names: Sequence[Document],
    doing: str,
    deadline: Deadline | None = None,
    fields: list[str] | None = None,
) -> list[Document | None]:
    """The document of each of many names, with one query for all that differ in their last field only."""
    lasts: dict[tuple[Any, ...], list[Any]] = {}
    for name in names:
        *first, last = name.values()
        lasts.setdefault(tuple(first), []).append(last)
    collection = connection.collection(contract)
    deadline = deadline or connection.deadline()

    async def question(wanted: Document) -> list[Document]:
        return await collection.find(wanted, fields).to_list()

    def wanted(first: tuple[Any, ...]) -> Document:
        # `$in` on the last field uses the index with every planner; `$or` of whole names scans the collection on some.
        *outer, field = ("namespace", *contract.key_fields)
        some = lasts[first]
        return {**dict(zip(outer, first, strict=True)), field: some[0] if len(some) == 1 else {"$in": some}}

    questions = (connection.ask(doing, partial(question, wanted(first)), deadline) for first in lasts)
    found = {identity_of(each, contract): each for part in await asyncio.gather(*questions) for each in part}
    documents = [found.get(tuple(name.values())) for name in names]
    return [
        document if document is not None and is_named(document, name) else None
        for name, document in zip(names, documents, strict=True)
    ]


async def find_all(
    connection: Connection,
    contract: Contract,
    wanted: Document,
    *,
    sort: list[tuple[str, int]] | None = None,
    limit: int | None = None,
    fields: list[str] | None = None,
) -> list[Document]:
    if limit == 0:
        return []

    def cursor() -> AsyncCursor[Document]:
        return connection.collection(contract).find(wanted, fields, sort=sort, limit=limit or 0)

    found = await connection.ask_all(f"list {contract.collection}", cursor)
    for document in found:
        connection.saw_tick(document)
    return found


def cache_name(contract: Contract, name: Document) -> str:
    """The name of a document's entry in Redis; no two documents have the same."""
    namespace, *key = name.values()
    return "/".join((contract.name, f"@{namespace}", *(quote(str(part), _SAFE) for part in key)))


# -- records ---------------------------------------------------------------------------------------------


async def record_in(connection: Connection, contract: Contract, document: Document | None) -> Record | None:
    """The record in a document that was read.

    Raises:
        Damaged: it cannot be trusted; it is in quarantine now, if it was not before.
    """
    if document is None:
        return None
    if QUARANTINE in document:
        raise _blocked(connection, contract, document)
    try:
        return record_of(contract, document)
    except Damaged as error:
        raise await _block(connection, contract, document, error) from None


async def _block(connection: Connection, contract: Contract, document: Document, error: Damaged) -> Damaged:
    """Put a document in quarantine, and return the error to raise.

    A document of a newer version is sound: it is left alone, and can be read after an upgrade.
    """
    if isinstance(error, NewerSchema):
        return NewerSchema(f"{_place(connection, contract, document)}: {error}")
    mark = {QUARANTINE: {"reason": str(error), "foundAt": Int64(now_ms())}}
    # Not a document that was written anew since it was read.
    as_read = {"_id": document["_id"], QUARANTINE: {"$exists": False}, "tick": document.get("tick")}
    collection = connection.collection(contract)
    await connection.ask("mark what is damaged", lambda: collection.update_one(as_read, {"$set": mark}))
    return _blocked(connection, contract, {**document, **mark})


def _blocked(connection: Connection, contract: Contract, document: Document) -> Damaged:
    path = path_to(contract, document)
    return Damaged(
        f"{_place(connection, contract, document)}: {reason_of(document)}. The document stays there and its key is "
        f"blocked: correct it and run `backtest-kit store quarantine restore {path}`, or `... drop` it"
    )


def _place(connection: Connection, contract: Contract, document: Document) -> str:
    where = f"{contract.collection} of {connection.database_name} at {connection.where}"
    return f"{where}: {path_to(contract, document)}"


def reason_of(document: Document) -> str:
    """Why a document is in quarantine."""
    return str((document.get(QUARANTINE) or {}).get("reason"))


def path_to(contract: Contract, document: Document) -> str:
    """The name of a document in the commands on the quarantine, in the same form as a path of files."""
    namespace = document.get("namespace")
    above = "".join(f"@{part}/" for part in namespace.split("/")) if isinstance(namespace, str) and namespace else ""
    try:
        key = check_key(contract, [document.get(field) for field in contract.key_fields])
    except UserError:
        return f"{above}{contract.name}/_id/{document['_id']}"
    return f"{above}{contract.name}/{'/'.join(path_of(contract, key))}"
