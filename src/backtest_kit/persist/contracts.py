"""The sixteen persistence contracts, as data.

Whatever depends on a contract is derived from its row: its default place, file paths, collections and their
unique indexes, cache keys, retention, front doors, command-line verbs, conformance cases and the order of a
migration. To add a contract is to add a row, and its sentence in the docs.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Final

import msgspec

from backtest_kit.errors import UserError


class Kind(Enum):
    """How many records a contract has, and how they are read."""

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


class Home(Enum):
    """Where a contract is kept unless it is bound."""

    BOUND = "bound store"
    FILE = "file"
    MEMORY = "process memory"


class Keep(msgspec.Struct, frozen=True):
    """What is kept of a contract: a number, or the setting that has it. `math.inf` is permanently."""

    days: float | str = math.inf
    count: float | str = math.inf
    """How many records at most, the newest ones."""


class Contract(msgspec.Struct, frozen=True):
    """One row: what is stored, under which key, and what is promised of it."""

    name: str
    key_fields: tuple[str, ...]
    """In the order of the path; `timestamp` and `revision` are ints, `backtest` a bool, every other field a str."""
    kind: Kind
    write_rule: WriteRule
    delete: Delete
    durability: Durability
    live: Home = Home.BOUND
    """Its place in live and paper trading."""
    backtest: Home = Home.BOUND
    keep: Keep = Keep()
    """Of money, whatever stands here, nothing is ever forgotten."""

    @property
    def collection(self) -> str:
        """The collection or table that holds it in a database."""
        return f"{self.name}-items"


_POSITION = ("strategyName", "exchangeName", "symbol")
_RUN = ("strategyName", "exchangeName", "frameName", "symbol", "backtest")
_S, _FEED, _BUCKET, _R = Kind.SLOT, Kind.FEED, Kind.BUCKET, WriteRule.REPLACE
_NEVER, _NULL, _SOFT = Delete.NEVER, Delete.NULL_VALUE, Delete.SOFT
_MONEY, _RECORD, _CACHE = Durability.MONEY, Durability.RECORD, Durability.CACHE
_BOUND, _FILE, _MEMORY = Home.BOUND, Home.FILE, Home.MEMORY
_CANDLE = ("exchangeName", "symbol", "interval", "timestamp")

# fmt: off
_TABLE = (
    # name, key fields, kind, write rule, delete, durability, place live, place in a backtest, how long it is kept
    Contract("candle", _CANDLE, Kind.SERIES, WriteRule.FIRST_WINS, _NEVER, _CACHE, _BOUND, _BOUND),
    Contract("signal", _POSITION, _S, _R, _NULL, _MONEY, _BOUND, _MEMORY),
    Contract("schedule", _POSITION, _S, _R, _NULL, _MONEY, _BOUND, _MEMORY),
    Contract("strategy", _POSITION, _S, _R, _NULL, _MONEY, _BOUND, _MEMORY),
    Contract("risk", ("exchangeName", "riskName"), _S, _R, _NEVER, _MONEY, _BOUND, _MEMORY),
    Contract("partial", (*_POSITION, "signalId"), _S, _R, _NEVER, _MONEY, _BOUND, _MEMORY),
    Contract("breakeven", (*_POSITION, "signalId"), _S, _R, _NEVER, _MONEY, _BOUND, _MEMORY),
    Contract("storage", ("backtest", "signalId"), _FEED, _R, _NEVER, _RECORD, _BOUND, _MEMORY,
             Keep("CC_RETENTION_STORAGE_DAYS", "CC_RETENTION_STORAGE_COUNT")),
    Contract("notification", ("backtest", "notificationId"), _FEED, _R, _NEVER, _RECORD, _BOUND, _MEMORY,
             Keep("CC_RETENTION_NOTIFICATION_DAYS", "CC_RETENTION_NOTIFICATION_COUNT")),
    Contract("log", ("entryId",), _FEED, WriteRule.APPEND, _NEVER, _RECORD, _FILE, _FILE,
             Keep("CC_RETENTION_LOG_DAYS", "CC_RETENTION_LOG_COUNT")),
    Contract("measure", ("bucket", "entryKey"), _BUCKET, _R, _SOFT, _CACHE, _BOUND, _BOUND,
             Keep("CC_RETENTION_MEASURE_DAYS")),
    Contract("interval", ("bucket", "entryKey"), _BUCKET, _R, _SOFT, _RECORD, _BOUND, _BOUND,
             Keep("CC_RETENTION_INTERVAL_DAYS")),
    Contract("memory", ("signalId", "bucketName", "memoryId"), _BUCKET, _R, _SOFT, _RECORD, _BOUND, _FILE,
             Keep("CC_RETENTION_MEMORY_DAYS")),
    Contract("recent", _RUN, _S, _R, _NEVER, _RECORD, _BOUND, _MEMORY, Keep("CC_RETENTION_RECENT_DAYS")),
    Contract("state", ("signalId", "bucketName"), _S, _R, _NEVER, _RECORD, _BOUND, _FILE,
             Keep("CC_RETENTION_STATE_DAYS")),
    Contract("session", _RUN, _S, _R, _NEVER, _RECORD, _BOUND, _FILE, Keep("CC_RETENTION_SESSION_DAYS")),
)
# fmt: on
CONTRACTS: Final[dict[str, Contract]] = {row.name: row for row in _TABLE}
"""Every contract by name, in the order in which a migration moves them."""

LEASE: Final = Contract("lease", _POSITION, _S, _R, _NEVER, _MONEY)
"""Which process trades a position, see `persist.lease`. Not a contract of the user: it says something about a
process, not about a strategy, so it is never migrated or bound by itself, but it must lie in the store whose
writes it guards."""

CLAIM: Final = Contract("claim", ("kind", "name"), _S, _R, _NEVER, _RECORD, keep=Keep(days=1))
"""Which process does what only one may do at a time and no money depends on: replay a run. Like a lease it never
moves; one of a process that died with its machine means nothing, so it need not be on the disk. Its holder renews it
every minute, so a day is enough."""

_HANDED = ("sink", "notificationId")
DELIVERY: Final = Contract("delivery", _HANDED, _FEED, _R, _NEVER, _RECORD, keep=Keep("CC_RETENTION_NOTIFICATION_DAYS"))
"""Which notification was handed to which sink, and which process is doing so, see `records.outbox`. It lies with the
notifications and moves with them. Written after its notification, it is never forgotten before that."""

SINK: Final = Contract("sink", ("sink",), _S, _R, _NEVER, _RECORD)
"""When a sink was first added, see `records.outbox`. It lies with the marks and moves with them."""

MIGRATION: Final = Contract("migration", ("name",), _S, _R, _NULL, _MONEY)
"""How far `persist.migration` has come with filling this store: what the target of a migration keeps of it until it
is complete. Like a lease it says nothing of a strategy, and never moves."""
MIGRATION_KEY: Final = ("checkpoint",)

STORE_ID: Final = Contract("identity", ("name",), _S, _R, _NEVER, _MONEY)
"""The id of the store, see `persist.store_id`. A migration takes it along in its own way."""
STORE_ID_KEY: Final = ("store",)

_REVISION = ("contractName", "recordKey", "revision")
HISTORY: Final = Contract("history", _REVISION, _FEED, _R, _NEVER, _RECORD, keep=Keep("CC_RETENTION_HISTORY_DAYS"))
"""Revisions of records that were replaced, see `persist.history`. They count the revisions of one store, so they stay
in it: a migration does not take them along."""

_INTERNAL: Final = {row.name: row for row in (LEASE, CLAIM, DELIVERY, SINK, MIGRATION, STORE_ID, HISTORY)}

MOVED: Final[Mapping[str, Contract]] = ChainMap({row.name: row for row in (DELIVERY, SINK)}, CONTRACTS)
"""What a migration moves, by name: the contracts of the user come first."""
ALL_CONTRACTS: Final[Mapping[str, Contract]] = ChainMap(_INTERNAL, CONTRACTS)
"""Whatever may lie in a store, by name: first the contracts of the user, then what stores keep for themselves."""


def record_contracts() -> Iterator[Contract]:
    """Every contract whose records pass through `Store` itself: all but candles."""
    return (row for row in ALL_CONTRACTS.values() if row.kind is not Kind.SERIES)


def contract(name: str) -> Contract:
    """The row called `name`.

    Raises:
        UserError: there is none; the message lists them.
    """
    try:
        return CONTRACTS[name]
    except KeyError:
        raise UserError(f"no contract is called {name!r}: use one of {', '.join(CONTRACTS)}") from None
