"""The conformance suite of stores, complete."""

from __future__ import annotations

from backtest_kit.persist.testing.candle_cases import CandleCases
from backtest_kit.persist.testing.change_cases import ChangeCases
from backtest_kit.persist.testing.life_cases import LifeCases
from backtest_kit.persist.testing.look_ahead_cases import LookAheadCases
from backtest_kit.persist.testing.prune_cases import PruneCases
from backtest_kit.persist.testing.record_cases import RecordCases
from backtest_kit.persist.testing.scan_cases import ScanCases
from backtest_kit.persist.testing.upkeep_cases import UpkeepCases
from backtest_kit.persist.testing.value_cases import ValueCases


class StoreConformance(
    RecordCases, ValueCases, ChangeCases, ScanCases, PruneCases, UpkeepCases, LifeCases, CandleCases, LookAheadCases
):
    """Subclass it in a pytest file, say how a store is made, and get the whole suite.

        class TestMyStore(StoreConformance):
            def make_store(self, place: Path) -> Store:
                return MyStore(place / "data")

    `make_store` is handed a directory of the test's own and returns a store that nobody has opened yet.
    Handed the same directory again it returns another store over the same data: that is how the suite
    restarts a program, and how it opens a store from two sides. Every declared capability is tested,
    and of every undeclared one it is tested that what needs it is refused.

    Needs pytest and pytest-asyncio, in auto or strict mode; no configuration and no other plugin. A
    store over a server takes the address from wherever its author likes and a namespace of its own
    from `place`.
    """
