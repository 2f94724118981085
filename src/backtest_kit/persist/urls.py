"""Stores by address: one line of text, such as `CC_STORE`, chooses a backend."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any, Final, cast

from backtest_kit.errors import UserError
from backtest_kit.persist.store import Store

_BACKENDS: Final = {
    "file": ("backtest_kit.persist.backends.file", "FileStore", "./dump"),
    "sqlite": ("backtest_kit.persist.backends.sqlite", "SqliteStore", "bot.db"),
    "memory": ("backtest_kit.persist.backends.memory", "MemoryStore", ""),
    "dummy": ("backtest_kit.persist.backends.dummy", "DummyStore", ""),
}
"""Scheme: the module, which is imported when it is asked for, the class, and an example of its path."""

_SERVERS: Final = ("mongodb", "mongodb+srv")
"""Schemes whose whole address goes to the Mongo store."""
_EXTRAS: Final = {"pymongo": "mongo", "bson": "mongo", "redis": "mongo"}
"""Package that may be missing: the extra that has it."""


def store_at(url: str, *, existing: bool = False, patient: bool = False) -> Store:
    """The store that `url` names, not open yet: `file:./dump`, `sqlite:bot.db`, `memory:`, `dummy:`, `mongodb://host/name`.

    With `existing` it is opened to look at it: nothing is made, and what is not a store is refused. A Mongo
    store keeps its ids in Redis if the environment names one, in CC_REDIS_URL or CC_REDIS_HOST. With `patient` it
    waits minutes for an answer of a slow server, unless CC_MONGO_SOCKET_TIMEOUT_MS says otherwise.

    Raises:
        UserError: no backend is called so, its path is missing or superfluous, or it needs a package that
            is not installed.
    """
    scheme, _, path = url.partition(":")
    if scheme in _SERVERS:
        mongo = import_backend("backtest_kit.persist.backends.mongo.store")
        return cast(Store, mongo.MongoStore(url, existing=existing, patient=patient))
    if scheme not in _BACKENDS:
        forms = ", ".join(f"{name}:{example}" for name, (_, _, example) in _BACKENDS.items()) + ", mongodb://host/name"
        raise UserError(f"the store {mask(url)!r} has no known backend: write one of {forms}")
    module, name, example = _BACKENDS[scheme]
    if bool(path) != bool(example):
        raise UserError(f"the store {url!r} is not complete or says too much: write {scheme}:{example}")
    make = getattr(import_module(module), name)
    return cast(Store, make(path, existing=existing) if example else make())


def shown(url: str) -> str:
    """An address as it may be printed: without the credentials that may be in it."""
    return mask(url) if "://" in url else url


def mask(url: str) -> str:
    """An address without what may be secret in it: the credentials, and the values of its options."""
    head, query, options = url.partition("?")
    # Up to the last @: a password that should have been escaped may have one, or a slash, in it.
    head = re.sub(r"(?s)^(\w[\w+.-]*://)?.*@", r"\1***@", head if "@" not in options else url)
    return head if "@" in options or not query else f"{head}?..."


def import_backend(module: str) -> Any:
    """A module that needs an optional package.

    Raises:
        UserError: the package is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise UserError(
            f"{error.name} is not installed, which this store needs: pip install 'backtest-kit[{extra}]'"
        ) from None
