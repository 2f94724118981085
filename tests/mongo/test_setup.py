"""`setup()` and its settings: what moves where, what is dialled, and that no password is shown."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pymongo.errors import InvalidOperation
from rich.pretty import pretty_repr

import backtest_kit as bk
from backtest_kit.errors import RetryLater, UserError
from backtest_kit.kit import Kit
from backtest_kit.model.identity import Mode
from backtest_kit.mongo import PROFILE, MongoSetup
from backtest_kit.persist.backends.mongo.settings import MongoSettings
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.binding import MODES
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.urls import mask, store_at

NOWHERE = "mongodb://127.0.0.1:9/nothing"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MongoSettings.__struct_fields__:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


def kinds(kit: Kit, mode: Mode) -> dict[str, str]:
    """By contract, what kind of store keeps it."""
    return {name: type(kit.persistence.store_for(row, mode)).__name__ for name, row in CONTRACTS.items()}


def test_setup_moves_all_sixteen_contracts_and_dials_nothing(kit: Kit) -> None:
    MongoSetup(kit).setup(CC_MONGO_CONNECTION_STRING=NOWHERE)
    for mode in MODES:
        assert kinds(kit, mode) == dict.fromkeys(CONTRACTS, "MongoStore")


async def test_clients_are_those_of_the_kit_and_closed_with_it(kit: Kit, mongo_url: str, redis_address: str) -> None:
    setup = MongoSetup(kit)
    setup.set_config(CC_MONGO_CONNECTION_STRING=mongo_url, CC_REDIS_URL=redis_address, CC_REDIS_PREFIX="clients")
    mongo, cache = await setup.get_mongo(), await setup.get_redis()  # before anything is bound to MongoDB
    assert cache is not None
    assert (await mongo.admin.command("ping"))["ok"] == 1
    key = ("trend", "binance", "BTCUSDT")
    setup.install()
    await kit.persistence.signal.write("value", strategy_name=key[0], exchange_name=key[1], symbol=key[2])
    assert await cache.keys("clients:*") != []
    assert await setup.forget_ids() == 1
    assert await cache.keys("clients:*") == []
    assert await kit.persistence.signal.read(strategy_name=key[0], exchange_name=key[1], symbol=key[2]) == "value"
    await setup.forget_ids()
    await kit.close()
    with pytest.raises(InvalidOperation):
        await mongo.admin.command("ping")
    setup.set_config(CC_REDIS_URL="redis://127.0.0.1:9")
    with pytest.raises(RetryLater, match=r"cannot remove the ids from Redis at redis://127\.0\.0\.1:9"):
        await setup.forget_ids()
    setup.set_config(CC_REDIS_URL="", CC_REDIS_HOST="")
    assert await setup.forget_ids() == 0
    await kit.close()


def test_a_blocking_call_leaves_no_connection_of_its_loop(kit: Kit, mongo_url: str) -> None:
    setup = MongoSetup(kit)
    setup.setup(CC_MONGO_CONNECTION_STRING=mongo_url, CC_REDIS_HOST="")
    kit.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
    kit.add_frame_schema("hours", start_date="2024-06-01T00:00", end_date="2024-06-01T06:00")
    kit.add_strategy_schema(
        "always", get_signal=lambda ctx: bk.Signal.bracket("long", price=ctx.price, take_profit_pct=1, stop_loss_pct=1)
    )
    run: Any = {"exchange_name": "demo", "frame_name": "hours"}
    for _ in range(2):
        assert kit.backtest.run_sync("BTCUSDT", strategy_name="always", **run).trades
        kit.walker.run_sync("BTCUSDT", strategies=["always"], **run)
        assert setup._current()._connections._by_loop == {}
    asyncio.run(kit.close())


def test_setup_of_one_mode_leaves_the_others(kit: Kit, tmp_path: Path) -> None:
    before = kinds(Kit(tmp_path), "backtest")
    MongoSetup(kit).setup(modes=["live"])
    assert set(kinds(kit, "live").values()) == {"MongoStore"}
    assert kinds(kit, "backtest") == before


@pytest.mark.parametrize("before", [None, MODES, ["backtest"]], ids=str)
def test_profile_is_the_table_of_the_reference(kit: Kit, before: Sequence[Mode] | None) -> None:
    setup = MongoSetup(kit)
    if before is not None:
        setup.setup(modes=before)
    setup.setup(modes=PROFILE)
    live, backtest = kinds(kit, "live"), kinds(kit, "backtest")
    table = {
        "session": ("MongoStore", "FileStore"),
        "storage": ("MongoStore", "MemoryStore"),
        "recent": ("MongoStore", "MemoryStore"),
        "notification": ("MongoStore", "MemoryStore"),
        "memory": ("MongoStore", "FileStore"),
        "state": ("MongoStore", "FileStore"),
        "candle": ("MongoStore", "MongoStore"),
        "log": ("FileStore", "FileStore"),
    }
    assert {name: (live[name], backtest[name]) for name in table} == table
    money = ("signal", "schedule", "strategy", "risk", "partial", "breakeven")
    assert {live[name] for name in money} == {"MongoStore"}
    assert {backtest[name] for name in money} == {"MemoryStore"}


def test_contract_bound_by_its_name_stays_there(kit: Kit) -> None:
    kit.persistence.bind("log", store_at("memory:"))
    MongoSetup(kit).setup()
    assert kinds(kit, "live")["log"] == "MemoryStore"


@pytest.mark.parametrize("modes", ["live", ["dream"], ["live", "dream"], []], ids=str)
def test_unknown_modes_and_none_are_refused_and_change_nothing(kit: Kit, modes: Any) -> None:
    before, setup = kinds(kit, "live"), MongoSetup(kit)
    with pytest.raises(UserError, match="live, paper, backtest"):
        setup.setup(modes=modes, CC_REDIS_HOST="cache")
    with pytest.raises(UserError, match="live, paper, backtest"):
        setup.install(modes=modes)
    assert kinds(kit, "live") == before
    assert setup.get_config() == MongoSettings()


def test_settings_come_from_the_environment_and_then_from_the_program(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC_REDIS_PORT", "6400")
    monkeypatch.setenv("CC_REDIS_HOST", "cache")
    setup = MongoSetup(kit)
    assert setup.get_config().redis_url == "redis://cache:6400"
    setup.set_config(CC_REDIS_HOST="redis-prod", CC_REDIS_USER="p/w:d@")
    assert setup.get_config().redis_url == "redis://p%2Fw%3Ad%40:@redis-prod:6400"
    setup.set_config(CC_REDIS_HOST="")
    assert setup.get_config().redis_url == ""


def test_defaults_are_those_of_the_reference() -> None:
    settings = MongoSettings()
    assert settings.CC_MONGO_CONNECTION_STRING == "mongodb://localhost:27017/backtest-kit?wtimeoutMS=15000"
    assert (settings.CC_REDIS_HOST, settings.CC_REDIS_PORT) == ("127.0.0.1", 6379)


def test_bad_settings_are_named_together_and_change_nothing(kit: Kit) -> None:
    setup = MongoSetup(kit)
    with pytest.raises(UserError) as caught:
        setup.set_config(CC_REDIS_PORT="many", CC_REDIS_HAST="x", CC_MONGO_CONNECTION_STRING="http://u:secret@h/")
    for text in ("CC_REDIS_PORT", "CC_REDIS_HAST", "mongodb://"):
        assert text in str(caught.value)
    assert "secret" not in str(caught.value)
    assert setup.get_config() == MongoSettings()


@pytest.mark.parametrize(
    "url",
    [
        "mongodb://user:secret@host/db",
        "mongodb://user:secret@host:1,b:2/db?authSource=admin&tlsCertificateKeyFilePassword=secret",
        "mongodb://user:se/secret@x@host/db",
        "mongodb+srv://user:secret@host/?authMechanismProperties=AWS_SESSION_TOKEN:secret@x",
        "redis://:secret@host:6379",
        "mongodb://user:se#secret[@host/db",
    ],
)
def test_no_password_is_shown(kit: Kit, url: str) -> None:
    assert "secret" not in mask(url)
    setup = MongoSetup(kit)
    field = "CC_REDIS_URL" if url.startswith("redis") else "CC_MONGO_CONNECTION_STRING"
    setup.set_config(**{field: url, "CC_REDIS_PASSWORD": "secret"})
    config = setup.get_config()
    assert "secret" not in repr(config) + str(config) + f"{config}" + pretty_repr(config)
    assert "CC_REDIS_PASSWORD='***'" in pretty_repr(config)
    assert config.redis_url.count("secret") == 1 or field == "CC_REDIS_URL"


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({"CC_MONGO_CONNECTION_STRING": "user:secret@host/db"}, "mongodb://"),
        ({"CC_MONGO_CONNECTION_STRING": "mongodb:user:secret@host/db"}, "mongodb://"),
        ({"CC_MONGO_CONNECTION_STRING": ""}, "mongodb://"),
        ({"CC_REDIS_URL": "default:se://secret@host:6379"}, "redis://"),
        ({"CC_REDIS_HOST": "redis://:secret@host:6379"}, "CC_REDIS_URL"),
        ({"CC_REDIS_HOST": "host:6379"}, "CC_REDIS_PORT"),
    ],
    ids=str,
)
def test_address_in_the_wrong_form_is_refused_without_its_password(
    kit: Kit, changes: dict[str, Any], way_out: str
) -> None:
    setup = MongoSetup(kit)
    with pytest.raises(UserError, match=next(iter(changes))) as caught:
        setup.setup(**changes)
    assert way_out in str(caught.value)
    assert "secret" not in str(caught.value)
    assert setup.get_config() == MongoSettings()


@pytest.mark.parametrize("url", ["bot:secret@host/db", "mongodb:bot:secret@host/db", "mongo://bot:secret@host/db"])
def test_address_of_no_store_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(UserError, match="mongodb://") as caught:
        store_at(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "mongodb://127.0.0.1:9/live",
        "mongodb://127.0.0.1:9",
        "mongodb://127.0.0.1:9/?appName=bot",
        "mongodb://127.0.0.1:9,127.0.0.1:10/live%2Done?replicaSet=rs0",
        "mongodb://[::1]:9/live",
        "mongodb://bot:p#w@127.0.0.1:9/live",
        "mongodb://bot:p[w]@127.0.0.1:9/live?serverSelectionTimeoutMS=70",
    ],
)
async def test_database_and_options_are_those_that_the_driver_reads(address: str) -> None:
    """A position must not be looked for in another database, whatever letters the password has."""
    store = store_at(address)
    assert isinstance(store, MongoStore)
    connection = store.connection()
    assert connection.database_name == connection.mongo.get_default_database("backtest-kit").name
    wanted = 0.07 if "serverSelectionTimeoutMS" in address else 3.0
    assert connection.mongo.options.server_selection_timeout == wanted
    await store.close()


async def test_name_of_a_collection_in_the_address_is_refused() -> None:
    store = store_at("mongodb://bot:secret@127.0.0.1:9/live.signal-items")
    with pytest.raises(UserError, match="has a dot") as caught:
        await store.open()
    assert "secret" not in str(caught.value)


async def test_address_that_the_driver_refuses_is_named_without_its_password(kit: Kit) -> None:
    setup = MongoSetup(kit)
    setup.set_config(CC_MONGO_CONNECTION_STRING="mongodb://user:sec@ret@host:port/db", CC_REDIS_HOST="")
    with pytest.raises(UserError, match="CC_MONGO_CONNECTION_STRING") as caught:
        await setup.get_mongo()
    assert "ret" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_clients_are_made_once_per_loop_and_redis_may_be_none(kit: Kit) -> None:
    setup = MongoSetup(kit)
    setup.setup(CC_MONGO_CONNECTION_STRING=NOWHERE, CC_REDIS_HOST="127.0.0.1", CC_REDIS_PORT=9)
    assert await setup.get_mongo() is await setup.get_mongo()
    redis = await setup.get_redis()
    assert redis is not None
    await kit.close()
    setup.setup(CC_REDIS_HOST="")
    assert await setup.get_redis() is None
    await kit.close()


@pytest.mark.parametrize("name", ["mine", "backtest_kit.mongo", "backtest_kit.mongo.bot"])
async def test_logger_of_a_kit_is_told_what_its_store_says(
    name: str, kit: Kit, tmp_path: Path, mongo_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = MongoSetup(Kit(tmp_path / "other"))
    other.set_logger(logging.getLogger("theirs"))
    setup = MongoSetup(kit)
    setup.set_logger(logging.getLogger("before"))
    setup.setup(CC_MONGO_CONNECTION_STRING=mongo_url, CC_REDIS_HOST="127.0.0.1", CC_REDIS_PORT=9)
    setup.set_logger(logging.getLogger(name))
    signal = kit.persistence.signal
    await signal.write("value", strategy_name="trend", exchange_name="binance", symbol="BTCUSDT")
    assert await signal.read(strategy_name="trend", exchange_name="binance", symbol="BTCUSDT") == "value"
    await kit.close()
    said = {record.name for record in caplog.records if "Redis at" in record.getMessage()}
    assert said == {name}


def test_address_of_a_store_may_be_one_of_mongodb(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_at(NOWHERE)
    assert isinstance(store, MongoStore)
    assert store.settings.redis_url == ""
    monkeypatch.setenv("CC_REDIS_HOST", "cache")
    with_redis = store_at(NOWHERE)
    assert isinstance(with_redis, MongoStore)
    assert with_redis.settings.redis_url == "redis://cache:6379"


def test_missing_package_is_named_with_the_way_out() -> None:
    program = (
        "import sys\nsys.modules['pymongo'] = None\n"
        "from backtest_kit.mongo import setup\nfrom backtest_kit.errors import UserError\n"
        "try:\n    setup()\nexcept UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "pip install 'backtest-kit[mongo]'" in done.stdout, done.stderr
