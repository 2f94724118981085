"""Every fault of a MongoDB or a Redis that costs positions, seeded on real servers, is found with its remedy."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pymongo
import pytest
import redis
from pymongo.database import Database as AnyDatabase
from tests.commands import run_command
from tests.servers import Server, mongo_server, redis_server, running

from backtest_kit.errors import RetryLater, UserError
from backtest_kit.persist.backends.mongo.settings import MongoSettings
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.codec import NewerSchema
from backtest_kit.persist.contracts import ALL_CONTRACTS, CONTRACTS
from backtest_kit.persist.diagnosis import examine, fails, require_live_grade
from backtest_kit.persist.store import Write
from backtest_kit.persist.upkeep import Reading, Status

SIGNAL = CONTRACTS["signal"]
SESSION = CONTRACTS["session"]
KEY = ("trend", "binance", "BTCUSDT")
Database = AnyDatabase[dict[str, Any]]


def store_at(url: str, redis_url: str = "", *, existing: bool = False, **changes: Any) -> MongoStore:
    settings = MongoSettings(CC_REDIS_HOST="", CC_REDIS_URL=redis_url, **changes)
    return MongoStore(url, settings=settings, existing=existing)


async def diagnosis(url: str, redis_url: str = "", **changes: Any) -> list[Reading]:
    store = store_at(url, redis_url, existing=True, **changes)
    try:
        return await examine(store, samples=2)
    finally:
        await store.close()


def found(readings: list[Reading], status: Status) -> str:
    return "\n".join(f"{each.subject}: {each.detail} -> {each.remedy}" for each in readings if each.status is status)


async def fill(url: str, redis_url: str = "") -> None:
    store = store_at(url, redis_url)
    await store.put(Write(SIGNAL, KEY, {"id": "s-1"}))
    assert await store.get(SIGNAL, KEY)
    await store.close()


@pytest.fixture
def database(mongo_url: str) -> Iterator[Database]:
    """The test's own database, past the store."""
    with pymongo.MongoClient[dict[str, Any]](mongo_url) as client:
        yield client[urlsplit(mongo_url).path.strip("/")]


@pytest.fixture
def own_redis() -> Iterator[str]:
    """A Redis whose settings a test may change."""
    with running(redis_server()) as server:
        yield f"redis://127.0.0.1:{server.port}"


def state(database: Database) -> dict[str, Any]:
    return {
        name: (list(database[name].find()), sorted(map(str, database[name].list_indexes())))
        for name in database.list_collection_names()
    }


def keys_in(redis_url: str) -> set[bytes]:
    with redis.Redis.from_url(redis_url) as client:
        return set(client.scan_iter())


# -- sound ones ------------------------------------------------------------------------------------------


async def test_sound_servers_are_fit_for_live_and_looking_changes_nothing(
    mongo_url: str, database: Database, own_redis: str
) -> None:
    await fill(mongo_url, own_redis)
    before, keys = state(database), keys_in(own_redis)
    first, second = await diagnosis(mongo_url, own_redis), await diagnosis(mongo_url, own_redis)
    assert state(database) == before
    assert keys_in(own_redis) == keys
    assert not fails(first, live=True), first
    assert [(each.subject, each.status) for each in first] == [(each.subject, each.status) for each in second]
    assert f"all there, in {len(ALL_CONTRACTS)} collections" in found(first, Status.OK)
    assert "1 entries backtest-kit:test-" in found(first, Status.OK)
    times = {each.subject: each.median_ms for each in first if each.median_ms is not None}
    assert {"MongoDB", "Redis", "read by key", "money write"} == set(times)
    assert min(times.values()) > 0
    store = store_at(mongo_url, own_redis)
    assert await require_live_grade(store)
    await store.close()


async def test_database_that_does_not_exist_is_new_and_not_made(mongo_url: str, database: Database) -> None:
    readings = await diagnosis(mongo_url)
    assert "is not a store yet" in found(readings, Status.NEW)
    assert not fails(readings, live=True)
    assert database.list_collection_names() == []


async def test_clock_is_compared_in_utc_wherever_the_host_is(mongo_url: str) -> None:
    await fill(mongo_url)
    code, shown = diagnosed(mongo_url, environment={"TZ": "Asia/Tokyo"})
    assert code == 0, shown
    (clock,) = [each for each in json.loads(shown)["readings"] if each["subject"] == "clock of MongoDB"]
    assert clock["status"] == "ok", clock


# -- weak ones -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("w=0", "asks for"),
        ("w=1", "asks for"),
        ("w=majority&journal=false", "asks for"),
        ("readPreference=secondary", "asks for secondary"),
        ("readPreference=nearest", "asks for nearest"),
    ],
)
async def test_weak_address_is_refused_for_live(mongo_url: str, options: str, said: str) -> None:
    await fill(mongo_url)
    readings = await diagnosis(f"{mongo_url}?{options}")
    assert said in found(readings, Status.WEAK)
    assert "CC_MONGO_CONNECTION_STRING" in found(readings, Status.WEAK)
    assert not fails(readings)
    store = store_at(f"{mongo_url}?{options}")
    with pytest.raises(UserError, match=said):
        await require_live_grade(store)
    assert await require_live_grade(store, allow_weak=True)
    await store.close()


@pytest.mark.parametrize("options", ["w=majority", "w=1&journal=true", "wtimeoutMS=15000", "readPreference=primary"])
async def test_strong_address_is_fit(mongo_url: str, options: str) -> None:
    assert found(await diagnosis(f"{mongo_url}?{options}"), Status.WEAK) == ""


async def test_standalone_is_weak(standalone_url: str) -> None:
    await fill(standalone_url)
    readings = await diagnosis(standalone_url)
    assert "rs.initiate()" in found(readings, Status.WEAK)
    assert not fails(readings)
    assert fails(readings, live=True)


@pytest.mark.parametrize(
    ("policy", "limit", "status"),
    [
        ("allkeys-lru", 0, Status.WEAK),
        ("allkeys-random", 1 << 27, Status.WEAK),
        ("noeviction", 1 << 27, Status.WARNING),
        ("noeviction", 0, Status.OK),
        ("volatile-lru", 1 << 27, Status.OK),
    ],
)
async def test_eviction_of_redis(mongo_url: str, own_redis: str, policy: str, limit: int, status: Status) -> None:
    with redis.Redis.from_url(own_redis) as client:
        client.config_set("maxmemory-policy", policy)
        client.config_set("maxmemory", limit)
    readings = await diagnosis(mongo_url, own_redis)
    assert policy in found([each for each in readings if each.subject == "Redis memory"], status)
    if status is not Status.OK:
        assert "CONFIG SET maxmemory-policy volatile-lru" in found(readings, status)


# -- indexes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collection", "fields"),
    [
        ("session-items", ("strategyName", "exchangeName", "frameName")),
        ("candle-items", ("symbol", "interval", "timestamp")),
        ("signal-items", ("symbol", "strategyName", "exchangeName")),
        ("log-items", ("entryId",)),
    ],
)
async def test_older_unique_index_is_named_and_the_shown_command_mends_it(
    mongo_url: str, database: Database, collection: str, fields: tuple[str, ...]
) -> None:
    await fill(mongo_url)
    name = database[collection].create_index([(field, 1) for field in fields], unique=True)
    before = state(database)
    readings = await diagnosis(mongo_url)
    assert state(database) == before
    assert f'mongosh: db["{collection}"].dropIndex("{name}")' in found(readings, Status.FAULT)
    assert fails(readings)
    store = store_at(mongo_url)
    with pytest.raises(UserError, match=name):
        await require_live_grade(store, allow_weak=True)
    mend(database, readings)
    await require_live_grade(store)
    await store.close()
    assert not fails(await diagnosis(mongo_url), live=True)


OTHERS: list[tuple[str, dict[str, int], dict[str, Any], str]] = [
    ("candle-items", {"symbol": 1, "interval": 1, "timestamp": 1}, {"unique": True}, "without namespace, exchangeName"),
    ("session-items", {"strategyName": 1, "exchangeName": 1, "frameName": 1}, {"unique": True}, "symbol, backtest"),
    ("signal-items", {"writtenAt": 1}, {"expireAfterSeconds": 3600}, "deletes documents after 3600 s"),
]


@pytest.mark.parametrize(("collection", "keys", "options", "said"), OTHERS, ids=[each[0] for each in OTHERS])
async def test_database_with_an_index_that_loses_records_is_not_opened(
    mongo_url: str, database: Database, collection: str, keys: dict[str, int], options: dict[str, Any], said: str
) -> None:
    """Such an index lets candles of a second exchange go without a word, and refuses or deletes what is money."""
    name = database[collection].create_index(list(keys.items()), **options)
    database[collection].create_index([("symbol", 1), ("when", -1)])  # of no use, and of no harm
    before = state(database)
    store = store_at(mongo_url)
    with pytest.raises(UserError, match=said) as caught:
        await store.put(Write(SIGNAL, KEY, 1))
    assert state(database) == before, "half a store was made"
    shown = str(caught.value)
    remedy = shown[shown.index("mongosh:") : shown.index(", or name")]
    assert name in remedy
    mend(database, [Reading("index", Status.FAULT, shown, remedy)])
    await store.put(Write(SIGNAL, KEY, 1))
    await store.close()


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ([("riskName", 1)], {"name": "key"}),
        ([("namespace", 1), ("exchangeName", 1), ("riskName", 1)], {}),
        ([("namespace", 1), ("exchangeName", 1), ("riskName", 1)], {"unique": True, "sparse": True}),
    ],
)
async def test_index_that_is_in_the_way_of_ours_is_named_before_anything_is_made(
    mongo_url: str, database: Database, keys: list[tuple[str, int]], options: dict[str, Any]
) -> None:
    name = database["risk-items"].create_index(keys, **options)
    before = state(database)
    store = store_at(mongo_url)
    with pytest.raises(UserError, match=f'db\\["risk-items"\\].dropIndex\\("{name}"\\)'):
        await store.open()
    assert state(database) == before
    database["risk-items"].drop_index(name)
    await store.open()
    await store.close()


async def test_index_of_a_shard_key_serves_under_its_name(mongo_url: str, database: Database) -> None:
    """`sh.shardCollection` makes it of exactly these fields, and calls it after them."""
    keys = ["namespace", "exchangeName", "symbol", "interval", "timestamp"]
    name = database["candle-items"].create_index([(key, 1) for key in keys], unique=True)
    await fill(mongo_url)
    assert set(database["candle-items"].index_information()) == {"_id_", name}
    readings = await diagnosis(mongo_url)
    assert f"all there, in {len(ALL_CONTRACTS)} collections, and no others" in found(readings, Status.OK)
    assert not fails(readings, live=True)


async def test_position_that_another_program_has_left_is_named_and_keeps_live_from_starting(
    mongo_url: str, database: Database
) -> None:
    await fill(mongo_url)
    theirs = {"strategyName": "trend", "exchangeName": "binance", "symbol": "SOLUSDT", "payload": {"id": "s-9"}}
    database["signal-items"].insert_one(theirs)
    database["candle-items"].insert_one({"symbol": "BTCUSDT", "interval": "1m", "timestamp": 0})
    faults = found(await diagnosis(mongo_url), Status.FAULT)
    assert "signal-items has documents of another program" in faults
    assert "SOLUSDT" in faults
    assert "candle-items" not in faults
    store = store_at(mongo_url)
    with pytest.raises(UserError, match="SOLUSDT"):
        await require_live_grade(store, allow_weak=True)
    database["signal-items"].delete_one({"symbol": "SOLUSDT"})
    await require_live_grade(store)
    await store.close()


async def test_missing_expiring_and_idle_indexes_are_named_and_mended(mongo_url: str, database: Database) -> None:
    await fill(mongo_url)
    database["signal-items"].drop_index("key")
    database["log-items"].drop_index("order")
    database["risk-items"].drop_index("key")
    database["risk-items"].create_index([("riskName", 1)], name="key")
    database["state-items"].create_index([("writtenAt", 1)], expireAfterSeconds=3600)
    for field in ("symbol", "strategyName", "when"):
        database["partial-items"].create_index([(field, 1)])
    readings = await diagnosis(mongo_url)
    faults, warnings = found(readings, Status.FAULT), found(readings, Status.WARNING)
    assert "signal-items: key is missing: two writers" in faults
    assert "risk-items: key is of another form" in faults
    assert "state-items: writtenAt_1 deletes documents after 3600 s" in faults
    assert "log-items: order is missing" in warnings
    assert 'db["partial-items"].dropIndexes(["strategyName_1", "symbol_1", "when_1"])' in warnings
    for _ in range(2):  # what was in the way of an index is dropped first, and then the index is missing
        mend(database, await diagnosis(mongo_url))
    readings = await diagnosis(mongo_url)
    assert f"all there, in {len(ALL_CONTRACTS)} collections, and no others" in found(readings, Status.OK)
    assert not fails(readings, live=True)


def mend(database: Database, readings: list[Reading]) -> None:
    """Do what the remedies say, word for word, as mongosh would."""
    for each in readings:
        _, is_shell, rest = each.remedy.partition("mongosh: db[")
        if not is_shell:
            continue
        collection, _, call = rest.partition("].")
        verb, _, arguments = call.partition("(")
        given = json.loads(f"[{arguments.partition(')')[0]}]")
        items = database[json.loads(collection)]
        if verb == "createIndex":
            items.create_index(list(given[0].items()), **given[1])
        else:
            assert verb in ("dropIndex", "dropIndexes")
            for name in given if verb == "dropIndex" else given[0]:
                items.drop_index(name)


# -- bad input -------------------------------------------------------------------------------------------


PATIENCE: dict[str, Any] = {"CC_MONGO_SERVER_SELECTION_TIMEOUT_MS": 300, "CC_MONGO_OPERATION_TIMEOUT_MS": 1000}


async def test_no_server(tmp_path: Path) -> None:
    url = "mongodb://bot:geheim@127.0.0.1:9/bot"
    started = time.monotonic()
    readings = await diagnosis(url, CC_MONGO_SERVER_SELECTION_TIMEOUT_MS=300)
    assert time.monotonic() - started < 5, "the time for one operation was waited for as well"
    assert "no MongoDB server answers at mongodb://***@127.0.0.1:9/bot: start it" in found(readings, Status.FAULT)
    store = store_at(url, CC_MONGO_SERVER_SELECTION_TIMEOUT_MS=300)
    started = time.monotonic()
    with pytest.raises(RetryLater, match="start it") as raised:
        await store.put(Write(SIGNAL, KEY, 1))
    assert time.monotonic() - started < 5
    assert "geheim" not in str(raised.value)
    await store.close()


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    """A MongoDB whose user bot may write to `bot` and nothing else, and whose user reader may read it."""
    server = mongo_server()
    guarded = mongo_server("--auth")
    guarded.remove()
    with running(server):
        with pymongo.MongoClient[dict[str, Any]]("127.0.0.1", server.port) as client:
            for user, role in (("bot", "readWrite"), ("reader", "read")):
                roles = [{"role": role, "db": "bot"}]
                client["bot"].command("createUser", user, pwd="geheim", roles=roles)  # noqa: S106
            # What is in the journal survives the kill, and so does what was written before it.
            client["bot"].get_collection("x", write_concern=pymongo.WriteConcern("majority", j=True)).insert_one({})
        server.kill()
        guarded.directory = server.directory
        with running(guarded):
            yield guarded


@pytest.mark.parametrize("credentials", ["bot:falsch@", "nobody:geheim@", ""])
async def test_wrong_credentials(guarded: Server, credentials: str) -> None:
    right = f"mongodb://bot:geheim@127.0.0.1:{guarded.port}/bot"
    assert not fails(await diagnosis(right), live=True)
    wrong = f"mongodb://{credentials}127.0.0.1:{guarded.port}/bot"
    readings = await diagnosis(wrong, **PATIENCE)
    faults = found(readings, Status.FAULT)
    assert "rejected the user: correct user, password and authSource" in faults
    assert "falsch" not in str(readings)
    assert "geheim" not in str(readings)
    store = store_at(wrong, **PATIENCE)
    with pytest.raises(UserError, match="rejected the user"):
        await store.open()
    await store.close()


async def test_user_who_may_only_read(guarded: Server) -> None:
    readings = await diagnosis(f"mongodb://reader:geheim@127.0.0.1:{guarded.port}/bot")
    assert "cannot write: MongoDB at" in found(readings, Status.FAULT)
    assert "grant readWrite on the database" in found(readings, Status.FAULT)


@pytest.mark.parametrize(
    "url", ["mongodb://", "mongodb://h:port/x", "mongodb://a:b@c:d@h/x", "mongodb://h/x?authSource="]
)
async def test_address_that_is_none(url: str) -> None:
    code, shown = diagnosed(url, as_json=False)
    assert code == 2, shown
    assert "CC_MONGO_CONNECTION_STRING" in shown
    assert "a:b" not in shown
    assert "c:d" not in shown


async def test_address_of_no_known_kind_shows_no_password() -> None:
    code, shown = diagnosed("mongo://bot:geheim@localhost/bot", as_json=False)
    assert code == 2
    assert "mongodb://host/name" in shown
    assert "geheim" not in shown


async def test_database_of_a_newer_schema(mongo_url: str, database: Database) -> None:
    await fill(mongo_url)
    database["store-meta"].update_one({"_id": "schema"}, {"$set": {"schemaVersion": 99}})
    before = state(database)
    assert "has schema 99" in found(await diagnosis(mongo_url), Status.FAULT)
    store = store_at(mongo_url)
    with pytest.raises(NewerSchema, match="upgrade; nothing was changed"):
        await store.open()
    await store.close()
    assert state(database) == before


@pytest.mark.parametrize("namespace", [{"namespace": ""}, {}], ids=["ours", "of another program"])
async def test_unique_index_that_duplicates_forbid(
    mongo_url: str, database: Database, namespace: dict[str, str]
) -> None:
    twice = {**namespace, **dict(zip(SIGNAL.key_fields, KEY, strict=True))}
    database["signal-items"].insert_many([dict(twice), dict(twice)])
    database["candle-items"].insert_one({"symbol": "BTCUSDT", "interval": "1m", "timestamp": 1})
    before = state(database)
    store = store_at(mongo_url)
    with pytest.raises(UserError, match="keep one of each"):
        await store.open()
    assert state(database) == before, "half a store was made"
    database["signal-items"].delete_many({})
    await store.open()
    await store.close()
    assert not fails(await diagnosis(mongo_url), live=True)


async def test_redis_that_is_none(mongo_url: str, mongo_address: str, own_redis: str) -> None:
    """The port of MongoDB, nobody's port, a wrong password: all goes on, and the doctor says why it is slow."""
    with redis.Redis.from_url(own_redis) as client:
        client.config_set("requirepass", "geheim")
    cases = {
        mongo_address.replace("mongodb://", "redis://"): "no Redis answers at",
        "redis://127.0.0.1:9": "no Redis answers at",
        own_redis: "rejects the user",
        own_redis.replace("://", "://:falsch@"): "rejects the user",
    }
    for redis_url, said in cases.items():
        started = time.monotonic()
        await fill(mongo_url, redis_url)
        readings = await diagnosis(mongo_url, redis_url)
        assert time.monotonic() - started < 5
        assert said in found(readings, Status.DEGRADED), redis_url
        assert "CC_REDIS_" in found(readings, Status.DEGRADED)
        assert "falsch" not in str(readings)
        assert fails(readings)
        store = store_at(mongo_url, redis_url)
        assert await require_live_grade(store), "what only costs speed must not stop a bot"
        await store.close()
    assert not fails(await diagnosis(mongo_url, own_redis.replace("://", "://:geheim@")), live=True)


async def test_redis_that_is_a_replica(mongo_url: str, own_redis: str) -> None:
    with redis.Redis.from_url(own_redis) as client:
        client.slaveof("127.0.0.1", "9")
        readings = await diagnosis(mongo_url, own_redis)
        client.slaveof()
    assert "name the master" in found(readings, Status.DEGRADED)


async def test_redis_in_cluster_mode(mongo_url: str) -> None:
    server = redis_server("--cluster-enabled", "yes")
    while server.port > 55_000:  # its nodes speak to each other on the port that is 10,000 higher
        server.remove()
        server = redis_server("--cluster-enabled", "yes")
    with running(server):
        readings = await diagnosis(mongo_url, f"redis://127.0.0.1:{server.port}")
    assert "not in cluster mode" in found(readings, Status.DEGRADED)


async def test_redis_that_may_not_be_looked_at(mongo_url: str, own_redis: str) -> None:
    with redis.Redis.from_url(own_redis) as client:
        client.acl_setuser("bot", enabled=True, passwords=["+geheim"], keys=["*"], commands=["+@all", "-info"])
    readings = await diagnosis(mongo_url, own_redis.replace("://", "://bot:geheim@"))
    assert "+info" in found(readings, Status.WARNING)
    assert not fails(readings, live=True)


# -- the command -----------------------------------------------------------------------------------------


def diagnosed(
    url: str, *options: str, as_json: bool = True, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    arguments = ["doctor", "--store", url, "--samples", "1", *options, *(["--json"] if as_json else [])]
    done = run_command(*arguments, environment=environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_command_shows_a_table_and_no_secret(guarded: Server, own_redis: str) -> None:
    with redis.Redis.from_url(own_redis) as client:
        client.config_set("requirepass", "riservato")
    url = f"mongodb://bot:geheim@127.0.0.1:{guarded.port}/bot?w=1"
    secret = {"CC_REDIS_URL": own_redis.replace("://", "://:riservato@")}
    code, shown = diagnosed(url, as_json=False, environment=secret)
    assert code == 0, shown
    for word in ("write concern", "topology", "clock of Redis", "indexes", "weak", "--live would fail"):
        assert word in shown
    for secret_word in ("geheim", "riservato"):
        assert secret_word not in shown
    code, shown = diagnosed(url, "--live", environment=secret)
    assert code == 1
    document = json.loads(shown)
    assert document["fit"] is False
    assert document["store"] == f"mongodb://***@127.0.0.1:{guarded.port}/bot?..."
    assert [each["subject"] for each in document["readings"] if each["status"] == "weak"] == [
        "write concern of the address"
    ]
    code, shown = diagnosed(url, "--live", "--allow-weak", environment=secret)
    assert code == 0
    assert json.loads(shown)["fit"] is True
