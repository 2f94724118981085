"""`SqliteStore`: every record of a program in one SQLite file, for several processes at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from backtest_kit.errors import BacktestKitError, Damaged, OutOfSpace, RetryLater
from backtest_kit.persist.backends import file_operations, sqlite_diagnosis, sqlite_rows
from backtest_kit.persist.backends.file_candles import FileCandleStore
from backtest_kit.persist.backends.file_root import Root
from backtest_kit.persist.backends.sqlite_rows import CHUNK, Change, Name, Suspect, directory_of, path_to
from backtest_kit.persist.backends.sqlite_threads import Database
from backtest_kit.persist.codec import NewerSchema, dump_value
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.files import Disk, disk_error
from backtest_kit.persist.keys import check_key, escape, path_of, unescape
from backtest_kit.persist.store import Capability, Key, Record, Store, Write, check_limit
from backtest_kit.persist.upkeep import (
    SAMPLES,
    Finding,
    Quarantined,
    Reading,
    Status,
    require_namespace,
    require_prunable,
)
from backtest_kit.persist.writing import check_batch

T = TypeVar("T")


class SqliteStore(Store):
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
        found = await self._database.read(partial(sqlite_rows.read, contract, name, key))
        if isinstance(found, Suspect):
            raise await self._quarantine(found)
        return found

    async def put(self, write: Write) -> Record:
        (record,) = await self._write((write,))
        return record

    async def put_each(self, writes: Sequence[Write]) -> list[Record | BaseException]:
        changes, durable = self._changes(writes)
        try:
            done = await self._database.write(partial(sqlite_rows.apply_each, changes), durable=durable)
        except BacktestKitError:
            # One value too large, say, must not fail the others; what was written all the same is written again.
            return await asyncio.gather(*map(self.put, writes), return_exceptions=True)
        return [await self._quarantine(each) if isinstance(each, Suspect) else each for each in done]

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
                sqlite_rows.list_numbers,
                self._name(contract, check_key(contract, prefix, prefix=True)),
                contract,
                limit,
                newest_first,
                include_removed,
            )
        )
        # Numbers of rows first, 8 bytes each, and records by them, instead of one long select: that would keep an
        # old state of the whole file alive for as long as somebody reads, and would miss what moves while he does.
        for start in range(0, len(ids), CHUNK):
            part = partial(sqlite_rows.read_all, contract, self._namespace, ids[start : start + CHUNK])
            for found in await self._database.read(part):
                if isinstance(found, Suspect):
                    raise await self._quarantine(found)
                if include_removed or not found.removed:
                    yield found

    def namespace(self, name: str) -> SqliteStore:
        if not name:
            return self
        inner = SqliteStore.__new__(SqliteStore)
        inner._database = self._database
        inner._namespace = f"{self._namespace}{escape(name, 'namespace')}/"
        inner._files = self._files
        inner.candles = self._files.store(inner._namespace)
        return inner

    async def identity(self) -> str:
        return f"sqlite:{await asyncio.to_thread(self.path.resolve)}/{self._namespace}"

    async def namespaces(self) -> list[tuple[str, ...]]:
        depth = self._namespace.count("/")
        found = {*await self._database.read(partial(sqlite_rows.list_namespaces, self._namespace))}
        found |= {*await asyncio.to_thread(self._files.namespaces, self._namespace)}
        paths = [[str(unescape(name, "namespace") or name) for name in text.split("/")[depth:-1]] for text in found]
        return [tuple(path) for path in paths]

    async def prune(self, contract: Contract, revisions: Mapping[Key, int]) -> int:
        require_prunable(contract)
        doomed = [(self._name(contract, check_key(contract, key)), key, rev) for key, rev in revisions.items()]
        pruned = 0
        # In parts, because whoever trades waits for the end of each.
        for start in range(0, len(doomed), CHUNK):
            pruned += await self._database.write(partial(sqlite_rows.prune, contract, doomed[start : start + CHUNK]))
        return pruned

    async def count(self, contract: Contract) -> int:
        return await self._database.read(partial(sqlite_rows.count, self._name(contract, ())))

    async def forget(self) -> None:
        require_namespace(bool(self._namespace))
        await self._database.write(partial(sqlite_rows.forget, self._namespace))
        await asyncio.to_thread(self._files.forget, self._namespace)

    async def check(self, *, deep: bool = False) -> list[Finding]:
        lost = await asyncio.to_thread(self._database.loss)
        if lost is not None:
            # Nothing can be read until that is decided.
            return [Finding("the database", lost)]
        found = [
            Finding(item.path, f"in quarantine, its key is blocked: {item.reason}")
            for item in await self._database.read(sqlite_rows.list_quarantine)
        ]
        known, last = {finding.path for finding in found}, 0
        found += await self._database.read(sqlite_rows.check_integrity)
        while True:
            last, part = await self._database.read(partial(sqlite_rows.check_rows, last))
            found += [finding for finding in part if finding.path not in known]
            if not last:
                break
        if await asyncio.to_thread(self._files.exists):
            found += await asyncio.to_thread(file_operations.check, self._files.root, deep=deep)
        return sorted(found, key=lambda finding: finding.path)

    async def accept_loss(self) -> str | None:
        return await asyncio.to_thread(self._database.accept_loss)

    async def examine(self, *, samples: int = SAMPLES) -> list[Reading]:
        readings = await asyncio.to_thread(sqlite_diagnosis.examine_file, self.path, samples)
        if {Status.FAULT, Status.NEW} & {reading.status for reading in readings}:
            return readings
        try:
            readings += await self._database.read(sqlite_diagnosis.examine_connection)
            readings.append(await self._database.read(sqlite_diagnosis.examine_contents))
        except BacktestKitError as error:
            return [*readings, Reading("schema", Status.FAULT, str(error))]
        return [*readings, await asyncio.to_thread(sqlite_diagnosis.examine_write_lock, self.path)]

    async def quarantined(self) -> list[Quarantined]:
        files = await asyncio.to_thread(self._files.root.quarantine.list)
        return sorted([*await self._database.read(sqlite_rows.list_quarantine), *files], key=lambda item: item.path)

    async def restore(self, path: str) -> Record | None:
        if sqlite_rows.is_candles(path):
            return await asyncio.to_thread(self._files.operate, file_operations.restore, path)
        return await self._database.write(partial(sqlite_rows.restore, path))

    async def drop(self, path: str) -> Quarantined:
        if sqlite_rows.is_candles(path):
            return await asyncio.to_thread(self._files.operate, file_operations.drop, path)
        return await self._database.write(partial(sqlite_rows.drop, path))

    def _name(self, contract: Contract, key: Key) -> Name:
        return self._namespace, contract.name, "/".join(path_of(contract, key))

    async def _write(self, writes: Sequence[Write]) -> list[Record]:
        changes, durable = self._changes(writes)
        done = await self._database.write(partial(sqlite_rows.apply, changes), durable=durable)
        if isinstance(done, Suspect):
            raise await self._quarantine(done)
        return done

    def _changes(self, writes: Sequence[Write]) -> tuple[list[Change], bool]:
        """`writes` on their way, and whether they have to be on the disk when they return."""
        # The values are written out here and now: nobody can change them while they wait for their turn.
        changes = [
            Change(write, self._name(write.contract, check_key(write.contract, write.key)), dump_value(write.value))
            for write in writes
        ]
        return changes, any(write.contract.durability is not Durability.CACHE for write in writes)

    async def _quarantine(self, suspect: Suspect) -> Damaged:
        """Keep a copy of the bytes, and say what happened. The row stays: it is what blocks the key."""
        where = f"{self.path}: {suspect.name[1]} {suspect.name[2]}"
        if isinstance(suspect.error, NewerSchema):
            return NewerSchema(f"{where}: {suspect.error}")
        try:
            await self._database.write(partial(sqlite_rows.keep_copy, suspect))
        except (RetryLater, OutOfSpace) as error:
            return Damaged(f"{where}: {suspect.error}. It stays there and blocks its key; no copy is kept: {error}")
        path = path_to(suspect.name)
        return Damaged(
            f"{where}: {suspect.error}. A copy is in quarantine and the key is blocked: "
            f"`backtest-kit store quarantine restore {path}` accepts it as it is, `... drop {path}` gives it up"
        )


class _CandleFiles:
    """The directory of the candles beside the database, and what an operator does there."""

    def __init__(self, path: Path) -> None:
        self.root = Root(f"{path}.candles", Disk())

    def exists(self) -> bool:
        return self.root.disk.exists(self.root.path)

    def store(self, namespace: str) -> FileCandleStore:
        root = self.root
        return FileCandleStore(
            root.path, prefix=directory_of(namespace), disk=root.disk, locks=root.locks, quarantine=root.quarantine
        )

    def forget(self, namespace: str) -> None:
        if self.exists():
            self.root.open()
            file_operations.forget(self.root, directory_of(namespace))

    def namespaces(self, above: str) -> list[str]:
        """The namespaces below `above` that have a directory of candles, as their rows would have them."""
        found = []
        for entry in self.root.disk.entries(f"{self.root.path}/{directory_of(above)}"):
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
