"""Records as documents of MongoDB and back.

Each component of a key is a field under its name in the contract, so that people can query it; `payload` is the value.
A field name in BSON cannot contain NUL, and one that begins with a dollar has a meaning. Such a name, and one that
begins with a percent sign, is written as `%` and the name with `%` and NUL as `%25` and `%00`.

A document that cannot be trusted stays where it is. The field `quarantine`, with the reason, blocks it: no write of
this program changes such a document.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple

import bson
from bson.int64 import Int64
from bson.objectid import ObjectId

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist.codec import SCHEMA_VERSION, NewerSchema
from backtest_kit.persist.contracts import ALL_CONTRACTS, Contract, Kind, WriteRule
from backtest_kit.persist.keys import check_key
from backtest_kit.persist.store import ABSENT, ANY, Expect, Key, Plain, Record, Write
from backtest_kit.persist.writing import now_ms

Document = dict[str, Any]

ROWS: Final = ALL_CONTRACTS
RECORD_ROWS: Final = tuple(row for row in ROWS.values() if row.kind is not Kind.SERIES)
ORDER: Final = "tick"
"""The order of writing, in microseconds; unique among the writes of one event loop."""
QUARANTINE: Final = "quarantine"

_NAMES: Final = 4096
"""Escaped field names in the cache: most records have the same ones."""
_ABSENT_BY_TYPE: Final = object()


class Change(NamedTuple):
    """A write with its value copied when it was issued, so that the caller may change it while the write waits."""

    write: Write
    name: Document
    """The fields that identify its document."""
    payload: Any
    written_at: int

    @property
    def contract(self) -> Contract:
        return self.write.contract

    @property
    def may_change_it(self) -> bool:
        """False where the first write wins and this one expects a record: it can change nothing."""
        return self.contract.write_rule is WriteRule.REPLACE or isinstance(self.write.expect, str)


def change_of(namespace: str, write: Write) -> Change:
    """Raises `UserError` if the key or the value cannot be stored."""
    key = check_key(write.contract, write.key)
    return Change(write, name_of(namespace, write.contract, key), to_bson(write.value), now_ms())


def name_of(namespace: str, contract: Contract, key: Key) -> Document:
    """The fields that identify a document; with the beginning of a key, those that its records share."""
    return {"namespace": namespace, **dict(zip(contract.key_fields, key, strict=False))}


def identity_of(document: Mapping[str, Any], contract: Contract) -> tuple[Any, ...]:
    """The values of `name_of`, in their order, from a document."""
    return tuple(document.get(field) for field in ("namespace", *contract.key_fields))


def matching(name: Document, expect: Expect) -> Document:
    """The filter for the document that a write may change.

    With `ABSENT` it matches nothing: the upsert inserts, and where there is a document the unique index rejects that.
    """
    rev: Any = {"$gte": 1} if expect == ANY else {"$gte": 1, "$lt": 1} if expect == ABSENT else expect
    return {**name, "rev": rev, "schemaVersion": {"$lte": SCHEMA_VERSION}, QUARANTINE: {"$exists": False}}


def expectation(write: Write) -> Expect:
    """What the filter of a write expects. Where the first write wins, it may only insert."""
    return write.expect if write.contract.write_rule is WriteRule.REPLACE else ABSENT


def update_of(change: Change, writer: str, tick: int) -> Document:
    """The update of a write. `writer` is unique to it: who finds it in the document knows that the write was done."""
    return {"$set": fields_of(change, writer, tick), "$inc": {"rev": Int64(1)}}


def document_of(change: Change, writer: str, tick: int) -> Document:
    """The document that an upsert with `update_of` would insert."""
    return {"_id": ObjectId(), **change.name, **fields_of(change, writer, tick), "rev": Int64(1)}


def fields_of(change: Change, writer: str, tick: int) -> Document:
    write = change.write
    fields: Document = {
        "payload": change.payload,
        "when": None if write.when is None else Int64(write.when),
        "writtenAt": Int64(change.written_at),
        "removed": write.removed,
        "schemaVersion": SCHEMA_VERSION,
        "writer": writer,
        "tick": Int64(tick),
    }
    return {**fields, "checksum": checksum_of(change.contract, {**change.name, **fields})}


def checksum_of(contract: Contract, document: Mapping[str, Any]) -> str:
    """A CRC-32 of the name of a document and of the fields that its last write set.

    The revision is not part of it: the server counts it, and the owner notices a wrong one as a conflict.
    """
    sealed = {name: document.get(name) for name in ("namespace", *contract.key_fields, *_SEALED)}
    return f"{zlib.crc32(bson.encode(sealed), zlib.crc32(contract.name.encode())):08x}"


def record_of_change(change: Change, rev: int) -> Record:
    """The record that a write made."""
    write = change.write
    return Record(write.key, to_plain(change.payload), int(rev), write.when, change.written_at, write.removed)


def record_of(contract: Contract, document: Mapping[str, Any], *, edited: bool = False) -> Record:
    """The record in a document. The checksum of one that an operator `edited` does not count.

    Raises:
        NewerSchema: a newer version wrote it.
        Damaged: a field is missing or of a type that this program does not write, or the checksum does not match.
    """
    version = document.get("schemaVersion")
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        raise NewerSchema(
            f"it was written by a newer version of this program (schema {version}, this one reads up to "
            f"{SCHEMA_VERSION}): upgrade; the document was not changed"
        )
    for field, types in _TYPES.items():
        if type(document.get(field, _ABSENT_BY_TYPE)) not in types:
            raise Damaged(f"its field {field} is {_shown(document, field)}")
    if document["rev"] < 1:
        raise Damaged(f"its field rev is {document['rev']}, and revisions begin at 1")
    try:
        key = check_key(contract, [document.get(field) for field in contract.key_fields])
    except UserError as error:
        raise Damaged(f"its key is not valid: {error}") from None
    if "payload" not in document:
        raise Damaged("its field payload is missing")
    when, value = document["when"], to_plain(document["payload"])
    if not edited and document.get("checksum") != checksum_of(contract, document):
        raise Damaged("its checksum does not match: it was changed on the server's disk or edited by hand")
    return Record(
        key=key,
        value=value,
        rev=int(document["rev"]),
        when=None if when is None else int(when),
        written_at=int(document["writtenAt"]),
        removed=document["removed"],
        schema_version=int(document["schemaVersion"]),
    )


def is_named(document: Mapping[str, Any], name: Document) -> bool:
    """Whether a document that was found by its `_id` has this name."""
    return all(type(document.get(field)) is type(part) and document[field] == part for field, part in name.items())


def to_bson(value: Any, path: str = "value") -> Any:
    """A copy of a plain JSON tree, with names that BSON can store.

    Raises:
        UserError: it is not a plain JSON tree.
    """
    kind = type(value)
    if kind is str or kind is bool or value is None or (kind is float and math.isfinite(value)):
        return value
    if kind is int and -(1 << 63) <= value < 1 << 63:
        return value
    if kind is dict:
        return {_escape(name, path): to_bson(item, path) for name, item in value.items()}
    if kind is list or kind is tuple:
        return [to_bson(item, path) for item in value]
    raise UserError(f"the {path} has {value!r} in it, which is not plain JSON: encode it first")


def to_plain(value: Any) -> Plain:
    """The inverse of `to_bson`.

    Raises:
        Damaged: it contains something that `to_bson` does not write.
    """
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None or (kind is float and math.isfinite(value)):
        return value  # type: ignore[no-any-return]  # one of the types of Plain
    if kind is Int64:
        return int(value)
    if kind is dict:
        return {_unescape(name): to_plain(item) for name, item in value.items()}
    if kind is list:
        return [to_plain(item) for item in value]
    raise Damaged(f"its payload has {value!r:.60} in it, a {kind.__name__}, which this program does not write")


def id_from(text: bytes) -> ObjectId | None:
    """The id in an entry of Redis, or None if that is not an id."""
    name = text.decode("latin-1")
    return ObjectId(name) if ObjectId.is_valid(name) and len(name) == len(str(ObjectId())) else None


@lru_cache(_NAMES, typed=True)
def _escape(name: object, path: str) -> str:
    if not isinstance(name, str):
        raise UserError(f"the {path} has the key {name!r}: keys are text, write {str(name)!r}")
    if name[:1] in ("$", "%") or "\0" in name:
        return "%" + name.replace("%", "%25").replace("\0", "%00")
    return name


@lru_cache(_NAMES)
def _unescape(name: str) -> str:
    return name[1:].replace("%00", "\0").replace("%25", "%") if name[:1] == "%" else name


def _shown(document: Mapping[str, Any], field: str) -> str:
    return f"{document[field]!r:.60}" if field in document else "missing"


_SEALED: Final = ("payload", "when", "writtenAt", "removed", "schemaVersion", "writer", "tick")
_WHOLE: Final = (int, Int64)
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "schemaVersion": _WHOLE,
    "rev": _WHOLE,
    "when": (*_WHOLE, type(None)),
    "writtenAt": _WHOLE,
    "removed": (bool,),
}
