"""Candles, clock and broker of a simulated exchange, for a bot that trades on it.

venue = connect("http://127.0.0.1:8899")
venue.source(), venue.clock(), venue.broker()
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Final, TypeVar
from urllib.parse import quote

import msgspec

from backtest_kit.broker.base import (
    Broker,
    Fill,
    Order,
    OrderDeleted,
    OrderRejected,
    OrderReport,
    OrderTransient,
    VenuePosition,
)
from backtest_kit.errors import Outcome, RetryLater, UserError
from backtest_kit.market.clock import Clock
from backtest_kit.market.sources import CandleSource
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.model.position import Position, RestingEntry
from backtest_kit.venue.binance.api import API_KEY, API_SECRET
from backtest_kit.venue.desk import FillAt, Problem, Wish
from backtest_kit.venue.http import HttpClient
from backtest_kit.venue.orders import Kind

T = TypeVar("T")

_AWAY_S: Final = 30.0
"""How long a wait tolerates a venue that does not answer."""
_ASK_AGAIN_S: Final = 0.1


def connect(url: str) -> VenueClient:
    """A client of the venue at `url`. It does not connect yet.

    Raises:
        UserError: `url` is not an http address.
    """
    if not url.startswith("http://"):
        raise UserError(f"url is {url!r}: give the address that the venue prints, such as 'http://127.0.0.1:8899'")
    return VenueClient(url)


class VenueClient:
    """Candles, clock and brokers of one venue."""

    def __init__(self, url: str) -> None:
        self.url = url

    def source(self) -> CandleSource:
        """The candles that have closed on the venue's clock."""
        return VenueSource(self.url)

    def clock(self, name: str = "bot", *, sleepers: int = 1) -> Clock:
        """The venue's time. Once the bot `name` has started, a stepped venue moves only while that many of its tasks
        sleep; if the bot dies, the venue waits for it to start again."""
        return VenueClock(self.url, name, sleepers)

    def broker(self, account: str = API_KEY, *, kind: Kind = "futures", fill_at: FillAt = "venue") -> Broker:
        """A broker that trades on an account; a new name makes a new account.

        `fill_at="venue"` fills at the venue's prices, with its fees, slippage and steps, and keeps protective orders
        there. `fill_at="reference"` fills at the prices that the engine decided, free of charge, and leaves the
        levels to the engine: the trades equal those of a backtest on the same candles.
        """
        made = VenueBroker if fill_at == "venue" else ReferenceBroker
        return made(self.url, account, kind)


class VenueSource(CandleSource):
    cached = False
    page_limit = 10_000

    def __init__(self, url: str) -> None:
        self._http = HttpClient(url)

    async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        columns = await self._get(f"/candles/{quote(symbol, safe='')}/{interval}?start={start_ms}&stop={stop_ms}", dict)
        return CandleSeries(*(columns[name] for name in COLUMNS))

    async def range(self, symbol: str) -> tuple[int, int] | None:
        known = await self._get(f"/candles/{quote(symbol, safe='')}/range", list[int] | None)
        return (known[0], known[1]) if known else None

    async def server_time_ms(self) -> int | None:
        return int((await self._get("/api/v3/time", dict[str, int]))["serverTime"])

    async def _get(self, path: str, kind: Any) -> Any:
        status, body = await self._http.ask("GET", path)
        if status == 200:
            return msgspec.json.decode(body, type=kind)
        raise (UserError if status in (400, 404) else RetryLater)(_said(self._http.url, status, body))


class VenueClock:
    """The time of a venue, extrapolated between answers by elapsed time and speed."""

    def __init__(self, url: str, name: str, sleepers: int) -> None:
        self._http = HttpClient(url)
        self._me = {"name": name, "sleepers": sleepers}
        self._speed = 0.0
        self._heard_ms = 0
        self._heard_s = 0.0
        self._latest_ms = 0

    def now_ms(self) -> int:
        if not self._heard_ms:
            raise UserError(f"the clock of the venue at {self._http.url} is not started: await clock.start() first")
        elapsed_ms = (time.monotonic() - self._heard_s) * 1000 * self._speed
        self._latest_ms = max(self._latest_ms, self._heard_ms + int(elapsed_ms))
        return self._latest_ms

    async def start(self) -> None:
        self._synchronize(await self._ask("POST", "/sim/clock/join", self._me))

    async def stop(self) -> None:
        try:
            if self._heard_ms:
                await self._ask("POST", "/sim/clock/leave", {"name": self._me["name"]})
        except RetryLater:
            pass  # the venue is gone, and waits for no bot
        finally:
            self._heard_ms = 0

    async def sleep_until(self, when_ms: int) -> None:
        await asyncio.sleep(0)
        away_since_s: float | None = None
        while self.now_ms() < when_ms:
            try:
                if away_since_s is not None:
                    await self.start()
                name = quote(str(self._me["name"]), safe="")
                self._synchronize(await self._ask("GET", f"/sim/clock/wait?until={when_ms}&name={name}"))
                away_since_s = None
            except RetryLater:
                away_since_s = away_since_s or time.monotonic()
                if time.monotonic() - away_since_s > _AWAY_S:
                    raise
                await asyncio.sleep(_ASK_AGAIN_S)

    def _synchronize(self, answer: dict[str, Any]) -> None:
        self._heard_ms, self._heard_s = int(answer["nowMs"]), time.monotonic()
        self._speed = float(answer.get("speed", self._speed))

    async def _ask(self, method: str, path: str, value: Any = None) -> dict[str, Any]:
        status, body = await self._http.ask(method, path, value, timeout_s=None)
        if status == 200:
            return msgspec.json.decode(body, type=dict[str, Any])
        raise (RetryLater if status >= 500 else UserError)(_said(self._http.url, status, body))


class VenueBroker(Broker):
    """Trades on an account of a venue, at the venue's prices."""

    reports_fills: ClassVar[bool] = True
    _fill_at: ClassVar[FillAt] = "venue"

    def __init__(self, url: str, account: str, kind: Kind) -> None:
        self._http = HttpClient(url)
        self._account = account
        self._kind: Kind = kind

    def account(self) -> str:
        return f"{self._kind}:{self._http.url}:{self._account}"

    async def start(self) -> None:
        try:
            await self._ask("holdings", self._wish(), list[VenuePosition])
        except OrderTransient as error:
            raise RetryLater(str(error)) from None
        except OrderRejected as error:
            raise UserError(str(error)) from None

    async def find(self, order: Order) -> OrderReport:
        return await self._ask("find", self._wish(order=order), OrderReport)

    async def open_position(self, order: Order) -> Fill | None:
        return await self._ask(order.kind, self._wish(order=order), Fill)

    async def place_entry(self, order: Order) -> None:
        await self._ask("place", self._wish(order=order), type(None))

    async def cancel_entry(self, order: Order) -> Fill | None:
        return await self._ask("cancel", self._wish(order=order), _MAYBE_FILL)

    async def close_position(self, order: Order) -> Fill | None:
        return await self._ask("close", self._wish(order=order), _MAYBE_FILL)

    async def add_to_position(self, order: Order) -> Fill | None:
        return await self._ask("add", self._wish(order=order), Fill)

    async def reduce_position(self, order: Order) -> Fill | None:
        return await self._ask("reduce", self._wish(order=order), Fill)

    async def move_stop(self, order: Order) -> None:
        await self._ask("move", self._wish(order=order), type(None))

    async def move_take(self, order: Order) -> None:
        await self._ask("move", self._wish(order=order), type(None))

    async def check_position(self, position: Position) -> Fill | None:
        wish = self._wish(signal_id=position.signal_id, symbol=position.symbol)
        wish = msgspec.structs.replace(wish, direction=position.side, since_ms=position.opened_at_ms)
        return await self._ask("check-position", wish, _MAYBE_FILL)

    async def check_entry(self, entry: RestingEntry) -> Fill | None:
        wish = self._wish(signal_id=entry.signal_id, symbol=entry.symbol)
        return await self._ask("check-entry", wish, _MAYBE_FILL)

    async def holdings(self, symbols: Sequence[str]) -> list[VenuePosition] | None:
        return await self._ask("holdings", self._wish(symbols=tuple(symbols)), list[VenuePosition])

    def _wish(
        self, *, order: Order | None = None, signal_id: str = "", symbol: str = "", symbols: tuple[str, ...] = ()
    ) -> Wish:
        return Wish(
            account=self._account,
            kind=self._kind,
            fill_at=self._fill_at,
            store_id=self.store_id,
            order=order,
            signal_id=signal_id,
            symbol=symbol,
            symbols=symbols,
        )

    async def _ask(self, operation: str, wish: Wish, kind: type[T]) -> T:
        try:
            status, body = await self._http.ask("POST", f"/broker/{operation}", wish)
        except RetryLater as error:
            raise OrderTransient(str(error), outcome=error.outcome) from None
        if status == 200:
            return msgspec.json.decode(body, type=kind)
        try:
            problem = msgspec.json.decode(body, type=Problem)
        except msgspec.ValidationError:
            # Only an internal error of the server leaves the outcome open.
            outcome = Outcome.UNKNOWN if status == 500 else Outcome.NOT_DONE
            raise OrderTransient(_said(self._http.url, status, body), outcome=outcome) from None
        if problem.error == "transient":
            raise OrderTransient(problem.message, outcome=Outcome[problem.outcome])
        raise (OrderRejected if problem.error == "rejected" else OrderDeleted)(problem.message)


class ReferenceBroker(VenueBroker):
    """Trades on an account of a venue, at the prices that the engine decided."""

    reports_fills: ClassVar[bool] = False
    _fill_at: ClassVar[FillAt] = "reference"


_MAYBE_FILL: Any = Fill | None


def _said(url: str, status: int, body: bytes) -> str:
    return f"the venue at {url} answered {status}: {body.decode(errors='replace'):.300}"


_SECTIONS: Final = {
    "public": "/api/v3",
    "private": "/api/v3",
    "v1": "/api/v1",
    "sapi": "/sapi/v1",
    "sapiV2": "/sapi/v2",
    "sapiV3": "/sapi/v3",
    "sapiV4": "/sapi/v4",
    "fapiPublic": "/fapi/v1",
    "fapiPublicV2": "/fapi/v2",
    "fapiPublicV3": "/fapi/v3",
    "fapiPrivate": "/fapi/v1",
    "fapiPrivateV2": "/fapi/v2",
    "fapiPrivateV3": "/fapi/v3",
    "fapiData": "/futures/data",
    "dapiPublic": "/dapi/v1",
    "dapiPrivate": "/dapi/v1",
    "dapiPrivateV2": "/dapi/v2",
}


def ccxt_options(url: str, exchange_class: Any) -> dict[str, Any]:
    """The options with which ccxt's `binance` or `binanceusdm` talks to the venue at `url`, and to no other address.

        client = ccxt.async_support.binanceusdm(ccxt_options("http://127.0.0.1:8899", ccxt.async_support.binanceusdm))

    ccxt distinguishes the error codes of spot and futures by Binance's addresses, so they are passed as options.
    """
    described = exchange_class().describe()
    codes = described["exceptions"]["linear" if described["id"] == "binanceusdm" else "spot"]["exact"]
    return {
        "apiKey": API_KEY,
        "secret": API_SECRET,
        "urls": {"api": {section: url.rstrip("/") + path for section, path in _SECTIONS.items()}},
        "exceptions": {"exact": codes},
        "timeout_on_exit": 0,  # ccxt gives TLS time to end, and here is none
    }
