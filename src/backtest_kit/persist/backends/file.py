"""`FileStore`: every record a file that an editor opens, feeds as files of lines, candles as Arrow files."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

from backtest_kit.errors import BacktestKitError
from backtest_kit.persist.backends import disk_diagnosis, file_operations
from backtest_kit.persist.backends.file_candles import FileCandleStore
from backtest_kit.persist.backends.file_commit import Change, Committer, Request, Waiter
from backtest_kit.persist.backends.file_listing import Found, count_lines, list_records
from backtest_kit.persist.backends.file_paths import record_path
from backtest_kit.persist.backends.file_root import Root
from backtest_kit.persist.codec import dump_value
from backtest_kit.persist.contracts import Contract, Kind
from backtest_kit.persist.files import Disk, disk_error
from backtest_kit.persist.keys import check_key, escape, unescape
from backtest_kit.persist.store import Capability, Key, Record, Store, Write, check_limit
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
    may be read-only. `disk` is where tests put one that fails.
    """

    capabilities = frozenset(Capability)

    def __init__(
        self, root: str | os.PathLike[str] = "dump", *, disk: Disk | None = None, existing: bool = False
    ) -> None:
        self.root = Root(root, disk or Disk(), existing=existing)
        self._committer = Committer(self.root)
        self._parent: FileStore | None = None
        self._prefix = ""
        self.candles = self._make_candles()

    def namespace(self, name: str) -> FileStore:
        if not name:
            return self
        store = FileStore.__new__(FileStore)
        store.root, store._committer, store._parent = self.root, self._committer, self
        # No contract begins with @, so no record of a namespace lies where one of its parent would.
        store._prefix = f"{self._prefix}@{escape(name, 'namespace')}/"
        store.candles = store._make_candles()
        return store

    async def open(self) -> None:
        await asyncio.to_thread(self.root.open)

    async def close(self) -> None:
        if self._parent is None:
            await asyncio.to_thread(self._committer.close)

    async def examine(self, *, samples: int = SAMPLES) -> list[Reading]:
        return await asyncio.to_thread(disk_diagnosis.examine_root, self.root, samples)

    async def get(self, contract: Contract, key: Key) -> Record | None:
        path = record_path(self._prefix, contract, key := check_key(contract, key))
        return await asyncio.to_thread(self._get, contract, key, path)

    async def put(self, write: Write) -> Record:
        return _told(await self._submit([[write]]))[0]

    async def put_each(self, writes: Sequence[Write]) -> list[Record | BaseException]:
        done = await self._submit([[write] for write in writes])
        return [request.error or request.records[0] for request in done]

    async def batch(self, writes: Sequence[Write]) -> None:
        check_batch(writes)
        if writes:
            _told(await self._submit([writes]))

    async def scan(
        self,
        contract: Contract,
        prefix: Key = (),
        *,
        limit: int | None = None,
        newest_first: bool = False,
        include_removed: bool = False,
    ) -> AsyncIterator[Record]:
        prefix = check_key(contract, prefix, prefix=True)
        check_limit(limit)
        if len(prefix) == len(contract.key_fields):
            only = await self.get(contract, prefix) if limit != 0 else None
            if only is not None and (include_removed or not only.removed):
                yield only
            return
        found = list_records(
            self.root, self._prefix, contract, prefix, newest_first=newest_first, include_removed=include_removed
        )
        left, size = limit, _FIRST_CHUNK
        while left != 0 and (chunk := await asyncio.to_thread(self._read_next, contract, found, size)) is not None:
            for record in chunk:
                if left == 0:
                    return
                if isinstance(record, BacktestKitError):
                    raise record
                if include_removed or not record.removed:
                    yield record
                    left = None if left is None else left - 1
            size = min(2 * size, _LARGEST_CHUNK)

    async def identity(self) -> str:
        return f"file:{await asyncio.to_thread(os.path.realpath, self.root.path)}/{self._prefix}"

    async def namespaces(self) -> list[tuple[str, ...]]:
        return await asyncio.to_thread(self._namespaces, self._prefix)

    async def prune(self, contract: Contract, revisions: Mapping[Key, int]) -> int:
        require_prunable(contract)
        doomed: dict[str, dict[Key, int]] = {}
        for key, rev in revisions.items():
            doomed.setdefault(record_path(self._prefix, contract, check_key(contract, key)), {})[key] = rev
        return await asyncio.to_thread(file_operations.prune, self.root, contract, doomed)

    async def count(self, contract: Contract) -> int:
        if contract.kind is not Kind.FEED:
            return sum([1 async for _ in self.scan(contract)])
        return await asyncio.to_thread(count_lines, self.root, self._prefix, contract)

    async def forget(self) -> None:
        require_namespace(bool(self._prefix))
        await asyncio.to_thread(file_operations.forget, self.root, self._prefix)

    async def check(self, *, deep: bool = False) -> list[Finding]:
        return await asyncio.to_thread(file_operations.check, self.root, deep=deep)

    async def quarantined(self) -> list[Quarantined]:
        await asyncio.to_thread(self.root.require_store)
        return await asyncio.to_thread(self.root.quarantine.list)

    async def restore(self, path: str) -> Record | None:
        return await asyncio.to_thread(self._operate, file_operations.restore, path)

    async def drop(self, path: str) -> Quarantined:
        return await asyncio.to_thread(self._operate, file_operations.drop, path)

    def _operate(self, operation: Callable[[Root, str], _T], path: str) -> _T:
        self.root.quarantine.find(path)  # before anything is made in a directory that is no store
        self.root.open()
        try:
            return operation(self.root, path)
        except OSError as error:
            raise disk_error(error, "change", self.root.quarantine.place(path)) from error

    def _namespaces(self, prefix: str) -> list[tuple[str, ...]]:
        self.root.open()
        found: list[tuple[str, ...]] = []
        for entry in self.root.disk.entries(f"{self.root.path}/{prefix}"):
            if entry.name.startswith("@") and entry.is_dir():
                name = str(unescape(entry.name[1:], "namespace") or entry.name[1:])
                below = self._namespaces(f"{prefix}{entry.name}/")
                found += [(name,), *((name, *path) for path in below)]
        return found

    def _make_candles(self) -> FileCandleStore:
        root = self.root
        return FileCandleStore(
            root.path, prefix=self._prefix, disk=root.disk, locks=root.locks, quarantine=root.quarantine
        )

    def _get(self, contract: Contract, key: Key, path: str) -> Record | None:
        self.root.open()
        return self.root.load(contract, key, path)

    async def _submit(self, requests: Sequence[Sequence[Write]]) -> list[Request]:
        """Carry out each of `requests`, which stand and fall alone."""
        waiter = Waiter(len(requests))
        waiting = [Request([self._change(write) for write in writes], waiter) for writes in requests]
        if waiting:
            self._committer.submit(waiting)
            await waiter.future
        return waiting

    def _change(self, write: Write) -> Change:
        path = record_path(self._prefix, write.contract, check_key(write.contract, write.key))
        return Change(write, path, dump_value(write.value))

    def _read_next(
        self, contract: Contract, found: Iterator[Found], size: int
    ) -> list[Record | BacktestKitError] | None:
        """The records of the next `size` places, None behind the last one."""
        chunk = list(itertools.islice(found, size))
        return self._read_chunk(contract, chunk) if chunk else None

    def _read_chunk(self, contract: Contract, chunk: list[Found]) -> list[Record | BacktestKitError]:
        """The records of `chunk` that are still there, in its order; where one cannot be had, the reason."""
        records: list[Record | BacktestKitError] = []
        for feed, group in itertools.groupby(chunk, key=lambda item: item.feed):
            items = list(group)
            if feed is None:
                records += filter(None, (item.damage or self._load(contract, item.path) for item in items))
                continue
            places = [item.place for item in items if item.place is not None]
            try:
                records += feed.read(places)
            except BacktestKitError:
                for place in places:
                    try:
                        records += feed.read([place])
                    except BacktestKitError as error:
                        records.append(error)
        return records

    def _load(self, contract: Contract, path: str) -> Record | BacktestKitError | None:
        try:
            return self.root.load(contract, None, path)
        except BacktestKitError as error:
            return error


def _told(done: Sequence[Request]) -> list[Record]:
    """What the one request that was carried out has written. Raises what it failed with."""
    (request,) = done
    if request.error is not None:
        raise request.error
    return request.records
