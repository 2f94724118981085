"""Twenty minutes in which every kind of order is sent once or more, on a price that rises."""

from __future__ import annotations

from typing import Any

import msgspec
from tests.live.rig import START, Rig

import backtest_kit as bk
from backtest_kit.model.interval import MINUTE_MS

MINUTES = 22
LASTING = (bk.EntryScheduled, bk.EntryCancelled, bk.PositionOpened, bk.PositionClosed, bk.PositionChanged)
KINDS = ("open", "place", "activate", "cancel", "add", "reduce", "close", "move_stop", "move_take")
SETTINGS = {
    "CC_PERCENT_FEE": 0,
    "CC_PERCENT_SLIPPAGE": 0,
    "CC_BREAKEVEN_THRESHOLD": 0,
    "CC_ENABLE_DCA_EVERYWHERE": True,
}


def price_at(when_ms: int) -> float:
    return 100 * (1 + 0.001 * (when_ms - START) / MINUTE_MS)


async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> list[list[float]]:
    times = [since_ms + i * MINUTE_MS for i in range(limit)]
    return [[each, *[price_at(each)] * 4, 1.0] for each in times]


async def get_signal(ctx: bk.Context) -> bk.Signal | None:
    minute = (ctx.when_ms - START) // MINUTE_MS
    if minute == 1:
        return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=10, stop_loss_pct=10)
    if minute in (10, 16):
        limit = ctx.price * 0.99
        return bk.Signal("long", limit * 1.1, limit * 0.9, price_open=limit)
    return None


async def manage(ctx: bk.Context) -> None:
    minute, position, entry = (ctx.when_ms - START) // MINUTE_MS, ctx.position, ctx.entry
    if position is not None:
        commands: dict[int, Any] = {
            2: lambda: position.reduce(percent=50),
            3: lambda: position.add(30),
            4: lambda: position.move_take(ctx.price * 1.05),
            5: lambda: position.breakeven(),
            6: lambda: position.move_stop(ctx.price * 0.999),
            7: lambda: position.close("enough"),
            13: lambda: position.close(),
        }
        if minute in commands:
            await commands[minute]()
    elif entry is not None:
        if minute == 11:
            await entry.activate()
        if minute == 18:
            await entry.cancel()


def prepared(rig: Rig) -> Rig:
    rig.source = bk.sources.function(get_candles)
    rig.settings = {**SETTINGS, **rig.settings}
    rig.strategy = {"get_signal": get_signal, "manage": manage, "interval": "1m"}
    return rig


def without(left_out: str, value: Any) -> Any:
    """Plain fields without those of one name, however deep."""
    if isinstance(value, dict):
        return {name: without(left_out, item) for name, item in value.items() if name != left_out}
    return [without(left_out, item) for item in value] if isinstance(value, list | tuple) else value


def without_orders(value: Any) -> Any:
    """Plain fields without what only an exchange says of orders: their ids and fees."""
    return without("execution", value)


def facts(events: list[bk.Event]) -> dict[Any, Any]:
    """What has happened for good, by what it is: told twice, it is still once."""
    found = {}
    for event in events:
        if isinstance(event, LASTING):
            fields = without_orders(msgspec.to_builtins(event))
            found[event.action, event.when_ms, event.entry.signal_id] = fields
    return found
