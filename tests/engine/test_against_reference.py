"""A thousand random strategies trade the same as in `reference.py`, through the public API and for both fill models."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import math
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import backtest_kit as bk

MINUTE = 60_000
START = 1_704_067_200_000 + 7 * MINUTE
LEAD = 8 * 60
MINUTES = 1_200
STRATEGIES = 50
RANDOM_MARKETS, REAL_STRETCHES = 12, 2
DATA = Path(__file__).parents[2].parent / "shared" / "data"
REAL = (
    "nautilus_BTC-PERP_1m_20211231-20220201",
    "lean_coinbase_BTCUSD_1m_2016-2018",
    "lean_coinbase_LTCUSD_1m_2016-2018",
    "backtestkit_BTCUSDT_1m_202402",
)
Row = tuple[int, float, float, float, float, float]


def _reference() -> ModuleType:
    # Tests are no package: a file beside this one is imported by its path.
    spec = importlib.util.spec_from_file_location("engine_reference", Path(__file__).with_name("reference.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ref: Any = _reference()


def dice(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311  # repeatable, not secret


def random_market(seed: int) -> list[Row]:
    """A walk that jumps now and then between two candles, with minutes in which nothing is traded."""
    rng = dice(seed)
    sigma = rng.choice([0.0004, 0.001, 0.002])
    rows, close = [], rng.uniform(0.05, 50_000)
    for minute in range(LEAD + MINUTES):
        open_ = close * math.exp(rng.gauss(0, 0.01)) if rng.random() < 0.004 else close
        close = open_ * math.exp(rng.gauss(0, sigma))
        high = max(open_, close) * (1 + rng.expovariate(1 / sigma))
        low = min(open_, close) * (1 - min(rng.expovariate(1 / sigma), 0.05))
        volume = 0.0 if (minute // 17) % 9 == 4 else rng.uniform(0.1, 50)
        rows.append((START + (minute - LEAD) * MINUTE, open_, high, low, close, volume))
    return rows


def real_market(name: str, stretch: int) -> list[Row]:
    """A stretch of recorded candles, their gaps filled flat."""
    path = DATA / f"{name}.csv.gz"
    if not path.exists():
        pytest.skip(f"the real candles {path.name} are not beside the project")
    with gzip.open(path, "rt") as file:
        recorded: list[Row] = [(int(row[0]), *map(float, row[1:])) for row in islice(csv.reader(file), 1, 4000)]  # type: ignore[misc]
    rows = recorded[stretch * 300 : stretch * 300 + 1]
    for row in recorded[stretch * 300 + 1 :]:
        while rows[-1][0] + MINUTE < row[0]:
            close = rows[-1][4]
            rows.append((rows[-1][0] + MINUTE, close, close, close, close, 0.0))
        rows.append(row)
    return rows[: LEAD + MINUTES]


class RandomStrategy:
    """Without memory: what it answers depends on its seed, the minute, the price and the closes it reads."""

    def __init__(self, seed: int) -> None:
        rng = dice(seed)
        self.seed = seed
        self.silence, self.resting = rng.choice([0.0, 0.3, 0.9]), rng.choice([0.0, 0.5, 1.0])
        self.minutes, self.count = rng.choice([1, 5, 15, 60]), rng.randint(1, 6)
        self.far = rng.choice([0.012, 0.03, 0.15])
        self.interval = rng.choice(["1m", "3m", "5m", "15m", "30m", "1h"])
        self.grid = rng.choice(["1m", "1m", "3m", "15m", "1h"])
        self.named = rng.random() < 0.1

    def answer(self, when: int, price: float, closes: list[float]) -> Any:
        rng = dice(self.seed * 1_000_003 + when // MINUTE)
        if rng.random() < self.silence:
            return None
        sign = 1 if closes[-1] >= sum(closes) / len(closes) else -1
        open_ = price * (1 - sign * rng.uniform(-0.005, 0.009)) if rng.random() < self.resting else None
        base = price if open_ is None else open_
        return ref.Wish(
            side="long" if sign > 0 else "short",
            take=base * (1 + sign * rng.uniform(0.007, self.far)),
            stop=base * (1 - sign * rng.uniform(0.007, self.far)),
            open=open_,
            minutes=math.inf if rng.random() < 0.1 else rng.choice([1, 2, 30, 200, 1440]),
            cost=rng.choice([100.0, 12.5]),
            id=rng.choice("ab") if self.named else None,
        )

    def decide(self, market: Any, when: int, price: float) -> Any:
        return self.answer(when, price, ref.closes(market, when, self.minutes, self.count))

    async def get_signal(self, ctx: bk.Context) -> bk.Signal | None:
        name = "1h" if self.minutes == 60 else f"{self.minutes}m"
        closes = (await ctx.candles(name, self.count)).close.tolist()
        wish = self.answer(ctx.when_ms, ctx.price, closes)
        if wish is None:
            return None
        return bk.Signal(
            wish.side, wish.take, wish.stop, price_open=wish.open, minutes=wish.minutes, cost=wish.cost, id=wish.id
        )


def ours(event: bk.Event) -> Iterator[Any]:
    when = event.when_ms
    if isinstance(event, bk.EntryScheduled):
        yield ref.Event("scheduled", when, event.entry.position, event.entry.price_open)
    elif isinstance(event, bk.EntryCancelled):
        yield ref.Event("cancelled", when, event.entry.position, event.entry.price_open, event.reason)
    elif isinstance(event, bk.PositionOpened):
        yield ref.Event("opened", when, event.position.position, event.position.price_open)
    elif isinstance(event, bk.PositionClosed):
        trade = event.trade
        assert trade.closed_at_ms == when
        yield ref.Event(
            "closed",
            when,
            trade.position,
            trade.price_close,
            trade.close_reason,
            trade.pnl_pct,
            trade.pnl_cost,
            trade.peak_pct,
            trade.fall_pct,
            trade.opened_at_ms,
        )


def same(mine: Any, expected: Any) -> bool:
    return all(
        math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-9) if isinstance(a, float) else a == b
        for a, b in zip(mine, expected, strict=True)
    )


async def compare(tmp_path: Path, rows: list[Row], fill: Any, seeds: range) -> set[tuple[str, str]]:
    """Run each strategy in both; the kinds and reasons of all events that were seen."""
    candles = [ref.Candle(*row) for row in rows]
    start, stop = rows[LEAD][0], rows[-1][0] + MINUTE

    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> list[Row]:
        first = max((since_ms - rows[0][0]) // MINUTE, 0)
        return rows[first : max((since_ms - rows[0][0]) // MINUTE + limit, 0)]

    kit = bk.Kit(tmp_path)
    kit.set_config(CC_MAX_SIGNAL_LIFETIME_MINUTES=math.inf)
    kit.add_exchange_schema("market", source=bk.sources.function(get_candles))
    seen = set()
    for seed in seeds:
        strategy = RandomStrategy(seed)
        names: Any = {"strategy_name": f"s{seed}", "exchange_name": "market", "frame_name": f"f{seed}"}
        kit.add_frame_schema(names["frame_name"], start_date=start, end_date=stop, interval=strategy.grid)
        kit.add_strategy_schema(names["strategy_name"], interval=strategy.interval, get_signal=strategy.get_signal)
        slot, grid = ((60 if name == "1h" else int(name[:-1])) for name in (strategy.interval, strategy.grid))
        rules = ref.Rules(start, stop, slot * MINUTE, grid * MINUTE, fill)
        expected = ref.replay(candles, rules, strategy.decide)
        mine = [each async for event in kit.backtest.run("COIN", fill=fill, **names) for each in ours(event)]
        for place, (a, b) in enumerate(zip(mine, expected, strict=False)):
            assert same(a, b), f"seed {seed}, {fill}, event {place}:\n  ours      {a}\n  reference {b}"
        assert len(mine) == len(expected), f"seed {seed}, {fill}: {len(mine)} events, the reference has {len(expected)}"
        seen |= {(event.kind, event.reason) for event in expected}
    return seen


@pytest.mark.parametrize("fill", ["vwap", "ohlc"])
@pytest.mark.parametrize("market", range(RANDOM_MARKETS))
async def test_random_strategies_on_random_candles(tmp_path: Path, market: int, fill: str) -> None:
    seeds = range(market * STRATEGIES, (market + 1) * STRATEGIES)
    seen = await compare(tmp_path, random_market(market), fill, seeds)
    assert seen >= {
        ("opened", ""),
        ("scheduled", ""),
        ("cancelled", "timeout"),
        ("closed", "take_profit"),
        ("closed", "stop_loss"),
        ("closed", "time_expired"),
    }


@pytest.mark.parametrize("fill", ["vwap", "ohlc"])
@pytest.mark.parametrize("stretch", range(REAL_STRETCHES))
@pytest.mark.parametrize("name", REAL)
async def test_random_strategies_on_real_candles(tmp_path: Path, name: str, stretch: int, fill: str) -> None:
    first = 100_000 + (REAL.index(name) * REAL_STRETCHES + stretch) * STRATEGIES
    seen = await compare(tmp_path, real_market(name, stretch), fill, range(first, first + STRATEGIES))
    assert {("opened", ""), ("scheduled", ""), ("closed", "time_expired")} <= seen


@pytest.mark.parametrize(
    ("side", "entries", "partials", "price", "percent", "money"),
    [
        ("long", [(100, 100)], [], 101, 0.597403596404, 0.597403596404),
        ("short", [(100, 100)], [], 99, 0.602603603604, 0.602603603604),
        ("long", [(100, 100)], [], 100, -0.399600399600, -0.3996004),
        ("long", [(100, 100), (80, 100)], [], 100, 12.062949550450, 24.1258991009),
        ("long", [(100, 100)], [(50, 110, 100, 1)], 120, 14.555459540460, 14.5554595405),
        ("long", [(100, 100), (90, 200)], [(50, 110, 100, 1)], 100, 8.647287712288, 25.9418631369),
        ("short", [(100, 100), (110, 100)], [(25, 95, 200, 2)], 105, 1.765176426426, 3.5303528529),
    ],
)
def test_the_reference_earns_what_was_worked_out_by_hand(
    side: str, entries: Any, partials: Any, price: float, percent: float, money: float
) -> None:
    held = ref.Held(ref.Wish(side, 0, 0), 0, entries[0][0], 0, 0, entries, partials=partials)
    assert ref.pnl(held, price, ref.Rules(0, 0)) == pytest.approx((percent, money), abs=1e-9)
