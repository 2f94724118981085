"""How Binance writes what the simulated exchange knows: orders, trades, markets, refusals. No I/O, no decisions."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Final

from backtest_kit.venue.account import ZERO, FuturesAccount, SpotAccount
from backtest_kit.venue.exchange import Exchange
from backtest_kit.venue.orders import Kind, Market, OrderType, Reason, VenueFill, VenueOrder

SPOT_TYPES: Final[dict[str, OrderType]] = {
    "MARKET": "market",
    "LIMIT": "limit",
    "LIMIT_MAKER": "limit",
    "STOP_LOSS": "stop",
    "STOP_LOSS_LIMIT": "stop_limit",
    "TAKE_PROFIT": "take",
    "TAKE_PROFIT_LIMIT": "take_limit",
}
FUTURES_TYPES: Final[dict[str, OrderType]] = {"MARKET": "market", "LIMIT": "limit"}
ALGO_TYPES: Final[dict[str, OrderType]] = {
    "STOP_MARKET": "stop",
    "STOP": "stop_limit",
    "TAKE_PROFIT_MARKET": "take",
    "TAKE_PROFIT": "take_limit",
}
"""Conditional orders of futures, which have endpoints of their own."""

_WORD: Final = {
    "spot": {kind: word for word, kind in SPOT_TYPES.items() if word != "LIMIT_MAKER"},
    "futures": {kind: word for word, kind in {**FUTURES_TYPES, **ALGO_TYPES}.items()},
}
_STATUS: Final = {
    "new": "NEW",
    "partly_filled": "PARTIALLY_FILLED",
    "filled": "FILLED",
    "cancelled": "CANCELED",
    "expired": "EXPIRED",
}
_REFUSALS: Final[dict[Kind, dict[Reason, tuple[int, str]]]] = {
    "spot": {
        "unknown_symbol": (-1121, "Invalid symbol."),
        "price_step": (-1013, "Filter failure: PRICE_FILTER"),
        "quantity_step": (-1013, "Filter failure: LOT_SIZE"),
        "min_notional": (-1013, "Filter failure: NOTIONAL"),
        "max_quantity": (-1013, "Filter failure: LOT_SIZE"),
        "max_market_quantity": (-1013, "Filter failure: MARKET_LOT_SIZE"),
        "max_notional": (-1013, "Filter failure: NOTIONAL"),
        "price_range": (-1013, "Filter failure: PRICE_FILTER"),
        "price_above_band": (-1013, "Filter failure: PERCENT_PRICE_BY_SIDE"),
        "price_below_band": (-1013, "Filter failure: PERCENT_PRICE_BY_SIDE"),
        "max_stops": (-1013, "Filter failure: MAX_NUM_ALGO_ORDERS"),
        "max_orders": (-1013, "Filter failure: MAX_NUM_ORDERS"),
        "no_funds": (-2010, "Account has insufficient balance for requested action."),
        "duplicate_id": (-2010, "Duplicate order sent."),
        "would_trigger": (-2010, "Stop price would trigger immediately."),
        "would_match": (-2010, "Order would immediately match and take."),
        "nothing_to_reduce": (-2010, "Account has insufficient balance for requested action."),
        "unknown_order": (-2011, "Unknown order sent."),
        "not_open": (-2011, "Unknown order sent."),
        "rejected": (-2010, "The order is rejected."),
        "invalid": (-1102, "Mandatory parameter was not sent, was empty/null, or malformed."),
    },
    "futures": {
        "unknown_symbol": (-1121, "Invalid symbol."),
        "price_step": (-4014, "Price not increased by tick size."),
        "quantity_step": (-1111, "Precision is over the maximum defined for this asset."),
        "min_notional": (-4164, "Order's notional must be no smaller than 5.0 (unless you choose reduce only)"),
        "max_quantity": (-4005, "Quantity greater than max quantity."),
        "max_market_quantity": (-4005, "Quantity greater than max quantity."),
        "max_notional": (-4005, "Quantity greater than max quantity."),
        "price_range": (-4002, "Price greater than max price."),
        "price_above_band": (-4016, "Limit price can't be higher than the mark price multiplier cap."),
        "price_below_band": (-4024, "Limit price can't be lower than the mark price multiplier floor."),
        "max_stops": (-4045, "Reach max stop order limit."),
        "max_orders": (-2025, "Reach max open order limit."),
        "no_funds": (-2019, "Margin is insufficient."),
        "duplicate_id": (-4116, "ClientOrderId is duplicated."),
        "would_trigger": (-2021, "Order would immediately trigger."),
        "would_match": (-5022, "The order could not be executed as maker, the Post Only order will be rejected."),
        "nothing_to_reduce": (-2022, "ReduceOnly Order is rejected."),
        "unknown_order": (-2011, "Unknown order sent."),
        "not_open": (-2011, "Unknown order sent."),
        "rejected": (-2010, "The order is rejected."),
        "invalid": (-1102, "Mandatory parameter was not sent, was empty/null, or malformed."),
    },
}
_RATE_LIMITS: Final = [
    {"rateLimitType": "REQUEST_WEIGHT", "interval": "MINUTE", "intervalNum": 1, "limit": 6000},
    {"rateLimitType": "ORDERS", "interval": "SECOND", "intervalNum": 10, "limit": 100},
]


def refusal(kind: Kind, reason: Reason) -> dict[str, Any]:
    code, message = _REFUSALS[kind][reason]
    return {"code": code, "msg": message}


def text(number: Decimal, places: int = 8) -> str:
    """A number as Binance writes it, with all its digits."""
    exponent = number.as_tuple().exponent
    return f"{number:f}" if isinstance(exponent, int) and -exponent > places else f"{number:.{places}f}"


def exchange_info(kind: Kind, markets: dict[str, Market], now_ms: int) -> dict[str, Any]:
    symbols = [_symbol(kind, market) for market in markets.values()]
    return {
        "timezone": "UTC",
        "serverTime": now_ms,
        "rateLimits": _RATE_LIMITS,
        "exchangeFilters": [],
        "assets": [{"asset": asset, "marginAvailable": True} for asset in sorted({m.quote for m in markets.values()})],
        "symbols": symbols,
    }


def _symbol(kind: Kind, market: Market) -> dict[str, Any]:
    limits, lots = market.limits, {"minQty": text(market.lot_size), "stepSize": text(market.lot_size)}
    largest = [limit for limit in (limits.max_market_quantity, limits.max_quantity) if limit is not None]
    # A limit of 0 is none.
    filters: list[dict[str, Any]] = [
        {
            "filterType": "PRICE_FILTER",
            "minPrice": text(limits.min_price or ZERO),
            "maxPrice": text(limits.max_price or ZERO),
            "tickSize": text(market.tick_size),
        },
        {"filterType": "LOT_SIZE", **lots, "maxQty": text(limits.max_quantity or ZERO)},
        {"filterType": "MARKET_LOT_SIZE", **lots, "maxQty": text(min(largest, default=ZERO))},
    ]
    low, high = ((f"{multiple:f}") for multiple in limits.price_band or (ZERO, ZERO))
    common = {
        "symbol": market.symbol,
        "status": "TRADING",
        "baseAsset": market.base,
        "quoteAsset": market.quote,
        "baseAssetPrecision": 8,
        "quotePrecision": 8,
    }
    if kind == "futures":
        filters += [
            {"filterType": "MIN_NOTIONAL", "notional": f"{market.min_notional:f}"},
            *_if(limits.price_band, "PERCENT_PRICE", multiplierDown=low, multiplierUp=high, multiplierDecimal="4"),
            *_if(limits.max_stops, "MAX_NUM_ALGO_ORDERS", limit=limits.max_stops),
            *_if(limits.max_orders, "MAX_NUM_ORDERS", limit=limits.max_orders),
        ]
        return common | {
            "pair": market.symbol,
            "contractType": "PERPETUAL",
            "deliveryDate": 4133404800000,
            "onboardDate": 1569398400000,
            "marginAsset": market.quote,
            "pricePrecision": _places(market.tick_size),
            "quantityPrecision": _places(market.lot_size),
            "underlyingType": "COIN",
            "filters": filters,
            "orderTypes": [*FUTURES_TYPES, *ALGO_TYPES],
            "timeInForce": ["GTC", "IOC", "FOK", "GTX"],
        }
    filters += [
        {
            "filterType": "NOTIONAL",
            "minNotional": text(market.min_notional),
            "applyMinToMarket": True,
            "maxNotional": text(limits.max_notional or ZERO),
            "applyMaxToMarket": False,
            "avgPriceMins": 0,
        },
        *_if(
            limits.price_band,
            "PERCENT_PRICE_BY_SIDE",
            bidMultiplierDown=low,
            bidMultiplierUp=high,
            askMultiplierDown=low,
            askMultiplierUp=high,
            avgPriceMins=0,
        ),
        *_if(limits.max_stops, "MAX_NUM_ALGO_ORDERS", maxNumAlgoOrders=limits.max_stops),
        *_if(limits.max_orders, "MAX_NUM_ORDERS", maxNumOrders=limits.max_orders),
    ]
    return common | {
        "baseCommissionPrecision": 8,
        "quoteCommissionPrecision": 8,
        "orderTypes": list(SPOT_TYPES),
        "icebergAllowed": False,
        "ocoAllowed": False,
        "quoteOrderQtyMarketAllowed": True,
        "isSpotTradingAllowed": True,
        "isMarginTradingAllowed": False,
        "filters": filters,
        "permissions": ["SPOT"],
        "permissionSets": [["SPOT"]],
    }


def _if(there: object, name: str, **fields: Any) -> list[dict[str, Any]]:
    """A filter, where there is such a limit."""
    return [] if there is None else [{"filterType": name, **fields}]


def spot_order(order: VenueOrder, fills: list[VenueFill] | None = None) -> dict[str, Any]:
    word = {
        "symbol": order.symbol,
        "orderId": order.id,
        "orderListId": -1,
        "clientOrderId": order.client_order_id,
        "price": text(order.price or ZERO),
        "origQty": text(order.quantity or ZERO),
        "executedQty": text(order.filled),
        "cummulativeQuoteQty": text(order.filled_cost),
        "origQuoteOrderQty": text(ZERO),
        "status": _STATUS[order.status],
        "timeInForce": "GTC",
        "type": _WORD["spot"].get(order.type, "LIMIT"),
        "side": order.side.upper(),
        "stopPrice": text(order.trigger or ZERO),
        "workingTime": order.created_ms if order.trigger is None or order.triggered else -1,
        "selfTradePreventionMode": "EXPIRE_MAKER",
    }
    if fills is None:
        return word | {
            "time": order.created_ms,
            "updateTime": order.updated_ms,
            "isWorking": order.trigger is None or order.triggered,
        }
    return word | {
        "transactTime": order.updated_ms,
        "fills": [
            {
                "price": text(fill.price),
                "qty": text(fill.quantity),
                "commission": text(fill.fee),
                "commissionAsset": fill.fee_asset,
                "tradeId": fill.id,
            }
            for fill in fills
        ],
    }


def futures_order(order: VenueOrder) -> dict[str, Any]:
    return {
        "symbol": order.symbol,
        "orderId": order.id,
        "clientOrderId": order.client_order_id,
        "price": text(order.price or ZERO),
        "avgPrice": text(order.average_price),
        "origQty": text(order.quantity or ZERO),
        "executedQty": text(order.filled),
        "cumQuote": text(order.filled_cost),
        "status": _STATUS[order.status],
        "timeInForce": "GTC",
        "type": "MARKET" if order.price is None else "LIMIT",
        "origType": _WORD["futures"].get(order.type, "LIMIT"),
        "side": order.side.upper(),
        "positionSide": "BOTH",
        "reduceOnly": order.reduce_only,
        "closePosition": order.protects,
        "stopPrice": text(order.trigger or ZERO),
        "workingType": "CONTRACT_PRICE",
        "priceProtect": False,
        "time": order.created_ms,
        "updateTime": order.updated_ms,
    }


def algo_order(order: VenueOrder) -> dict[str, Any]:
    status = {"filled": "FINISHED", "cancelled": "CANCELED", "expired": "EXPIRED"}.get(
        order.status, "TRIGGERED" if order.triggered else "NEW"
    )
    return {
        "algoId": order.id,
        "clientAlgoId": order.client_order_id,
        "algoType": "CONDITIONAL",
        "orderType": _WORD["futures"].get(order.type, "LIMIT"),
        "symbol": order.symbol,
        "side": order.side.upper(),
        "positionSide": "BOTH",
        "timeInForce": "GTC",
        "quantity": text(order.quantity or ZERO),
        "algoStatus": status,
        "actualOrderId": str(order.id) if order.triggered else "",
        "actualPrice": text(order.average_price),
        "triggerPrice": text(order.trigger or ZERO),
        "price": text(order.price or ZERO),
        "workingType": "CONTRACT_PRICE",
        "priceProtect": False,
        "closePosition": order.protects,
        "reduceOnly": order.reduce_only,
        "createTime": order.created_ms,
        "updateTime": order.updated_ms,
        "triggerTime": order.updated_ms if order.triggered else 0,
        "goodTillDate": 0,
    }


def trade(kind: Kind, fill: VenueFill) -> dict[str, Any]:
    word = {
        "symbol": fill.symbol,
        "id": fill.id,
        "orderId": fill.order_id,
        "price": text(fill.price),
        "qty": text(fill.quantity),
        "quoteQty": text(fill.price * fill.quantity),
        "commission": text(fill.fee),
        "commissionAsset": fill.fee_asset,
        "time": fill.time_ms,
    }
    if kind == "spot":
        return word | {
            "orderListId": -1,
            "isBuyer": fill.side == "buy",
            "isMaker": fill.maker,
            "isBestMatch": True,
        }
    return word | {
        "side": fill.side.upper(),
        "positionSide": "BOTH",
        "buyer": fill.side == "buy",
        "maker": fill.maker,
        "realizedPnl": text(fill.realized),
        "marginAsset": fill.fee_asset,
    }


def spot_account(account: SpotAccount, exchange: Exchange) -> dict[str, Any]:
    assets = sorted(account.free.keys() | account.locked.keys())
    return {
        "makerCommission": int(exchange.terms.maker_fee_pct * 100),
        "takerCommission": int(exchange.terms.taker_fee_pct * 100),
        "canTrade": True,
        "canWithdraw": False,
        "canDeposit": False,
        "updateTime": exchange.now_ms,
        "accountType": "SPOT",
        "balances": [
            {
                "asset": asset,
                "free": text(account.free.get(asset, ZERO)),
                "locked": text(account.locked.get(asset, ZERO)),
            }
            for asset in assets
        ],
        "permissions": ["SPOT"],
    }


def futures_account(account: FuturesAccount, exchange: Exchange) -> dict[str, Any]:
    prices = exchange.prices
    margin = sum((account.margin_used(symbol, prices) for symbol in account.positions), ZERO)
    unrealized = sum((account.unrealized(symbol, prices) for symbol in account.positions), ZERO)
    asset = next(iter(exchange.markets.values())).quote
    totals = {
        "initialMargin": text(margin + account.reserved),
        "maintMargin": text(margin / 10),
        "walletBalance": text(account.wallet),
        "marginBalance": text(account.wallet + unrealized),
        "positionInitialMargin": text(margin),
        "openOrderInitialMargin": text(account.reserved),
        "crossWalletBalance": text(account.wallet),
        "crossUnPnl": text(unrealized),
        "availableBalance": text(max(ZERO, account.available(prices))),
        "maxWithdrawAmount": text(max(ZERO, account.available(prices))),
    }
    return {
        "totalInitialMargin": totals["initialMargin"],
        "totalMaintMargin": totals["maintMargin"],
        "totalWalletBalance": totals["walletBalance"],
        "totalUnrealizedProfit": text(unrealized),
        "totalMarginBalance": totals["marginBalance"],
        "availableBalance": totals["availableBalance"],
        "assets": [{"asset": asset, "unrealizedProfit": text(unrealized), **totals, "updateTime": exchange.now_ms}],
        "positions": positions(account, exchange),
    }


def positions(account: FuturesAccount, exchange: Exchange, symbol: str | None = None) -> list[dict[str, Any]]:
    """Of all symbols that are or were held, or of one."""
    prices = exchange.prices
    return [
        {
            "symbol": name,
            "positionSide": "BOTH",
            "positionAmt": text(held.quantity),
            "entryPrice": text(held.price_open),
            "breakEvenPrice": text(held.price_open),
            "markPrice": text(prices[name]),
            "unRealizedProfit": text(account.unrealized(name, prices)),
            "unrealizedProfit": text(account.unrealized(name, prices)),
            "liquidationPrice": "0",
            "isolatedMargin": "0",
            "isolatedWallet": "0",
            "leverage": str(held.leverage),
            "marginType": "cross",
            "notional": text(held.quantity * prices[name]),
            "marginAsset": exchange.markets[name].quote,
            "initialMargin": text(account.margin_used(name, prices)),
            "positionInitialMargin": text(account.margin_used(name, prices)),
            "openOrderInitialMargin": text(ZERO),
            "maintMargin": text(account.margin_used(name, prices) / 10),
            "updateTime": exchange.now_ms,
        }
        for name, held in account.positions.items()
        if symbol in (None, name)
    ]


def _places(step: Decimal) -> int:
    exponent = step.normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0
