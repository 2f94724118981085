"""A bot that is going to be killed: forked ready to run, on a store of its own, against a venue on a socket.

    python tests/live/bot.py

reads jobs from its input, one a line, and forks a child for each. It says when a child has begun and how it has
ended, and has no threads of its own. A child writes what it has to tell to files, so that its death loses nothing
that it has told.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import importlib
import os
import select
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import numpy as np
from tests.live import scripts

import backtest_kit as bk
from backtest_kit.market.clock import SteppedClock
from backtest_kit.market.sources import ANY_RANGE, CandleSource
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import interval_ms
from backtest_kit.persist import crashpoints
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.files import Disk
from backtest_kit.persist.store import Store
from backtest_kit.persist.testing.faults import FaultFS
from backtest_kit.persist.urls import store_at
from backtest_kit.venue.binance.api import API_KEY
from backtest_kit.venue.client import ReferenceBroker, connect
from backtest_kit.venue.desk import FillAt
from backtest_kit.venue.venue import _grouped as grouped

LASTING: Final = (bk.EntryScheduled, bk.EntryCancelled, bk.PositionOpened, bk.PositionClosed, bk.PositionChanged)
TROUBLE: Final = (bk.StrategyFailed, bk.StoreDegraded, bk.OrphanFound, bk.MinutesMissed)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is to do."""

    number: int
    venue: str
    store: str
    place: str
    """Where it writes what it has to tell."""
    end_ms: int
    script: str
    """Which of `scripts.SCRIPTS` it trades."""
    symbols: tuple[str, ...] = ("BTCUSDT",)
    name: str = "bot"
    """Who it is at the clock."""
    actor: str = "bot"
    """Who tells of its end."""
    fill_at: FillAt = "venue"
    crash: str = ""
    """As in the environment of `crashpoints`."""
    full_from_ms: int = 0
    """When the disk is full."""
    lease_ttl_s: float = 15.0
    paper: bool = False
    orphans: str = "alarm"
    """What is done about a position that its store does not know."""
    market: str = ""
    """File of the candles of a bot that has them and its time at hand, and only sends orders to the venue."""
    begin_ms: int = 0
    """When such a one begins."""
    risk_name: str = ""
    """Risk profile that counts its positions; empty for none."""


class Heard(msgspec.Struct, frozen=True):
    """What a child tells of an event."""

    action: str
    when_ms: int
    signal_id: str
    event: dict[str, Any]


class End(msgspec.Struct, frozen=True, kw_only=True):
    """What a child tells when it comes to its end."""

    passed: dict[str, int]
    """How often it passed each crash point."""
    books: dict[str, Any]
    """The records of the first symbol's position, as a store tells them that was opened for it."""
    errors: dict[str, str]
    """By symbol, why its run has ended."""


class VenueTime(Protocol):
    def now_ms(self) -> int: ...
    async def sleep_until(self, when_ms: int) -> None: ...
    async def start(self) -> None: ...
    async def stop(self) -> None: ...


class UntilClock:
    """A clock that sets `over` instead of going beyond `end_ms`."""

    def __init__(self, clock: VenueTime, end_ms: int) -> None:
        self._clock = clock
        self._end_ms = end_ms
        self.over = asyncio.Event()
        self.now_ms, self.start, self.stop = clock.now_ms, clock.start, clock.stop

    async def sleep_until(self, when_ms: int) -> None:
        if when_ms > self._end_ms:
            self.over.set()
            await asyncio.get_running_loop().create_future()
        await self._clock.sleep_until(when_ms)


class KeptClock:
    """A time that passes as fast as its one user works, and that is in a file: it goes on where he has died."""

    def __init__(self, path: Path, begin_ms: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT)
        self._now_ms = int(os.pread(self._fd, 20, 0) or begin_ms)

    def now_ms(self) -> int:
        return self._now_ms

    async def sleep_until(self, when_ms: int) -> None:
        await asyncio.sleep(0)
        if when_ms > self._now_ms:
            self._now_ms = when_ms
            os.pwrite(self._fd, str(when_ms).encode(), 0)

    async def start(self) -> None:
        """Nothing to connect to."""

    async def stop(self) -> None:
        """Nothing to let go of."""


class Rows(CandleSource):
    """Candles that are known from the beginning."""

    cached = False
    page_limit = ANY_RANGE

    def __init__(self, candles: CandleSeries) -> None:
        self._candles = candles

    async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        candles = self._candles.between(start_ms, stop_ms)
        return grouped(candles, interval_ms(interval)) if candles else candles


class OrdersOnly(ReferenceBroker):
    """Sends orders, and asks only what became of them."""

    async def check_position(self, position: bk.Position) -> bk.Fill | None:
        return None

    async def check_entry(self, entry: bk.RestingEntry) -> bk.Fill | None:
        return None

    async def holdings(self, symbols: Sequence[str]) -> list[bk.VenuePosition] | None:
        return None


class Diary:
    """Lines that are in a file once they are written."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, event: bk.Event) -> None:
        fields = msgspec.to_builtins(event, enc_hook=repr)  # some have an error in them
        held: bk.Position | bk.RestingEntry | None = getattr(event, "entry", None) or getattr(event, "position", None)
        heard = Heard(event.action, event.when_ms, held.signal_id if held else "", fields)
        os.write(self._fd, msgspec.json.encode(heard) + b"\n")


class FullDisk(FaultFS):
    """A disk on which nothing can be made any more from some moment on."""

    def fill(self) -> None:
        for call in ("write", "posix_fallocate", "mkdir"):
            self.inject(call, errno.ENOSPC, nth=1, lasting=True)


def store_of(job: Job) -> tuple[Store, Callable[[], None]]:
    """The store of a child, and what fills its disk."""
    if not job.full_from_ms:
        return store_at(job.store), lambda: None
    disk = FullDisk()
    return FileStore(job.store.removeprefix("file:"), disk=Disk(disk)), disk.fill


def exchange_of(job: Job) -> dict[str, Any]:
    if job.market:
        candles = CandleSeries(*np.load(job.market))
        clock: VenueTime = KeptClock(Path(job.place) / "minute", job.begin_ms)
        return {"source": Rows(candles), "broker": OrdersOnly(job.venue, API_KEY, "futures"), "clock": clock}
    venue = connect(job.venue)
    clock = venue.clock(job.name, sleepers=len(job.symbols))
    return {"source": venue.source(), "broker": venue.broker(fill_at=job.fill_at), "clock": clock}


async def trade(job: Job) -> End:
    place, exchange = Path(job.place), exchange_of(job)
    exchange["clock"] = clock = UntilClock(exchange["clock"], job.end_ms)
    name, _, seed = job.script.partition(":")
    script = scripts.SCRIPTS[name](int(seed or 0))
    store, fill_disk = store_of(job)
    kit = bk.Kit(place / "dump")
    kit.set_config(**script.settings)
    kit.persistence.bind("*", store)
    kit.add_exchange_schema("venue", **exchange)
    risks: dict[str, Any] = {"risk_name": job.risk_name} if job.risk_name else {}
    if risks:
        kit.add_risk_schema(job.risk_name, validations=[])
    kit.add_strategy_schema(
        "story", get_signal=script.get_signal, manage=script.manage, interval=script.interval, **risks
    )
    heard, trouble, records, failed = (Diary(place / name) for name in ("heard", "trouble", "records", "failed"))
    for kind in LASTING:
        kit.on(kind, heard.write)
    for problem in TROUBLE:
        kit.on(problem, trouble.write)
    kit.on(bk.RunFailed, failed.write)

    async def keep_records(events: Sequence[bk.Event]) -> None:
        for event in events:
            records.write(event)

    async def watch_disk(event: bk.Event, ctx: bk.Context) -> None:
        if job.full_from_ms and ctx.when_ms >= job.full_from_ms:
            fill_disk()

    kit.live.observers.append(keep_records)
    kit.on(bk.PositionActive, watch_disk)
    where: dict[str, Any] = {"strategy_name": "story", "exchange_name": "venue", "allow_weak": True}
    options: dict[str, Any] = {"lease_ttl_s": job.lease_ttl_s, "paper": job.paper, "orphans": job.orphans}
    handles = [kit.live.background(symbol, **where, **options) for symbol in job.symbols]
    over = asyncio.ensure_future(clock.over.wait())
    tasks = {handle.task for handle in handles}
    while not over.done() and tasks:
        done, _ = await asyncio.wait({over, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        tasks -= done
    over.cancel()
    for handle in handles:
        handle.cancel()
    ends = await asyncio.gather(*(handle.task for handle in handles), return_exceptions=True)
    errors = {
        symbol: f"{type(end).__name__}: {end}"
        for symbol, end in zip(job.symbols, ends, strict=True)
        if isinstance(end, Exception)
    }
    await kit.persistence.close()
    return End(passed={}, books={} if job.full_from_ms else await books_of(job), errors=errors)


async def books_of(job: Job) -> dict[str, Any]:
    store = store_at(job.store)
    await store.open()
    scoped = store.namespace("paper") if job.paper else store
    found = {}
    for name in ("signal", "schedule", "strategy"):
        record = await scoped.get(CONTRACTS[name], ("story", "venue", job.symbols[0]))
        found[name] = None if record is None else record.value
    if job.risk_name:
        record = await scoped.get(CONTRACTS["risk"], ("venue", job.risk_name))
        found["risk"] = None if record is None else record.value
    await store.close()
    return found


def be_killed(job: Job) -> int:
    """The whole life of a child; returns how it ends."""
    place = Path(job.place)
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    crashpoints.arm(job.crash)
    passed = crashpoints.record()
    try:
        end = asyncio.run(trade(job))
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        return 1
    end = msgspec.structs.replace(end, passed=passed)
    (place / f"end-{job.actor}").write_bytes(msgspec.json.encode(end))
    return 0


def warm_up() -> None:
    """Have everything at hand that a child needs, so that none imports it for itself."""
    for name in (
        "aiohttp.web",
        "backtest_kit.kit",
        "concurrent.futures.thread",
        "backtest_kit.persist.backends.mongo.store",
    ):
        importlib.import_module(name)
    asyncio.run(trade_a_little())
    gc.freeze()


async def trade_a_little() -> None:
    clock, script = UntilClock(SteppedClock(scripts.START, sleepers=1), scripts.START + 120_000), scripts.Always(0)
    with tempfile.TemporaryDirectory() as directory:
        kit = bk.Kit(directory)
        kit.persistence.bind("*", bk.MemoryStore())
        kit.add_exchange_schema("venue", source=bk.sources.synthetic(7), broker=bk.Broker(), clock=clock)
        kit.add_strategy_schema("story", get_signal=script.get_signal, manage=script.manage)
        handle = kit.live.background("BTCUSDT", strategy_name="story", exchange_name="venue")
        over = asyncio.ensure_future(clock.over.wait())
        await asyncio.wait({over, handle.task}, return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        handle.cancel()
        await asyncio.wait({handle.task})


def serve() -> None:
    """Fork a child for each line that comes in, until there is no more input."""
    warm_up()
    children: dict[int, tuple[int, int]] = {}
    rest, reading = b"", True
    while reading or children:
        ready, _, _ = select.select([0] * reading + list(children), [], [])
        for fd in ready:
            if fd:
                number, pid = children.pop(fd)
                _, status = os.waitpid(pid, 0)
                os.close(fd)
                say({"number": number, "exit": os.waitstatus_to_exitcode(status)})
                continue
            data = os.read(0, 1 << 16)
            reading = bool(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                job = msgspec.json.decode(line, type=Job)
                pid = os.fork()
                if not pid:
                    signal.signal(signal.SIGINT, signal.SIG_DFL)
                    os._exit(be_killed(job))
                children[os.pidfd_open(pid)] = job.number, pid
                say({"number": job.number, "pid": pid})


def say(told: dict[str, int]) -> None:
    os.write(1, msgspec.json.encode(told) + b"\n")


if __name__ == "__main__":
    serve()
