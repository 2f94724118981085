"""Backtest Kit: one strategy for backtest, paper and live, on a state that can be killed and trusted.

```python
import backtest_kit as bk

bk.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
bk.add_frame_schema("january", start_date="2022-01-01", end_date="2022-02-01")

async def get_signal(ctx: bk.Context) -> bk.Signal | None:
    close = (await ctx.candles("15m", 50)).close
    if close[-1] < close.mean():
        return None
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=2, stop_loss_pct=1)

bk.add_strategy_schema("trend", interval="15m", get_signal=get_signal)
result = bk.Backtest.run_sync("BTCUSDT", strategy_name="trend", exchange_name="demo", frame_name="january")
print(result)
```
"""

from __future__ import annotations

from backtest_kit.errors import (
    BacktestKitError,
    Conflict,
    Damaged,
    LookAhead,
    Outcome,
    OutOfSpace,
    RetryLater,
    UserError,
)
from backtest_kit.kit import Kit
from backtest_kit.market import sources
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.event import (
    EntryCancelled,
    EntryScheduled,
    Event,
    Identity,
    PositionClosed,
    PositionOpened,
    RiskRejected,
)
from backtest_kit.model.position import Entry, Position, Reduction, RestingEntry, Trade
from backtest_kit.model.signal import Signal
from backtest_kit.report import BacktestResult, Results, Statistics
from backtest_kit.run.backtest import BacktestHandle
from backtest_kit.run.context import Context
from backtest_kit.run.risk import RiskRequest
from backtest_kit.settings import Settings

__version__ = "0.1.0"

default_kit = Kit()
"""The kit that the functions below act on."""

add_exchange_schema = default_kit.add_exchange_schema
add_frame_schema = default_kit.add_frame_schema
add_risk_schema = default_kit.add_risk_schema
add_strategy_schema = default_kit.add_strategy_schema
list_exchange_schemas = default_kit.list_exchange_schemas
list_frame_schemas = default_kit.list_frame_schemas
list_risk_schemas = default_kit.list_risk_schemas
list_strategy_schemas = default_kit.list_strategy_schemas
get_config = default_kit.get_config
set_config = default_kit.set_config
Backtest = default_kit.backtest

__all__ = [
    "Backtest",
    "BacktestHandle",
    "BacktestKitError",
    "BacktestResult",
    "CandleSeries",
    "Conflict",
    "Context",
    "Damaged",
    "Entry",
    "EntryCancelled",
    "EntryScheduled",
    "Event",
    "Identity",
    "Kit",
    "LookAhead",
    "OutOfSpace",
    "Outcome",
    "Position",
    "PositionClosed",
    "PositionOpened",
    "Reduction",
    "RestingEntry",
    "Results",
    "RetryLater",
    "RiskRejected",
    "RiskRequest",
    "Settings",
    "Signal",
    "Statistics",
    "Trade",
    "UserError",
    "add_exchange_schema",
    "add_frame_schema",
    "add_risk_schema",
    "add_strategy_schema",
    "default_kit",
    "get_config",
    "list_exchange_schemas",
    "list_frame_schemas",
    "list_risk_schemas",
    "list_strategy_schemas",
    "set_config",
    "sources",
]
