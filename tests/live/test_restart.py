"""What a position is after a restart, and how it ends."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.live.rig import START, WHERE, Rig, UntilClock

import backtest_kit as bk
from backtest_kit.market.clock import SteppedClock
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Store, Write

SCOPE = ("trend", "demo", "BTCUSDT")


def priced(rig: Rig, price_of: Callable[[int], float], signal: Callable[[bk.Context], bk.Signal | None]) -> Rig:
    """A rig whose price follows the minute, and whose strategy answers once, at the first minute."""

    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> list[list[float]]:
        times = [since_ms + number * MINUTE_MS for number in range(limit)]
        return [[time, *[price_of((time - START) // MINUTE_MS)] * 4, 1.0] for time in times]

    async def get_signal(ctx: bk.Context) -> bk.Signal | None:
        return signal(ctx) if ctx.when_ms == START else None

    rig.source = bk.sources.function(get_candles)
    rig.strategy = {"get_signal": get_signal, "interval": "1m"}
    rig.settings = {"CC_MAX_SIGNAL_LIFETIME_MINUTES": math.inf, "CC_AVG_PRICE_CANDLES_COUNT": 1}
    return rig


def bracket(side: Any, minutes: float = 10_000) -> Callable[[bk.Context], bk.Signal]:
    return lambda ctx: bk.Signal.bracket(side, price=ctx.price, take_profit_pct=2, stop_loss_pct=1, minutes=minutes)


@pytest.mark.parametrize("side", ["long", "short"])
@pytest.mark.parametrize("reason", ["take_profit", "stop_loss"])
@pytest.mark.parametrize("down_minutes", [0, 1, 600])
async def test_a_level_is_kept_over_a_restart(rig: Rig, side: str, reason: str, down_minutes: int) -> None:
    up = (side == "long") == (reason == "take_profit")
    priced(rig, lambda minute: 100.0 if minute < 8 else 104.0 if up else 96.0, bracket(side))
    await rig.trade(4)
    assert not rig.trades()
    rig.now_ms += down_minutes * MINUTE_MS
    await rig.trade(9)
    (trade,) = rig.trades()
    opened = rig.of(bk.PositionOpened)[0].position
    assert trade.close_reason == reason
    level = opened.take_profit if reason == "take_profit" else opened.stop_loss
    assert trade.price_close == pytest.approx(level)
    assert trade.signal_id == opened.signal_id
    assert [hook for hook, *_ in rig.venue.sent("open", "close")] == ["open", "close"]


@pytest.mark.parametrize("down_minutes", [0, 30])
async def test_time_goes_on_while_nobody_watches(rig: Rig, down_minutes: int) -> None:
    priced(rig, lambda minute: 100.0, bracket("long", minutes=20))
    await rig.trade(4)
    rig.now_ms += down_minutes * MINUTE_MS
    await rig.trade(25)
    (trade,) = rig.trades()
    assert trade.close_reason == "time_expired"
    assert trade.closed_at_ms - trade.opened_at_ms == max(20, 4 + down_minutes) * MINUTE_MS


async def test_a_day_of_holding_is_counted_from_the_entry(rig: Rig) -> None:
    priced(rig, lambda minute: 100.0, bracket("long", minutes=1440))
    await rig.trade(3)
    rig.now_ms = START + 1439 * MINUTE_MS
    await rig.trade(0)
    assert not rig.trades()
    await rig.trade(1)
    (trade,) = rig.trades()
    assert trade.closed_at_ms - trade.opened_at_ms == 1440 * MINUTE_MS


async def test_a_position_without_an_end_stays_open(rig: Rig) -> None:
    priced(rig, lambda minute: 100.0, bracket("long", minutes=math.inf))
    await rig.trade(2)
    rig.now_ms += 3000 * MINUTE_MS
    end = await rig.trade(2)
    assert not rig.trades()
    assert end.status.position is not None
    assert end.status.position.minutes == math.inf


async def test_what_is_held_is_restored_whole(rig: Rig) -> None:
    priced(rig, lambda minute: 100.0 + minute * 0.2, bracket("long"))
    rig.settings |= {"CC_ENABLE_DCA_EVERYWHERE": True, "CC_BREAKEVEN_THRESHOLD": 0}

    async def manage(ctx: bk.Context) -> None:
        assert ctx.position is not None
        commands: dict[int, Any] = {
            1: lambda: ctx.position.add(50),
            2: lambda: ctx.position.reduce(percent=30),
            3: lambda: ctx.position.move_stop(100.05),
            4: lambda: ctx.position.move_take(101.5),
        }
        minute = (ctx.when_ms - START) // MINUTE_MS
        if minute in commands:
            assert await commands[minute]()

    rig.strategy["manage"] = manage
    end = await rig.trade(5)
    before = end.status.position
    assert before is not None
    rig.strategy["interval"] = "15m"  # a strategy may be changed between two runs
    again = (await rig.trade(0)).status.position
    assert again == before
    assert (len(again.entries), len(again.reductions), again.stop_loss, again.take_profit) == (2, 1, 100.05, 101.5)
    assert again.peak.price > 100.5
    assert rig.of(bk.Recovered)[-1].position == before


async def test_a_resting_entry_is_restored_and_filled(rig: Rig) -> None:
    priced(
        rig,
        lambda minute: 100.0 if minute < 8 else 98.9,
        lambda ctx: bk.Signal("long", 103.0, 97.0, price_open=99.0),
    )
    await rig.trade(3)
    found = await rig.store.get(CONTRACTS["signal"], SCOPE)
    assert found is None or found.value is None
    entry = (await rig.trade(0)).status.entry
    assert entry is not None
    assert entry.price_open == 99.0
    await rig.trade(8)
    (opened,) = rig.of(bk.PositionOpened)
    assert opened.position.signal_id == entry.signal_id
    assert [hook for hook, *_ in rig.venue.sent("place", "activate")] == ["place", "activate"]


async def test_an_entry_that_has_become_a_position_is_that_position(tmp_path: Path, store: Store) -> None:
    """The batch of an activation that got half-way leaves both records."""
    rig = priced(
        Rig(tmp_path, store), lambda minute: 100.0, lambda ctx: bk.Signal("long", 103.0, 97.0, price_open=99.0)
    )
    await rig.trade(2)
    entry = await store.get(CONTRACTS["schedule"], SCOPE)
    assert entry is not None
    priced(rig, lambda minute: 100.0 if minute < 4 else 98.9, lambda ctx: None)
    await rig.trade(6)
    await store.put(Write(CONTRACTS["schedule"], SCOPE, entry.value))
    end = await rig.trade(1)
    assert end.status.position is not None
    assert end.status.entry is None
    left = await store.get(CONTRACTS["schedule"], SCOPE)
    assert left is not None
    assert left.value is None
    assert len(rig.of(bk.PositionOpened)) == 1


async def test_of_several_positions_each_has_its_own(rig: Rig) -> None:
    """Long on one symbol and short on another, on one store: each goes on, and ends, by its own levels."""
    other = Rig(rig.tmp_path, rig.store)
    for each, side in ((rig, "long"), (other, "short")):
        priced(each, lambda minute: 100.0 if minute < 8 else 104.0, bracket(side))
    held: dict[str, bk.Position | None] = {}
    for each, symbol in ((rig, "BTCUSDT"), (other, "ETHUSDT")):
        held[symbol] = (await each.trade(4, symbol=symbol)).status.position
    for each, symbol in ((rig, "BTCUSDT"), (other, "ETHUSDT")):
        restored = (await each.trade(0, symbol=symbol)).status.position
        assert restored is not None
        assert restored == held[symbol]
        await each.trade(9, symbol=symbol)
    assert [(trade.symbol, trade.side, trade.close_reason) for trade in rig.trades() + other.trades()] == [
        ("BTCUSDT", "long", "take_profit"),
        ("ETHUSDT", "short", "stop_loss"),
    ]


@pytest.mark.parametrize("attempt", ["lost_request", "not_done"])
async def test_a_stop_voids_what_was_not_opened_yet_also_after_a_restart(rig: Rig, attempt: str) -> None:
    priced(rig, lambda minute: 100.0, bracket("long"))
    rig.venue.script["open", 0] = attempt
    under_way = (await rig.trade(0)).status.pending_order
    assert under_way
    sent = len(rig.venue.sent("open"))
    rig.now_ms += MINUTE_MS
    handle = rig.kit(SteppedClock(rig.now_ms, sleepers=1)).live.background("BTCUSDT", **WHERE)
    handle.stop()
    assert await handle == ()
    assert len(rig.venue.sent("open")) == sent
    assert rig.venue.sent("find")
    assert not rig.of(bk.PositionOpened)
    assert not (await rig.trade(3)).status.pending_order
    assert len(rig.venue.sent("open")) == sent, "it is not taken up again by a run that goes on"


FILLED = bk.Fill(price=101.7, cost=101.7, quantity=1.0, reason="take_profit")


async def test_a_take_profit_that_the_venue_has_filled_is_booked_at_its_price_after_a_crash(rig: Rig) -> None:
    priced(rig, lambda minute: 100.0, bracket("long"))
    await rig.trade(3)
    rig.venue.check = lambda position: FILLED
    rig.now_ms += 30 * MINUTE_MS
    end = await rig.trade(0)
    (trade,) = rig.trades()
    assert (trade.close_reason, trade.price_close) == ("take_profit", 101.7)
    assert end.status.position is None
    assert not rig.venue.sent("close")
    await rig.trade(3)
    assert len(rig.trades()) == 1


class RecordedRig(Rig):
    """With what its records are handed: a handler hears of nothing that a crash came before."""

    def __init__(self, tmp_path: Path, store: Store) -> None:
        super().__init__(tmp_path, store)
        self.recorded: list[bk.Trade] = []

    def kit(self, clock: Any) -> bk.Kit:
        async def record(events: Sequence[bk.Event]) -> None:
            self.recorded += [event.trade for event in events if isinstance(event, bk.PositionClosed)]

        kit = super().kit(clock)
        kit.live.observers.append(record)
        return kit


async def test_a_take_profit_that_the_venue_has_filled_is_booked_once_wherever_a_crash_falls(tmp_path: Path) -> None:
    booked = []
    for turns in range(12):
        rig = RecordedRig(tmp_path / str(turns), bk.MemoryStore())
        priced(rig, lambda minute: 100.0, bracket("long"))
        await rig.trade(3)
        asked = asyncio.Event()

        def told(position: bk.Position, asked: asyncio.Event = asked) -> bk.Fill:
            asked.set()
            return FILLED

        rig.venue.check = told
        clock = UntilClock(rig.now_ms, rig.now_ms + 5 * MINUTE_MS)
        handle = rig.kit(clock).live.background("BTCUSDT", **WHERE)
        await asked.wait()
        for _ in range(turns):
            await asyncio.sleep(0)
        handle.cancel()
        await asyncio.wait({handle.task})
        booked.append(len(rig.recorded))
        rig.now_ms = clock.now_ms()
        await rig.trade(2)
        assert {(trade.close_reason, trade.price_close) for trade in rig.recorded} == {("take_profit", 101.7)}
        assert len({(trade.closed_at_ms, trade.signal_id) for trade in rig.recorded}) == 1
        assert (await rig.trade(1)).status.position is None
        assert not rig.venue.sent("close")
    assert booked[0] == 0, "it was cut off before it was in the records"
    assert booked[-1] == 1, "and after it"


async def test_nothing_is_found_where_nothing_was(rig: Rig) -> None:
    priced(rig, lambda minute: 100.0, lambda ctx: None)
    end = await rig.trade(1)
    (recovered,) = rig.of(bk.Recovered)
    assert (recovered.position, recovered.entry, recovered.down_ms, recovered.steps) == (None, None, 0, ())
    assert end.status.position is None


async def test_another_exchange_or_strategy_restores_nothing_and_wipes_nothing(rig: Rig) -> None:
    priced(rig, lambda minute: 100.0, bracket("long"))
    await rig.trade(3)
    mine = await rig.store.get(CONTRACTS["signal"], SCOPE)
    assert mine is not None
    other = Rig(rig.tmp_path, rig.store)
    priced(other, lambda minute: 100.0, lambda ctx: None)
    other.now_ms = rig.now_ms
    assert (await other.trade(1, symbol="ETHUSDT")).status.position is None
    assert await rig.store.get(CONTRACTS["signal"], SCOPE) == mine
    assert (await rig.trade(1)).status.position is not None


async def test_an_id_that_was_used_is_used_up(rig: Rig) -> None:
    """A strategy that gives its signals an id does not trade one twice, also after a restart."""
    priced(rig, lambda minute: 100.0 if minute < 4 else 104.0, bracket("long"))

    async def get_signal(ctx: bk.Context) -> bk.Signal | None:
        return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=2, stop_loss_pct=1, minutes=100, id="once")

    rig.strategy["get_signal"] = get_signal
    await rig.trade(3)
    await rig.trade(3)
    assert len(rig.trades()) == 1
    await rig.trade(5)
    assert [hook for hook, *_ in rig.venue.sent("open")] == ["open"]


async def test_a_stop_ends_with_its_process(rig: Rig) -> None:
    priced(rig, lambda minute: 100.0, lambda ctx: None)
    calls = 0

    async def get_signal(ctx: bk.Context) -> None:
        nonlocal calls
        calls += 1

    rig.strategy["get_signal"] = get_signal
    handle = rig.kit(SteppedClock(rig.now_ms, sleepers=1)).live.background("BTCUSDT", **WHERE)
    handle.stop()
    await handle
    stopped = calls
    await rig.trade(2)
    assert calls > stopped


async def test_without_retries_an_order_is_tried_once(rig: Rig) -> None:
    priced(rig, lambda minute: 100.0, bracket("long"))
    rig.settings |= {"CC_ORDER_OPEN_RETRY_ATTEMPTS": 0}
    rig.venue.script["open", 0] = "lost_request"
    await rig.trade(2)
    await rig.trade(2)
    assert rig.venue.sent("open") == [("open", rig.venue.sent("open")[0][1], 0)]
    assert not rig.of(bk.PositionOpened)


async def test_an_order_under_way_is_no_orphan(rig: Rig) -> None:
    """What the venue has filled of an order nobody has heard of yet is not adopted as somebody else's."""
    priced(rig, lambda minute: 100.0, bracket("long"))
    held = bk.VenuePosition(symbol="BTCUSDT", direction="long", quantity=1.0, price_open=100.0, stop_loss=99.0)

    def fill_and_lose_the_answer() -> str:
        rig.venue.held = [held]
        return "lost_response"

    rig.venue.held = []
    rig.venue.script["open", 1] = fill_and_lose_the_answer
    rig.venue.find_fails = 2
    await rig.trade(0, orphans="adopt")
    await rig.trade(4, orphans="adopt")
    (opened,) = rig.of(bk.PositionOpened)
    assert not opened.position.signal_id.startswith("orphan")
    assert not rig.of(bk.OrphanFound)
    assert [attempt for _, _, attempt in rig.venue.sent("open")] == [0]
