"""`SqlStore`: a store over the rows of a SQL database, and `Worker`: the thread that serves a connection.

Writes that wait while a commit is under way go into the next transaction together: one sync to the disk serves them
all, and each has an outcome of its own. Reads have a connection to themselves, and neither side waits for the other.
"""

from __future__ import annotations

import asyncio
import copy
import os
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, Self, TypeVar

from backtest_kit.errors import BacktestKitError, Damaged, Outcome, OutOfSpace, RetryLater, UserError
from backtest_kit.persist.backends.sql import CHUNK, Change, Rows, Suspect, change_of
from backtest_kit.persist.backends.sql_dialect import name_of
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.keys import check_key, escape, unescape
from backtest_kit.persist.store import Capability, Key, Record, Selection, Store, Write
from backtest_kit.persist.upkeep import Finding, Quarantined, require_namespace, require_prunable
from backtest_kit.persist.writing import check_batch

T = TypeVar("T")
Work = Callable[[Any], T]
"""What is to be done with a connection."""


class Job:
    """Work for a thread, and the task that waits for it. No work means: close the connection."""

    __slots__ = ("durable", "error", "future", "loop", "result", "work")

    def __init__(self, work: Work[Any] | None, *, durable: bool) -> None:
        self.work = work
        self.durable = durable
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.result: Any = None
        self.error: BaseException | None = None

    def perform(self, connection: Any) -> None:
        """Do the work; what it is refused for is its own, whatever else is raised is that of all."""
        self.error = None
        try:
            self.result = None if self.work is None else self.work(connection)
        except BacktestKitError as error:
            self.error = error

    def settle(self) -> None:
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class Inline(Executor):
    """Does what is submitted in the thread of the caller, before `submit` returns."""

    def submit(self, work: Callable[..., T], /, *arguments: Any, **options: Any) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(work(*arguments, **options))
        return done


class Worker:
    """Serves jobs in one thread, all that wait at one moment together. It begins with a job and ends with `close`."""

    def __init__(
        self, name: str, serve: Callable[[list[Job]], None], close: Callable[[], None], *, inline: bool
    ) -> None:
        self._name = name
        self._serve = serve
        self._close = close
        self._inline = inline
        self._guard = threading.Lock()
        self._waiting: list[Job] = []
        self._busy = False
        self._executor: Executor | None = None
        self._pid = 0

    async def run(self, work: Work[T], *, durable: bool = True) -> T:
        result: T = await self._submit(Job(work, durable=durable)).future
        return result

    async def close(self) -> None:
        """Serve what is waiting, then close the connection. A job that comes later opens it again."""
        if self._executor is not None:
            await self._submit(Job(None, durable=False)).future

    def check_process(self) -> None:
        """Raise `UserError` in a child that was forked while the connection was open."""
        if self._pid not in (0, os.getpid()):
            raise UserError(
                f"{self._name} was opened by process {self._pid} and is used in its fork {os.getpid()}: "
                "make a store of its own after the fork"
            )

    def _submit(self, job: Job) -> Job:
        with self._guard:
            self._waiting.append(job)
            if self._busy:
                return job
            self._busy = True
            if self._executor is None:
                self._executor = Inline() if self._inline else ThreadPoolExecutor(1, thread_name_prefix=self._name)
                self._pid = os.getpid()
            executor = self._executor
        executor.submit(self._drain)
        return job

    def _drain(self) -> None:
        ended = False
        while not ended:
            with self._guard:
                # Taken and given up under one lock: a job that comes after the last look starts the next round.
                jobs, self._waiting = self._waiting, []
                if not jobs:
                    self._busy = False
                    return
            tasks = [job for job in jobs if job.work is not None]
            try:
                if tasks:
                    self._serve(tasks)
                if len(tasks) < len(jobs):
                    self._close()
                    ended = self._end()
            except BaseException as error:  # the callers wait: whatever it is, it is theirs to see
                for job in jobs:
                    job.error = job.error or error
            _settle(jobs)

    def _end(self) -> bool:
        """Let go of the thread, unless a job has come meanwhile."""
        with self._guard:
            if self._waiting or self._executor is None:
                return False
            executor, self._executor, self._pid, self._busy = self._executor, None, 0, False
        executor.shutdown(wait=False)
        return True


def _settle(jobs: list[Job]) -> None:
    """Wake the waiting tasks, with one call into each loop."""
    for loop in {job.loop for job in jobs}:
        try:
            loop.call_soon_threadsafe(_settle_here, [job for job in jobs if job.loop is loop])
        except RuntimeError:
            # The loop was closed meanwhile: no task waits there any more.
            continue


def _settle_here(jobs: list[Job]) -> None:
    for job in jobs:
        job.settle()


class Database(Protocol):
    """A database with a connection that writes and one that reads. Methods block; each connection has one thread."""

    @property
    def rows(self) -> Rows: ...

    def transaction(self, *, durable: bool) -> AbstractContextManager[Any]:
        """Open the connection that writes and commit what the body does, so that with `durable` it outlives the host.

        Nothing stays of a body that raises; of a commit that fails, `outcome` says whether it may have happened.
        """
        ...

    def read(self, work: Work[T]) -> T:
        """Open the connection that reads and do `work`, which only selects."""
        ...

    def close_writer(self) -> None: ...

    def close_reader(self) -> None: ...


class Threads:
    """A database with a thread for each of its connections; with `inline`, the thread of the caller serves both.

    Unless it is `existing`, it is made before something is read.
    """

    def __init__(self, name: str, database: Database, *, existing: bool, inline: bool = False) -> None:
        self.rows = database.rows
        self._database = database
        self._existing = existing
        self._opened = False
        self._writer = Worker(f"{name} (writer)", self._commit, database.close_writer, inline=inline)
        self._reader = Worker(f"{name} (reader)", self._answer, database.close_reader, inline=inline)

    async def open(self) -> None:
        if self._existing:
            await self.read(lambda connection: None)
        else:
            await self.write(lambda connection: None)
            self._opened = True

    async def close(self) -> None:
        self.check_process()
        await self._reader.close()
        await self._writer.close()
        self._opened = False

    async def write(self, work: Work[T], *, durable: bool = True) -> T:
        """Do `work` in a transaction, perhaps with that of others. Work that raises has changed nothing."""
        self.check_process()
        return await self._writer.run(work, durable=durable)

    async def read(self, work: Work[T]) -> T:
        self.check_process()
        if not self._opened and not self._existing:
            await self.open()
        return await self._reader.run(work)

    def check_process(self) -> None:
        self._writer.check_process()
        self._reader.check_process()

    def _commit(self, jobs: list[Job]) -> None:
        try:
            with self._database.transaction(durable=any(job.durable for job in jobs)) as connection:
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
                self._database.read(job.perform)
            except BacktestKitError as error:
                job.error = error


class SqlStore(Store):
    """The records of a namespace in a SQL database. A subclass adds what is its own: candles, identity, diagnosis."""

    capabilities = frozenset(Capability)

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._rows = threads.rows
        self._namespace = ""

    async def open(self) -> None:
        await self._threads.open()

    async def close(self) -> None:
        if not self._namespace:
            await self._threads.close()

    async def get(self, contract: Contract, key: Key) -> Record | None:
        name = name_of(self._namespace, contract, key := check_key(contract, key))
        try:
            return await self._threads.read(partial(self._rows.read, contract, name, key))
        except Suspect as suspect:
            raise await self._quarantine(suspect) from None

    async def put(self, write: Write) -> Record:
        (record,) = await self._write((write,))
        return record

    async def put_each(self, writes: Sequence[Write]) -> list[Record | BaseException]:
        changes = self._changes(writes)
        work = partial(self._rows.apply_each, changes)
        try:
            return await self._threads.write(work, durable=_must_be_durable(changes))
        except BacktestKitError:
            # One value too large, say, must not fail the others; what was written all the same is written again.
            return await super().put_each(writes)

    async def batch(self, writes: Sequence[Write]) -> None:
        check_batch(writes)
        if writes:
            await self._write(writes)

    async def select(self, wanted: Selection) -> AsyncGenerator[Record, None]:
        numbers = await self._threads.read(partial(self._rows.list_numbers, wanted, self._namespace))
        # Numbers of rows first, 8 bytes each, and records by them, instead of one long select: that would keep an
        # old state of the whole database alive for as long as the caller reads, and miss what moves meanwhile.
        for start in range(0, len(numbers), CHUNK):
            part = partial(self._rows.read_all, wanted.contract, self._namespace, numbers[start : start + CHUNK])
            for found in await self._threads.read(part):
                if isinstance(found, Suspect):
                    raise await self._quarantine(found)
                yield found

    def namespace(self, name: str) -> Self:
        if not name:
            return self
        inner = copy.copy(self)
        # No contract begins with @, so no path of a namespace is one of its parent.
        inner._namespace = f"{self._namespace}@{escape(name, 'namespace')}/"
        return inner

    async def namespaces(self) -> list[tuple[str, ...]]:
        found = await self._threads.read(partial(self._rows.list_namespaces, self._namespace))
        return [_names_of(namespace.removeprefix(self._namespace)) for namespace in found]

    async def prune(self, contract: Contract, revisions: Mapping[Key, int]) -> int:
        require_prunable(contract)
        doomed = [(check_key(contract, key), rev) for key, rev in revisions.items()]
        pruned = 0
        # In parts, because every writer waits for the end of each.
        for start in range(0, len(doomed), CHUNK):
            part = partial(self._rows.prune, contract, self._namespace, doomed[start : start + CHUNK])
            pruned += await self._threads.write(part)
        return pruned

    async def count(self, contract: Contract) -> int:
        return await self._threads.read(partial(self._rows.count, contract, self._namespace))

    async def forget(self) -> None:
        require_namespace(bool(self._namespace))
        await self._threads.write(partial(self._rows.forget, self._namespace))

    async def check(self, *, deep: bool = False) -> list[Finding]:
        found, last = await self._threads.read(self._rows.check_quarantine), 0
        while True:
            last, part = await self._threads.read(partial(self._rows.check, last))
            found += part
            if not last:
                return sorted(found, key=lambda finding: finding.path)

    async def quarantined(self) -> list[Quarantined]:
        return await self._threads.read(self._rows.list_quarantine)

    async def restore(self, path: str) -> Record | None:
        return await self._threads.write(partial(self._rows.restore, path))

    async def drop(self, path: str) -> Quarantined:
        return await self._threads.write(partial(self._rows.drop, path))

    def _changes(self, writes: Sequence[Write]) -> list[Change]:
        return [change_of(write, self._namespace) for write in writes]

    async def _write(self, writes: Sequence[Write]) -> list[Record]:
        changes = self._changes(writes)
        return await self._threads.write(partial(self._rows.apply, changes), durable=_must_be_durable(changes))

    async def _quarantine(self, suspect: Suspect) -> Damaged:
        """Keep a copy of what was read, and return what happened."""
        if suspect.is_newer:
            return self._rows.blocked(suspect)
        try:
            return await self._threads.write(partial(self._rows.keep_copy, suspect))
        except (RetryLater, OutOfSpace) as error:
            return self._rows.blocked(suspect, error)


def _names_of(namespace: str) -> tuple[str, ...]:
    """The names that lead to a namespace: `("a", "b")` for `@a/@b/`."""
    names = [part.removeprefix("@") for part in namespace.split("/")[:-1]]
    return tuple(str(unescape(name, "namespace") or name) for name in names)


def _must_be_durable(changes: Sequence[Change]) -> bool:
    return any(change.write.contract.durability is not Durability.CACHE for change in changes)
