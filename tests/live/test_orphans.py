"""What the venue holds and nobody watches, and the other way round."""

from __future__ import annotations

from typing import Any

import pytest
from tests.live.rig import Rig

import backtest_kit as bk


def held(stop_loss: float | None, direction: Any = "long") -> bk.Holding:
    return bk.Holding(symbol="BTCUSDT", direction=direction, quantity=0.5, price_open=41_000.0, stop_loss=stop_loss)


@pytest.fixture
def idle(memory_rig: Rig) -> Rig:
    memory_rig.strategy["get_signal"] = lambda ctx: None
    return memory_rig


async def test_a_position_that_nobody_watches_is_an_alarm_and_told_once(idle: Rig) -> None:
    idle.venue.held = [held(None)]
    await idle.trade(4)
    (found,) = idle.of(bk.OrphanFound)
    assert (found.what, found.quantity, found.next_step) == (
        "foreign_position",
        0.5,
        "nothing is done, look at the venue",
    )
    assert not idle.venue.calls


@pytest.mark.parametrize("direction", ["long", "short"])
@pytest.mark.parametrize("stop", [None, 40_000.0])
async def test_a_position_that_nobody_watches_is_adopted(idle: Rig, stop: float | None, direction: str) -> None:
    if direction == "short" and stop is not None:
        stop = 42_000.0
    idle.venue.held = [held(stop, direction)]
    status = (await idle.trade(0, orphans="adopt")).status
    assert status.position is not None
    sign = 1 if direction == "long" else -1
    assert status.position.stop_loss == (stop or 41_000 * (1 - sign * 0.2))
    assert status.position.take_profit == pytest.approx(82_000 - status.position.stop_loss)
    assert status.position.cost == pytest.approx(0.5 * 41_000)
    assert [call[0] for call in idle.venue.calls] == ([] if stop else ["move_stop"])
    assert [type(event) for event in idle.of(bk.OrphanFound, bk.PositionOpened)] == [bk.OrphanFound, bk.PositionOpened]
    idle.venue.held = [held(status.position.stop_loss, direction)]
    after = (await idle.trade(2, orphans="adopt")).status.position
    assert after is not None
    assert after.signal_id == status.position.signal_id


async def test_a_position_that_nobody_watches_is_protected(idle: Rig) -> None:
    idle.venue.held = [held(None)]
    status = (await idle.trade(2, orphans="protect")).status
    assert status.position is None
    assert [call[0] for call in idle.venue.calls] == ["move_stop"]
    assert "32800" in idle.of(bk.OrphanFound)[0].next_step


async def test_a_position_of_ours_that_the_venue_does_not_hold_is_an_alarm(memory_rig: Rig) -> None:
    memory_rig.venue.held = []
    await memory_rig.trade(3)
    assert [event.what for event in memory_rig.of(bk.OrphanFound)] == ["missing_position"]


async def test_a_position_of_ours_without_a_stop_gets_one(memory_rig: Rig) -> None:
    memory_rig.venue.held = [held(None)]
    memory_rig.strategy["get_signal"] = lambda ctx: bk.Signal.bracket(
        "long", price=ctx.price, take_profit_pct=9, stop_loss_pct=9
    )
    status = (await memory_rig.trade(2, orphans="protect")).status
    found = memory_rig.of(bk.OrphanFound)
    assert found[-1].what in ("unprotected_position", "foreign_position")
    assert memory_rig.venue.sent("move_stop")
    assert status.position is not None
