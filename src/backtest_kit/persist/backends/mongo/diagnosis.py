"""What `backtest-kit doctor` reports of a MongoDB: does it answer, what does it promise, which indexes has it.

Changes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC
from functools import partial
from typing import Any, Final

from pymongo.errors import OperationFailure

from backtest_kit.errors import BacktestKitError
from backtest_kit.persist.backends.mongo.connection import ACKNOWLEDGED, JOURNALLED, Connection
from backtest_kit.persist.backends.mongo.documents import ROWS, Document
from backtest_kit.persist.backends.mongo.schema import (
    META,
    VERSION,
    check_version,
    drop_command,
    harm_of,
    indexes_of,
    indexes_there,
    is_same,
    shown_fields,
)
from backtest_kit.persist.backends.mongo.server import traits_of
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.diagnosis import clock_reading, median_ms
from backtest_kit.persist.upkeep import Reading, Status

_FULL_BYTES: Final = 64 << 20
_TIGHT_BYTES: Final = 1 << 30


async def examine_mongo(connection: Connection, samples: int) -> list[Reading]:
    """Everything about the server and the database of `connection`."""
    doing = "examine the server"
    try:
        started = time.time()
        hello = await connection.ask(doing, lambda: connection.mongo.admin.command("hello"))
        clock = clock_reading(
            "clock of MongoDB", hello["localTime"].replace(tzinfo=UTC).timestamp(), started, time.time()
        )
        version = (await connection.ask(doing, lambda: connection.mongo.admin.command("buildInfo")))["version"]
        ping = await median_ms(lambda: connection.ask(doing, lambda: connection.mongo.admin.command("ping")), samples)
    except BacktestKitError as error:
        return [Reading("MongoDB", Status.FAULT, str(error))]
    answers = Reading(
        "MongoDB", Status.OK, f"{version} at {connection.where}, database {connection.database_name}", median_ms=ping
    )
    topology, traits = _topology(hello), traits_of(hello)
    connection.server.traits = traits
    readings = [answers, topology, *_address(connection), clock]
    if topology.status is Status.FAULT:
        return readings
    try:
        readings += [
            await _reading(connection, samples),
            await _writing(connection, samples),
            *await _space(connection),
        ]
        schema = await _schema(connection)
        readings += [
            schema,
            *await _foreign_records(connection),
            *await _all_indexes(connection, is_new=schema.status is Status.NEW, is_cluster=traits.is_cluster),
        ]
    except BacktestKitError as error:
        readings.append(Reading("database", Status.FAULT, str(error)))
    return readings


def _topology(hello: Mapping[str, Any]) -> Reading:
    traits = traits_of(hello)
    if traits.is_cluster:
        return Reading("topology", Status.OK, "sharded cluster, transactions")
    if not traits.has_transactions:
        says = "standalone: no transactions, no majority; the records of one change are written one after the other"
        remedy = "make it a replica set of one node: mongod --replSet rs0, then rs.initiate() in mongosh, once"
        return Reading("topology", Status.WEAK, says, remedy)
    name, members, arbiters = hello["setName"], len(hello.get("hosts", ())), len(hello.get("arbiters", ()))
    if not hello.get("isWritablePrimary", hello.get("ismaster", False)):
        remedy = f"take directConnection out of the address, or write replicaSet={name} into it"
        says = f"replica set {name}: this member is not the primary and takes no writes"
        return Reading("topology", Status.FAULT, says, remedy)
    says = f"replica set {name}, {members} with data, transactions"
    if arbiters:
        remedy = "with one member with data down, no majority can confirm a money write: make arbiters members"
        return Reading("topology", Status.WARNING, f"{says}, {arbiters} arbiters", remedy)
    return Reading("topology", Status.OK, says)


def _address(connection: Connection) -> list[Reading]:
    """What a write is promised, and what the address would have instead."""
    money, record = (json.dumps(concern.document) for concern in (JOURNALLED, ACKNOWLEDGED))
    readings = [Reading("write concern", Status.OK, f"money {money}; records and candles {record}, flushed on close")]
    asked = connection.mongo.write_concern.document
    if (asked.get("w") in (0, 1) and not asked.get("j")) or asked.get("j") is False:
        says = (
            f"the address asks for {json.dumps(asked)}: this program ignores that, others that use the address do not"
        )
        remedy = "take w and journal out of CC_MONGO_CONNECTION_STRING, or write w=majority&journal=true"
        readings.append(Reading("write concern of the address", Status.WEAK, says, remedy))
    preference = connection.mongo.read_preference
    if preference.mongos_mode != "primary":
        says = f"the address asks for {preference.mongos_mode}: this program always reads from the primary"
        remedy = "take readPreference out of CC_MONGO_CONNECTION_STRING: an old copy of a position is a wrong one"
        readings.append(Reading("read preference of the address", Status.WEAK, says, remedy))
    return readings


async def _reading(connection: Connection, samples: int) -> Reading:
    signal = connection.collection(ROWS["signal"])
    absent = {"namespace": "", **dict.fromkeys(ROWS["signal"].key_fields, "")}
    took = await median_ms(lambda: connection.ask("read", lambda: signal.find_one(absent)), samples)
    return Reading("read by key", Status.OK, "of a record, from the primary", median_ms=took)


async def _writing(connection: Connection, samples: int) -> Reading:
    """A deletion that matches no document is confirmed like any other write, and changes nothing."""
    meta = connection.named(META, Durability.MONEY)
    took = await median_ms(lambda: connection.ask("write", lambda: meta.delete_one({"_id": "doctor"})), samples)
    return Reading("money write", Status.OK, "allowed, and confirmed from the journal of the majority", median_ms=took)


async def _space(connection: Connection) -> list[Reading]:
    """The disk of the server, if it says."""
    try:
        stats = await connection.database.command("dbStats")
    except OperationFailure:
        return []  # the user has no right to ask, or the server does not know the command
    says = f"{stats.get('objects', 0):,.0f} documents in {stats.get('storageSize', 0) / (1 << 20):,.1f} MiB"
    if "fsTotalSize" not in stats or "fsUsedSize" not in stats:
        return [Reading("space", Status.OK, says)]
    free = stats["fsTotalSize"] - stats["fsUsedSize"]
    says += f", {free / (1 << 30):,.1f} GiB free on the server"
    if free >= _TIGHT_BYTES:
        return [Reading("space", Status.OK, says)]
    status = Status.FAULT if free < _FULL_BYTES else Status.WARNING
    return [Reading("space", status, says, "give the server's volume more space")]


async def _schema(connection: Connection) -> Reading:
    meta = connection.named(META, Durability.MONEY)
    version = await connection.ask("read the schema", lambda: meta.find_one(VERSION))
    if version is None:
        says = f"{connection.database_name} is not a store yet: the first run makes it"
        return Reading("schema", Status.NEW, says)
    try:
        check_version(connection, version)
    except BacktestKitError as error:
        return Reading("schema", Status.FAULT, str(error))
    return Reading("schema", Status.OK, f"version {version['schemaVersion']}")


async def _foreign_records(connection: Connection) -> list[Reading]:
    """Positions of another program in our collections: no read of this program finds them."""
    readings = []
    for contract in ROWS.values():
        if contract.durability is not Durability.MONEY:
            continue
        question = partial(connection.collection(contract).find_one, {"namespace": None})
        found = await connection.ask("look for records of other programs", question)
        if found is not None:
            key = {field: found[field] for field in contract.key_fields if field in found}
            says = f"{contract.collection} has documents of another program, such as {key}: this one ignores them"
            remedy = (
                "name another database in CC_MONGO_CONNECTION_STRING; or close those positions with the program "
                "that made them, and delete them"
            )
            readings.append(Reading("records of others", Status.FAULT, says, remedy))
    return readings


# -- indexes ---------------------------------------------------------------------------------------------


async def _all_indexes(connection: Connection, *, is_new: bool, is_cluster: bool) -> list[Reading]:
    readings = []
    for contract in ROWS.values():
        found = await connection.ask("list the indexes", lambda row=contract: indexes_there(connection, row))  # type: ignore[misc]
        readings += _indexes_of(contract, found, is_new=is_new, is_cluster=is_cluster)
    if not readings:
        says = "none yet" if is_new else f"all there, in {len(ROWS)} collections, and no others"
        readings.append(Reading("indexes", Status.OK, says))
    return readings


def _indexes_of(contract: Contract, found: Sequence[Document], *, is_new: bool, is_cluster: bool) -> list[Reading]:
    subject = f"indexes of {contract.collection}"
    collection = f"db[{json.dumps(contract.collection)}]"
    ours = {model.document["name"]: model for model in indexes_of(contract)}
    serving = {name: [each["name"] for each in found if is_same(each, model)] for name, model in ours.items()}
    there = {name for names in serving.values() for name in names}
    readings = []
    for index in found:
        name = index["name"]
        reason = None if name in there else harm_of(contract, index)
        if name in ours and name not in there:
            reason = reason or f"{name} is of another form than this version's: {shown_fields(index)}"
        if reason:
            remedy = drop_command(contract, name)
            readings.append(Reading(subject, Status.FAULT, reason, remedy))
    for name, model in ours.items():
        if not is_new and not serving[name] and name not in {each["name"] for each in found}:
            keys, options = json.dumps(dict(model.document["key"])), {"name": name}
            is_unique = bool(model.document.get("unique"))
            shown = json.dumps({**options, "unique": True} if is_unique else options)
            lost = "two writers can make a record twice" if is_unique else "listings are slow"
            remedy = f"mongosh: {collection}.createIndex({keys}, {shown}); the next opening makes it too"
            readings.append(
                Reading(subject, Status.FAULT if is_unique else Status.WARNING, f"{name} is missing: {lost}", remedy)
            )
    idle = sorted(each["name"] for each in found if each["name"] not in {*ours, *there} and not harm_of(contract, each))
    # A cluster needs the index of a shard key, whatever it looks like.
    if idle and not is_cluster:
        says = f"{', '.join(idle)}: no query of this program uses them, and every write pays for them"
        drop = f"dropIndexes({json.dumps(idle)})" if len(idle) > 1 else f"dropIndex({json.dumps(idle[0])})"
        readings.append(Reading(subject, Status.WARNING, says, f"mongosh: {collection}.{drop}"))
    return readings
