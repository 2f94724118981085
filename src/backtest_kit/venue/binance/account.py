"""Binance's accounts: balances, positions and their settings."""

from __future__ import annotations

from typing import Any

from backtest_kit.venue.account import FuturesAccount, SpotAccount
from backtest_kit.venue.binance import words as words
from backtest_kit.venue.binance.call import ApiError, Call
from backtest_kit.venue.journal import SetLeverage
from backtest_kit.venue.orders import Refused


async def account(call: Call) -> Any:
    async with call.venue.at_now():
        account = call.exchange.account(call.account)
        if isinstance(account, SpotAccount):
            return words.spot_account(account, call.exchange)
        return words.futures_account(account, call.exchange)


async def balance(call: Call) -> Any:
    async with call.venue.at_now():
        assets: list[dict[str, Any]] = words.futures_account(_futures(call), call.exchange)["assets"]
    return [asset | {"balance": asset["walletBalance"]} for asset in assets]


async def position_risk(call: Call) -> Any:
    async with call.venue.at_now():
        return words.positions(_futures(call), call.exchange, call.params.get("symbol"))


async def leverage(call: Call) -> Any:
    symbol, leverage = call.symbol(), call.whole("leverage") or 0
    async with call.venue.at_now():
        try:
            call.venue.do(call.kind, call.account, SetLeverage(symbol, leverage))
        except Refused:
            raise ApiError(-4028, f"Leverage {leverage} is not valid") from None
    return {"symbol": symbol, "leverage": leverage, "maxNotionalValue": "1000000000"}


async def leverage_brackets(call: Call) -> Any:
    bracket = {
        "bracket": 1,
        "initialLeverage": 125,
        "notionalCap": 1_000_000_000,
        "notionalFloor": 0,
        "maintMarginRatio": 0.004,
        "cum": 0.0,
    }
    symbols = [call.symbol()] if "symbol" in call.params else list(call.exchange.markets)
    return [{"symbol": symbol, "brackets": [bracket]} for symbol in symbols]


async def margin_type(call: Call) -> Any:
    call.symbol()
    if call.need("marginType") != "CROSSED":
        raise ApiError(-4047, "Margin type cannot be changed: this venue has cross margin only.")
    raise ApiError(-4046, "No need to change margin type.")


async def position_mode(call: Call) -> Any:
    return {"dualSidePosition": False}


async def set_position_mode(call: Call) -> Any:
    if call.need("dualSidePosition").lower() == "true":
        raise ApiError(-4067, "Position side cannot be changed: this venue has one-way positions only.")
    raise ApiError(-4059, "No need to change position side.")


def _futures(call: Call) -> FuturesAccount:
    account = call.exchange.account(call.account)
    assert isinstance(account, FuturesAccount)  # noqa: S101  # only futures routes come here
    return account
