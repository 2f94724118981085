"""`MemoryStore`: the reference semantics of a store, in dictionaries of one process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from itertools import islice

from backtest_kit.model.candle import CandleSeries, merge
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.keys import check_key
from backtest_kit.persist.store import (
    CandleStore,
    Capability,
    Key,
    KeyPart,
    Record,
    Selection,
    SeriesKey,
    Store,
    Write,
    copy_plain,
)
from backtest_kit.persist.upkeep import require_namespace, require_prunable
from backtest_kit.persist.writing import check_batch, decide


class MemoryCandleStore(CandleStore):
    """Candles in one sorted series per market and interval."""

    def __init__(self) -> None:
        self._series: dict[SeriesKey, CandleSeries] = {}

    async def read(self, series: SeriesKey, start_ms: int, stop_ms: int) -> CandleSeries:
        return self._series.get(series, CandleSeries.empty()).between(start_ms, stop_ms)

    async def series(self) -> list[SeriesKey]:
        return list(self._series)

    async def write(self, series: SeriesKey, candles: CandleSeries) -> int:
        stored = self._series.get(series, CandleSeries.empty())
        merged, added = merge(stored, candles)
        if added:
            self._series[series] = merged
        return added


class _Table:
    """The records of one contract, each dictionary in order of the last write."""

    __slots__ = ("groups", "records")

    def __init__(self) -> None:
        self.records: dict[Key, Record] = {}
        self.groups: dict[KeyPart, dict[Key, None]] = {}

    def set(self, record: Record) -> None:
        self.records.pop(record.key, None)
        self.records[record.key] = record
        group = self.groups.setdefault(record.key[0], {})
        group.pop(record.key, None)
        group[record.key] = None

    def forget(self, key: Key) -> None:
        del self.records[key]
        group = self.groups[key[0]]
        del group[key]
        if not group:
            del self.groups[key[0]]

    def keys(self, prefix: Key, newest_first: bool) -> Iterator[Key]:
        keys = self.groups.get(prefix[0], {}) if prefix else self.records
        width = len(prefix)
        return (key for key in (reversed(keys) if newest_first else iter(keys)) if key[:width] == prefix)


class MemoryStore(Store):
    """Nothing outlives the object; what was written cannot be changed from outside."""

    capabilities = frozenset(Capability) - {Capability.DURABLE, Capability.SHARED, Capability.QUARANTINE}

    def __init__(self) -> None:
        self.candles = MemoryCandleStore()
        self._tables: dict[str, _Table] = {}
        self._namespaces: dict[str, MemoryStore] = {}
        self._inside = False

    async def get(self, contract: Contract, key: Key) -> Record | None:
        record = self._table(contract).records.get(check_key(contract, key))
        return None if record is None else _copy_record(record)

    async def put(self, write: Write) -> Record:
        return self.put_now(write)

    def put_now(self, write: Write) -> Record:
        record, changed = self._decide(write)
        if changed:
            self._table(write.contract).set(_copy_record(record))
        return _copy_record(record)

    async def batch(self, writes: Sequence[Write]) -> None:
        check_batch(writes)
        for write, (record, changed) in [(write, self._decide(write)) for write in writes]:
            if changed:
                self._table(write.contract).set(_copy_record(record))

    async def select(self, wanted: Selection) -> AsyncGenerator[Record, None]:
        table = self._table(wanted.contract)
        records = (table.records[key] for key in table.keys(wanted.prefix, wanted.newest_first))
        present = (record for record in records if wanted.include_removed or not record.removed)
        # All of them now: what is written while the caller reads would change the order of the table.
        for record in list(islice(present, wanted.limit)):
            yield _copy_record(record)

    def namespace(self, name: str) -> MemoryStore:
        if not name:
            return self
        space = self._namespaces.setdefault(name, MemoryStore())
        space._inside = True
        return space

    async def prune(self, contract: Contract, revisions: Mapping[Key, int]) -> int:
        require_prunable(contract)
        table = self._table(contract)
        doomed = [key for key, rev in revisions.items() if key in table.records and table.records[key].rev == rev]
        for key in doomed:
            table.forget(key)
        return len(doomed)

    async def count(self, contract: Contract) -> int:
        return sum(1 for record in self._table(contract).records.values() if not record.removed)

    async def forget(self) -> None:
        require_namespace(self._inside)
        self._tables.clear()
        self._namespaces.clear()
        self.candles = MemoryCandleStore()

    async def namespaces(self) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = []
        for name, space in self._namespaces.items():
            if any(table.records for table in space._tables.values()) or await space.candles.series():
                found.append((name,))
            found += [(name, *path) for path in await space.namespaces()]
        return found

    def _table(self, contract: Contract) -> _Table:
        return self._tables.setdefault(contract.name, _Table())

    def _decide(self, write: Write) -> tuple[Record, bool]:
        current = self._table(write.contract).records.get(check_key(write.contract, write.key))
        return decide(write, current)


def _copy_record(record: Record) -> Record:
    return Record(
        record.key,
        copy_plain(record.value),
        record.rev,
        record.when,
        record.written_at,
        record.removed,
        record.schema_version,
    )
