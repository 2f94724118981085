"""Risk profiles that several programs share through one store."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.live.rig import START, Rig, UntilClock, Venue, always_long

import backtest_kit as bk
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import ANY, Store, Write

RISK = CONTRACTS["risk"]


def at_most(count: int) -> Any:
    async def validate(request: bk.RiskRequest) -> str | None:
        await asyncio.sleep(0)
        return f"{count} are held" if len(request.positions) >= count else None

    return validate


def program(tmp_path: Path, store: Store, venue: Venue, clock: Any, events: list[bk.Event], limit: int) -> bk.Kit:
    """One of several that run at the same time, as processes would: a kit of its own on the same store."""
    kit = bk.Kit(tmp_path / "dump")
    kit.persistence.bind("*", store)
    kit.add_risk_schema("few", validations=[at_most(limit)])
    kit.add_risk_schema("all", validations=[])
    kit.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7), broker=venue, clock=clock)
    kit.add_strategy_schema("trend", get_signal=always_long, interval="1m", risk_names=["all", "few"])
    kit.on(bk.Event, events.append)
    return kit


@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_programs_that_open_at_the_same_moment_stay_within_the_limit(
    tmp_path: Path, store: Store, limit: int
) -> None:
    symbols = ["BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT", "ADAUSDT"]
    events: list[bk.Event] = []
    venue, clocks, handles = Venue(), [], []
    for symbol in symbols:
        clock = UntilClock(START, START + 3 * MINUTE_MS)
        kit = program(tmp_path, store, venue, clock, events, limit)
        handles.append(kit.live.background(symbol, strategy_name="trend", exchange_name="demo", allow_weak=True))
        clocks.append(clock)
    await asyncio.gather(*(clock.over.wait() for clock in clocks))
    opened = {event.symbol for event in events if isinstance(event, bk.PositionOpened)}
    assert len(opened) == limit
    assert len(venue.sent("open")) == limit
    assert {event.symbol for event in events if isinstance(event, bk.RiskRejected)} == {*symbols} - opened
    for name in ("few", "all"):
        record = await store.get(RISK, ("demo", name))
        assert record is not None
        assert isinstance(record.value, dict)
        assert {slot["entry"]["identity"]["symbol"] for slot in record.value.values()} == opened  # type: ignore[call-overload, index]
    for handle in handles:
        handle.cancel()
    await asyncio.wait({handle.task for handle in handles})
    assert not [event for event in events if isinstance(event, bk.StrategyFailed | bk.RunFailed)]


async def slots(rig: Rig) -> dict[str, Any]:
    record = await rig.store.get(RISK, ("demo", "one"))
    assert record is None or isinstance(record.value, dict)
    return {} if record is None else dict(record.value)  # type: ignore[arg-type]


@pytest.fixture
def risky(rig: Rig) -> Rig:
    rig.risks = {"one": [at_most(1)]}
    rig.strategy |= {"risk_name": "one"}
    return rig


async def test_a_slot_is_taken_with_the_position_and_given_back_with_it(risky: Rig) -> None:
    risky.strategy["get_signal"] = lambda ctx: (
        bk.Signal.bracket("long", price=ctx.price, take_profit_pct=9, stop_loss_pct=9, minutes=3)
        if ctx.when_ms == START
        else None
    )
    await risky.trade(2)
    ((_, slot),) = (await slots(risky)).items()
    assert (slot["entry"]["identity"]["symbol"], slot["openedAtMs"]) == ("BTCUSDT", START)
    await risky.trade(2)
    assert len(risky.trades()) == 1
    assert await slots(risky) == {}


async def test_a_slot_that_was_lost_is_asserted_again_at_a_start(risky: Rig) -> None:
    await risky.trade(2)
    before = await slots(risky)
    await risky.store.put(Write(RISK, ("demo", "one"), {}, expect=ANY))
    await risky.trade(0)
    assert await slots(risky) == before
    assert before


async def test_an_order_that_is_refused_gives_its_slot_back(risky: Rig) -> None:
    risky.venue.script["open", 1] = "rejected"
    await risky.trade(1)
    assert await slots(risky) == {}


async def test_the_slot_of_a_dead_program_does_not_block_for_ever(risky: Rig) -> None:
    await risky.trade(1)
    (name,) = await slots(risky)
    record = await risky.store.get(RISK, ("demo", "one"))
    assert record is not None
    dead = {name.replace("BTCUSDT", "DEAD"): next(iter((await slots(risky)).values()))}
    await risky.store.put(Write(RISK, ("demo", "one"), dead, expect=ANY))
    other = Rig(risky.tmp_path, risky.store)
    other.risks, other.strategy = risky.risks, risky.strategy
    await other.trade(1, symbol="ETHUSDT")
    assert other.of(bk.RiskRejected)
    other.now_ms = START + (600 + 121) * MINUTE_MS
    await other.trade(15, symbol="ETHUSDT")
    assert other.of(bk.PositionOpened)
    assert [slot["entry"]["identity"]["symbol"] for slot in (await slots(risky)).values()] == ["ETHUSDT"]
