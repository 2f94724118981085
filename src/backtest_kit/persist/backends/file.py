"""`FileStore`: every record a file that an editor opens, the log lines of text by day, feeds in one SQLite file."""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from backtest_kit.errors import BacktestKitError
from backtest_kit.persist.backends import file_diagnosis, file_operations
from backtest_kit.persist.backends.file_candles import FileCandleStore
from backtest_kit.persist.backends.file_commit import Change, Committer, Request
from backtest_kit.persist.backends.file_listing import Found, list_records
from backtest_kit.persist.backends.file_paths import is_feed, is_log, record_path
from backtest_kit.persist.backends.file_root import Root
from backtest_kit.persist.codec import dump_value
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.files import Disk, disk_error
from backtest_kit.persist.keys import check_key, escape
from backtest_kit.persist.store import Capability, Key, Record, Selection, Store, Write
from backtest_kit.persist.upkeep import (
    SAMPLES,
    Finding,
    Quarantined,
    Reading,
    require_namespace,
    require_prunable,
)
from backtest_kit.persist.writing import check_batch

_T = TypeVar("_T")

_FIRST_CHUNK: Final = 32
_LARGEST_CHUNK: Final = 1024


class FileStore(Store):
    """Records under `root`, which several processes may have open at once.

    With `existing` it is opened to look at it: it has to be a store, nothing is made or swept in it, and it
    may be read-only. `disk` makes every call of the operating system; `inline` does all work in the thread of the
    caller, one step after the other, instead of in threads of its own.
    """

    capabilities = frozenset(Capability)

    def __init__(
        self,
        root: str | os.PathLike[str] = "dump",
        *,
        disk: Disk | None = None,
        existing: bool = False,
        inline: bool = False,
    ) -> None:
        self.root = Root(root, disk or Disk(), existing=existing, inline=inline)
        self._committer = Committer(self.root, inline=inline)
        self._inline = inline
        self._prefix = ""
        self.candles = self._make_candles()

    def namespace(self, name: str) -> FileStore:
        if not name:
            return self
        store = copy.copy(self)
        # No contract begins with @, so no record of a namespace lies where one of its parent would.
        store._prefix = f"{self._prefix}@{escape(name, 'namespace')}/"
        store.candles = store._make_candles()
        return store

    def _make_candles(self) -> FileCandleStore:
        root = self.root
        return FileCandleStore(
            root.path, prefix=self._prefix, disk=root.disk, locks=root.locks, quarantine=root.quarantine
        )

    async def _call(self, work: Callable[..., _T], *arguments: Any) -> _T:
        self.root.check_process()
        return work(*arguments) if self._inline else await asyncio.to_thread(work, *arguments)

    async def open(self) -> None:
        await self._call(self.root.open)

    async def close(self) -> None:
        if not self._prefix and not self.root.is_inherited:
            await self._call(self._committer.close)

    # -- records -------------------------------------------------------------------------------------

    async def get(self, contract: Contract, key: Key) -> Record | None:
        path = record_path(self._prefix, contract, key := check_key(contract, key))
        return await self._call(self._get, contract, key, path)

    def _get(self, contract: Contract, key: Key, path: str) -> Record | None:
        self.root.open_to_read(path)
        return self.root.load(contract, key, path)

    async def put(self, write: Write) -> Record:
        (request,) = await self._submit([[write]])
        return request.outcome()[0]

    async def put_each(self, writes: Sequence[Write]) -> list[Record | BaseException]:
        done = await self._submit([[write] for write in writes])
        return [request.error or request.records[0] for request in done]

    async def batch(self, writes: Sequence[Write]) -> None:
        check_batch(writes)
        if writes:
            (request,) = await self._submit([writes])
            request.outcome()

    async def _submit(self, requests: Sequence[Sequence[Write]]) -> list[Request]:
        """Carry out each of `requests`, which stand and fall alone."""
        self.root.check_process()
        waiting = [Request([self._change(write) for write in writes]) for writes in requests]
        if waiting:
            self._committer.submit(waiting)
        for request in waiting:
            await request.answered
        return waiting

    def _change(self, write: Write) -> Change:
        path = record_path(self._prefix, write.contract, check_key(write.contract, write.key))
        return Change(write, path, dump_value(write.value))

    async def select(self, wanted: Selection) -> AsyncGenerator[Record, None]:
        if len(wanted.prefix) == len(wanted.contract.key_fields):
            only = await self.get(wanted.contract, wanted.prefix)
            if only is not None:
                yield only
            return
        found, size = list_records(self.root, self._prefix, wanted), _FIRST_CHUNK
        while chunk := await self._call(_next, found, size):
            for record in chunk:
                if isinstance(record, BacktestKitError):
                    raise record
                yield record
            size = min(2 * size, _LARGEST_CHUNK)

    # -- upkeep --------------------------------------------------------------------------------------

    async def identity(self) -> str:
        return f"file:{await asyncio.to_thread(os.path.realpath, self.root.path)}/{self._prefix}"

    async def namespaces(self) -> list[tuple[str, ...]]:
        return await self._call(file_operations.namespaces, self.root, self._prefix)

    async def prune(self, contract: Contract, revisions: Mapping[Key, int]) -> int:
        require_prunable(contract)
        doomed = {check_key(contract, key): rev for key, rev in revisions.items()}
        return await self._call(file_operations.prune, self.root, self._prefix, contract, doomed)

    async def count(self, contract: Contract) -> int:
        if not is_feed(contract) and not is_log(contract):
            return sum([1 async for _ in self.scan(contract)])
        return await self._call(file_operations.count, self.root, self._prefix, contract)

    async def forget(self) -> None:
        require_namespace(bool(self._prefix))
        await self._call(file_operations.forget, self.root, self._prefix)

    async def examine(self, *, samples: int = SAMPLES) -> list[Reading]:
        return await self._call(file_diagnosis.examine_root, self.root, samples)

    async def check(self, *, deep: bool = False) -> list[Finding]:
        return await self._call(lambda: file_operations.check(self.root, deep=deep))

    async def quarantined(self) -> list[Quarantined]:
        return await self._call(file_operations.quarantined, self.root)

    async def restore(self, path: str) -> Record | None:
        return await self._call(self._operate, file_operations.restore, path)

    async def drop(self, path: str) -> Quarantined:
        return await self._call(self._operate, file_operations.drop, path)

    def _operate(self, operation: Callable[[Root, str], _T], path: str) -> _T:
        if not self.root.feeds.holds(path):
            self.root.quarantine.find(path)  # before anything is made in a directory that is not a store
        self.root.open()
        try:
            return operation(self.root, path)
        except OSError as error:
            raise disk_error(error, "change", self.root.quarantine.place(path)) from error

    async def accept_loss(self) -> str | None:
        return await self._call(self._accept_loss)

    def _accept_loss(self) -> str | None:
        self.root.require_store()
        return self.root.feeds.accept_loss()


def _next(found: Found, size: int) -> list[Record | BacktestKitError]:
    """The next `size` of what a scan finds, nothing behind its end."""
    return list(itertools.islice(found, size))
