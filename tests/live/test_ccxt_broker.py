"""The engine on `CcxtBroker`, over sockets: cut off at any order, it ends where it would have ended."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import pytest
from tests.broker.conftest import Bench, Kind
from tests.live.bot import Rows, UntilClock
from tests.live.scripts import START, STORY_MINUTES, Story
from tests.live.stage import plain_id, story_candles, unnumbered
from tests.samples import sample

import backtest_kit as bk
from backtest_kit.market.clock import SteppedClock
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.venue.client import connect
from backtest_kit.venue.exchange import ClientIds, Terms
from backtest_kit.venue.faults import Fault, Faults, Strike
from backtest_kit.venue.server import VenueServer
from backtest_kit.venue.venue import Venue

How = Literal["never", "arrived", "lost"]
CHANCE = 0.3
"""Of each order to be the last of its life: one that is refused is sent under the next id, which takes several."""
MOST_LIVES = 80
TROUBLE = (bk.StrategyFailed, bk.StoreDegraded, bk.OrphanFound, bk.RunFailed)


class Cuts(Faults):
    """Ends who sends or cancels an order, at the moment in which the request comes in: it is carried out all the same,
    or never arrives."""

    def __init__(self, how: How, seed: int) -> None:
        super().__init__()
        self.how = how
        self.cut: Callable[[], Any] = lambda: None
        self._random = random.Random(seed)  # noqa: S311

    def strike(self, method: str, path: str) -> Strike:
        changes = method != "GET" and "rder" in path
        if self.how == "never" or not changes or self._random.random() > CHANCE:
            return super().strike(method, path)
        self.cut()
        return Strike((Fault(kind="lose_request"),)) if self.how == "lost" else super().strike(method, path)


async def played(
    place: Path, kind: Kind, how: How, seed: int, rule: ClientIds
) -> tuple[int, dict[str, Any], list[bk.Event]]:
    """How many lives the story has taken, what is left of it, and what was told."""
    cuts = Cuts(how, seed)
    exchange = Venue(Rows(story_candles()), ("BTCUSDT",), SteppedClock(START), terms=Terms(client_ids=rule))
    server = VenueServer(exchange, faults=cuts)
    await server.start()
    venue, events, lives, over = Bench(server, kind), list[bk.Event](), 0, False
    try:
        while not over and lives < MOST_LIVES:
            lives += 1
            script, client = Story(0), connect(server.url)
            clock = UntilClock(client.clock("bot"), START + STORY_MINUTES * MINUTE_MS)
            kit = bk.Kit(place / "dump")
            kit.set_config(**script.settings)
            kit.persistence.bind("*", bk.FileStore(place / "store"))
            kit.add_exchange_schema(
                "venue", source=client.source(), broker=venue.unconnected(arrival_ms=1), clock=clock
            )
            kit.add_strategy_schema("story", get_signal=script.get_signal, manage=script.manage, interval="1m")
            kit.on(bk.Event, events.append)
            handle = kit.live.background("BTCUSDT", strategy_name="story", exchange_name="venue", allow_weak=True)
            cuts.cut = handle.cancel
            waiting = asyncio.ensure_future(clock.over.wait())
            await asyncio.wait({waiting, handle.task}, return_when=asyncio.FIRST_COMPLETED)
            over = waiting.done()
            waiting.cancel()
            handle.cancel()
            await asyncio.wait({handle.task})
            await kit.close()
            assert handle.task.cancelled(), handle.task.exception()
    finally:
        for broker in venue.brokers:
            await broker.stop()
        await server.stop()
    assert max(venue.filled_orders().values()) == 1
    trades = {event.trade.signal_id: event.trade for event in events if isinstance(event, bk.PositionClosed)}
    outcome = {
        "trades": [unnumbered(msgspec.to_builtins(trade)) for trade in trades.values()],
        "fills": [
            (plain_id(fill.client_order_id), fill.side, fill.quantity, fill.price, fill.time_ms)
            for fill in venue.fills()
        ],
        "held": venue.held(),
        "open": venue.open_orders(),
    }
    return lives, outcome, events


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("kind", "reasons"),
    [
        ("spot", ["closed", "stop_loss", "closed"]),  # it cannot sell short
        ("futures", ["closed", "closed", "stop_loss", "closed"]),
    ],
)
async def test_a_story_that_is_cut_off_at_its_orders_ends_as_the_one_that_is_not(
    tmp_path: Path, kind: Kind, reasons: list[str]
) -> None:
    ways: tuple[How, ...] = ("arrived", "lost")
    for rule, how in sample(product(get_args(ClientIds), ways), 1, f"cut off on {kind}"):
        place = tmp_path / f"{rule}-{how}"
        lives, expected, told = await played(place / "uncut", kind, "never", 0, rule)
        assert lives == 1
        assert [trade["closeReason"] for trade in expected["trades"]] == reasons
        assert expected["open"] == []
        assert expected["held"] == (pytest.approx(0, abs=0.03) if kind == "spot" else 0)
        assert not [event for event in told if isinstance(event, TROUBLE)]
        lives, outcome, told = await played(place / "cut", kind, how, 1, rule)
        assert 5 < lives < MOST_LIVES
        assert outcome == expected, (rule, how)
        assert not [event for event in told if isinstance(event, TROUBLE)]
