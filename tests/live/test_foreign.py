"""The exchange knows better than the store: while it holds what the store does not know, nothing is opened there."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.broker.conftest import Bench, Kind, Script
from tests.live.bot import UntilClock
from tests.live.rig import START, Rig, always_long
from tests.live.stage import Stage, flat_candles, forking, stage

import backtest_kit as bk
from backtest_kit.broker.order_ids import SignalIds
from backtest_kit.engine.step import Resting
from backtest_kit.errors import Outcome
from backtest_kit.market.clock import SteppedClock
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.venue.client import connect
from backtest_kit.venue.exchange import Terms
from backtest_kit.venue.server import VenueServer
from backtest_kit.venue.venue import Venue

POLICIES = ("alarm", "protect", "adopt")
SETTINGS: dict[str, Any] = {"CC_GET_CANDLES_RETRY_COUNT": 1, "CC_POSITION_ENTRY_COST": 1000}

# Processes that are killed


@pytest.mark.crash
@pytest.mark.parametrize("fill_at", ["venue", "reference"])
async def test_a_start_with_an_empty_store_does_not_double_the_position(tmp_path: Path, fill_at: str) -> None:
    """A bot is killed right after its entry; the next one starts with the same strategy and another store."""
    async with forking() as forks:

        async def play(policy: str) -> None:
            candles = flat_candles(lambda minute: 100.0, 30)
            async with stage(forks, tmp_path / policy, candles=candles, script="always", fill_at=fill_at) as here:
                await doubled(here, policy)

        await asyncio.gather(*map(play, POLICIES))


async def doubled(here: Stage, policy: str) -> None:
    first = await here.bot(crash="live.open.after_broker:1", end_ms=START + 5 * MINUTE_MS)
    assert await first.ended() == -signal.SIGKILL, here.said()
    other = f"file:{here.place}/other"
    second = await here.bot(store=other, orphans=policy, end_ms=START + 12 * MINUTE_MS, actor="other")
    assert await second.ended() == 0, here.said()
    end, exchange = here.end("other"), here.server.venue.exchanges["futures"]
    assert end.errors == {}
    (entry,) = [order for order in exchange.orders.values() if order.filled and not order.reduce_only]
    assert not [order for order in exchange.orders.values() if order.filled and order is not entry]
    assert "foreign_position" in {each.event["what"] for each in here.heard("trouble")}
    (position,) = exchange.account(entry.account).positions.values()  # type: ignore[union-attr]
    assert position.quantity == entry.filled
    held = end.books["signal"]
    assert (held is not None) == (policy == "adopt")
    if held is not None:
        assert SignalIds(held["entry"]["signal"]["id"]).entry == entry.client_order_id


# CcxtBroker, spot and futures


@pytest.fixture
async def market() -> AsyncIterator[Callable[[Kind], Any]]:
    benches: list[Bench] = []

    async def make(kind: Kind, **terms: Any) -> Bench:
        server = VenueServer(Venue(Script([50_000.0]), ("BTCUSDT",), SteppedClock(START), terms=Terms(**terms)))
        await server.start()
        benches.append(Bench(server, kind))
        return benches[-1]

    yield make
    for each in benches:
        for broker in each.brokers:
            await broker.stop()
        await each.server.stop()


class Life:
    """A run on one exchange, with a store of its own; ended from outside, which for the state is a crash."""

    def __init__(self, bench: Bench, place: Path, get_signal: Any = always_long, manage: Any = None) -> None:
        self.bench, self.place, self.get_signal, self.manage = bench, place, get_signal, manage
        self.events: list[bk.Event] = []
        self.now_ms = START

    async def trade(self, minutes: int, **options: Any) -> bk.LiveStatus:
        client = connect(self.bench.server.url)
        clock: Any = self.bench.server.venue.clock
        until = UntilClock(client.clock("bot"), clock.now_ms() + minutes * MINUTE_MS)
        kit = bk.Kit(self.place / "dump")
        kit.set_config(**SETTINGS)
        kit.persistence.bind("*", bk.FileStore(self.place / "store"))
        broker = self.bench.unconnected(arrival_ms=1)
        kit.add_exchange_schema("venue", source=client.source(), broker=broker, clock=until)
        kit.add_strategy_schema("trend", get_signal=self.get_signal, manage=self.manage, interval="1m")
        kit.on(bk.Event, self.events.append)
        handle = kit.live.background(
            "BTCUSDT", strategy_name="trend", exchange_name="venue", allow_weak=True, **options
        )
        over = asyncio.ensure_future(until.over.wait())
        await asyncio.wait({over, handle.task}, return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        status = handle.status
        handle.cancel()
        await asyncio.wait({handle.task})
        await kit.close()
        assert handle.task.cancelled() or handle.task.result()
        return status

    def of(self, *kinds: type[bk.Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kinds)]


def entries(bench: Bench) -> list[Any]:
    """Orders of ours that have bought something."""
    return [order for order in bench.exchange.orders.values() if order.filled and order.side == "buy" and ours(order)]


def ours(order: Any) -> bool:
    return bool(order.client_order_id.startswith("bc"))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_on_ccxt_an_empty_store_opens_nothing_until_the_position_is_gone(
    market: Any, tmp_path: Path, kind: Kind, policy: str
) -> None:
    bench = await market(kind)
    before = bench.held()
    first = Life(bench, tmp_path / "first")
    assert (await first.trade(2)).position is not None
    second = Life(bench, tmp_path / "second")
    status = await second.trade(3, orphans=policy)
    (entry,) = entries(bench)
    (found,) = second.of(bk.OrphanFound)
    assert found.what == "foreign_position"
    assert entry.client_order_id[:22] in found.reason
    assert (status.position is not None) == (policy == "adopt")
    assert bool(status.no_entry) == (policy != "adopt")
    (began,) = second.of(bk.Recovered)
    assert "nothing is opened: the exchange holds" in began.steps[-1]
    assert len(bench.stops()) == 1

    # Closed by hand, the way is free; what was adopted ends by that very fill.
    held = bench.held() - before
    for client_id, _, _ in bench.stops():
        await bench.cancel_by_hand(client_id)
    await bench.by_hand("sell", round(held - 0.000005, 5) if kind == "spot" else held)
    status = await second.trade(5)
    assert status.position is not None
    assert len(entries(bench)) == 2
    closed = second.of(bk.PositionClosed)
    assert [event.trade.close_reason for event in closed] == (["closed"] if policy == "adopt" else [])


@pytest.mark.parametrize("client_ids", ["open", "ever"])
async def test_orders_of_an_adopted_position_are_not_those_that_the_lost_store_sent(
    market: Any, tmp_path: Path, client_ids: str
) -> None:
    """An order under the id of one that is done would be taken for done itself, or be lost after a crash."""

    async def by_a_fifth(ctx: bk.Context) -> None:
        if ctx.position is not None:
            assert await ctx.position.reduce(percent=20)

    bench = await market("futures", client_ids=client_ids)
    await Life(bench, tmp_path / "first", manage=by_a_fifth).trade(3)
    held = bench.held()
    second = Life(bench, tmp_path / "second", manage=by_a_fifth)
    await second.trade(6, orphans="adopt")
    (adopted,) = [event.position for event in second.of(bk.PositionOpened)]
    reduced = [event.position for event in second.of(bk.PositionChanged)]
    assert len(reduced) > 2
    assert adopted.cost / adopted.price_open == pytest.approx(held)
    sold = bench.exchange.orders.values()
    assert len({order.client_order_id for order in sold}) == len(sold)
    assert bench.held() == pytest.approx(held * 0.8 ** len(reduced), rel=0.01)


@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_a_position_is_not_taken_for_closed_where_the_id_of_its_store_is_lost(
    market: Any, tmp_path: Path, kind: Kind
) -> None:
    """Its orders cannot be found under another one, as if they had never been."""
    bench = await market(kind)
    life = Life(bench, tmp_path)
    opened = (await life.trade(2)).position
    before, stops = bench.held(), bench.stops()
    lost = tmp_path / "store" / "identity"
    lost.rename(tmp_path / "lost")
    with pytest.raises(bk.UserError, match="the orders of BTCUSDT on venue by trend belong to store"):
        await life.trade(3)
    assert not life.of(bk.PositionClosed)
    assert (bench.held(), bench.stops()) == (before, stops)
    shutil.rmtree(lost)
    (tmp_path / "lost").rename(lost)
    assert (await life.trade(1)).position == opened


async def test_savings_and_orders_made_by_hand_do_not_keep_entries_back(market: Any, tmp_path: Path) -> None:
    bench = await market("spot")
    await bench.by_hand("buy", 0.3)
    life = Life(bench, tmp_path)
    status = await life.trade(2)
    assert status.position is not None
    await bench.by_hand("sell", 0.1)
    assert (await life.trade(3)).no_entry == ""
    assert not life.of(bk.OrphanFound)


@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_an_open_order_of_a_lost_store_keeps_entries_back(market: Any, tmp_path: Path, kind: Kind) -> None:
    async def resting(ctx: bk.Context) -> bk.Signal:
        return bk.Signal("long", ctx.price * 1.1, ctx.price * 0.8, price_open=ctx.price * 0.95)

    bench = await market(kind)
    await Life(bench, tmp_path / "first", resting).trade(2)
    (order,) = bench.open_orders()
    second = Life(bench, tmp_path / "second")
    status = await second.trade(3)
    assert status.position is None
    assert not entries(bench)
    (found,) = second.of(bk.OrphanFound)
    assert found.what == "foreign_order"
    assert order.client_order_id in found.reason
    await bench.cancel_by_hand(order.client_order_id)
    assert (await second.trade(2)).position is not None


async def test_a_stop_left_of_another_position_keeps_entries_back(market: Any, tmp_path: Path) -> None:
    bench = await market("futures")
    await Life(bench, tmp_path / "first").trade(2)
    await bench.by_hand("sell", bench.held())
    second = Life(bench, tmp_path / "second")
    assert (await second.trade(3)).position is None
    assert [event.what for event in second.of(bk.OrphanFound)] == ["left_stop"]
    ((client_id, _, _),) = bench.stops()
    await bench.cancel_by_hand(client_id)
    assert (await second.trade(2)).position is not None


# The gate


async def test_nothing_is_sent_before_the_exchange_has_said_what_it_holds(memory_rig: Rig) -> None:
    asked: list[int] = []

    async def holdings(symbols: Any) -> Any:
        asked.append(len(memory_rig.venue.calls))
        if len(asked) < 4:
            raise bk.OrderTransient("maintenance", outcome=Outcome.NOT_DONE)
        return []

    memory_rig.venue.holdings = holdings  # type: ignore[method-assign]
    memory_rig.strategy["interval"] = "1m"
    status = (await memory_rig.trade(1)).status
    assert not memory_rig.venue.calls
    assert status.no_entry == "the exchange and the store could not be compared: maintenance"
    (began,) = memory_rig.of(bk.Recovered)
    assert began.steps[-1].endswith("could not be compared: maintenance")
    status = (await memory_rig.trade(2)).status
    assert status.position is not None
    assert status.no_entry == ""
    assert not any(asked[:4])


async def test_an_entry_under_way_is_not_sent_again_while_something_is_unknown(memory_rig: Rig) -> None:
    """Also where it is as large as what the exchange holds: it says that it has nothing of that order."""
    memory_rig.strategy["interval"] = "1m"
    memory_rig.settings["CC_POSITION_ENTRY_COST"] = 100
    memory_rig.venue.script["open", 0] = "lost_request"
    price = (await memory_rig.trade(0)).status.price
    (failed,) = memory_rig.of(bk.OrderFailed)
    assert failed.kind == "open"
    memory_rig.venue.script.clear()
    as_large = bk.VenuePosition(symbol="BTCUSDT", direction="long", quantity=100 / price, stop_loss=1.0)
    memory_rig.venue.held = [as_large]
    sent = len(memory_rig.venue.sent("open"))
    status = (await memory_rig.trade(2)).status
    assert status.pending_order
    assert len(memory_rig.venue.sent("open")) == sent
    memory_rig.venue.held = []
    assert (await memory_rig.trade(1)).status.position is not None
    assert len(memory_rig.venue.sent("open")) == sent + 1


async def test_nothing_is_added_to_a_position_while_something_is_unknown(memory_rig: Rig) -> None:
    outcomes: list[bk.CommandOutcome] = []

    async def manage(ctx: bk.Context) -> None:
        if ctx.position is not None and ctx.when_ms > START:
            outcomes.append(await ctx.position.add(50))

    memory_rig.settings["CC_ENABLE_DCA_EVERYWHERE"] = True
    await memory_rig.trade(0)
    memory_rig.strategy["manage"] = manage
    memory_rig.venue.held = [bk.VenuePosition(symbol="BTCUSDT", direction="long", quantity=9.0, stop_loss=1.0)]
    await memory_rig.trade(1)
    assert [bool(each) for each in outcomes] == [False]
    assert "nothing is opened now: the exchange holds long 9" in outcomes[0].reason
    assert not memory_rig.venue.sent("add")
    memory_rig.venue.held = None
    await memory_rig.trade(1)
    assert outcomes[-1]
    assert memory_rig.venue.sent("add")


async def test_an_entry_that_the_engine_watches_is_not_activated_while_something_is_unknown(memory_rig: Rig) -> None:
    async def get_signal(ctx: bk.Context) -> bk.Signal:
        return bk.Signal("long", ctx.price * 1.1, ctx.price * 0.85, price_open=ctx.price * 0.95)

    async def manage(ctx: bk.Context) -> None:
        if ctx.entry is not None:
            await ctx.entry.activate()

    memory_rig.strategy |= {"get_signal": get_signal}
    await memory_rig.trade(0)
    memory_rig.strategy["manage"] = manage
    memory_rig.venue.held = [bk.VenuePosition(symbol="BTCUSDT", direction="short", quantity=9.0, stop_loss=1.0)]
    end = await memory_rig.trade(3)
    assert isinstance(end.handle._run.run_state.state, Resting)
    assert not memory_rig.venue.sent("activate")
    memory_rig.venue.held = []
    assert (await memory_rig.trade(1)).status.position is not None
