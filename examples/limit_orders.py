"""Resting entries: wait below the market for a dip, give up when the market runs away.

backtest-kit backtest examples/limit_orders.py --symbol BTCUSDT
"""

import backtest_kit as bk

bk.add_exchange_schema("synthetic", source=bk.sources.synthetic(seed=7))
bk.add_frame_schema("june-2024", start_date="2024-06-01", end_date="2024-07-01")


async def get_signal(ctx: bk.Context) -> bk.Signal | None:
    """A limit order 0.5 % below the market: it rests for at most CC_SCHEDULE_AWAIT_MINUTES."""
    entry = ctx.price * 0.995
    return bk.Signal(
        position="long",
        price_open=entry,
        price_take_profit=entry * 1.02,
        price_stop_loss=entry * 0.985,
        minutes=12 * 60,
        note="buy the dip",
    )


async def manage(ctx: bk.Context) -> None:
    """Cancel an entry that the market has left 1 % behind; `ctx.entry.activate()` would take the market price."""
    if ctx.entry is not None and ctx.price > ctx.entry.value.price_open * 1.01:
        await ctx.entry.cancel()


def report(event: bk.EntryCancelled) -> None:
    print(f"{event.when:%m-%d %H:%M} {event.symbol} {event.reason} at {event.price:,.0f}")


bk.add_strategy_schema("dips", interval="15m", get_signal=get_signal, manage=manage)
bk.on(bk.EntryCancelled, report, symbol="BTCUSDT")
