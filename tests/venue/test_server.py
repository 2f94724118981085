from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Any

import ccxt.async_support as ccxt_library
import msgspec
import pytest
from tests.commands import run_command
from tests.venue.conftest import START, advance, order_of

from backtest_kit.broker.base import Broker, OrderTransient
from backtest_kit.broker.order_ids import SignalIds
from backtest_kit.errors import Damaged, Outcome, RetryLater, UserError
from backtest_kit.market import sources
from backtest_kit.market.clock import AcceleratedClock, SteppedClock, SystemClock
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.venue.client import ccxt_options, connect
from backtest_kit.venue.exchange import Terms
from backtest_kit.venue.faults import Fault, Faults
from backtest_kit.venue.http import HttpClient
from backtest_kit.venue.server import VenueServer
from backtest_kit.venue.venue import Venue

Serve = Callable[..., Awaitable[VenueServer]]
BrokerOf = Callable[..., Broker]
COMMAND = [str(Path(sys.executable).with_name("backtest-kit")), "venue", "--port", "0"]
HttpOf = Callable[[VenueServer], HttpClient]


@pytest.fixture
async def trader() -> AsyncIterator[Callable[[VenueServer], Any]]:
    made: list[Any] = []

    def make(server: VenueServer) -> Any:
        options = ccxt_options(server.url, ccxt_library.binanceusdm)
        made.append(ccxt_library.binanceusdm({**options, "enableRateLimit": False, "timeout": 10_000}))
        return made[-1]

    yield make
    for client in made:
        await client.close()


def entry_of(signal_id: str) -> str:
    return SignalIds(signal_id).entry


async def ask(http: HttpClient, method: str, path: str, value: Any = None) -> Any:
    status, body = await http.ask(method, path, value)
    assert status == 200, body
    return msgspec.json.decode(body)


# Faults, as a real client of the exchange meets them


@pytest.mark.parametrize(
    ("fault", "error", "filled"),
    [
        ({"kind": "lose_request"}, ccxt_library.NetworkError, 0),
        ({"kind": "lose_response"}, ccxt_library.NetworkError, 1),
        ({"kind": "outage", "count": 2}, ccxt_library.NetworkError, 0),
        ({"kind": "outage", "seconds": 60}, ccxt_library.NetworkError, 0),
        ({"kind": "latency", "latency_ms": 800}, ccxt_library.RequestTimeout, 1),
        ({"kind": "duplicate"}, None, 2),
        ({"kind": "reject"}, ccxt_library.InvalidOrder, 0),
        ({"kind": "rate_limit"}, ccxt_library.DDoSProtection, 0),
        ({"kind": "error", "status": 503, "code": -1007, "message": "Timeout."}, ccxt_library.BaseError, 0),
        ({"kind": "error", "status": 400, "code": -1021, "message": "Too late."}, ccxt_library.InvalidNonce, 0),
    ],
)
async def test_every_fault_as_ccxt_meets_it(
    serve: Serve,
    trader: Callable[[VenueServer], Any],
    http_of: HttpOf,
    fault: dict[str, Any],
    error: type[Exception] | None,
    filled: int,
) -> None:
    server = await serve()
    client = trader(server)
    await client.load_markets()
    (added,) = await ask(http_of(server), "POST", "/sim/faults", {"endpoint": "POST */order", **fault})
    assert (added["met"], added["hit"]) == (0, 0)
    params = {"newClientOrderId": "once"}
    if fault["kind"] == "latency":
        client.timeout = fault["latency_ms"] / 2
    with pytest.raises(error) if error else nullcontext():
        await client.create_order("BTC/USDT:USDT", "market", "buy", 0.01, params=params)
    client.timeout = 10_000
    if fault["kind"] == "latency":
        await until(lambda: server.requests[-1].get("outcome") == 200)
    (met,) = await ask(http_of(server), "GET", "/sim/faults")
    assert met["hit"] == 1
    assert await ask(http_of(server), "DELETE", "/sim/faults") == []
    state = await ask(http_of(server), "GET", "/sim/state")
    assert [fill["client_order_id"] for fill in state["futures"]["fills"]] == ["once"] * filled
    if filled:
        assert (await client.fetch_order("", "BTC/USDT:USDT", params={"origClientOrderId": "once"}))["filled"] == 0.01
    else:
        order = await client.create_order("BTC/USDT:USDT", "market", "buy", 0.01, params=params)
        assert order["status"] == "closed"
    asked = [each for each in await ask(http_of(server), "GET", "/sim/requests") if each["method"] == "POST"]
    assert all("signature" not in each["params"] for each in asked)
    assert asked[0]["faults"] == [fault["kind"]]


async def until(fact: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not fact():
            await asyncio.sleep(0.01)


async def test_a_part_of_the_next_order(serve: Serve, trader: Callable[[VenueServer], Any]) -> None:
    server = await serve()
    client = trader(server)
    await client.load_markets()
    server.faults.add(Fault.parse("partial,fraction=0.25,rest_expires=true"))
    order = await client.create_order("BTC/USDT:USDT", "market", "buy", 0.01)
    assert (order["status"], order["filled"], order["remaining"]) == ("expired", 0.0025, 0.0075)


def test_chance_and_order_of_faults_are_those_of_the_seed() -> None:
    def struck(seed: int) -> list[bool]:
        faults = Faults(seed)
        faults.add(Fault(kind="reject", chance=0.5, count=0))
        return [bool(faults.strike("POST", "/api/v3/order").faults) for _ in range(50)]

    assert struck(1) == struck(1)
    assert struck(1) != struck(2)
    assert 10 < sum(struck(1)) < 40


def test_faults_choose_their_requests() -> None:
    seconds = 100.0
    faults = Faults(monotonic_s=lambda: seconds)
    faults.add(Fault(kind="reject", endpoint="POST */order", skip=1, count=2))
    faults.add(Fault(kind="outage", endpoint="GET *", seconds=5))
    hits = [bool(faults.strike("POST", "/api/v3/order").of("reject")) for _ in range(5)]
    assert hits == [False, True, True, False, False]
    assert not faults.strike("POST", "/api/v3/listenKey").faults
    assert faults.strike("GET", "/a").of("outage")
    seconds = 105.0
    assert faults.strike("GET", "/b").of("outage")
    seconds = 105.1
    assert not faults.strike("GET", "/c").faults


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("explode", "Invalid enum value 'explode'"),
        ("reject,often=1", "unknown field `often`"),
        ("reject,count=x", "Expected `int`"),
        ("partial,fraction=2", "fraction and chance are up to 1"),
    ],
)
def test_a_fault_that_is_none_is_explained(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Fault.parse(text)


# Time


async def test_candles_of_the_client_are_closed_ones(serve: Serve) -> None:
    server = await serve()
    source = connect(server.url).source()
    advance(server, 30)
    got = await source.fetch("BTCUSDT", "1m", START, START + 90 * MINUTE_MS)
    assert got == await sources.synthetic(7).fetch("BTCUSDT", "1m", START, START + 30 * MINUTE_MS)
    assert await source.range("BTCUSDT") == (1_420_070_400_000, START + 30 * MINUTE_MS)
    with pytest.raises(UserError, match="XRPUSDT is not traded here; BTCUSDT, ETHUSDT are"):
        await source.fetch("XRPUSDT", "1m", START, START + MINUTE_MS)
    with pytest.raises(UserError, match="interval is '7m'"):
        await source.fetch("BTCUSDT", "7m", START, START + MINUTE_MS)
    server.faults.add(Fault(kind="rate_limit"))
    with pytest.raises(RetryLater, match="answered 429"):
        await source.fetch("BTCUSDT", "1m", START, START + MINUTE_MS)
    await source.close()


async def test_stepped_time_waits_for_every_bot_and_for_a_dead_one(serve: Serve, http_of: HttpOf) -> None:
    server = await serve()
    venue = connect(server.url)
    bot, other = venue.clock("bot", sleepers=2), venue.clock("other")
    await bot.start()
    await other.start()
    assert bot.now_ms() == START
    sleeps = [asyncio.create_task(bot.sleep_until(START + minutes * MINUTE_MS)) for minutes in (1, 2)]
    clock = server.venue.clock
    assert isinstance(clock, SteppedClock)
    await until(lambda: len(clock.waiting()["bot"]) == 2)
    assert clock.now_ms() == START
    await other.sleep_until(START + MINUTE_MS)
    await sleeps[0]
    assert other.now_ms() == START + MINUTE_MS
    sleeps[1].cancel()  # a process that dies breaks its connections
    await asyncio.gather(sleeps[1], return_exceptions=True)
    await until(lambda: clock.waiting()["bot"] == [])
    waiting = asyncio.create_task(other.sleep_until(START + 3 * MINUTE_MS))
    await until(lambda: clock.waiting()["other"] == [START + 3 * MINUTE_MS])
    assert clock.now_ms() == START + MINUTE_MS
    again = venue.clock("bot")
    await again.start()
    sleep = asyncio.create_task(again.sleep_until(START + 5 * MINUTE_MS))
    await waiting
    assert clock.now_ms() == START + 3 * MINUTE_MS
    await other.stop()
    await sleep
    assert again.now_ms() == START + 5 * MINUTE_MS
    for each in (bot, again):
        await each.stop()


async def test_accelerated_time_runs_by_itself_and_fills_what_it_meets(serve: Serve, broker_of: BrokerOf) -> None:
    fills: list[int] = []
    server = await serve(clock=AcceleratedClock(START, 30_000), on_fill=lambda kind, fill: fills.append(fill.time_ms))
    exchange = server.venue.exchanges["futures"]
    price = float(exchange.prices["BTCUSDT"] * 998 // 1000)
    await broker_of(server).place_entry(order_of("place", price=price))
    clock = connect(server.url).clock()
    await clock.start()
    before = clock.now_ms()
    await clock.sleep_until(before + 10 * MINUTE_MS)
    assert clock.now_ms() >= before + 10 * MINUTE_MS
    await until(lambda: bool(fills))  # nobody asks: the venue's own minutes do it
    placed_ms = exchange.orders[1].created_ms
    minute_ms = placed_ms - placed_ms % MINUTE_MS
    series = await sources.synthetic(7).fetch("BTCUSDT", "1m", minute_ms - MINUTE_MS, START + 10**9)
    touched_ms = int(series.timestamp[1:][(series.low[1:] <= price).argmax()]) + MINUTE_MS
    # An hour passes in the time of a slow request: the market may be there already when the order comes.
    assert fills[0] == (placed_ms if series.close[0] <= price else touched_ms)
    await clock.stop()


async def test_real_time_is_that_of_the_machine(serve: Serve) -> None:
    clock = connect((await serve(clock=SystemClock())).url).clock()
    with pytest.raises(UserError, match="is not started"):
        clock.now_ms()
    await clock.start()
    assert abs(clock.now_ms() - time.time() * 1000) < 5000
    await clock.stop()


async def test_who_waits_bears_a_venue_that_is_restarted(serve: Serve, tmp_path: Path) -> None:
    first = await serve()
    clock = connect(first.url).clock("bot")
    await clock.start()
    stepped = first.venue.clock
    assert isinstance(stepped, SteppedClock)
    stepped.join("driver")
    sleep = asyncio.create_task(clock.sleep_until(START + MINUTE_MS))
    await until(lambda: stepped.waiting()["bot"] == [START + MINUTE_MS])
    port = int(first.url.rpartition(":")[2])
    await first.stop()
    second = VenueServer(Venue(sources.synthetic(7), ["BTCUSDT"], SteppedClock(START)), port=port)
    await second.start()
    await sleep
    assert clock.now_ms() == START + MINUTE_MS
    await clock.stop()
    await second.stop()


async def test_control_explains_itself(serve: Serve, http_of: HttpOf) -> None:
    http = http_of(await serve(clock=AcceleratedClock(START, 60)))
    for method, path, value, said in (
        ("GET", "/sim/nothing", None, b"GET /sim/state"),
        ("POST", "/sim/clock/advance", {"byMs": 1}, b"runs by itself"),
        ("GET", "/sim/clock/wait?until=soon", None, b"until is 'soon'"),
        ("POST", "/sim/cancel", {"clientOrderId": "x"}, b"bot has no order x"),
        ("POST", "/sim/trade", {"symbol": "BTCUSDT"}, b"missing required field"),
    ):
        status, body = await http.ask(method, path, value)
        assert (status, said in body) == (404 if path == "/sim/nothing" else 400, True), body


# The kept state


async def test_a_restarted_venue_is_the_same(
    serve: Serve, broker_of: BrokerOf, http_of: HttpOf, tmp_path: Path
) -> None:
    state = tmp_path / "venue.jsonl"
    terms = Terms(client_ids="ever")
    first = await serve(state=state, terms=terms)
    broker = broker_of(first)
    await broker.open_position(order_of("open"))
    advance(first, 45)
    await broker.place_entry(order_of("place", "s2", price=20_000.0))
    first.faults.add(Fault(kind="partial"))
    with pytest.raises(OrderTransient):
        await broker.add_to_position(order_of("add", number=1))
    advance(first, 45)
    before = await ask(http_of(first), "GET", "/sim/state")
    await first.stop()
    with state.open("ab") as file:
        file.write(b'{"at_ms":17040')  # what a machine leaves that died in the middle of it
    second = await serve(state=state, terms=terms, clock=SteppedClock(before["nowMs"]))
    after = await ask(http_of(second), "GET", "/sim/state")
    assert after | {"requests": 0} == before | {"requests": 0}
    with pytest.raises(OrderTransient, match=f"{entry_of('s1')} is taken by order 1"):
        await broker_of(second).open_position(order_of("open"))
    await second.stop()
    with pytest.raises(UserError, match="the stored state is for BTCUSDT, ETHUSDT on synthetic-7"):
        await serve(state=state, terms=terms, source=sources.synthetic(8))
    with pytest.raises(UserError, match="or for other terms"):
        await serve(state=state, terms=Terms(taker_fee_pct=Decimal("0.2")))
    lines = state.read_bytes().splitlines()
    state.write_bytes(b"\n".join([*lines[:-1], b"{}", b""]))
    with pytest.raises(Damaged, match="is not the state of a venue"):
        await serve(state=state)


async def test_a_full_disk_is_said_and_nothing_is_forgotten(serve: Serve, broker_of: BrokerOf, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this machine has no /dev/full")
    state = tmp_path / "venue.jsonl"
    server = await serve(state=state)
    journal: Any = server.venue._journal
    whole = journal._file
    with Path("/dev/full").open("ab", buffering=0) as full:
        journal._file = full
        with pytest.raises(OrderTransient, match="No space left on device") as error:
            await broker_of(server).open_position(order_of("open"))
    assert error.value.outcome is Outcome.UNKNOWN
    journal._file = whole
    await broker_of(server).open_position(order_of("open", "s2"))
    await server.stop()
    again = await serve(state=state)
    assert [fill.client_order_id for fill in again.venue.exchanges["futures"].fills] == [entry_of("s1"), entry_of("s2")]


class Feed(sources.CandleSource):
    """An exchange that shows each minute as late as a test wants."""

    def __init__(self) -> None:
        self.shown_ms = START

    async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        return await sources.synthetic(7).fetch(symbol, interval, start_ms, min(stop_ms, self.shown_ms))


async def test_a_minute_that_an_exchange_shows_late_is_not_skipped(serve: Serve, broker_of: BrokerOf) -> None:
    feed = Feed()
    server = await serve(source=feed)
    broker = broker_of(server)
    series = await sources.synthetic(7).fetch("BTCUSDT", "1m", START, START + MINUTE_MS)
    await broker.place_entry(order_of("place", price=round(float(series.low[0]) + 0.01, 2)))
    advance(server, 1)
    assert (await broker.find(order_of("place"))).status == "resting"
    feed.shown_ms = START + MINUTE_MS

    async def status() -> str:
        return (await broker.find(order_of("place"))).status

    async with asyncio.timeout(120):
        while await status() == "resting":
            await asyncio.sleep(0.05)
    assert await status() == "filled"
    assert server.venue.exchanges["futures"].fills[0].time_ms == START + MINUTE_MS


async def test_a_venue_needs_candles(serve: Serve) -> None:
    with pytest.raises(UserError, match="BTCUSDT has no candle in the day before 2014"):
        await serve(clock=SteppedClock(1_400_000_000_000 // MINUTE_MS * MINUTE_MS))
    with pytest.raises(UserError, match="base before USDT"):
        await serve(symbols=("GOLD",))


# The command


@pytest.mark.crash
def test_the_command_serves_logs_survives_a_kill_and_ends_cleanly(tmp_path: Path) -> None:
    command = [*COMMAND, "--start", "2024-01-01"]
    command += ["--speed", "0", "--state", str(tmp_path / "venue.jsonl"), "--fault", "latency,latency_ms=1"]

    def start() -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        assert process.stdout is not None
        return process, process.stdout.readline().split()[-1]

    async def trade(url: str, signal_id: str) -> Any:
        broker, http = connect(url).broker(), HttpClient(url)
        try:
            await broker.open_position(order_of("open", signal_id))
            return await ask(http, "GET", "/sim/state")
        finally:
            await broker.stop()

    process, url = start()
    assert len(asyncio.run(trade(url, "s1"))["futures"]["fills"]) == 1
    process.kill()
    process.communicate()
    process, url = start()
    state = asyncio.run(trade(url, "s2"))
    assert [fill["client_order_id"] for fill in state["futures"]["fills"]] == [entry_of("s1"), entry_of("s2")]
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert f"futures bot: buy 0.01821 BTCUSDT at 54886.51 ({entry_of('s2')})" in output
    assert output.endswith("stopped\n")
    assert [json.loads(line)["done"] for line in (tmp_path / "venue.jsonl").read_text().splitlines()[1:]]


@pytest.mark.parametrize(("arguments", "rule"), [([], "open"), (["--client-ids", "ever"], "ever")])
def test_the_command_chooses_the_rule_for_client_ids(tmp_path: Path, arguments: list[str], rule: str) -> None:
    command = [*COMMAND, "--start", "2024-01-01", "--state", "venue.jsonl", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    assert "is served at" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate()
    head = json.loads((tmp_path / "venue.jsonl").read_text().splitlines()[0])
    assert (process.returncode, head["terms"]["client_ids"]) == (0, rule)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--client-ids", "never"], "'never' is not one of"),
        (["--fault", "explode"], "fault {'kind': 'explode'}"),
        (["--candles", "nothing.csv"], "nothing.csv does not exist"),
        (["--symbols", "GOLD"], "symbol is 'GOLD'"),
    ],
)
def test_bad_arguments_end_with_a_sentence(tmp_path: Path, arguments: list[str], said: str) -> None:
    ended = run_command("venue", "--port", "0", *arguments, cwd=tmp_path)
    assert (ended.returncode, said in ended.stderr) == (2, True), ended.stderr
