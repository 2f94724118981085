"""What goes wrong with a database while a store is open: documents that change, indexes that disappear."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from bson.int64 import Int64
from tests.mongo.samples import KEY, NAME, Database

from backtest_kit.errors import BacktestKitError, Damaged, UserError
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Plain, Write

SIGNAL, MEMORY = CONTRACTS["signal"], CONTRACTS["memory"]
VALUE: Plain = {"price": 100.5, "levels": [1, 2.5, None, True], "note": "x"}

CHANGES: dict[str, dict[str, Any]] = {
    "price": {"payload.price": 100.6},
    "type of a number": {"payload.price": 100},
    "text": {"payload.note": "y"},
    "level": {"payload.levels.0": 3},
    "when": {"when": Int64(6)},
    "written at": {"writtenAt": Int64(6)},
    "removed": {"removed": True},
    "tick": {"tick": Int64(6)},
    "writer": {"writer": "somebody:1"},
    "checksum": {"checksum": "00000000"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_a_document_that_changed_by_itself_is_damaged(
    store: MongoStore, database: Database, change: dict[str, Any]
) -> None:
    await store.put(Write(SIGNAL, KEY, VALUE, when=5))
    database["signal-items"].update_one(NAME, {"$set": change})
    with pytest.raises(Damaged, match=r"signal/trend/binance/BTCUSDT: its checksum does not match.*quarantine restore"):
        await store.get(SIGNAL, KEY)
    with pytest.raises(Damaged):
        _ = [record async for record in store.scan(SIGNAL, include_removed=True)]
    with pytest.raises(Damaged):
        await store.put(Write(SIGNAL, KEY, "over it"))
    assert any("checksum" in finding.problem for finding in await store.check())
    (item,) = await store.quarantined()
    restored = await store.restore(item.path)
    assert restored is not None
    assert await store.get(SIGNAL, KEY) == restored
    assert (await store.put(Write(SIGNAL, KEY, "next", expect=restored.rev))).value == "next"


async def test_a_document_under_the_name_of_another_is_damaged(store: MongoStore, database: Database) -> None:
    await store.put(Write(SIGNAL, KEY, VALUE))
    database["signal-items"].update_one(NAME, {"$set": {"symbol": "ETHUSDT"}})
    with pytest.raises(Damaged, match="checksum"):
        await store.get(SIGNAL, ("trend", "binance", "ETHUSDT"))


async def mended(store: MongoStore) -> None:
    """Let the time of the upkeep come, with the next call of whatever kind."""
    connection = store.connection()
    connection.upkeep_at = 0.0
    await store.get(MEMORY, ("s", "b", "1"))
    await connection.idle()


def unique(database: Database) -> list[str]:
    return [name for name, index in database["signal-items"].index_information().items() if index.get("unique")]


async def test_a_unique_index_that_disappeared_is_made_again(
    store: MongoStore, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    await store.put(Write(SIGNAL, KEY, VALUE))
    database["signal-items"].drop_index("key")
    await store.get(SIGNAL, KEY)
    assert unique(database) == []
    await mended(store)
    assert unique(database) == ["key"]
    assert "the indexes of signal-items at" in caplog.text
    caplog.clear()
    await mended(store)
    assert caplog.text == ""


async def test_two_documents_of_one_name_close_the_store_until_one_is_deleted(
    store: MongoStore, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    await store.put(Write(SIGNAL, KEY, VALUE))
    items = database["signal-items"]
    items.drop_index("key")
    twin = items.find_one(NAME)
    del twin["_id"]
    items.insert_one(twin)
    await mended(store)
    assert "the store rejects reads and writes until this is fixed" in caplog.text
    uses: list[Callable[[], Any]] = [
        lambda: store.get(SIGNAL, KEY),
        lambda: store.put(Write(SIGNAL, KEY, "other")),
        lambda: store.batch([Write(SIGNAL, KEY, "other"), Write(MEMORY, ("s", "b", "1"), 1)]),
    ]
    for use in uses:
        with pytest.raises(UserError, match=r"several documents with the same.*BTCUSDT.*keep one of each"):
            await use()
    items.delete_one({"_id": twin["_id"]})
    found = await store.get(SIGNAL, KEY)
    assert found is not None
    assert found.value == VALUE
    assert unique(database) == ["key"]


async def test_a_store_that_is_only_looked_at_makes_no_index(
    mongo_url: str, store: MongoStore, database: Database
) -> None:
    await store.put(Write(SIGNAL, KEY, VALUE))
    database["signal-items"].drop_index("key")
    looking = MongoStore(mongo_url, existing=True)
    try:
        await looking.get(SIGNAL, KEY)
        await mended(looking)
    finally:
        await looking.close()
    assert unique(database) == []


async def test_a_server_that_is_away_is_no_reason_to_close(store: MongoStore, caplog: pytest.LogCaptureFixture) -> None:
    connection = store.connection()
    client = connection.mongo
    await client.close()
    connection.upkeep_at = 0.0
    results = await asyncio.gather(store.get(SIGNAL, KEY), return_exceptions=True)
    await connection.idle()
    assert isinstance(results[0], BacktestKitError)
    assert connection.is_open
    assert "could not check the indexes" in caplog.text
