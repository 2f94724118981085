"""The stores that every test of a record runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.servers import database_at

STORES = {"memory": "memory:", "file": "file:{place}/dump", "sqlite": "sqlite:{place}/bot.db"}
"""Address by name of those that need no server; `place` is a directory of the test's own."""

SHARED = {name: address for name, address in STORES.items() if name != "memory"}
"""Those that several processes may have open at once."""

MONGO = "mongo"
"""MongoDB with Redis, each a server of the session; every test has a database of its own."""


@contextmanager
def address_on(store: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of an empty store of this name. Redis is told to this process and to those that it starts."""
    if store != MONGO:
        yield STORES[store]
        return
    request.getfixturevalue("monkeypatch").setenv("CC_REDIS_URL", request.getfixturevalue("redis_address"))
    with database_at(request.getfixturevalue("mongo_address")) as url:
        yield url
