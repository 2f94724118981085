"""What an operator does with a store: list, read, measure, check, and decide about what is in quarantine.

Functions over any open store; `persist.transfer` has `export_store` and `import_store` beside them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import msgspec

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist.contracts import CONTRACTS, LEASE, Contract, Kind
from backtest_kit.persist.keys import check_key, path_of, unescape
from backtest_kit.persist.quarantine import Quarantined
from backtest_kit.persist.store import Capability, Key, KeyPart, Record, Store
from backtest_kit.persist.upkeep import Entry, Upkeep

RECORD_CONTRACTS: Final = (*(row for row in CONTRACTS.values() if row.kind is not Kind.SERIES), LEASE)


class Usage(msgspec.Struct, frozen=True):
    """What one contract takes in one namespace."""

    namespace: str
    contract: str
    records: int
    removed: int
    size: int
    """Bytes of the records, without what the backend adds."""


class CheckReport(msgspec.Struct, frozen=True):
    """What a check has found."""

    checked: int
    faults: list[Entry]
    """Everything that is not as it should be, each with `fault` in plain words."""
    quarantined: list[Quarantined]
    """What earlier reads have put aside, and nobody has decided about."""

    @property
    def sound(self) -> bool:
        return not self.faults and not self.quarantined


def key_from_text(contract: Contract, text: str, *, prefix: bool = False) -> Key:
    """The key that `trend/binance/BTCUSDT` names: its components, as file names or as they are.

    Raises:
        UserError: it has not the components of the contract.
    """
    parts: list[KeyPart] = []
    for field, name in zip(contract.key_fields, text.split("/") if text else (), strict=False):
        part = unescape(name, field)
        parts.append(name if part is None else part)
    extra = text.count("/") + 1 - len(contract.key_fields)
    if extra > 0:
        raise UserError(
            f"{text!r} has {extra} components too many for {contract.name}: write {'/'.join(contract.key_fields)}, "
            "with a slash inside a component as %2F"
        )
    return check_key(contract, parts, prefix=prefix)


def text_of(contract: Contract, key: Key) -> str:
    """A key as text, from which `key_from_text` makes it again."""
    return "/".join(path_of(contract, key))


async def ls(
    store: Store,
    contract: Contract,
    prefix: Key = (),
    *,
    limit: int | None = None,
    include_removed: bool = False,
) -> AsyncIterator[Record]:
    """The records of a contract whose key begins with `prefix`, newest first."""
    async for record in store.scan(contract, prefix, limit=limit, newest_first=True, include_removed=include_removed):
        yield record


async def get(store: Store, contract: Contract, key: Key) -> Record | None:
    """The record under a key, removed ones included, with revision and times."""
    return await store.get(contract, key)


async def du(store: Store) -> list[Usage]:
    """What every contract takes, by namespace. Damaged records count with their size."""
    totals: dict[tuple[str, str], list[int]] = {}
    async for entry in _audit(store, deep=False):
        total = totals.setdefault((entry.namespace, entry.contract), [0, 0, 0])
        total[0] += 1
        total[1] += entry.removed
        total[2] += entry.size
    return [Usage(namespace, contract, *total) for (namespace, contract), total in sorted(totals.items())]


async def check(store: Store, *, deep: bool = False) -> CheckReport:
    """Verify every record in every namespace, and with `deep` the backend's own structures and all candles.

    Changes nothing, not even by putting aside what it finds.
    """
    checked, faults = 0, []
    async for entry in _audit(store, deep=deep):
        checked += 1
        if entry.fault is not None:
            faults.append(entry)
    return CheckReport(checked, faults, await quarantine_list(store) if isinstance(store, Upkeep) else [])


async def quarantine_list(store: Store) -> list[Quarantined]:
    """What is in quarantine, with path, reason and the time it was found.

    Raises:
        UserError: this kind of store has no quarantine.
    """
    return await _upkeep(store).quarantined()


async def quarantine_restore(store: Store, path: str) -> None:
    """Accept what is in quarantine under `path` as it is now. Raises as `Upkeep.restore`."""
    await _upkeep(store).restore(path)


async def quarantine_drop(store: Store, path: str) -> None:
    """Give up what is in quarantine under `path`. Raises as `Upkeep.drop`."""
    await _upkeep(store).drop(path)


def _upkeep(store: Store) -> Upkeep:
    if not isinstance(store, Upkeep):
        raise UserError(f"{type(store).__name__} has no quarantine: only file and SQLite stores keep what is damaged")
    return store


async def _audit(store: Store, *, deep: bool) -> AsyncIterator[Entry]:
    if isinstance(store, Upkeep):
        async for entry in store.audit(deep=deep):
            yield entry
        return
    if Capability.ORDERED_SCAN not in store.capabilities:
        raise UserError(f"{type(store).__name__} cannot be listed, so it cannot be checked")
    for contract in RECORD_CONTRACTS:
        try:
            async for record in store.scan(contract, include_removed=True):
                size = len(msgspec.json.encode(record.value))
                yield Entry("", contract.name, text_of(contract, record.key), size, record.removed)
        except Damaged as error:
            yield Entry("", contract.name, "?", 0, fault=str(error))
