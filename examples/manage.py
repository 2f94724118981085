"""Manage an open position: take half at the first target, go to breakeven, trail the rest, add on the way down.

backtest-kit backtest examples/manage.py --symbol BTCUSDT,ETHUSDT
"""

import backtest_kit as bk

bk.add_exchange_schema("synthetic", source=bk.sources.synthetic(seed=7))
bk.add_frame_schema("june-2024", start_date="2024-06-01", end_date="2024-07-01")


async def get_signal(ctx: bk.Context) -> bk.Signal | None:
    """Buy what is above its two-day mean; the exits are wide, `manage` does the rest."""
    close = (await ctx.candles("1h", 48)).close
    if close[-1] < close.mean():
        return None
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=8, stop_loss_pct=5, minutes=24 * 60)


async def manage(ctx: bk.Context) -> None:
    """Called at every minute in which a position is open. Commands say whether they were accepted."""
    position = ctx.position
    if position is None:
        return
    gain_pct = (ctx.price / position.price_open - 1) * 100
    if gain_pct > 2 and not position.reductions:
        await position.reduce(percent=50)
        await position.breakeven()
    if gain_pct > 3:
        await position.move_stop(ctx.price * 0.985)  # refused unless it is tighter than the stop in force
    if gain_pct < -2 and len(position.entries) < 3:
        await position.add(cost=50)
    if position.minutes_left < 30 and position.pnl_pct > 0:
        await position.close("a small profit at the end of its life")


bk.add_strategy_schema("managed", interval="1h", get_signal=get_signal, manage=manage)
