"""Everything that is in a store, part by part: the one way by which migration and comparison go.

A part is one contract in one namespace or, of candles, one series. Parts are in the order of their namespaces
and then of the table of contracts; what is in a part is in the order in which it was written, candles by time.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import Final

import msgspec
import numpy as np

from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import INTERVAL_MS, MINUTE_MS
from backtest_kit.persist.codec import dump_value
from backtest_kit.persist.contracts import MOVED, Kind
from backtest_kit.persist.operations import EVER, space_of, spaces
from backtest_kit.persist.store import Capability, Record, SeriesKey, Store, Write
from backtest_kit.persist.writing import now_ms

BATCH_RECORDS: Final = 500
BATCH_BYTES: Final = 2 << 20
"""What one batch of records takes at most, of values as JSON. A MongoDB without transactions takes 16 MiB at once, and
a list of small numbers is six times as long there."""
_CANDLES_AT_A_TIME: Final = 525_600
"""A year of minutes, 25 MB."""
_ORDER: Final = {name: place for place, name in enumerate(MOVED)}


class Part(msgspec.Struct, frozen=True):
    """One contract in one namespace or, of candles, one series."""

    namespace: tuple[str, ...]
    contract: str
    series: SeriesKey | None = None

    def __str__(self) -> str:
        names = (self.contract,) if self.series is None else (self.contract, *msgspec.structs.astuple(self.series))
        return "/".join((*(f"@{name}" for name in self.namespace), *names))

    @property
    def place(self) -> tuple[object, ...]:
        """By which parts are sorted."""
        series = () if self.series is None else msgspec.structs.astuple(self.series)
        return self.namespace, _ORDER[self.contract], series


async def parts(store: Store, *, candles: bool = True) -> list[Part]:
    """Every part that `store` may have something in, in order. Leases are in none.

    Raises:
        UserError: candles are asked for, and the store cannot list them.
    """
    found: list[Part] = []
    for namespace, space in await spaces(store):
        for row in MOVED.values():
            if row.kind is not Kind.SERIES:
                found.append(Part(namespace, row.name))
            elif candles:
                found += [Part(namespace, row.name, series) for series in await space.candles.series()]
    return sorted(found, key=lambda part: part.place)


async def records(store: Store, part: Part, *, last: bool = False) -> AsyncGenerator[Record]:
    """The records of a part, removed ones included; with `last`, only the one that was written last."""
    found = space_of(store, part.namespace).scan(
        MOVED[part.contract], limit=1 if last else None, newest_first=last, include_removed=True
    )
    try:
        async for record in found:
            yield record
    finally:
        if isinstance(found, AsyncGenerator):
            await found.aclose()


async def candles(store: Store, part: Part) -> AsyncIterator[CandleSeries]:
    """The candles of a part, oldest first, in pieces that memory has room for; none of them is empty."""
    for start, stop in ranges(part):
        found = await read_candles(store, part, start, stop)
        if len(found):
            yield found


async def read_candles(store: Store, part: Part, start_ms: int, stop_ms: int) -> CandleSeries:
    """The candles of a part that open in `[start_ms, stop_ms)`."""
    if part.series is None:
        return CandleSeries.empty()
    return await space_of(store, part.namespace).candles.read(part.series, start_ms, stop_ms)


async def write_candles(store: Store, part: Part, found: CandleSeries) -> int:
    """Store those candles of a part that are not there yet; returns how many those were."""
    return 0 if part.series is None else await space_of(store, part.namespace).candles.write(part.series, found)


def ranges(part: Part) -> Iterator[tuple[int, int]]:
    """Ranges of time that every candle of a part is in one of: each of as many as memory has room for."""
    interval = MINUTE_MS if part.series is None else INTERVAL_MS.get(part.series.interval, MINUTE_MS)
    step = _CANDLES_AT_A_TIME * interval
    return itertools.pairwise((EVER[0], *range(0, now_ms() + step, step), EVER[1]))


def content_of(record: Record) -> bytes:
    """What moves with a record, and makes it the same as another: not its revision and wall-clock time."""
    return dump_value([list(record.key), record.value, record.when, record.removed])


def rows_of(found: CandleSeries) -> bytes:
    """Candles as bytes, row by row, so that it does not matter how they were cut into pieces."""
    return np.rec.fromarrays(list(found.columns().values())).tobytes()


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


async def put_all(store: Store, writes: Sequence[Write]) -> None:
    """Do `writes` in their order: as one batch, where the store has batches."""
    if len(writes) > 1 and Capability.ATOMIC_BATCH in store.capabilities:
        await store.batch(writes)
    else:
        for write in writes:
            await store.put(write)
