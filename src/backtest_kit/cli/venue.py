"""`backtest-kit venue`: serve a simulated exchange until it is stopped."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from backtest_kit.cli.choice import file_source
from backtest_kit.market import sources
from backtest_kit.market.clock import AcceleratedClock, Clock, SteppedClock, SystemClock
from backtest_kit.market.sources import CandleSource
from backtest_kit.model.interval import DAY_MS, iso, to_ms
from backtest_kit.venue.binance.api import API_KEY, API_SECRET
from backtest_kit.venue.exchange import ClientIds, Terms
from backtest_kit.venue.faults import Fault, Faults
from backtest_kit.venue.journal import Journal
from backtest_kit.venue.orders import Kind, VenueFill
from backtest_kit.venue.publishing import Publishing
from backtest_kit.venue.server import VenueServer
from backtest_kit.venue.venue import Venue


def run_venue(
    *,
    port: int,
    symbols: Sequence[str],
    candles: str | None,
    seed: int,
    speed: float,
    start: str | None,
    fee_pct: float,
    slippage_pct: float,
    balance: float,
    client_ids: ClientIds,
    faults: Sequence[str],
    publishing: str | None,
    state: Path | None,
) -> None:
    source = sources.synthetic(seed) if candles is None else file_source(candles)
    fee = Decimal(repr(fee_pct))
    terms = Terms(
        taker_fee_pct=fee,
        maker_fee_pct=fee,
        slippage_pct=Decimal(repr(slippage_pct)),
        balance=Decimal(repr(balance)),
        client_ids=client_ids,
    )
    struck = Faults(seed)
    for each in faults:
        struck.add(Fault.parse(each))
    published = Publishing.parse(publishing) if publishing else None
    journal = Journal(state) if state else None
    asyncio.run(_serve(port, symbols, source, speed, start, terms, struck, published, journal))


async def _serve(
    port: int,
    symbols: Sequence[str],
    source: CandleSource,
    speed: float,
    start: str | None,
    terms: Terms,
    faults: Faults,
    publishing: Publishing | None,
    journal: Journal | None,
) -> None:
    stopping = asyncio.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(each, stopping.set)
    kept_ms = await asyncio.to_thread(journal.latest_ms) if journal else None
    clock = await _clock(source, symbols, speed, start, kept_ms)

    def filled(kind: Kind, fill: VenueFill) -> None:
        _say(
            f"{iso(fill.time_ms)} {kind} {fill.account}: {fill.side} {fill.quantity:f} {fill.symbol} "
            f"at {fill.price:f} ({fill.client_order_id})"
        )

    venue = Venue(source, symbols, clock, terms=terms, journal=journal, on_fill=filled, publishing=publishing)
    server = VenueServer(
        venue, port=port, faults=faults, log=lambda line: _say(f"{iso(clock.now_ms() // 1000 * 1000)} {line}")
    )
    try:
        await server.start()
        _say(f"A simulated exchange for {', '.join(symbols)}, at {iso(clock.now_ms())}, is served at {server.url}")
        _say(f'Bots: backtest_kit.venue.client.connect("{server.url}")')
        _say(f"ccxt: backtest_kit.venue.client.ccxt_options; API key {API_KEY}, secret {API_SECRET}")
        _say(f"Look: curl {server.url}/sim/state   Stop: Ctrl-C")
        await stopping.wait()
    finally:
        await server.stop()
    _say("stopped")


async def _clock(
    source: CandleSource, symbols: Sequence[str], speed: float, start: str | None, kept_ms: int | None
) -> Clock:
    """The real time, if the candles reach it and no other is given.

    A simulated time continues at the end of the stored state, or begins at `start`, or a day after the first candle.
    """
    known, now_ms = await source.range(symbols[0]), SystemClock().now_ms()
    if speed == 1 and start is None and (known is None or known[0] < now_ms < known[1]):
        return SystemClock()
    if kept_ms is None:
        kept_ms = to_ms(start, what="--start") if start is not None else (known[0] if known else now_ms) + DAY_MS
    return SteppedClock(kept_ms) if speed == 0 else AcceleratedClock(kept_ms, speed)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
