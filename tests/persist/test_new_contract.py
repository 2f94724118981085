"""Adding a contract is adding a row: everything else finds it there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import backtest_kit as bk
from backtest_kit.persist.contracts import ALL_CONTRACTS

PROGRAM = """
import asyncio, os, sqlite3, sys
from pathlib import Path

from backtest_kit.persist.contracts import (
    ALL_CONTRACTS, CONTRACTS, Contract, Delete, Durability, Home, Keep, Kind, WriteRule,
)

# Before anything else is imported, as a row in the table would be.
ROW = Contract(
    "trade", ("strategyName", "tradeId"), Kind.SLOT, WriteRule.REPLACE, Delete.SOFT, Durability.RECORD,
    Home.BOUND, Home.MEMORY, Keep(days=3),
)
CONTRACTS["trade"] = ROW
"""

PLACES = """
import backtest_kit as bk
from backtest_kit import default
from backtest_kit.persist.migration import migrate_store
from backtest_kit.persist.operations import du
from backtest_kit.persist.retention import DAY_MS, compact, retention_of
from backtest_kit.persist.urls import store_at
from backtest_kit.persist.writing import now_ms

KEY = dict(strategy_name="trend", trade_id="t-1")

async def main():
    door = default.PersistTradeAdapter
    assert repr(door) == "<PersistTradeAdapter(strategy_name, trade_id)>"
    for url in ("memory:", "file:dump", "sqlite:bot.db"):
        store = store_at(url)
        door.use_store(store)
        await door.write({"profit": 1.5}, **KEY)
        assert await door.read(**KEY) == {"profit": 1.5}
        assert [value async for _, value in door.list(strategy_name="trend")] == [{"profit": 1.5}]
        assert [usage.contract for usage in await du(store)] == ["trade"]
        assert await store.check(deep=True) == []
        await store.close()
    assert Path("dump/trade/trend/t-1.json").is_file()

    kit = bk.Kit("kit")
    assert kit.persistence.trade is kit.persistence.adapters["trade"]
    assert kit.persistence.in_memory(ROW, "backtest") and not kit.persistence.in_memory(ROW, "live")
    kit.persistence.trade.use_persist_trade_adapter(dict_adapter())
    await kit.persistence.trade.write(1, **KEY)
    assert await kit.persistence.trade.remove(**KEY)

    source, target = store_at("file:dump"), store_at("sqlite:moved.db")
    moved = await migrate_store(source, target)
    assert [(item.contract, item.copied) for item in moved.contracts] == [("trade", 1)]
    retention = retention_of(bk.Settings())
    for days, forgotten in ((2, []), (4, ["trade"])):
        expired = await compact(target, retention, at_ms=now_ms() + days * DAY_MS)
        assert [item.contract for item in expired] == forgotten
    await source.close()
    await target.close()

def dict_adapter():
    class Adapter:
        def __init__(self):
            self.kept = {}
        def read_value(self, entity_id):
            return self.kept.get(entity_id)
        def write_value(self, entity_id, entity):
            self.kept[entity_id] = entity
    return Adapter

asyncio.run(main())
"""

COMMANDS = """
from typer.testing import CliRunner
from backtest_kit.cli.app import app

for arguments, shown in (
    (["store", "ls", "trade", "--store", "file:dump"], "trend/t-1"),
    (["store", "get", "trade", "trend/t-1", "--store", "file:dump"], "profit"),
    (["records", "ls", "trade", "--store", "file:dump"], "t-1"),
    (["store", "du", "--store", "file:dump"], "trade"),
):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and shown in done.output, (arguments, done.output, done.exception)
"""

MONGO = """
import pymongo
from backtest_kit.persist.store import Write
from backtest_kit.persist.urls import store_at

async def main():
    store = store_at(URL)
    await store.put(Write(ROW, ("trend", "t-1"), {"profit": 1.5}))
    assert (await store.get(ROW, ("trend", "t-1"))).value == {"profit": 1.5}
    await store.close()

asyncio.run(main())
indexes = pymongo.MongoClient(URL).get_default_database()["trade-items"].index_information().values()
unique = [[field for field, _ in index["key"]] for index in indexes if index.get("unique")]
assert ["namespace", "strategyName", "tradeId"] in [sorted(fields) for fields in unique], unique
"""


def run(*parts: str, place: Path) -> None:
    code = PROGRAM + "".join(parts)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, text=True, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_store_path_door_migration_retention_and_verb_finds_it(tmp_path: Path) -> None:
    run(PLACES, COMMANDS, place=tmp_path)


def test_conformance_cases_include_it(tmp_path: Path) -> None:
    run("from backtest_kit.persist.testing.harness import RECORDS\nassert ROW in RECORDS\n", place=tmp_path)


def test_mongo_has_a_collection_and_a_unique_index_for_it(mongo_url: str, tmp_path: Path) -> None:
    run(f"URL = {mongo_url!r}\n", MONGO, place=tmp_path)


@pytest.mark.parametrize("name", bk.Kit().persistence.front_doors())
def test_every_front_door_has_a_typed_name_in_the_package(name: str) -> None:
    assert name in bk.__all__, f"add {name} to __init__.pyi and default.py"


def test_every_retention_setting_is_named_in_the_table() -> None:
    named = {value for row in ALL_CONTRACTS.values() for value in (row.keep.days, row.keep.count)} - {1, float("inf")}
    others = {"CC_RETENTION_REMOVED_DAYS", "CC_RETENTION_RUN_DAYS", "CC_RETENTION_RUN_COUNT"}
    assert named | others == {name for name in bk.Settings.__struct_fields__ if name.startswith("CC_RETENTION_")}
