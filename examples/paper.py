"""Trade on paper: buy the fall below the mean of the last hour, sell its end.

Candles come from Binance by ccxt. Without a network, trade on a simulated exchange: `backtest-kit venue --speed 60`
in one terminal, and in another

    backtest-kit paper examples/paper.py --symbol BTCUSDT,ETHUSDT --venue http://127.0.0.1:8899
"""

import backtest_kit as bk

bk.add_exchange_schema("binance", source=bk.sources.ccxt("binance"))


async def get_signal(ctx: bk.Context) -> bk.Signal | None:
    """RiskGate every five minutes while nothing is held."""
    close = (await ctx.candles("1m", 60)).close
    side = "long" if close[-1] < close.mean() else "short"
    return bk.Signal.bracket(side, price=ctx.price, take_profit_pct=1, stop_loss_pct=0.7, minutes=90)


bk.add_strategy_schema("reversion", interval="5m", get_signal=get_signal)
