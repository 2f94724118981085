"""How a MongoDB serves a store: what answers, what it promises, which indexes it has. Writes nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import Any, Final

from pymongo.errors import OperationFailure

from backtest_kit.errors import BacktestKitError
from backtest_kit.persist.backends.mongo_client import ACKNOWLEDGED, JOURNALLED, Link
from backtest_kit.persist.backends.mongo_documents import ROWS, Document
from backtest_kit.persist.backends.mongo_schema import (
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
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.diagnosis import median_ms
from backtest_kit.persist.upkeep import Reading, Status

CLOCKS_APART_MS: Final = 1_000
_FULL_BYTES: Final = 64 << 20
_TIGHT_BYTES: Final = 1 << 30


async def examine_mongo(link: Link, samples: int) -> list[Reading]:
    """All that can be told of the server and the database of `link`."""
    doing = "look at the server"
    try:
        started = time.time()
        hello = await link.ask(doing, lambda: link.mongo.admin.command("hello"))
        clock = clock_reading(
            "clock of MongoDB", hello["localTime"].replace(tzinfo=UTC).timestamp(), started, time.time()
        )
        version = (await link.ask(doing, lambda: link.mongo.admin.command("buildInfo")))["version"]
        ping = await median_ms(lambda: link.ask(doing, lambda: link.mongo.admin.command("ping")), samples)
    except BacktestKitError as error:
        return [Reading("MongoDB", Status.FAULT, str(error))]
    answers = Reading("MongoDB", Status.OK, f"{version} at {link.where}, database {link.database_name}", median_ms=ping)
    topology = _topology(hello)
    readings = [answers, topology, *_address(link), clock]
    if topology.status is Status.FAULT:
        return readings
    link.has_transactions = topology.status is not Status.WEAK
    try:
        readings += [await _reading(link, samples), await _writing(link, samples), *await _space(link)]
        schema = await _schema(link)
        is_cluster = hello.get("msg") == "isdbgrid"
        readings += [
            schema,
            *await _strangers(link),
            *await _all_indexes(link, is_new=schema.status is Status.NEW, is_cluster=is_cluster),
        ]
    except BacktestKitError as error:
        readings.append(Reading("database", Status.FAULT, str(error)))
    return readings


def clock_reading(subject: str, told: float, asked: float, answered: float) -> Reading:
    """How far a server's clock is from that of this host. Times are seconds; the answer took a while."""
    apart_ms = round((told - (asked + answered) / 2) * 1000)
    uncertain_ms = (answered - asked) * 1000 / 2
    says = f"{apart_ms:+,} ms from this host's, known to {max(1, uncertain_ms):,.0f} ms"
    if abs(apart_ms) - uncertain_ms <= CLOCKS_APART_MS:
        return Reading(subject, Status.OK, says)
    remedy = "let both follow a time server (timedatectl set-ntp true): candles close by the clock of this host"
    return Reading(subject, Status.WARNING, says, remedy)


def _topology(hello: Mapping[str, Any]) -> Reading:
    if hello.get("msg") == "isdbgrid":
        return Reading("topology", Status.OK, "sharded cluster, transactions")
    if "setName" not in hello:
        says = "standalone: no transactions, no majority; batches are made whole by a record of their intent"
        remedy = "make it a replica set of one: mongod --replSet rs0, then rs.initiate() in mongosh"
        return Reading("topology", Status.WEAK, says, remedy)
    name, members, arbiters = hello["setName"], len(hello.get("hosts", ())), len(hello.get("arbiters", ()))
    if not hello.get("isWritablePrimary", hello.get("ismaster", False)):
        remedy = f"take directConnection out of the address, or write replicaSet={name} into it"
        says = f"replica set {name}: this member is no primary, and takes no writes"
        return Reading("topology", Status.FAULT, says, remedy)
    says = f"replica set {name}, {members} with data, transactions"
    if arbiters:
        remedy = "with one member with data down, no majority can confirm a money write: make arbiters members"
        return Reading("topology", Status.WARNING, f"{says}, {arbiters} arbiters", remedy)
    return Reading("topology", Status.OK, says)


def _address(link: Link) -> list[Reading]:
    """What is promised of a write, and what the address would have had instead."""
    money, record = (json.dumps(concern.document) for concern in (JOURNALLED, ACKNOWLEDGED))
    readings = [Reading("write concern", Status.OK, f"money {money}; records and candles {record}, flushed on close")]
    asked = link.mongo.write_concern.document
    if (asked.get("w") in (0, 1) and not asked.get("j")) or asked.get("j") is False:
        says = f"the address asks for {json.dumps(asked)}: this program does not follow it, others that share it do"
        remedy = "take w and journal out of CC_MONGO_CONNECTION_STRING, or write w=majority&journal=true"
        readings.append(Reading("write concern of the address", Status.WEAK, says, remedy))
    preference = link.mongo.read_preference
    if preference.mongos_mode != "primary":
        says = f"the address asks for {preference.mongos_mode}: this program always reads from the primary"
        remedy = "take readPreference out of CC_MONGO_CONNECTION_STRING: an old copy of a position is a wrong one"
        readings.append(Reading("read preference of the address", Status.WEAK, says, remedy))
    return readings


async def _reading(link: Link, samples: int) -> Reading:
    signal = link.collection(ROWS["signal"])
    nobody = {"namespace": "", **dict.fromkeys(ROWS["signal"].key_fields, "")}
    took = await median_ms(lambda: link.ask("read", lambda: signal.find_one(nobody)), samples)
    return Reading("read by key", Status.OK, "of a record, from the primary", median_ms=took)


async def _writing(link: Link, samples: int) -> Reading:
    """A deletion that meets no document is confirmed like any other write, and changes nothing."""
    meta = link.named(META, Durability.MONEY)
    took = await median_ms(lambda: link.ask("write", lambda: meta.delete_one({"_id": "doctor"})), samples)
    return Reading("money write", Status.OK, "allowed, and confirmed from the journal of the majority", median_ms=took)


async def _space(link: Link) -> list[Reading]:
    """The disk of the server, where it tells."""
    try:
        stats = await link.database.command("dbStats")
    except OperationFailure:
        return []  # the user may not ask, or it is no MongoDB of the kind that tells
    says = f"{stats.get('objects', 0):,.0f} documents in {stats.get('storageSize', 0) / (1 << 20):,.1f} MiB"
    if "fsTotalSize" not in stats or "fsUsedSize" not in stats:
        return [Reading("space", Status.OK, says)]
    free = stats["fsTotalSize"] - stats["fsUsedSize"]
    says += f", {free / (1 << 30):,.1f} GiB free on the server"
    if free >= _TIGHT_BYTES:
        return [Reading("space", Status.OK, says)]
    status = Status.FAULT if free < _FULL_BYTES else Status.WARNING
    return [Reading("space", status, says, "give the server's volume more space")]


async def _schema(link: Link) -> Reading:
    meta = link.named(META, Durability.MONEY)
    version = await link.ask("read the schema", lambda: meta.find_one(VERSION))
    if version is None:
        says = f"{link.database_name} is no store yet: the first run makes it"
        return Reading("schema", Status.NEW, says)
    try:
        check_version(link, version)
    except BacktestKitError as error:
        return Reading("schema", Status.FAULT, str(error))
    return Reading("schema", Status.OK, f"version {version['schemaVersion']}")


async def _strangers(link: Link) -> list[Reading]:
    """Positions that another program has left under the same names: no read of this one finds them."""
    readings = []
    for contract in ROWS.values():
        if contract.durability is not Durability.MONEY:
            continue
        money = link.collection(contract)
        found = await link.ask("look for strangers", lambda items=money: items.find_one({"namespace": None}))  # type: ignore[misc]
        if found is not None:
            key = {field: found[field] for field in contract.key_fields if field in found}
            says = f"{contract.collection} has documents of another program, such as {key}: this one does not see them"
            remedy = (
                "name a database of its own in CC_MONGO_CONNECTION_STRING; or close what they hold with the program "
                "that made them, and delete them"
            )
            readings.append(Reading("records of others", Status.FAULT, says, remedy))
    return readings


# -- indexes ---------------------------------------------------------------------------------------------


async def _all_indexes(link: Link, *, is_new: bool, is_cluster: bool) -> list[Reading]:
    readings = []
    for contract in ROWS.values():
        found = await link.ask("list the indexes", lambda row=contract: indexes_there(link, row))  # type: ignore[misc]
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
    # On a cluster, the index of a shard key is needed whatever it looks like.
    if idle and not is_cluster:
        says = f"{', '.join(idle)}: no query of this program uses them, and every write pays for them"
        drop = f"dropIndexes({json.dumps(idle)})" if len(idle) > 1 else f"dropIndex({json.dumps(idle[0])})"
        readings.append(Reading(subject, Status.WARNING, says, f"mongosh: {collection}.{drop}"))
    return readings
