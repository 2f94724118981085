"""`SqliteStore`: every record of a program in one SQLite file, for several processes at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from backtest_kit.errors import BacktestKitError, Outcome, RetryLater
from backtest_kit.persist.backends import file_operations, sqlite_diagnosis
from backtest_kit.persist.backends.file_candles import FileCandleStore
from backtest_kit.persist.backends.file_root import Root
from backtest_kit.persist.backends.sql import Rows
from backtest_kit.persist.backends.sql_store import Job, SqlStore, Work, Worker, names_of
from backtest_kit.persist.backends.sqlite_file import SqliteFile
from backtest_kit.persist.files import Disk, disk_error
from backtest_kit.persist.store import Record
from backtest_kit.persist.upkeep import SAMPLES, Finding, Quarantined, Reading, Status

T = TypeVar("T")


class SqliteStore(SqlStore):
    """The database at `path`, made at the first use.

    With `existing` it is opened to look at it: it has to be a store, nothing is made in it, and it may be
    read-only. A write that waits longer than `busy_timeout` seconds for another process raises `RetryLater`.
    Candles lie beside it, in the directory `<path>.candles`. `disk` is where tests put one that fails.
    """

    def __init__(
        self, path: str | Path, *, busy_timeout: float = 10.0, existing: bool = False, disk: Disk | None = None
    ) -> None:
        self._file = SqliteFile(Path(path).absolute(), busy_timeout, existing=existing, disk=disk)
        self._connections = _Connections(self._file, existing=existing)
        self._files = Root(f"{self.path}.candles", Disk())
        super().__init__(self._connections)

    @property
    def path(self) -> Path:
        return self._file.path

    async def open(self) -> None:
        await self._connections.open()

    async def close(self) -> None:
        if not self._namespace:
            await self._connections.close()
            await asyncio.to_thread(self._close_files)

    async def identity(self) -> str:
        return f"sqlite:{await asyncio.to_thread(self.path.resolve)}/{self._namespace}"

    async def namespaces(self) -> list[tuple[str, ...]]:
        files = await asyncio.to_thread(self._candle_namespaces, self._namespace)
        below = {names_of(namespace.removeprefix(self._namespace)) for namespace in files}
        return sorted({*await super().namespaces(), *below})

    async def forget(self) -> None:
        await super().forget()
        await asyncio.to_thread(self._forget_files)

    async def check(self, *, deep: bool = False) -> list[Finding]:
        lost = await asyncio.to_thread(self._file.loss)
        if lost is not None:
            # Nothing can be read until that is decided.
            return [Finding("the database", lost)]
        found = await self._connections.read(self._file.check_integrity)
        found += await super().check(deep=deep)
        if await asyncio.to_thread(self._files.disk.exists, self._files.path):
            found += await asyncio.to_thread(file_operations.check, self._files, deep=deep)
        return sorted(found, key=lambda finding: finding.path)

    async def accept_loss(self) -> str | None:
        return await asyncio.to_thread(self._file.accept_loss)

    async def examine(self, *, samples: int = SAMPLES) -> list[Reading]:
        readings = await asyncio.to_thread(sqlite_diagnosis.examine_file, self.path, samples)
        if {Status.FAULT, Status.NEW} & {reading.status for reading in readings}:
            return readings
        try:
            readings += await self._connections.read(sqlite_diagnosis.examine_connection)
            readings.append(
                await self._connections.read(lambda each: sqlite_diagnosis.examine_contents(self._file, each))
            )
        except BacktestKitError as error:
            return [*readings, Reading("schema", Status.FAULT, str(error))]
        return [*readings, await asyncio.to_thread(sqlite_diagnosis.examine_write_lock, self.path)]

    async def quarantined(self) -> list[Quarantined]:
        files = await asyncio.to_thread(self._files.quarantine.list)
        return sorted([*await super().quarantined(), *files], key=lambda item: item.path)

    async def restore(self, path: str) -> Record | None:
        if _is_candles(path):
            return await asyncio.to_thread(self._operate, file_operations.restore, path)
        return await super().restore(path)

    async def drop(self, path: str) -> Quarantined:
        if _is_candles(path):
            return await asyncio.to_thread(self._operate, file_operations.drop, path)
        return await super().drop(path)

    # -- the directory of the candles ------------------------------------------------------------------

    def _candles_of(self, namespace: str) -> FileCandleStore:
        root = self._files
        return FileCandleStore(
            root.path, prefix=namespace, disk=root.disk, locks=root.locks, quarantine=root.quarantine
        )

    def _candle_namespaces(self, above: str) -> list[str]:
        """The namespaces below `above` that have a directory of candles."""
        entries = self._files.disk.entries(f"{self._files.path}/{above}")
        found = [f"{above}{entry.name}/" for entry in entries if entry.name.startswith("@")]
        return found + [inner for namespace in found for inner in self._candle_namespaces(namespace)]

    def _forget_files(self) -> None:
        if self._files.disk.exists(self._files.path):
            self._files.open()
            file_operations.forget(self._files, self._namespace)

    def _close_files(self) -> None:
        self._files.close()
        self._files.locks.close()

    def _operate(self, operation: Callable[[Root, str], T], path: str) -> T:
        self._files.open()
        try:
            return operation(self._files, path)
        except OSError as error:
            raise disk_error(error, "change", self._files.quarantine.place(path)) from error


class _Connections:
    """The file with a thread that writes and one that reads."""

    def __init__(self, file: SqliteFile, *, existing: bool) -> None:
        self._file = file
        self._existing = existing
        self._opened = False
        self._writer = Worker(f"SQLite store {file.path} (writer)", self._commit, file.close_writer)
        self._reader = Worker(f"SQLite store {file.path} (reader)", self._answer, file.close_reader)

    @property
    def rows(self) -> Rows:
        return self._file.rows

    async def open(self) -> None:
        if self._existing:
            await self.read(lambda connection: None)
        else:
            await self.write(lambda connection: None)
            self._opened = True

    async def close(self) -> None:
        self._check_process()
        await self._reader.close()
        await self._writer.close()
        self._opened = False

    async def write(self, work: Work[T], *, durable: bool = True) -> T:
        self._check_process()
        return await self._writer.run(work, durable=durable)

    async def read(self, work: Work[T]) -> T:
        self._check_process()
        if not self._opened and not self._existing:
            await self.open()
        return await self._reader.run(work)

    def _check_process(self) -> None:
        self._writer.check_process()
        self._reader.check_process()

    def _commit(self, jobs: list[Job]) -> None:
        try:
            with self._file.transaction(durable=any(job.durable for job in jobs)) as connection:
                for job in jobs:
                    job.perform(connection)
        except BacktestKitError as error:
            alone = len(jobs) > 1 and error.outcome is not Outcome.UNKNOWN and not isinstance(error, RetryLater)
            for job in jobs:
                if alone:
                    # One value too large, say, must not fail the others: each alone has its own outcome.
                    self._commit([job])
                else:
                    job.error = job.error or error

    def _answer(self, jobs: list[Job]) -> None:
        for job in jobs:
            try:
                self._file.read(job.perform)
            except BacktestKitError as error:
                job.error = error


def _is_candles(path: str) -> bool:
    return next((part for part in path.split("/") if not part.startswith("@")), "") == "candle"
