"""What an exchange charges is what a live trade has paid: its profit is the change of the account."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.broker.conftest import Bench, Kind
from tests.live.bot import Rows, UntilClock
from tests.live.scripts import START, STORY_MINUTES, Story
from tests.live.stage import story_candles

import backtest_kit as bk
from backtest_kit.market.clock import SteppedClock
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.venue.binance.api import API_KEY
from backtest_kit.venue.client import connect
from backtest_kit.venue.exchange import Terms
from backtest_kit.venue.orders import VenueFill
from backtest_kit.venue.server import VenueServer
from backtest_kit.venue.venue import Venue

TERMS: dict[str, Any] = {
    "taker_fee_pct": Decimal("0.075"),
    "maker_fee_pct": Decimal("0.02"),
    "balance": Decimal(100_000),
}
"""Not what the settings say."""
CASES: list[tuple[Kind, str, Literal["received", "quote"]]] = [
    ("spot", "ccxt", "received"),
    ("spot", "ccxt", "quote"),
    ("futures", "ccxt", "quote"),
    ("futures", "venue", "quote"),
]


class Told:
    """What a run on a simulated exchange has left."""

    trades: list[bk.Trade]
    stored: list[bk.StoredSignal]
    fills: list[VenueFill]
    wallet: float
    """What a futures account has more than at its start."""


async def story_on(place: Path, kind: Kind, through: str, **terms: Any) -> Told:
    """Trade the story on an exchange, through `ccxt` or through the exchange's own door."""
    rows, told = Rows(story_candles()), Told()
    server = VenueServer(Venue(rows, ("BTCUSDT",), SteppedClock(START), terms=Terms(**TERMS, **terms)))
    await server.start()
    bench, script, client = Bench(server, kind), Story(0), connect(server.url)
    kit = bk.Kit(place / "dump")
    events: list[bk.Event] = []
    try:
        clock = UntilClock(client.clock("bot"), START + STORY_MINUTES * MINUTE_MS)
        broker = bench.unconnected(arrival_ms=1) if through == "ccxt" else client.broker(kind=kind)
        kit.set_config(**{**script.settings, "CC_PERCENT_FEE": 0.1})
        kit.persistence.bind("*", bk.MemoryStore())
        kit.add_exchange_schema("venue", source=client.source(), broker=broker, clock=clock)
        kit.add_strategy_schema("story", get_signal=script.get_signal, manage=script.manage, interval="1m")
        kit.on(bk.Event, events.append)
        handle = kit.live.background("BTCUSDT", strategy_name="story", exchange_name="venue", allow_weak=True)
        over = asyncio.ensure_future(clock.over.wait())
        await asyncio.wait({over, handle.task}, return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        handle.cancel()
        await asyncio.wait({handle.task})
        assert handle.task.cancelled(), handle.task.exception()
        told.stored = await kit.records.storage.list()
        told.trades = [event.trade for event in events if isinstance(event, bk.PositionClosed)]
        told.fills = bench.fills()
        if kind == "futures":
            told.wallet = float(bench.exchange.account(API_KEY).wallet - TERMS["balance"])
    finally:
        for each in bench.brokers:
            await each.stop()
        await kit.close()
        await server.stop()
    return told


def change_of_account(trade: bk.Trade, fills: list[VenueFill]) -> float:
    """What the orders of a trade have made of the account, with what is left of a lot at the price of the close."""
    ids = {client_id for execution in trade.executions for client_id in execution.client_order_ids}
    cash = base = Decimal(0)
    for fill in fills:
        if fill.client_order_id in ids:
            sign = 1 if fill.side == "buy" else -1
            cash -= sign * fill.price * fill.quantity
            base += sign * fill.quantity
            if fill.fee_asset == "BTC":
                base -= fill.fee
            else:
                cash -= fill.fee
    return float(cash) + float(base) * trade.price_close


@pytest.mark.parametrize(("kind", "through", "fees_in"), CASES)
async def test_the_profit_of_a_trade_is_the_change_of_the_account(
    tmp_path: Path, kind: Kind, through: str, fees_in: Any
) -> None:
    told = await story_on(tmp_path, kind, through, fees_in=fees_in)
    assert len(told.trades) == (3 if kind == "spot" else 4)
    assert any(trade.reductions for trade in told.trades)
    assert any(len(trade.entries) > 1 for trade in told.trades)
    for trade in told.trades:
        assert trade.pnl_cost == pytest.approx(change_of_account(trade, told.fills), rel=1e-9, abs=1e-10)
        assert trade.pnl_pct == pytest.approx(trade.pnl_cost / trade.cost * 100, rel=1e-9)
    if kind == "futures":
        assert sum(trade.pnl_cost for trade in told.trades) == pytest.approx(told.wallet, rel=1e-9)


@pytest.mark.parametrize(("kind", "through"), [("spot", "ccxt"), ("futures", "ccxt"), ("futures", "venue")])
async def test_a_trade_and_its_record_name_fees_and_orders(tmp_path: Path, kind: Kind, through: str) -> None:
    told = await story_on(tmp_path, kind, through)
    by_order: dict[str, list[VenueFill]] = {}
    for fill in told.fills:
        by_order.setdefault(str(fill.order_id), []).append(fill)
    for trade in told.trades:
        parts = (*trade.entries, *trade.reductions)
        assert len(trade.executions) == len(parts) + 1
        for execution in trade.executions:
            mine = [fill for order_id in execution.order_ids for fill in by_order[order_id]]
            assert mine
            assert {fill.client_order_id for fill in mine} == set(execution.client_order_ids)
            assert {fill.fee_asset for fill in mine} == {execution.fee_currency}
            charged = sum(fill.fee * (fill.price if fill.fee_asset == "BTC" else 1) for fill in mine)
            assert execution.fee == pytest.approx(float(charged), rel=1e-9)
        assert trade.fees == pytest.approx(sum(each.fee or 0.0 for each in trade.executions), rel=1e-9)
    stored = {each.signal_id: each for each in told.stored if each.status == "closed"}
    assert set(stored) == {trade.signal_id for trade in told.trades}
    for trade in told.trades:
        assert stored[trade.signal_id].trade == trade
