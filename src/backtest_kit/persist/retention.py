"""How long records are kept, and forgetting those whose time has come. Nothing of money class ever is.

The age of a record is that of its last write, by the wall clock. Records of live and paper trading go one by
one; those of a backtest's run go together, when the run is old or there are many newer ones.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Final

import msgspec

from backtest_kit.errors import Damaged
from backtest_kit.persist.codec import dump_value
from backtest_kit.persist.contracts import CONTRACTS, Contract, Durability, record_contracts
from backtest_kit.persist.operations import RUN_PREFIX, spaces, usage
from backtest_kit.persist.store import Capability, Key, Record, Store
from backtest_kit.persist.writing import now_ms
from backtest_kit.settings import Settings

DAY_MS: Final = 86_400_000
_NEEDED: Final = frozenset((Capability.PRUNING, Capability.ORDERED_SCAN))
_PART: Final = 50_000
"""Keys that are forgotten in one go."""
_TURN: Final = 64
"""Records after which others have their turn: about a millisecond."""
_STORAGE: Final = CONTRACTS["storage"]
_OVER: Final = ("closed", "cancelled")
"""What `storage` says of a signal of which nothing is to come."""


class Rule(msgspec.Struct, frozen=True):
    """What is kept of a contract; `math.inf` is permanently."""

    days: float = math.inf
    last: float = math.inf
    """How many records at most, the newest ones."""


class Retention(msgspec.Struct, frozen=True):
    """What is kept of everything."""

    rules: dict[str, Rule]
    removed_days: float
    """How long a softly removed record is kept for those who ask what was removed."""
    runs: Rule

    def of(self, contract: Contract) -> Rule:
        return self.rules.get(contract.name, Rule())


class Expired(msgspec.Struct, frozen=True):
    """What was forgotten, or is to be, of one contract in one namespace; of a whole run if `contract` is empty."""

    namespace: tuple[str, ...]
    contract: str
    records: int
    size: int
    """Bytes of the values as JSON."""
    fault: str | None = None
    """Why not everything was looked at."""


def retention_of(settings: Settings) -> Retention:
    """What the table of contracts says, with the numbers of the settings that it names."""

    def number(value: float | str) -> float:
        return float(getattr(settings, value)) if isinstance(value, str) else value

    return Retention(
        rules={row.name: Rule(number(row.keep.days), number(row.keep.count)) for row in prunable()},
        removed_days=settings.CC_RETENTION_REMOVED_DAYS,
        runs=Rule(settings.CC_RETENTION_RUN_DAYS, settings.CC_RETENTION_RUN_COUNT),
    )


def prunable() -> Iterator[Contract]:
    """The contracts of which anything may be forgotten."""
    return (row for row in record_contracts() if row.durability is not Durability.MONEY)


async def compact(
    store: Store, retention: Retention, *, at_ms: int | None = None, look_only: bool = False
) -> list[Expired]:
    """Forget what is not to be kept at `at_ms` (now, if None); return what that was. What takes nothing is left out.

    Traders and readers go on meanwhile, and a crash leaves a part of it undone, for the next time. With
    `look_only` nothing is forgotten.

    Raises:
        OutOfSpace, RetryLater: not all of it was forgotten.
    """
    at_ms = now_ms() if at_ms is None else at_ms
    found: list[Expired] = []
    runs: list[tuple[int, tuple[str, ...], Store]] = []
    for namespace, space in await spaces(store):
        if not space.capabilities >= _NEEDED:
            continue
        if namespace and namespace[0].startswith(RUN_PREFIX):
            if len(namespace) == 1:
                written_at, fault = await _last_write(space)
                if fault is None:
                    runs.append((written_at, namespace, space))
                else:
                    found.append(Expired(namespace, "", 0, 0, fault))
            continue
        found += [
            await _compact_contract(namespace, space, row, retention, at_ms, look_only=look_only) for row in prunable()
        ]
    runs.sort(key=lambda run: run[:2], reverse=True)
    for number, (written_at, namespace, space) in enumerate(runs):
        due = number >= retention.runs.last or _is_older(written_at, at_ms, retention.runs.days)
        if due and _is_older(written_at, at_ms, 1):  # one that wrote today may be going on
            expired = await _measure_run(namespace, space)
            found.append(expired)
            if not look_only and expired.fault is None:
                await space.forget()
    return [each for each in found if each.records or each.fault]


async def _compact_contract(
    namespace: tuple[str, ...], store: Store, row: Contract, retention: Retention, at_ms: int, *, look_only: bool
) -> Expired:
    rule = retention.of(row)
    records = size = 0
    fault = None
    surplus = await _surplus(store, row, rule)
    more = True
    while more:
        more = False
        doomed: dict[Key, int] = {}
        counted = 0
        try:
            async with aclosing(_expired(store, row, rule, retention.removed_days, at_ms, surplus)) as expired:
                async for record in expired:
                    records += 1
                    size += len(dump_value(record.value))
                    counted += not record.removed
                    if not look_only:
                        doomed[record.key] = record.rev
                    if len(doomed) >= _PART:
                        more = True
                        break
        except Damaged as error:
            fault = str(error)
        # Between two scans and not inside of one, which would have to find its place again among what is left.
        pruned = await store.prune(row, doomed) if doomed else 0
        more = more and pruned > 0
        # To count them takes a look at every one: it is done anew only where some were written meanwhile.
        surplus = surplus - counted if pruned == len(doomed) or not more else await _surplus(store, row, rule)
    return Expired(namespace, row.name, records, size, fault)


async def _surplus(store: Store, row: Contract, rule: Rule) -> int:
    """How many records are too many."""
    if math.isinf(rule.last):
        return 0
    return await store.count(row) - int(rule.last)


async def _expired(
    store: Store, row: Contract, rule: Rule, removed_days: float, at_ms: int, surplus: int
) -> AsyncGenerator[Record, None]:
    """What is not to be kept, the oldest first, or those that are too many first."""
    shortest = min(rule.days, removed_days)
    if surplus <= 0 and math.isinf(shortest):
        return
    seen = 0
    signals = _Signals(store)
    async for record in store.scan(row, include_removed=True):
        seen += 1
        if seen % _TURN == 0:
            await asyncio.sleep(0)
        counts = not record.removed
        due = (counts and surplus > 0) or _is_older(record.written_at, at_ms, rule.days if counts else removed_days)
        if due and (not counts or not _is_of_signal(row) or await signals.is_over(str(record.key[0]))):
            yield record
        elif surplus <= 0 and not _is_older(record.written_at, at_ms, shortest):
            return  # they come in the order of their writing
        surplus -= counts


class _Signals:
    """What `storage` says of signals."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._over: dict[str, bool] = {}

    async def is_over(self, signal_id: str) -> bool:
        """Whether a signal is over. What is not a signal, or is damaged, never is."""
        if signal_id not in self._over:
            try:
                found = await self._store.get(_STORAGE, (False, signal_id))
            except Damaged:
                found = None
            value = None if found is None else found.value
            self._over[signal_id] = isinstance(value, dict) and value.get("action") in _OVER
        return self._over[signal_id]


def _is_of_signal(row: Contract) -> bool:
    """Whether a record belongs to what its key begins with, a signal or something permanent, and lives as long."""
    return row.key_fields[0] == "signalId"


def _is_older(written_at: int, at_ms: int, days: float) -> bool:
    return written_at < at_ms - days * DAY_MS


async def _last_write(store: Store) -> tuple[int, str | None]:
    """When a run wrote last, or why that is unknown: what is damaged may be the latest, and what is with it intact."""
    newest = 0
    for row in record_contracts():
        try:
            async for record in store.scan(row, newest_first=True, limit=1, include_removed=True):
                newest = max(newest, record.written_at)
        except Damaged as error:
            return newest, str(error)
    return newest, None


async def _measure_run(namespace: tuple[str, ...], store: Store) -> Expired:
    """What forgetting a run takes away: nothing, where something of it is damaged and waits to be decided about."""
    records = size = 0
    for row in record_contracts():
        found = await usage(namespace, store, row)
        if found.fault is not None:
            return Expired(namespace, "", 0, 0, found.fault)
        records += found.records
        size += found.size
    return Expired(namespace, "", records, size)
