"""What an operator asks of a store beyond its own methods: names, sizes, what is in which namespace.

Functions over any open store.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist.codec import dump_value
from backtest_kit.persist.contracts import Contract, record_contracts
from backtest_kit.persist.keys import check_key, path_of, unescape
from backtest_kit.persist.store import Capability, Key, KeyPart, Store

EVER: Final = (-(2**62), 2**62)
"""A range of time that every candle is in."""
RUN_PREFIX: Final = "backtest-"
"""What the namespace of a backtest's run begins with."""


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


async def du(store: Store) -> list[Usage]:
    """What every contract takes, by namespace; each candle counts as a record. What takes nothing is left out."""
    found = []
    for namespace, space in await spaces(store):
        found += [await usage(namespace, space, contract) for contract in record_contracts()]
        found.append(await _candle_usage(namespace, space))
    return [usage for usage in found if usage.records or usage.fault]


async def spaces(store: Store) -> list[tuple[tuple[str, ...], Store]]:
    """The store itself and, where it knows them, every namespace in it that is not empty."""
    inner = sorted(await store.namespaces()) if Capability.LISTING in store.capabilities else ()
    return [(path, space_of(store, path)) for path in ((), *inner)]


def space_of(store: Store, namespace: Iterable[str]) -> Store:
    """The store of a namespace, given as the names that lead there."""
    for name in namespace:
        store = store.namespace(name)
    return store


async def usage(namespace: tuple[str, ...], store: Store, contract: Contract) -> Usage:
    """What one contract takes in the store of a namespace."""
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
        for series in await store.candles.series() if Capability.LISTING in store.capabilities else ():
            candles = await store.candles.read(series, *EVER)
            rows += len(candles)
            size += sum(column.nbytes for column in candles.columns().values())
    except Damaged as error:
        fault = str(error)
    return Usage(namespace, "candle", rows, 0, size, fault)
