"""The conformance suite over MongoDB: with Redis, with one that dies, and with neither Redis nor transactions.

`make test` runs each case in one of these surroundings, `make prove` in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from tests.samples import sample
from tests.servers import Server, redis_server

from backtest_kit.persist.backends.mongo.connection import Connection, database_of
from backtest_kit.persist.backends.mongo.schema import META
from backtest_kit.persist.backends.mongo.settings import MongoSettings
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.store import Store
from backtest_kit.persist.testing import StoreConformance

REDIS = {"with Redis": "redis_address", "with a Redis that dies": "dying_redis", "standalone without Redis": ""}
"""Each of the surroundings, and the fixture with the address of its Redis."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("surroundings", sample(REDIS, 1, metafunc.function.__name__))


@pytest.fixture(scope="module")
def mortal() -> Iterator[Server]:
    server = redis_server()
    yield server
    server.remove()


@pytest.fixture
def dying_redis(mortal: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ended by SIGKILL after the first three operations of a case, which then goes on without it."""
    mortal.kill()
    mortal.start()
    opened, calls = MongoStore._opened, 0

    async def counted(store: MongoStore, connection: Connection | None = None) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            mortal.kill()
        return await opened(store, connection)

    monkeypatch.setattr(MongoStore, "_opened", counted)
    return f"redis://127.0.0.1:{mortal.port}"


@pytest.mark.sampled
class TestMongo(StoreConformance):
    """Every place is a database of its own."""

    @pytest.fixture(autouse=True)
    def _surroundings(self, surroundings: str, request: pytest.FixtureRequest) -> None:
        redis = REDIS[surroundings]
        self.redis_url: str = request.getfixturevalue(redis) if redis else ""
        self.url: str = request.getfixturevalue("mongo_url" if redis else "standalone_url")

    def make_store(self, place: Path) -> Store:
        # Time enough for a server that tests start on a busy machine to sort forty days of minutes.
        settings = MongoSettings(
            CC_REDIS_HOST="",
            CC_REDIS_URL=self.redis_url,
            CC_REDIS_PREFIX=database_of(self.url),
            CC_MONGO_SOCKET_TIMEOUT_MS=120_000,
            CC_MONGO_OPERATION_TIMEOUT_MS=120_000,
        )
        return MongoStore(self.url, settings=settings)

    def obstruct(self, place: Path) -> Callable[[], None]:
        client = pymongo.MongoClient[dict[str, Any]](self.url)
        meta = client[database_of(self.url)][META]
        meta.insert_one({"_id": "schema", "schemaVersion": 1_000})

        def mend() -> None:
            meta.delete_one({"_id": "schema"})
            client.close()

        return mend

    def damage(self, place: Path, contract: Contract, text: str) -> bool:
        with pymongo.MongoClient[dict[str, Any]](self.url) as client:
            documents = client[database_of(self.url)][contract.collection]
            return documents.update_one({"payload": text}, {"$set": {"rev": "?"}}).modified_count == 1
