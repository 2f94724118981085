"""Cached answers: asked for once, by everyone, whatever else is defined and however often the program starts."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.records.conftest import MINUTE_MS, NOON_MS, Minute, kit_on
from tests.records.models import Model

import backtest_kit as bk
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.store import Record, Write
from backtest_kit.records.measure import Cached


async def test_an_answer_is_asked_for_once_in_each_window(kit: bk.Kit) -> None:
    model = Model()
    ask = model.cached_by(kit)
    answers = [await ask(Minute(when_ms=NOON_MS + minute * MINUTE_MS), "hi") for minute in range(31)]
    assert [answer["number"] for answer in answers] == [1] * 15 + [2] * 15 + [3]
    assert answers[0] == answers[1] == {"answer": "HI", "number": 1, "pair": [1, 2]}
    assert await ask(Minute(), "other") == {"answer": "OTHER", "number": 4, "pair": [1, 2]}
    assert await ask(Minute(), prompt="other") == await ask(ctx=Minute(), prompt="other")
    assert await ask(Minute()) == await ask(Minute(), "hello"), "a default is an argument like any other"
    assert len(model.asked) == 5


async def test_an_answer_without_an_interval_holds_for_ever(kit: bk.Kit) -> None:
    model = Model()
    ask = model.cached_by(kit, None)
    for day in range(3):
        assert (await ask(Minute(when_ms=NOON_MS + day * 24 * 60 * MINUTE_MS)))["number"] == 1
    assert (await ask(None, "no time at all"))["number"] == 2
    assert (await ask(None, "no time at all"))["number"] == 2


async def test_what_tells_calls_apart(kit: bk.Kit) -> None:
    model = Model()
    ask = model.cached_by(kit)
    for moment in (
        Minute(), Minute(symbol="ETHUSDT"), Minute(exchange_name="kraken"), Minute(symbol="BTCUSDT", strategy_name="b"),
        Minute(mode="paper"), Minute(mode="backtest", run_id="r"),
    ):  # fmt: skip
        await ask(moment)
    assert len(model.asked) == 3, "exchange and symbol; strategies, modes and runs share what costs money"
    by_key = Model()
    ask = by_key.cached_by(kit, key=lambda ctx, prompt: prompt[0], name="by-key")
    for symbol, prompt in (("BTCUSDT", "one"), ("ETHUSDT", "other"), ("BTCUSDT", "two")):
        await ask(Minute(symbol=symbol), prompt)
    assert by_key.asked == ["one", "two"]
    long = "x" * 100_000
    assert (await ask(Minute(), long))["answer"] == (await ask(Minute(), long))["answer"]


PASSED: dict[str, Callable[[Any, Any, str], Any]] = {
    "first": lambda asks, ctx, text: asks["context"](ctx, text),
    "by its name": lambda asks, ctx, text: asks["context"](context=ctx, text=text),
    "last": lambda asks, ctx, text: asks["at_the_end"](text, ctx),
    "last by its name": lambda asks, ctx, text: asks["at_the_end"](text, context=ctx),
    "only by its name": lambda asks, ctx, text: asks["by_name_only"](text, context=ctx),
    "among any number": lambda asks, ctx, text: asks["any_number"](text, ctx),
    "under any name": lambda asks, ctx, text: asks["any_name"](text=text, whatever=ctx),
    "beside the arguments": lambda asks, ctx, text: asks["none"](text, ctx=ctx),
    "as ctx among any names": lambda asks, ctx, text: asks["any_name"](text=text, ctx=ctx),
    "twice": lambda asks, ctx, text: asks["context"](ctx, text, ctx=ctx),
}


def asks_of(kit: bk.Kit, interval: str | None = None) -> dict[str, Cached[Any]]:
    async def context(context: Any, text: str) -> Any: ...
    async def at_the_end(text: str, context: Any = None) -> Any: ...
    async def by_name_only(text: str, *, context: Any) -> Any: ...
    async def any_number(*given: Any) -> Any: ...
    async def any_name(**given: Any) -> Any: ...
    async def none(text: str) -> Any: ...

    functions = (context, at_the_end, by_name_only, any_number, any_name, none)
    return {
        each.__name__: kit.records.measure.cached(interval, name=each.__name__, version="1")(counted(each))
        for each in functions
    }


def counted(function: Any) -> Any:
    """`function`, which returns how often it was called."""
    calls = itertools.count(1)

    @functools.wraps(function)
    async def count(*args: Any, **kwargs: Any) -> int:
        await function(*args, **kwargs)
        return next(calls)

    return count


@pytest.mark.parametrize("passed", PASSED)
@pytest.mark.parametrize("interval", [None, "1h"])
async def test_a_context_is_found_however_it_is_passed(tmp_path: Path, passed: str, interval: str | None) -> None:
    kit = kit_on("memory:", tmp_path)
    asks, ask = asks_of(kit, interval), PASSED[passed]
    later = Minute(when_ms=NOON_MS + MINUTE_MS)
    assert await ask(asks, later, "up?") == 1
    assert await ask(asks, later, "up?") == 1
    assert await ask(asks, Minute(symbol="ETHUSDT"), "up?") == 2, "another symbol"
    assert await ask(asks, Minute(symbol="ETHUSDT"), "down?") == 3, "another question"
    assert await ask(asks, Minute(), "up?") == 4, "what is kept is of a later minute"
    assert await ask(asks, Minute(exchange_name="kraken"), "up?") == 5, "another exchange"
    await kit.close()


async def test_a_call_has_one_context(tmp_path: Path) -> None:
    kit = kit_on("memory:", tmp_path)
    asks = asks_of(kit)
    with pytest.raises(bk.UserError, match=r"2 contexts \(BTCUSDT at .*, ETHUSDT at "):
        await asks["any_number"](Minute(), Minute(symbol="ETHUSDT"))
    with pytest.raises(bk.UserError, match="2 contexts"):
        await asks["context"](Minute(), "up?", ctx=Minute(symbol="ETHUSDT"))
    await kit.close()


async def test_a_time_can_be_given_by_hand(kit: bk.Kit) -> None:
    times: list[object] = []

    @kit.records.measure.cached("1h", name="dated", version="1")
    async def plain(prompt: str) -> str:
        times.append(prompt)
        return prompt

    @kit.records.measure.cached("1h", name="takes-when", version="1")
    async def takes_when(when: str) -> str:
        times.append(when)
        return when

    assert await plain("a", when="2024-06-01T12:10") == await plain("a", when=NOON_MS)
    assert await plain("a", ctx=Minute(when_ms=NOON_MS + 59 * MINUTE_MS)) == "a"
    assert await takes_when(when="2024-06-01") == "2024-06-01"
    assert times == ["a", "a", "a", "2024-06-01"], "10 past is not seen at noon, and a context adds its symbol"
    with pytest.raises(bk.UserError, match="called without a time"):
        await plain("a")
    with pytest.raises(bk.LookAhead, match="later than the context"):
        await plain("a", ctx=Minute(), when=NOON_MS + MINUTE_MS)
    with pytest.raises(bk.UserError, match=r"ctx of .* is 7"):
        await plain("a", ctx=7)
    with pytest.raises(bk.UserError, match="arguments that it does not take"):
        await plain()


async def test_an_answer_of_a_later_time_is_not_used(kit: bk.Kit) -> None:
    model = Model()
    ask = model.cached_by(kit, None)
    later, now = Minute(when_ms=NOON_MS + MINUTE_MS), Minute()
    assert (await ask(later))["number"] == 1
    assert (await ask(now))["number"] == 2
    assert (await ask(later))["number"] == 2, "the earlier answer serves both"


async def test_an_answer_for_an_earlier_time_is_as_late_as_what_it_knows(kit: bk.Kit) -> None:
    model = Model()
    ask = model.cached_by(kit, "1h")
    assert (await ask(Minute(when_ms=NOON_MS + 90 * MINUTE_MS), when=NOON_MS))["number"] == 1
    assert (await ask(Minute(when_ms=NOON_MS + 95 * MINUTE_MS), when=NOON_MS))["number"] == 1
    assert (await ask(Minute(when_ms=NOON_MS + 30 * MINUTE_MS)))["number"] == 2, "it knew of half past one"


async def test_a_caller_does_not_wait_for_an_answer_of_its_future(kit: bk.Kit) -> None:
    gate, asked = asyncio.Event(), []

    @kit.records.measure.cached("1h", name="slow", version="1")
    async def slow(ctx: Any) -> int:
        asked.append(ctx.when_ms)
        if ctx.when_ms > NOON_MS:
            await gate.wait()
        return int(ctx.when_ms)

    late = asyncio.create_task(slow(Minute(when_ms=NOON_MS + MINUTE_MS)))
    while not asked:
        await asyncio.sleep(0)
    assert await slow(Minute()) == NOON_MS
    gate.set()
    assert await late == NOON_MS + MINUTE_MS


async def test_callers_at_the_same_time_share_one_call(kit: bk.Kit) -> None:
    model = Model()
    ask = model.cached_by(kit)
    answers = await asyncio.gather(*(ask(Minute(), "hi") for _ in range(50)))
    assert len(model.asked) == 1
    answers[0]["answer"] = "changed"
    assert {answer["answer"] for answer in answers[1:]} == {"HI"}, "each has a copy of its own"


async def test_the_cancelling_of_one_caller_leaves_the_others_their_answer(kit: bk.Kit) -> None:
    begun, gate, ended = asyncio.Event(), asyncio.Event(), list[str]()

    @kit.records.measure.cached(name="slow", version="1")
    async def slow(prompt: str) -> str:
        begun.set()
        try:
            await gate.wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        ended.append("answered")
        return prompt

    async def started() -> list[asyncio.Task[Any]]:
        begun.clear()
        callers = [asyncio.create_task(slow("a")) for _ in range(3)]
        await begun.wait()
        return callers

    callers = await started()
    for caller in callers[:2]:
        caller.cancel()
    assert await asyncio.gather(*callers[:2], return_exceptions=True)
    gate.set()
    assert (await callers[2], ended) == ("a", ["answered"])

    gate.clear()
    await slow.clear()
    callers = await started()
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    gate.set()
    assert await slow("a") == "a", "whoever comes after the last one asks anew"
    while len(ended) < 3:
        await asyncio.sleep(0)
    assert sorted(ended) == ["answered", "answered", "cancelled"]


async def test_what_the_function_raises_is_not_kept(kit: bk.Kit) -> None:
    tries: list[int] = []

    @kit.records.measure.cached(name="flaky", version="1")
    async def flaky(prompt: str) -> str:
        tries.append(1)
        await asyncio.sleep(0)
        if len(tries) < 3:
            raise ConnectionError("down")
        return prompt

    failed = await asyncio.gather(*(flaky("a") for _ in range(5)), return_exceptions=True)
    assert [type(each) for each in failed] == [ConnectionError] * 5
    with pytest.raises(ConnectionError, match="down"):
        await flaky("a")
    assert await flaky("a") == await flaky("a") == "a"
    assert len(tries) == 3


async def test_an_answer_that_cannot_be_stored_is_refused(kit: bk.Kit) -> None:
    @kit.records.measure.cached(name="strange", version="1")
    async def strange(given: object) -> object:
        return {"value": {1, 2}}

    with pytest.raises(bk.UserError, match=r"returned.value is a set"):
        await strange("a")
    with pytest.raises(bk.UserError, match=r"given is a object.*key="):
        await strange(object())


async def test_none_is_an_answer(kit: bk.Kit) -> None:
    asked: list[str] = []

    @kit.records.measure.cached(name="none", version="1")
    async def none(prompt: str) -> object:
        asked.append(prompt)
        return None

    assert (await none("a"), await none("a")) == (None, None)
    assert asked == ["a"]


async def test_answers_are_listed_removed_and_cleared(kit: bk.Kit) -> None:
    model, other = Model(), Model()
    ask, beside = model.cached_by(kit), other.cached_by(kit, name="beside")
    for prompt in ("a", "b", "c"):
        await ask(Minute(), prompt)
    await beside(Minute())
    listed = await ask.list()
    assert [answer["answer"] for answer in listed.values()] == ["C", "B", "A"]
    assert all(key.startswith("2024-06-01T1200Z 15m ") for key in listed)
    assert await ask.remove(Minute(), "b")
    assert not await ask.remove(Minute(), "b")
    assert len(await ask.list()) == 2
    assert (await ask(Minute(), "b"))["number"] == 4
    assert await ask.clear() == 3
    assert (await ask.list(), len(await beside.list())) == ({}, 1)
    assert (await ask(Minute(), "a"))["number"] == 5


async def test_a_full_disk_costs_the_answer_s_keeping_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(MemoryStore):
        async def put(self, write: Write) -> Record:
            raise bk.OutOfSpace("no space left")

    kit, model = bk.Kit(tmp_path), Model()
    kit.persistence.bind("measure", Full())
    ask = model.cached_by(kit)
    with caplog.at_level(logging.WARNING):
        assert (await ask(Minute()))["number"] == 1
    assert "could not be cached: no space left" in caplog.text
    assert (await ask(Minute()))["number"] == 2


async def test_answers_survive_the_program(shared_address: str, tmp_path: Path) -> None:
    code = """
        import asyncio, sys
        from pathlib import Path
        import backtest_kit as bk
        from backtest_kit.persist.urls import store_at

        kit = bk.Kit(sys.argv[2])
        kit.persistence.bind("*", store_at(sys.argv[1]))

        @kit.records.measure.cached("1h")
        async def ask(prompt):
            print("asked", flush=True)
            return {"answer": prompt}

        async def main():
            print((await ask("hi", when="2024-06-01T12:30"))["answer"])
            await kit.close()

        asyncio.run(main())
    """
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(code))
    address = shared_address.format(place=tmp_path)
    outputs = [
        subprocess.run(
            [sys.executable, program, address, tmp_path / "files"], capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert [done.stdout.split() for done in outputs] == [["asked", "hi"], ["hi"]]


async def test_a_strategy_asks_its_model_once_in_each_window(kit: bk.Kit, backtest: Callable[..., Any]) -> None:
    model = Model()
    ask = model.cached_by(kit, "1h")

    async def get_signal(ctx: bk.Context) -> None:
        await ask(ctx, "what now?")

    await backtest(get_signal)
    assert len(model.asked) == 24
    await backtest(get_signal)
    assert len(model.asked) == 24, "a second run costs nothing"


async def test_a_method_and_a_struct(kit: bk.Kit) -> None:
    class Answer(msgspec.Struct):
        text: str

    class RunState:
        @kit.records.measure.cached(key=lambda self, prompt: prompt, name="desk", version="1")
        async def ask(self, prompt: str) -> Any:
            return Answer(prompt)

    assert await RunState().ask("a") == {"text": "a"}
    assert await RunState().ask("a") == {"text": "a"}


async def test_two_programs_see_each_other_s_answers(shared_address: str, tmp_path: Path) -> None:
    kits, models = [kit_on(shared_address, tmp_path) for _ in range(2)], [Model(), Model()]
    first, second = (model.cached_by(kit) for model, kit in zip(models, kits, strict=True))
    assert await first(Minute()) == await second(Minute())
    assert [len(model.asked) for model in models] == [1, 0]
    for kit in kits:
        await kit.close()
