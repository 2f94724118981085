"""`MongoStore`: every record of a program in MongoDB, with Redis beside it if there is one.

MongoDB alone is the truth. A write is one `find_one_and_update` by the key, guarded by the revision where
one is expected, and many that need not be whole are one request; the unique index of each collection decides
every race. Redis remembers which `_id` a key has; what it says is verified in the document that was found by it.

A document that cannot be understood stays where it is, is marked with the reason in its field `hold`, and
blocks its key: `quarantined`, `restore` and `drop` are for the operator.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Final

from backtest_kit.errors import BacktestKitError, UserError
from backtest_kit.persist.backends import mongo_damage, mongo_diagnosis, mongo_prune, mongo_schema
from backtest_kit.persist.backends.mongo_batch import Batch
from backtest_kit.persist.backends.mongo_candles import MongoCandleStore
from backtest_kit.persist.backends.mongo_client import UPKEEP_SECONDS, Link, Links
from backtest_kit.persist.backends.mongo_documents import (
    ORDER,
    ROWS,
    Change,
    change_of,
    name_of,
)
from backtest_kit.persist.backends.mongo_intents import replay
from backtest_kit.persist.backends.mongo_reading import cache_name, find, find_all, standing
from backtest_kit.persist.backends.mongo_settings import (
    LOGGER,
    PATIENT,
    Log,
    MongoSettings,
    from_environment,
    with_changes,
)
from backtest_kit.persist.backends.mongo_writing import Putting, PuttingMany, turn_of
from backtest_kit.persist.candle_cache import CandleCache
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.crashpoints import crashpoint
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
from backtest_kit.persist.urls import import_backend
from backtest_kit.persist.writing import check_batch

_CHUNK: Final = 256
"""Documents that a listing reads at a time."""


class MongoStore(Store):
    """The database at `url`, such as `mongodb://localhost:27017/backtest-kit`. Making the object dials nothing.

    Every event loop that uses it has connections of its own, and so has a fork; `close` ends those of the
    loop that calls it. With `existing` the database is opened to look at it: it has to be a store, and
    nothing is made in it, but a batch that a dead process has left in the middle is brought to its end.

    Raises:
        UserError: `url` is no address of MongoDB.
    """

    capabilities: Final = frozenset(Capability)

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

        With `patient`, it waits minutes for a slow server where the environment does not say how long: for moving
        a whole store, which has nothing better to do.
        """
        if settings is None:
            settings = from_environment(os.environ)
            if patient:
                settings = with_changes(settings, {k: v for k, v in PATIENT.items() if k not in os.environ})
            if not {"CC_REDIS_URL", "CC_REDIS_HOST"} & os.environ.keys():
                settings = with_changes(settings, {"CC_REDIS_HOST": ""})
        log = log or logging.LoggerAdapter(logging.getLogger(LOGGER))
        self._links = Links(with_changes(settings, {"CC_MONGO_CONNECTION_STRING": url}), log)
        self._existing = existing
        self._namespace = ""
        self._cached = CandleCache(self.settings.CC_MONGO_CANDLES_IN_MEMORY)
        self.candles = MongoCandleStore(self._opened, "", self._cached)

    @property
    def settings(self) -> MongoSettings:
        return self._links.settings

    def link(self) -> Link:
        """The clients of the running event loop, perhaps not connected yet.

        Raises:
            UserError: an address cannot be read.
        """
        return self._links.here()

    async def open(self) -> None:
        await self._opened()

    async def close(self) -> None:
        if not self._namespace:
            await self.leave_loop()

    async def leave_loop(self) -> None:
        link = self._links.leave()
        if link is None:
            return
        try:
            # Before it is flushed: what is being written now is acknowledged as well.
            await link.settle()
            if link.has_unflushed:
                await link.finish(mongo_schema.flush(link))
        finally:
            await link.close()

    async def get(self, contract: Contract, key: Key) -> Record | None:
        name = name_of(self._namespace, contract, check_key(contract, key))
        link = await self._opened()
        document = await find(link, contract, name)
        return await standing(link, contract, name, document)

    async def put(self, write: Write) -> Record:
        change = change_of(self._namespace, write)
        link = self._links.here()
        return await link.finish(self._put(link, change))

    async def put_each(self, writes: Sequence[Write]) -> list[Record | BaseException]:
        done: dict[int, Record | BaseException] = {}
        left: list[tuple[int, Change]] = []
        for place, write in enumerate(writes):
            try:
                left.append((place, change_of(self._namespace, write)))
            except UserError as error:
                done[place] = error
        while left:
            # Up to the next write of a key that has one already: listings tell the order.
            many: dict[object, tuple[int, Change]] = {}
            for place, change in left:
                if turn_of(change) in many:
                    break
                many[turn_of(change)] = place, change
            left = left[len(many) :]
            link = self._links.here()
            results = await link.finish(self._put_many(link, [change for _, change in many.values()]))
            done.update(zip((place for place, _ in many.values()), results, strict=True))
        return [done[place] for place in range(len(writes))]

    async def batch(self, writes: Sequence[Write]) -> None:
        check_batch(writes)
        changes = [change_of(self._namespace, write) for write in writes]
        link = self._links.here()
        if len(changes) == 1:
            await link.finish(self._put(link, changes[0]))
        elif changes:
            await link.finish(self._batch(link, changes))

    async def scan(
        self,
        contract: Contract,
        prefix: Key = (),
        *,
        limit: int | None = None,
        newest_first: bool = False,
        include_removed: bool = False,
    ) -> AsyncIterator[Record]:
        name = name_of(self._namespace, contract, check_key(contract, prefix, prefix=True))
        check_limit(limit)
        wanted = {**name, "rev": {"$ne": 0}, **({} if include_removed else {"removed": {"$ne": True}})}
        sort = [(ORDER, -1 if newest_first else 1)]
        link = await self._opened()
        is_short = limit is not None and limit <= _CHUNK
        found = await find_all(link, contract, wanted, sort, limit, None if is_short else ["_id"])
        # Ids first and documents by id, unless one answer has all of them: what moves while somebody reads is
        # neither missed nor seen twice, and no cursor is kept open on the server meanwhile.
        for start in range(0, len(found), _CHUNK):
            documents = found[start : start + _CHUNK]
            if not is_short:
                ids = [each["_id"] for each in documents]
                read = await find_all(link, contract, {"_id": {"$in": ids}}, None, None, None)
                by_id = {each["_id"]: each for each in read}
                documents = [by_id[each] for each in ids if each in by_id]
            for document in documents:
                record = await standing(link, contract, None, document)
                if record is not None and (include_removed or not record.removed):
                    yield record

    def namespace(self, name: str) -> MongoStore:
        if not name:
            return self
        inner = MongoStore.__new__(MongoStore)
        inner._links, inner._existing, inner._cached = self._links, self._existing, self._cached
        inner._namespace = "/".join(filter(None, (self._namespace, escape(name, "namespace"))))
        inner.candles = MongoCandleStore(inner._opened, inner._namespace, inner._cached)
        return inner

    async def namespaces(self) -> list[tuple[str, ...]]:
        link = await self._opened()
        questions = [partial(link.collection(row).distinct, "namespace") for row in ROWS.values()]
        lists = await asyncio.gather(*(link.ask("list the namespaces", question) for question in questions))
        above = f"{self._namespace}/" if self._namespace else ""
        found = {name[len(above) :] for names in lists for name in names if name and name.startswith(above)}
        return [tuple(str(unescape(part, "namespace") or part) for part in name.split("/")) for name in sorted(found)]

    async def identity(self) -> str | None:
        """Without opening the store."""
        identity = await mongo_schema.identity(self._links.here())
        return identity and f"{identity}/{self._namespace}"

    async def check(self, *, deep: bool = False) -> list[Finding]:
        """As `Store.check`; `deep` reads every candle as well. What MongoDB itself has stored is its own to verify."""
        return await mongo_damage.check(await self._opened(), deep=deep)

    async def examine(self, *, samples: int = SAMPLES) -> list[Reading]:
        """As `Store.examine`: both servers, without opening the store."""
        link = self._links.here()
        readings = await mongo_diagnosis.examine_mongo(link, samples)
        redis_diagnosis = import_backend("backtest_kit.persist.backends.redis_diagnosis")
        return [*readings, *await redis_diagnosis.examine_redis(link.ids, self.settings, samples)]

    async def prune(self, contract: Contract, revisions: Mapping[Key, int]) -> int:
        require_prunable(contract)
        link = await self._opened()
        return await link.finish(mongo_prune.prune(link, self._namespace, contract, revisions))

    async def count(self, contract: Contract) -> int:
        wanted = {**name_of(self._namespace, contract, ()), "rev": {"$ne": 0}, "removed": {"$ne": True}}
        link = await self._opened()
        return await link.ask("count records", partial(link.collection(contract).count_documents, wanted))

    async def forget(self) -> None:
        require_namespace(bool(self._namespace))
        link = await self._opened()
        await link.finish(mongo_prune.forget(link, self._namespace))
        self._cached.forget(self._namespace)

    async def quarantined(self) -> list[Quarantined]:
        return await mongo_damage.quarantined(await self._opened())

    async def restore(self, path: str) -> Record | None:
        link = await self._opened()
        return await link.finish(mongo_damage.restore(link, path))

    async def drop(self, path: str) -> Quarantined:
        link = await self._opened()
        return await link.finish(mongo_damage.drop(link, path))

    async def _opened(self, link: Link | None = None) -> Link:
        """`link`, else that of the running loop, open; whoever asks while it is being opened waits for that opening."""
        link = link or self._links.here()
        if not link.is_open:
            if link.opening is None:
                link.opening = asyncio.ensure_future(self._open(link))
                link.opening.add_done_callback(lambda task: _opening_is_over(link, task))
            await asyncio.shield(link.opening)
        link.keep_time()
        if not self._existing:
            link.keep_up(_mend)
        return link

    async def _open(self, link: Link) -> None:
        try:
            await mongo_schema.prepare(link, existing=self._existing)
        except BacktestKitError:
            link.outage.is_known = not link.sees_server
            raise
        link.outage.is_known = False
        link.upkeep_at = time.monotonic() + UPKEEP_SECONDS
        # Also where somebody only looks: half of a batch is nothing that was ever written.
        await replay(link)

    async def _put(self, link: Link, change: Change) -> Record:
        async with link.turns.hold([turn_of(change)]):
            await self._opened(link)
            return await Putting(link, change).run()

    async def _put_many(self, link: Link, changes: Sequence[Change]) -> list[Record | BaseException]:
        async with link.turns.hold([turn_of(change) for change in changes]):
            await self._opened(link)
            return await PuttingMany(link, changes).run()

    async def _batch(self, link: Link, changes: Sequence[Change]) -> None:
        async with link.turns.hold([turn_of(change) for change in changes]):
            await self._opened(link)
            batch = Batch(link, changes)
            await batch.run()
            crashpoint("mongo.after_batch")
            if link.ids is not None:
                await link.ids.set(
                    {cache_name(each.contract, each.change.name): str(each.identity) for each in batch.done}
                )


async def _mend(link: Link) -> None:
    """Make indexes again that somebody has dropped: without the unique one, two processes can own a position."""
    try:
        for collection in await mongo_schema.mend(link):
            link.log.error("the indexes of %s at %s had disappeared, and were made again", collection, link.where)
    except UserError as error:
        # As at a start: nothing is read or written until the documents of one name are one again.
        link.is_open = False
        link.log.error("the store is closed until this is mended: %s", error)
    except BacktestKitError as error:
        link.log.warning("the indexes could not be looked at, they are later: %s", error)


def _opening_is_over(link: Link, task: asyncio.Task[None]) -> None:
    link.opening = None
    if not task.cancelled():
        link.is_open = task.exception() is None
