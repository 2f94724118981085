"""Connections of the Mongo store: each event loop of each process has its own, and shares them with no other."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, TypeVar
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
from backtest_kit.persist.backends.mongo.documents import Document
from backtest_kit.persist.backends.mongo.server import (
    FAILURES,
    ServerClock,
    ServerTraits,
    is_transient,
    may_have_happened,
    translate,
)
from backtest_kit.persist.backends.mongo.settings import Log, MongoSettings
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.turns import Turns
from backtest_kit.persist.urls import import_backend, mask

if TYPE_CHECKING:
    from backtest_kit.persist.backends.mongo.redis_ids import IdCache

T = TypeVar("T")

DEFAULT_DATABASE: Final = "backtest-kit"
UPKEEP_SECONDS: Final = 600.0
_CLOCK_SECONDS: Final = 1.0
"""How long to wait for the time of the server. Closing the store waits for that."""
_SEARCH_SECONDS: Final = 1.0
"""How long to look for a server that was away a moment ago: the driver looks every half second."""
_PART: Final = 10_000
"""Documents."""
ACKNOWLEDGED: Final = WriteConcern(w=1)
"""For what may be lost or is flushed on close. The server writes it to its journal every 100 ms."""
JOURNALLED: Final = WriteConcern(w="majority", j=True)
"""For money, and for what processes must agree on: it is not rolled back and survives the server."""


class Deadline:
    """How long an operation is tried: until `seconds` have passed, with pauses that grow and vary."""

    LAST_SECONDS: Final = 0.02
    """An attempt with less time would end as a timeout, which costs a connection."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._pause = 0.02

    @property
    def left(self) -> float:
        """Seconds, at least those of a last attempt."""
        return max(self.LAST_SECONDS, self._until - time.monotonic())

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._until - self.LAST_SECONDS

    async def pause(self) -> None:
        """Short at first, so that a server that is back is noticed soon."""
        await asyncio.sleep(min(self.left, self._pause * random.uniform(0.5, 1.5)))  # noqa: S311
        self._pause = min(0.25, self._pause * 2)


class ServerState:
    """What the connections of one store learn from each other about its server."""

    is_away = False
    """Whether no server answered when the store was opened last."""
    traits = ServerTraits()
    """Those of MongoDB as it should be run, until the server has answered."""


class Connection:
    """What one event loop has open: clients, the order of its writes, and its unfinished work."""

    def __init__(self, settings: MongoSettings, log: Log, server: ServerState) -> None:
        """Connects to nothing yet.

        Raises:
            UserError: an address is not valid.
        """
        self.settings: Final = settings
        self.log: Final = log
        self.server: Final = server
        self.where: Final = mask(settings.CC_MONGO_CONNECTION_STRING)
        self.database_name: Final = database_of(settings.CC_MONGO_CONNECTION_STRING)
        self.mongo: Final[AsyncMongoClient[Document]] = _client(settings)
        self.database: Final = self.mongo[self.database_name]
        self.ids: IdCache | None = None
        if settings.redis_url:
            redis_ids = import_backend("backtest_kit.persist.backends.mongo.redis_ids")
            self.ids = redis_ids.IdCache(settings, self.database_name, log)
        self.turns: Final = Turns()
        self.clock: Final = ServerClock()
        self.upkeep_at = 0.0
        """When to check the database next, by `time.monotonic`."""
        self.opening: asyncio.Task[None] | None = None
        self.is_open = False
        self.has_unflushed = False
        """Whether something was written that may be in the memory of the server only."""
        self._owner = secrets.token_hex(8)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._writes = 0
        self._tick = 0

    # -- order of writes ---------------------------------------------------------------------------------

    def next_writer(self) -> str:
        """A name that no other write of this or another process has."""
        self._writes += 1
        return f"{self._owner}:{self._writes}"

    def next_tick(self) -> int:
        """The order of writing: grows with every write, and is above every tick that was read."""
        self._tick = max(self._tick + 1, self.clock.now_us())
        return self._tick

    def saw_tick(self, document: Document | None) -> int:
        """The tick of a document, 0 if it has none. Its writer may be a process whose clock is ahead."""
        tick = None if document is None else document.get("tick")
        if not isinstance(tick, int):
            return 0
        self._tick = max(self._tick, tick)
        return tick

    # -- collections -------------------------------------------------------------------------------------

    def collection(self, contract: Contract) -> AsyncCollection[Document]:
        """The documents of a contract, written as its durability demands."""
        return self.named(contract.collection, contract.durability)

    def named(self, name: str, durability: Durability) -> AsyncCollection[Document]:
        """A collection, read from the primary. What is read of money cannot be rolled back by an election."""
        is_money = durability is Durability.MONEY
        return self.database.get_collection(
            name,
            write_concern=JOURNALLED if is_money else ACKNOWLEDGED,
            read_concern=self.server.traits.money_reads if is_money else ReadConcern("local"),
            read_preference=ReadPreference.PRIMARY,
        )

    # -- time --------------------------------------------------------------------------------------------

    def deadline(self) -> Deadline:
        """That of one operation."""
        return Deadline(self.settings.CC_MONGO_OPERATION_TIMEOUT_MS / 1000)

    def within(self, seconds: float) -> AbstractContextManager[None]:
        """Limit what the driver does in the block to so many seconds."""
        if not self.sees_server:
            # The driver would look for a server all that time. If it was away a moment ago, one short look is enough:
            # the program learns soon that it is still away, instead of waiting at each call.
            search = _SEARCH_SECONDS if self.server.is_away else seconds
            seconds = min(seconds, search, self.mongo.options.server_selection_timeout)
        return pymongo.timeout(seconds)

    def attempt(self, deadline: Deadline) -> AbstractContextManager[None]:
        """As `within`, for one request: if its connection hangs, there is time left to try another one."""
        answer_seconds = self.mongo.options.pool_options.socket_timeout if self.sees_server else None
        return self.within(min(deadline.left, answer_seconds or deadline.left))

    @property
    def sees_server(self) -> bool:
        """Whether there is a server to write to, as far as the driver knows."""
        return self.mongo.topology_description.has_writable_server()

    def keep_time(self) -> None:
        """Ask the server for its time in the background if that is due."""
        if self.clock.is_due:
            self._start(self.read_time())

    def keep_up(self, upkeep: Callable[[Connection], Coroutine[Any, Any, None]]) -> None:
        """Start `upkeep` in the background if it is due."""
        if time.monotonic() >= self.upkeep_at:
            self.upkeep_at = time.monotonic() + UPKEEP_SECONDS
            self._start(upkeep(self))

    async def read_time(self) -> None:
        async def question() -> None:
            asked_us = self.clock.ask()
            self.clock.answered(asked_us, await self.mongo.admin.command("hello"))

        self.clock.ask()  # before the first await: no other task starts the same
        try:
            await self.ask("ask for the time", question, Deadline(_CLOCK_SECONDS))
        except BacktestKitError as error:
            self.log.debug("the time of MongoDB is unknown, the last one is used: %s", error)

    # -- requests ----------------------------------------------------------------------------------------

    async def ask(self, doing: str, question: Callable[[], Awaitable[T]], deadline: Deadline | None = None) -> T:
        """The answer to something that may be done twice; repeated while the failure is transient and there is time.

        Raises:
            RetryLater, UserError, OutOfSpace: there is no answer.
        """
        deadline = deadline or self.deadline()

        async def answer() -> T:
            with self.attempt(deadline):
                return await question()

        return await self.finish(self._try(doing, answer, deadline))

    async def ask_all(self, doing: str, cursor: Callable[[], AsyncCursor[Any]], part: int = _PART) -> list[Any]:
        """Everything that a cursor finds. Each `part` after the first may take as long as an operation.

        Raises:
            RetryLater, UserError, OutOfSpace: as `ask`.
        """
        deadline = self.deadline()

        async def answer() -> list[Any]:
            found: list[Any] = []
            parts = cursor()
            while parts.alive:
                with self.attempt(self.deadline() if found else deadline):
                    found += await parts.to_list(part)
            return found

        return await self.finish(self._try(doing, answer, deadline))

    async def _try(self, doing: str, answer: Callable[[], Awaitable[T]], deadline: Deadline) -> T:
        outcome = Outcome.NOT_DONE
        while True:
            saw_server = self.sees_server
            try:
                return await answer()
            except FAILURES as error:
                if may_have_happened(error):
                    outcome = Outcome.UNKNOWN
                if not is_transient(error, saw_server=saw_server) or deadline.is_over:
                    raise self.failure(error, doing, outcome) from error
                await deadline.pause()

    def failure(self, error: BaseException, doing: str, outcome: Outcome = Outcome.NOT_DONE) -> Exception:
        return translate(error, doing, self.where, outcome)

    # -- life --------------------------------------------------------------------------------------------

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` to its end, also if the caller is cancelled.

        Half of a write must not land after the next one, and the driver, if cancelled while it connects, leaks the
        socket. So a driver call is never cancelled, not by a timeout of asyncio either; `within` limits its time.
        """
        return await asyncio.shield(self._start(work))

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # If the caller is gone, no one else looks at it, and Python would log "never retrieved".
            task.exception()

    async def idle(self) -> None:
        """Return when no work is unfinished."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def close(self) -> None:
        """Close the clients once no work is unfinished."""
        await self.idle()
        if self.ids is not None:
            await self.ids.close()
        await self.mongo.close()


class ConnectionPerLoop:
    """The connections of one store. A fork starts with none, and each event loop makes its own when it first asks."""

    def __init__(self, settings: MongoSettings, log: Log) -> None:
        self.settings: Final = settings
        self.server: Final = ServerState()
        self._log = log
        self._pid = os.getpid()
        self._by_loop: dict[asyncio.AbstractEventLoop, Connection] = {}
        self._inherited: list[dict[asyncio.AbstractEventLoop, Connection]] = []

    def here(self) -> Connection:
        """The connection of the running loop.

        Raises:
            UserError: an address is not valid.
        """
        if self._pid != os.getpid():
            # Kept, so that they are never collected: closing them here would write to the sockets of the parent.
            self._inherited.append(self._by_loop)
            self._pid, self._by_loop = os.getpid(), {}
        loop = asyncio.get_running_loop()
        if loop not in self._by_loop:
            # Loops of other threads may do the same at this moment.
            for old in [each for each in list(self._by_loop) if each.is_closed()]:
                self._by_loop.pop(old, None)
            self._by_loop[loop] = Connection(self.settings, self._log, self.server)
        return self._by_loop[loop]

    def leave(self) -> Connection | None:
        """Take the connection of the running loop out, if it has one."""
        if self._pid != os.getpid():
            return None
        return self._by_loop.pop(asyncio.get_running_loop(), None)


def database_of(url: str) -> str:
    """The name of the database in an address of MongoDB, read as the driver reads it.

    Raises:
        UserError: it names a collection as well.
    """
    # Not with urlsplit: in these addresses a # or a [ is an ordinary letter of a password.
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
        # Otherwise the driver makes one more connection in the background, to measure round trips. If the store is
        # closed at that moment, the driver cancels the task that connects and leaks its socket.
        "serverMonitoringMode": "poll",
        # `_try` and `Upsert` repeat what got no answer, within their deadline; the driver would do it once more unseen.
        "retryReads": False,
        "retryWrites": False,
    }
    given = {name.lower() for name, _ in parse_qsl(url.partition("?")[2], keep_blank_values=True)}
    options = {name: value for name, value in wanted.items() if name.lower() not in given}
    try:
        return AsyncMongoClient(url, **options)
    except (ConfigurationError, InvalidURI, PyMongoError, ValueError, TypeError) as error:
        cause = error if isinstance(error, PyMongoError) else ConfigurationError("not an address")
        raise translate(cause, "connect", mask(url)) from None
