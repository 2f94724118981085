"""`AdapterStore`: a user's object with `read_value` and `write_value`, as the store of one contract.

    class MemorySignalAdapter:
        def __init__(self): self._store = {}
        async def read_value(self, entity_id): return self._store.get(entity_id)
        async def write_value(self, entity_id, entity): self._store[entity_id] = entity

`entity_id` is the key as text: its components, escaped as in file names, with a slash between them, such
as `trend/binance/BTCUSDT`. No two keys have the same. Outside the live namespace the name of the namespace
stands before it: `paper:trend/binance/BTCUSDT`. What was never written is None.

`entity` is a dict of plain JSON values: the caller's value under "value", and next to it what the engine
must get back with it ("contract", "namespace", "key", "rev", "when", "writtenAt", "removed", "order"). Candles are
entities of one month each, `binance/BTCUSDT/1m/2022-01`, whose value has a list per column.

The methods may be plain or async. An optional `list_values()` returns every entity, as an iterable or an
async iterable in any order; without it the contract cannot be listed.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol, runtime_checkable

import msgspec
import numpy as np
from numpy.typing import NDArray

from backtest_kit.errors import Damaged, UserError
from backtest_kit.model.candle import COLUMNS, CandleSeries, merge
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.keys import check_key, escape, path_of
from backtest_kit.persist.store import (
    CandleStore,
    Capability,
    Key,
    Record,
    Selection,
    SeriesKey,
    Store,
    Write,
    copy_plain,
)
from backtest_kit.persist.writing import decide, now_ms

_CANDLE: Final = CONTRACTS["candle"]


@runtime_checkable
class Adapter(Protocol):
    """What a user writes. Either method may be async."""

    def read_value(self, entity_id: str) -> Any:
        """The entity last written under `entity_id`, or None."""
        ...

    def write_value(self, entity_id: str, entity: Any) -> Any:
        """Keep `entity` under `entity_id`, in place of what was there."""
        ...


class _Entity(msgspec.Struct, rename="camel"):
    contract: str
    namespace: str
    key: list[str | int | bool]
    value: Any
    rev: int
    when: int | None
    written_at: int
    removed: bool
    order: int
    """Grows from write to write, so that entities listed in any order can be put in that of writing."""


class _Shared:
    """What every namespace of one adapter has in common."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.name = type(adapter).__name__
        self.locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self.last_order = 0

    @asynccontextmanager
    async def alone(self, entity_id: str) -> AsyncIterator[None]:
        """One task at a time per entity, in the order of their coming."""
        lock, users = self.locks.get(entity_id, (asyncio.Lock(), 0))
        self.locks[entity_id] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self.locks.pop(entity_id)
            if users > 1:
                self.locks[entity_id] = lock, users - 1

    async def read(self, entity_id: str, contract: Contract, namespace: str, key: Key) -> _Entity | None:
        found = await self._call("read_value", entity_id)
        if found is None:
            return None
        entity = self.checked(found)
        if (entity.contract, entity.namespace, tuple(entity.key)) != (contract.name, namespace, key):
            raise Damaged(
                f"{self.name} returned for {entity_id!r} the {entity.contract} of {entity.key}: "
                "read_value must tell its entities apart, and one object serve one contract"
            )
        return entity

    def checked(self, found: object) -> _Entity:
        try:
            return msgspec.convert(found, _Entity)
        except msgspec.ValidationError as error:
            raise Damaged(
                f"{self.name} returned {str(found)[:80]!r}, which is not an entity that it was given ({error}): "
                "return what write_value got, or None for what was never written"
            ) from None

    async def write(self, entity_id: str, contract: Contract, namespace: str, record: Record) -> None:
        # A clock alone can stand still between two writes, a counter alone begins anew with the process.
        self.last_order = max(self.last_order + 1, time.time_ns())
        entity = _Entity(
            contract=contract.name,
            namespace=namespace,
            key=list(record.key),
            value=copy_plain(record.value),
            rev=record.rev,
            when=record.when,
            written_at=record.written_at,
            removed=record.removed,
            order=self.last_order,
        )
        await self._call("write_value", entity_id, msgspec.to_builtins(entity))

    async def entities(self) -> list[Any]:
        listing = await self._call("list_values")
        if hasattr(listing, "__aiter__"):
            return [entity async for entity in listing]
        return list(listing)

    async def _call(self, method: str, *arguments: object) -> Any:
        result = getattr(self.adapter, method)(*arguments)
        return await result if inspect.isawaitable(result) else result


class AdapterStore(Store):
    """A `Store` of one contract over an `Adapter`.

    Writes to one key are serialised within the process and `expect` is honoured there. Whether anything
    lasts, and who else sees it, is the adapter's affair, so neither is promised.
    """

    def __init__(self, contract: Contract, adapter: object) -> None:
        """`adapter` is an object, or a class or function that makes one.

        Raises:
            UserError: it has no `read_value` and `write_value`.
        """
        if isinstance(adapter, type) or (callable(adapter) and not isinstance(adapter, Adapter)):
            adapter = adapter()
        if not isinstance(adapter, Adapter):
            raise UserError(
                f"{type(adapter).__name__} cannot store {contract.name}: give it read_value(entity_id) "
                "and write_value(entity_id, entity), or pass a whole store to use_store()"
            )
        self._contract = contract
        self._shared = _Shared(adapter)
        self._namespace = ""
        self.candles = AdapterCandleStore(self._shared, self._namespace)

    @property
    def capabilities(self) -> frozenset[Capability]:
        lists = (Capability.ORDERED_SCAN,) if hasattr(self._shared.adapter, "list_values") else ()
        return frozenset((Capability.COMPARE_AND_SET, *lists))

    def keeps(self, contract: Contract) -> bool:
        return contract.name == self._contract.name

    async def get(self, contract: Contract, key: Key) -> Record | None:
        return await self._read(self._entity_id(contract, key), contract, key)

    async def put(self, write: Write) -> Record:
        entity_id = self._entity_id(write.contract, write.key)
        async with self._shared.alone(entity_id):
            record, changed = decide(write, await self._read(entity_id, write.contract, write.key))
            if changed:
                await self._shared.write(entity_id, write.contract, self._namespace, record)
        return record

    async def select(self, wanted: Selection) -> AsyncGenerator[Record, None]:
        self._check_contract(wanted.contract)
        if Capability.ORDERED_SCAN not in self.capabilities:
            raise UserError(f"{self._shared.name} cannot be listed: give it list_values()")
        width = len(wanted.prefix)
        entities = [
            entity
            for entity in map(self._shared.checked, await self._shared.entities())
            if entity.namespace == self._namespace and tuple(entity.key[:width]) == wanted.prefix
        ]
        entities.sort(key=lambda entity: entity.order, reverse=wanted.newest_first)
        for entity in entities:
            yield _record(entity)

    def namespace(self, name: str) -> AdapterStore:
        if not name:
            return self
        inner = copy.copy(self)
        inner._namespace = f"{self._namespace}{escape(name, 'namespace')}:"
        inner.candles = AdapterCandleStore(self._shared, inner._namespace)
        return inner

    def _entity_id(self, contract: Contract, key: Key) -> str:
        self._check_contract(contract)
        return self._namespace + "/".join(path_of(contract, check_key(contract, key)))

    def _check_contract(self, contract: Contract) -> None:
        if not self.keeps(contract):
            raise UserError(
                f"{self._shared.name} is bound to {self._contract.name} and was asked for {contract.name}: "
                "bind an adapter of its own for each contract"
            )

    async def _read(self, entity_id: str, contract: Contract, key: Key) -> Record | None:
        entity = await self._shared.read(entity_id, contract, self._namespace, key)
        return None if entity is None else _record(entity)


def _record(entity: _Entity) -> Record:
    return Record(
        key=tuple(entity.key),
        value=copy_plain(entity.value),
        rev=entity.rev,
        when=entity.when,
        written_at=entity.written_at,
        removed=entity.removed,
    )


class AdapterCandleStore(CandleStore):
    """Candles over an adapter: an entity per month, in which the first write of a candle wins."""

    def __init__(self, shared: _Shared, namespace: str) -> None:
        self._shared = shared
        self._namespace = namespace

    async def read(self, series: SeriesKey, start_ms: int, stop_ms: int) -> CandleSeries:
        if start_ms >= stop_ms:
            return CandleSeries.empty()
        first, last = _months(np.array([start_ms, stop_ms - 1]))
        months = [month for month in await self._index(series) if first <= np.datetime64(month) <= last]
        return CandleSeries.concat([await self._month(series, month) for month in months]).between(start_ms, stop_ms)

    async def write(self, series: SeriesKey, candles: CandleSeries) -> int:
        months = _months(candles.timestamp)
        added = 0
        async with self._shared.alone(self._entity_id(series)):
            index = await self._index(series)
            names = [str(month) for month in np.unique(months)]
            if not set(names) <= set(index):
                # The index first: a month that it names and that is not there reads as empty, while one
                # that it does not name would be lost.
                await self._put(series, (), sorted({*index, *names}, key=np.datetime64))
            for name in names:
                stored = await self._month(series, name)
                merged, new = merge(stored, candles.take(months == np.datetime64(name)))
                if new:
                    columns = {column: values.tolist() for column, values in merged.columns().items()}
                    await self._put(series, (name,), columns)
                    added += new
        return added

    async def _index(self, series: SeriesKey) -> list[str]:
        found = await self._shared.read(self._entity_id(series), _CANDLE, self._namespace, _key(series))
        return [] if found is None else list(found.value)

    async def _month(self, series: SeriesKey, month: str) -> CandleSeries:
        entity_id = f"{self._entity_id(series)}/{month}"
        found = await self._shared.read(entity_id, _CANDLE, self._namespace, (*_key(series), month))
        return CandleSeries.empty() if found is None else CandleSeries(*(found.value[name] for name in COLUMNS))

    async def _put(self, series: SeriesKey, tail: tuple[str, ...], value: Any) -> None:
        record = Record(key=(*_key(series), *tail), value=value, rev=1, when=None, written_at=now_ms())
        entity_id = "/".join((self._entity_id(series), *tail))
        await self._shared.write(entity_id, _CANDLE, self._namespace, record)

    def _entity_id(self, series: SeriesKey) -> str:
        return self._namespace + "/".join(path_of(_CANDLE, check_key(_CANDLE, _key(series), prefix=True)))


def _key(series: SeriesKey) -> tuple[str, str, str]:
    return series.exchange_name, series.symbol, series.interval


def _months(timestamps: NDArray[np.int64]) -> NDArray[np.datetime64]:
    return timestamps.astype("datetime64[ms]").astype("datetime64[M]")
