"""The order of events is the same for any mix of handlers, streams and concurrent runs."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import given, settings, strategies as st
from tests.samples import size

from backtest_kit.events import EventBus
from backtest_kit.model.event import Event, Progress, RunDone
from backtest_kit.model.identity import Identity

KINDS: tuple[type[Event], ...] = (Event, Progress, RunDone)


@dataclass(frozen=True)
class Mix:
    """One subscriber."""

    style: str
    kind: type[Event]
    symbol: str | None
    strategy_name: str | None
    delay: int

    def matches(self, event: Event) -> bool:
        return (
            isinstance(event, self.kind)
            and self.symbol in (None, event.symbol)
            and self.strategy_name in (None, event.identity.strategy_name)
        )


MIXES = st.builds(
    Mix,
    style=st.sampled_from(["sync", "async", "once", "stream"]),
    kind=st.sampled_from(KINDS),
    symbol=st.sampled_from([None, "A", "B"]),
    strategy_name=st.sampled_from([None, "trend"]),
    delay=st.integers(0, 3),
)
RUNS = st.lists(
    st.tuples(st.sampled_from("ABC"), st.sampled_from(["trend", "other"]), st.lists(st.booleans(), max_size=6)),
    min_size=1,
    max_size=5,
)


def events_of(run: int, symbol: str, strategy_name: str, kinds: list[bool]) -> list[Event]:
    identity = Identity(symbol, strategy_name, f"run {run}", "day", "backtest")
    return [
        Progress(identity=identity, when_ms=n, fraction=n)
        if is_progress
        else RunDone(identity=identity, when_ms=n, trades=())
        for n, is_progress in enumerate(kinds)
    ]


class Scene:
    """All subscribers on one bus, with what each was given and what each run waited for."""

    def __init__(self, mixes: list[Mix]) -> None:
        self.bus = EventBus()
        self.mixes = mixes
        self.seen: dict[int, list[Event]] = defaultdict(list)
        self.order: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.overlaps = 0
        self.readers: list[asyncio.Task[None]] = []
        for index, mix in enumerate(mixes):
            self.subscribe(index, mix)

    def subscribe(self, index: int, mix: Mix) -> None:
        busy = False

        async def handler(event: Event) -> None:
            nonlocal busy
            self.overlaps += busy
            busy = True
            for _ in range(mix.delay):
                await asyncio.sleep(0)
            self.seen[index].append(event)
            self.order[event.identity.exchange_name].append((event.when_ms, index))
            busy = False

        def sync_handler(event: Event) -> None:
            self.seen[index].append(event)
            self.order[event.identity.exchange_name].append((event.when_ms, index))

        if mix.style == "stream":
            stream = self.bus.events(mix.kind, symbol=mix.symbol, strategy_name=mix.strategy_name, limit=1 + mix.delay)

            async def read() -> None:
                async for event in stream:
                    for _ in range(mix.delay):
                        await asyncio.sleep(0)
                    self.seen[index].append(event)

            self.readers.append(asyncio.create_task(read()))
        else:
            self.bus.on(
                mix.kind,
                sync_handler if mix.style == "sync" else handler,
                symbol=mix.symbol,
                strategy_name=mix.strategy_name,
                once=mix.style == "once",
            )

    async def play(self, runs: list[list[Event]]) -> None:
        async def run(events: list[Event]) -> None:
            for event in events:
                await self.bus.emit(event)

        await asyncio.gather(*(run(events) for events in runs))
        self.bus.close()
        await asyncio.gather(*self.readers)


@pytest.mark.sampled
@settings(max_examples=size(40, 150), deadline=None)
@given(mixes=st.lists(MIXES, max_size=6), drawn=RUNS)
def test_each_sees_exactly_what_it_asked_for_in_order(
    mixes: list[Mix], drawn: list[tuple[str, str, list[bool]]]
) -> None:
    runs = [events_of(number, *each) for number, each in enumerate(drawn)]

    async def play() -> Scene:
        scene = Scene(mixes)
        await asyncio.wait_for(scene.play(runs), 20)
        return scene

    scene = asyncio.run(play())
    assert scene.overlaps == 0
    for index, mix in enumerate(mixes):
        matching = [[event for event in events if mix.matches(event)] for events in runs]
        if mix.style == "once":
            assert scene.seen[index] in ([[events[0]] for events in matching if events] or [[]])
            continue
        for number, expected in enumerate(matching):
            name = f"run {number}"
            assert [event for event in scene.seen[index] if event.identity.exchange_name == name] == expected
        assert len(scene.seen[index]) == sum(map(len, matching))
    lasting = {index for index, mix in enumerate(mixes) if mix.style in ("sync", "async")}
    for number, events in enumerate(runs):
        waited_for = [each for each in scene.order[f"run {number}"] if each[1] in lasting]
        assert waited_for == [
            (event.when_ms, index) for event in events for index in sorted(lasting) if mixes[index].matches(event)
        ]
