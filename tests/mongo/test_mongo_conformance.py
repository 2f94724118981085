"""The conformance suite over MongoDB: with Redis, without, with one that dies, and without transactions."""

from __future__ import annotations

from pathlib import Path

import pytest

from backtest_kit.persist.backends.mongo import MongoStore
from backtest_kit.persist.backends.mongo_settings import MongoSettings
from backtest_kit.persist.store import Store
from backtest_kit.persist.testing import StoreConformance

DEAD = "mongodb://127.0.0.1:9/nothing"
"""The discard port: nobody answers there."""


class MongoConformance(StoreConformance):
    """Every place is a database of its own."""

    url = ""
    redis_url = ""

    @pytest.fixture(autouse=True)
    def _address(self, mongo_url: str) -> None:
        self.url = mongo_url

    def make_store(self, place: Path) -> Store:
        settings = MongoSettings(
            CC_REDIS_HOST="",
            CC_REDIS_URL=self.redis_url,
            CC_REDIS_PREFIX=place.name,
            CC_MONGO_SERVER_SELECTION_TIMEOUT_MS=200,
        )
        address = place / "address"
        return MongoStore(address.read_text() if address.exists() else self.url, settings=settings)


class TestMongoWithRedis(MongoConformance):
    @pytest.fixture(autouse=True)
    def _redis(self, redis_address: str) -> None:
        self.redis_url = redis_address


class TestMongoWithoutRedis(MongoConformance):
    pass


class TestMongoStandalone(MongoConformance):
    @pytest.fixture(autouse=True)
    def _address(self, standalone_url: str) -> None:
        self.url = standalone_url
