"""A store over the database of a test, and a look behind its back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pymongo
import pytest
import pytest_asyncio
from tests.mongo.samples import Database, store_over

from backtest_kit.persist.backends.mongo.connection import database_of
from backtest_kit.persist.backends.mongo.store import MongoStore


@pytest.fixture
def database(mongo_url: str) -> Iterator[Database]:
    with pymongo.MongoClient[dict[str, Any]](mongo_url) as client:
        yield client[database_of(mongo_url)]


@pytest_asyncio.fixture
async def store(mongo_url: str) -> AsyncIterator[MongoStore]:
    store = store_over(mongo_url)
    await store.open()
    yield store
    await store.close()
