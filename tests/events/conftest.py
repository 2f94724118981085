"""Events of made-up runs; `Progress.fraction` counts them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from backtest_kit.model.event import Progress
from backtest_kit.model.identity import Identity

MakeEvent = Callable[..., Progress]


@pytest.fixture
def progress() -> MakeEvent:
    def make(number: float = 0, *, symbol: str = "BTCUSDT", strategy_name: str = "trend") -> Progress:
        identity = Identity(symbol, strategy_name, "demo", "day", "backtest")
        return Progress(identity=identity, when_ms=60_000, fraction=number)

    return make
