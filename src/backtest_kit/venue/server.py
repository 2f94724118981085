"""`VenueServer`: a venue on loopback with Binance's API, the API of `client`, and one to control it.

Control is under `/sim/`, without injected faults:

- `GET /sim/state`: time, orders, fills, accounts and the number of requests; `GET /sim/requests`: the last of them
- `GET /sim/clock`, `POST /sim/clock/advance` {byMs | toMs}, `POST /sim/clock/join` and `/leave` {name, sleepers},
  `GET /sim/clock/wait?until=MS&name=NAME`: answers at that time
- `GET`, `POST` and `DELETE /sim/faults`
- `POST /sim/trade` {kind, account, symbol, side, quantity}: a manual trade on the account;
  `POST /sim/cancel` {kind, account, clientOrderId}: a manual cancellation
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from decimal import Decimal
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec

from backtest_kit.errors import BacktestKitError, Conflict, Outcome, RetryLater, UserError
from backtest_kit.market.clock import AcceleratedClock, SteppedClock
from backtest_kit.model.candle import COLUMNS
from backtest_kit.model.interval import MINUTE_MS, floor_ms
from backtest_kit.venue.account import SpotAccount
from backtest_kit.venue.binance.api import API_KEY, API_SECRET, BinanceApi
from backtest_kit.venue.desk import BrokerDesk
from backtest_kit.venue.exchange import Exchange
from backtest_kit.venue.faults import Fault, Faults, Strike
from backtest_kit.venue.http import Answer, HttpServer, Request
from backtest_kit.venue.journal import Cancel, Place
from backtest_kit.venue.orders import Kind, NewOrder, Refused, Side
from backtest_kit.venue.venue import Venue

_KEPT_REQUESTS: Final = 10_000
_SECRET_PARAMS: Final = frozenset({"signature", "timestamp", "recvWindow"})


class ManualTrade(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """A manual trade, outside of any bot."""

    symbol: str
    side: Side
    quantity: Decimal
    kind: Kind = "futures"
    account: str = API_KEY


class ManualCancellation(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """A manual cancellation, outside of any bot."""

    client_order_id: str
    kind: Kind = "futures"
    account: str = API_KEY


class Join(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """A participant that joins or leaves a stepped clock."""

    name: str
    sleepers: int = 1


class Advance(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """How far a stepped clock is set forward."""

    by_ms: int = 0
    to_ms: int = 0


class VenueServer:
    """Serves `venue` until it is stopped. `keys` are the secrets by API key, which is the name of the account."""

    def __init__(
        self,
        venue: Venue,
        *,
        port: int = 0,
        keys: Mapping[str, str] | None = None,
        faults: Faults | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.venue = venue
        self.faults = faults or Faults()
        self.requests: deque[dict[str, Any]] = deque(maxlen=_KEPT_REQUESTS)
        self.request_count = 0
        self._log = log or (lambda line: None)
        self._binance = BinanceApi(venue, {API_KEY: API_SECRET} if keys is None else keys)
        self._desk = BrokerDesk(venue)
        self._http = HttpServer(self._answer, port)
        self._ticking: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[Answer | None]] = set()

    @property
    def url(self) -> str:
        return self._http.url

    async def start(self) -> None:
        """Start the venue and listen.

        Raises:
            UserError, Damaged: as `Venue.start`, or the port is taken.
        """
        await self.venue.start()
        await self._http.start()
        if not isinstance(self.venue.clock, SteppedClock):
            self._ticking = asyncio.create_task(self._tick())

    async def stop(self) -> None:
        """Finish running requests, stop listening, stop the venue. Idempotent."""
        ticking, self._ticking = self._ticking, None
        if ticking is not None:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
        await self._http.stop()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self.venue.stop()

    async def _tick(self) -> None:
        """Match each minute as it closes, even without requests."""
        clock = self.venue.clock
        while True:
            await clock.sleep_until(floor_ms(clock.now_ms(), MINUTE_MS) + MINUTE_MS)
            try:
                async with self.venue.at_now():
                    pass
            except RetryLater as error:
                self._log(f"candles are late: {error}")

    async def _answer(self, request: Request) -> Answer | None:
        if request.path.startswith("/sim/"):
            return await self._control(request)
        # A request that has reached an exchange is carried out, even if its sender is gone.
        task: asyncio.Task[Answer | None] = asyncio.create_task(self._trade(request))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def _trade(self, request: Request) -> Answer | None:
        strike = self.faults.strike(request.method, request.path)
        noted = self._note(request, strike)
        if strike.latency_s:
            await asyncio.sleep(strike.latency_s)
        if strike.of("lose_request", "outage"):
            noted["outcome"] = "lost before it was carried out"
            return None
        broken = strike.of("rate_limit", "error")
        if broken is not None:
            answer = _broken(broken)
        else:
            answer = await self._do(request, strike)
            if strike.of("duplicate"):
                answer = await self._do(request, strike)
        if strike.of("lose_response"):
            noted["outcome"] = "carried out, and the answer lost"
            return None
        noted["outcome"] = answer.status
        return answer

    async def _do(self, request: Request, strike: Strike) -> Answer:
        try:
            if self._binance.serves(request.path):
                return await self._binance.answer(request, strike)
            if request.path.startswith("/broker/"):
                return await self._desk.answer(request, strike)
            if request.path.startswith("/candles/"):
                return Answer(await self._candles(request.path.split("/")[2:], dict(parse_qsl(request.query))))
        except (UserError, Refused) as error:
            return Answer({"error": str(error)}, 400)
        except BacktestKitError as error:
            return Answer({"error": str(error)}, 500 if error.outcome is Outcome.UNKNOWN else 503)
        return Answer({"error": f"{request.method} {request.path} is not served here"}, 404)

    async def _candles(self, path: list[str], params: Mapping[str, str]) -> Any:
        """`/candles/{symbol}/range`, or `/candles/{symbol}/{interval}?start=MS&stop=MS`."""
        symbol, what = path if len(path) == 2 else ("", "")
        self.venue.exchanges["spot"].market(symbol)
        if what == "range":
            return await self.venue.range(symbol)
        rows = await self.venue.rows(symbol, what, int(params["start"]), int(params["stop"]))
        return {name: [row[at] for row in rows] for at, name in enumerate(COLUMNS)}

    def _note(self, request: Request, strike: Strike) -> dict[str, Any]:
        params: dict[str, Any] = dict(parse_qsl(request.query or request.body.decode(errors="replace")))
        if request.path.startswith("/broker/") and request.body:
            params = _shown(request.body)
        noted: dict[str, Any] = {
            "number": self.request_count,
            "atMs": self.venue.clock.now_ms(),
            "method": request.method,
            "path": request.path,
            "account": request.api_key,
            "params": {name: value for name, value in params.items() if name not in _SECRET_PARAMS},
            "faults": [fault.kind for fault in strike.faults],
        }
        self.request_count += 1
        self.requests.append(noted)
        if request.method != "GET" or strike.faults:
            self._log(f"{request.method} {request.path} {noted['params']} {' '.join(noted['faults'])}".rstrip())
        return noted

    # Control

    async def _control(self, request: Request) -> Answer:
        route = _CONTROLS.get((request.method, request.path.removeprefix("/sim/")))
        if route is None:
            known = ", ".join(f"{method} /sim/{path}" for method, path in _CONTROLS)
            return Answer({"error": f"{request.method} {request.path} is not served here; {known} are"}, 404)
        try:
            return Answer(await route(self, request))
        except (UserError, Refused, msgspec.MsgspecError) as error:
            return Answer({"error": str(error)}, 400)
        except Conflict as error:
            return Answer({"error": str(error)}, 409)
        except RetryLater as error:
            return Answer({"error": str(error)}, 503)

    async def _state(self, request: Request) -> Any:
        async with self.venue.at_now() as now_ms:
            return {
                "nowMs": now_ms,
                "requests": self.request_count,
                **{kind: _state_of(exchange) for kind, exchange in self.venue.exchanges.items()},
            }

    async def _requests(self, request: Request) -> Any:
        return list(self.requests)

    async def _clock(self, request: Request) -> Any:
        clock = self.venue.clock
        stepped = isinstance(clock, SteppedClock)
        return {
            "nowMs": clock.now_ms(),
            "speed": 0 if stepped else clock.speed if isinstance(clock, AcceleratedClock) else 1,
            "waiting": clock.waiting() if isinstance(clock, SteppedClock) else {},
        }

    async def _advance(self, request: Request) -> Any:
        clock, by = self._stepped(), msgspec.json.decode(request.body, type=Advance)
        clock.advance_to(by.to_ms or clock.now_ms() + by.by_ms)
        async with self.venue.at_now() as now_ms:
            return {"nowMs": now_ms}

    async def _join(self, request: Request) -> Any:
        clock = self.venue.clock
        if isinstance(clock, SteppedClock):
            joining = msgspec.json.decode(request.body, type=Join)
            clock.join(joining.name, joining.sleepers)
        return await self._clock(request)

    async def _leave(self, request: Request) -> Any:
        clock = self.venue.clock
        if isinstance(clock, SteppedClock):
            clock.leave(msgspec.json.decode(request.body, type=Join).name)
        return await self._clock(request)

    async def _wait(self, request: Request) -> Any:
        params, clock = dict(parse_qsl(request.query)), self.venue.clock
        until = params.get("until", "")
        if not until.isdigit():
            raise UserError(f"until is {until!r}: give epoch milliseconds")
        if isinstance(clock, SteppedClock):
            await clock.sleep_until(int(until), params.get("name", ""))
        else:
            await clock.sleep_until(int(until))
        async with self.venue.at_now() as now_ms:
            return {"nowMs": now_ms}

    def _stepped(self) -> SteppedClock:
        if not isinstance(self.venue.clock, SteppedClock):
            raise UserError("this clock runs by itself: start the venue with a stepped clock to set it forward")
        return self.venue.clock

    async def _list_faults(self, request: Request) -> Any:
        return self.faults.listed()

    async def _add_fault(self, request: Request) -> Any:
        self.faults.add(Fault.convert(msgspec.json.decode(request.body)))
        return self.faults.listed()

    async def _clear_faults(self, request: Request) -> Any:
        self.faults.clear()
        return self.faults.listed()

    async def _trade_by_hand(self, request: Request) -> Any:
        trade = msgspec.json.decode(request.body, type=ManualTrade)
        async with self.venue.at_now():
            exchange = self.venue.exchanges[trade.kind]
            new = NewOrder(
                symbol=trade.symbol,
                side=trade.side,
                type="market",
                client_order_id=f"by-hand-{len(exchange.orders) + 1}",
                quantity=trade.quantity,
            )
            return self.venue.do(trade.kind, trade.account, Place(new))

    async def _cancel_by_hand(self, request: Request) -> Any:
        wanted = msgspec.json.decode(request.body, type=ManualCancellation)
        async with self.venue.at_now():
            order = self.venue.exchanges[wanted.kind].find(wanted.account, client_order_id=wanted.client_order_id)
            return self.venue.do(wanted.kind, wanted.account, Cancel(order.symbol, order_id=order.id))


def _shown(body: bytes) -> dict[str, Any]:
    """The request of a broker, with its order, on one level and without defaults."""
    try:
        wish = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.MsgspecError:
        return {"body": body.decode(errors="replace")}
    wish |= wish.pop("order", None) or {}
    return {name: value for name, value in wish.items() if name != "identity" and value not in ("", [], None)}


def _state_of(exchange: Exchange) -> dict[str, Any]:
    return {
        "prices": exchange.prices,
        "orders": list(exchange.orders.values()),
        "fills": exchange.fills,
        "accounts": {
            name: {"free": account.free, "locked": account.locked}
            if isinstance(account, SpotAccount)
            else {
                "wallet": account.wallet,
                "positions": {
                    symbol: {"quantity": held.quantity, "priceOpen": held.price_open}
                    for symbol, held in account.positions.items()
                },
            }
            for name, account in exchange.accounts.items()
        },
    }


def _broken(fault: Fault) -> Answer:
    if fault.kind == "error":
        return Answer({"code": fault.code, "msg": fault.message}, fault.status or 500)
    return Answer(
        {"code": -1003, "msg": "Too many requests; current limit is 6000 request weight per 1 MINUTE."},
        fault.status or 429,
        {"Retry-After": "1"},
    )


_CONTROLS: Final[dict[tuple[str, str], Callable[[VenueServer, Request], Coroutine[Any, Any, Any]]]] = {
    ("GET", "state"): VenueServer._state,
    ("GET", "requests"): VenueServer._requests,
    ("GET", "clock"): VenueServer._clock,
    ("POST", "clock/advance"): VenueServer._advance,
    ("POST", "clock/join"): VenueServer._join,
    ("POST", "clock/leave"): VenueServer._leave,
    ("GET", "clock/wait"): VenueServer._wait,
    ("GET", "faults"): VenueServer._list_faults,
    ("POST", "faults"): VenueServer._add_fault,
    ("DELETE", "faults"): VenueServer._clear_faults,
    ("POST", "trade"): VenueServer._trade_by_hand,
    ("POST", "cancel"): VenueServer._cancel_by_hand,
}
