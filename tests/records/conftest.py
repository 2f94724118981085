"""A kit whose records all lie in one store, for each store there is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from tests.records.receiver import Receiver, receiving
from tests.records.stores import MONGO, SHARED, STORES, address_on
from tests.samples import sample

import backtest_kit as bk
from backtest_kit.model.identity import Mode
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.urls import store_at
from backtest_kit.records import RunRecords, delivery

MINUTE_MS = 60_000
NOON_MS = 1_717_243_200_000
"""2024-06-01 12:00 UTC."""


class Minute(msgspec.Struct, frozen=True, kw_only=True):
    """A minute of a run, as a decorated function is given it."""

    when_ms: int = NOON_MS
    mode: Mode = "live"
    run_id: str | None = None
    exchange_name: str = "binance"
    strategy_name: str = "trend"
    frame_name: str = ""
    symbol: str = "BTCUSDT"


def kit_on(address: str, place: Path) -> bk.Kit:
    """A kit that keeps every record at `address`, in every mode. Candles are no record: they stay in its files."""
    kit = bk.Kit(place / "files")
    store = store_at(address.format(place=place))
    for name in CONTRACTS.keys() - {"candle"}:
        kit.persistence.bind(name, store)
    return kit


def run_of(kit: bk.Kit, mode: Mode = "live", run_id: str | None = None, **identity: str) -> RunRecords:
    names = {"symbol": "BTCUSDT", "strategy_name": "trend", "exchange_name": "binance", "frame_name": ""} | identity
    return kit.records.of_run(bk.Identity(**names, mode=mode), run_id)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on files, on memory if no process shares it, and on one of the others: all keep the same promises."""
    given = {str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize")}
    for fixture, stores in (("address", STORES), ("shared_address", SHARED)):
        if fixture in metafunc.fixturenames and fixture not in given:
            drawn = sample(["sqlite", MONGO], 1, f"store of {metafunc.definition.nodeid}")
            names = [name for name in (*stores, MONGO) if name in ("memory", "file", *drawn)]
            marked = [pytest.param(name, marks=pytest.mark.sampled) for name in names]
            metafunc.parametrize(fixture, marked, indirect=True)


@pytest.fixture
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    with address_on(request.param, request) as address:
        yield address


@pytest.fixture
def shared_address(request: pytest.FixtureRequest) -> Iterator[str]:
    with address_on(request.param, request) as address:
        yield address


@pytest_asyncio.fixture
async def kit(address: str, tmp_path: Path) -> AsyncIterator[bk.Kit]:
    kit = kit_on(address, tmp_path)
    yield kit
    await kit.close()


@pytest.fixture
def backtest(kit: bk.Kit) -> Callable[..., Any]:
    """Run a strategy over a day or a week of the built-in market, in a thread of its own loop."""
    kit.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
    kit.add_frame_schema("day", start_date="2024-06-01", end_date="2024-06-02")
    kit.add_frame_schema("week", start_date="2024-06-01", end_date="2024-06-08")

    async def run(
        get_signal: Any,
        *,
        manage: Any = None,
        interval: str = "15m",
        symbol: str = "BTCUSDT",
        frame: str = "day",
        run_id: str | None = None,
    ) -> Any:
        kit.add_strategy_schema("trend", interval=interval, get_signal=get_signal, manage=manage, replace=True)
        where: Any = {"strategy_name": "trend", "exchange_name": "demo", "frame_name": frame}
        return await kit.backtest.background(symbol, **where, run_id=run_id)

    return run


@pytest_asyncio.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Receiver]:
    """Where sinks send to, and try again soon if they must."""
    monkeypatch.setattr(delivery, "FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE_S", 0.02)
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
def short_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sink that takes nothing: closing need not wait for it."""
    monkeypatch.setattr(delivery, "DRAIN_S", 0.2)
