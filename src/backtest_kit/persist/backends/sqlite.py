"""`SqliteStore`: every record of a program in one SQLite file, for several processes at once.

A row holds the sealed text of its record, so the checksum of the codec covers what SQLite itself does
not check; the other columns only serve to find it.
"""

from __future__ import annotations

import asyncio
import sqlite3
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec

from backtest_kit.errors import BacktestKitError, Damaged, OutOfSpace, RetryLater, UserError
from backtest_kit.persist.backends import file_operations, sqlite_diagnosis
from backtest_kit.persist.backends.file_candles import FileCandleStore
from backtest_kit.persist.backends.file_root import Root
from backtest_kit.persist.backends.sqlite_threads import Database
from backtest_kit.persist.codec import (
    NewerSchema,
    dump_record,
    dump_value,
    reseal,
    seal,
    seal_text,
    unseal,
    unseal_head,
)
from backtest_kit.persist.contracts import ALL_CONTRACTS, Contract, Durability, WriteRule
from backtest_kit.persist.diagnosis import SAMPLES, Reading, Status
from backtest_kit.persist.files import Disk, disk_error
from backtest_kit.persist.keys import check_key, escape, path_of, unescape
from backtest_kit.persist.quarantine import Quarantined
from backtest_kit.persist.store import Capability, Key, Record, Write, check_limit
from backtest_kit.persist.upkeep import Finding, require_namespace, require_prunable
from backtest_kit.persist.writing import check_batch, decide, now_ms

T = TypeVar("T")

_CHUNK: Final = 256
"""Records that a listing reads at a time."""

_SELECT: Final = "SELECT removed, CAST(record AS BLOB) FROM records WHERE namespace = ? AND contract = ? AND key = ?"
_WRITE: Final = """
    INSERT INTO records (namespace, contract, key, removed, record, seq)
    VALUES (?1, ?2, ?3, ?4, ?5,
        (SELECT coalesce(max(seq), 0) + 1 FROM records WHERE namespace = ?1 AND contract = ?2))
    ON CONFLICT (namespace, contract, key)
    DO UPDATE SET removed = excluded.removed, record = excluded.record, seq = excluded.seq
"""
"""In place, where there is a row: replacing it would touch more pages, and every page is synced."""
_QUARANTINE: Final = (
    "INSERT OR IGNORE INTO quarantine (found_at, namespace, contract, key, reason, record) VALUES (?, ?, ?, ?, ?, ?)"
)


class SqliteStore:
    """The database at `path`, made at the first use.

    With `existing` it is opened to look at it: it has to be a store, nothing is made in it, and it may be
    read-only. A write that waits longer than `busy_timeout` seconds for another process raises `RetryLater`.
    Candles lie beside it, in the directory `<path>.candles`, one Arrow file per month.
    """

    capabilities: Final = frozenset(Capability)

    def __init__(self, path: str | Path, *, busy_timeout: float = 10.0, existing: bool = False) -> None:
        self._database = Database(Path(path).absolute(), busy_timeout, existing=existing)
        self._namespace = ""
        self._files = _CandleFiles(self.path)
        self.candles = self._files.store("")

    @property
    def path(self) -> Path:
        return self._database.path

    async def open(self) -> None:
        await self._database.open()

    async def close(self) -> None:
        if not self._namespace:
            await self._database.close()
            await asyncio.to_thread(self._files.close)

    async def get(self, contract: Contract, key: Key) -> Record | None:
        name = self._name(contract, check_key(contract, key))
        found = await self._database.read(partial(_read, contract, name, key))
        if isinstance(found, _Suspect):
            raise await self._quarantine(found)
        return found

    async def put(self, write: Write) -> Record:
        (record,) = await self._write((write,))
        return record

    async def put_each(self, writes: Sequence[Write]) -> list[Record | BaseException]:
        """As `PutsEach.put_each`."""
        changes, durable = self._changes(writes)
        try:
            done = await self._database.write(partial(_apply_each, changes), durable=durable)
        except BacktestKitError:
            # One value too large, say, must not fail the others; what was written all the same is written again.
            return await asyncio.gather(*map(self.put, writes), return_exceptions=True)
        return [await self._quarantine(each) if isinstance(each, _Suspect) else each for each in done]

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
        check_limit(limit)
        ids = await self._database.read(
            partial(
                _list_ids,
                self._name(contract, check_key(contract, prefix, prefix=True)),
                limit,
                newest_first,
                include_removed,
            )
        )
        # Numbers of rows first, 8 bytes each, and records by them, instead of one long select: that would keep an
        # old state of the whole file alive for as long as somebody reads, and would miss what moves while he does.
        for start in range(0, len(ids), _CHUNK):
            for found in await self._database.read(partial(_read_all, contract, ids[start : start + _CHUNK])):
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
        inner._files = self._files
        inner.candles = self._files.store(inner._namespace)
        return inner

    async def identity(self) -> str:
        """As `Identified.identity`."""
        return f"sqlite:{await asyncio.to_thread(self.path.resolve)}/{self._namespace}"

    async def namespaces(self) -> list[tuple[str, ...]]:
        depth = self._namespace.count("/")
        found = {*await self._database.read(partial(_list_namespaces, self._namespace))}
        found |= {*await asyncio.to_thread(self._files.namespaces, self._namespace)}
        paths = [[str(unescape(name, "namespace") or name) for name in text.split("/")[depth:-1]] for text in found]
        return [tuple(path) for path in paths]

    async def prune(self, contract: Contract, revisions: Mapping[Key, int]) -> int:
        require_prunable(contract)
        doomed = [(self._name(contract, check_key(contract, key)), key, rev) for key, rev in revisions.items()]
        pruned = 0
        # In parts, because whoever trades waits for the end of each.
        for start in range(0, len(doomed), _CHUNK):
            pruned += await self._database.write(partial(_prune, contract, doomed[start : start + _CHUNK]))
        return pruned

    async def count(self, contract: Contract) -> int:
        return await self._database.read(partial(_count, self._name(contract, ())))

    async def forget(self) -> None:
        require_namespace(bool(self._namespace))
        await self._database.write(partial(_forget, self._namespace))
        await asyncio.to_thread(self._files.forget, self._namespace)

    async def check(self, *, deep: bool = False) -> list[Finding]:
        found = [
            Finding(item.path, f"in quarantine, its key is blocked: {item.reason}")
            for item in await self._database.read(_list_quarantine)
        ]
        known, last = {finding.path for finding in found}, 0
        while chunk := await self._database.read(partial(_check_rows, last)):
            found += [finding for _, finding in chunk if finding is not None and finding.path not in known]
            last = chunk[-1][0]
        if deep:
            found += await self._database.read(_check_integrity)
        if await asyncio.to_thread(self._files.exists):
            found += await asyncio.to_thread(file_operations.check, self._files.root, deep=deep)
        return sorted(found, key=lambda finding: finding.path)

    async def examine(self, *, samples: int = SAMPLES) -> list[Reading]:
        """As `Examined.examine`."""
        readings = await asyncio.to_thread(sqlite_diagnosis.examine_file, self.path, samples)
        if {Status.FAULT, Status.NEW} & {reading.status for reading in readings}:
            return readings
        try:
            readings += await self._database.read(sqlite_diagnosis.examine_connection)
        except BacktestKitError as error:
            return [*readings, Reading("schema", Status.FAULT, str(error))]
        return [*readings, await asyncio.to_thread(sqlite_diagnosis.examine_write_lock, self.path)]

    async def quarantined(self) -> list[Quarantined]:
        files = await asyncio.to_thread(self._files.root.quarantine.list)
        return sorted([*await self._database.read(_list_quarantine), *files], key=lambda item: item.path)

    async def restore(self, path: str) -> Record | None:
        if _is_candles(path):
            return await asyncio.to_thread(self._files.operate, file_operations.restore, path)
        return await self._database.write(partial(_restore, path))

    async def drop(self, path: str) -> Quarantined:
        if _is_candles(path):
            return await asyncio.to_thread(self._files.operate, file_operations.drop, path)
        return await self._database.write(partial(_drop, path))

    def _name(self, contract: Contract, key: Key) -> _Name:
        return self._namespace, contract.name, "/".join(path_of(contract, key))

    async def _write(self, writes: Sequence[Write]) -> list[Record]:
        changes, durable = self._changes(writes)
        done = await self._database.write(partial(_apply, changes), durable=durable)
        if isinstance(done, _Suspect):
            raise await self._quarantine(done)
        return done

    def _changes(self, writes: Sequence[Write]) -> tuple[list[_Change], bool]:
        """`writes` on their way, and whether they have to be on the disk when they return."""
        # The values are written out here and now: nobody can change them while they wait for their turn.
        changes = [
            _Change(write, self._name(write.contract, check_key(write.contract, write.key)), dump_value(write.value))
            for write in writes
        ]
        return changes, any(write.contract.durability is not Durability.CACHE for write in writes)

    async def _quarantine(self, suspect: _Suspect) -> Damaged:
        """Keep a copy of the bytes, and say what happened. The row stays: it is what blocks the key."""
        where = f"{self.path}: {suspect.name[1]} {suspect.name[2]}"
        if isinstance(suspect.error, NewerSchema):
            return NewerSchema(f"{where}: {suspect.error}")
        try:
            await self._database.write(partial(_keep_copy, suspect))
        except (RetryLater, OutOfSpace) as error:
            return Damaged(f"{where}: {suspect.error}. It stays there and blocks its key; no copy is kept: {error}")
        path = _path(suspect.name)
        return Damaged(
            f"{where}: {suspect.error}. A copy is in quarantine and the key is blocked: "
            f"`backtest-kit store quarantine restore {path}` accepts it as it is, `... drop {path}` gives it up"
        )


_Name = tuple[str, str, str]
"""Namespace, contract and key as they stand in the columns."""


class _Suspect(NamedTuple):
    """A row that cannot be trusted."""

    name: _Name
    data: bytes
    error: Damaged


class _Change(NamedTuple):
    """A write on its way to the database."""

    write: Write
    name: _Name
    value: bytes


def _read(
    contract: Contract,
    name: _Name,
    key: Key | None,
    connection: sqlite3.Connection,
    open_sealed: Callable[[Contract, Key | None, bytes], Record] = unseal,
) -> Record | _Suspect | None:
    row = connection.execute(_SELECT, name).fetchone()
    if row is None:
        return None
    removed, data = row
    try:
        record = open_sealed(contract, key, data or b"")
        if key is None and "/".join(path_of(contract, record.key)) != name[2]:
            raise Damaged(f"it is the record of {record.key}")
        if removed != record.removed:
            raise Damaged("its row and its record differ in whether it was removed")
    except Damaged as error:
        return _Suspect(name, data or b"", error)
    return record


def _read_all(contract: Contract, ids: Iterable[int], connection: sqlite3.Connection) -> list[Record | _Suspect]:
    found = []
    for number in ids:
        name = connection.execute("SELECT namespace, contract, key FROM records WHERE id = ?", (number,)).fetchone()
        record = None if name is None or name[1] != contract.name else _read(contract, name, None, connection)
        if record is not None:
            found.append(record)
    return found


def _list_ids(
    prefix: _Name, limit: int | None, newest_first: bool, include_removed: bool, connection: sqlite3.Connection
) -> array[int]:
    namespace, contract, start = prefix
    # A slash never stands inside a component, and "0" is the character after it.
    inside = "AND (key = :start OR key > :start || '/' AND key < :start || '0')" if start else ""
    # What was removed is passed over when it is read, and here only where it would count.
    present = "" if include_removed or limit is None else "AND NOT removed"
    rows = connection.execute(
        f"SELECT id FROM records WHERE namespace = :namespace AND contract = :contract {inside} "  # noqa: S608
        f"{present} ORDER BY seq {'DESC' if newest_first else ''} LIMIT :limit",
        {"namespace": namespace, "contract": contract, "start": start, "limit": -1 if limit is None else limit},
    )
    return array("q", (number for (number,) in rows))


def _count(name: _Name, connection: sqlite3.Connection) -> int:
    row = connection.execute(
        "SELECT count(*) FROM records WHERE namespace = ? AND contract = ? AND NOT removed", name[:2]
    ).fetchone()
    return int(row[0])


def _apply(changes: Sequence[_Change], connection: sqlite3.Connection) -> list[Record] | _Suspect:
    """Judge every write before the first is done, so that a refused one has changed nothing."""
    records, rows = [], []
    for write, name, value in changes:
        first_wins = write.contract.write_rule is WriteRule.FIRST_WINS
        current = _read(write.contract, name, write.key, connection, unseal if first_wins else unseal_head)
        if isinstance(current, _Suspect):
            return current
        record, changed = decide(write, current)
        records.append(record)
        if changed:
            rows.append((*name, record.removed, seal_text(dump_record(write.contract, record, value))))
    for row in rows:
        connection.execute(_WRITE, row)
    return records


def _apply_each(changes: Sequence[_Change], connection: sqlite3.Connection) -> list[Record | BaseException | _Suspect]:
    done: list[Record | BaseException | _Suspect] = []
    for change in changes:
        try:
            applied = _apply((change,), connection)
        except BacktestKitError as error:
            done.append(error)
        else:
            done.append(applied if isinstance(applied, _Suspect) else applied[0])
    return done


def _prune(contract: Contract, doomed: Sequence[tuple[_Name, Key, int]], connection: sqlite3.Connection) -> int:
    pruned = 0
    for name, key, rev in doomed:
        found = _read(contract, name, key, connection, unseal_head)
        if isinstance(found, Record) and found.rev == rev:
            connection.execute("DELETE FROM records WHERE namespace = ? AND contract = ? AND key = ?", name)
            pruned += 1
    return pruned


def _forget(namespace: str, connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM records WHERE substr(namespace, 1, ?) = ?", (len(namespace), namespace))


def _keep_copy(suspect: _Suspect, connection: sqlite3.Connection) -> None:
    connection.execute(_QUARANTINE, (now_ms(), *suspect.name, str(suspect.error), suspect.data))


def _check_rows(after: int, connection: sqlite3.Connection) -> list[tuple[int, Finding | None]]:
    rows = connection.execute(
        "SELECT id, namespace, contract, key FROM records WHERE id > ? ORDER BY id LIMIT ?", (after, _CHUNK)
    )
    return [(number, _check_row(name, connection)) for number, *name in rows.fetchall()]


def _check_row(name: Sequence[str], connection: sqlite3.Connection) -> Finding | None:
    namespace, contract, key = name
    row = ALL_CONTRACTS.get(contract)
    if row is None:
        return Finding(_path((namespace, contract, key)), f"no contract of this version is called {contract!r}")
    found = _read(row, (namespace, contract, key), None, connection)
    return Finding(_path(found.name), str(found.error)) if isinstance(found, _Suspect) else None


def _check_integrity(connection: sqlite3.Connection) -> list[Finding]:
    rows = connection.execute("PRAGMA integrity_check").fetchall()
    return [Finding("the database", text) for (text,) in rows if text != "ok"]


def _list_namespaces(above: str, connection: sqlite3.Connection) -> list[str]:
    rows = connection.execute("SELECT DISTINCT namespace FROM records WHERE namespace > ?", (above,)).fetchall()
    return [namespace for (namespace,) in rows if namespace.startswith(above)]


def _path(name: _Name) -> str:
    """A row's name in the operations on the quarantine, in the form that files have theirs."""
    namespace, contract, key = name
    return f"{_directory(namespace)}{contract}/{key}"


def _directory(namespace: str) -> str:
    return "".join(f"@{part}/" for part in namespace.split("/")[:-1])


def _is_candles(path: str) -> bool:
    return next((part for part in path.split("/") if not part.startswith("@")), "") == "candle"


def _list_quarantine(connection: sqlite3.Connection) -> list[Quarantined]:
    rows = connection.execute(
        "SELECT namespace, contract, key, reason, max(found_at) FROM quarantine GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    )
    return [
        Quarantined(_path((namespace, contract, key)), contract, key.split("/"), reason, found_at)
        for namespace, contract, key, reason, found_at in rows
    ]


def _find(path: str, connection: sqlite3.Connection) -> tuple[_Name, Quarantined]:
    parts = path.split("/")
    depth = sum(1 for _ in takewhile(lambda part: part.startswith("@"), parts))
    for item in _list_quarantine(connection):
        if item.path == path:
            namespace = "".join(f"{part[1:]}/" for part in parts[:depth])
            return (namespace, item.contract, "/".join(parts[depth + 1 :])), item
    raise UserError(f"nothing in quarantine is called {path!r}: see `backtest-kit store quarantine list`")


def _restore(path: str, connection: sqlite3.Connection) -> Record:
    name, _ = _find(path, connection)
    contract = ALL_CONTRACTS[name[1]]
    row = connection.execute(_SELECT, name).fetchone()
    try:
        record = reseal(contract, b"" if row is None else row[1] or b"")
        if "/".join(path_of(contract, check_key(contract, record.key))) != name[2]:
            raise Damaged(f"it is the record of {record.key}")
    except Damaged as error:
        raise UserError(f"{path} is still damaged: {error}; mend its row in `records`, or drop it") from None
    # Nobody who knew the record before the damage may take it for the one that he read.
    record = msgspec.structs.replace(record, rev=record.rev + 1)
    connection.execute(_WRITE, (*name, record.removed, seal(contract, record)))
    connection.execute("DELETE FROM quarantine WHERE namespace = ? AND contract = ? AND key = ?", name)
    return record


def _drop(path: str, connection: sqlite3.Connection) -> Quarantined:
    name, item = _find(path, connection)
    for table in ("records", "quarantine"):
        connection.execute(f"DELETE FROM {table} WHERE namespace = ? AND contract = ? AND key = ?", name)  # noqa: S608
    return item


class _CandleFiles:
    """The directory of the candles beside the database, and what an operator does there."""

    def __init__(self, path: Path) -> None:
        self.root = Root(f"{path}.candles", Disk())

    def exists(self) -> bool:
        return self.root.disk.exists(self.root.path)

    def store(self, namespace: str) -> FileCandleStore:
        root = self.root
        return FileCandleStore(
            root.path, prefix=_directory(namespace), disk=root.disk, locks=root.locks, quarantine=root.quarantine
        )

    def forget(self, namespace: str) -> None:
        if self.exists():
            self.root.open()
            file_operations.forget(self.root, _directory(namespace))

    def namespaces(self, above: str) -> list[str]:
        """The namespaces below `above` that have a directory of candles, as their rows would have them."""
        found = []
        for entry in self.root.disk.entries(f"{self.root.path}/{_directory(above)}"):
            if entry.name.startswith("@"):
                name = f"{above}{entry.name[1:]}/"
                found += [name, *self.namespaces(name)]
        return found

    def close(self) -> None:
        self.root.close()
        self.root.locks.close()

    def operate(self, operation: Callable[[Root, str], T], path: str) -> T:
        self.root.open()
        try:
            return operation(self.root, path)
        except OSError as error:
            raise disk_error(error, "change", self.root.quarantine.place(path)) from error
