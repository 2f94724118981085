"""What goes wrong in the user's code: the run goes on."""

from __future__ import annotations

import asyncio
import logging

import pytest
from tests.live.rig import START, WHERE, Rig, UntilClock

import backtest_kit as bk
from backtest_kit.model.interval import MINUTE_MS


async def test_an_error_of_the_strategy_is_told_and_the_next_slot_goes_on(
    memory_rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def get_signal(ctx: bk.Context) -> bk.Signal | None:
        asked.append((ctx.when_ms - START) // MINUTE_MS)
        if len(asked) < 3:
            raise ZeroDivisionError("oops")
        return None if len(asked) > 3 else bk.Signal("long", ctx.price * 2, ctx.price * 3)

    memory_rig.strategy = {"get_signal": get_signal, "interval": "5m"}
    with caplog.at_level(logging.ERROR):
        await memory_rig.trade(16)
    assert asked == [0, 5, 10, 15]
    failed = memory_rig.of(bk.StrategyFailed)
    assert [type(event.error) for event in failed] == [ZeroDivisionError, ZeroDivisionError, bk.UserError]
    assert {event.what for event in failed} == {"get_signal"}
    assert "ZeroDivisionError: oops" in caplog.text


async def test_handlers_that_fail_stop_nobody_else(memory_rig: Rig) -> None:
    heard: list[bk.Event] = []

    def broken(event: bk.Event) -> None:
        raise RuntimeError("broken handler")

    clock = UntilClock(START, START + 3 * MINUTE_MS)
    kit = memory_rig.kit(clock)
    kit.on(bk.Event, broken)
    kit.on(bk.PositionOpened, heard.append)
    handle = kit.live.background("BTCUSDT", **WHERE)
    await clock.over.wait()
    handle.cancel()
    await asyncio.wait({handle.task})
    assert heard
    assert [event for event in memory_rig.of(bk.StrategyFailed) if "broken" in event.what]
    assert isinstance(handle.status.position, bk.Position)
