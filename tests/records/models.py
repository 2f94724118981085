"""What costs money to ask: it counts how often it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import backtest_kit as bk
from backtest_kit.records.measure import Cached

Ask = Callable[..., Cached[Any]]


class Model:
    """Something that costs money, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def cached_by(self, kit: bk.Kit, interval: str | None = "15m", **options: Any) -> Cached[Any]:
        @kit.records.measure.cached(interval, **({"name": "ask", "version": "1"} | options))
        async def ask(ctx: Any, prompt: str = "hello") -> Any:
            self.asked.append(prompt)
            await asyncio.sleep(0)
            return {"answer": prompt.upper(), "number": len(self.asked), "pair": (1, 2)}

        return ask
