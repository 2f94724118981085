"""`MongoSetup`: which servers a program uses, and which of its contracts are kept there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, Literal

from backtest_kit.errors import UserError
from backtest_kit.kit import Kit
from backtest_kit.model.identity import Mode
from backtest_kit.persist.backends.mongo.settings import LOGGER, MongoSettings, from_environment, with_changes
from backtest_kit.persist.binding import EVERY, MODES
from backtest_kit.persist.urls import import_backend

if TYPE_CHECKING:
    from pymongo import AsyncMongoClient
    from redis.asyncio import Redis

    from backtest_kit.persist.backends.mongo.store import MongoStore

PROFILE: Final = "profile"
"""The default profile of `Persistence` with MongoDB as bound store: live and paper in MongoDB, a backtest in files and
memory except for its candles and caches, logs in files."""


class MongoSetup:
    """The MongoDB and Redis of one kit."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._changes: dict[str, object] = {}
        self._store: MongoStore | None = None
        self._log = logging.LoggerAdapter(logging.getLogger(LOGGER))

    def setup(self, *, modes: Iterable[Mode] | Literal["profile"] = MODES, **config: object) -> None:
        """Keep everything in MongoDB: `set_config(**config)`, then `install(modes=modes)`. Connects to nothing yet.

        Args:
            modes: The modes whose contracts to bind, by default all. `setup(modes=["live"])` leaves paper and
                backtests as they are; `setup(modes="profile")` binds what `PROFILE` says and undoes earlier
                bindings of whole modes.
            config: Settings by name, such as CC_REDIS_HOST="redis". The others come from the environment.

        Raises:
            UserError: as `set_config` and `install`.
        """
        chosen = _checked(modes)
        self.set_config(**config)
        self._bind(chosen)

    def install(self, *, modes: Iterable[Mode] | Literal["profile"] = MODES) -> None:
        """Bind the contracts to MongoDB as it is configured now. A contract bound by its own name keeps its binding.

        Raises:
            UserError: unknown mode, bad value in the environment, or missing package.
        """
        self._bind(_checked(modes))

    def set_config(self, **changes: object) -> None:
        """Change settings by name. They take effect at the next `setup`, `install`, `get_mongo` or `get_redis`.

        Raises:
            UserError: unknown names or bad values, all in one message; then nothing changes.
        """
        with_changes(self.get_config(), changes)
        self._changes |= changes

    def get_config(self) -> MongoSettings:
        """The settings in force: defaults, then the environment, then `set_config`. Its repr has no password.

        Raises:
            UserError: a variable of the environment has a bad value.
        """
        return with_changes(from_environment(os.environ), self._changes)

    async def get_mongo(self) -> AsyncMongoClient[dict[str, Any]]:
        """The client of MongoDB that the store uses in this event loop. It connects when it is first used.

        Raises:
            UserError: the address is not valid, or a package is missing.
        """
        return self._current().connection().mongo

    async def get_redis(self) -> Redis | None:
        """The client of Redis that the store uses in this event loop, or None without Redis.

        Raises:
            UserError: the address is not valid, or a package is missing.
        """
        ids = self._current().connection().ids
        return None if ids is None else ids.client

    async def forget_ids(self) -> int:
        """Remove every id of this database from Redis, and nothing else; return their number.

        Nothing is lost: the next read of each key stores its id again.

        Raises:
            UserError: the address is not valid, or a package is missing.
            RetryLater: Redis fails.
        """
        ids = self._current().connection().ids
        return 0 if ids is None else await ids.forget()

    def set_logger(self, logger: logging.Logger) -> None:
        """Log to `logger` instead of `backtest_kit.mongo`."""
        self._log.logger = logger

    def _bind(self, modes: Iterable[Mode | None]) -> None:
        store = self._current()
        for mode in modes:
            if mode is None:
                # A binding of a whole mode would override the profile.
                for each in MODES:
                    self._kit.persistence.unbind(each)
            self._kit.persistence.bind(EVERY, store, mode=mode)

    def _current(self) -> MongoStore:
        """The store of the current settings; the same object until they change."""
        settings = self.get_config()
        if self._store is None or self._store.settings != settings:
            backend = import_backend("backtest_kit.persist.backends.mongo.store")
            self._store = backend.MongoStore(settings.CC_MONGO_CONNECTION_STRING, settings=settings, log=self._log)
        # Its clients may be used before anything is bound to it, and after the kit has closed it.
        self._kit.persistence.adopt(self._store)
        return self._store


def _checked(modes: Iterable[Mode] | Literal["profile"]) -> list[Mode | None]:
    """The modes to bind, where None stands for the profile; raises `UserError` before anything is bound."""
    if modes == PROFILE:
        return [None]
    chosen: list[Mode | None] = [] if isinstance(modes, str) else list(modes)
    if not chosen or not {*chosen} <= {*MODES}:
        raise UserError(f"modes is {modes!r}: give a list of {', '.join(MODES)}, or {PROFILE!r}")
    return chosen
