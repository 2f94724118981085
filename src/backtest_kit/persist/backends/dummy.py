"""`DummyStore`: accepts and forgets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final

from backtest_kit.errors import UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.keys import check_key
from backtest_kit.persist.store import ANY, Capability, Key, Record, SeriesKey, Write, check_limit
from backtest_kit.persist.writing import decide


class DummyCandleStore:
    """Never has a candle: whoever asks fetches again."""

    async def read(self, series: SeriesKey, start_ms: int, stop_ms: int) -> CandleSeries:
        return CandleSeries.empty()

    async def write(self, series: SeriesKey, candles: CandleSeries) -> int:
        return 0


class DummyStore:
    """For runs whose records nobody will read. Promises nothing, and refuses whatever needs a promise."""

    capabilities: Final[frozenset[Capability]] = frozenset()

    def __init__(self) -> None:
        self.candles = DummyCandleStore()

    async def open(self) -> None:
        """There is nothing to open."""

    async def close(self) -> None:
        """There is nothing to close."""

    async def get(self, contract: Contract, key: Key) -> Record | None:
        check_key(contract, key)
        return None

    async def put(self, write: Write) -> Record:
        check_key(write.contract, write.key)
        if write.expect != ANY:
            raise UserError(f"a dummy store does not support compare-and-set: {write.contract.name} needs another one")
        return decide(write, None)[0]

    async def batch(self, writes: Sequence[Write]) -> None:
        if len(writes) > 1:
            raise UserError("a dummy store does not support atomic batches: bind another store")
        for write in writes:
            await self.put(write)

    async def scan(
        self,
        contract: Contract,
        prefix: Key = (),
        *,
        limit: int | None = None,
        newest_first: bool = False,
        include_removed: bool = False,
    ) -> AsyncIterator[Record]:
        check_key(contract, prefix, prefix=True)
        check_limit(limit)
        nothing: tuple[Record, ...] = ()
        for record in nothing:
            yield record

    def within(self, namespace: str) -> DummyStore:
        return self
