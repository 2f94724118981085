"""The workload of `replay.py` with everything of a backtest in a store, against the same in files.

The first replay reads its candles from the server; in those that follow they are warm: what was read has been kept in
the process, as files are kept by the system. The goal is about the warm ones, and both are shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers import run_backtest_kit as workload
from rich.progress import track
from tests.servers import database_at, mongo_at_hand, redis_at_hand

import backtest_kit as bk
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.backends.mongo.settings import MongoSettings
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.store import SeriesKey, Store

GOAL = 1.5
PATIENT_MS = 120_000
"""For a server that sorts nine months at once."""


@contextlib.contextmanager
def store_of(kind: str, place: Path) -> Iterator[Store]:
    if kind == "sqlite":
        yield bk.SqliteStore(place / "bot.db")
        return
    with contextlib.ExitStack() as stack:
        address, redis_url = stack.enter_context(mongo_at_hand()), stack.enter_context(redis_at_hand())
        settings = MongoSettings(
            CC_REDIS_URL=redis_url,
            CC_MONGO_OPERATION_TIMEOUT_MS=PATIENT_MS,
            CC_MONGO_SOCKET_TIMEOUT_MS=PATIENT_MS,
        )
        yield MongoStore(stack.enter_context(database_at(address)), settings=settings)


def compare(kind: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as place, store_of(kind, Path(place)) as store:
        asyncio.run(_compare(kind, store, Path(place), rounds))


async def _compare(kind: str, store: Store, place: Path, rounds: int) -> None:
    stores: dict[str, Store] = {"files": bk.FileStore(place / "files"), kind: store}
    await _warm_up(place)
    kits = {name: workload.make_kit(str(place / f"kit-{name}")) for name in stores}
    first: dict[str, float] = {}
    for name, kit in kits.items():
        kit.persistence.bind("*", stores[name], mode="backtest")
        for i, symbol in track([*enumerate(workload.SYMBOLS)], f"candles to {name}", transient=True):
            await stores[name].candles.write(SeriesKey("market", symbol, "1m"), workload.series(i))
        started = time.perf_counter()
        await workload.replay(kit)
        first[name] = time.perf_counter() - started
    taken: dict[str, list[float]] = {name: [] for name in stores}
    trades: dict[str, int] = {}
    for _ in range(rounds):
        for name, kit in kits.items():
            started = time.perf_counter()
            trades[name], _ = await workload.replay(kit)
            taken[name].append(time.perf_counter() - started)
    assert len(set(trades.values())) == 1, trades
    low, high = (statistics.median(taken[name]) for name in stores)
    verdict = "ok" if high <= GOAL * low else "MISSED"
    print(f"9 symbols x 30 days, {trades[kind]:,} trades, everything kept")
    print(_line("first replay, which reads the candles", first["files"], kind, first[kind]))
    print(f"{_line('replays with warm candles', low, kind, high)} (goal: at most {GOAL}) {verdict}")
    for kit in kits.values():
        await kit.close()


async def _warm_up(place: Path) -> None:
    """Once without a store, so that the first replay of the first one does not pay for what Python has to load."""
    kit, memory = workload.make_kit(str(place / "kit-warm")), MemoryStore()
    kit.persistence.bind("*", memory, mode="backtest")
    for i, symbol in enumerate(workload.SYMBOLS):
        await memory.candles.write(SeriesKey("market", symbol, "1m"), workload.series(i))
    await workload.replay(kit)
    await kit.close()


def _line(what: str, files: float, kind: str, seconds: float) -> str:
    return f"{what}: files {files:.2f} s, {kind} {seconds:.2f} s, ratio {seconds / files:.2f}"
