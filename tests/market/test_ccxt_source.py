from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import ccxt as ccxt_errors
import ccxt.async_support as ccxt_library
import pytest

from backtest_kit.errors import RetryLater, UserError
from backtest_kit.market import sources
from backtest_kit.market.fetch import CandleFeed
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.settings import Settings

START = 1_640_995_200_000
Make = Callable[..., CandleSeries]


class FakeClient:
    """What the source uses of an async ccxt exchange."""

    def __init__(self, candles: CandleSeries, now_ms: int) -> None:
        self.id = "fake"
        self.timeframes = {"1m": "1m"}
        self.options = {"defaultType": "spot"}
        self.markets: dict[str, Any] = {"BTC/USDT:USDT": {}, "BTC/USDT": {}, "ETH/USDT": {}}
        self.markets_by_id = {
            "BTCUSDT": [{"symbol": "BTC/USDT:USDT", "type": "swap"}, {"symbol": "BTC/USDT", "type": "spot"}],
            "ETHUSDT": [{"symbol": "ETH/USDT", "type": "spot"}],
        }
        self.held, self.now_ms = candles, now_ms
        self.has = {"fetchTime": True}
        self.there_ms: int | None = now_ms
        self.asked: list[tuple[str, str, int, int]] = []
        self.error: Exception | None = None
        self.closed = 0

    async def load_markets(self) -> dict[str, Any]:
        return self.markets

    def milliseconds(self) -> int:
        return self.now_ms

    async def fetch_time(self) -> int | None:
        if self.error:
            raise self.error
        return self.there_ms

    async def fetch_ohlcv(self, symbol: str, timeframe: str, since: int, limit: int) -> list[list[float]]:
        self.asked.append((symbol, timeframe, since, limit))
        if self.error:
            raise self.error
        part = self.held.between(since, 2**60)[:limit]
        return [list(row) for row in zip(*(part.columns()[name].tolist() for name in COLUMNS), strict=True)]

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture
def fake(make_candles: Make) -> FakeClient:
    return FakeClient(make_candles(100), START + 10**9)


@pytest.mark.parametrize("symbol", ["BTCUSDT", "BTC/USDT"])
async def test_symbols_are_written_either_way(fake: FakeClient, symbol: str) -> None:
    source = sources.ccxt(fake)
    assert await source.fetch(symbol, "1m", START, START + 30 * MINUTE_MS) == fake.held[:30]
    assert fake.asked == [("BTC/USDT", "1m", START, 30)]


async def test_one_id_of_several_markets_is_that_of_the_default_type(fake: FakeClient) -> None:
    fake.options["defaultType"] = "swap"
    await sources.ccxt(fake).fetch("BTCUSDT", "1m", START, START + MINUTE_MS)
    assert fake.asked[0][0] == "BTC/USDT:USDT"


async def test_an_unknown_symbol_gets_suggestions(fake: FakeClient) -> None:
    with pytest.raises(UserError, match="fake has no market 'BTCUSD': did you mean BTCUSDT or"):
        await sources.ccxt(fake).fetch("BTCUSD", "1m", START, START + MINUTE_MS)
    with pytest.raises(UserError, match="it has 3 others"):
        await sources.ccxt(fake).fetch("?", "1m", START, START + MINUTE_MS)


async def test_the_candle_that_is_still_open_is_dropped(fake: FakeClient) -> None:
    fake.now_ms = START + 30 * MINUTE_MS - 1
    held = await sources.ccxt(fake).fetch("BTCUSDT", "1m", START, START + 30 * MINUTE_MS)
    assert held == fake.held[:29]
    fake.now_ms += 1
    assert len(await sources.ccxt(fake).fetch("BTCUSDT", "1m", START, START + 30 * MINUTE_MS)) == 30


async def test_an_exchange_that_answers_with_more_is_cut_by_the_feed(fake: FakeClient) -> None:
    fetch = fake.fetch_ohlcv

    async def more(symbol: str, timeframe: str, since: int, limit: int) -> list[list[float]]:
        return await fetch(symbol, timeframe, since - 5 * MINUTE_MS, limit + 20)

    fake.fetch_ohlcv = more  # type: ignore[method-assign]
    low, high = START + 10 * MINUTE_MS, START + 20 * MINUTE_MS
    feed = CandleFeed("fake", sources.ccxt(fake), None, Settings(), lambda: fake.now_ms)
    assert (await feed.load("BTCUSDT", low, high)).candles == fake.held[10:20]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ccxt_errors.RequestTimeout("slow"), RetryLater),
        (ccxt_errors.RateLimitExceeded("fast"), RetryLater),
        (ccxt_errors.ExchangeNotAvailable("down"), RetryLater),
        (ccxt_errors.OperationFailed("their servers"), RetryLater),
        (ccxt_errors.BadResponse("garbled"), RetryLater),
        (AttributeError("'NoneType' object has no attribute 'get'"), RetryLater),
        (ccxt_errors.BadSymbol("delisted"), UserError),
        (ccxt_errors.AuthenticationError("key"), UserError),
        (ccxt_errors.ExchangeError("other"), UserError),
    ],
)
async def test_errors_say_what_to_do(fake: FakeClient, error: Exception, kind: type[Exception]) -> None:
    fake.error = error
    with pytest.raises(kind, match=f"fake .*: {type(error).__name__}: {error}") as caught:
        await sources.ccxt(fake).fetch("BTCUSDT", "1m", START, START + MINUTE_MS)
    assert caught.value.__cause__ is error


async def test_a_list_of_no_markets_says_nothing_of_the_symbol(fake: FakeClient) -> None:
    markets, fake.markets = fake.markets, {}
    source = sources.ccxt(fake)
    with pytest.raises(RetryLater, match="fake answered with an empty list of markets"):
        await source.fetch("BTCUSDT", "1m", START, START + MINUTE_MS)
    fake.markets = markets
    assert len(await source.fetch("BTCUSDT", "1m", START, START + MINUTE_MS)) == 1


async def test_no_query_string_reaches_a_message(fake: FakeClient) -> None:
    fake.error = ccxt_errors.RequestTimeout("GET https://api.example/x?apiKey=SECRET&signature=SECRET timed out")
    with pytest.raises(RetryLater) as caught:
        await sources.ccxt(fake).fetch("BTCUSDT", "1m", START, START + MINUTE_MS)
    assert "SECRET" not in str(caught.value)
    assert "timed out" in str(caught.value)


async def test_what_an_exchange_cannot_do_is_said(fake: FakeClient) -> None:
    fake.timeframes = {"5m": "5m"}
    with pytest.raises(UserError, match="fake has no 1m candles; it has 5m"):
        await sources.ccxt(fake).fetch("BTCUSDT", "1m", START, START + MINUTE_MS)
    with pytest.raises(UserError, match="ccxt knows no exchange 'binanse': did you mean binance"):
        await sources.ccxt("binanse").fetch("BTCUSDT", "1m", START, START + MINUTE_MS)


async def test_the_range_is_the_first_candle_and_now(fake: FakeClient) -> None:
    source = sources.ccxt(fake)
    assert await source.range("BTCUSDT") == (START, fake.now_ms // MINUTE_MS * MINUTE_MS)
    fake.held = CandleSeries.empty()
    assert await source.range("BTCUSDT") is None
    fake.error = ccxt_errors.BadRequest("too old")
    assert await source.range("BTCUSDT") is None


async def test_a_given_client_stays_open_and_takes_no_options(fake: FakeClient) -> None:
    source = sources.ccxt(fake)
    await source.fetch("BTCUSDT", "1m", START, START + MINUTE_MS)
    await source.close()
    assert fake.closed == 0
    with pytest.raises(UserError, match="options timeout come with a ccxt client"):
        sources.ccxt(fake, timeout=5)


def test_its_own_client_is_opened_per_loop_and_closed(make_candles: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[FakeClient] = []

    def open_client(config: dict[str, Any]) -> FakeClient:
        assert config == {"enableRateLimit": True, "timeout": 5}
        opened.append(FakeClient(make_candles(10), START + 10**9))
        return opened[-1]

    monkeypatch.setattr(ccxt_library, "binance", open_client)
    source = sources.ccxt("binance", timeout=5)

    async def use() -> None:
        for _ in range(2):
            await source.fetch("BTCUSDT", "1m", START, START + MINUTE_MS)
        await source.close()
        await source.close()

    asyncio.run(use())
    asyncio.run(use())
    assert [client.closed for client in opened] == [1, 1]


async def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ccxt.async_support", None)
    with pytest.raises(UserError, match=r"pip install 'backtest-kit\[ccxt\]'"):
        await sources.ccxt("binance").fetch("BTCUSDT", "1m", START, START + MINUTE_MS)


async def test_the_real_binance_class_without_the_network(make_candles: Make) -> None:
    held = make_candles(1500)
    requests: list[dict[str, list[str]]] = []
    pair = {
        "symbol": "BTCUSDT", "status": "TRADING", "baseAsset": "BTC", "baseAssetPrecision": 8, "quoteAsset": "USDT",
        "quotePrecision": 8, "quoteAssetPrecision": 8, "orderTypes": ["LIMIT", "MARKET"], "isSpotTradingAllowed": True,
        "isMarginTradingAllowed": True, "permissions": ["SPOT"],
        "filters": [
            {"filterType": "PRICE_FILTER", "minPrice": "0.01", "maxPrice": "1000000.0", "tickSize": "0.01"},
            {"filterType": "LOT_SIZE", "minQty": "0.00001", "maxQty": "9000.0", "stepSize": "0.00001"},
        ],
    }  # fmt: skip

    class Canned(ccxt_library.binance):  # type: ignore[misc]
        async def fetch(self, url: str, method: str = "GET", headers: Any = None, body: Any = None) -> Any:
            parts = urlsplit(url)
            if parts.path.endswith("exchangeInfo"):
                return {"symbols": [pair] if parts.path == "/api/v3/exchangeInfo" else []}
            assert parts.path == "/api/v3/klines", url
            query = parse_qs(parts.query)
            requests.append(query)
            part = held.between(int(query["startTime"][0]), 2**60)[: int(query["limit"][0])]
            rows = [
                [row[0], *(f"{value:.17g}" for value in row[1:]), row[0] + 59_999, "1", 9, "1", "1", "0"]
                for row in zip(*(part.columns()[name].tolist() for name in COLUMNS), strict=True)
            ]
            return json.loads(json.dumps(rows))

    client = Canned({"enableRateLimit": False})
    try:
        feed = CandleFeed("binance", sources.ccxt(client), None, Settings(), lambda: START + 10**9)
        loaded = await feed.load("BTCUSDT", START, START + 1500 * MINUTE_MS)
        with pytest.raises(UserError, match="binance has no market 'BTCUSDX': did you mean BTCUSDT"):
            await feed.load("BTCUSDX", START, START + MINUTE_MS)
    finally:
        await client.close()
    assert loaded.candles == held
    assert [(query["symbol"], query["interval"], query["limit"]) for query in requests] == [
        (["BTCUSDT"], ["1m"], ["1000"]),
        (["BTCUSDT"], ["1m"], ["500"]),
    ]


def test_importing_the_sources_imports_no_heavy_library() -> None:
    code = (
        "import sys, backtest_kit.market.sources, backtest_kit.market.history;"
        "print(sorted({'ccxt', 'pyarrow', 'pandas', 'polars'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_with_a_wrong_clock_the_time_of_the_exchange_says_which_candles_are_closed(fake: FakeClient) -> None:
    fake.now_ms, fake.there_ms = START - 3_600_000, START + 30 * MINUTE_MS + 5_000
    source = sources.ccxt(fake)
    assert len(await source.fetch("BTCUSDT", "1m", START, START + 40 * MINUTE_MS)) == 0
    assert await source.server_time_ms() == START + 30 * MINUTE_MS + 5_000
    assert len(await source.fetch("BTCUSDT", "1m", START, START + 40 * MINUTE_MS)) == 30
    fake.now_ms = START + 10**9
    assert len(await source.fetch("BTCUSDT", "1m", START, START + 40 * MINUTE_MS)) == 30


async def test_a_time_that_was_asked_for_slowly_closes_no_candle(fake: FakeClient) -> None:
    """The time is read when the request arrives, and that may be at its very end."""
    fake.there_ms = START + 30 * MINUTE_MS - 250

    async def queued() -> int | None:
        await asyncio.sleep(0.6)
        return fake.there_ms

    fake.fetch_time = queued  # type: ignore[method-assign]
    source = sources.ccxt(fake)
    await source.server_time_ms()
    assert len(await source.fetch("BTCUSDT", "1m", START, START + 40 * MINUTE_MS)) == 29


async def test_an_exchange_that_tells_no_time(fake: FakeClient) -> None:
    source = sources.ccxt(fake)
    fake.there_ms = None
    assert await source.server_time_ms() is None
    fake.has["fetchTime"] = False
    assert await source.server_time_ms() is None
    fake.has["fetchTime"], fake.error = True, ccxt_errors.RequestTimeout("slow")
    with pytest.raises(RetryLater, match="did not answer"):
        await source.server_time_ms()
