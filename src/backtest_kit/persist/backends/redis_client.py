"""The client of the Redis at an address: of one server, or of whichever sentinels say is the master."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis.asyncio as redis_asyncio
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from backtest_kit.errors import UserError
from backtest_kit.persist.urls import mask

_SENTINEL: Final = "+sentinel"
_SENTINEL_PORT: Final = 26379
_SENTINEL_OPTIONS: Final = ("sentinel_username", "sentinel_password")


def client_of(url: str, timeout_seconds: float) -> tuple[redis_asyncio.Redis, Sequence[redis_asyncio.Redis]]:
    """The client, and those of the sentinels that it asks, which are to be closed as well. Dials nothing.

    Raises:
        UserError: the address cannot be read.
    """
    # Who is late is passed over, not asked again.
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
        raise UserError(f"the address of Redis {mask(url)} is not one: correct CC_REDIS_URL") from None


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
