"""The same strategy makes the same trades in a backtest, on paper, live, and live with a crash at every other turn."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.engine import test_against_reference as engine
from tests.live.rig import Rig
from tests.live.scenario import without
from tests.samples import sample, size

import backtest_kit as bk

ENGINE: Any = engine
MINUTE = ENGINE.MINUTE
LASTING = (bk.EntryScheduled, bk.EntryCancelled, bk.PositionOpened, bk.PositionClosed, bk.PositionChanged)
MINUTES = 360
SEEDS = (903, 902, 901)[: size(1, 3)]
"""The first one meets every kind of event."""
SETTINGS = {"CC_MAX_SIGNAL_LIFETIME_MINUTES": math.inf}


def source_of(rows: list[Any]) -> Any:
    first = rows[0][0]

    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> list[Any]:
        begin = (since_ms - first) // MINUTE
        return rows[max(begin, 0) : max(begin + limit, 0)]

    return bk.sources.function(get_candles)


def plain(event: bk.Event) -> Any:
    """An event without what tells the modes apart."""
    return event.action, without("identity", without("execution", msgspec.to_builtins(event)))


def lasting(events: list[bk.Event], before_ms: int) -> list[Any]:
    return [plain(event) for event in events if isinstance(event, LASTING) and event.when_ms < before_ms]


def prepared(tmp_path: Path, rows: list[Any], seed: int, *, managed: bool, store: Any = None) -> Rig:
    strategy, commands = ENGINE.RandomStrategy(seed), ENGINE.RandomCommands(seed)
    rig = Rig(tmp_path, store or bk.MemoryStore())
    rig.settings = SETTINGS
    rig.source = source_of(rows)
    rig.now_ms = rows[ENGINE.LEAD][0]
    # A command that is refused says why, in words that name prices: nothing of that may differ either.
    rig.strategy = {
        "get_signal": strategy.get_signal,
        "interval": strategy.interval,
        "manage": commands.act if managed else None,
    }
    return rig


def backtested(tmp_path: Path, rows: list[Any], seed: int, *, managed: bool, fill: Any) -> list[Any]:
    rig = prepared(tmp_path, rows, seed, managed=managed)
    start = rows[ENGINE.LEAD][0]
    kit = rig.kit(None)
    kit.add_frame_schema("frame", start_date=start, end_date=start + MINUTES * MINUTE)
    kit.backtest.run_sync("COIN", strategy_name="trend", exchange_name="demo", frame_name="frame", fill=fill)
    return lasting(rig.events, start + MINUTES * MINUTE)


@pytest.mark.parametrize("fill", ["vwap", "ohlc"])
@pytest.mark.parametrize("managed", [False, True], ids=["signals", "commands"])
@pytest.mark.parametrize("paper", [False, True], ids=["live", "paper"])
@pytest.mark.sampled
async def test_live_and_paper_trade_as_the_backtest(tmp_path: Path, paper: bool, managed: bool, fill: str) -> None:
    seen, sent = set(), 0
    for seed in SEEDS:
        rows = ENGINE.random_market(seed)
        expected = backtested_in_thread(tmp_path / f"{seed}", rows, seed, managed=managed, fill=fill)
        rig = prepared(tmp_path / f"{seed}-live", rows, seed, managed=managed)
        start = rig.now_ms
        await rig.trade(MINUTES, symbol="COIN", paper=paper, fill=fill)
        assert lasting(rig.events, start + MINUTES * MINUTE) == expected, seed
        assert not rig.of(bk.StrategyFailed, bk.OrderFailed, bk.StoreDegraded)
        sent += len(rig.venue.calls)
        seen |= {action for action, _ in expected}
    assert seen >= {"opened", "closed", "scheduled"}
    assert ("changed" in seen) is managed
    assert bool(sent) is not paper


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["nautilus_BTC-PERP_1m_20211231-20220201", "backtestkit_BTCUSDT_1m_202402"])
async def test_live_trades_real_candles_as_the_backtest(tmp_path: Path, name: str) -> None:
    rows = ENGINE.real_market(name, 0)
    for seed in sample((100_001, 100_007), 1, f"identity {name}"):
        expected = backtested_in_thread(tmp_path / f"{seed}", rows, seed, managed=True, fill="vwap")
        rig = prepared(tmp_path / f"{seed}-live", rows, seed, managed=True)
        start = rig.now_ms
        await rig.trade(MINUTES, symbol="COIN")
        assert lasting(rig.events, start + MINUTES * MINUTE) == expected
        assert expected


@pytest.mark.sampled
@pytest.mark.parametrize("seed", sample(range(910, 920), 2, "cancelled again and again"))
async def test_a_run_that_is_cancelled_again_and_again_trades_as_one_that_is_not(tmp_path: Path, seed: int) -> None:
    managed = seed % 2 == 0
    rows = ENGINE.random_market(seed)
    expected = backtested_in_thread(tmp_path / "whole", rows, seed, managed=managed, fill="vwap")
    rig = prepared(tmp_path / "parts", rows, seed, managed=managed)
    start, dice = rig.now_ms, random.Random(seed)  # noqa: S311  # repeatable, not secret
    while (left := (start - rig.now_ms) // MINUTE + MINUTES) > 0:
        # It ends while it waits for the next minute, and begins again in the minute it was in.
        await rig.trade(min(left, dice.randint(0, 12)), symbol="COIN")
        if dice.random() < 0.8:
            continue
        await rig.trade(0, symbol="COIN")
    assert lasting(rig.events, start + MINUTES * MINUTE) == expected
    # Ids that the strategy chooses itself come back.
    assert all(times == 1 for order_id, times in rig.venue.times_done.items() if order_id.startswith("COIN-"))
    assert not rig.of(bk.StrategyFailed, bk.OrderFailed, bk.StoreDegraded)


def backtested_in_thread(*arguments: Any, **named: Any) -> list[Any]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(backtested, *arguments, **named).result()
