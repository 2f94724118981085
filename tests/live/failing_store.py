"""A store that is away."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import backtest_kit as bk
from backtest_kit.errors import Outcome
from backtest_kit.persist.contracts import LEASE, Contract
from backtest_kit.persist.store import CandleStore, Capability, Key, Record, Selection, Store, Write


class FailingCandles(CandleStore):
    """The candles of a store that is away."""

    def __init__(self, store: FailingStore, inner: Any) -> None:
        self._store, self._inner = store, inner

    async def read(self, *asked: Any) -> Any:
        if isinstance(self._store.error, bk.RetryLater):
            raise self._store.error
        return await self._inner.read(*asked)

    async def write(self, *given: Any) -> int:
        if self._store.error is not None:
            raise self._store.error
        return int(await self._inner.write(*given))


class FailingStore(Store):
    """A memory store that takes no writes while `error` is set, and loses the answer of the next while `lossy` is."""

    def __init__(self) -> None:
        self._inner = bk.MemoryStore()
        self.candles = FailingCandles(self, self._inner.candles)
        self.error: Exception | None = None
        self.lossy = False
        self.lease_too = False
        self.refused_leases = 0

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self._inner.capabilities

    def select(self, wanted: Selection) -> AsyncGenerator[Record, None]:
        return self._inner.select(wanted)

    async def namespaces(self) -> list[tuple[str, ...]]:
        return await self._inner.namespaces()

    async def prune(self, contract: Contract, revisions: Mapping[Key, int]) -> int:
        return await self._inner.prune(contract, revisions)

    async def count(self, contract: Contract) -> int:
        return await self._inner.count(contract)

    async def get(self, contract: Contract, key: Key) -> Record | None:
        return await self._inner.get(contract, key)

    async def put(self, write: Write) -> Record:
        if write.contract is not LEASE:
            self._fail()
        elif self.lease_too and self.error is not None:
            self.refused_leases += 1
            raise self.error
        return await self._inner.put(write)

    async def batch(self, writes: Sequence[Write]) -> None:
        self._fail()
        await self._inner.batch(writes)
        if self.lossy:
            self.lossy = False
            raise bk.RetryLater("the answer was lost", outcome=Outcome.UNKNOWN)

    def namespace(self, name: str) -> Store:
        return self

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error
