"""`SqliteStore`: every record of a program in one SQLite file, for several processes at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Self

from backtest_kit.errors import BacktestKitError
from backtest_kit.persist.backends import sqlite_diagnosis
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.backends.sql_store import SqlStore, Threads
from backtest_kit.persist.backends.sqlite_file import SqliteFile
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import Record
from backtest_kit.persist.upkeep import SAMPLES, Finding, Quarantined, Reading, Status


class SqliteStore(SqlStore):
    """The database at `path`, made at the first use.

    With `existing` it is opened to look at it: it has to be a store, nothing is made in it, and it may be
    read-only. A write that waits longer than `busy_timeout` seconds for another process raises `RetryLater`.
    Candles lie beside it, in the directory `<path>.candles`. `disk` makes every call of the operating system that
    SQLite does not make itself; `inline` has the thread of the caller use the database, instead of two of its own.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        busy_timeout: float = 10.0,
        existing: bool = False,
        disk: Disk | None = None,
        inline: bool = False,
    ) -> None:
        self._file = SqliteFile(Path(path).absolute(), busy_timeout, existing=existing, disk=disk)
        self._files = FileStore(f"{self.path}.candles", existing=existing, inline=inline)
        self.candles = self._files.candles
        super().__init__(Threads(f"SQLite store {self.path}", self._file, existing=existing, inline=inline))

    @property
    def path(self) -> Path:
        return self._file.path

    async def close(self) -> None:
        await super().close()
        await self._files.close()

    def namespace(self, name: str) -> Self:
        inner = super().namespace(name)
        inner._files = self._files.namespace(name)
        inner.candles = inner._files.candles
        return inner

    async def identity(self) -> str:
        return f"sqlite:{await asyncio.to_thread(self.path.resolve)}/{self._namespace}"

    async def namespaces(self) -> list[tuple[str, ...]]:
        found = await super().namespaces()
        if await self._has_files():
            found += await self._files.namespaces()
        return sorted({*found})

    async def forget(self) -> None:
        await super().forget()
        if await self._has_files():
            await self._files.forget()

    async def check(self, *, deep: bool = False) -> list[Finding]:
        self._threads.check_process()
        lost = await asyncio.to_thread(self._file.loss)
        if lost is not None:
            # Nothing can be read until that is decided.
            return [Finding("the database", lost)]
        found = await self._threads.read(self._file.check_integrity)
        found += await super().check(deep=deep)
        if await self._has_files():
            found += await self._files.check(deep=deep)
        return sorted(found, key=lambda finding: finding.path)

    async def accept_loss(self) -> str | None:
        self._threads.check_process()
        await asyncio.to_thread(self._file.require_made)
        return await asyncio.to_thread(self._file.accept_loss)

    async def examine(self, *, samples: int = SAMPLES) -> list[Reading]:
        readings = await asyncio.to_thread(sqlite_diagnosis.examine_file, self.path, samples)
        if {Status.FAULT, Status.NEW} & {reading.status for reading in readings}:
            return readings
        try:
            readings += await self._threads.read(sqlite_diagnosis.examine_connection)
            readings.append(await self._threads.read(lambda each: sqlite_diagnosis.examine_contents(self._file, each)))
        except BacktestKitError as error:
            return [*readings, Reading("schema", Status.FAULT, str(error))]
        return [*readings, await asyncio.to_thread(sqlite_diagnosis.examine_write_lock, self.path)]

    async def quarantined(self) -> list[Quarantined]:
        found = await super().quarantined()
        if await self._has_files():
            found += await self._files.quarantined()
        return sorted(found, key=lambda item: item.path)

    async def restore(self, path: str) -> Record | None:
        return await (self._files.restore(path) if _is_candles(path) else super().restore(path))

    async def drop(self, path: str) -> Quarantined:
        return await (self._files.drop(path) if _is_candles(path) else super().drop(path))

    async def _has_files(self) -> bool:
        """Whether there are candles, or were: what only looks makes no directory for them."""
        return await asyncio.to_thread(Path(self._files.root.path).is_dir)


def _is_candles(path: str) -> bool:
    return next((part for part in path.split("/") if not part.startswith("@")), "") == "candle"
