"""Where a record lies below the root of a file store, and what may lie there."""

from __future__ import annotations

import functools
from typing import Final

from backtest_kit.errors import Damaged
from backtest_kit.persist.codec import unseal
from backtest_kit.persist.contracts import ALL_CONTRACTS, Contract, Kind
from backtest_kit.persist.keys import path_of, unescape
from backtest_kit.persist.store import Key, Record

SUFFIX: Final = ".json"
NEXT: Final = ".next"
"""Behind the name of a record: the file that will replace it once it is synced, see `file_successors`."""
MARKER: Final = f"root{SUFFIX}"
OWN_DIRECTORY: Final = ".backtest-kit"
"""What the store keeps for itself below its root: marker, locks, journal, clock. No contract is called so."""


def unseal_at(row: Contract, key: Key | None, path: str, data: bytes) -> Record:
    """The record in the bytes of the file at `path`. Raises as `unseal`, also if it belongs under another path."""
    record = unseal(row, key, data)
    if key is None:
        own = record_path("", row, record.key)
        if path != own and not path.endswith(f"/{own}"):
            raise Damaged(f"it is the record of {record.key}, found under another name")
    return record


def record_path(prefix: str, row: Contract, key: Key) -> str:
    """Where a record lies: the file of a slot or bucket record, the directory of the feed of a line."""
    return _path(prefix, row, key[:-1]) if row.kind is Kind.FEED else _path(prefix, row, key) + SUFFIX


@functools.lru_cache(maxsize=4096)
def _path(prefix: str, row: Contract, key: Key) -> str:
    return prefix + "/".join((row.name, *path_of(row, key)))


def row_of(path: str) -> Contract | None:
    """The contract whose directory `path` is in, namespaces left aside."""
    names = path.split("/")
    while names and names[0].startswith("@"):
        names = names[1:]
    return ALL_CONTRACTS.get(names[0]) if names else None


def key_of(row: Contract, path: str) -> list[object]:
    """As much of a key as can be read from a path: the names themselves, where they were cut."""
    names = path.removesuffix(SUFFIX).split("/")[-len(row.key_fields) :]
    found: list[object] = []
    for name, field in zip(names, row.key_fields, strict=False):
        part = unescape(name, field)
        found.append(name if part is None else part)
    return found
