"""A run that is cancelled at any moment leaves a state from which the next one ends where it would have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.live.rig import WHERE, Rig, UntilClock, Venue
from tests.live.scenario import KINDS, MINUTES, facts, prepared, without_orders
from tests.samples import sample

import backtest_kit as bk
from backtest_kit.persist.store import Store

MINUTE_MS = 60_000
SAMPLE = 15
"""Turns of the loop at which `make test` cancels a run, of some hundred."""


class SlowVenue(Venue):
    """Lets others run before it has an order, and after it has carried it out: both answers can be lost."""

    async def _do(self, hook: str, order: bk.Order) -> bk.Fill:
        await asyncio.sleep(0)
        fill = await super()._do(hook, order)
        await asyncio.sleep(0)
        return fill


class Records:
    """What the records of a program would have: each event once, whoever was killed when."""

    def __init__(self) -> None:
        self.events: list[bk.Event] = []

    async def __call__(self, events: Sequence[bk.Event]) -> None:
        await asyncio.sleep(0)
        self.events += events


def slow_rig(tmp_path: Path, store: Store) -> tuple[Rig, Records]:
    rig = prepared(Rig(tmp_path, store))
    rig.venue = SlowVenue()
    return rig, Records()


async def part(rig: Rig, records: Records, steps: int | None) -> bool:
    """Run on from where it was left, and cancel after so many turns of the loop; whether it came to the end."""
    end_ms = rig.begin_ms + MINUTES * MINUTE_MS
    clock = UntilClock(rig.now_ms, end_ms)
    kit = rig.kit(clock)
    kit.live.observers.append(records)
    handle = kit.live.background("BTCUSDT", **WHERE)
    turns = 0
    while not clock.over.is_set() and not handle.done() and (steps is None or turns < steps):
        await asyncio.sleep(0)
        turns += handle._run.began.is_set()  # how long threads take before that is different each time
    over = clock.over.is_set()
    rig.now_ms = clock.now_ms()
    handle.cancel()
    await asyncio.wait({handle.task})
    assert handle.task.cancelled() or handle.task.exception() is None, handle.task.exception()
    rig.turns = turns
    return over


async def whole(tmp_path: Path) -> tuple[dict[Any, Any], int]:
    rig, records = slow_rig(tmp_path / "whole", bk.MemoryStore())
    assert await part(rig, records, None)
    assert {hook for hook, *_ in rig.venue.calls} == {*KINDS}
    assert facts(rig.events) == facts(records.events)
    return facts(records.events), rig.turns


async def many(ctx: bk.Context) -> None:
    """Six commands in the third minute: the market refuses one, the venue another."""
    position = ctx.position
    if position is not None and ctx.when_ms == position.value.opened_at_ms + 2 * MINUTE_MS:
        await position.reduce(percent=50)
        await position.move_stop(ctx.price * 1.01)
        await position.move_stop(ctx.price * 0.995)
        await position.reduce(percent=20)
        await position.reduce(percent=10)
        await position.add(30)
        await position.close("enough")


@pytest.mark.sampled
async def test_of_several_commands_in_one_minute_none_is_lost_and_none_is_given_twice(tmp_path: Path) -> None:
    async def played(steps: int | None) -> tuple[list[bk.Trade], list[Any], Venue, int]:
        rig, records = slow_rig(tmp_path / "part", bk.MemoryStore())
        rig.strategy["manage"] = many
        rig.venue.script["reduce", 2] = "rejected"
        over = await part(rig, records, steps)
        turns = rig.turns
        while not over:
            over = await part(rig, records, None)
        trades = {event.when_ms: event.trade for event in records.events if isinstance(event, bk.PositionClosed)}
        # An order that is given again after an interruption may have another number than it would have had.
        told = [without_orders(msgspec.to_builtins(trade)) for trade in trades.values()]
        return list(trades.values()), told, rig.venue, turns

    (trade, *_), expected, _, turns = await played(None)
    assert ([each.percent for each in trade.reductions], len(trade.entries)) == ([50, 10], 2)
    assert trade.close_note == "enough"
    assert trade.price_stop_loss == pytest.approx(trade.price_close * 0.995, rel=0.002)
    for steps in sample(range(turns), SAMPLE, "cancelled among commands"):
        _, told, venue, _ = await played(steps)
        assert told == expected, steps
        assert set(venue.times_done.values()) == {1}, steps


@pytest.mark.sampled
async def test_cancelled_at_any_turn_of_the_loop(tmp_path: Path) -> None:
    expected, turns = await whole(tmp_path)
    assert turns > 250
    for steps in sample(range(turns), SAMPLE, "cancelled at any turn"):
        rig, records = slow_rig(tmp_path / "part", bk.MemoryStore())
        over = await part(rig, records, steps)
        while not over:
            over = await part(rig, records, None)
        assert facts(records.events) == expected, steps
        assert set(rig.venue.times_done.values()) == {1}, steps
        assert not rig.of(bk.StrategyFailed, bk.StoreDegraded), steps


async def test_cancelled_every_few_turns(tmp_path: Path, store: Store) -> None:
    expected, _ = await whole(tmp_path)
    rig, records = slow_rig(tmp_path / "part", store)
    steps = 30
    while not await part(rig, records, steps):
        steps = steps + 19 if steps < 400 else 30
    assert facts(records.events) == expected
    assert set(rig.venue.times_done.values()) == {1}
