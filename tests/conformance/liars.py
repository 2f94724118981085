"""Stores that are nearly right. Each breaks one promise, and the suite must notice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from backtest_kit.errors import Conflict
from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.backends.memory import MemoryCandleStore, MemoryStore
from backtest_kit.persist.contracts import Contract, WriteRule
from backtest_kit.persist.store import ANY, Capability, Key, Record, SeriesKey, Write
from backtest_kit.persist.testing import StoreConformance


class IgnoresExpectations(MemoryStore):
    async def put(self, write: Write) -> Record:
        return await super().put(msgspec.structs.replace(write, expect=ANY))


class JudgesTheBatchOnTheWay(MemoryStore):
    async def batch(self, writes: Sequence[Write]) -> None:
        for write in writes:
            await self.put(write)


class WritesHalfOfMany(MemoryStore):
    async def put_each(self, writes: Sequence[Write]) -> list[Record | BaseException]:
        done = await MemoryStore().put_each(writes)
        for write in writes[::2]:
            await self.put(write)
        return done


class HonoursWhatItDoesNotDeclare(MemoryStore):
    capabilities = MemoryStore.capabilities - {Capability.COMPARE_AND_SET}


class BatchesWithoutDeclaring(MemoryStore):
    capabilities = MemoryStore.capabilities - {Capability.ATOMIC_BATCH}


class ScansWithoutDeclaring(MemoryStore):
    capabilities = MemoryStore.capabilities - {Capability.ORDERED_SCAN}


class ListsNamespacesWithoutDeclaring(MemoryStore):
    capabilities = MemoryStore.capabilities - {Capability.LISTING}


class PrunesWithoutDeclaring(MemoryStore):
    capabilities = MemoryStore.capabilities - {Capability.PRUNING}


class ClaimsToKeepDamage(MemoryStore):
    capabilities = MemoryStore.capabilities | {Capability.QUARANTINE}


class HidesANamespace(MemoryStore):
    async def namespaces(self) -> list[tuple[str, ...]]:
        return (await super().namespaces())[1:]


class ClaimsToLast(MemoryStore):
    capabilities = MemoryStore.capabilities | {Capability.DURABLE}


class ClaimsToShare(MemoryStore):
    capabilities = MemoryStore.capabilities | {Capability.SHARED}


class _Rescanning(MemoryStore):
    """A store with a listing of its own."""

    def arrange(self, records: list[Record], prefix: Key) -> list[Record]:
        return records

    async def scan(
        self,
        contract: Contract,
        prefix: Key = (),
        *,
        limit: int | None = None,
        newest_first: bool = False,
        include_removed: bool = False,
    ) -> AsyncIterator[Record]:
        super_scan = super().scan(contract, (), include_removed=include_removed)
        records = self.arrange([record async for record in super_scan], prefix)
        for record in records[:: -1 if newest_first else 1][:limit]:
            yield record


class ListsByKey(_Rescanning):
    def arrange(self, records: list[Record], prefix: Key) -> list[Record]:
        return sorted((r for r in records if r.key[: len(prefix)] == prefix), key=lambda record: str(record.key))


class TakesPrefixesOfText(_Rescanning):
    def arrange(self, records: list[Record], prefix: Key) -> list[Record]:
        start = "/".join(map(str, prefix))
        return [record for record in records if "/".join(map(str, record.key)).startswith(start)]


class ListsRemovedOnes(MemoryStore):
    async def scan(self, contract: Contract, prefix: Key = (), **options: Any) -> AsyncIterator[Record]:
        async for record in super().scan(contract, prefix, **{**options, "include_removed": True}):
            yield record


class LimitsBeforeItFilters(MemoryStore):
    async def scan(self, contract: Contract, prefix: Key = (), **options: Any) -> AsyncIterator[Record]:
        include_removed = options.pop("include_removed", False)
        async for record in super().scan(contract, prefix, include_removed=True, **options):
            if include_removed or not record.removed:
                yield record


class HandsOutItsOwnValues(MemoryStore):
    async def get(self, contract: Contract, key: Key) -> Record | None:
        await super().get(contract, key)
        return self._table(contract).records.get(key)


class KeepsTheCallersValue(MemoryStore):
    async def put(self, write: Write) -> Record:
        record = await super().put(write)
        self._table(write.contract).records[write.key] = msgspec.structs.replace(record, value=write.value)
        return record


class _Twisting(MemoryStore):
    """A store that changes what it is asked to write."""

    def twist(self, write: Write) -> Write:
        return write

    async def put(self, write: Write) -> Record:
        return await super().put(self.twist(write))

    async def batch(self, writes: Sequence[Write]) -> None:
        await super().batch([self.twist(write) for write in writes])


class ForgetsTheTime(_Twisting):
    def twist(self, write: Write) -> Write:
        return msgspec.structs.replace(write, when=None)


class ForgetsRemovals(_Twisting):
    def twist(self, write: Write) -> Write:
        return msgspec.structs.replace(write, removed=False)


class TurnsFloatsIntoInts(_Twisting):
    def twist(self, write: Write) -> Write:
        value = write.value
        return msgspec.structs.replace(write, value=int(value) if isinstance(value, float) and value == 1.0 else value)


class OverwritesWhatWasFirst(_Twisting):
    def twist(self, write: Write) -> Write:
        return msgspec.structs.replace(
            write, contract=msgspec.structs.replace(write.contract, write_rule=WriteRule.REPLACE)
        )


class _Renaming(MemoryStore):
    """A store that uses other keys inside than outside."""

    def rename(self, contract: Contract, key: Key) -> Key:
        return key

    async def get(self, contract: Contract, key: Key) -> Record | None:
        found = await super().get(contract, self.rename(contract, key))
        return None if found is None else msgspec.structs.replace(found, key=key)

    async def put(self, write: Write) -> Record:
        renamed = self.rename(write.contract, write.key)
        record = await super().put(msgspec.structs.replace(write, key=renamed))
        return msgspec.structs.replace(record, key=write.key)


class FoldsCase(_Renaming):
    def rename(self, contract: Contract, key: Key) -> Key:
        return tuple(part.lower() if isinstance(part, str) else part for part in key)


class JoinsWithUnderscores(_Renaming):
    def rename(self, contract: Contract, key: Key) -> Key:
        if contract.name != "memory":
            return key
        first, *rest = "_".join(map(str, key)).split("_", 1)
        return (first, "_".join(rest), "")


class IgnoresTheMode(_Renaming):
    def rename(self, contract: Contract, key: Key) -> Key:
        return tuple(True if isinstance(part, bool) else part for part in key)


class CountsNothing(MemoryStore):
    async def put(self, write: Write) -> Record:
        return msgspec.structs.replace(await super().put(write), rev=1)


class HasOneNamespace(MemoryStore):
    def namespace(self, name: str) -> MemoryStore:
        return self


class ClosesForGood(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    async def close(self) -> None:
        self.closed = True

    async def get(self, contract: Contract, key: Key) -> Record | None:
        if self.closed:
            raise Conflict("closed")
        return await super().get(contract, key)


class LastCandleWins(MemoryStore):
    class Candles(MemoryCandleStore):
        async def write(self, series: SeriesKey, candles: CandleSeries) -> int:
            stored = self._series.pop(series, CandleSeries.empty())
            await super().write(series, candles)
            return len(candles) - await super().write(series, stored)

    def __init__(self) -> None:
        super().__init__()
        self.candles = self.Candles()


class CountsEveryCandle(MemoryStore):
    class Candles(MemoryCandleStore):
        async def write(self, series: SeriesKey, candles: CandleSeries) -> int:
            await super().write(series, candles)
            return len(candles)

    def __init__(self) -> None:
        super().__init__()
        self.candles = self.Candles()


class ReadsTheStop(MemoryStore):
    class Candles(MemoryCandleStore):
        async def read(self, series: SeriesKey, start_ms: int, stop_ms: int) -> CandleSeries:
            return await super().read(series, start_ms, stop_ms + 1)

    def __init__(self) -> None:
        super().__init__()
        self.candles = self.Candles()


CAUGHT_BY: dict[type[MemoryStore], str] = {
    IgnoresExpectations: "test_expected_absence",
    JudgesTheBatchOnTheWay: "test_batch_with_one_conflict_changes_nothing",
    WritesHalfOfMany: "test_many_at_once_come_out_as_one_after_the_other",
    HonoursWhatItDoesNotDeclare: "test_expected_absence",
    BatchesWithoutDeclaring: "test_batch_can_remove",
    ScansWithoutDeclaring: "test_empty_listing",
    ListsNamespacesWithoutDeclaring: "test_namespaces_and_series_are_listed",
    PrunesWithoutDeclaring: "test_forgetting_is_refused_unless_declared",
    ClaimsToKeepDamage: "test_quarantine_is_refused_unless_declared",
    HidesANamespace: "test_namespaces_and_series_are_listed",
    ClaimsToLast: "test_reopened_store_has_what_it_promised",
    ClaimsToShare: "test_two_stores_over_one_place",
    ListsByKey: "test_rewritten_record_moves_to_the_end",
    TakesPrefixesOfText: "test_prefix_is_of_whole_components",
    ListsRemovedOnes: "test_removed_records_are_listed_on_request",
    LimitsBeforeItFilters: "test_limit_counts_what_is_listed",
    HandsOutItsOwnValues: "test_read_value_is_the_readers_own",
    KeepsTheCallersValue: "test_written_value_cannot_be_changed_from_outside",
    ForgetsTheTime: "test_record_of_the_future_is_not_there",
    ForgetsRemovals: "test_removed_record_stays_and_can_be_revived",
    TurnsFloatsIntoInts: "test_value_comes_back_equal_and_of_the_same_type",
    OverwritesWhatWasFirst: "test_second_write_follows_the_rule_of_the_contract",
    FoldsCase: "test_no_two_hostile_keys_meet",
    JoinsWithUnderscores: "test_components_are_not_joined_ambiguously",
    IgnoresTheMode: "test_records_are_apart_by_each_component",
    CountsNothing: "test_revision_counts_every_write",
    HasOneNamespace: "test_namespaces_are_apart",
    ClosesForGood: "test_closed_store_opens_at_the_next_call",
    LastCandleWins: "test_first_write_wins",
    CountsEveryCandle: "test_gap_can_be_filled_later",
    ReadsTheStop: "test_range_takes_its_start_and_leaves_its_stop",
}
"""Every liar, and the case that must find him out."""


def _suite(store: type[MemoryStore]) -> type[StoreConformance]:
    def make_store(self: StoreConformance, place: Path) -> MemoryStore:
        return store()

    return type("Suite", (StoreConformance,), {"make_store": make_store})


ALL: tuple[type[MemoryStore], ...] = (*CAUGHT_BY, MemoryStore)
for liar in ALL:
    globals()[f"Test{liar.__name__}"] = _suite(liar)
