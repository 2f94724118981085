"""Whose turn it is: handlers one after the other, those that lead to more events, and runs that are cancelled."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import pytest

from backtest_kit.errors import UserError
from backtest_kit.events import EventBus
from backtest_kit.model.event import Event, Progress, RunDone
from backtest_kit.model.identity import Identity

MakeEvent = Callable[..., Progress]
IDENTITY = Identity("BTCUSDT", "trend", "demo", "day", "backtest")
DONE = RunDone(identity=IDENTITY, when_ms=0, trades=())


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_each_handler_is_awaited_before_the_next(progress: MakeEvent) -> None:
    bus = EventBus()
    log: list[str] = []

    async def slow(event: Progress) -> None:
        log.append("slow begins")
        await turns(5)
        log.append("slow ends")

    bus.on(Progress, slow)
    bus.on(Progress, lambda event: log.append("quick"))
    await bus.emit(progress())
    log.append("the run goes on")
    assert log == ["slow begins", "slow ends", "quick", "the run goes on"]


async def test_once_is_once_for_concurrent_runs(progress: MakeEvent) -> None:
    bus = EventBus()
    seen: list[float] = []

    async def first(event: Progress) -> None:
        seen.append(event.fraction)
        await turns(3)

    async def slow(event: Progress) -> None:
        await turns(2)

    bus.on(Progress, slow)
    bus.on(Progress, first, once=True, symbol="A")
    await bus.emit(progress(0, symbol="B"))
    await asyncio.gather(*(bus.emit(progress(number, symbol="A")) for number in range(1, 10)))
    assert seen == [1]


async def test_one_event_at_a_time_first_come_first_served(progress: MakeEvent) -> None:
    bus = EventBus()
    log: list[tuple[str, float]] = []

    async def slow(event: Progress) -> None:
        log.append(("begin", event.fraction))
        await turns(3)
        log.append(("end", event.fraction))

    bus.on(Progress, slow)
    await asyncio.gather(*(bus.emit(progress(number)) for number in range(9)))
    assert log == [(what, number) for number in range(9) for what in ("begin", "end")]


async def test_an_error_is_raised_to_the_run_and_stops_the_event(progress: MakeEvent) -> None:
    bus = EventBus()
    seen: list[float] = []

    async def fails(event: Progress) -> None:
        await turns(1)
        if event.fraction == 1:
            raise ZeroDivisionError("of the user")

    bus.on(Progress, fails)
    bus.on(Progress, lambda event: seen.append(event.fraction))
    outcomes = await asyncio.gather(*(bus.emit(progress(n)) for n in range(3)), return_exceptions=True)
    assert [type(each) for each in outcomes] == [type(None), ZeroDivisionError, type(None)]
    assert seen == [0, 2]


@pytest.mark.parametrize("in_a_task", [False, True], ids=["same task", "awaited task"])
async def test_a_handler_that_leads_to_an_event_for_itself_is_refused(progress: MakeEvent, in_a_task: bool) -> None:
    bus = EventBus()

    async def echo(event: Progress) -> None:
        if event.fraction < 3:
            nested = bus.emit(progress(event.fraction + 1))
            await (asyncio.create_task(nested) if in_a_task else nested)

    bus.on(Progress, echo)
    async with asyncio.timeout(5):
        with pytest.raises(UserError, match=r"echo would wait for itself: a Progress of trend BTCUSDT"):
            await bus.emit(progress(1))
        await bus.emit(progress(3))  # the handler is free again


async def test_a_handler_may_lead_to_events_for_others(progress: MakeEvent) -> None:
    bus = EventBus()
    seen: list[str] = []

    async def next_run(event: RunDone) -> None:
        await bus.emit(progress(1))
        seen.append("done")

    bus.on(RunDone, next_run)
    bus.on(Event, lambda event: seen.append(event.action))
    await bus.emit(DONE)
    assert seen == ["progress", "done", "done"]


async def test_two_handlers_that_wait_for_each_other_are_refused(progress: MakeEvent) -> None:
    bus = EventBus()

    async def left(event: Progress) -> None:
        await turns(2)
        if event.fraction:
            await bus.emit(progress(0, symbol="right"))

    async def right(event: Progress) -> None:
        await turns(2)
        if event.fraction:
            await bus.emit(progress(0, symbol="left"))

    bus.on(Progress, left, symbol="left")
    bus.on(Progress, right, symbol="right")
    async with asyncio.timeout(5):
        outcomes = await asyncio.gather(
            bus.emit(progress(1, symbol="left")), bus.emit(progress(1, symbol="right")), return_exceptions=True
        )
    assert sorted(type(each).__name__ for each in outcomes) == ["NoneType", "UserError"]


async def test_a_knot_is_seen_although_another_event_of_the_handler_came_through(progress: MakeEvent) -> None:
    bus = EventBus()

    async def both(event: Progress) -> None:
        await asyncio.gather(bus.emit(progress(1, symbol="back")), bus.emit(progress(1, symbol="quick")))

    async def back(event: Progress) -> None:
        await turns(5)
        await bus.emit(progress(1, symbol="both"))

    for handler in (both, back):
        bus.on(Progress, handler, symbol=handler.__name__)
    bus.on(Progress, lambda event: None, symbol="quick")
    async with asyncio.timeout(5):
        with pytest.raises(UserError, match="both would wait for itself"):
            await bus.emit(progress(0, symbol="both"))


async def test_waiting_for_a_handler_that_waits_no_more_is_no_knot(progress: MakeEvent) -> None:
    bus = EventBus()
    log: list[str] = []

    async def busy(event: Progress) -> None:
        if event.fraction:
            await bus.emit(progress(0, symbol="other"))
            await turns(9)
        log.append(f"busy {event.fraction:g}")

    async def other(event: Progress) -> None:
        if event.fraction:
            await bus.emit(progress(0, symbol="busy"))
        log.append(f"other {event.fraction:g}")

    for handler in (busy, other):
        bus.on(Progress, handler, symbol=handler.__name__)
    first = asyncio.create_task(bus.emit(progress(1, symbol="busy")))
    await turns(3)
    await asyncio.wait_for(bus.emit(progress(1, symbol="other")), 5)
    await first
    assert log == ["other 0", "busy 1", "busy 0", "other 1"]


async def test_runs_that_start_each_other_do_not_pile_up(progress: MakeEvent) -> None:
    bus = EventBus()
    over = asyncio.Event()

    def starts_the_next(event: Progress) -> None:
        if event.fraction < 100:
            latest[:] = [asyncio.create_task(bus.emit(progress(event.fraction + 1)))]
        else:
            over.set()

    def deliveries() -> int:
        gc.collect()
        return sum(type(each).__name__ == "_Delivery" for each in gc.get_objects())

    latest: list[asyncio.Task[None]] = []
    bus.on(Progress, starts_the_next)
    before = deliveries()
    await bus.emit(progress(0))
    await asyncio.wait_for(over.wait(), 5)
    assert deliveries() <= before + 2


async def test_a_task_that_outlives_its_handler_may_emit_to_it(progress: MakeEvent) -> None:
    bus = EventBus()
    started: list[asyncio.Task[None]] = []
    seen: list[float] = []

    async def later() -> None:
        await bus.emit(progress(2))

    def starts(event: Progress) -> None:
        seen.append(event.fraction)
        if event.fraction == 1:
            started.append(asyncio.create_task(later()))

    bus.on(Progress, starts)
    await bus.emit(progress(1))
    await started[0]
    assert seen == [1, 2]


@pytest.mark.parametrize("after", range(12))
async def test_a_run_cancelled_at_any_await_leaves_the_bus_in_order(progress: MakeEvent, after: int) -> None:
    bus = EventBus()
    seen: list[float] = []

    async def slow(event: Progress) -> None:
        await turns(2)
        seen.append(event.fraction)
        await turns(1)

    bus.on(Progress, slow)
    bus.on(Progress, slow)
    runs = [asyncio.create_task(bus.emit(progress(number))) for number in range(3)]
    await turns(after)
    runs[1].cancel()
    outcomes = await asyncio.gather(*runs, return_exceptions=True)
    assert outcomes[0] is outcomes[2] is None
    async with asyncio.timeout(5):
        await bus.emit(progress(3))
    for number in (0, 2, 3):
        assert seen.count(number) == 2
    assert seen.count(1) == 2 if outcomes[1] is None else isinstance(outcomes[1], asyncio.CancelledError)


def test_a_bus_serves_one_event_loop_after_another(progress: MakeEvent) -> None:
    bus = EventBus()
    seen: list[float] = []

    async def slow(event: Progress) -> None:
        await turns(2)
        seen.append(event.fraction)

    async def contended(first: int) -> None:
        await asyncio.gather(*(bus.emit(progress(first + n)) for n in range(3)))

    bus.on(Progress, slow)
    for first in (0, 3, 6):
        asyncio.run(contended(first))
    assert seen == list(range(9))


def test_a_blocking_run_inside_a_handler_has_turns_of_its_own(progress: MakeEvent) -> None:
    bus = EventBus()
    seen: list[float] = []

    async def handler(event: Progress) -> None:
        if event.fraction == 1:
            await asyncio.to_thread(asyncio.run, inner())
        seen.append(event.fraction)

    async def inner() -> None:
        await asyncio.gather(*(bus.emit(progress(n, symbol="INNER")) for n in (2, 3)))

    async def outer() -> None:
        await asyncio.wait_for(bus.emit(progress(1)), 5)

    bus.on(Progress, handler)
    asyncio.run(outer())
    assert seen == [2, 3, 1]
