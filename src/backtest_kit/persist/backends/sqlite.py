"""`SqliteStore`: every record of a program in one SQLite file, for several processes at once.

A row holds the sealed text of its record, so the checksum of the codec covers what SQLite itself does
not check; the other columns only serve to find it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Final

import msgspec

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist.backends.file_candles import FileCandleStore
from backtest_kit.persist.backends.sqlite_threads import Database
from backtest_kit.persist.codec import NewerSchema, parse, reseal, seal, unseal
from backtest_kit.persist.contracts import CONTRACTS, LEASE, Contract, Durability
from backtest_kit.persist.keys import check_key, escape, path_of, unescape
from backtest_kit.persist.quarantine import Quarantined
from backtest_kit.persist.store import Capability, Key, Record, Write
from backtest_kit.persist.upkeep import Entry
from backtest_kit.persist.writing import check_batch, decide, now_ms

_CHUNK: Final = 256
"""Records that a listing reads at a time."""

_CONTRACTS: Final = {**CONTRACTS, LEASE.name: LEASE}

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

    async def audit(self, *, deep: bool = False) -> AsyncIterator[Entry]:
        last = 0
        while rows := await self._database.read(partial(_audit_rows, last)):
            for _, entry in rows:
                yield entry
            last = rows[-1][0]
        if deep:
            for problem in await self._database.read(_integrity):
                yield Entry("", "database", self.path.name, 0, fault=problem)

    async def namespaces(self) -> list[tuple[str, ...]]:
        found = await self._database.read(
            lambda connection: connection.execute(
                "SELECT DISTINCT namespace FROM records WHERE namespace > ''"
            ).fetchall()
        )
        return [tuple(str(unescape(name, "namespace") or name) for name in text.split("/")[:-1]) for (text,) in found]

    async def quarantined(self) -> list[Quarantined]:
        return await self._database.read(_list_quarantine)

    async def restore(self, path: str) -> None:
        await self._database.write(partial(_restore, _find(path)))

    async def drop(self, path: str) -> None:
        await self._database.write(partial(_drop, _find(path)))

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
        await self._database.write(partial(_keep_copy, suspect))
        path = _path(suspect.name)
        return Damaged(
            f"{where}: {suspect.error}. A copy is in quarantine and the key is blocked: "
            f"`backtest-kit store quarantine restore {path}` accepts it as it is, `... drop {path}` gives it up"
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


def _keep_copy(suspect: _Suspect, connection: sqlite3.Connection) -> None:
    connection.execute(_QUARANTINE, (now_ms(), *suspect.name, str(suspect.error), suspect.data))


def _audit_rows(after: int, connection: sqlite3.Connection) -> list[tuple[int, Entry]]:
    rows = connection.execute(
        "SELECT seq, namespace, contract, key, removed, length(record) FROM records WHERE seq > ? ORDER BY seq LIMIT ?",
        (after, _CHUNK),
    )
    entries = []
    for seq, namespace, contract, key, removed, size in rows.fetchall():
        fault = None
        row = _CONTRACTS.get(contract)
        if row is None:
            fault = f"no contract of this version is called {contract!r}"
        else:
            found = _read(row, (namespace, contract, key), None, connection)
            fault = str(found.error) if isinstance(found, _Suspect) else None
        entries.append((seq, Entry(namespace, contract, key, size or 0, bool(removed), fault)))
    return entries


def _integrity(connection: sqlite3.Connection) -> list[str]:
    return [text for (text,) in connection.execute("PRAGMA integrity_check") if text != "ok"]


def _path(name: _Name) -> str:
    """A row's name in the operations on the quarantine, in the form that files have theirs."""
    namespace, contract, key = name
    spaces = "".join(f"@{part}/" for part in namespace.split("/")[:-1])
    return f"{spaces}{contract}/{key}"


def _find(path: str) -> _Name:
    parts = path.split("/")
    depth = sum(1 for _ in takewhile(lambda part: part.startswith("@"), parts))
    namespace = "".join(f"{part[1:]}/" for part in parts[:depth])
    return namespace, "".join(parts[depth : depth + 1]), "/".join(parts[depth + 1 :])


def _list_quarantine(connection: sqlite3.Connection) -> list[Quarantined]:
    rows = connection.execute(
        "SELECT namespace, contract, key, reason, max(found_at) FROM quarantine GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    )
    return [
        Quarantined(_path((namespace, contract, key)), contract, key.split("/"), reason, found_at)
        for namespace, contract, key, reason, found_at in rows
    ]


def _held(name: _Name, connection: sqlite3.Connection) -> bytes:
    """The bytes of the row that is in quarantine."""
    where = "WHERE namespace = ? AND contract = ? AND key = ?"
    if not connection.execute(f"SELECT 1 FROM quarantine {where}", name).fetchone():  # noqa: S608
        raise UserError(f"nothing in quarantine is called {_path(name)!r}: see `backtest-kit store quarantine list`")
    (data,) = connection.execute(f"SELECT CAST(record AS BLOB) FROM records {where}", name).fetchone() or (b"",)  # noqa: S608
    return bytes(data or b"")


def _restore(name: _Name, connection: sqlite3.Connection) -> None:
    data = _held(name, connection)
    contract = _CONTRACTS[name[1]]
    fields = parse(data)
    key = tuple(fields["key"].values()) if isinstance(fields, dict) and isinstance(fields.get("key"), dict) else ()
    record = reseal(contract, key, data)
    if "/".join(path_of(contract, check_key(contract, record.key))) != name[2]:
        raise Damaged(f"it is the record of {record.key}: drop {_path(name)}, and write it under its own key")
    # Nobody who knew the record before the damage may take it for the one he read.
    record = msgspec.structs.replace(record, rev=record.rev + 1)
    connection.execute(_REPLACE, (*name, record.removed, seal(contract, record)))
    connection.execute("DELETE FROM quarantine WHERE namespace = ? AND contract = ? AND key = ?", name)


def _drop(name: _Name, connection: sqlite3.Connection) -> None:
    _held(name, connection)
    for table in ("records", "quarantine"):
        connection.execute(f"DELETE FROM {table} WHERE namespace = ? AND contract = ? AND key = ?", name)  # noqa: S608
