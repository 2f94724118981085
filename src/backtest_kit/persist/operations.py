"""What an operator does with a store: list, read, measure, check, and decide about what is in quarantine.

Functions over any open store; `persist.transfer` has `export_store` and `import_store` beside them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import msgspec

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist.codec import dump_value
from backtest_kit.persist.contracts import ALL_CONTRACTS, Contract, Kind
from backtest_kit.persist.keys import check_key, path_of, unescape
from backtest_kit.persist.quarantine import Quarantined
from backtest_kit.persist.store import Key, KeyPart, Record, Store
from backtest_kit.persist.upkeep import AcceptsLoss, Finding, ListsNamespaces, ListsSeries, Upkeep

EVER: Final = (-(2**62), 2**62)
"""A range of time that every candle is in."""
RECORD_CONTRACTS: Final = tuple(row for row in ALL_CONTRACTS.values() if row.kind is not Kind.SERIES)


class Usage(msgspec.Struct, frozen=True):
    """What one contract takes in one namespace."""

    namespace: tuple[str, ...]
    contract: str
    records: int
    """Removed ones included."""
    removed: int
    size: int
    """Bytes of the values as JSON, or of the columns of candles, without what the backend adds."""
    fault: str | None = None
    """Why not everything was counted."""


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
    """What every contract takes, by namespace; each candle counts as a record. What takes nothing is left out."""
    found = []
    for namespace, space in await spaces(store):
        found += [await _usage(namespace, space, contract) for contract in RECORD_CONTRACTS]
        found.append(await _candle_usage(namespace, space))
    return [usage for usage in found if usage.records or usage.fault]


async def check(store: Store, *, deep: bool = False) -> list[Finding]:
    """Everything that is wrong with a store, each in plain words; nothing, if it is sound. Changes nothing.

    Every record in every namespace is read and verified, and so are the backend's own structures; with `deep`, so
    are all candles. Of a store that is no `Upkeep`, only the given namespace is read.
    """
    if isinstance(store, Upkeep):
        return await store.check(deep=deep)
    found = []
    for contract in RECORD_CONTRACTS:
        try:
            async for _ in store.scan(contract, include_removed=True):
                pass
        except Damaged as error:
            found.append(Finding(contract.name, str(error)))
    return found


async def accept_loss(store: Store) -> str | None:
    """Go on with a store that has lost acknowledged writes. Returns and raises as `AcceptsLoss.accept_loss`.

    Raises:
        UserError: this kind of store never refuses to open for that reason.
    """
    if not isinstance(store, AcceptsLoss):
        raise UserError(f"{type(store).__name__} has no loss to accept: only SQLite stores have a mark")
    return await store.accept_loss()


async def quarantine_list(store: Store) -> list[Quarantined]:
    """What is in quarantine, with path, reason and the time it was found.

    Raises:
        UserError: this kind of store has no quarantine.
    """
    return await _upkeep(store).quarantined()


async def quarantine_restore(store: Store, path: str) -> Record | None:
    """Put what is in quarantine under `path` back as it is now. Returns and raises as `Upkeep.restore`."""
    return await _upkeep(store).restore(path)


async def quarantine_drop(store: Store, path: str) -> Quarantined:
    """Give up what is in quarantine under `path`. Raises as `Upkeep.drop`."""
    return await _upkeep(store).drop(path)


async def spaces(store: Store) -> list[tuple[tuple[str, ...], Store]]:
    """The store itself and, where it knows them, every namespace in it that is not empty."""
    found: list[tuple[tuple[str, ...], Store]] = [((), store)]
    for path in sorted(await store.namespaces()) if isinstance(store, ListsNamespaces) else ():
        space = store
        for name in path:
            space = space.within(name)
        found.append((path, space))
    return found


async def _usage(namespace: tuple[str, ...], store: Store, contract: Contract) -> Usage:
    records = removed = size = 0
    fault = None
    try:
        async for record in store.scan(contract, include_removed=True):
            records += 1
            removed += record.removed
            size += len(dump_value(record.value))
    except Damaged as error:
        fault = str(error)
    return Usage(namespace, contract.name, records, removed, size, fault)


async def _candle_usage(namespace: tuple[str, ...], store: Store) -> Usage:
    rows = size = 0
    fault = None
    try:
        for series in await store.candles.series() if isinstance(store.candles, ListsSeries) else ():
            candles = await store.candles.read(series, *EVER)
            rows += len(candles)
            size += sum(column.nbytes for column in candles.columns().values())
    except Damaged as error:
        fault = str(error)
    return Usage(namespace, "candle", rows, 0, size, fault)


def _upkeep(store: Store) -> Upkeep:
    if not isinstance(store, Upkeep):
        raise UserError(f"{type(store).__name__} has no quarantine: only file and SQLite stores keep what is damaged")
    return store
