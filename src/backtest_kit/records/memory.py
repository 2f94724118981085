"""`Memory`: notes of a model, found again by name, by time or by text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

import msgspec

from backtest_kit.errors import UserError
from backtest_kit.model.interval import to_datetime
from backtest_kit.persist.codec import decode, encode
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Key, KeyPart, Plain, Record, Store, check_limit
from backtest_kit.records.scope import Scope
from backtest_kit.records.unawaited import must_await

if TYPE_CHECKING:
    from backtest_kit.records.search import TextIndex

Role = Literal["system", "user", "assistant"]

_MEMORY: Final = CONTRACTS["memory"]
_ROLES: Final = get_args(Role)
_FIELDS: Final = {"value", "role", "text"}
_KEPT: Final = 32


class MemoryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One note."""

    memory_id: str
    value: Any
    role: Role
    when_ms: int | None
    """Simulation time of the note, None if it was written without one."""
    owner: str
    """The id of the signal that it belongs to, or of the strategy on the symbol."""
    removed: bool = False

    @property
    def when(self) -> datetime | None:
        return None if self.when_ms is None else to_datetime(self.when_ms)

    @property
    def content(self) -> str:
        """The value as text: a text as it is, anything else as JSON."""
        if isinstance(self.value, str):
            return self.value
        return json.dumps(self.value, ensure_ascii=False, default=str)


class Memory:
    """Notes under a bucket name. They belong to a signal, or to a strategy on a symbol.

    While a position is open, the notes of the strategy are visible too, so the reasoning before a signal is found after
    it. Notes written or removed during the position belong to the position. Notes later than the moment of the context
    are not visible.
    """

    def __init__(self, scope: Scope, bucket: str, owners: tuple[str, ...], shelves: Shelves) -> None:
        self._scope = scope
        self._bucket = bucket
        self._owners = owners
        self._shelves = shelves

    @must_await
    async def write(self, memory_id: str, value: Any, *, text: str | None = None, role: Role = "user") -> None:
        """Write `value` under a name; an earlier note of that name is replaced.

        Args:
            value: Text, or anything else that can be stored.
            text: The text that `search` matches; by default the name, and every text and number in `value`.
            role: The role of the note in `as_messages`: "system", "user" or "assistant".

        Raises:
            UserError: an argument is wrong, or part of `value` cannot be stored; the message names it.
            LookAhead: the existing record is later than this context, which was kept from an earlier minute.
            Damaged, OutOfSpace, RetryLater: as `Store.put`.
        """
        if role not in _ROLES:
            raise UserError(f"role of {memory_id!r} is {role!r}: use one of {', '.join(_ROLES)}")
        given: object = text
        if given is not None and not isinstance(given, str):
            raise UserError(f"text of {memory_id!r} is {given!r}: give a text, or leave it out")
        note: Plain = {"value": encode(value), "role": role, "text": encode(text, "text")}
        await self._scope.write(_MEMORY, self._key(self._owners[0], memory_id), note)

    @must_await
    async def read(self, memory_id: str) -> Any:
        """The value under a name, or None if there is none, it was removed, or it is later than the moment.

        Raises:
            Damaged, RetryLater: as `Store.get`.
        """
        record = await self._find(self._owners, memory_id)
        return None if record is None or record.removed else _entry(record).value

    @must_await
    async def remove(self, memory_id: str) -> bool:
        """Hide a note from `read`, `list` and `search`, and return whether there was one.

        The store keeps it, marked as removed. During a position a note of the strategy is hidden for the position only.

        Raises:
            LookAhead: the existing record is later than this context, which was kept from an earlier minute.
            Damaged, OutOfSpace, RetryLater: as `Store.put`.
        """
        beneath = await self._find(self._owners[1:], memory_id)
        return await self._scope.remove(_MEMORY, self._key(self._owners[0], memory_id), beneath)

    @must_await
    async def search(self, query: str, k: int = 5) -> list[MemoryEntry]:
        """The `k` notes that match a query best, best first: BM25 over their texts, English words by their stem.

        A note matches if it has any word of the query. Only notes visible at this moment count.

        Raises:
            UserError: as `list`, the query is not a text, or `k` is below 0.
            Damaged, RetryLater: as `Store.scan`.
        """
        given: object = query
        if not isinstance(given, str):
            raise UserError(f"query is {given!r}: give a text")
        if k < 0:
            raise UserError(f"k is {k}: give how many notes there may be at most")
        records = {record.key: record for record in await self._visible(removed=False)}
        index = self._shelves.index(self._scope.store(_MEMORY), (self._owners[-1], self._bucket))
        found = await asyncio.to_thread(index.search, records, _text, query, k)
        return [_entry(records[key]) for key in found]

    @must_await
    async def as_messages(self, *, limit: int | None = None) -> list[dict[str, str]]:
        """The newest notes, oldest first, as the `{"role": ..., "content": ...}` of chat APIs.

        Raises:
            As `list`.
        """
        entries = await self.list(limit=limit)
        return [{"role": entry.role, "content": entry.content} for entry in reversed(entries)]

    async def _find(self, owners: tuple[str, ...], memory_id: str) -> Record | None:
        """The note under a name at this moment, of the first of `owners` that has one; it may be a removed one."""
        store = self._scope.store(_MEMORY)
        for owner in owners:
            found = await store.get(_MEMORY, self._key(owner, memory_id))
            record = await self._scope.as_it_was(_MEMORY, found)
            if record is not None:
                return record
        return None

    async def _visible(self, *, removed: bool) -> list[Record]:
        """The notes visible at this moment, oldest first.

        A note of the position, removed or not, hides the strategy's note of the same name.
        """
        store, now_ms = self._scope.store(_MEMORY), self._scope.when_ms
        found: dict[KeyPart | Key, Record] = {}
        for owner in reversed(self._owners):
            for newest in await self._shelves.shelf(store, (owner, self._bucket)).read():
                # A record that is later now may have had another revision at this moment.
                record = await self._scope.as_it_was(_MEMORY, newest) if newest.later_than(now_ms) else newest
                if record is not None and not record.removed:
                    found[record.key[-1]] = record
                elif record is not None:
                    found.pop(record.key[-1], None)
                    if removed:
                        found[record.key] = record
        if len(self._owners) == 1:
            return list(found.values())
        return sorted(found.values(), key=lambda record: record.written_at if record.when is None else record.when)

    def _key(self, owner: str, memory_id: str) -> Key:
        return (owner, self._bucket, memory_id)

    def __repr__(self) -> str:
        return f"Memory({'/'.join((self._owners[0], self._bucket))})"

    @must_await
    async def list(self, *, limit: int | None = None, removed: bool = False) -> list[MemoryEntry]:
        """The notes, newest first; with `removed` also the removed ones, marked as such.

        Raises:
            UserError: the store cannot list, or `limit` is below 0.
            Damaged, RetryLater: as `Store.scan`.
        """
        check_limit(limit)
        records = await self._visible(removed=removed)
        return [_entry(record) for record in records[::-1][:limit]]


class _Seen(NamedTuple):
    record: Record
    scan: int
    """The number of the scan that first saw this revision."""


class _Shelf:
    """The notes of one owner in one bucket that have been read so far, removed ones included."""

    def __init__(self, store: Store, prefix: Key) -> None:
        self._store = store
        self._prefix = prefix
        self._seen: dict[str, _Seen] = {}
        self._scans = 0
        self._reading = asyncio.Lock()

    async def read(self) -> list[Record]:
        """The records as they are now, in order of writing.

        Only new records are fetched: the scan goes back from the newest one to the first known one. A record that moved
        during the last scan may have been missed, so known are the records that the scan before that saw.
        """
        async with self._reading:
            number, fresh = self._scans + 1, list[Record]()
            async for record in self._store.scan(_MEMORY, self._prefix, newest_first=True, include_removed=True):
                known = self._seen.get(str(record.key[-1]))
                if known is not None and known.record.rev == record.rev and known.scan < number - 1:
                    break
                fresh.append(record)
            self._scans = number
            for record in reversed(fresh):
                known = self._seen.pop(str(record.key[-1]), None)
                first = number if known is None or known.record.rev != record.rev else known.scan
                self._seen[str(record.key[-1])] = _Seen(record, first)
            return [seen.record for seen in self._seen.values()]


class Shelves:
    """A cache of memories that have been read: the shelves and indexes used last."""

    def __init__(self) -> None:
        self._shelves: dict[tuple[Store, Key], _Shelf] = {}
        self._indexes: dict[tuple[Store, Key], TextIndex] = {}

    def shelf(self, store: Store, prefix: Key) -> _Shelf:
        shelf = self._shelves.pop((store, prefix), None) or _Shelf(store, prefix)
        _keep(self._shelves, (store, prefix), shelf)
        return shelf

    def index(self, store: Store, prefix: Key) -> TextIndex:
        from backtest_kit.records.search import TextIndex

        index = self._indexes.pop((store, prefix), None) or TextIndex()
        _keep(self._indexes, (store, prefix), index)
        return index


def _keep(kept: dict[Any, Any], name: object, value: object) -> None:
    kept[name] = value
    if len(kept) > _KEPT:
        del kept[next(iter(kept))]


def _note(record: Record) -> dict[str, Any]:
    """The note in a record; a record not written by this module is a note whose value is the whole record."""
    note = record.value
    if isinstance(note, dict) and note.keys() == _FIELDS and note["role"] in _ROLES:
        return note
    return {"value": note, "role": "user", "text": None}


def _text(record: Record) -> str:
    note = _note(record)
    if note["text"] is not None:
        return str(note["text"])
    return " ".join((str(record.key[-1]), *_texts(decode(note["value"]))))


def _texts(value: Any) -> Iterator[str]:
    """Every text and number in a value, and their field names."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif value is not None:
        yield str(value)


def _entry(record: Record) -> MemoryEntry:
    note = _note(record)
    return MemoryEntry(
        memory_id=str(record.key[-1]),
        value=decode(note["value"]),
        role=note["role"],
        when_ms=record.when,
        owner=str(record.key[0]),
        removed=record.removed,
    )
