"""How a Redis serves the Mongo store as its memory of ids: what answers, and what it does with our keys."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from redis.exceptions import AuthenticationError, RedisError, ResponseError

from backtest_kit.persist.backends.mongo_diagnosis import clock_reading
from backtest_kit.persist.backends.mongo_settings import MongoSettings, mask
from backtest_kit.persist.backends.redis_ids import IdCache
from backtest_kit.persist.diagnosis import median_ms
from backtest_kit.persist.upkeep import Reading, Status

_SCAN_SECONDS: Final = 3.0
_WEIGHED: Final = 50
"""Keys whose size is asked for, to tell that of all."""
_FAILURES: Final = (RedisError, OSError, UnicodeDecodeError, ValueError)
"""Also what a server that is no Redis makes the client raise."""


async def examine_redis(ids: IdCache | None, settings: MongoSettings, samples: int) -> list[Reading]:
    """All that can be told of the Redis of a store, if it has one."""
    if ids is None:
        says = "none: a read is one indexed query. CC_REDIS_HOST or CC_REDIS_URL would name one"
        return [Reading("Redis", Status.OK, says)]
    where = mask(settings.redis_url)
    try:
        ping = await median_ms(lambda: ids.client.ping(), samples)
    except _FAILURES as error:
        return [_failure(where, error)]
    readings = [Reading("Redis", Status.OK, where, median_ms=ping)]
    try:
        info = await ids.client.info()
    except _FAILURES as error:
        remedy = "grant it to look: ACL SETUSER NAME +info"
        return [*readings, Reading("Redis server", Status.WARNING, f"INFO is refused: {_text(error)}", remedy)]
    readings += _server(info)
    try:
        started = time.time()
        seconds, micros = await ids.client.time()
        readings.append(clock_reading("clock of Redis", seconds + micros / 1e6, started, time.time()))
        readings.append(await _keys(ids))
    except _FAILURES as error:
        readings.append(Reading("Redis keys", Status.WARNING, f"cannot be counted: {_text(error)}"))
    return readings


def _failure(where: str, error: Exception) -> Reading:
    slower = "every read goes to MongoDB alone"
    if isinstance(error, AuthenticationError) or str(error).startswith(("NOAUTH", "WRONGPASS", "NOPERM")):
        says = f"{where} refuses the user: {slower}"
        remedy = "correct CC_REDIS_USER and CC_REDIS_PASSWORD, or the credentials in CC_REDIS_URL"
    elif isinstance(error, ResponseError):
        says, remedy = f"{where} answers with an error ({_text(error)}): {slower}", "see the log of Redis"
    else:
        says = f"no Redis answers at {where} ({type(error).__name__}): {slower}"
        remedy = "start it, or correct CC_REDIS_HOST and CC_REDIS_PORT, or CC_REDIS_URL; CC_REDIS_HOST= does without"
    return Reading("Redis", Status.DEGRADED, says, remedy)


def _server(info: Mapping[str, Any]) -> list[Reading]:
    role = info.get("role", "?")
    says = f"{info.get('redis_version', '?')}, {role}, {_persistence(info)}"
    readings = [Reading("Redis server", Status.OK, says)]
    if info.get("cluster_enabled"):
        remedy = "name a server that is not in cluster mode: the ids of any number of positions fit into one"
        readings = [Reading("Redis server", Status.DEGRADED, f"{says}, a node of a cluster: most keys fail", remedy)]
    elif role != "master":
        remedy = "name the master: what is written here is refused, so nothing is remembered"
        readings = [Reading("Redis server", Status.DEGRADED, says, remedy)]
    limit, policy = int(info.get("maxmemory", 0)), str(info.get("maxmemory_policy", "noeviction"))
    says = f"maxmemory {f'{limit / (1 << 20):,.0f} MiB' if limit else 'unlimited'}, {policy}"
    volatile = "CONFIG SET maxmemory-policy volatile-lru"
    if policy.startswith("allkeys"):
        told = f"{says}: when full it drops any key, also those of whoever shares this server and has no other copy"
        readings.append(Reading("Redis memory", Status.WEAK, told, f"redis-cli {volatile}"))
    elif limit and policy == "noeviction":
        told = f"{says}: when full it takes no new ids"
        readings.append(Reading("Redis memory", Status.WARNING, told, f"redis-cli {volatile}"))
    else:
        readings.append(Reading("Redis memory", Status.OK, says))
    return readings


def _persistence(info: Mapping[str, Any]) -> str:
    kept = [name for name, flag in (("AOF", info.get("aof_enabled")), ("RDB", info.get("rdb_saves"))) if flag]
    return f"kept on disk by {' and '.join(kept)}" if kept else "nothing kept on disk, nothing needs to be"


async def _keys(ids: IdCache) -> Reading:
    """How many entries are ours, and about what they take."""
    count, weighed, size, until = 0, 0, 0, time.monotonic() + _SCAN_SECONDS
    cut = ""
    async for key in ids.client.scan_iter(match=ids.pattern, count=1000):
        count += 1
        if weighed < _WEIGHED:
            size += await ids.client.memory_usage(key) or 0
            weighed += 1
        if time.monotonic() > until:
            cut = "at least "
            break
    total = size / weighed * count if weighed else 0
    says = f"{cut}{count:,} entries {ids.prefix}..., about {total / (1 << 20):,.2f} MiB; each expires by itself"
    return Reading("Redis keys", Status.OK, says)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
