"""A thousand random strategies trade the same as in `reference.py`, through the public API and for both fill models.

Some give random commands: what is refused has to agree as well, and what is held after each of them.
"""

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
from tests.samples import sample

import backtest_kit as bk
from backtest_kit.engine.pnl import effective_price

pytestmark = pytest.mark.slow

MINUTE = 60_000
START = 1_704_067_200_000 + 7 * MINUTE
LEAD = 8 * 60
MINUTES = 1_200
STRATEGIES = 50
RANDOM_MARKETS, REAL_STRETCHES = 12, 2
MANAGED = 20
MANAGED_MARKETS = 8
COMMANDS = ("reduce", "add", "move_stop", "move_take", "breakeven", "close", "cancel", "activate")
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


def closes(market: Any, when: int, minutes: int, count: int) -> list[float]:
    """The closes of the last `count` candles of so many minutes that have closed by then."""
    end = when - when % (minutes * MINUTE)
    return [market[end - k * minutes * MINUTE - MINUTE].close for k in range(count - 1, -1, -1)]


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
        return self.answer(when, price, closes(market, when, self.minutes, self.count))

    async def get_signal(self, ctx: bk.Context) -> bk.Signal | None:
        name = "1h" if self.minutes == 60 else f"{self.minutes}m"
        wish = self.answer(ctx.when_ms, ctx.price, (await ctx.candles(name, self.count)).close.tolist())
        if wish is None:
            return None
        return bk.Signal(
            wish.side, wish.take, wish.stop, price_open=wish.open, minutes=wish.minutes, cost=wish.cost, id=wish.id
        )


class RandomCommands:
    """Without memory as well: what it tries depends on its seed, the minute, the price and the levels in force."""

    def __init__(self, seed: int) -> None:
        rng = dice(seed + 500_000)
        self.seed = seed
        self.only_at_first = rng.random() < 0.3
        self.busy = 0.6 if self.only_at_first else rng.choice([0.01, 0.05, 0.3])
        self.told: list[Any] = []

    def script(self, when: int, price: float, is_open: bool, take: float, stop: float) -> list[Any]:
        rng = dice((self.seed + 500_000) * 1_000_003 + when // MINUTE)
        if rng.random() >= self.busy:
            return []
        tried = []
        for _ in range(rng.choice([1, 1, 1, 4])):
            name = rng.choices(COMMANDS[:6], [3, 3, 4, 3, 3, 0.3])[0] if is_open else rng.choice(COMMANDS[6:])
            near = price * (1 + rng.choice([-1, 0, 1]) * rng.expovariate(1 / 0.004))
            value = {
                "reduce": rng.choice([rng.uniform(0.1, 100), 50.0, 99.9999, 100.0]),
                "add": rng.choice([100.0, rng.uniform(1, 500)]),
                "move_stop": rng.choice([near, near, near, stop, take]),
                "move_take": rng.choice([near, near, near, take, stop]),
            }.get(name, 0.0)
            tried.append((name, value, f"note {when}" if name == "close" else ""))
        return tried

    def manage(self, held: Any, when: int, price: float) -> list[Any]:
        if self.only_at_first and when != (held.opened or held.scheduled):
            return []
        return self.script(when, price, held.opened is not None, held.take, held.stop)

    async def act(self, ctx: bk.Context) -> None:
        for name, value, note in self._script(ctx):
            view: Any = ctx.position or ctx.entry
            arguments = {"percent": value} if name == "reduce" else {"note": note} if note else {}
            outcome = await getattr(view, name)(
                *([value] if name in ("add", "move_stop", "move_take") else []), **arguments
            )
            assert outcome.accepted or outcome.reason
            word = "accepted" if outcome else "refused"
            held = terms(view.value)
            self.told.append(ref.Event(name, ctx.when_ms, view.value.side, ctx.price, word, terms=held))

    async def act_at_first(self, event: bk.Event, ctx: bk.Context) -> None:
        await self.act(ctx)

    def _script(self, ctx: bk.Context) -> list[Any]:
        if ctx.position is not None:
            return self.script(ctx.when_ms, ctx.price, True, ctx.position.take_profit, ctx.position.stop_loss)
        assert ctx.entry is not None
        entry = ctx.entry.value
        return self.script(ctx.when_ms, ctx.price, False, entry.price_take_profit, entry.price_stop_loss)


def terms(held: bk.Position | bk.RestingEntry | bk.Trade) -> tuple[float, ...]:
    """Begin, levels in force, effective entry, all entries and all reductions, as the reference lists them."""
    if isinstance(held, bk.RestingEntry):
        levels = held.price_take_profit, held.price_stop_loss
        return held.scheduled_at_ms, *levels, held.price_open, held.price_open, held.cost
    if isinstance(held, bk.Trade):
        levels, price = (held.price_take_profit, held.price_stop_loss), held.price_open
    else:
        levels, price = (held.take_profit, held.stop_loss), effective_price(held.entries, held.reductions)
    entries = [number for entry in held.entries for number in (entry.price, entry.cost)]
    for part in held.reductions:
        entries += [part.percent, part.price, part.cost_basis, part.entry_count]
    return held.opened_at_ms, *levels, price, *entries


def ours(event: bk.Event) -> Iterator[Any]:
    when = event.when_ms
    if isinstance(event, bk.EntryScheduled):
        yield ref.Event("scheduled", when, event.entry.side, event.entry.price_open)
    elif isinstance(event, bk.EntryCancelled):
        yield ref.Event("cancelled", when, event.entry.side, event.entry.price_open, event.reason)
    elif isinstance(event, bk.PositionOpened):
        yield ref.Event("opened", when, event.position.side, event.position.price_open)
    elif isinstance(event, bk.PositionClosed):
        trade = event.trade
        assert trade.closed_at_ms == when
        yield ref.Event(
            "closed",
            when,
            trade.side,
            trade.price_close,
            trade.close_reason,
            trade.close_note,
            (trade.pnl_pct, trade.pnl_cost, trade.peak_pct, trade.fall_pct),
            terms(trade),
        )


def same(mine: Any, expected: Any) -> bool:
    if isinstance(mine, tuple):
        return len(mine) == len(expected) and all(map(same, mine, expected))
    return math.isclose(mine, expected, rel_tol=1e-12, abs_tol=1e-9) if isinstance(mine, float) else mine == expected


async def compare(
    tmp_path: Path, rows: list[Row], fill: Any, seeds: range, *, managed: bool = False, anywhere: bool = False
) -> set[tuple[str, str]]:
    """Run each strategy in both; the kinds and reasons of all events that were seen."""
    candles = [ref.Candle(*row) for row in rows]
    start, stop = rows[LEAD][0], rows[-1][0] + MINUTE

    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> list[Row]:
        first = max((since_ms - rows[0][0]) // MINUTE, 0)
        return rows[first : max((since_ms - rows[0][0]) // MINUTE + limit, 0)]

    kit = bk.Kit(tmp_path)
    kit.set_config(
        CC_MAX_SIGNAL_LIFETIME_MINUTES=math.inf,
        CC_ENABLE_DCA_EVERYWHERE=anywhere,
        CC_ENABLE_TRAILING_EVERYWHERE=anywhere,
    )
    kit.add_exchange_schema("market", source=bk.sources.function(get_candles))
    seen = set()
    for seed in seeds:
        strategy, commands = RandomStrategy(seed), RandomCommands(seed)
        names: Any = {"strategy_name": f"s{seed}", "exchange_name": "market", "frame_name": f"f{seed}"}
        kit.add_frame_schema(names["frame_name"], start_date=start, end_date=stop, interval=strategy.grid)
        manage = commands.act if managed and not commands.only_at_first else None
        kit.add_strategy_schema(
            names["strategy_name"], interval=strategy.interval, get_signal=strategy.get_signal, manage=manage
        )
        if managed and manage is None:
            # Without `manage` a run skips the minutes in which nothing can happen, with what a command has changed.
            begins = bk.EntryScheduled, bk.PositionOpened
            kit.on(begins, commands.act_at_first, strategy_name=names["strategy_name"])
        slot, grid = ((60 if name == "1h" else int(name[:-1])) for name in (strategy.interval, strategy.grid))
        rules = ref.Rules(start, stop, slot * MINUTE, grid * MINUTE, fill, anywhere, anywhere)
        manager = commands.manage if managed else lambda *_: ()
        expected = ref.replay(candles, rules, strategy.decide, manager)
        mine = [each async for event in kit.backtest.run("COIN", fill=fill, **names) for each in ours(event)]
        # Of a minute, first what happened and then what was tried.
        mine = sorted([*mine, *commands.told], key=lambda each: (each.when, each.kind in COMMANDS))
        for place, (a, b) in enumerate(zip(mine, expected, strict=False)):
            assert same(a, b), f"seed {seed}, {fill}, event {place}:\n  ours      {a}\n  reference {b}"
        assert len(mine) == len(expected), f"seed {seed}, {fill}: {len(mine)} events, the reference has {len(expected)}"
        seen |= {(event.kind, event.reason) for event in expected}
    return seen


@pytest.mark.sampled
@pytest.mark.parametrize("fill", ["vwap", "ohlc"])
@pytest.mark.parametrize("market", sample(range(RANDOM_MARKETS), 2, "random markets"))
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


@pytest.mark.sampled
@pytest.mark.parametrize("fill", ["vwap", "ohlc"])
@pytest.mark.parametrize("stretch", sample(range(REAL_STRETCHES), 1, "real stretches"))
@pytest.mark.parametrize("name", sample(REAL, 1, "real markets"))
async def test_random_strategies_on_real_candles(tmp_path: Path, name: str, stretch: int, fill: str) -> None:
    first = 100_000 + (REAL.index(name) * REAL_STRETCHES + stretch) * STRATEGIES
    seen = await compare(tmp_path, real_market(name, stretch), fill, range(first, first + STRATEGIES))
    assert {("opened", ""), ("scheduled", ""), ("closed", "time_expired")} <= seen


@pytest.mark.sampled
@pytest.mark.parametrize("fill", ["vwap", "ohlc"])
@pytest.mark.parametrize("market", sample(range(MANAGED_MARKETS), 2, "managed markets"))
async def test_random_commands_on_random_candles(tmp_path: Path, market: int, fill: str) -> None:
    seeds = range(200_000 + market * MANAGED, 200_000 + (market + 1) * MANAGED)
    seen = await compare(tmp_path, random_market(100 + market), fill, seeds, managed=True, anywhere=market % 4 == 3)
    tried = {(name, outcome) for name in COMMANDS for outcome in ("accepted", "refused")}
    # A calm market may never earn the costs, and few commands come after one to close.
    assert seen >= (tried - {("breakeven", "accepted"), ("close", "refused")} if market else tried)
    assert seen >= {("closed", "closed"), ("cancelled", "user")}


@pytest.mark.sampled
@pytest.mark.parametrize("fill", ["vwap", "ohlc"])
@pytest.mark.parametrize("name", sample(REAL, 1, "managed real markets"))
async def test_random_commands_on_real_candles(tmp_path: Path, name: str, fill: str) -> None:
    first = 300_000 + REAL.index(name) * MANAGED
    seen = await compare(tmp_path, real_market(name, 3), fill, range(first, first + MANAGED), managed=True)
    assert seen >= {(name, "accepted") for name in COMMANDS if name != "breakeven"}
    assert seen >= {("closed", "closed"), ("cancelled", "user")}


@pytest.mark.parametrize(
    ("side", "first", "steps", "price", "percent", "money"),
    [
        ("long", 100, [], 101, 0.597403596404, 0.597403596404),
        ("short", 100, [], 99, 0.602603603604, 0.602603603604),
        ("long", 100, [], 100, -0.399600399600, -0.3996004),
        ("long", 100, [("add", 100, 80)], 100, 12.062949550450, 24.1258991009),
        ("long", 100, [("reduce", 50, 110)], 120, 14.555459540460, 14.5554595405),
        ("long", 100, [("reduce", 50, 110), ("add", 200, 90)], 100, 8.647287712288, 25.9418631369),
        ("short", 100, [("add", 100, 110), ("reduce", 25, 95)], 105, 1.765176426426, 3.5303528529),
    ],
)
def test_the_reference_earns_what_was_worked_out_by_hand(
    side: str, first: float, steps: Any, price: float, percent: float, money: float
) -> None:
    take, stop = (1000, 1) if side == "long" else (1, 1000)
    held, rules = ref.Held(ref.Wish(side, take, stop, open=first), 0, first), ref.Rules(0, 0)
    assert [held.obey((name, value, ""), at, rules) for name, value, at in steps] == ["accepted"] * len(steps)
    assert held.pnl(price) == pytest.approx((percent, money), abs=1e-9)
