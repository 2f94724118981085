"""Cases of what an operator needs: listing what there is, and deciding about what is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from backtest_kit.errors import Damaged, UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.store import Capability, SeriesKey, Store, Write
from backtest_kit.persist.testing.harness import MEMORY, Harness, has, memory_write

SERIES = SeriesKey("binance", "BTC/USDT", "1m")
CANDLE = CandleSeries.from_rows([(0, 1.0, 1.0, 1.0, 1.0, 1.0)])


class UpkeepCases(Harness):
    async def test_namespaces_and_series_are_listed(self, store: Store) -> None:
        if not has(store, Capability.LISTING):
            with pytest.raises(UserError, match=type(store).__name__):
                await store.namespaces()
            return
        assert (await store.namespaces(), await store.candles.series()) == ([], [])
        await store.namespace("records").put(memory_write("a"))
        await store.namespace("candles").namespace("inner/one").candles.write(SERIES, CANDLE)
        found = set(await store.namespaces())
        assert {("records",), ("candles", "inner/one")} <= found <= {
            ("records",), ("candles",), ("candles", "inner/one"),
        }  # fmt: skip
        assert ("inner/one",) in await store.namespace("candles").namespaces()
        assert await store.candles.series() == []
        assert await store.namespace("candles").namespace("inner/one").candles.series() == [SERIES]

    async def test_quarantine_is_refused_unless_declared(self, store: Store) -> None:
        if has(store, Capability.QUARANTINE):
            assert await store.quarantined() == []
            with pytest.raises(UserError, match="nowhere"):
                await store.drop("memory/nowhere")
            return
        for refused in (store.quarantined(), store.restore("memory/nowhere"), store.drop("memory/nowhere")):
            with pytest.raises(UserError, match=type(store).__name__):
                await refused

    async def test_dropping_what_is_damaged_frees_its_key(self, place: Path) -> None:
        key = ("signal-1", "notes", "a")
        store = self.make_store(place)
        await store.put(memory_write("a", "spoilt"))
        await store.close()
        store = self.make_store(place)
        if has(store, Capability.QUARANTINE) and self.damage(place, MEMORY, "spoilt"):
            with pytest.raises(Damaged):
                await store.get(MEMORY, key)
            assert await store.check()
            (kept,) = await store.quarantined()
            assert (await store.drop(kept.path)).path == kept.path
            assert await store.quarantined() == []
            assert await store.check() == []
            assert (await store.put(Write(MEMORY, key, "anew"))).value == "anew"
        await store.close()

    async def test_sound_store_has_no_findings(self, store: Store) -> None:
        await store.put(memory_write("a", "value"))
        if has(store, Capability.ORDERED_SCAN):
            assert await store.check(deep=True) == []

    async def test_identity_is_of_the_place_and_the_namespace(self, place: Path, store: Store) -> None:
        await store.put(memory_write("a"))
        await store.namespace("paper").put(memory_write("a"))
        identity = await store.identity()
        if identity is not None:
            other = self.make_store(place)
            assert await other.identity() == identity
            assert await other.namespace("paper").identity() != identity
            await other.close()
