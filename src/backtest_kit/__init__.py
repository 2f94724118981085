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

import lazy_loader

__version__ = "0.1.0"

# A name is imported when it is first used: a command that only prints its help, or a tool that only
# reads a store, does not wait for the engine. The names themselves stand in __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
