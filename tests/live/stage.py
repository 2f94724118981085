"""The stage of the crash tests: venues on sockets, bots in processes of their own, and what is left at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pytest
from tests.live.bot import End, Heard, Job, Rows
from tests.live.scripts import START, story_price

from backtest_kit.broker.order_ids import digest_of, parse
from backtest_kit.market.clock import Clock, SteppedClock
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.venue.binance.api import API_KEY
from backtest_kit.venue.faults import Fault, Faults, Strike
from backtest_kit.venue.server import VenueServer
from backtest_kit.venue.venue import Venue

BOT: Final = Path(__file__).with_name("bot.py")
ORDERS: Final = ("open", "place", "activate", "cancel", "add", "reduce", "close", "move")
"""Operations of a broker that change something at the venue."""
ONCE: Final = ("open", "place", "add", "reduce", "close")
"""Those of them that must not be sent again once the venue has carried them out."""
BEFORE: Final = 2000
"""Minutes of candles before the start."""


def flat_candles(price_of: Callable[[int], float], minutes: int) -> CandleSeries:
    """A candle a minute, all at the price of that minute."""
    numbers = np.arange(-BEFORE, minutes)
    prices = np.array([price_of(int(number)) for number in numbers])
    return CandleSeries(START + numbers * MINUTE_MS, prices, prices, prices, prices, np.ones(len(numbers)))


def story_candles() -> CandleSeries:
    return flat_candles(story_price, 300)


class DeadlyFaults(Faults):
    """Kills who sends a request, when it has come in: before it is done, or after it."""

    def __init__(self) -> None:
        super().__init__()
        self.victim = 0
        """Whom: a pid, or nobody."""
        self.deaths: list[tuple[str, int]] = []
        """At which requests: an operation, and how many of its kind go well first. One by one."""
        self._met = 0

    def strike(self, method: str, path: str) -> Strike:
        if self.deaths and self.victim and path == f"/broker/{self.deaths[0][0]}":
            self._met += 1
            if self._met > self.deaths[0][1]:
                self.deaths.pop(0)
                self._met = 0
                os.kill(self.victim, signal.SIGKILL)
        return super().strike(method, path)


class Forks:
    """A process that forks bots, and how they end. One at a time for each name."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._number = 0
        self._told: dict[int, asyncio.Queue[dict[str, int]]] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, **environment: str) -> Forks:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(BOT), env=environment, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        return cls(process)

    async def bot(self, **job: Any) -> Bot:
        """A child that does `job`."""
        self._number += 1
        assert self._process.stdin is not None
        told = self._told[self._number] = asyncio.Queue()
        self._process.stdin.write(msgspec.json.encode(Job(number=self._number, **job)) + b"\n")
        begun = await told.get()
        return Bot(begun["pid"], told)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            told = msgspec.json.decode(line)
            self._told[told["number"]].put_nowait(told)

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._reading


class Bot:
    def __init__(self, pid: int, told: asyncio.Queue[dict[str, int]]) -> None:
        self.pid = pid
        self._told = told

    async def ended(self) -> int:
        """Its exit code; below 0 the signal that has ended it."""
        async with asyncio.timeout(120):
            return (await self._told.get())["exit"]


class Stage:
    """One venue, one place for what bots write, and bots that come and go."""

    def __init__(self, forks: Forks, server: VenueServer, place: Path, **job: Any) -> None:
        self.forks = forks
        self.server = server
        self.place = place
        self.faults = server.faults
        self.kills = 0
        self._job: dict[str, Any] = {
            "venue": server.url,
            "store": f"file:{place}/store",
            "place": str(place),
            "script": "story",
            **job,
        }

    async def bot(self, **job: Any) -> Bot:
        bot = await self.forks.bot(**{**self._job, **job})
        if isinstance(self.faults, DeadlyFaults):
            self.faults.victim = bot.pid
        return bot

    async def trade(self, crashes: Sequence[str] = (), **job: Any) -> None:
        """Trade to the end, dying at the crash points in turn. One that is not reached in a life ends the list."""
        for crash in crashes:
            bot = await self.bot(crash=crash, **job)
            if (code := await bot.ended()) == 0:
                return
            assert code == -signal.SIGKILL, self.said()
            self.kills += 1
            job.pop("full_from_ms", None)
        while (code := await (await self.bot(**job)).ended()) != 0:
            assert code == -signal.SIGKILL, self.said()
            assert isinstance(self.faults, DeadlyFaults), "nobody was told to kill it"
            self.kills += 1

    def said(self) -> str:
        return (self.place / "log").read_text()[-4000:]

    def end(self, name: str = "bot") -> End:
        return msgspec.json.decode((self.place / f"end-{name}").read_bytes(), type=End)

    def opened(self) -> list[dict[str, Any]]:
        """The requests that open a position."""
        return [request for request in self.server.requests if request["path"] == "/broker/open"]

    def heard(self, which: str) -> list[Heard]:
        lines = (self.place / which).read_bytes().splitlines()
        return [msgspec.json.decode(line, type=Heard) for line in lines]

    def outcome(self) -> dict[str, Any]:
        """Everything that must be the same, however often somebody died on the way."""
        exchange = self.server.venue.exchanges["futures"]
        account = exchange.account(API_KEY)
        orders: dict[str, list[Any]] = {}
        for order in exchange.orders.values():
            name = plain_id(order.client_order_id)
            fields = msgspec.structs.asdict(order) | {"id": 0, "client_order_id": name, "group": plain_id(order.group)}
            orders.setdefault(name, []).append(fields)
        books = self.end().books
        strategy = books["strategy"] or {}
        return {
            "orders": orders,
            "fills": [
                (plain_id(fill.client_order_id), fill.side, fill.price, fill.quantity, fill.fee, fill.time_ms)
                for fill in exchange.fills
            ],
            "wallet": account.wallet,  # type: ignore[union-attr]
            "positions": {
                symbol: (each.quantity, each.price_open)
                for symbol, each in account.positions.items()  # type: ignore[union-attr]
                if each.quantity
            },
            "books": {
                "signal": unnumbered(books["signal"]),
                "schedule": books["schedule"],
                **{name: unnumbered(strategy.get(name)) for name in ("state", "intent")},
            },
            "records": {told(each): unnumbered(each.event) for each in self.heard("records")},
            "trades": [
                unnumbered(each.event["trade"]) for each in unique(self.heard("records")) if each.action == "closed"
            ],
        }

    def check(self) -> list[str]:
        """What is wrong, whatever the run without a death would have done."""
        wrong = []
        heard = Counter(map(told, self.heard("heard")))
        wrong += [f"heard {count} times: {what}" for what, count in heard.items() if count > 1]
        wrong += [f"trouble: {each.action} {each.event}" for each in self.heard("trouble")]
        wrong += self.sent_again()
        wrong += self.miscounted()
        return wrong

    def miscounted(self) -> list[str]:
        """Positions whose books say another cost than the venue was paid."""
        exchange = self.server.venue.exchanges["futures"]
        paid: dict[str, float] = {}
        for order in exchange.orders.values():
            if order.filled and not order.reduce_only:
                signal = plain_id(order.client_order_id).partition("-")[0]
                paid[signal] = paid.get(signal, 0.0) + float(order.filled_cost)
        held = {digest_of(held["entry"]["signal"]["id"] if (held := self.end().books["signal"]) else "")}
        booked = {
            digest_of(each.signal_id): sum(entry["cost"] for entry in each.event["trade"]["position"]["entries"])
            for each in self.heard("records")
            if each.action == "closed"
        }
        return [
            f"{signal_id} was paid {paid.get(signal_id)} and is in the books with {cost}"
            for signal_id, cost in booked.items()
            if paid.get(signal_id) != pytest.approx(cost)
        ] + [f"{signal_id} is in no books" for signal_id in paid.keys() - booked.keys() - held]

    def sent_again(self) -> list[str]:
        """Orders that came in again after the venue had carried them out."""
        done, again = set(), []
        known = {order.client_order_id for order in self.server.venue.exchanges["futures"].orders.values()}
        for request in self.server.requests:
            operation = request["path"].removeprefix("/broker/")
            order_id = (operation, request["params"].get("clientOrderId"))
            if operation not in ONCE:
                continue
            if order_id in done:
                again.append(f"sent again: {order_id} at {request['atMs']}")
            # A close of what reductions have closed already is no order at the venue.
            if request.get("outcome") in (200, "carried out, and the answer lost") and order_id[1] in known:
                done.add(order_id)
        return again


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is not as expected, down to the value that differs."""
    wrong = []
    for what, value in expected.items():
        other = found[what]
        if isinstance(value, dict):
            for name in {**value, **other}:
                wrong += [f"{what} {name}: {each}" for each in difference(value.get(name), other.get(name))]
        else:
            wrong += [f"{what}: {each}" for each in difference(value, other)]
    return wrong


def difference(value: Any, other: Any) -> list[str]:
    if value == other:
        return []
    if isinstance(value, dict) and isinstance(other, dict):
        names = [name for name in {**value, **other} if value.get(name) != other.get(name)]
        return [", ".join(f"{name} {other.get(name)} instead of {value.get(name)}" for name in names)]
    if isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
        return [each for pair in zip(value, other, strict=True) for each in difference(*pair)]
    return [f"{other} instead of {value}"]


def unique(heard: list[Heard]) -> list[Heard]:
    """Each event once, in the order in which they were told first."""
    return list({told(each): each for each in heard}.values())


def told(heard: Heard) -> tuple[Any, ...]:
    """What makes an event one of its own: of several changes in a minute each leaves another position."""
    change = heard.event.get("change")
    return (
        heard.action,
        heard.when_ms,
        heard.signal_id,
        change,
        repr(unnumbered(heard.event["position"])) if change else "",
    )


def plain_id(client_order_id: str) -> str:
    """A client order id without its store and its number, which differ from run to run and grow with attempts."""
    order_id = parse(client_order_id)
    return f"{order_id.digest}-{order_id.kind}" if order_id else client_order_id


def unnumbered(value: Any) -> Any:
    """Plain fields without the numbers of the exchange, and with each id of `plain_id` once: a close may take two."""
    if isinstance(value, dict):
        found = {name: unnumbered(item) for name, item in value.items() if name != "orderIds"}
        if "clientOrderIds" in found:
            found["clientOrderIds"] = [*dict.fromkeys(map(plain_id, found["clientOrderIds"]))]
        return found
    return [unnumbered(item) for item in value] if isinstance(value, list | tuple) else value


@contextlib.asynccontextmanager
async def forking(**environment: str) -> AsyncIterator[Forks]:
    """A process that forks bots, with more in its environment."""
    forks = await Forks.start(**environment)
    try:
        yield forks
    finally:
        await forks.stop()


@contextlib.asynccontextmanager
async def stage(
    forks: Forks,
    place: Path,
    *,
    candles: CandleSeries | None = None,
    clock: Clock | None = None,
    faults: Sequence[Fault] = (),
    symbols: tuple[str, ...] = ("BTCUSDT",),
    start_ms: int = START,
    venue: dict[str, Any] | None = None,
    **job: Any,
) -> AsyncIterator[Stage]:
    """A stage on which nobody trades yet."""
    place.mkdir(parents=True)
    deadly = DeadlyFaults()
    for fault in faults:
        deadly.add(fault)
    source = Rows(story_candles() if candles is None else candles)
    server = VenueServer(Venue(source, symbols, clock or SteppedClock(start_ms), **(venue or {})), faults=deadly)
    await server.start()
    try:
        yield Stage(forks, server, place, symbols=symbols, **job)
    finally:
        await server.stop()
