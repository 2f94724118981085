"""`DummyStore`: accepts and forgets."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Final

from backtest_kit.errors import UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.keys import check_key
from backtest_kit.persist.store import ANY, CandleStore, Capability, Key, Record, Selection, SeriesKey, Store, Write
from backtest_kit.persist.writing import decide


class DummyCandleStore(CandleStore):
    """Never has a candle: whoever asks fetches again."""

    async def read(self, series: SeriesKey, start_ms: int, stop_ms: int) -> CandleSeries:
        return CandleSeries.empty()

    async def write(self, series: SeriesKey, candles: CandleSeries) -> int:
        return 0


class DummyStore(Store):
    """For runs whose records nobody will read. Promises nothing, and refuses whatever needs a promise."""

    capabilities: Final[frozenset[Capability]] = frozenset()

    def __init__(self) -> None:
        self.candles = DummyCandleStore()

    async def get(self, contract: Contract, key: Key) -> Record | None:
        check_key(contract, key)
        return None

    async def put(self, write: Write) -> Record:
        check_key(write.contract, write.key)
        if write.expect != ANY:
            raise UserError(f"a dummy store does not support compare-and-set: {write.contract.name} needs another one")
        return decide(write, None)[0]

    async def select(self, wanted: Selection) -> AsyncGenerator[Record, None]:
        nothing: tuple[Record, ...] = ()
        for record in nothing:
            yield record

    def namespace(self, name: str) -> DummyStore:
        return self
