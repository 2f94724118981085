"""`MongoStore`: every record of a program in MongoDB, with Redis as an index of ids if there is one.

MongoDB alone is the truth. A write is one `find_one_and_update` by the key, with the revision where one is expected;
many independent writes are one request. The unique index of each collection decides every race. Redis knows the `_id`
of a key, and the document read by it must have that key.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from typing import Final

from backtest_kit.errors import BacktestKitError, UserError
from backtest_kit.persist.backends.mongo import diagnosis, schema, upkeep
from backtest_kit.persist.backends.mongo.candles import MongoCandleStore
from backtest_kit.persist.backends.mongo.connection import UPKEEP_SECONDS, Connection, ConnectionPerLoop
from backtest_kit.persist.backends.mongo.documents import ORDER, ROWS, Change, change_of, name_of
from backtest_kit.persist.backends.mongo.reading import find, find_all, record_in
from backtest_kit.persist.backends.mongo.settings import (
    LOGGER,
    PATIENT,
    Log,
    MongoSettings,
    from_environment,
    with_changes,
)
from backtest_kit.persist.backends.mongo.writing import BulkUpsert, Transaction, Upsert, turn_of
from backtest_kit.persist.candle_cache import CandleCache
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.keys import check_key, escape, unescape
from backtest_kit.persist.store import Capability, Key, Record, Selection, Store, Write
from backtest_kit.persist.upkeep import SAMPLES, Finding, Quarantined, Reading, require_namespace, require_prunable
from backtest_kit.persist.urls import import_backend
from backtest_kit.persist.writing import check_batch

_CHUNK: Final = 256
"""Documents that a listing reads at a time."""
_STANDALONE: Final = frozenset(Capability) - {Capability.ATOMIC_BATCH}


class MongoStore(Store):
    """The database at `url`, such as `mongodb://localhost:27017/backtest-kit`. Making the object connects to nothing.

    Each event loop that uses it has its own connections, and so has a fork; `close` closes those of the loop that calls
    it. With `existing` the database is opened to look at it: it must be a store, and nothing is made in it.

    A batch is a transaction. A standalone server has none and does not declare `ATOMIC_BATCH`: once the store is open.

    Raises:
        UserError: `url` is not an address of MongoDB.
    """

    def __init__(
        self,
        url: str,
        *,
        settings: MongoSettings | None = None,
        existing: bool = False,
        patient: bool = False,
        log: Log | None = None,
    ) -> None:
        """Without `settings`, they come from the environment, and Redis is used if that names one.

        With `patient`, as in a migration, it waits minutes for a slow server unless the environment says how long.
        """
        if settings is None:
            settings = from_environment(os.environ)
            if patient:
                settings = with_changes(settings, {k: v for k, v in PATIENT.items() if k not in os.environ})
            if not {"CC_REDIS_URL", "CC_REDIS_HOST"} & os.environ.keys():
                settings = with_changes(settings, {"CC_REDIS_HOST": ""})
        log = log or logging.LoggerAdapter(logging.getLogger(LOGGER))
        self._connections = ConnectionPerLoop(with_changes(settings, {"CC_MONGO_CONNECTION_STRING": url}), log)
        self._existing = existing
        self._namespace = ""
        self._cached = CandleCache(self.settings.CC_MONGO_CANDLES_IN_MEMORY)
        self.candles = MongoCandleStore(self._opened, "", self._cached)

    @property
    def capabilities(self) -> frozenset[Capability]:
        return frozenset(Capability) if self._connections.server.traits.has_transactions else _STANDALONE

    @property
    def settings(self) -> MongoSettings:
        return self._connections.settings

    def connection(self) -> Connection:
        """The clients of the running event loop, perhaps not connected yet.

        Raises:
            UserError: an address is not valid.
        """
        return self._connections.here()

    async def open(self) -> None:
        await self._opened()

    async def close(self) -> None:
        if not self._namespace:
            await self.leave_loop()

    async def leave_loop(self) -> None:
        connection = self._connections.leave()
        if connection is None:
            return
        try:
            # Before the flush: what is being written at this moment will be acknowledged as well.
            await connection.idle()
            if connection.has_unflushed:
                await connection.finish(schema.flush(connection))
        finally:
            await connection.close()

    async def get(self, contract: Contract, key: Key) -> Record | None:
        name = name_of(self._namespace, contract, check_key(contract, key))
        connection = await self._opened()
        return await record_in(connection, contract, await find(connection, contract, name))

    async def put(self, write: Write) -> Record:
        change = change_of(self._namespace, write)
        connection = self._connections.here()
        return await connection.finish(self._put(connection, change))

    async def put_each(self, writes: Sequence[Write]) -> list[Record | BaseException]:
        done: dict[int, Record | BaseException] = {}
        left: list[tuple[int, Change]] = []
        for place, write in enumerate(writes):
            try:
                left.append((place, change_of(self._namespace, write)))
            except UserError as error:
                done[place] = error
        while left:
            # Up to a second write of the same key: they must be done one after the other.
            many: dict[object, tuple[int, Change]] = {}
            for place, change in left:
                if turn_of(change) in many:
                    break
                many[turn_of(change)] = place, change
            left = left[len(many) :]
            connection = self._connections.here()
            results = await connection.finish(self._put_many(connection, [change for _, change in many.values()]))
            done.update(zip((place for place, _ in many.values()), results, strict=True))
        return [done[place] for place in range(len(writes))]

    async def batch(self, writes: Sequence[Write]) -> None:
        check_batch(writes)
        changes = [change_of(self._namespace, write) for write in writes]
        connection = self._connections.here()
        if len(changes) == 1:
            await connection.finish(self._put(connection, changes[0]))
        elif changes:
            await connection.finish(self._transact(connection, changes))

    async def select(self, wanted: Selection) -> AsyncGenerator[Record, None]:
        contract, limit = wanted.contract, wanted.limit
        query = name_of(self._namespace, contract, wanted.prefix)
        if not wanted.include_removed:
            query = {**query, "removed": {"$ne": True}}
        sort = [(ORDER, -1 if wanted.newest_first else 1)]
        connection = await self._opened()
        is_short = limit is not None and limit <= _CHUNK
        fields = None if is_short else ["_id"]
        found = await find_all(connection, contract, query, sort=sort, limit=limit, fields=fields)
        # Unless one answer has everything, the ids are read first and the documents by id: a document that is written
        # meanwhile is neither missed nor seen twice, and no cursor stays open on the server while the caller works.
        for start in range(0, len(found), _CHUNK):
            documents = found[start : start + _CHUNK]
            if not is_short:
                ids = [each["_id"] for each in documents]
                read = await find_all(connection, contract, {"_id": {"$in": ids}})
                by_id = {each["_id"]: each for each in read}
                documents = [by_id[each] for each in ids if each in by_id]
            for document in documents:
                record = await record_in(connection, contract, document)
                if record is not None:
                    yield record

    def namespace(self, name: str) -> MongoStore:
        if not name:
            return self
        inner = copy.copy(self)
        inner._namespace = "/".join(filter(None, (self._namespace, escape(name, "namespace"))))
        inner.candles = MongoCandleStore(inner._opened, inner._namespace, inner._cached)
        return inner

    async def namespaces(self) -> list[tuple[str, ...]]:
        connection = await self._opened()
        questions = [partial(connection.collection(row).distinct, "namespace") for row in ROWS.values()]
        lists = await asyncio.gather(*(connection.ask("list the namespaces", question) for question in questions))
        above = f"{self._namespace}/" if self._namespace else ""
        found = {name[len(above) :] for names in lists for name in names if name and name.startswith(above)}
        return [tuple(str(unescape(part, "namespace") or part) for part in name.split("/")) for name in sorted(found)]

    async def identity(self) -> str | None:
        """Without opening the store."""
        identity = await schema.identity(self._connections.here())
        return identity and f"{identity}/{self._namespace}"

    async def check(self, *, deep: bool = False) -> list[Finding]:
        """As `Store.check`. The files of MongoDB are its own to verify."""
        return await upkeep.check(await self._opened(), deep=deep)

    async def examine(self, *, samples: int = SAMPLES) -> list[Reading]:
        """As `Store.examine`: both servers, without opening the store."""
        connection = self._connections.here()
        readings = await diagnosis.examine_mongo(connection, samples)
        redis_ids = import_backend("backtest_kit.persist.backends.mongo.redis_ids")
        return [*readings, *await redis_ids.examine_redis(connection.ids, self.settings, samples)]

    async def prune(self, contract: Contract, revisions: Mapping[Key, int]) -> int:
        require_prunable(contract)
        connection = await self._opened()
        return await connection.finish(upkeep.prune(connection, self._namespace, contract, revisions))

    async def count(self, contract: Contract) -> int:
        wanted = {**name_of(self._namespace, contract, ()), "removed": {"$ne": True}}
        connection = await self._opened()
        return await connection.ask("count records", partial(connection.collection(contract).count_documents, wanted))

    async def forget(self) -> None:
        require_namespace(bool(self._namespace))
        connection = await self._opened()
        await connection.finish(upkeep.forget(connection, self._namespace))
        self._cached.forget(self._namespace)

    async def quarantined(self) -> list[Quarantined]:
        return await upkeep.quarantined(await self._opened())

    async def restore(self, path: str) -> Record | None:
        connection = await self._opened()
        return await connection.finish(upkeep.restore(connection, path))

    async def drop(self, path: str) -> Quarantined:
        connection = await self._opened()
        return await connection.finish(upkeep.drop(connection, path))

    async def _opened(self, connection: Connection | None = None) -> Connection:
        """`connection`, else that of the running loop, once it is open. Concurrent callers wait for one opening."""
        connection = connection or self._connections.here()
        if not connection.is_open:
            if connection.opening is None:
                connection.opening = asyncio.ensure_future(self._open(connection))
                connection.opening.add_done_callback(lambda task: _opening_is_over(connection, task))
            await asyncio.shield(connection.opening)
        connection.keep_time()
        if not self._existing:
            connection.keep_up(_mend)
        return connection

    async def _open(self, connection: Connection) -> None:
        try:
            await schema.prepare(connection, existing=self._existing)
        except BacktestKitError:
            connection.server.is_away = not connection.sees_server
            raise
        connection.server.is_away = False
        connection.upkeep_at = time.monotonic() + UPKEEP_SECONDS

    async def _put(self, connection: Connection, change: Change) -> Record:
        async with connection.turns.hold([turn_of(change)]):
            await self._opened(connection)
            return await Upsert(connection, change).run()

    async def _put_many(self, connection: Connection, changes: Sequence[Change]) -> list[Record | BaseException]:
        async with connection.turns.hold([turn_of(change) for change in changes]):
            await self._opened(connection)
            return await BulkUpsert(connection, changes).run()

    async def _transact(self, connection: Connection, changes: Sequence[Change]) -> None:
        async with connection.turns.hold([turn_of(change) for change in changes]):
            await self._opened(connection)
            if Capability.ATOMIC_BATCH not in self.capabilities:
                raise UserError(
                    f"MongoDB at {connection.where} is standalone and does not support atomic batches: write one "
                    "record at a time, or make it a replica set of one node, see `backtest-kit doctor`"
                )
            transaction = Transaction(connection, changes)
            await transaction.run()
            crashpoint("mongo.after_batch")
            if connection.ids is not None:
                await connection.ids.set(transaction.ids)


async def _mend(connection: Connection) -> None:
    """Make indexes again that were dropped: without the unique one, two processes can own a position."""
    try:
        for collection in await schema.mend(connection):
            connection.log.error(
                "the indexes of %s at %s were missing and have been made again", collection, connection.where
            )
    except UserError as error:
        # As at a start: nothing is read or written until the duplicates are gone.
        connection.is_open = False
        connection.log.error("the store rejects reads and writes until this is fixed: %s", error)
    except BacktestKitError as error:
        connection.log.warning("could not check the indexes, trying again later: %s", error)


def _opening_is_over(connection: Connection, task: asyncio.Task[None]) -> None:
    connection.opening = None
    if not task.cancelled():
        connection.is_open = task.exception() is None
