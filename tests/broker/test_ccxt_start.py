"""What a `CcxtBroker` finds out before it is allowed to trade."""

from __future__ import annotations

import json
import logging
from typing import Any

import ccxt as library
import pytest
from tests.broker.conftest import MakeBench, order

from backtest_kit.broker.ccxt import CcxtBroker
from backtest_kit.broker.ccxt_connection import _enter_test_network
from backtest_kit.errors import RetryLater, UserError
from backtest_kit.venue.binance import api
from backtest_kit.venue.binance.api import API_KEY, API_SECRET


async def test_credentials_come_from_the_environment(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    venue = await bench("spot")
    unset = venue.unconnected(api_key=None, secret=None)
    with pytest.raises(UserError, match="binance: no credentials: set CC_CCXT_API_KEY and CC_CCXT_SECRET, or give"):
        await unset.start()
    monkeypatch.setenv("CC_CCXT_API_KEY", API_KEY)
    monkeypatch.setenv("CC_CCXT_SECRET", API_SECRET)
    await unset.start()
    await unset.start()
    assert await unset.open_position(order()) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key": "nobody"}, r"check the key: AuthenticationError.*check the API key, its permissions"),
        ({"secret": "wrong"}, r"check the key: .*Signature for this request is not valid"),
        ({"exchange_id": "binanse"}, r"ccxt knows no exchange 'binanse': did you mean binance"),
        ({"exchange_id": "bigone"}, r"bigone cannot be traded through ccxt: it has no fetchPositions"),
    ],
)
async def test_what_makes_trading_impossible_is_said(bench: MakeBench, options: dict[str, Any], message: str) -> None:
    venue = await bench("futures")
    with pytest.raises(UserError, match=message) as caught:
        await venue.unconnected(**options).start()
    assert API_SECRET not in str(caught.value)


async def test_an_exchange_that_does_not_answer_may_answer_later(bench: MakeBench) -> None:
    venue = await bench("spot")
    broker = venue.unconnected()
    await venue.server.stop()
    with pytest.raises(RetryLater, match="load the markets: ExchangeNotAvailable"):
        await broker.start()


@pytest.mark.parametrize("answer", [{"symbols": []}, {}, "<html>captcha</html>"])
async def test_an_exchange_that_lists_no_markets_may_list_them_later(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    async def listed(call: Any) -> Any:
        return answer

    venue = await bench("spot")
    broker = venue.unconnected()
    with monkeypatch.context() as patch:
        patch.setitem(api._ROUTES["api", "GET"], "exchangeInfo", api._Route(listed, signed=False))
        with pytest.raises(RetryLater, match="list of markets is empty"):
            await broker.start()
    await broker.start()


async def test_hedge_mode_is_refused(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hedged(call: Any) -> Any:
        return {"dualSidePosition": True}

    monkeypatch.setitem(api._ROUTES["fapi", "GET"], "positionSide/dual", api._Route(hedged))
    venue = await bench("futures")
    with pytest.raises(UserError, match="hedge mode.*switch its position mode to one-way"):  # noqa: RUF043
        await venue.broker()


async def test_an_account_that_may_not_trade_is_refused(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def account(call: Any) -> Any:
        return {"canTrade": False, "balances": []}

    monkeypatch.setitem(api._ROUTES["api", "GET"], "account", api._Route(account))
    with pytest.raises(UserError, match="the account may not trade: allow trading for this API key"):
        await (await bench("spot")).broker()


async def test_a_clock_that_is_off_is_told(bench: MakeBench, caplog: pytest.LogCaptureFixture) -> None:
    await (await bench("spot")).broker()
    assert [record.levelno for record in caplog.records if "this machine is +" in record.message] == [logging.WARNING]


async def test_symbols_are_written_either_way(bench: MakeBench) -> None:
    venue = await bench("futures")
    broker = await venue.broker()
    assert await broker.holdings(["BTCUSDT", "BTC/USDT", "BTC/USDT:USDT"]) == []
    with pytest.raises(UserError, match="binanceusdm has no market 'BTCUSD': did you mean BTCUSDT"):
        await broker.holdings(["BTCUSD"])


async def test_the_kind_of_market_must_be_the_broker_s(bench: MakeBench) -> None:
    venue = await bench("spot")
    everything = {"fetchMarkets": {"types": ["spot", "linear"]}}
    broker = await venue.broker(options=everything)
    with pytest.raises(
        UserError, match=r"BTC/USDT:USDT is not a spot market: use CcxtBroker\(\.\.\., market='futures'\)"
    ):
        await broker.holdings(["BTC/USDT:USDT"])


async def test_a_broker_that_is_not_started_says_so() -> None:
    broker = CcxtBroker("binance", api_key="key", secret=API_SECRET)
    with pytest.raises(UserError, match="is not connected: await its start"):
        await broker.open_position(order())
    await broker.stop()


async def test_ccxt_never_sends_an_order_again_by_itself(bench: MakeBench) -> None:
    venue = await bench("spot")
    broker = await venue.broker(options={"maxRetriesOnFailure": 3})
    venue.fault("error", "POST */order", count=4, status=503, message="try later")
    with pytest.raises(Exception, match="try later"):
        await broker.open_position(order())
    assert venue.sent() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"market": "margin"}, "market is 'margin': use 'spot' or 'futures'"),
        ({"leverage": 0}, "leverage is 0: use 1 or more"),
        ({"max_slippage_pct": 100.0}, "max_slippage_pct is 100.0: use a percentage between 0 and 100"),
        ({"stop_beyond_pct": 0.0}, "stop_beyond_pct is 0.0: use a percentage"),
        ({"arrival_ms": 0}, "arrival_ms is 0: use milliseconds above 0"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CcxtBroker("binance", **options)


def test_the_library_has_the_errors_that_the_table_names() -> None:
    from backtest_kit.broker import ccxt_errors

    assert [name for name, *_ in ccxt_errors._TABLE if not issubclass(getattr(library, name), library.BaseError)] == []


@pytest.mark.parametrize(
    ("exchange_id", "address"), [("binance", "demo-api.binance.com"), ("kraken", None), ("bybit", "api-testnet")]
)
def test_the_test_network_is_another_address(exchange_id: str, address: str | None) -> None:
    client = getattr(library, exchange_id)()
    if address is None:
        with pytest.raises(UserError, match="kraken has no test network that ccxt knows"):
            _enter_test_network(client, exchange_id)
        return
    _enter_test_network(client, exchange_id)
    assert address in json.dumps(client.urls["api"])
