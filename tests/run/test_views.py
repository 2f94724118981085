"""What `manage` sees of a position and of a resting entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import backtest_kit as bk

MakeKit = Callable[..., bk.Kit]
WHERE: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "demo", "frame_name": "week"}


def wide(ctx: bk.Context) -> bk.Signal:
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=15, stop_loss_pct=15, minutes=600)


def test_a_view_tells_what_the_frozen_position_says(make_kit: MakeKit) -> None:
    seen: list[str] = []

    async def manage(ctx: bk.Context) -> None:
        view = ctx.position
        assert view is not None
        value = view.value
        assert (view.signal_id, view.side) == (value.signal_id, "long")
        assert (view.take_profit, view.stop_loss) == (value.take_profit, value.stop_loss)
        assert (view.entries, view.reductions, view.cost) == (value.entries, value.reductions, value.cost)
        assert (view.peak, view.fall) == (value.peak, value.fall)
        assert view.stop_loss < view.price_open < view.take_profit
        assert view.pnl_cost == pytest.approx(view.cost * view.pnl_pct / 100)
        assert view.opened_at <= ctx.when
        assert (ctx.when - view.opened_at).total_seconds() // 60 == view.minutes_open
        if view.minutes_open == 5:
            await view.reduce(percent=25)
            assert view.closed_pct == pytest.approx(25)
            assert len(view.reductions) == 1
            assert view.remaining_cost == pytest.approx(0.75 * view.cost)
        seen.append(repr(view))

    make_kit(wide, manage=manage).backtest.run_sync("BTCUSDT", **WHERE)
    assert seen
    assert all(text.startswith("PositionView(long BTCUSDT from ") for text in seen)
    assert len(set(seen)) > 1
