"""`IdCache`: which `_id` a key has, in Redis. It saves time or does nothing: it never answers and never fails."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from redis.exceptions import RedisError, ResponseError, TimeoutError as RedisTimeoutError

from backtest_kit.errors import RetryLater
from backtest_kit.persist.backends.mongo_settings import Log, MongoSettings
from backtest_kit.persist.backends.redis_client import client_of
from backtest_kit.persist.urls import mask

_FAILURES_TO_OPEN: Final = 3
_PAUSE_SECONDS: Final = 5.0
_SCAN: Final = 1_000
"""Names looked at in one request."""
_SET_MANY: Final = "for place, name in ipairs(KEYS) do redis.call('SET', name, ARGV[place + 1], 'EX', ARGV[1]) end"
"""A script, as no command before Redis 8.4 sets many that expire."""


class _Breaker:
    """Passes over what fails: at once if it is refused, after a few times if it is late.

    After a pause it lets one caller try again.
    """

    def __init__(self, broken: str, mended: str, pause_seconds: float, log: Log) -> None:
        """What the log says when it opens and when it closes."""
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
        # This caller tries; the others go on without Redis until it knows.
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
                "%s (%s): slower, and just as right; it is tried again every %g s",
                self._broken,
                type(error).__name__,
                self._pause_seconds,
            )


class IdCache:
    """The ids of one database, for one event loop. Every name begins with the prefix and the database."""

    def __init__(
        self, settings: MongoSettings, database: str, log: Log, *, pause_seconds: float = _PAUSE_SECONDS
    ) -> None:
        """Dials nothing.

        Raises:
            UserError: the address cannot be read.
        """
        seconds = settings.CC_REDIS_TIMEOUT_MS / 1000
        self.prefix: Final = f"{settings.CC_REDIS_PREFIX}:{database}:"
        self.pattern: Final = re.sub(r"([\[\]*?\\^])", r"\\\1", self.prefix) + "*"
        """What matches the names of this cache and no others."""
        self._ttl_seconds = settings.CC_REDIS_TTL_SECONDS
        self._timeout_seconds = seconds
        where = self._where = mask(settings.redis_url)
        self._answers = _Breaker(
            f"Redis at {where} fails, every read goes to MongoDB alone",
            f"Redis at {where} answers again: reads take ids from it",
            pause_seconds,
            log,
        )
        self._stores = _Breaker(
            f"Redis at {where} takes no ids, reads of keys that it does not know go to MongoDB alone",
            f"Redis at {where} takes ids again",
            pause_seconds,
            log,
        )
        self._log = log
        self._asking: set[asyncio.Task[Any]] = set()
        self._takes_scripts = True
        """Until it has taken one by one what it refused to take by a script."""
        self.client, self._sentinels = client_of(settings.redis_url, seconds)

    @property
    def is_passed_over(self) -> bool:
        """Whether Redis failed lately, so that it is not asked."""
        return self._answers.is_open

    async def get(self, name: str) -> bytes | None:
        """What is stored under a name; nothing, if there is nothing or Redis does not say."""
        found = await self._ask(self._answers, lambda: self.client.get(self.prefix + name))
        return found if isinstance(found, bytes) else None

    async def set(self, entries: Mapping[str, str]) -> None:
        """Store ids by name, over whatever is there."""
        if len(entries) == 1:
            ((name, value),) = entries.items()
            await self._ask(self._stores, lambda: self.client.set(self.prefix + name, value, ex=self._ttl_seconds))
        elif entries:
            await self._ask(
                self._stores, lambda: self._set_many({self.prefix + name: entries[name] for name in entries})
            )

    async def drop(self, name: str) -> None:
        """Forget a name."""
        await self._ask(self._answers, lambda: self.client.delete(self.prefix + name))

    async def forget(self) -> int:
        """Remove every entry of this database, and nothing else; return how many those were.

        Raises:
            RetryLater: Redis does not do it.
        """
        count = 0
        try:
            names = [name async for name in self.client.scan_iter(match=self.pattern, count=_SCAN)]
            for start in range(0, len(names), _SCAN):
                count += await self.client.unlink(*names[start : start + _SCAN])
        except (RedisError, OSError) as error:
            raise RetryLater(f"Redis at {self._where} does not forget: {type(error).__name__}; try again") from None
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
                # One command: to pack and to read one for each takes longer than the writes in the database.
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
        """What Redis answers, or nothing. `refusals` is told if the answer is that it will not."""
        breaker = self._answers if self._answers.is_open else refusals
        if not breaker.lets_through():
            return None
        # Apart from whoever asks: the client waits by `asyncio.wait_for`, which up to Python 3.11 loses a cancellation
        # that comes together with the answer, and the task that was cancelled would go on for ever.
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
        except Exception as error:  # whatever a server that may be no Redis makes the client raise
            self._answers.failed(error)
            return None
        self._answers.worked()
        refusals.worked()
        return answer
