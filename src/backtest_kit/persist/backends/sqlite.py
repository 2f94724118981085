"""`SqliteStore`: every record of a program in one SQLite file, for several processes at once.

A row holds the sealed text of its record, so the checksum of the codec covers what SQLite itself does
not check; the other columns only serve to find it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from backtest_kit.errors import Damaged
from backtest_kit.persist.backends.file_candles import FileCandleStore
from backtest_kit.persist.backends.sqlite_threads import Database
from backtest_kit.persist.codec import NewerSchema, seal, unseal
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.keys import check_key, escape, path_of
from backtest_kit.persist.store import Capability, Key, Record, Write
from backtest_kit.persist.writing import check_batch, decide, now_ms

_CHUNK: Final = 256
"""Records that a listing reads at a time."""

_SELECT: Final = "SELECT removed, CAST(record AS BLOB) FROM records WHERE namespace = ? AND contract = ? AND key = ?"
_REPLACE: Final = "INSERT OR REPLACE INTO records (namespace, contract, key, removed, record) VALUES (?, ?, ?, ?, ?)"
_QUARANTINE: Final = (
    "INSERT OR IGNORE INTO quarantine (found_at, namespace, contract, key, reason, record) VALUES (?, ?, ?, ?, ?, ?)"
)


class SqliteStore:
    """The database at `path`, made at the first use.

    A write that waits longer than `busy_timeout` seconds for another process raises `RetryLater`.
    Candles lie beside it, in the directory `<path>.candles`, one Arrow file per month.
    """

    capabilities: Final = frozenset(Capability)

    def __init__(self, path: str | Path, *, busy_timeout: float = 10.0) -> None:
        self._database = Database(Path(path).absolute(), busy_timeout)
        self._namespace = ""
        self.candles = FileCandleStore(f"{self.path}.candles")

    @property
    def path(self) -> Path:
        return self._database.path

    async def open(self) -> None:
        await self._database.open()

    async def close(self) -> None:
        if not self._namespace:
            await self._database.close()

    async def get(self, contract: Contract, key: Key) -> Record | None:
        name = self._name(contract, check_key(contract, key))
        found = await self._database.read(partial(_read, contract, name, key))
        if isinstance(found, _Suspect):
            raise await self._quarantine(found)
        return found

    async def put(self, write: Write) -> Record:
        (record,) = await self._write((write,))
        return record

    async def batch(self, writes: Sequence[Write]) -> None:
        check_batch(writes)
        if writes:
            await self._write(writes)

    async def scan(
        self,
        contract: Contract,
        prefix: Key = (),
        *,
        limit: int | None = None,
        newest_first: bool = False,
        include_removed: bool = False,
    ) -> AsyncIterator[Record]:
        names = await self._database.read(
            partial(
                _list_names,
                self._name(contract, check_key(contract, prefix, prefix=True)),
                limit,
                newest_first,
                include_removed,
            )
        )
        # Names first and records by name, instead of one long select: that would keep an old state of
        # the whole file alive for as long as somebody reads, and would miss what moves while he does.
        for start in range(0, len(names), _CHUNK):
            for found in await self._database.read(partial(_read_all, contract, names[start : start + _CHUNK])):
                if isinstance(found, _Suspect):
                    raise await self._quarantine(found)
                if include_removed or not found.removed:
                    yield found

    def within(self, namespace: str) -> SqliteStore:
        if not namespace:
            return self
        inner = SqliteStore.__new__(SqliteStore)
        inner._database = self._database
        inner._namespace = f"{self._namespace}{escape(namespace, 'namespace')}/"
        inner.candles = FileCandleStore(f"{self.path}.candles/@{inner._namespace.rstrip('/')}")
        return inner

    def _name(self, contract: Contract, key: Key) -> _Name:
        return self._namespace, contract.name, "/".join(path_of(contract, key))

    async def _write(self, writes: Sequence[Write]) -> list[Record]:
        named = [(write, self._name(write.contract, check_key(write.contract, write.key))) for write in writes]
        durable = any(write.contract.durability is not Durability.CACHE for write in writes)
        done = await self._database.write(partial(_apply, named), durable=durable)
        if isinstance(done, _Suspect):
            raise await self._quarantine(done)
        return done

    async def _quarantine(self, suspect: _Suspect) -> Damaged:
        """Keep a copy of the bytes, and say what happened. The row stays: it is what blocks the key."""
        where = f"{self.path}: {suspect.name[1]} {suspect.name[2]}"
        if isinstance(suspect.error, NewerSchema):
            return NewerSchema(f"{where}: {suspect.error}")
        number = await self._database.write(partial(_keep_copy, suspect))
        return Damaged(
            f"{where}: {suspect.error}. A copy is number {number} in quarantine and the key is blocked: "
            f"`backtest-kit store quarantine restore {number}` accepts it as it is, `drop {number}` removes it"
        )


_Name = tuple[str, str, str]
"""Namespace, contract and key as they stand in the columns."""


class _Suspect:
    """A row that cannot be trusted."""

    def __init__(self, name: _Name, data: bytes, error: Damaged) -> None:
        self.name = name
        self.data = data
        self.error = error


def _read(contract: Contract, name: _Name, key: Key | None, connection: sqlite3.Connection) -> Record | _Suspect | None:
    row = connection.execute(_SELECT, name).fetchone()
    if row is None:
        return None
    removed, data = row
    try:
        record = unseal(contract, key, data)
        if key is None and "/".join(path_of(contract, record.key)) != name[2]:
            raise Damaged(f"it is the record of {record.key}")
        if removed != record.removed:
            raise Damaged("its row and its record differ in whether it was removed")
    except Damaged as error:
        return _Suspect(name, data, error)
    return record


def _read_all(contract: Contract, names: Sequence[_Name], connection: sqlite3.Connection) -> list[Record | _Suspect]:
    found = (_read(contract, name, None, connection) for name in names)
    return [record for record in found if record is not None]


def _list_names(
    prefix: _Name, limit: int | None, newest_first: bool, include_removed: bool, connection: sqlite3.Connection
) -> list[_Name]:
    namespace, contract, start = prefix
    # A slash never stands inside a component, and "0" is the character after it.
    inside = "AND (key = :start OR key > :start || '/' AND key < :start || '0')" if start else ""
    rows = connection.execute(
        f"SELECT key FROM records WHERE namespace = :namespace AND contract = :contract {inside} "  # noqa: S608
        f"{'' if include_removed else 'AND NOT removed'} ORDER BY seq {'DESC' if newest_first else ''} LIMIT :limit",
        {"namespace": namespace, "contract": contract, "start": start, "limit": -1 if limit is None else limit},
    )
    return [(namespace, contract, key) for (key,) in rows]


def _apply(writes: Sequence[tuple[Write, _Name]], connection: sqlite3.Connection) -> list[Record] | _Suspect:
    """Judge every write before the first is done, so that a refused one has changed nothing."""
    decisions = []
    for write, name in writes:
        current = _read(write.contract, name, write.key, connection)
        if isinstance(current, _Suspect):
            return current
        decisions.append((write, name, *decide(write, current)))
    rows = [
        (*name, record.removed, seal(write.contract, record)) for write, name, record, changed in decisions if changed
    ]
    for row in rows:
        connection.execute(_REPLACE, row)
    return [record for _, _, record, _ in decisions]


def _keep_copy(suspect: _Suspect, connection: sqlite3.Connection) -> int:
    connection.execute(_QUARANTINE, (now_ms(), *suspect.name, str(suspect.error), suspect.data))
    (number,) = connection.execute(
        "SELECT id FROM quarantine WHERE namespace = ? AND contract = ? AND key = ? AND record = ?",
        (*suspect.name, suspect.data),
    ).fetchone()
    return int(number)
