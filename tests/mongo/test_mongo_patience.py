"""What a program asks a server for, and how long it waits where the server is slow or away."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pymongo
import pytest
from pymongo import monitoring
from pymongo.errors import ExecutionTimeout, NetworkTimeout
from tests.mongo.samples import KEY, store_over

import backtest_kit as bk
from backtest_kit.errors import RetryLater
from backtest_kit.mongo import MongoSetup
from backtest_kit.persist.backends.mongo.server import translate
from backtest_kit.persist.backends.mongo.store import MongoStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Write
from backtest_kit.persist.urls import store_at

SIGNAL = CONTRACTS["signal"]
NOWHERE = "mongodb://user:geheim@127.0.0.1:1/x"


class Commands(monitoring.CommandListener):
    """What is sent to servers for candles."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        target = event.command.get("collection" if event.command_name == "getMore" else event.command_name)
        if target == "candle-items":
            self.names.append(event.command_name)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


def test_a_look_before_the_frame_reads_no_candle_twice(tmp_path: Path, mongo_url: str) -> None:
    """A day of minutes, of which the strategy looks back to before the first."""
    kit = bk.Kit(tmp_path)
    MongoSetup(kit).setup(CC_MONGO_CONNECTION_STRING=mongo_url, CC_REDIS_HOST="")
    kit.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
    kit.add_frame_schema("day", start_date="2024-06-01", end_date="2024-06-02")

    async def get_signal(ctx: bk.Context) -> bk.Signal | None:
        close = (await ctx.candles("15m", 20)).close
        return bk.Signal.bracket(
            "long" if close[-1] > close.mean() else "short", price=ctx.price, take_profit_pct=0.5, stop_loss_pct=0.5
        )

    kit.add_strategy_schema("mean", interval="15m", get_signal=get_signal)
    commands = Commands()
    listeners = list(monitoring._LISTENERS.command_listeners)
    monitoring.register(commands)
    try:
        trades = []
        for _ in range(3):
            run = kit.backtest.run_sync("BTCUSDT", strategy_name="mean", exchange_name="demo", frame_name="day")
            trades.append(len(run.trades))
            commands.names.append("run")
    finally:
        monitoring._LISTENERS.command_listeners[:] = listeners
    asyncio.run(kit.close())
    assert trades[0] > 3
    assert len(set(trades)) == 1
    first, second, third = " ".join(commands.names).split("run")[:3]
    assert "insert" in first
    # What the first run has written is read once, whichever part of it a run asks for first.
    assert second.split().count("find") <= 2
    assert "find" not in third.split()


@pytest.mark.parametrize(
    "error", [NetworkTimeout("timed out"), ExecutionTimeout("exceeded time limit", 50), TimeoutError()], ids=repr
)
def test_a_slow_answer_names_the_settings_that_wait_longer(error: Exception) -> None:
    told = translate(error, "write candles", "mongodb://mongo/x")
    assert isinstance(told, RetryLater)
    assert "for a slow server, raise CC_MONGO_SOCKET_TIMEOUT_MS and CC_MONGO_OPERATION_TIMEOUT_MS" in str(told)


def test_what_moves_a_whole_store_waits_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*, patient: bool) -> tuple[int, int]:
        store: Any = store_at(NOWHERE, patient=patient)
        assert isinstance(store, MongoStore)
        return store.settings.CC_MONGO_SOCKET_TIMEOUT_MS, store.settings.CC_MONGO_OPERATION_TIMEOUT_MS

    assert waits(patient=False) == (5_000, 10_000)
    assert waits(patient=True) == (120_000, 600_000)
    monkeypatch.setenv("CC_MONGO_SOCKET_TIMEOUT_MS", "7000")
    assert waits(patient=True) == (7_000, 600_000)


async def test_a_server_that_is_away_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second thing that is wanted of it is refused after two looks of the driver, not after the whole time again."""
    store = store_over(NOWHERE, CC_MONGO_SERVER_SELECTION_TIMEOUT_MS=30_000, CC_MONGO_OPERATION_TIMEOUT_MS=3_000)
    allowed: list[float] = []
    timeout = pymongo.timeout

    def watched(seconds: float) -> AbstractContextManager[None]:
        allowed.append(seconds)
        return timeout(seconds)

    monkeypatch.setattr(pymongo, "timeout", watched)
    for _ in range(2):
        with pytest.raises(RetryLater, match=r"no MongoDB server answers at mongodb://\*\*\*@127.0.0.1:1/x: start it"):
            await store.put(Write(SIGNAL, KEY, 1))
        allowed.append(0.0)
    await store.close()
    first, second = allowed[: allowed.index(0.0)], allowed[allowed.index(0.0) + 1 : -1]
    assert max(first) > 1.0
    assert max(second) <= 1.0
