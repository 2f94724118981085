"""Random strategies on real candles, killed at random places, up to five times a run: their trades stay the same.

The places are passages of crash points, of the runner and of its files. The seed of a failure is in its message.
"""

from __future__ import annotations

import asyncio
import random
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from tests.engine import test_against_reference as engine
from tests.live.scripts import Random
from tests.live.stage import Forks, Stage, forking, stage
from tests.samples import sample, size

import backtest_kit as bk
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.venue.exchange import ClientIds, Terms

pytestmark = [pytest.mark.crash, pytest.mark.slow]

BUSIEST = 7
STRATEGIES = sorted({BUSIEST, *sample(range(20), 2, "crash schedules")})
"""With one that trades often, because some hardly ever do."""
SCHEDULES = size(2, 10)
"""Of each strategy."""
MINUTES = 240
SEATS = 4
RULES: tuple[ClientIds, ...] = get_args(ClientIds)
"""For client order ids: the schedules of a strategy take turns."""


def market(number: int) -> list[Any]:
    """Minutes that really were; made-up ones where the recorded candles are not beside the project."""
    name = engine.REAL[number % len(engine.REAL)]
    if not (engine.DATA / f"{name}.csv.gz").exists():
        print(f"{name} is not beside the project: the candles of this run are made up")
        return engine.random_market(number)
    return engine.real_market(name, number // len(engine.REAL))


@pytest.mark.sampled
async def test_two_hundred_crash_schedules(tmp_path: Path) -> None:
    seats = asyncio.Semaphore(SEATS)
    async with forking() as forks:
        plays = [play(forks, tmp_path / str(number), number, seats) for number in STRATEGIES]
        kills, wrong, trades = zip(*await asyncio.gather(*plays), strict=True)
    deaths = [count for each in kills for count in each]
    assert not any(wrong), "\n".join(each for found in wrong for each in found)
    assert len(deaths) == len(STRATEGIES) * SCHEDULES
    assert min(deaths) >= 1
    assert sum(deaths) >= size(1, 2) * len(deaths)
    assert sum(trades) > size(1, 5) * len(STRATEGIES)


async def play(forks: Forks, place: Path, seed: int, seats: asyncio.Semaphore) -> tuple[list[int], list[str], int]:
    """How often each schedule has killed, what went wrong, and how many trades there were."""
    rows = market(seed)
    place.mkdir()
    np.save(place / "market.npy", np.array(rows).T)
    begin_ms = rows[engine.LEAD][0]
    job = {
        "script": f"random:{seed}",
        "market": str(place / "market.npy"),
        "begin_ms": begin_ms,
        "end_ms": begin_ms + MINUTES * MINUTE_MS,
    }
    candles = CandleSeries.from_rows(rows)

    async def run(name: str, crashes: list[str], rule: ClientIds = "open") -> tuple[Stage, dict[str, Any]]:
        venue = {"terms": Terms(client_ids=rule)}
        async with (
            seats,
            stage(
                forks, place / name, candles=candles, symbols=("COINUSDT",), start_ms=begin_ms, venue=venue, **job
            ) as here,
        ):
            await here.trade(crashes)
            return here, here.outcome()

    whole, expected = await run("whole", [])
    wrong = [] if whole.check() == [] else [f"seed {seed}, unharmed: {whole.check()}"]
    backtest = await asyncio.to_thread(backtested, place, rows, seed)
    for live, tested in zip_longest(terms(expected["trades"]), backtest):
        if live is None or tested is None or live[0] != tested[0] or live[1] != pytest.approx(tested[1], 1e-4, 1e-4):
            wrong.append(f"seed {seed}: live made {live} and the backtest {tested}")
    passed = {point: count for point, count in whole.end().passed.items() if point != "live.start.after_lease"}
    kills = []
    for number in range(SCHEDULES):
        crashes = schedule(random.Random(f"{seed}-{number}"), passed)  # noqa: S311  # repeatable, not secret
        rule = RULES[number % len(RULES)]
        here, found = await run(f"killed-{number}", crashes, rule)
        kills.append(here.kills)
        said = f"seed {seed}, schedule {number}, client ids {rule}, killed at {crashes[: here.kills]}"
        wrong += [f"{said}: {each}" for each in here.check()]
        wrong += [
            f"{said}: other {what}"
            for what in ("trades", "records", "wallet", "books")
            if found[what] != expected[what]
        ]
    return kills, wrong, len(expected["trades"])


def schedule(dice: random.Random, passed: dict[str, int]) -> list[str]:
    """One to five passages, one of each life."""
    runner = [point for point in passed if point.startswith("live.")]
    files = [point for point in passed if not point.startswith("live.")]
    count = dice.randint(1, 5)
    points = [dice.choice(dice.choice((runner, files))) for _ in range(count)]
    # How often files pass one depends on the time: writes go together, leases are renewed.
    return [f"{point}:{dice.randint(1, max(1, passed[point] * 3 // 4 // count))}" for point in points]


def backtested(place: Path, rows: list[Any], seed: int) -> list[Any]:
    """The trades of a backtest on the same candles that live would have known of by then."""
    script = Random(seed)
    kit = bk.Kit(place / "backtest")
    kit.set_config(**script.settings)
    first = rows[0][0]

    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> list[Any]:
        begin = (since_ms - first) // MINUTE_MS
        return rows[max(begin, 0) : max(begin + limit, 0)]

    kit.add_exchange_schema("venue", source=bk.sources.function(get_candles))
    start_ms = rows[engine.LEAD][0]
    kit.add_frame_schema("frame", start_date=start_ms, end_date=start_ms + (MINUTES + 1) * MINUTE_MS)
    kit.add_strategy_schema("story", get_signal=script.get_signal, manage=script.manage, interval=script.interval)
    result = kit.backtest.run_sync("COINUSDT", strategy_name="story", exchange_name="venue", frame_name="frame")
    end_ms = start_ms + MINUTES * MINUTE_MS
    return terms([msgspec.to_builtins(trade) for trade in result.trades if trade.closed_at_ms <= end_ms])


def terms(trades: list[Any]) -> list[Any]:
    """What every mode tells of its trades; costs at the venue are rounded in the last digits."""
    exact = ("closedAtMs", "closeReason", "closeNote")
    close = ("priceOpen", "priceClose", "pnlPct", "pnlCost")
    found = []
    for trade in trades:
        position = trade["position"]
        begin = position["entry"]["signal"]["position"], position["openedAtMs"]
        costs = [entry["cost"] for entry in position["entries"]]
        extremes = position["peak"]["pnlPct"], position["fall"]["pnlPct"]
        found.append(
            ([*begin, *(trade[name] for name in exact)], [*(trade[name] for name in close), *costs, *extremes])
        )
    return found
