"""The conformance suite over MongoDB: with Redis, with one that dies, and with neither Redis nor transactions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from tests.servers import Server, redis_server

from backtest_kit.persist.backends.mongo.connection import Connection, database_of
from backtest_kit.persist.backends.mongo.schema import META
from backtest_kit.persist.backends.mongo.settings import MongoSettings
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.store import Store
from backtest_kit.persist.testing import StoreConformance


class MongoConformance(StoreConformance):
    """Every place is a database of its own."""

    url = ""
    redis_url = ""

    @pytest.fixture(autouse=True)
    def _address(self, mongo_url: str) -> None:
        self.url = mongo_url

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


class TestMongoWithRedis(MongoConformance):
    @pytest.fixture(autouse=True)
    def _redis(self, redis_address: str) -> None:
        self.redis_url = redis_address


class TestMongoStandaloneWithoutRedis(MongoConformance):
    @pytest.fixture(autouse=True)
    def _address(self, standalone_url: str) -> None:
        self.url = standalone_url


@pytest.fixture(scope="module")
def mortal() -> Iterator[Server]:
    server = redis_server()
    yield server
    server.remove()


class TestMongoWithRedisThatDies(MongoConformance):
    """Redis is ended by SIGKILL after the first three operations of each case, which then goes on without it."""

    @pytest.fixture(autouse=True)
    def _redis(self, mortal: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        mortal.kill()
        mortal.start()
        self.redis_url = f"redis://127.0.0.1:{mortal.port}"
        opened, calls = MongoStore._opened, 0

        async def counted(store: MongoStore, connection: Connection | None = None) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                mortal.kill()
            return await opened(store, connection)

        monkeypatch.setattr(MongoStore, "_opened", counted)
