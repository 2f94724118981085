"""Where a record lies below the root of a file store, and what may lie there."""

from __future__ import annotations

import functools
from typing import Final

from backtest_kit.errors import Damaged
from backtest_kit.persist.codec import unseal
from backtest_kit.persist.contracts import ALL_CONTRACTS, Contract, Kind, WriteRule
from backtest_kit.persist.keys import path_of, unescape
from backtest_kit.persist.store import Key, Record

SUFFIX: Final = ".json"
NEXT: Final = ".next"
"""Behind the name of a record: the file that replaces it once it is synced, see `file_slots`."""
MARKER: Final = f"root{SUFFIX}"
OWN_DIRECTORY: Final = ".backtest-kit"
"""What the store keeps for itself below its root: marker, locks, journal, clock. No contract has this name."""


def is_log(row: Contract) -> bool:
    """Whether the records of a contract are lines of a log."""
    return row.write_rule is WriteRule.APPEND


def is_feed(row: Contract) -> bool:
    """Whether the records of a contract are rows of `feeds.db`."""
    return row.kind is Kind.FEED and not is_log(row)


def record_path(prefix: str, row: Contract, key: Key) -> str:
    """Where a record lies: its file, or of a feed or log the name of the contract."""
    place = place_of(prefix, row, key)
    return place if row.kind is Kind.FEED else place + SUFFIX


def place_of(prefix: str, row: Contract, key: Key) -> str:
    """Where records whose key begins with `key` lie: their directory, or of a feed or log the name of the contract."""
    return f"{prefix}{row.name}" if row.kind is Kind.FEED else _path(prefix, row, key)


@functools.lru_cache(maxsize=4096)
def _path(prefix: str, row: Contract, key: Key) -> str:
    return prefix + "/".join((row.name, *path_of(row, key)))


def namespace_of(path: str) -> str:
    """The prefix of the namespace that a path is in, "" for that of the store itself."""
    names = path.split("/")
    count = next((number for number, name in enumerate(names) if not name.startswith("@")), len(names))
    return "".join(f"{name}/" for name in names[:count])


def row_of(path: str) -> Contract | None:
    """The contract that a path belongs to, in whatever namespace."""
    return ALL_CONTRACTS.get(path.removeprefix(namespace_of(path)).partition("/")[0])


def key_of(row: Contract, path: str) -> list[object]:
    """As much of a key as can be read from a path: the names themselves, where they were cut."""
    names = path.removesuffix(SUFFIX).split("/")[-len(row.key_fields) :]
    found: list[object] = []
    for name, field in zip(names, row.key_fields, strict=False):
        part = unescape(name, field)
        found.append(name if part is None else part)
    return found


def unseal_at(row: Contract, key: Key | None, path: str, data: bytes) -> Record:
    """The record in the bytes of the file at `path`. Raises as `unseal`, also if it belongs under another path."""
    record = unseal(row, key, data)
    if key is None:
        own = record_path("", row, record.key)
        if path != own and not path.endswith(f"/{own}"):
            raise Damaged(f"it is the record of {record.key}, found under another name")
    return record
