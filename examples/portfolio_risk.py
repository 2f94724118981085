"""A risk profile that all symbols share, and positions sized by the distance of their stop.

backtest-kit backtest examples/portfolio_risk.py --symbol BTCUSDT,ETHUSDT,SOLUSDT,ADAUSDT,XRPUSDT
"""

import backtest_kit as bk

BALANCE = 10_000

bk.add_exchange_schema("synthetic", source=bk.sources.synthetic(seed=7))
bk.add_frame_schema("june-2024", start_date="2024-06-01", end_date="2024-07-01")


def at_most_two(request: bk.RiskRequest) -> str | None:
    """The positions of every strategy and symbol that shares the profile, in the time of the replay."""
    return "two positions are open" if len(request.positions) >= 2 else None


def worth_the_risk(request: bk.RiskRequest) -> str | None:
    signal = request.signal
    reward, risk = abs(signal.price_take_profit - request.price_open), abs(request.price_open - signal.price_stop_loss)
    return None if reward >= 1.5 * risk else f"reward over risk is {reward / risk:.2f}"


async def get_signal(ctx: bk.Context) -> bk.Signal | None:
    """Risk 1 % of the balance on the distance to a stop of two average true ranges."""
    candles = await ctx.candles("1h", 48)
    if candles.close[-1] < candles.close.mean():
        return None
    distance = 2 * bk.sizing.atr(candles, period=14)
    return bk.Signal(
        position="long",
        price_take_profit=ctx.price + 2 * distance,
        price_stop_loss=ctx.price - distance,
        cost=bk.sizing.fixed_percentage(
            balance=BALANCE,
            price_open=ctx.price,
            price_stop_loss=ctx.price - distance,
            risk_pct=1,
            max_position_pct=50,
        ),
    )


bk.add_risk_schema("portfolio", validations=[at_most_two, worth_the_risk])
bk.add_strategy_schema("sized", interval="1h", get_signal=get_signal, risk_name="portfolio")
