"""Listen to a run: milestones of each position, a daily job on the time of the replay, what risk refused.

backtest-kit backtest examples/events.py --symbol BTCUSDT,ETHUSDT
"""

import backtest_kit as bk

bk.add_exchange_schema("synthetic", source=bk.sources.synthetic(seed=7))
bk.add_frame_schema("first-week", start_date="2024-06-01", end_date="2024-06-08")


async def get_signal(ctx: bk.Context) -> bk.Signal | None:
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=4, stop_loss_pct=3)


def weekdays_only(request: bk.RiskRequest) -> str | None:
    return "weekend" if request.when.weekday() >= 5 else None


def milestone(event: bk.LevelReached) -> None:
    if event.level % 50 == 0:
        print(f"{event.when:%m-%d %H:%M} {event.symbol} {event.level} % of the way to its {event.side} level")


async def lock_in(event: bk.BreakevenReached, ctx: bk.Context) -> None:
    """A handler that takes the context may give commands; they take effect before the run goes on."""
    if ctx.position is not None:
        await ctx.position.breakeven()


def new_day(tick: bk.CronTick) -> None:
    print(f"-- {tick.when:%A %d %B}")


bk.add_risk_schema("weekdays", validations=[weekdays_only])
bk.add_strategy_schema("listened", interval="1h", get_signal=get_signal, risk_name="weekdays")
bk.on(bk.LevelReached, milestone)
bk.on(bk.BreakevenReached, lock_in)
bk.on(bk.RiskRejected, lambda event: print(f"refused: {event.reason}"), once=True)
bk.cron("daily", interval="1d", handler=new_day)
