from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from backtest_kit.market import sources
from backtest_kit.market.clock import Clock, SteppedClock
from backtest_kit.simulation.faults import Faults
from backtest_kit.simulation.server import VenueServer
from backtest_kit.simulation.venue import Venue

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
        **options: Any,
    ) -> VenueServer:
        venue = Venue(source or sources.synthetic(7), symbols, clock or SteppedClock(START), **options)
        server = VenueServer(venue, faults=faults)
        await server.start()
        running.append(server)
        return server

    yield start
    for server in running:
        await server.stop()
