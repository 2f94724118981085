"""Connections of the Mongo store: those of one event loop of one process belong together, and to nobody else."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, unquote_plus

import pymongo
from pymongo import AsyncMongoClient
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.cursor import AsyncCursor
from pymongo.errors import ConfigurationError, InvalidURI, PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from backtest_kit.errors import BacktestKitError, Outcome, UserError
from backtest_kit.persist.backends.mongo_clock import ServerClock
from backtest_kit.persist.backends.mongo_documents import Document
from backtest_kit.persist.backends.mongo_errors import FAILURES, Patience, heals, may_have_happened, translate
from backtest_kit.persist.backends.mongo_settings import Log, MongoSettings
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.turns import Turns
from backtest_kit.persist.urls import import_backend, mask

T = TypeVar("T")

DEFAULT_DATABASE: Final = "backtest-kit"
_TIME_SECONDS: Final = 1.0
"""How long the server is asked for its time: who closes the store waits for that."""
UPKEEP_SECONDS: Final = 600.0
_AGAIN_SECONDS: Final = 1.0
"""Twice the time in which the driver looks for a server again."""
_PART: Final = 10_000
"""Documents."""
ACKNOWLEDGED: Final = WriteConcern(w=1)
"""For what may be lost or is flushed on close. The server writes it to its journal every 100 ms."""
JOURNALLED: Final = WriteConcern(w="majority", j=True)
"""For money, and for what other processes must agree on: it is not rolled back and survives the server."""


class Outage:
    """What the links of a store know of its server from each other."""

    is_known = False
    """Whether no server answered when the store was opened last."""


class Link:
    """What one event loop has open: clients, the order of its writes, and whatever still runs."""

    def __init__(self, settings: MongoSettings, log: Log, outage: Outage) -> None:
        """Dials nothing.

        Raises:
            UserError: an address cannot be read.
        """
        self.settings: Final = settings
        self.log: Final = log
        self.where: Final = mask(settings.CC_MONGO_CONNECTION_STRING)
        self.database_name: Final = database_of(settings.CC_MONGO_CONNECTION_STRING)
        self.mongo: Final[AsyncMongoClient[Document]] = _client(settings)
        self.database: Final = self.mongo[self.database_name]
        self.ids = None
        if settings.redis_url:
            redis_ids = import_backend("backtest_kit.persist.backends.redis_ids")
            self.ids = redis_ids.IdCache(settings, self.database_name, log)
        self.turns: Final = Turns()
        self.clock: Final = ServerClock()
        self.owner: Final = secrets.token_hex(8)
        self.has_transactions = False
        """Whether the server is part of a replica set or a cluster. Known once it is open."""
        self.upkeep_at = 0.0
        """When to look after the database next, by `time.monotonic`."""
        self.opening: asyncio.Task[None] | None = None
        self.is_open = False
        self.outage = outage
        self.has_unflushed = False
        """Whether something was written that only the server's memory is known to have."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._writes = 0
        self._tick = 0

    def next_writer(self) -> str:
        """A name for one write, which tells it from every other of this and of other processes."""
        self._writes += 1
        return f"{self.owner}:{self._writes}"

    def next_tick(self) -> int:
        """Grows with every write, and is above every one that was seen: the order of writing."""
        self._tick = max(self._tick + 1, self.clock.now_us())
        return self._tick

    def saw_tick(self, document: Document | None) -> int:
        """The tick of a document, 0 if it has none. Another process, whose clock may be ahead, may have written it."""
        tick = None if document is None else document.get("tick")
        if not isinstance(tick, int):
            return 0
        self._tick = max(self._tick, tick)
        return tick

    def collection(self, contract: Contract) -> AsyncCollection[Document]:
        """The documents of a contract, as safe as its durability asks."""
        return self.named(contract.collection, contract.durability)

    def named(self, name: str, durability: Durability) -> AsyncCollection[Document]:
        """A collection that is always read from the primary; money as no election can take it back."""
        is_money = durability is Durability.MONEY
        # A server of its own has nothing to roll back, and not every version takes another concern there.
        level = "majority" if is_money and self.has_transactions else "local"
        return self.database.get_collection(
            name,
            write_concern=JOURNALLED if is_money else ACKNOWLEDGED,
            read_concern=ReadConcern(level),
            read_preference=ReadPreference.PRIMARY,
        )

    def patience(self) -> Patience:
        return Patience(self.settings.CC_MONGO_OPERATION_TIMEOUT_MS / 1000)

    def within(self, seconds: float) -> AbstractContextManager[None]:
        """Tell the driver how long it may take for what is asked of it in the block."""
        if not self.sees_server:
            # It would look for a server for all of that time. One that was not there a moment ago is looked for once
            # more, so that a program whose server is away hears of it soon and not once for each thing that it wants.
            again = _AGAIN_SECONDS if self.outage.is_known else seconds
            seconds = min(seconds, again, self.mongo.options.server_selection_timeout)
        return pymongo.timeout(seconds)

    def attempt(self, patience: Patience) -> AbstractContextManager[None]:
        """As `within`, for one request: where its connection hangs, there is time left to try another one."""
        answer_seconds = self.mongo.options.pool_options.socket_timeout if self.sees_server else None
        return self.within(min(patience.left, answer_seconds or patience.left))

    @property
    def sees_server(self) -> bool:
        """Whether there is a server to write to, as far as the driver knows."""
        return self.mongo.topology_description.has_writable_server()

    def keep_time(self) -> None:
        """Ask the server for its time if it is time to, beside whatever else is done."""
        if self.clock.is_due:
            self._begin(self.read_time())

    def keep_up(self, upkeep: Callable[[Link], Coroutine[Any, Any, None]]) -> None:
        """Begin `upkeep` if it is time to, beside whatever else is done."""
        if time.monotonic() >= self.upkeep_at:
            self.upkeep_at = time.monotonic() + UPKEEP_SECONDS
            self._begin(upkeep(self))

    async def read_time(self) -> None:
        async def question() -> None:
            asked_us = self.clock.ask()
            self.clock.answered(asked_us, await self.mongo.admin.command("hello"))

        self.clock.ask()  # nobody else need begin
        try:
            await self.ask("ask for the time", question, Patience(_TIME_SECONDS))
        except BacktestKitError as error:
            self.log.debug("the time of MongoDB is not known better than before: %s", error)

    async def ask(
        self,
        doing: str,
        question: Callable[[], Awaitable[T]],
        patience: Patience | None = None,
    ) -> T:
        """The answer to something that may be done twice; asked again while the failure can heal and there is time.

        Raises:
            RetryLater, UserError, OutOfSpace: it cannot, or the time is up.
        """
        patience = patience or self.patience()

        async def answer() -> T:
            with self.attempt(patience):
                return await question()

        return await self.finish(self._try(doing, answer, patience))

    async def ask_all(self, doing: str, cursor: Callable[[], AsyncCursor[Any]], part: int = _PART) -> list[Any]:
        """Everything that a cursor finds; the server may take the time of an operation for each `part` after the first.

        Raises:
            RetryLater, UserError, OutOfSpace: as `ask`.
        """

        patience = self.patience()

        async def answer() -> list[Any]:
            found: list[Any] = []
            parts = cursor()
            while parts.alive:
                with self.attempt(self.patience() if found else patience):
                    found += await parts.to_list(part)
            return found

        return await self.finish(self._try(doing, answer, patience))

    async def _try(self, doing: str, answer: Callable[[], Awaitable[T]], patience: Patience) -> T:
        outcome = Outcome.NOT_DONE
        while True:
            saw_server = self.sees_server
            try:
                return await answer()
            except FAILURES as error:
                if may_have_happened(error):
                    outcome = Outcome.UNKNOWN
                if not heals(error, saw_server=saw_server) or patience.is_over:
                    raise self.failure(error, doing, outcome) from error
                await patience.pause()

    def failure(self, error: BaseException, doing: str, outcome: Outcome = Outcome.NOT_DONE) -> Exception:
        return translate(error, doing, self.where, outcome)

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` to its end also if the caller is cancelled.

        Half of a write must not land after the next one, and the driver, cancelled while it connects, forgets the
        socket. So nothing that it does is ended from outside, by no timeout of asyncio either: it is told its time.
        """
        return await asyncio.shield(self._begin(work))

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    async def settle(self) -> None:
        """Wait for what is under way."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def close(self) -> None:
        """Let go of every connection, once nothing is under way."""
        await self.settle()
        if self.ids is not None:
            await self.ids.close()
        await self.mongo.close()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Its caller may be gone; then nobody else would look at it, and Python would say so.
            task.exception()


class Links:
    """The links of one store. A fork has none, and the loop that asks first gets one of its own."""

    def __init__(self, settings: MongoSettings, log: Log) -> None:
        self.settings: Final = settings
        self._log = log
        self._outage = Outage()
        self._pid = os.getpid()
        self._links: dict[asyncio.AbstractEventLoop, Link] = {}
        self._inherited: list[dict[asyncio.AbstractEventLoop, Link]] = []

    def here(self) -> Link:
        """The link of the running loop.

        Raises:
            UserError: an address cannot be read.
        """
        if self._pid != os.getpid():
            # Kept, and never touched: closing them here would speak on the sockets of the parent.
            self._inherited.append(self._links)
            self._pid, self._links = os.getpid(), {}
        loop = asyncio.get_running_loop()
        if loop not in self._links:
            # Loops of other threads may be doing the same.
            for old in [each for each in list(self._links) if each.is_closed()]:
                self._links.pop(old, None)
            self._links[loop] = Link(self.settings, self._log, self._outage)
        return self._links[loop]

    def leave(self) -> Link | None:
        """The link of the running loop, which from now on has none."""
        if self._pid != os.getpid():
            return None
        return self._links.pop(asyncio.get_running_loop(), None)


def database_of(url: str) -> str:
    """The name of the database in an address of MongoDB, read as the driver reads it.

    Raises:
        UserError: it names a collection as well.
    """
    # Not as other addresses are read: a # or a [ is an ordinary letter of a password here.
    name = unquote_plus(url.partition("://")[2].partition("?")[0].partition("/")[2])
    if "." in name:
        raise UserError(f"the database in {mask(url)} has a dot in its name: correct CC_MONGO_CONNECTION_STRING")
    return name or DEFAULT_DATABASE


def _client(settings: MongoSettings) -> AsyncMongoClient[Document]:
    url = settings.CC_MONGO_CONNECTION_STRING
    wanted: dict[str, Any] = {
        "serverSelectionTimeoutMS": settings.CC_MONGO_SERVER_SELECTION_TIMEOUT_MS,
        "connectTimeoutMS": settings.CC_MONGO_CONNECT_TIMEOUT_MS,
        "socketTimeoutMS": min(settings.CC_MONGO_SOCKET_TIMEOUT_MS, settings.CC_MONGO_OPERATION_TIMEOUT_MS),
        "maxPoolSize": settings.CC_MONGO_POOL_SIZE,
        "appname": "backtest-kit",
        # What was not answered is asked again here, for as long as there is time, and not once more behind our back.
        "retryReads": False,
        "retryWrites": False,
    }
    given = {name.lower() for name, _ in parse_qsl(url.partition("?")[2], keep_blank_values=True)}
    options = {name: value for name, value in wanted.items() if name.lower() not in given}
    try:
        return AsyncMongoClient(url, **options)
    except (ConfigurationError, InvalidURI, PyMongoError, ValueError, TypeError) as error:
        raise translate(_as_address_error(error), "connect", mask(url)) from None


def _as_address_error(error: Exception) -> Exception:
    return error if isinstance(error, PyMongoError) else ConfigurationError("no address")
