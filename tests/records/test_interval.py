"""Work that is due once in a window: at most once, in every process, over restarts, and again where it failed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.records.conftest import MINUTE_MS, NOON_MS, Minute, kit_on, run_of

import backtest_kit as bk
from backtest_kit.errors import Conflict
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Record, Write
from backtest_kit.records.interval import Once


class Work:
    """What is to be done, and the minutes at which it was."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.failures = 0

    def once_by(self, kit: bk.Kit, interval: str = "1h", **options: Any) -> Once[Any]:
        @kit.records.interval.once(interval, **({"name": "work", "version": "1"} | options))
        async def work(ctx: Any, result: Any = "done") -> Any:
            await asyncio.sleep(0)
            if self.failures:
                self.failures -= 1
                raise ConnectionError("down")
            self.done.append(ctx.when_ms)
            return result

        return work


def minute(number: int, **fields: Any) -> Minute:
    return Minute(when_ms=NOON_MS + number * MINUTE_MS, **fields)


async def test_it_runs_once_in_each_window(kit: bk.Kit) -> None:
    work = Work()
    once = work.once_by(kit)
    returned = [await once(minute(number)) for number in range(150)]
    assert work.done == [NOON_MS, NOON_MS + 60 * MINUTE_MS, NOON_MS + 120 * MINUTE_MS]
    assert [number for number, each in enumerate(returned) if each == "done"] == [0, 60, 120]
    assert set(returned) == {"done", None}
    again = Work()
    assert await again.once_by(kit)(minute(149)) is None, "the function is another object, its name is the same"


async def test_a_failure_leaves_the_window_free(kit: bk.Kit) -> None:
    work = Work()
    once = work.once_by(kit)
    for number in (0, 60):
        work.failures = 2
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await once(minute(number))
        assert await once(minute(number + 1)) == "done"
        assert await once(minute(number + 2)) is None
    assert len(work.done) == 2


async def test_a_result_of_none_uses_the_window_up(kit: bk.Kit) -> None:
    work = Work()
    once = work.once_by(kit)
    assert [await once(minute(0), None), await once(minute(1), None)] == [None, None]
    assert len(work.done) == 1


async def test_callers_at_the_same_time_run_it_once(kit: bk.Kit) -> None:
    work = Work()
    once = work.once_by(kit)
    returned = await asyncio.gather(*(once(minute(0)) for _ in range(30)))
    assert (len(work.done), returned.count("done")) == (1, 1)


async def test_a_cancelled_run_leaves_the_window_free(kit: bk.Kit) -> None:
    begun, never = asyncio.Event(), asyncio.Event()

    @kit.records.interval.once("1h", name="slow", version="1")
    async def slow(ctx: Any, hang: bool) -> str:
        begun.set()
        if hang:
            await never.wait()
        return "done"

    caller = asyncio.create_task(slow(minute(0), True))
    await begun.wait()
    assert await slow(minute(0), False) is None, "it is under way"
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await slow(minute(0), False) == "done"


async def test_a_caller_that_is_cancelled_while_it_takes_the_window_frees_it(kit: bk.Kit) -> None:
    work = Work()
    once = work.once_by(kit)
    for steps in range(12):
        caller = asyncio.create_task(once(minute(steps * 60)))
        for _ in range(steps):
            await asyncio.sleep(0)
        caller.cancel()
        result: object = (await asyncio.gather(caller, return_exceptions=True))[0]
        assert await once(minute(steps * 60)) == (None if result == "done" else "done"), steps
    assert len(work.done) == 12


@pytest.mark.parametrize("cancels", [2, 3])
async def test_a_caller_that_is_cancelled_again_while_it_frees_the_window_frees_it(kit: bk.Kit, cancels: int) -> None:
    work = Work()
    once = work.once_by(kit)
    for steps in range(12):
        caller = asyncio.create_task(once(minute(steps * 60)))
        for _ in range(steps):
            await asyncio.sleep(0)
        for _ in range(cancels):
            caller.cancel()
            await asyncio.sleep(0)
        result: object = (await asyncio.gather(caller, return_exceptions=True))[0]
        assert await once(minute(steps * 60)) == (None if result == "done" else "done"), steps
    assert len(work.done) == 12


async def test_a_function_that_is_cancelled_twice_leaves_the_window_free(kit: bk.Kit) -> None:
    begun, never = asyncio.Event(), asyncio.Event()

    @kit.records.interval.once("1h", name="slow", version="1")
    async def slow(ctx: Any, hang: bool) -> str:
        begun.set()
        if hang:
            await never.wait()
        return "done"

    caller = asyncio.create_task(slow(minute(0), True))
    await begun.wait()
    caller.cancel()
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await slow(minute(0), False) == "done"


async def test_windows_of_runs_modes_strategies_and_symbols_are_apart(kit: bk.Kit) -> None:
    work = Work()
    once = work.once_by(kit)
    moments = [
        minute(0), minute(0, symbol="ETHUSDT"), minute(0, strategy_name="other"), minute(0, exchange_name="kraken"),
        minute(0, mode="paper"), minute(0, mode="backtest", run_id="a"), minute(0, mode="backtest", run_id="b"),
    ]  # fmt: skip
    assert [await once(each) for each in moments] == ["done"] * 7
    assert [await once(each) for each in moments] == [None] * 7
    for_all = Work().once_by(kit, name="all", key=lambda ctx, result="": "everything")
    assert [await for_all(each) for each in moments] == ["done", None, None, None, "done", "done", "done"]


async def test_a_backtest_of_later_days_blocks_no_live_run(kit: bk.Kit, backtest: Callable[..., Any]) -> None:
    work = Work()
    once = work.once_by(kit)

    async def get_signal(ctx: bk.Context) -> None:
        await once(ctx)

    await backtest(get_signal)
    await backtest(get_signal)
    assert len(work.done) == 48, "each run has windows of its own"
    assert await once(Minute(when_ms=NOON_MS, exchange_name="demo")) == "done"
    await backtest(get_signal, run_id="mine")
    await backtest(get_signal, run_id="mine")
    assert len(work.done) == 48 + 1 + 48, "a run that is repeated does not see what it did in its later hours"
    assert work.done[-24:] == work.done[-48:-24]


async def test_an_earlier_window_than_the_last_is_used_up(kit: bk.Kit) -> None:
    work = Work()
    once = work.once_by(kit)
    assert await once(minute(60)) == "done"
    assert await once(minute(0)) is None, "a clock that was set back runs nothing twice"
    assert await once(minute(120)) == "done"
    records = kit.persistence.interval.list(bucket=once.bucket)
    assert [value async for _, value in records] == [{"windowMs": NOON_MS + 120 * MINUTE_MS}], "one record for all"


async def test_a_backtest_that_is_repeated_repeats_its_windows(kit: bk.Kit) -> None:
    work = Work()
    once = work.once_by(kit)
    for _ in range(2):
        run = run_of(kit, "backtest", "mine")
        for number in (0, 30, 60, 90, 120):
            await once(minute(number, mode="backtest", run_id="mine"))
        assert await once(minute(30, mode="backtest", run_id="mine")) is None, "a context that was kept"
        assert [done - NOON_MS for done in work.done] == [0, 60 * MINUTE_MS, 120 * MINUTE_MS]
        work.done.clear()
        del run


async def test_a_failure_in_a_repeated_backtest_leaves_the_window_free(kit: bk.Kit) -> None:
    work = Work()
    once = work.once_by(kit)
    for failures in (0, 2):
        run = run_of(kit, "backtest", "mine")
        for number in (0, 60, 120):
            work.failures = failures
            for _ in range(failures):
                with pytest.raises(ConnectionError):
                    await once(minute(number, mode="backtest", run_id="mine"))
            assert await once(minute(number + 1, mode="backtest", run_id="mine")) == "done"
            assert await once(minute(number + 2, mode="backtest", run_id="mine")) is None
        del run


async def test_a_corrected_function_does_not_run_again(kit: bk.Kit) -> None:
    def defined(result: str, **options: Any) -> Once[Any]:
        scope: dict[str, Any] = {}
        exec(f"async def report(ctx): return {result!r}", scope)  # noqa: S102
        return kit.records.interval.once("1d", **options)(scope["report"])

    assert await defined("wrong")(minute(0)) == "wrong"
    assert await defined("right")(minute(5)) is None
    assert await defined("right", version="2")(minute(5)) == "right"
    assert await defined("right", name="another")(minute(5)) == "right"


REPORT = """
def define(once, **options):
    @once("1d", **options)
    async def report(ctx):
        return {result!r}

    return report
"""


def file_of(path: Path, source: str) -> Any:
    """A strategy file, read as the command line reads it: each under the same name of a module."""
    path.write_text(source)
    space = {"__name__": "strategy_file", "__file__": str(path)}
    exec(compile(source, path, "exec"), space)  # noqa: S102
    return space["define"]


async def test_functions_of_one_name_in_two_files_do_not_share_windows_unasked(kit: bk.Kit, tmp_path: Path) -> None:
    once = kit.records.interval.once
    one, two = (file_of(tmp_path / f"{each}.py", REPORT.format(result=each)) for each in ("one", "two"))
    assert await one(once)(minute(0)) == "one"
    for options in ({}, {"name": "define.<locals>.report"}):
        with pytest.raises(bk.UserError, match=r"one\.py:\d+\) and .*two\.py:\d+\) are two functions with the name"):
            two(once, **options)
    assert await two(once, name="report of two")(minute(0)) == "two"
    assert await one(once, name="shared")(minute(0)) == "one"
    assert await two(once, name="shared")(minute(0)) is None, "it was said so"
    assert await one(once)(minute(1)) is None, "the first one keeps its windows"


async def test_two_functions_of_one_name_in_one_file_need_names(kit: bk.Kit, tmp_path: Path) -> None:
    def defined(coin: object) -> Once[Any]:
        @kit.records.interval.once("1h")
        async def report(ctx: Any, coin: object = coin) -> object:
            return coin

        return report

    assert await defined("BTC")(minute(0)) == "BTC"
    assert await defined("BTC")(minute(0)) is None, "it is the same function"
    for other in ("ETH", 1, object()):
        with pytest.raises(bk.UserError, match="two functions with the name"):
            defined(other)
    source = REPORT.format(result="first") + "\n\nfirst = define\n" + REPORT.format(result="second")
    define = file_of(tmp_path / "twice.py", source)
    first = define.__globals__["first"]
    assert await first(kit.records.interval.once)(minute(0)) == "first"
    with pytest.raises(bk.UserError, match=r"twice\.py:3\) and .*twice\.py:13\)"):
        define(kit.records.interval.once)


async def test_an_edited_file_that_is_read_again_goes_on_with_its_windows(kit: bk.Kit, tmp_path: Path) -> None:
    path = tmp_path / "trend.py"
    assert await file_of(path, REPORT.format(result="wrong"))(kit.records.interval.once)(minute(0)) == "wrong"
    again = file_of(path, "import math\n\n" + REPORT.format(result="right"))
    os.utime(path, ns=(1, 1))
    edited = again(kit.records.interval.once)
    assert await edited(minute(0)) is None
    assert await edited(minute(24 * 60)) == "right"


async def test_keys_of_two_types_have_windows_of_their_own(kit: bk.Kit) -> None:
    work = Work()
    once = work.once_by(kit, key=lambda ctx, result: result)
    for each in (1, "1", 1.0, True, "true", None, "null"):
        assert await once(minute(0), each) == each
    assert len(work.done) == 7


async def test_a_context_is_asked_for(kit: bk.Kit) -> None:
    @kit.records.interval.once("1h", name="bare", version="1")
    async def bare(note: str) -> str:
        return note

    with pytest.raises(bk.UserError, match="called without a context"):
        await bare("x", when=NOON_MS)
    assert await bare("x", ctx=minute(5)) == "x"
    assert await bare("x", ctx=minute(65), when=NOON_MS) is None
    with pytest.raises(bk.LookAhead):
        await bare("x", ctx=minute(5), when=NOON_MS + 60 * MINUTE_MS)
    with pytest.raises(bk.UserError, match="interval is 'hourly'"):
        kit.records.interval.once("hourly")


async def test_a_context_is_found_under_any_name(kit: bk.Kit) -> None:
    done: list[str] = []

    @kit.records.interval.once("1h", name="named", version="1")
    async def named(*, moment: Any) -> None:
        done.append(moment.symbol)

    for symbol in ("BTCUSDT", "ETHUSDT", "BTCUSDT"):
        await named(moment=minute(5, symbol=symbol))
    assert done == ["BTCUSDT", "ETHUSDT"]


async def test_what_cannot_be_freed_is_said_beside_the_error(tmp_path: Path) -> None:
    class Failing(MemoryStore):
        fails: bk.BacktestKitError | None = None

        async def put(self, write: Write) -> Record:
            if self.fails is not None and write.expect != "absent":
                raise self.fails
            return await super().put(write)

    kit, store, work = bk.Kit(tmp_path), Failing(), Work()
    kit.persistence.bind("interval", store)
    once = work.once_by(kit)
    work.failures, store.fails = 1, bk.OutOfSpace("no space left")
    with pytest.raises(ConnectionError) as raised:
        await once(minute(0))
    assert "could not be freed: no space left" in raised.value.__notes__[0]
    work.failures, store.fails = 1, Conflict("a later one was taken")
    with pytest.raises(ConnectionError) as raised:
        await once(minute(0, symbol="ETHUSDT"))
    assert not hasattr(raised.value, "__notes__")


async def test_a_window_that_cannot_be_taken_runs_nothing(tmp_path: Path) -> None:
    class Down(MemoryStore):
        async def put(self, write: Write) -> Record:
            raise bk.RetryLater("the store is away")

    kit, work = bk.Kit(tmp_path), Work()
    kit.persistence.bind("interval", Down())
    with pytest.raises(bk.RetryLater) as raised:
        await work.once_by(kit)(minute(0))
    assert work.done == []
    assert not hasattr(raised.value, "__notes__")


async def test_a_record_that_is_no_window_is_named(kit: bk.Kit) -> None:
    work = Work()
    once = work.once_by(kit)
    await once(minute(0))
    store = kit.persistence.store_for(CONTRACTS["interval"], "live")
    (record,) = [each async for each in store.scan(CONTRACTS["interval"])]
    await store.put(Write(CONTRACTS["interval"], record.key, "noon"))
    with pytest.raises(bk.UserError, match="holds 'noon', which is not a window"):
        await once(minute(60))


PROGRAM = """
import asyncio, sys
import backtest_kit as bk
from backtest_kit.persist.urls import store_at
from tests.records.conftest import Minute

kit = bk.Kit(sys.argv[2])
kit.persistence.bind("*", store_at(sys.argv[1]))

@kit.records.interval.once("1m")
async def once(ctx):
    return ctx.when_ms

async def main():
    for window in range(50):
        if await once(Minute(when_ms=window * 60_000)) is not None:
            print(window, flush=True)
    await kit.close()

asyncio.run(main())
"""


async def test_of_several_processes_one_runs_it(shared_address: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, program, shared_address.format(place=tmp_path), tmp_path / str(number)],
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": f"{root / 'src'}:{root}"},
        )
        for number in range(3)
    ]
    ran = [int(line) for process in processes for line in process.communicate(timeout=60)[0].split()]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(ran) == len(set(ran)), "a window was used twice"
    assert 49 in ran
    other = kit_on(shared_address, tmp_path)
    await other.close()
