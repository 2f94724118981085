from __future__ import annotations

from tests.broker.conftest import again, order, resting

from backtest_kit.broker.base import OrderReport
from backtest_kit.broker.paper import PaperBroker


async def test_paper_confirms_everything_at_the_engine_s_price() -> None:
    broker = PaperBroker()
    await broker.start()
    assert await broker.open_position(order()) is None
    assert await broker.place_entry(order("place")) is None  # type: ignore[func-returns-value]
    assert await broker.open_position(order("activate")) is None
    assert await broker.cancel_entry(order("cancel")) is None
    assert await broker.add_to_position(order("add", 1)) is None
    assert await broker.reduce_position(order("reduce", 1)) is None
    assert await broker.close_position(order("close")) is None
    assert await broker.find(again(order())) == OrderReport(status="absent")
    assert await broker.check_entry(resting(order("place"))) is None
    assert await broker.holdings(["BTCUSDT"]) is None
    assert not broker.reports_fills, "slippage and fees are the engine's own"
    await broker.stop()
    await broker.stop()
