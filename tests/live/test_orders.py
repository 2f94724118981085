"""What becomes of an order that is lost, refused, or that the venue is silent about."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from tests.live.rig import START, Rig
from tests.live.scenario import MINUTES, prepared, price_at

import backtest_kit as bk
from backtest_kit.broker.base import SENDING, OrderKind
from backtest_kit.market.clock import SteppedClock
from backtest_kit.model.interval import MINUTE_MS

HOOKS = ("open", "place", "activate", "cancel", "add", "reduce", "close", "move_stop", "move_take")


def minute_of(event: bk.Event) -> int:
    return (event.when_ms - START) // MINUTE_MS


@pytest.fixture
def story(memory_rig: Rig) -> Rig:
    return prepared(memory_rig)


@pytest.mark.parametrize("hook", HOOKS)
async def test_an_order_whose_answer_was_lost_is_found_and_not_sent_again(story: Rig, hook: str) -> None:
    story.venue.script[hook, 1] = "lost_response"
    await story.trade(MINUTES)
    first = next(call for call in story.venue.calls if call[0] == hook)
    again = [call for call in story.venue.sent(hook) if call[1] == first[1]]
    assert again == [first]
    assert ("find", first[1], 0) in story.venue.calls
    (failed,) = story.of(bk.OrderFailed)
    assert (failed.kind, failed.alarm) == ("breakeven" if hook == "move_stop" else hook, False)
    assert set(story.venue.times_done.values()) == {1}
    assert len(story.trades()) == 2
    assert not story.of(bk.StrategyFailed)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("fault", ["lost_request", "not_done"])
async def test_an_order_that_did_not_arrive(story: Rig, hook: str, fault: str) -> None:
    story.venue.script[hook, 1] = fault
    await story.trade(MINUTES)
    first = next(call for call in story.venue.calls if call[0] == hook)
    times = [call for call in story.venue.sent(hook) if call[1] == first[1]]
    if hook in ("open", "place", "close", "cancel"):
        assert times == [first, (hook, first[1], 1)]
    else:
        assert times[0] == first  # a command is dropped; an entry goes on resting
    assert set(story.venue.times_done.values()) <= {1}
    assert story.of(bk.OrderFailed)
    closed = {trade.signal_id for trade in story.trades()}
    opened = {event.position.signal_id for event in story.of(bk.PositionOpened)}
    assert closed == opened


async def test_an_open_that_arrives_later_is_made_at_the_price_of_then(story: Rig) -> None:
    story.venue.script["open", 1] = "lost_request"
    await story.trade(4)
    (opened,) = story.of(bk.PositionOpened)
    assert minute_of(opened) == 2
    assert opened.position.price_open == pytest.approx(price_at(START + MINUTE_MS) - 0.2)


async def test_an_open_that_makes_no_sense_any_more_is_given_up(story: Rig) -> None:
    def get_signal(ctx: bk.Context) -> bk.Signal | None:
        first = ctx.when_ms == START + MINUTE_MS
        return bk.Signal("long", ctx.price + 0.15, ctx.price - 1) if first else None

    story.settings |= {"CC_MIN_TAKEPROFIT_DISTANCE_PERCENT": 0, "CC_MIN_STOPLOSS_DISTANCE_PERCENT": 0}
    story.strategy = {"get_signal": get_signal, "interval": "1m"}
    story.venue.script["open", 1] = "lost_request"
    story.venue.find_fails = 1
    await story.trade(5)
    assert not story.of(bk.PositionOpened)
    assert story.of(bk.OrderFailed)[-1].next_step == "it was given up"
    assert "the market has moved" in story.of(bk.OrderFailed)[-1].reason
    assert len(story.venue.sent("open")) == 1


@pytest.mark.parametrize("hook", ["open", "place"])
async def test_an_order_to_open_is_given_up_in_the_end(story: Rig, hook: str) -> None:
    story.settings["CC_ORDER_OPEN_RETRY_ATTEMPTS"] = 2
    for number in (1, 2, 3):
        story.venue.script[hook, number] = "lost_request"
    await story.trade(MINUTES)
    first = next(call for call in story.venue.calls if call[0] == hook)
    assert [call for call in story.venue.sent(hook) if call[1] == first[1]] == [(hook, first[1], n) for n in range(3)]
    last = [failed for failed in story.of(bk.OrderFailed) if failed.alarm]
    assert [failed.next_step for failed in last] == ["it was given up"]
    status = (await story.trade(1)).status
    assert not status.pending_order


@pytest.mark.parametrize("restart", [False, True])
async def test_a_close_is_never_given_up(story: Rig, restart: bool) -> None:
    story.settings["CC_ORDER_CLOSE_RETRY_ATTEMPTS"] = 2
    for number in range(1, 9):
        story.venue.script["close", number] = "lost_request"
    if restart:
        for _ in range(6):
            await story.trade(3)
    else:
        await story.trade(18)
    attempts = [attempt for _, order_id, attempt in story.venue.sent("close") if order_id.endswith("1001-44c07977-c0")]
    # Of the attempts before a start one counts.
    assert attempts == ([0, 1, 2, 3, 4, 5, 2, 3, 4] if restart else list(range(9)))
    (trade,) = story.trades()
    closed_at = (trade.closed_at_ms - START) // MINUTE_MS
    assert closed_at == (14 if restart else 16)  # a start asks again, in the minute it begins in
    assert trade.price_close == pytest.approx(price_at(trade.closed_at_ms) - 0.3)
    assert (trade.close_reason, trade.close_note) == ("closed", "enough")
    assert [failed.alarm for failed in story.of(bk.OrderFailed)] == [attempt >= 2 for attempt in attempts[:-1]]


@pytest.mark.parametrize("lives", [(12,), (8, 4), (9, 3), (7, 5), (3, 3, 3, 3), (8, 1, 1, 2)])
async def test_a_close_that_is_refused_goes_on_under_another_id(rig: Rig, lives: tuple[int, ...]) -> None:
    story = prepared(rig)
    story.venue.script["close", 1] = story.venue.script["close", 2] = "rejected"
    for minutes in lives:
        await story.trade(minutes)
    assert [order_id.rpartition("-")[2] for _, order_id, _ in story.venue.sent("close")] == ["c0", "c8", "c9"]
    assert [(failed.alarm, failed.attempt) for failed in story.of(bk.OrderFailed)] == [(True, 0), (True, 0)]
    assert len(story.trades()) == 1


@pytest.mark.parametrize("hook", ["open", "place"])
async def test_an_entry_that_is_refused_is_not_sent_again(story: Rig, hook: str) -> None:
    story.venue.script[hook, 1] = "rejected"
    await story.trade(MINUTES)
    first = next(call for call in story.venue.calls if call[0] == hook)
    assert [call for call in story.venue.calls if call[1] == first[1]] == [first]
    (failed,) = story.of(bk.OrderFailed)
    assert (failed.alarm, failed.reason, failed.next_step) == (True, "insufficient funds", "it was given up")


async def test_an_activation_that_is_refused_cancels_the_entry(story: Rig) -> None:
    story.venue.script["activate", 1] = "rejected"
    await story.trade(MINUTES)
    assert [event.reason for event in story.of(bk.EntryCancelled)] == ["user", "user"]
    assert [minute_of(event) for event in story.of(bk.EntryCancelled)] == [13, 19]
    assert len(story.trades()) == 1


async def test_a_command_that_is_refused_says_why_and_changes_nothing(story: Rig) -> None:
    told: list[bk.CommandOutcome] = []

    async def manage(ctx: bk.Context) -> None:
        if ctx.position is not None and ctx.when_ms == START + 2 * MINUTE_MS:
            before = ctx.position.value
            told.append(await ctx.position.reduce(percent=10))
            told.append(await ctx.position.move_stop(ctx.price * 0.999))
            assert ctx.position.value.reductions == before.reductions
            told.append(await ctx.position.add(10))

    story.strategy["manage"] = manage
    story.venue.script["reduce", 1] = "rejected"
    story.venue.script["move_stop", 1] = "lost_response"
    await story.trade(4)
    assert [bool(each) for each in told] == [False, False, False]
    assert told[0].reason == "insufficient funds"
    assert "its outcome is unknown" in told[1].reason
    assert "still pending" in told[2].reason
    assert [event.change for event in story.of(bk.PositionChanged)] == ["stop_moved"]


async def test_a_silent_venue_is_an_alarm_after_a_while_and_nothing_is_sent_twice(story: Rig) -> None:
    story.settings["CC_ORDER_CHECK_RETRY_ATTEMPTS"] = 2
    story.venue.script["close", 1] = "lost_response"
    story.venue.find_fails = 4
    await story.trade(MINUTES)
    checks = [failed for failed in story.of(bk.OrderFailed) if failed.kind == "check"]
    assert [failed.alarm for failed in checks] == [False, False, True, True]
    assert len([call for call in story.venue.sent("close") if "1001" in call[1]]) == 1
    assert minute_of(story.of(bk.PositionClosed)[0]) == 8


async def test_what_the_venue_fills_is_what_is_booked(tmp_path: Path) -> None:
    class Dear(bk.Broker):
        reports_fills = True

        async def open_position(self, order: bk.Order) -> bk.Fill:
            return bk.Fill(price=order.price * 1.01, cost=order.cost / 2, quantity=order.cost / 2 / order.price / 1.01)

        async def reduce_position(self, order: bk.Order) -> bk.Fill:
            assert order.quantity is not None
            return bk.Fill(price=order.price * 0.99, cost=1, quantity=order.quantity / 2)

        async def close_position(self, order: bk.Order) -> bk.Fill:
            sold.append(order.quantity)
            return bk.Fill(price=123.0, cost=1, quantity=order.quantity or 0.0)

        async def find(self, order: bk.Order) -> bk.OrderReport:
            return bk.OrderReport(status="absent")

    sold: list[float | None] = []
    rig = prepared(Rig(tmp_path, bk.MemoryStore()))
    rig.strategy["manage"] = halve_and_close
    broker: Any = Dear()
    rig.venue = broker
    await rig.trade(9)
    (trade,) = rig.trades()
    assert trade.entries[0].price == pytest.approx((price_at(START + MINUTE_MS) - 0.3) * 1.01)
    assert trade.entries[0].cost == 50
    assert trade.reductions[0].percent == pytest.approx(25)
    assert trade.price_close == 123.0
    assert sold == [pytest.approx(0.75 * 50 / trade.entries[0].price)]


async def halve_and_close(ctx: bk.Context) -> None:
    if ctx.position is not None and not ctx.position.reductions:
        await ctx.position.reduce(percent=50)
        await ctx.position.close()


@pytest.mark.parametrize("reason", ["take_profit", "stop_loss", "closed", ""])
async def test_a_position_that_the_venue_closes_is_closed_at_its_price(story: Rig, reason: Any) -> None:
    def check(held: bk.Position | bk.RestingEntry) -> bk.Fill | None:
        seen.append(held)
        return bk.Fill(price=77.0, cost=1, quantity=1, reason=reason) if len(seen) == 2 else None

    seen: list[Any] = []
    story.venue.check = check
    await story.trade(6)
    trade = story.trades()[0]
    assert (trade.price_close, trade.close_reason, trade.closed_at_ms) == (
        77.0,
        reason or "closed",
        START + 3 * MINUTE_MS,
    )
    assert not story.venue.sent("close")


async def test_a_position_that_is_gone_is_closed_at_the_price_of_now(story: Rig) -> None:
    def check(held: bk.Position | bk.RestingEntry) -> bk.Fill | None:
        raise bk.OrderDeleted("no such position")

    story.venue.check = check
    await story.trade(6)
    trade = story.trades()[0]
    assert (trade.close_reason, trade.closed_at_ms) == ("closed", START + 2 * MINUTE_MS)


async def test_an_entry_that_the_venue_fills_is_open_at_its_price(story: Rig) -> None:
    def check(held: bk.Position | bk.RestingEntry) -> bk.Fill | None:
        return bk.Fill(price=99.5, cost=40, quantity=0.4) if isinstance(held, bk.RestingEntry) else None

    story.venue.check = check
    await story.trade(13)
    opened = story.of(bk.PositionOpened)[-1]
    assert (minute_of(opened), opened.position.price_open, opened.position.cost) == (11, 99.5, 40)
    assert story.venue.sent("activate")


async def test_an_entry_that_is_gone_is_cancelled(story: Rig) -> None:
    def check(held: bk.Position | bk.RestingEntry) -> bk.Fill | None:
        if isinstance(held, bk.RestingEntry):
            raise bk.OrderDeleted("cancelled by hand")
        return None

    story.venue.check = check
    await story.trade(13)
    assert [(minute_of(event), event.reason) for event in story.of(bk.EntryCancelled)] == [(11, "user")]
    assert not story.venue.sent("cancel")


async def test_a_cancel_that_comes_too_late_is_a_position(tmp_path: Path) -> None:
    class Late(bk.Broker):
        async def cancel_entry(self, order: bk.Order) -> bk.Fill:
            return bk.Fill(price=100.25, cost=60, quantity=0.6)

        async def find(self, order: bk.Order) -> bk.OrderReport:
            return bk.OrderReport(status="absent")

    rig = prepared(Rig(tmp_path, bk.MemoryStore()))
    broker: Any = Late()
    rig.venue = broker
    await rig.trade(20)
    position = rig.of(bk.PositionOpened)[-1].position
    assert (position.price_open, position.cost, minute_of(rig.of(bk.PositionOpened)[-1])) == (100.25, 60, 19)
    assert not rig.of(bk.EntryCancelled)


@pytest.mark.parametrize("hook", SENDING)
def test_a_broker_that_sends_and_cannot_look_up_is_refused(memory_rig: Rig, hook: str) -> None:
    async def send(self: bk.Broker, order: bk.Order) -> None:
        pass

    async def find(self: bk.Broker, order: bk.Order) -> bk.OrderReport:
        return bk.OrderReport(status="absent")

    forgetful: Any = type("Forgetful", (bk.Broker,), {hook: send})
    memory_rig.venue = forgetful()
    with pytest.raises(bk.UserError, match=rf"Forgetful sends orders \({hook}\) and has no find\(\)"):
        memory_rig.kit(SteppedClock(START)).live.job("BTCUSDT", "trend", "demo")
    memory_rig.kit(SteppedClock(START)).live.job("BTCUSDT", "trend", "demo", paper=True)
    memory_rig.venue = type("Mindful", (forgetful,), {"find": find})()
    memory_rig.kit(SteppedClock(START)).live.job("BTCUSDT", "trend", "demo")


def test_a_broker_that_only_looks_on_needs_no_look_up(memory_rig: Rig) -> None:
    class Teller(bk.Broker):
        async def notify(self, event: bk.Event) -> None:
            pass

    teller: Any = Teller()
    memory_rig.venue = teller
    memory_rig.kit(SteppedClock(START)).live.job("BTCUSDT", "trend", "demo")


def test_every_kind_of_order_is_tried() -> None:
    assert set(get_args(OrderKind)) == {*HOOKS, "breakeven"}
