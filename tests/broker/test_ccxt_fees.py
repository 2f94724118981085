"""Fees that come late, or in a currency that is neither bought nor paid with."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from tests.broker.conftest import PRICE, START, Bench, MakeBench, Script, again, order

from backtest_kit.market.clock import SteppedClock
from backtest_kit.venue.account import SpotAccount
from backtest_kit.venue.binance.api import API_KEY
from backtest_kit.venue.exchange import Terms
from backtest_kit.venue.orders import Market, Side
from backtest_kit.venue.server import VenueServer
from backtest_kit.venue.venue import Venue


class ThirdCurrency(SpotAccount):
    """Pays each fee with 0.001 of a currency that it has enough of."""

    currency = "BNB"

    def settle(
        self, side: Side, market: Market, price: Decimal, quantity: Decimal, fee_rate: Decimal
    ) -> tuple[Decimal, str, Decimal]:
        super().settle(side, market, price, quantity, Decimal(0))
        return Decimal("0.001"), self.currency, Decimal(0)


async def test_fees_that_are_not_reported_yet_are_not_known(bench: MakeBench) -> None:
    venue = await bench("futures")
    broker = await venue.broker()
    fill = await broker.open_position(order())
    assert fill is not None
    assert fill.fee == pytest.approx(fill.cost * 0.001)
    hidden, venue.exchange.fills[:] = list(venue.exchange.fills), []
    late = (await broker.find(again(order()))).fill
    assert late is not None
    assert (late.fee, late.fee_currency, late.quantity) == (None, "", fill.quantity)
    venue.exchange.fills[:] = hidden
    assert (await broker.find(again(order()))).fill == fill


@pytest.mark.parametrize(
    ("currency", "ticker", "fee", "told"),
    [
        ("BNB", "", 0.001 * PRICE, ""),
        ("XYZ", "", None, "no market XYZ/USDT:USDT to value a fee"),
        ("BNB", "error", None, "read the price of BNB/USDT: "),
        ("BNB", "outage", None, "read the price of BNB/USDT: "),
    ],
)
async def test_a_fee_in_a_third_currency_is_valued_where_that_has_a_price(
    currency: str, ticker: Any, fee: float | None, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    venue = Venue(Script((PRICE,)), ("BTCUSDT", "BNBUSDT"), SteppedClock(START), terms=Terms())
    server = VenueServer(venue)
    await server.start()
    bench = Bench(server, "spot")
    try:
        broker = await bench.broker()
        account: Any = venue.exchanges["spot"].account(API_KEY)
        account.__class__ = type("Own", (ThirdCurrency,), {"currency": currency})
        if ticker:
            bench.fault(ticker, "GET */ticker/*", count=0, status=400, code=-1121, message="Invalid symbol.")
        fill = await broker.open_position(order())
    finally:
        for each in bench.brokers:
            await each.stop()
        await server.stop()
    assert fill is not None
    assert (fill.fee_currency, fill.quantity) == (currency, 0.02)
    assert fill.fee == (None if fee is None else pytest.approx(fee))
    assert told in caplog.text
    assert ("CC_PERCENT_FEE is booked instead" in caplog.text) == (fee is None)
