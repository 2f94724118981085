"""The sixteen persistence contracts, as data.

Whatever depends on a contract is derived from its row: file paths, collections and their unique
indexes, SQL tables, cache keys, command-line verbs, conformance cases, the table in the docs and the
order of a migration. To add a contract is to add a row.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import msgspec

from backtest_kit.errors import UserError


class Kind(Enum):
    """How the records of a contract lie beside each other."""

    SERIES = "series"
    """Columns over time; only candles, and only through a `CandleStore`."""
    SLOT = "slot"
    """One record that is replaced."""
    FEED = "feed"
    """Many records, read newest first or oldest first."""
    BUCKET = "bucket"
    """Many records under a bucket, removed softly."""


class WriteRule(Enum):
    """What a second write to one key does."""

    FIRST_WINS = "first write wins"
    REPLACE = "replace"
    APPEND = "append"
    """There is no second write: the writer gives every record a key of its own, and a store need not look for it. One
    that finds it all the same keeps the first."""


class Delete(Enum):
    """What removing a record means."""

    NEVER = "-"
    NULL_VALUE = "null value"
    SOFT = "soft"


class Durability(Enum):
    """What an acknowledgement promises."""

    MONEY = "money"
    """On the disk (file and directory synced, or the server's journalled majority) before the call returns."""
    RECORD = "record"
    """May be committed in a group within 50 ms; flushed on close."""
    CACHE = "cache"
    """Can be lost and fetched or computed again."""


class Contract(msgspec.Struct, frozen=True):
    """One row: what is stored, under which key, and what is promised of it."""

    name: str
    key_fields: tuple[str, ...]
    """In the order of the path; `timestamp` and `revision` are ints, `backtest` a bool, every other field a str."""
    kind: Kind
    write_rule: WriteRule
    delete: Delete
    durability: Durability

    @property
    def collection(self) -> str:
        """The collection or table that holds it in a database."""
        return f"{self.name}-items"


_S, _R, _F = Kind.SLOT, WriteRule.REPLACE, WriteRule.FIRST_WINS
_POSITION = ("strategyName", "exchangeName", "symbol")
_RUN = ("strategyName", "exchangeName", "frameName", "symbol", "backtest")

CONTRACTS: Final[dict[str, Contract]] = {
    row[0]: Contract(*row)
    for row in (
        (
            "candle",
            ("exchangeName", "symbol", "interval", "timestamp"),
            Kind.SERIES,
            _F,
            Delete.NEVER,
            Durability.CACHE,
        ),
        ("signal", _POSITION, _S, _R, Delete.NULL_VALUE, Durability.MONEY),
        ("schedule", _POSITION, _S, _R, Delete.NULL_VALUE, Durability.MONEY),
        ("strategy", _POSITION, _S, _R, Delete.NULL_VALUE, Durability.MONEY),
        ("risk", ("exchangeName", "riskName"), _S, _R, Delete.NEVER, Durability.MONEY),
        ("partial", (*_POSITION, "signalId"), _S, _R, Delete.NEVER, Durability.MONEY),
        ("breakeven", (*_POSITION, "signalId"), _S, _R, Delete.NEVER, Durability.MONEY),
        ("storage", ("backtest", "signalId"), Kind.FEED, _R, Delete.NEVER, Durability.RECORD),
        ("notification", ("backtest", "notificationId"), Kind.FEED, _R, Delete.NEVER, Durability.RECORD),
        ("log", ("entryId",), Kind.FEED, WriteRule.APPEND, Delete.NEVER, Durability.RECORD),
        ("measure", ("bucket", "entryKey"), Kind.BUCKET, _R, Delete.SOFT, Durability.CACHE),
        ("interval", ("bucket", "entryKey"), Kind.BUCKET, _R, Delete.SOFT, Durability.RECORD),
        ("memory", ("signalId", "bucketName", "memoryId"), Kind.BUCKET, _R, Delete.SOFT, Durability.RECORD),
        ("recent", _RUN, _S, _R, Delete.NEVER, Durability.RECORD),
        ("state", ("signalId", "bucketName"), _S, _R, Delete.NEVER, Durability.RECORD),
        ("session", _RUN, _S, _R, Delete.NEVER, Durability.RECORD),
    )
}
"""Every contract by name, in the order in which a migration moves them."""

LEASE: Final = Contract("lease", _POSITION, _S, _R, Delete.NEVER, Durability.MONEY)
"""Which process trades a position, see `persist.lease`. No contract of the user's: it says something about a
process, not about a strategy, so it is never exported, migrated or bound by itself, but it must lie in the
store whose writes it guards."""

CLAIM: Final = Contract("claim", ("kind", "name"), _S, _R, Delete.NEVER, Durability.RECORD)
"""Which process does what only one may do at a time and no money depends on: replay a run. Like a lease it never
moves; one of a process that died with its machine means nothing, so it need not be on the disk."""

DELIVERY: Final = Contract(
    "delivery", ("sink", "notificationId"), Kind.FEED, WriteRule.REPLACE, Delete.NEVER, Durability.RECORD
)
"""Which notification was handed to which sink, and which process is doing so, see `records.outbox`. It lies with the
notifications, moves with them and is forgotten with them."""

MIGRATION: Final = Contract("migration", ("name",), _S, _R, Delete.NULL_VALUE, Durability.MONEY)
"""How far `persist.migration` has come with filling this store: what the target of a migration keeps of it until it
is complete. Like a lease it says nothing of a strategy, and never moves."""
MIGRATION_KEY: Final = ("checkpoint",)

STORE_ID: Final = Contract("identity", ("name",), _S, _R, Delete.NEVER, Durability.MONEY)
"""The id of the store, see `persist.store_id`. Migrations and exports take it along in their own way."""
STORE_ID_KEY: Final = ("store",)

HISTORY: Final = Contract(
    "history", ("contractName", "recordKey", "revision"), Kind.FEED, _R, Delete.NEVER, Durability.RECORD
)
"""Revisions of records that were replaced, see `persist.history`. They count the revisions of one store, so they stay
in it: a migration does not take them along."""

MOVED: Final = {**CONTRACTS, DELIVERY.name: DELIVERY}
"""What a migration moves, by name."""

ALL_CONTRACTS: Final = {**MOVED, **{row.name: row for row in (LEASE, CLAIM, MIGRATION, STORE_ID, HISTORY)}}
"""Whatever may lie in a store, by name: the contracts of the user, and what stores keep for themselves."""


def contract(name: str) -> Contract:
    """The row called `name`.

    Raises:
        UserError: there is none; the message lists them.
    """
    try:
        return CONTRACTS[name]
    except KeyError:
        raise UserError(f"no contract is called {name!r}: use one of {', '.join(CONTRACTS)}") from None
