"""Handlers: which events they get and what they are given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from backtest_kit.errors import UserError
from backtest_kit.events import EventBus
from backtest_kit.model.event import Event, Progress, RunDone, RunFailed
from backtest_kit.model.identity import Identity

MakeEvent = Callable[..., Progress]
IDENTITY = Identity("BTCUSDT", "trend", "demo", "day", "backtest")
DONE = RunDone(identity=IDENTITY, when_ms=0, trades=())
FAILED = RunFailed(identity=IDENTITY, when_ms=0, error=ValueError("x"))


async def test_a_handler_gets_the_kinds_it_asked_for(progress: MakeEvent) -> None:
    bus = EventBus()
    one: list[Event] = []
    two: list[Event] = []
    all_of_them: list[Event] = []
    bus.on(RunDone, one.append)
    bus.on((RunDone, Progress), two.append)
    bus.on(Event, all_of_them.append)
    moved = progress()
    for event in (moved, DONE, FAILED):
        await bus.emit(event)
    assert one == [DONE]
    assert two == [moved, DONE]
    assert all_of_them == [moved, DONE, FAILED]


async def test_filters_by_symbol_and_strategy(progress: MakeEvent) -> None:
    bus = EventBus()
    seen: list[tuple[str, str]] = []
    bus.on(Progress, lambda event: seen.append(("symbol", event.symbol)), symbol="A")
    bus.on(Progress, lambda event: seen.append(("strategy", event.symbol)), strategy_name="trend")
    bus.on(Progress, lambda event: seen.append(("both", event.symbol)), symbol="A", strategy_name="trend")
    await bus.emit(progress(symbol="A"))
    await bus.emit(progress(symbol="B"))
    await bus.emit(progress(symbol="A", strategy_name="other"))
    assert seen == [("symbol", "A"), ("strategy", "A"), ("both", "A"), ("strategy", "B"), ("symbol", "A")]


class Callee:
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    async def __call__(self, event: Progress, ctx: object) -> None:
        self.log.append((event.fraction, ctx))

    def method(self, event: Progress, ctx: object = "unset") -> None:
        self.log.append((event.fraction, ctx))


async def test_the_context_goes_to_those_who_take_it(progress: MakeEvent) -> None:
    bus = EventBus()
    log: list[Any] = []
    callee = Callee(log)

    def bound(extra: str, event: Progress, ctx: object) -> None:
        log.append((extra, event.fraction, ctx))

    bus.on(Progress, lambda event: log.append(event.fraction))
    bus.on(Progress, lambda event, ctx: log.append((event.fraction, ctx)))
    bus.on(Progress, callee)
    bus.on(Progress, callee.method)
    bus.on(Progress, functools.partial(bound, "partial"))
    bus.on(Progress, lambda event, kept="mine": log.append((event.fraction, kept)))
    bus.on(Progress, lambda *given: log.append(len(given)))
    await bus.emit(progress(1), "ctx")
    assert log == [1, (1, "ctx"), (1, "ctx"), (1, "ctx"), ("partial", 1, "ctx"), (1, "mine"), 1]


async def test_a_builtin_that_hides_its_signature_is_given_the_event(progress: MakeEvent) -> None:
    bus = EventBus()
    counts: dict[Event, int] = {}
    event = progress()
    bus.on(Progress, functools.partial(counts.setdefault, event))
    bus.on(Progress, type)  # has no signature to look at
    await bus.emit(event)
    assert list(counts) == [event]


async def generator(event: Event) -> Any:
    yield event


def no_arguments() -> None: ...


def too_many(event: Event, ctx: object, more: object) -> None: ...


def by_keyword(event: Event, *, more: object) -> None: ...


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ("print", r"'print' is not a function: give a function of \(event\) or \(event, ctx\)"),
        (generator, "generator has a yield"),
        (no_arguments, r"no_arguments takes \(\)"),
        (too_many, "too_many takes .*more"),
        (by_keyword, "by_keyword takes .*more"),
    ],
)
def test_a_wrong_handler_is_refused_by_name(handler: Any, message: str) -> None:
    bus = EventBus()
    with pytest.raises(UserError, match=message):
        bus.on(Event, handler)
    assert not bus.wanted(RunDone, symbol="A", strategy_name="trend")


@pytest.mark.parametrize(
    ("kind", "filters", "message"),
    [
        ("done", {}, "kind is 'done'"),
        (DONE, {}, "kind is RunDone"),
        (int, {}, "kind is <class 'int'>"),
        ((), {}, "no kind of event is given"),
        (RunDone, {"symbol": ["A"]}, r"symbol is \['A'\]"),
        (RunDone, {"strategy_name": 5}, "strategy_name is 5"),
    ],
)
def test_wrong_kinds_and_filters_are_refused(kind: Any, filters: dict[str, Any], message: str) -> None:
    bus = EventBus()
    with pytest.raises(UserError, match=message):
        bus.on(kind, print, **filters)
    with pytest.raises(UserError, match=message):
        bus.events(*(kind if isinstance(kind, tuple) else (kind,)), **filters)


async def test_unsubscribing_twice_is_once() -> None:
    bus = EventBus()
    seen: list[Event] = []
    off = bus.on(RunDone, seen.append)
    bus.on(RunDone, lambda event: None)
    off()
    version = bus.version
    off()
    assert bus.version == version
    await bus.emit(DONE)
    assert seen == []


async def test_changes_during_an_emission_take_effect_with_the_next(progress: MakeEvent) -> None:
    bus = EventBus()
    log: list[str] = []

    def change(event: Progress) -> None:
        off_second()
        bus.on(Progress, lambda event: log.append(f"late {event.fraction:g}"))
        off_change()

    off_change = bus.on(Progress, change)
    off_second = bus.on(Progress, lambda event: log.append(f"second {event.fraction:g}"))
    await bus.emit(progress(1))
    await bus.emit(progress(2))
    assert log == ["second 1", "late 2"]


async def test_wanted_follows_the_subscriptions() -> None:
    bus = EventBus()

    def wanted(kind: type[Event], symbol: str = "A", strategy_name: str = "trend") -> bool:
        return bus.wanted(kind, symbol=symbol, strategy_name=strategy_name)

    versions = [bus.version]
    assert not wanted(RunDone)
    off = bus.on(RunDone, print, symbol="A", strategy_name="trend")
    versions.append(bus.version)
    assert wanted(RunDone)
    assert not wanted(RunDone, symbol="B")
    assert not wanted(RunDone, strategy_name="other")
    assert not wanted(Progress)
    stream = bus.events(Event)
    versions.append(bus.version)
    assert wanted(Progress, "B")
    await stream.aclose()
    versions.append(bus.version)
    assert not wanted(Progress, "B")
    off()
    versions.append(bus.version)
    assert not wanted(RunDone)
    bus.on(RunDone, lambda event: None, once=True)
    versions.append(bus.version)
    await bus.emit(DONE)
    versions.append(bus.version)
    assert not wanted(RunDone)
    assert len(set(versions)) == len(versions)


async def test_close_ends_handlers_and_the_bus_can_be_used_again() -> None:
    bus = EventBus()
    seen: list[str] = []
    bus.on(RunDone, lambda event: seen.append("before"))
    bus.close()
    await bus.emit(DONE)
    bus.on(RunDone, lambda event: seen.append("after"))
    await bus.emit(DONE)
    assert seen == ["after"]
