"""Binance's market data: what everybody may ask."""

from __future__ import annotations

import math
from typing import Any

from backtest_kit.model.interval import DAY_MS, INTERVAL_MS, MINUTE_MS, floor_ms
from backtest_kit.venue.binance import words as words
from backtest_kit.venue.binance.call import ApiError, Call
from backtest_kit.venue.publishing import Row


async def ping(call: Call) -> Any:
    return {}


async def time(call: Call) -> Any:
    return {"serverTime": call.venue.clock.now_ms()}


async def exchange_info(call: Call) -> Any:
    return words.exchange_info(call.kind, call.exchange.markets, call.venue.clock.now_ms())


async def no_markets(call: Call) -> Any:
    return {"timezone": "UTC", "serverTime": call.venue.clock.now_ms(), "symbols": []}


async def no_pairs(call: Call) -> Any:
    return []


async def currencies(call: Call) -> Any:
    assets = sorted({asset for market in call.exchange.markets.values() for asset in (market.base, market.quote)})
    return [{"coin": asset, "name": asset, "trading": True, "networkList": []} for asset in assets]


async def klines(call: Call) -> Any:
    symbol, interval = call.symbol(), call.need("interval")
    if interval not in INTERVAL_MS:
        raise ApiError(-1120, "Invalid interval.")
    step_ms, now_ms = INTERVAL_MS[interval], call.venue.clock.now_ms()
    limit = min(call.whole("limit") or 500, 1000 if call.kind == "spot" else 1500)
    start_ms, last_ms = call.whole("startTime"), call.whole("endTime")
    stop_ms = min(now_ms, last_ms if last_ms is not None else now_ms) + 1
    if start_ms is None:
        start_ms = floor_ms(stop_ms - 1, step_ms) - (limit - 1) * step_ms
    first_ms = floor_ms(start_ms + step_ms - 1, step_ms)
    stop_ms = min(stop_ms, first_ms + limit * step_ms)
    rows = [_kline(step_ms, row) for row in await call.venue.rows(symbol, interval, first_ms, stop_ms)]
    current_ms = floor_ms(now_ms, step_ms)
    if first_ms <= current_ms < stop_ms and len(rows) < limit:
        # The candle that is still open shows the price of now and nothing of what comes.
        async with call.venue.at_now():
            price = float(call.exchange.prices[symbol])
        rows.append(_kline(step_ms, [current_ms, price, price, price, price, 0.0]))
    return rows


def _kline(step_ms: int, row: Row) -> list[Any]:
    open_ms, volume, close = int(row[0] or 0), row[5] or 0.0, row[4] or 0.0
    prices = [None if each is None or math.isnan(each) else repr(each) for each in row[1:]]
    turnover = repr(volume * close)
    return [open_ms, *prices, open_ms + step_ms - 1, turnover, 100, repr(volume / 2), repr(volume * close / 2), "0"]


async def price(call: Call) -> Any:
    async with call.venue.at_now():
        prices = {symbol: words.text(price) for symbol, price in call.exchange.prices.items()}
    if "symbol" in call.params:
        return {"symbol": call.symbol(), "price": prices[call.symbol()], "time": call.exchange.now_ms}
    return [{"symbol": symbol, "price": price} for symbol, price in prices.items()]


async def book(call: Call) -> Any:
    """Bid and ask are the price: slippage is charged where orders are filled."""
    symbol = call.symbol()
    async with call.venue.at_now() as now_ms:
        price = words.text(call.exchange.prices[symbol])
    return {
        "symbol": symbol,
        "bidPrice": price,
        "bidQty": "1000.0",
        "askPrice": price,
        "askQty": "1000.0",
        "time": now_ms,
    }


async def day(call: Call) -> Any:
    symbol = call.symbol()
    async with call.venue.at_now() as now_ms:
        price = call.exchange.prices[symbol]
    stop_ms = floor_ms(now_ms, MINUTE_MS)
    candles = await call.venue.candles(symbol, "1m", stop_ms - DAY_MS, stop_ms)
    first = float(candles.open[0]) if len(candles) else float(price)
    volume = float(candles.volume.sum())
    turnover = float((candles.volume * candles.close).sum())
    return {
        "symbol": symbol,
        "priceChange": repr(float(price) - first),
        "priceChangePercent": f"{(float(price) / first - 1) * 100:.3f}",
        "weightedAvgPrice": repr(turnover / volume if volume else float(price)),
        "lastPrice": words.text(price),
        "bidPrice": words.text(price),
        "askPrice": words.text(price),
        "openPrice": repr(first),
        "highPrice": repr(float(candles.high.max()) if len(candles) else float(price)),
        "lowPrice": repr(float(candles.low.min()) if len(candles) else float(price)),
        "volume": repr(volume),
        "quoteVolume": repr(turnover),
        "openTime": stop_ms - DAY_MS,
        "closeTime": now_ms,
        "count": len(candles),
    }
