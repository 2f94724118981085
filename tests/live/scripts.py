"""What the bots of the crash tests trade."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from tests.engine import test_against_reference as engine

import backtest_kit as bk
from backtest_kit.model.interval import MINUTE_MS, to_ms

START: Final = to_ms("2024-06-01T10:00")
STORY_MINUTES: Final = 47


class Script(Protocol):
    interval: str

    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def get_signal(self) -> Callable[[bk.Context], Awaitable[bk.Signal | None]]: ...
    async def manage(self, ctx: bk.Context) -> None: ...


def story_price(minute: int) -> float:
    """It rises for twelve minutes, falls for twenty-eight, and rises again."""
    if minute < 12:
        return 100 * (1 + 0.001 * minute)
    if minute < 40:
        return 100 * (1.012 - 0.001 * (minute - 12))
    return 100 * (0.984 + 0.001 * (minute - 40))


class Story:
    """Two lives with every command, one entry that is filled and stopped out, two that are cancelled, one that opens.

    Every kind of order is sent twice or more, one a minute.
    """

    interval = "1m"
    settings: Final[dict[str, Any]] = {
        "CC_PERCENT_FEE": 0,
        "CC_BREAKEVEN_THRESHOLD": 0,
        "CC_ENABLE_DCA_EVERYWHERE": True,
        "CC_AVG_PRICE_CANDLES_COUNT": 1,
        "CC_GET_CANDLES_RETRY_COUNT": 1,
    }

    def __init__(self, seed: int) -> None:
        pass

    async def get_signal(self, ctx: bk.Context) -> bk.Signal | None:
        price = ctx.price
        match minute_of(ctx):
            case 1 | 43:
                return bk.Signal.bracket("long", price=price, take_profit_pct=10, stop_loss_pct=10)
            case 10:
                return resting("short", price * 1.0015, 10)
            case 24 | 28:
                return resting("long", price * 0.95, 10)
            case 33:
                return resting("long", price * 0.9985, 0.6)
        return None

    async def manage(self, ctx: bk.Context) -> None:
        minute, position, entry = minute_of(ctx), ctx.position, ctx.entry
        if position is not None:
            long = position.side == "long"
            sign = 1 if long else -1
            commands: dict[int, Callable[[], Any]] = {
                2: lambda: position.reduce(percent=50),
                3: lambda: position.add(30),
                4: lambda: position.move_take(ctx.price * (1 + sign * 0.05)),
                5: lambda: position.breakeven(),
                6: lambda: position.move_stop(ctx.price * (1 - sign * 0.0015)),
                7: lambda: position.close("enough"),
            }
            first = 0 if long else 13
            if minute - first in commands:
                await commands[minute - first]()
            if minute == 44:
                await position.close()
        elif entry is not None and minute in (26, 30):
            await entry.cancel()


class Always:
    """Long at once, and for long."""

    interval = "1m"
    settings: Final[dict[str, Any]] = {"CC_GET_CANDLES_RETRY_COUNT": 1}

    def __init__(self, seed: int) -> None:
        pass

    async def get_signal(self, ctx: bk.Context) -> bk.Signal | None:
        return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=10, stop_loss_pct=10, minutes=1000)

    async def manage(self, ctx: bk.Context) -> None:
        pass


class Random:
    """A random strategy of the engine's tests, with up to four commands a minute: the same at every call."""

    settings: Final[dict[str, Any]] = {"CC_MAX_SIGNAL_LIFETIME_MINUTES": math.inf, "CC_GET_CANDLES_RETRY_COUNT": 1}

    def __init__(self, seed: int) -> None:
        strategy = engine.RandomStrategy(seed)
        strategy.named = False
        self.interval: str = strategy.interval
        self.get_signal = strategy.get_signal
        self._commands = engine.RandomCommands(seed)

    async def manage(self, ctx: bk.Context) -> None:
        for name, value, note in self._script(ctx):
            if name == "reduce" and 99 < value < 100:
                continue  # it leaves less than any venue counts
            view: Any = ctx.position or ctx.entry
            arguments = {"percent": value} if name == "reduce" else {"note": note} if note else {}
            await getattr(view, name)(*([value] if name in ("add", "move_stop", "move_take") else []), **arguments)

    def _script(self, ctx: bk.Context) -> list[Any]:
        held: Any = (ctx.position or ctx.entry).value  # type: ignore[union-attr]
        # The levels of the signal: those in force are others once one of the commands was carried out.
        return self._commands.script(
            ctx.when_ms, ctx.price, ctx.position is not None, held.price_take_profit, held.price_stop_loss
        )


def resting(side: Any, price: float, distance_pct: float) -> bk.Signal:
    sign = 1 if side == "long" else -1
    return bk.Signal(side, price * (1 + sign * 0.1), price * (1 - sign * distance_pct / 100), price_open=price)


def minute_of(ctx: bk.Context) -> int:
    return (ctx.when_ms - START) // MINUTE_MS


SCRIPTS: Final[dict[str, Callable[[int], Script]]] = {"story": Story, "always": Always, "random": Random}
