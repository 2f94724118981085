"""Which settings suit the trend strategy? Six of them over the same candles, ranked.

    backtest-kit walk examples/walk.py --symbol BTCUSDT,ETHUSDT

The market is made up, a random walk with fees: whatever comes first here was lucky.
"""

import backtest_kit as bk

bk.add_exchange_schema("synthetic", source=bk.sources.synthetic(seed=7))
bk.add_frame_schema("june-2024", start_date="2024-06-01", end_date="2024-07-01")


def make(hours, distance_pct):
    """The strategy for one pair of settings."""

    async def get_signal(ctx: bk.Context) -> bk.Signal | None:
        close = (await ctx.candles("1h", hours)).close
        distance = (close[-1] / close.mean() - 1) * 100
        if abs(distance) < distance_pct:
            return None
        side = "long" if distance > 0 else "short"
        return bk.Signal.bracket(side, price=ctx.price, take_profit_pct=6, stop_loss_pct=3, minutes=24 * 60)

    return get_signal


for hours in (24, 48):
    for distance_pct in (0.5, 1.5, 3):
        bk.add_strategy_schema(f"trend-{hours}h-{distance_pct}%", interval="1h", get_signal=make(hours, distance_pct))
