"""A kit of its own for each test, on the built-in market."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import backtest_kit as bk


async def always_long(ctx: bk.Context) -> bk.Signal | None:
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=1, stop_loss_pct=1, minutes=600)


@pytest.fixture
def make_kit(tmp_path: Path) -> Callable[..., bk.Kit]:
    def make(get_signal: object = always_long, *, interval: str = "15m", seed: int = 7, **strategy: object) -> bk.Kit:
        kit = bk.Kit(tmp_path / "dump")
        kit.add_exchange_schema("demo", source=bk.sources.synthetic(seed=seed))
        kit.add_frame_schema("day", start_date="2024-06-01", end_date="2024-06-02")
        kit.add_frame_schema("week", start_date="2024-06-01", end_date="2024-06-08")
        kit.add_strategy_schema("trend", interval=interval, get_signal=get_signal, **strategy)  # type: ignore[arg-type]
        return kit

    return make
