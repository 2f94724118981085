"""Members of a lockstep act in the order of their virtual time, whatever the event loop does."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings, strategies as st

from backtest_kit.run.lockstep import Lockstep


@settings(max_examples=60, deadline=None)
@given(plans=st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_all_acts_are_in_order_of_time_then_of_joining(plans: list[list[int]], seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311
    acts: list[tuple[int, int]] = []

    async def member(lockstep: Lockstep, number: int, plan: list[int]) -> None:
        when = 0
        for gap in plan:
            when += gap
            await lockstep.turn(number, when)
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            acts.append((when, number))
        lockstep.leave(number)

    async def main() -> None:
        lockstep = Lockstep()
        joined = [(lockstep.join(0), plan) for plan in plans]
        tasks = [asyncio.create_task(member(lockstep, number, plan)) for number, plan in joined]
        rng.shuffle(tasks)
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert len(lockstep) == 0

    asyncio.run(main())
    assert acts == sorted(acts)
    assert len(acts) == sum(map(len, plans))


async def test_a_member_that_is_cancelled_holds_nobody_up() -> None:
    lockstep = Lockstep()
    first, second, third = (lockstep.join(0) for _ in range(3))
    waiting = asyncio.create_task(lockstep.turn(second, 6))
    late = asyncio.create_task(lockstep.turn(third, 7))
    await asyncio.wait_for(lockstep.turn(first, 5), 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    lockstep.leave(second)
    assert not late.done()
    lockstep.leave(first)
    lockstep.leave(first)
    await asyncio.wait_for(late, 1)


async def test_a_member_waits_for_one_that_has_not_begun() -> None:
    lockstep = Lockstep()
    early, sleeper = lockstep.join(0), lockstep.join(0)
    turn = asyncio.create_task(lockstep.turn(early, 3))
    await asyncio.sleep(0.01)
    assert not turn.done()
    await lockstep.turn(sleeper, 2)
    assert not turn.done()
    lockstep.leave(sleeper)
    await asyncio.wait_for(turn, 1)
