from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from backtest_kit.broker.base import Broker, Order
from backtest_kit.broker.order_ids import SignalIds
from backtest_kit.market import sources
from backtest_kit.market.clock import Clock, SteppedClock
from backtest_kit.model.identity import Identity
from backtest_kit.venue.client import connect
from backtest_kit.venue.faults import Faults
from backtest_kit.venue.http import HttpClient
from backtest_kit.venue.journal import Journal
from backtest_kit.venue.server import VenueServer
from backtest_kit.venue.venue import Venue

START = 1_704_067_200_000
Serve = Callable[..., Awaitable[VenueServer]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start venues on loopback, on synthetic candles and a stepped clock unless told otherwise."""
    running: list[VenueServer] = []

    async def start(
        *,
        clock: Clock | None = None,
        faults: Faults | None = None,
        symbols: tuple[str, ...] = ("BTCUSDT", "ETHUSDT"),
        source: sources.CandleSource | None = None,
        state: Path | None = None,
        **options: Any,
    ) -> VenueServer:
        venue = Venue(
            source or sources.synthetic(7),
            symbols,
            clock or SteppedClock(START),
            journal=Journal(state) if state else None,
            **options,
        )
        server = VenueServer(venue, faults=faults)
        running.append(server)
        await server.start()
        return server

    yield start
    for server in running:
        await server.stop()


@pytest.fixture
async def broker_of() -> AsyncIterator[Callable[..., Broker]]:
    """Connect brokers to a venue."""
    made: list[Broker] = []

    def make(server: VenueServer, **options: Any) -> Broker:
        made.append(connect(server.url).broker(**options))
        return made[-1]

    yield make
    for broker in made:
        await broker.stop()


@pytest.fixture
def http_of() -> Callable[[VenueServer], HttpClient]:
    """Ask a venue directly."""
    return lambda server: HttpClient(server.url)


def advance(server: VenueServer, minutes: int) -> None:
    clock = server.venue.clock
    assert isinstance(clock, SteppedClock)
    clock.advance_to(clock.now_ms() + minutes * 60_000)


def order_of(kind: Any, signal_id: str = "s1", number: int = 0, **fields: Any) -> Order:
    given: dict[str, Any] = {
        "identity": Identity("BTCUSDT", "trend", "venue", "", "live"),
        "when_ms": START,
        "direction": "long",
        "price": 50_000.0,
        "cost": 1000.0,
        "take_profit": 90_000.0,
        "stop_loss": 10_000.0,
        **fields,
    }
    client_order_id = SignalIds(signal_id).order(kind, number)
    return Order(kind=kind, client_order_id=client_order_id, signal_id=signal_id, **given)
