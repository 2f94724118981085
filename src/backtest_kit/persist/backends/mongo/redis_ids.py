"""Redis as an index of ids: which `_id` a key has. It saves time or does nothing; it never decides and never fails.

The only module that imports the driver of Redis.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis.asyncio as redis_asyncio
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError, TimeoutError as RedisTimeoutError

from backtest_kit.errors import RetryLater, UserError
from backtest_kit.persist.backends.mongo.settings import Log, MongoSettings
from backtest_kit.persist.diagnosis import clock_reading, median_ms
from backtest_kit.persist.upkeep import Reading, Status
from backtest_kit.persist.urls import mask

_FAILURES_TO_OPEN: Final = 3
_PAUSE_SECONDS: Final = 5.0
_SCAN: Final = 1_000
"""Keys per request."""
_SET_MANY: Final = "for place, name in ipairs(KEYS) do redis.call('SET', name, ARGV[place + 1], 'EX', ARGV[1]) end"
"""A script, because no command before Redis 8.4 sets many keys that expire."""


class _Breaker:
    """A circuit breaker: opens immediately at a rejection, after a few timeouts else, and then lets one caller try
    again after each pause."""

    def __init__(self, broken: str, mended: str, pause_seconds: float, log: Log) -> None:
        """`broken` and `mended` are logged when it opens and when it closes."""
        self._broken = broken
        self._mended = mended
        self._pause_seconds = pause_seconds
        self._log = log
        self._failures = 0
        self._try_again_at: float | None = None

    @property
    def is_open(self) -> bool:
        return self._try_again_at is not None

    def lets_through(self) -> bool:
        if self._try_again_at is None:
            return True
        now = time.monotonic()
        if now < self._try_again_at:
            return False
        # This caller tries; until it knows, the others go on without Redis.
        self._try_again_at = now + self._pause_seconds
        return True

    def worked(self) -> None:
        self._failures = 0
        if self._try_again_at is not None:
            self._try_again_at = None
            self._log.warning("%s", self._mended)

    def failed(self, error: BaseException) -> None:
        self._failures += 1
        if self.is_open:
            self._try_again_at = time.monotonic() + self._pause_seconds
        elif self._failures >= _FAILURES_TO_OPEN or not isinstance(error, TimeoutError | RedisTimeoutError):
            self._try_again_at = time.monotonic() + self._pause_seconds
            self._log.warning(
                "%s (%s): slower, but nothing is lost; trying again every %g s",
                self._broken,
                type(error).__name__,
                self._pause_seconds,
            )


class IdCache:
    """The ids of one database, for one event loop. Every key begins with the prefix and the database."""

    def __init__(
        self, settings: MongoSettings, database: str, log: Log, *, pause_seconds: float = _PAUSE_SECONDS
    ) -> None:
        """Connects to nothing yet.

        Raises:
            UserError: the address is not valid.
        """
        seconds = settings.CC_REDIS_TIMEOUT_MS / 1000
        self.prefix: Final = f"{settings.CC_REDIS_PREFIX}:{database}:"
        self.pattern: Final = re.sub(r"([\[\]*?\\^])", r"\\\1", self.prefix) + "*"
        """Matches the keys of this cache and no others."""
        self._ttl_seconds = settings.CC_REDIS_TTL_SECONDS
        self._timeout_seconds = seconds
        where = self._where = mask(settings.redis_url)
        self._answers = _Breaker(
            f"Redis at {where} fails, reads go to MongoDB only",
            f"Redis at {where} answers again: reads use its ids",
            pause_seconds,
            log,
        )
        self._stores = _Breaker(
            f"Redis at {where} stores no ids, reads of keys that it does not have go to MongoDB only",
            f"Redis at {where} stores ids again",
            pause_seconds,
            log,
        )
        self._log = log
        self._asking: set[asyncio.Task[Any]] = set()
        self._takes_scripts = True
        """Until it rejects a script and accepts the same keys without it."""
        self.client, self._sentinels = client_of(settings.redis_url, seconds)

    @property
    def is_passed_over(self) -> bool:
        """Whether Redis failed lately, so that it is not used."""
        return self._answers.is_open

    async def get(self, name: str) -> bytes | None:
        """The entry of a name, or None if there is none or Redis does not answer."""
        found = await self._ask(self._answers, lambda: self.client.get(self.prefix + name))
        return found if isinstance(found, bytes) else None

    async def set(self, entries: Mapping[str, str]) -> None:
        """Store ids by name, replacing what is there."""
        if len(entries) == 1:
            ((name, value),) = entries.items()
            await self._ask(self._stores, lambda: self.client.set(self.prefix + name, value, ex=self._ttl_seconds))
        elif entries:
            await self._ask(
                self._stores, lambda: self._set_many({self.prefix + name: entries[name] for name in entries})
            )

    async def drop(self, name: str) -> None:
        """Remove the entry of a name."""
        await self._ask(self._answers, lambda: self.client.delete(self.prefix + name))

    async def forget(self) -> int:
        """Remove every entry of this database, and nothing else; return their number.

        Raises:
            RetryLater: Redis fails.
        """
        count = 0
        try:
            names = [name async for name in self.client.scan_iter(match=self.pattern, count=_SCAN)]
            for start in range(0, len(names), _SCAN):
                count += await self.client.unlink(*names[start : start + _SCAN])
        except (RedisError, OSError) as error:
            raise RetryLater(
                f"cannot remove the ids from Redis at {self._where}: {type(error).__name__}; try again"
            ) from None
        return count

    async def close(self) -> None:
        if self._asking:
            await asyncio.wait(self._asking)
        for client in (self.client, *self._sentinels):
            try:
                await client.aclose()
            except (RedisError, OSError) as error:
                self._log.debug("closing the connections to Redis: %s", type(error).__name__)

    async def _set_many(self, entries: Mapping[str, str]) -> object:
        refusal = None
        if self._takes_scripts:
            try:
                # One command: packing and parsing one for each takes longer than the writes to the database.
                return await self.client.eval(
                    _SET_MANY, len(entries), *entries, str(self._ttl_seconds), *entries.values()
                )
            except ResponseError as error:
                refusal = error
        pipeline = self.client.pipeline(transaction=False)
        for name, value in entries.items():
            pipeline.set(name, value, ex=self._ttl_seconds)
        answers = await pipeline.execute()
        self._takes_scripts = refusal is None and self._takes_scripts
        return answers

    async def _ask(self, refusals: _Breaker, call: Callable[[], Awaitable[Any]]) -> Any:
        """The answer of Redis, or None. A rejection counts against `refusals`."""
        breaker = self._answers if self._answers.is_open else refusals
        if not breaker.lets_through():
            return None
        # In a task of its own: the client waits with `asyncio.wait_for`, which up to Python 3.11 loses a cancellation
        # that comes together with the answer, and the cancelled caller would never end.
        task = asyncio.ensure_future(self._answer(refusals, call))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        return await asyncio.shield(task)

    async def _answer(self, refusals: _Breaker, call: Callable[[], Awaitable[Any]]) -> Any:
        try:
            async with asyncio.timeout(self._timeout_seconds * 2):
                answer = await call()
        except ResponseError as error:
            is_refusal = not str(error).startswith("WRONGTYPE")
            if is_refusal:
                refusals.failed(error)
            if not is_refusal or refusals is not self._answers:
                self._answers.worked()
            return None
        except Exception as error:  # a server that is not a Redis makes the client raise anything
            self._answers.failed(error)
            return None
        self._answers.worked()
        refusals.worked()
        return answer


# -- client ----------------------------------------------------------------------------------------------

_SENTINEL: Final = "+sentinel"
_SENTINEL_PORT: Final = 26379
_SENTINEL_OPTIONS: Final = ("sentinel_username", "sentinel_password")


def client_of(url: str, timeout_seconds: float) -> tuple[redis_asyncio.Redis, Sequence[redis_asyncio.Redis]]:
    """The client, and those of the sentinels that it asks, which are to be closed as well. Connects to nothing yet.

    Raises:
        UserError: the address is not valid.
    """
    # A Redis that is late is passed over, not asked again.
    how: dict[str, Any] = {
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "retry": Retry(NoBackoff(), 0),
    }
    try:
        parts = urlsplit(url)
        if not parts.scheme.endswith(_SENTINEL):
            return redis_asyncio.Redis.from_url(url, **how), ()
        return _by_sentinels(parts, how)
    except ValueError:
        # Its text may quote the address with the password in it.
        raise UserError(f"{mask(url)} is not an address of Redis: correct CC_REDIS_URL") from None


def _by_sentinels(parts: SplitResult, how: dict[str, Any]) -> tuple[redis_asyncio.Redis, Sequence[redis_asyncio.Redis]]:
    """`redis+sentinel://user:password@host:port,host:port/service/db`; credentials, ports and db may be left out."""
    service, _, number = unquote(parts.path[1:]).partition("/")
    options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    if not service or options.keys() - set(_SENTINEL_OPTIONS):
        raise ValueError
    secret, _, hosts = parts.netloc.rpartition("@")
    user, _, password = (unquote(part) or None for part in secret.partition(":"))
    how = {**how, "ssl": parts.scheme.startswith("rediss")}
    sentinel_secret = {name.removeprefix("sentinel_"): value for name, value in options.items()}
    sentinels = Sentinel(  # type: ignore[no-untyped-call]  # its parameters have no types
        [_host_and_port(each) for each in hosts.split(",")],
        sentinel_kwargs={**how, **sentinel_secret},
        **how,
        username=user,
        password=password,
        db=int(number or 0),
    )
    return sentinels.master_for(service), sentinels.sentinels


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError
    return parts.hostname, parts.port or _SENTINEL_PORT


# -- doctor ----------------------------------------------------------------------------------------------

_SCAN_SECONDS: Final = 3.0
_WEIGHED: Final = 50
"""Keys whose size is measured, to estimate that of all."""
_FAILURES: Final = (RedisError, OSError, UnicodeDecodeError, ValueError)
"""Including those at a server that is not a Redis."""


async def examine_redis(ids: IdCache | None, settings: MongoSettings, samples: int) -> list[Reading]:
    """Everything about the Redis of a store, if it has one. Changes nothing."""
    if ids is None:
        says = "none: a read is one indexed query. CC_REDIS_HOST or CC_REDIS_URL adds one"
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
        remedy = "allow it: ACL SETUSER NAME +info"
        return [*readings, Reading("Redis server", Status.WARNING, f"INFO is rejected: {_text(error)}", remedy)]
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
    slower = "reads go to MongoDB only"
    if isinstance(error, AuthenticationError) or str(error).startswith(("NOAUTH", "WRONGPASS", "NOPERM")):
        says = f"{where} rejects the user: {slower}"
        remedy = "correct CC_REDIS_USER and CC_REDIS_PASSWORD, or the credentials in CC_REDIS_URL"
    elif isinstance(error, ResponseError):
        says, remedy = f"{where} answers with an error ({_text(error)}): {slower}", "see the log of Redis"
    else:
        says = f"no Redis answers at {where} ({type(error).__name__}): {slower}"
        remedy = "start it, or correct CC_REDIS_HOST and CC_REDIS_PORT, or CC_REDIS_URL; CC_REDIS_HOST= runs without"
    return Reading("Redis", Status.DEGRADED, says, remedy)


def _server(info: Mapping[str, Any]) -> list[Reading]:
    role = info.get("role", "?")
    says = f"{info.get('redis_version', '?')}, {role}, {_persistence(info)}"
    readings = [Reading("Redis server", Status.OK, says)]
    if info.get("cluster_enabled"):
        remedy = "name a server that is not in cluster mode: all ids fit into one"
        readings = [Reading("Redis server", Status.DEGRADED, f"{says}, a node of a cluster: most keys fail", remedy)]
    elif role != "master":
        remedy = "name the master: this one rejects writes, so it stores no ids"
        readings = [Reading("Redis server", Status.DEGRADED, says, remedy)]
    limit, policy = int(info.get("maxmemory", 0)), str(info.get("maxmemory_policy", "noeviction"))
    says = f"maxmemory {f'{limit / (1 << 20):,.0f} MiB' if limit else 'unlimited'}, {policy}"
    volatile = "CONFIG SET maxmemory-policy volatile-lru"
    if policy.startswith("allkeys"):
        full = f"{says}: when full it drops any key, also those of other programs that have no other copy"
        readings.append(Reading("Redis memory", Status.WEAK, full, f"redis-cli {volatile}"))
    elif limit and policy == "noeviction":
        full = f"{says}: when full it stores no new ids"
        readings.append(Reading("Redis memory", Status.WARNING, full, f"redis-cli {volatile}"))
    else:
        readings.append(Reading("Redis memory", Status.OK, says))
    return readings


def _persistence(info: Mapping[str, Any]) -> str:
    kept = [name for name, flag in (("AOF", info.get("aof_enabled")), ("RDB", info.get("rdb_saves"))) if flag]
    return f"kept on disk by {' and '.join(kept)}" if kept else "nothing kept on disk, nothing needs to be"


async def _keys(ids: IdCache) -> Reading:
    """The number of our entries, and about how much memory they take."""
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
