"""Clocks and brokers that several runs share."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.live.rig import START, WHERE, Venue, always_long

import backtest_kit as bk
from backtest_kit.errors import RetryLater
from backtest_kit.market.clock import SteppedClock
from backtest_kit.run.services import Services


class Counted:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.fails = 0

    async def start(self) -> None:
        await asyncio.sleep(0)
        if self.fails:
            self.fails -= 1
            raise RetryLater("away")
        self.said.append("start")

    async def stop(self) -> None:
        await asyncio.sleep(0)
        self.said.append("stop")


async def test_the_last_user_stops_what_the_first_one_started() -> None:
    services, service, leave = Services(), Counted(), asyncio.Event()

    async def user() -> None:
        async with services.use(service):
            await leave.wait()

    users = [asyncio.create_task(user()) for _ in range(3)]
    await asyncio.sleep(0.01)
    users[0].cancel()
    await asyncio.wait({users[0]})
    assert service.said == ["start"]
    leave.set()
    await asyncio.gather(*users[1:])
    assert service.said == ["start", "stop"]
    async with services.use(service):
        assert service.said == ["start", "stop", "start"]


async def test_what_could_not_be_started_is_started_by_the_next() -> None:
    services, service = Services(), Counted()
    service.fails = 1
    with pytest.raises(RetryLater):
        async with services.use(service):
            pass
    async with services.use(service):
        pass
    assert service.said == ["start", "stop"]


async def test_the_end_of_one_run_leaves_clock_and_broker_to_the_others(tmp_path: Path) -> None:
    said = []

    class Broker(Venue):
        async def start(self) -> None:
            said.append("broker starts")

        async def stop(self) -> None:
            said.append("broker stops")

    class Clock(SteppedClock):
        async def start(self) -> None:
            said.append("clock starts")

        async def stop(self) -> None:
            said.append("clock stops")

    kit = bk.Kit(tmp_path)
    kit.persistence.bind("*", bk.MemoryStore())
    kit.add_exchange_schema("demo", source=bk.sources.synthetic(7), broker=Broker(), clock=Clock(START))
    kit.add_strategy_schema("trend", get_signal=always_long)
    first, second = (kit.live.background(symbol, **WHERE) for symbol in ("BTCUSDT", "ETHUSDT"))
    await first._run.began.wait()
    await second._run.began.wait()
    first.cancel()
    await asyncio.wait({first.task})
    assert said == ["clock starts", "broker starts"]
    second.cancel()
    await asyncio.wait({second.task})
    assert said == ["clock starts", "broker starts", "broker stops", "clock stops"]
