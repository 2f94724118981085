"""The demo: follow the trend of the last two days, on the built-in seeded market.

Run it with `make demo`, or:

    backtest-kit backtest examples/trend.py --symbol BTCUSDT,ETHUSDT,SOLUSDT
"""

import backtest_kit as bk

bk.add_exchange_schema("synthetic", source=bk.sources.synthetic(seed=7))
bk.add_frame_schema("june-2024", start_date="2024-06-01", end_date="2024-07-01")


async def get_signal(ctx: bk.Context) -> bk.Signal | None:
    """Long where price has risen 1.5 % above its two-day mean, short where it has fallen as far below."""
    close = (await ctx.candles("1h", 48)).close
    distance_pct = (close[-1] / close.mean() - 1) * 100
    if abs(distance_pct) < 1.5:
        return None
    return bk.Signal.bracket(
        "long" if distance_pct > 0 else "short",
        price=ctx.price,
        take_profit_pct=6,
        stop_loss_pct=3,
        minutes=24 * 60,
    )


bk.add_strategy_schema("trend", interval="1h", get_signal=get_signal)
