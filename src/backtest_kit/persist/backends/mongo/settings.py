"""The settings of the Mongo store: where MongoDB and Redis are, and how long to wait for them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from ipaddress import IPv6Address
from typing import Annotated, Final
from urllib.parse import quote

import msgspec

from backtest_kit.errors import UserError
from backtest_kit.persist.urls import mask

LOGGER: Final = "backtest_kit.mongo"
"""The logger of what is not an error of a call, such as that Redis went away."""
Log = logging.LoggerAdapter[logging.Logger]
"""That logger, or the one that `MongoSetup.set_logger` has put in its place."""

_AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]


class MongoSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the servers are, and how long to wait for them. Its repr has no passwords."""

    CC_MONGO_CONNECTION_STRING: str = "mongodb://localhost:27017/backtest-kit?wtimeoutMS=15000"
    """Address of MongoDB. Its path names the database, `backtest-kit` if it has none. Its options override the
    settings below; its write concern is not used."""
    CC_MONGO_SERVER_SELECTION_TIMEOUT_MS: _AtLeastOne = 3_000
    """How long to look for a server before it is an error."""
    CC_MONGO_CONNECT_TIMEOUT_MS: _AtLeastOne = 3_000
    """How long one connection may take to be made."""
    CC_MONGO_SOCKET_TIMEOUT_MS: _AtLeastOne = 5_000
    """How long one answer may take; then another connection is tried, while there is time."""
    CC_MONGO_OPERATION_TIMEOUT_MS: _AtLeastOne = 10_000
    """How long one read or write may take, retries included."""
    CC_MONGO_POOL_SIZE: _AtLeastOne = 50
    """Maximum number of connections per event loop."""
    CC_MONGO_CANDLES_IN_MEMORY: Annotated[int, msgspec.Meta(ge=0)] = 2_000_000
    """How many candles to cache in this process, about 50 bytes each; 0 for none."""
    CC_REDIS_HOST: str = "127.0.0.1"
    """Host of Redis; empty for none."""
    CC_REDIS_PORT: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 6379
    CC_REDIS_USER: str = ""
    CC_REDIS_PASSWORD: str = ""
    CC_REDIS_URL: str = ""
    """Address of Redis, in place of the four above: `redis://`, `rediss://` with TLS, `unix://`, or sentinels,
    `redis+sentinel://user:password@host:26379,host:26379/service`."""
    CC_REDIS_PREFIX: str = "backtest-kit"
    """Prefix of every key in Redis; the name of the database follows it."""
    CC_REDIS_TIMEOUT_MS: _AtLeastOne = 250
    """How long to wait for Redis before going on without it."""
    CC_REDIS_TTL_SECONDS: _AtLeastOne = 7 * 86_400
    """How long an entry in Redis lasts."""

    @property
    def redis_url(self) -> str:
        """The address of Redis; empty for none."""
        if self.CC_REDIS_URL or not self.CC_REDIS_HOST:
            return self.CC_REDIS_URL
        secret = ""
        if self.CC_REDIS_USER or self.CC_REDIS_PASSWORD:
            secret = f"{quote(self.CC_REDIS_USER, safe='')}:{quote(self.CC_REDIS_PASSWORD, safe='')}@"
        host = f"[{self.CC_REDIS_HOST}]" if ":" in self.CC_REDIS_HOST else self.CC_REDIS_HOST
        return f"redis://{secret}{host}:{self.CC_REDIS_PORT}"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [(name, _shown(name, getattr(self, name))) for name in self.__struct_fields__]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"

    __str__ = __repr__


PATIENT: Final = {"CC_MONGO_SOCKET_TIMEOUT_MS": 120_000, "CC_MONGO_OPERATION_TIMEOUT_MS": 600_000}
"""For migrations, which can wait longer than a strategy."""


def from_environment(environ: Mapping[str, str]) -> MongoSettings:
    """The defaults, changed by the variables of these names.

    Raises:
        UserError: a variable has a bad value.
    """
    return with_changes(
        MongoSettings(), {name: environ[name] for name in MongoSettings.__struct_fields__ if name in environ}
    )


def with_changes(base: MongoSettings, changes: Mapping[str, object]) -> MongoSettings:
    """`base` with `changes` applied.

    Raises:
        UserError: unknown names, wrong types, values out of range; all in one message.
    """
    types = {field.name: field.type for field in msgspec.structs.fields(MongoSettings)}
    problems, values = [], {}
    for name, value in changes.items():
        if name not in types:
            problems.append(f"{name} is not a setting of the Mongo store: use one of {', '.join(types)}")
            continue
        try:
            values[name] = msgspec.convert(value, types[name], strict=False)
        except msgspec.ValidationError as error:
            problems.append(f"{name} is {_shown(name, value)!r}: {error}")
    settings = msgspec.structs.replace(base, **values)
    for name, schemes in _SCHEMES.items():
        url = getattr(settings, name)
        if not url.startswith(schemes) and (url or name == "CC_MONGO_CONNECTION_STRING"):
            problems.append(f"{name} is {mask(url)!r}: begin it with one of {', '.join(schemes)}")
    if not _is_host(settings.CC_REDIS_HOST):
        problems.append(
            f"CC_REDIS_HOST is {mask(settings.CC_REDIS_HOST)!r}: write the name of a host or its IP address alone; "
            "its port goes into CC_REDIS_PORT, a whole address into CC_REDIS_URL"
        )
    if problems:
        raise UserError("; ".join(problems))
    return settings


_SCHEMES: Final = {
    "CC_MONGO_CONNECTION_STRING": ("mongodb://", "mongodb+srv://"),
    "CC_REDIS_URL": ("redis://", "rediss://", "redis+sentinel://", "rediss+sentinel://", "unix://"),
}


def _is_host(text: str) -> bool:
    """Whether it is a host, or empty."""
    if ":" in text:
        try:
            return bool(IPv6Address(text))
        except ValueError:
            return False
    return not re.search(r"[\s/@?#]", text)


def _shown(name: str, value: object) -> object:
    if name in _SCHEMES and isinstance(value, str):
        return mask(value)
    return "***" if name == "CC_REDIS_PASSWORD" and value else value
