"""Reads of documents: by the id that Redis knows, by the index, and what a document says once nothing holds it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, Final
from urllib.parse import quote

from pymongo.asynchronous.cursor import AsyncCursor

from backtest_kit.errors import Damaged
from backtest_kit.persist.backends import mongo_damage
from backtest_kit.persist.backends.mongo_client import Link
from backtest_kit.persist.backends.mongo_documents import Document, id_from, identity_of, is_named, record_of
from backtest_kit.persist.backends.mongo_errors import Patience
from backtest_kit.persist.backends.mongo_intents import settle
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.store import Record

_LETTERS: Final = ":@+=,"
"""Of a part of a key in the name of an entry, beside those of any address."""


async def find(link: Link, contract: Contract, name: Document) -> Document | None:
    """The document of a name: by the id that Redis knows, if that is right, else by the index."""
    entry = cache_name(contract, name)
    if link.ids is not None and (text := await link.ids.get(entry)) is not None:
        identity = id_from(text)
        if identity is not None:
            document = await find_one(link, contract, {"_id": identity})
            if document is not None and is_named(document, name):
                return document
        await link.ids.drop(entry)
    document = await find_one(link, contract, name)
    if document is not None and link.ids is not None:
        await link.ids.set({entry: str(document["_id"])})
    return document


async def find_one(link: Link, contract: Contract, wanted: Document) -> Document | None:
    document = await link.ask(f"read a {contract.name}", lambda: link.collection(contract).find_one(wanted))
    link.saw_tick(document)
    return document


async def find_named(
    link: Link,
    contract: Contract,
    names: Sequence[Document],
    doing: str,
    patience: Patience | None = None,
    fields: list[str] | None = None,
) -> list[Document | None]:
    """The document of each of many names, one question for all that differ in their last field only.

    That is what every planner answers from the index; `$or` of whole names is for some a search through everything.
    """
    lasts: dict[tuple[Any, ...], list[Any]] = {}
    for name in names:
        *first, last = name.values()
        lasts.setdefault(tuple(first), []).append(last)
    collection = link.collection(contract)
    patience = patience or link.patience()

    async def question(wanted: Document) -> list[Document]:
        return await collection.find(wanted, fields).to_list()

    def wanted(first: tuple[Any, ...]) -> Document:
        *outer, field = ("namespace", *contract.key_fields)
        some = lasts[first]
        return {**dict(zip(outer, first, strict=True)), field: some[0] if len(some) == 1 else {"$in": some}}

    read = await asyncio.gather(*(link.ask(doing, partial(question, wanted(first)), patience) for first in lasts))
    found = {identity_of(document, contract): document for part in read for document in part}
    documents = [found.get(tuple(name.values())) for name in names]
    return [
        document if document is not None and is_named(document, name) else None
        for name, document in zip(names, documents, strict=True)
    ]


async def find_all(
    link: Link,
    contract: Contract,
    wanted: Document,
    sort: list[tuple[str, int]] | None,
    limit: int | None,
    fields: list[str] | None,
) -> list[Document]:
    if limit == 0:
        return []

    def cursor() -> AsyncCursor[Document]:
        return link.collection(contract).find(wanted, fields, sort=sort, limit=limit or 0)

    found = await link.ask_all(f"list {contract.collection}", cursor)
    for document in found:
        link.saw_tick(document)
    return found


async def standing(link: Link, contract: Contract, name: Document | None, document: Document | None) -> Record | None:
    """The record in a document that was read, once nothing holds it."""
    patience = link.patience()
    while document is not None:
        hold = document.get("hold")
        if not hold:
            if document.get("rev") == 0:
                return None
            try:
                return record_of(contract, document)
            except Damaged as error:
                raise await mongo_damage.block(link, contract, document, error) from None
        if "intent" not in hold:
            raise mongo_damage.blocked(link, contract, document)
        await settle(link, hold["intent"], contract, patience)
        wanted = {"_id": document["_id"]} if name is None else name
        document = await find_one(link, contract, wanted)
    return None


def cache_name(contract: Contract, name: Document) -> str:
    """What the entry of a document is called in Redis; no two documents share one."""
    namespace, *key = name.values()
    return "/".join((contract.name, f"@{namespace}", *(quote(str(part), _LETTERS) for part in key)))
