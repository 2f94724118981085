"""A strategy that asks a model: answers are paid for once, and its reasoning is at hand while the position is open.

backtest-kit backtest examples/reasoning.py --symbol BTCUSDT,ETHUSDT

A second run of the same command asks the model nothing.
"""

import backtest_kit as bk

bk.add_exchange_schema("synthetic", source=bk.sources.synthetic(seed=7))
bk.add_frame_schema("june-2024", start_date="2024-06-01", end_date="2024-07-01")


@bk.measure.cached("4h")
async def ask_model(ctx: bk.Context, question: str) -> dict[str, str]:
    """Put a chat API here. This one looks at the chart, which costs nothing and needs no key."""
    close = (await ctx.candles("1h", 48)).close
    bullish = close[-1] > close.mean()
    return {"answer": "long" if bullish else "wait", "why": f"{question}: {close[-1]:.0f} against {close.mean():.0f}"}


@bk.interval.once("1d")
async def review(ctx: bk.Context) -> None:
    """Once a day, whatever happens: a lesson that outlives the position."""
    close = (await ctx.candles("1d", 3)).close
    await ctx.memory("lessons", shared=True).write(f"{ctx.when:%d %b}", f"three days moved {close[-1] / close[0]:.3f}")


async def get_signal(ctx: bk.Context) -> bk.Signal | None:
    await review(ctx)
    opinion = await ask_model(ctx, "up or down?")
    if opinion["answer"] != "long":
        return None
    await ctx.memory("analysis").write("thesis", opinion["why"], role="assistant")
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=4, stop_loss_pct=2, minutes=24 * 60)


async def manage(ctx: bk.Context) -> None:
    """Every four hours: what was thought at the entry, and whether it still holds."""
    if ctx.position is None or ctx.position.minutes_open % 240:
        return
    memory = ctx.memory("analysis")
    thesis = await memory.read("thesis")
    opinion = await ask_model(ctx, "up or down?")
    await memory.write(f"after {ctx.position.minutes_open} minutes", opinion["why"], role="assistant")
    if opinion["answer"] == "wait" and thesis is not None and ctx.position.pnl_pct > 0:
        await ctx.position.close(f"no longer holds: {thesis}")


bk.add_strategy_schema("reasoning", interval="1h", get_signal=get_signal, manage=manage)
