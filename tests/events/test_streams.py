"""Streams: nothing is lost, the runs wait for the reader, and no forgotten stream holds a run up."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from backtest_kit.errors import UserError
from backtest_kit.events import EventBus, EventStream, _Queue
from backtest_kit.model.event import Event, Progress, RunDone
from backtest_kit.model.identity import Identity

MakeEvent = Callable[..., Progress]
DONE = RunDone(identity=Identity("BTCUSDT", "trend", "demo", "day", "backtest"), when_ms=0, trades=())


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def listens(bus: EventBus) -> bool:
    return bus.wanted(Progress, symbol="BTCUSDT", strategy_name="trend")


async def emit_many(bus: EventBus, progress: MakeEvent, count: int) -> None:
    for number in range(count):
        await bus.emit(progress(number))
    await bus.emit(DONE)


async def test_a_stream_begins_with_the_call_and_loses_nothing(progress: MakeEvent) -> None:
    bus = EventBus()
    stream = bus.events(Progress, RunDone, limit=3)
    run = asyncio.create_task(emit_many(bus, progress, 20))
    await turns()
    read: list[float] = []
    async for event in stream:
        if isinstance(event, RunDone):
            break
        assert isinstance(event, Progress)
        read.append(event.fraction)
    await run
    assert read == list(range(20))
    assert not listens(bus)


async def test_a_full_stream_makes_the_run_wait(progress: MakeEvent) -> None:
    bus = EventBus()
    emitted: list[float] = []
    stream = bus.events(Progress, limit=2)
    bus.on(Progress, lambda event: emitted.append(event.fraction))
    run = asyncio.create_task(emit_many(bus, progress, 5))
    await turns(20)
    assert emitted == [0, 1]
    assert (await anext(stream)).fraction == 0
    await turns(20)
    assert emitted == [0, 1, 2]
    await stream.aclose()
    await asyncio.wait_for(run, 5)
    assert emitted == [0, 1, 2, 3, 4]


async def test_streams_are_independent_and_filtered(progress: MakeEvent) -> None:
    bus = EventBus()
    every = bus.events(Event)
    some = bus.events(Progress, symbol="B", strategy_name="trend")
    for number, symbol in enumerate("ABA"):
        await bus.emit(progress(number, symbol=symbol))
    await bus.emit(DONE)
    bus.close()
    assert [event.action async for event in every] == ["progress", "progress", "progress", "done"]
    assert [event.fraction async for event in some] == [1]
    with pytest.raises(StopAsyncIteration):
        await anext(every)


async def leave_by_break(stream: EventStream[Progress], kept: list[BaseException]) -> None:
    async for _ in stream:
        break


async def leave_by_error(stream: EventStream[Progress], kept: list[BaseException]) -> None:
    async def read() -> None:
        async for _ in stream:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await read()


async def leave_by_with(stream: EventStream[Progress], kept: list[BaseException]) -> None:
    async with stream as same:
        await anext(same)


async def leave_by_aclose(stream: EventStream[Progress], kept: list[BaseException]) -> None:
    await anext(stream)
    await stream.aclose()
    await stream.aclose()


async def leave_by_cancelled_wait(stream: EventStream[Progress], kept: list[BaseException]) -> None:
    async def read() -> None:
        async for _ in stream:
            pass

    await anext(stream)
    reader = asyncio.create_task(read())
    await turns(50)
    reader.cancel()
    try:
        await reader
    except asyncio.CancelledError as error:
        kept.append(error)


async def leave_by_cancelled_body(stream: EventStream[Progress], kept: list[BaseException]) -> None:
    async def read() -> None:
        async for _ in stream:
            await asyncio.Event().wait()

    reader = asyncio.create_task(read())
    await turns()
    reader.cancel()
    await asyncio.wait([reader])


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_break,
        leave_by_error,
        leave_by_with,
        leave_by_aclose,
        leave_by_cancelled_wait,
        leave_by_cancelled_body,
    ],
)
async def test_leaving_a_stream_ends_it_and_frees_the_run(leave: Callable[..., Any], progress: MakeEvent) -> None:
    bus = EventBus()
    stream = bus.events(Progress, limit=1)
    run = asyncio.create_task(emit_many(bus, progress, 9))
    await turns()
    assert not run.done()
    kept: list[BaseException] = []
    await leave(stream, kept)
    assert not listens(bus)
    await asyncio.wait_for(run, 5)
    assert [event async for event in stream] == []  # kept by a name, and ended all the same


@pytest.mark.parametrize("in_a_cycle", [False, True])
async def test_a_stream_that_is_let_go_frees_the_run(in_a_cycle: bool, progress: MakeEvent) -> None:
    bus = EventBus()
    kept: list[Any] = [bus.events(Progress, limit=1)]
    run = asyncio.create_task(emit_many(bus, progress, 9))
    await turns()
    assert not run.done()
    if in_a_cycle:
        kept.append(kept)
    del kept
    gc.collect()
    assert not listens(bus)
    await asyncio.wait_for(run, 5)


async def test_a_stream_that_another_thread_lets_go_of_frees_the_run(progress: MakeEvent) -> None:
    bus = EventBus()
    kept = [bus.events(Progress, limit=1)]
    run = asyncio.create_task(emit_many(bus, progress, 9))
    await turns()

    def let_go_while_the_loop_sleeps() -> None:
        time.sleep(0.05)
        kept.clear()

    collector = threading.Thread(target=let_go_while_the_loop_sleeps)
    loop = asyncio.get_running_loop()
    started = loop.time()
    collector.start()
    await asyncio.wait_for(run, 5)
    assert loop.time() - started < 4  # woken, not found when the timeout came
    collector.join()


async def test_a_stream_that_ends_between_the_look_and_the_wait_is_not_waited_for() -> None:
    answers = iter([False, True, True])
    await asyncio.wait_for(_Queue[Progress](1)._until(lambda: next(answers)), 5)


async def test_a_timeout_of_one_read_goes_on_listening(progress: MakeEvent) -> None:
    bus = EventBus()
    stream = bus.events(Progress)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.001)
    await bus.emit(progress(7))
    assert (await anext(stream)).fraction == 7


@pytest.mark.parametrize("after", range(12))
async def test_a_run_cancelled_at_any_await_of_a_full_stream(progress: MakeEvent, after: int) -> None:
    bus = EventBus()
    stream = bus.events(Progress, limit=1)
    runs = [asyncio.create_task(bus.emit(progress(number))) for number in range(4)]
    await turns(after // 3)
    read = [await read_one(stream)] if after % 3 else []
    await turns(after % 3)
    runs[2].cancel()
    reader = asyncio.create_task(anext_all(stream))
    outcomes = await asyncio.wait_for(asyncio.gather(*runs, return_exceptions=True), 5)
    bus.close()
    read += await reader
    assert [outcomes[n] for n in (0, 1, 3)] == [None] * 3
    assert read == ([0, 1, 2, 3] if outcomes[2] is None else [0, 1, 3])


async def anext_all(stream: EventStream[Progress]) -> list[float]:
    return [event.fraction async for event in stream]


async def test_a_reader_cancelled_as_an_event_comes_does_not_take_it(progress: MakeEvent) -> None:
    bus = EventBus()
    wrong: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: wrong.append(context))
    stream = bus.events(Progress)
    reader = asyncio.create_task(read_one(stream))
    await turns()
    await bus.emit(progress(1))
    reader.cancel()
    await asyncio.wait([reader])
    assert await read_one(stream) == 1
    assert wrong == []


async def test_two_readers_share_what_comes(progress: MakeEvent) -> None:
    bus = EventBus()
    stream = bus.events(Progress)

    readers = [asyncio.create_task(read_one(stream)) for _ in range(2)]
    await turns()
    await bus.emit(progress(1))
    await turns()
    assert sum(reader.done() for reader in readers) == 1
    await bus.emit(progress(2))
    assert sorted(await asyncio.gather(*readers)) == [1, 2]


async def read_one(stream: EventStream[Progress]) -> float:
    return (await anext(stream)).fraction


def test_a_stream_outlives_the_event_loop_it_was_filled_in(progress: MakeEvent) -> None:
    bus = EventBus()
    stream = bus.events(Progress)

    async def wait_in_vain() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.001)

    asyncio.run(wait_in_vain())
    asyncio.run(bus.emit(progress(1)))
    bus.close()
    assert asyncio.run(anext_all(stream)) == [1]


def test_a_reader_whose_loop_is_gone_wakes_nobody(progress: MakeEvent) -> None:
    bus = EventBus()
    stream = bus.events(Progress)
    loop = asyncio.new_event_loop()
    reader = loop.create_task(read_one(stream))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    asyncio.run(bus.emit(progress(1)))
    assert not reader.done()


@pytest.mark.parametrize("limit", [0, -1, 2.5, "9"])
def test_a_wrong_limit_is_refused(limit: Any) -> None:
    with pytest.raises(UserError, match=r"limit is .*1 or more"):
        EventBus().events(Progress, limit=limit)
