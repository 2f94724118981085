"""Cron on the time of the runs: once per boundary, whoever comes first."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from backtest_kit.errors import UserError
from backtest_kit.model.identity import Identity
from backtest_kit.model.interval import INTERVAL_MS, MINUTE_MS
from backtest_kit.run.cron import Cron, CronTick

HOUR = INTERVAL_MS["1h"]
START = 1_717_200_000_000 - 1_717_200_000_000 % INTERVAL_MS["1d"]
NINE = [f"COIN{n}" for n in range(9)]


def run_of(symbol: str, frame_name: str = "day", strategy_name: str = "trend") -> Identity:
    return Identity(symbol, strategy_name, "demo", frame_name, "backtest")


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def boundaries(cron: Cron, symbol: str, stop_ms: int) -> Iterator[int]:
    """What a run visits for the sake of cron, from a minute before the frame."""
    when_ms: int | None = START - MINUTE_MS
    while when_ms is not None and (when_ms := cron.next_boundary(when_ms, symbol)) is not None and when_ms <= stop_ms:
        yield when_ms


async def replay(cron: Cron, identity: Identity, *, hours: int, pauses: list[int] | None = None) -> None:
    cron.begin(identity)
    try:
        for number, when_ms in enumerate(boundaries(cron, identity.symbol, START + hours * HOUR)):
            await turns(pauses[number % len(pauses)] if pauses else 0)
            await cron.fire(when_ms, identity)
    finally:
        cron.end(identity)


@settings(max_examples=100, deadline=None)
@given(
    pauses=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=9, max_size=9),
    work=st.integers(0, 3),
)
def test_once_per_boundary_for_nine_symbols_in_any_interleaving(pauses: list[list[int]], work: int) -> None:
    hourly: list[int] = []
    halves: list[tuple[str, int]] = []
    busy = 0

    async def slow(tick: CronTick) -> None:
        nonlocal busy
        busy += 1
        assert busy == 1
        await turns(work)
        hourly.append(tick.when_ms)
        busy -= 1

    async def play() -> None:
        cron = Cron()
        cron.add("hourly", interval="1h", handler=slow)
        cron.add(
            "half", interval="30m", handler=lambda tick: halves.append((tick.symbol, tick.when_ms)), symbols=NINE[:2]
        )
        for identity in map(run_of, NINE):
            cron.begin(identity)
        await asyncio.gather(
            *(replay(cron, run_of(symbol), hours=6, pauses=each) for symbol, each in zip(NINE, pauses, strict=True))
        )

    asyncio.run(asyncio.wait_for(play(), 20))
    assert hourly == [START + n * HOUR for n in range(7)]
    for symbol in NINE[:2]:
        assert [when for each, when in halves if each == symbol] == [START + n * HOUR // 2 for n in range(13)]
    assert len(halves) == 26


async def test_all_runs_at_a_boundary_wait_for_the_one_that_performs_it() -> None:
    cron = Cron()
    go = asyncio.Event()
    performed: list[str] = []

    async def slow(tick: CronTick) -> None:
        await go.wait()
        performed.append(tick.symbol)

    cron.add("hourly", interval="1h", handler=slow)
    for symbol in NINE:
        cron.begin(run_of(symbol))
    runs = [asyncio.create_task(cron.fire(START, run_of(symbol))) for symbol in NINE]
    await turns(20)
    assert not any(run.done() for run in runs)
    go.set()
    await asyncio.wait_for(asyncio.gather(*runs), 5)
    assert performed == ["COIN0"]


async def test_the_handler_is_told_what_and_where() -> None:
    cron = Cron()
    seen: list[Any] = []
    cron.add("quarters", interval="15m", handler=lambda tick, ctx: seen.extend([tick, ctx]))
    identity = run_of("A")
    cron.begin(identity)
    await cron.fire(START, identity, "ctx")
    tick = CronTick(name="quarters", when_ms=START, interval="15m", identity=identity)
    assert seen == [tick, "ctx"]
    assert (tick.symbol, tick.when.timestamp() * 1000) == ("A", START)


async def test_only_aligned_minutes_and_symbols_that_are_concerned() -> None:
    cron = Cron()
    seen: list[tuple[str, int]] = []
    cron.add("a", interval="1h", handler=lambda tick: seen.append((tick.symbol, tick.when_ms - START)), symbols=["A"])
    assert cron.next_boundary(START, "B") is None
    assert cron.next_boundary(START, "A") == START + HOUR
    assert cron.next_boundary(START - 1, "A") == START
    cron.add("b", interval="15m", handler=print, symbols=["A", "C"])
    assert cron.next_boundary(START, "A") == START + HOUR // 4
    assert cron.next_boundary(START, "C") == START + HOUR // 4
    for symbol in "AB":
        cron.begin(run_of(symbol))
        for minute in (0, 1, 59, 61, 120):
            await cron.fire(START + minute * MINUTE_MS, run_of(symbol))
    assert seen == [("A", 0), ("A", 2 * HOUR)]


async def test_two_strategies_on_one_symbol_share_its_boundaries() -> None:
    cron = Cron()
    seen: list[int] = []
    cron.add("a", interval="1h", handler=lambda tick: seen.append(tick.when_ms), symbols=["A"])
    for name in ("trend", "other"):
        cron.begin(run_of("A", strategy_name=name))
    for name in ("trend", "other"):
        await cron.fire(START, run_of("A", strategy_name=name))
    assert seen == [START]


async def test_a_run_that_is_behind_passes_boundaries_by() -> None:
    cron = Cron()
    seen: list[int] = []
    ahead, behind = run_of("A"), run_of("B")
    cron.begin(ahead)
    cron.begin(behind)

    async def slow(tick: CronTick) -> None:
        await turns(3)
        seen.append((tick.when_ms - START) // HOUR)

    cron.add("hourly", interval="1h", handler=slow)
    await cron.fire(START + 5 * HOUR, ahead)
    await cron.fire(START + 3 * HOUR, behind)
    busy = asyncio.create_task(cron.fire(START + 7 * HOUR, ahead))
    await turns(1)
    await cron.fire(START + 6 * HOUR, behind)  # does not wait for what lies ahead of it
    assert not busy.done()
    await busy
    assert seen == [5, 7]


async def test_a_later_boundary_waits_for_an_earlier_one() -> None:
    cron = Cron()
    log: list[tuple[str, int]] = []

    async def slow(tick: CronTick) -> None:
        log.append(("begin", (tick.when_ms - START) // HOUR))
        await turns(3)
        log.append(("end", (tick.when_ms - START) // HOUR))

    cron.begin(run_of("A"))
    cron.begin(run_of("B"))
    cron.add("hourly", interval="1h", handler=slow)
    await asyncio.gather(cron.fire(START, run_of("A")), cron.fire(START + 2 * HOUR, run_of("B")))
    assert log == [("begin", 0), ("end", 0), ("begin", 2), ("end", 2)]


async def test_a_failure_reaches_all_who_wait_and_frees_the_boundary() -> None:
    cron = Cron()
    attempts: list[str] = []

    async def fails_once(tick: CronTick) -> None:
        attempts.append(tick.symbol)
        await turns(3)
        if len(attempts) == 1:
            raise ZeroDivisionError("of the user")

    cron.add("hourly", interval="1h", handler=fails_once)
    for symbol in "ABC":
        cron.begin(run_of(symbol))
    outcomes = await asyncio.gather(*(cron.fire(START, run_of(s)) for s in "AB"), return_exceptions=True)
    assert [type(each) for each in outcomes] == [ZeroDivisionError, ZeroDivisionError]
    await cron.fire(START, run_of("C"))
    await cron.fire(START, run_of("B"))
    assert attempts == ["A", "C"]


async def test_a_failure_does_not_stop_the_boundary_after_it() -> None:
    cron = Cron()
    seen: list[int] = []

    async def fails_first(tick: CronTick) -> None:
        await turns(3)
        if tick.when_ms == START:
            raise ZeroDivisionError("of the user")
        seen.append(tick.when_ms)

    cron.add("hourly", interval="1h", handler=fails_first)
    cron.begin(run_of("A"))
    cron.begin(run_of("B"))
    outcomes = await asyncio.gather(
        cron.fire(START, run_of("A")), cron.fire(START + HOUR, run_of("B")), return_exceptions=True
    )
    assert [type(each) for each in outcomes] == [ZeroDivisionError, type(None)]
    assert seen == [START + HOUR]


@pytest.mark.parametrize("after", range(6))
async def test_when_the_performing_run_is_cancelled_another_takes_over(after: int) -> None:
    cron = Cron()
    performed: list[str] = []

    async def slow(tick: CronTick) -> None:
        await turns(4)
        performed.append(tick.symbol)

    cron.add("hourly", interval="1h", handler=slow)
    for symbol in "ABC":
        cron.begin(run_of(symbol))
    runs = [asyncio.create_task(cron.fire(START, run_of(symbol))) for symbol in "ABC"]
    await turns(after)
    runs[0].cancel()
    runs[1].cancel()
    await asyncio.wait_for(asyncio.gather(*runs, return_exceptions=True), 5)
    assert performed == (["A"] if after == 5 else ["C"])
    assert runs[2].exception() is None


async def test_the_frame_starts_anew_when_its_last_run_has_ended() -> None:
    cron = Cron()
    seen: list[str] = []
    cron.add("hourly", interval="1h", handler=lambda tick: seen.append(tick.symbol))
    a, b, other = run_of("A"), run_of("B"), run_of("C", "week")
    cron.begin(a)
    cron.begin(b)
    await cron.fire(START, a)
    cron.end(a)
    await cron.fire(START, b)
    assert seen == ["A"]
    cron.begin(other)
    await cron.fire(START, other)
    assert seen == ["A", "C"]
    cron.end(b)
    cron.begin(b)
    await cron.fire(START, b)
    assert seen == ["A", "C", "B"]


async def test_jobs_run_in_their_order_and_can_be_changed_by_a_handler() -> None:
    cron = Cron()
    seen: list[str] = []

    def first(tick: CronTick) -> None:
        seen.append("first")
        cron.remove("first")
        cron.add("third", interval="1h", handler=lambda tick: seen.append("third"))

    cron.add("first", interval="1h", handler=first)
    cron.add("second", interval="1h", handler=lambda tick: seen.append("second"))
    identity = run_of("A")
    cron.begin(identity)
    await cron.fire(START, identity)
    assert seen == ["first", "second"]
    await cron.fire(START + HOUR, identity)
    assert seen == ["first", "second", "second", "third"]


async def test_a_job_added_again_starts_anew() -> None:
    cron = Cron()
    seen: list[int] = []
    cron.begin(run_of("A"))
    for number in range(2):
        cron.add("hourly", interval="1h", handler=lambda tick, number=number: seen.append(number))
        await cron.fire(START, run_of("A"))
        cron.remove("hourly")
    assert seen == [0, 1]


@pytest.mark.parametrize("in_a_task", [False, True], ids=["same task", "awaited task"])
async def test_a_job_that_starts_a_run_of_its_own_frame_is_refused(in_a_task: bool) -> None:
    cron = Cron()

    async def nested(tick: CronTick) -> None:
        inner = cron.fire(tick.when_ms, run_of("B"))
        await (asyncio.create_task(inner) if in_a_task else inner)

    cron.add("nested", interval="1h", handler=nested)
    cron.begin(run_of("A"))
    cron.begin(run_of("B"))
    async with asyncio.timeout(5):
        with pytest.raises(UserError, match=r"cron job 'nested' would wait for itself: .* 2024-06-01T00:00Z"):
            await cron.fire(START, run_of("A"))


async def test_runs_that_jobs_start_do_not_pile_up() -> None:
    cron = Cron()
    over = asyncio.Event()

    def starts_the_next(tick: CronTick) -> None:
        if tick.when_ms < START + 100 * HOUR:
            latest[:] = [asyncio.create_task(cron.fire(tick.when_ms + HOUR, tick.identity))]
        else:
            over.set()

    latest: list[asyncio.Task[None]] = []
    cron.add("hourly", interval="1h", handler=starts_the_next)
    cron.begin(run_of("A"))
    await cron.fire(START, run_of("A"))
    await asyncio.wait_for(over.wait(), 5)
    gc.collect()
    assert sum(type(each).__name__ == "_Round" for each in gc.get_objects()) <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "name of a cron job is ''"),
        ({"name": "taken"}, "cron job 'taken' is already registered"),
        ({"interval": "7m"}, "interval of cron job 'job' is '7m'"),
        ({"handler": 5}, r"handler 5 is not a function: give a function of \(tick\) or \(tick, ctx\)"),
        ({"handler": lambda: None}, r"lambda> takes \(\)"),
        ({"symbols": "BTCUSDT"}, "symbols of cron job 'job' is the text 'BTCUSDT'"),
        ({"symbols": []}, "symbols of cron job 'job' is empty"),
        ({"symbols": ["A", 5]}, "symbol is 5"),
    ],
)
def test_a_wrong_job_is_refused(arguments: dict[str, Any], message: str) -> None:
    cron = Cron()
    cron.add("taken", interval="1h", handler=print)
    given: dict[str, Any] = {"name": "job", "interval": "1m", "handler": print} | arguments
    with pytest.raises(UserError, match=message):
        cron.add(given.pop("name"), **given)
    assert cron.next_boundary(START, "A") == START + HOUR


def test_removing_what_is_not_there_names_what_is() -> None:
    cron = Cron()
    with pytest.raises(UserError, match=r"cron job 'x' is not registered \(registered: none\)"):
        cron.remove("x")
    cron.add("hourly", interval="1h", handler=print)
    with pytest.raises(UserError, match=r"\(registered: 'hourly'\)"):
        cron.remove("x")


async def test_a_boundary_among_missing_minutes_waits_for_the_next_one_there_is() -> None:
    cron, performed = Cron(), list[tuple[str, int]]()
    for name, interval in (("hourly", "1h"), ("quarters", "15m"), ("daily", "1d")):
        cron.add(name, interval=interval, handler=lambda tick: performed.append((tick.name, tick.when_ms)))
    cron.begin(run_of("A"))
    since_ms, when_ms = START + HOUR - 2 * MINUTE_MS, START + HOUR + 17 * MINUTE_MS
    await cron.fire(when_ms, run_of("A"), since_ms=since_ms)
    # Of two boundaries of one job, only the last is made up for.
    assert performed == [("hourly", START + HOUR), ("quarters", START + HOUR + 15 * MINUTE_MS)]
    await cron.fire(when_ms + MINUTE_MS, run_of("A"), since_ms=when_ms)
    assert len(performed) == 2
