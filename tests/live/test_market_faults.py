"""A source that leaves out, garbles, delays and revises candles, and goes away: a run trades as if it had known.

What it should trade is found without any part of a live run: minute by minute with the rules of the engine, from the
clean candles and from what the best of readers could have known of them at each minute. A sample of the seeds runs
in `make test`, all of them in `make prove`.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine import test_against_reference as engine
from tests.live.rig import WHERE, Rig, UntilClock
from tests.samples import sample, size

import backtest_kit as bk
from backtest_kit.engine.step import Flat, Rules, State, Tick, admit, decision_due, step
from backtest_kit.market.price import vwap
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.identity import Identity
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.settings import Settings
from backtest_kit.venue.publishing import Publishing, Row

ENGINE: Any = engine
SEEDS = range(300)
MINUTES, BEFORE = 120, 60
WINDOW = 12
"""Closes that a decision looks at."""
LATE = 5
"""Minutes for which a filled one is asked for again."""


def publishing_of(seed: int) -> Publishing:
    """Each kind of fault alone, and all of them together."""
    dice = random.Random(seed)  # noqa: S311  # repeatable, not secret
    parts: dict[str, Any] = {"missing": 0.0, "late": 0.0, "revised": 0.0, "garbled": 0.0, "outages": 0.0}
    for kind in [list(parts)[seed % 6]] if seed % 6 < 5 else list(parts):
        parts[kind] = dice.choice([0.02, 0.1, 0.2])
    if parts["outages"]:
        parts["outages"] = 1.0
    return Publishing(
        seed=seed,
        **parts,
        garbled_minutes=dice.choice([0, 1, 3]),
        outage_minutes=dice.choice([15, 360]),
    )


class Place:
    """A market with its faults, and where in it a run begins: with an outage, somewhere near it."""

    def __init__(self, seed: int) -> None:
        self.publishing = publishing_of(seed)
        self.interval = 1 if seed % 2 else 5
        self.fill: Any = "vwap" if seed % 4 < 2 else "ohlc"
        begin_ms = 1_483_228_800_000 + seed * 7 * 86_400_000  # the last of 300 seeds is in the past as well
        first_ms, end_ms = self.publishing.outage(begin_ms)
        if end_ms > first_ms:
            dice = random.Random(seed)  # noqa: S311  # repeatable, not secret
            begin_ms = dice.choice([first_ms, end_ms]) - dice.randint(1, MINUTES - 20) * MINUTE_MS
        self.begin_ms, self.end_ms = begin_ms, begin_ms + MINUTES * MINUTE_MS
        random_ = np.random.default_rng(seed)
        close = 100 * np.exp(np.cumsum(random_.normal(0, 0.002, MINUTES + BEFORE)))
        open_ = np.concatenate(([100.0], close[:-1]))
        times = begin_ms + np.arange(-BEFORE, MINUTES) * MINUTE_MS
        high, low = np.maximum(open_, close) * 1.001, np.minimum(open_, close) * 0.999
        self.candles = CandleSeries(times, open_, high, low, close, random_.uniform(1, 9, len(times)))

    def signal(self, when_ms: int, price: float, close: Any) -> bk.Signal | None:
        """What the strategy answers: it has no memory but the candles."""
        if close[-1] == close[-2]:
            return None
        side: Any = "long" if close[-1] > close.mean() else "short"
        sign = 1 if side == "long" else -1
        if when_ms // MINUTE_MS % 3:
            return bk.Signal.bracket(side, price=price, take_profit_pct=0.8, stop_loss_pct=0.8, minutes=9)
        limit = price * (1 - sign * 0.001)
        return bk.Signal(side, limit * (1 + sign * 0.01), limit * (1 - sign * 0.01), price_open=limit, minutes=9)

    def is_down(self, when_ms: int) -> bool:
        first_ms, end_ms = self.publishing.outage(when_ms)
        return first_ms <= when_ms < end_ms


class Known:
    """The candles as a run knows them that asks at each minute for what it lacks."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._rows: list[Row] = []
        self._real: list[bool] = []
        self._seen: dict[int, Row] = {}
        """The first version that was served of each candle: it is the one that stays."""

    def at(self, when_ms: int) -> CandleSeries | None:
        """All up to a minute whose candle is there; None at one whose candle is not."""
        if self._place.is_down(when_ms):
            return None
        count = (when_ms - self._place.begin_ms) // MINUTE_MS + BEFORE
        for number in range(max(0, len(self._rows) - LATE), count):
            row = self._published(number, when_ms)
            if row is not None:
                self._seen.setdefault(number, row)
        if count - 1 not in self._seen:
            return None
        for number in range(max(0, len(self._rows) - LATE), count):
            if number < len(self._rows) and self._real[number]:
                continue
            if number == len(self._rows):
                self._rows.append([])
                self._real.append(False)
            self._real[number] = number in self._seen
            last = self._rows[number - 1][4] if number else 100.0
            flat: Row = [float(self._place.candles.timestamp[number]), last, last, last, last, 0.0]
            self._rows[number] = self._seen.get(number, flat)
        return CandleSeries(*zip(*self._rows, strict=True))

    def _published(self, number: int, when_ms: int) -> Row | None:
        candles = self._place.candles
        row: Row = [float(column[number]) for column in candles.columns().values()]
        return self._place.publishing.known(row, when_ms)


def expected(place: Place) -> tuple[list[Any], list[int]]:
    """The trades of a run that knows which minutes are missing, and those minutes."""
    settings = Settings()
    rules = Rules(
        identity=Identity("COIN", "trend", "demo", "", "paper"),
        settings=settings,
        fill=place.fill,
        interval_ms=place.interval * MINUTE_MS,
    )
    known, missed, trades = Known(place), list[int](), list[Any]()
    state: State = Flat()
    for when_ms in range(place.begin_ms, place.end_ms, MINUTE_MS):
        candles = known.at(when_ms)
        if candles is None:
            missed.append(when_ms)
            continue
        price = float(vwap(candles, settings.CC_AVG_PRICE_CANDLES_COUNT)[-1])
        open_, high, low, close = (float(getattr(candles, name)[-1]) for name in ("open", "high", "low", "close"))
        tick = Tick(when_ms, price, open_, high, low, close)
        if not isinstance(state, Flat):
            state, events = step(state, tick, rules)
            trades += [terms(event.trade) for event in events if isinstance(event, bk.PositionClosed)]
        elif decision_due(state, when_ms, rules):
            state, _ = admit(state, place.signal(when_ms, price, candles.close[-WINDOW:]), tick, rules)
    return trades, missed


def terms(trade: bk.Trade) -> Any:
    return (
        trade.side,
        trade.opened_at_ms,
        trade.closed_at_ms,
        trade.close_reason,
        trade.price_open,
        trade.price_close,
    )


async def traded(rig: Rig, place: Place, *, live: bool) -> bk.LiveStatus:
    clock = UntilClock(place.begin_ms, place.end_ms)

    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> Any:
        stop_ms = min(since_ms + limit * MINUTE_MS, clock.now_ms() // MINUTE_MS * MINUTE_MS)
        return place.publishing.rows(place.candles.between(since_ms, stop_ms), clock.now_ms())

    async def get_signal(ctx: bk.Context) -> bk.Signal | None:
        close = (await ctx.candles("1m", WINDOW)).close
        return place.signal(ctx.when_ms, ctx.price, close)

    rig.source = bk.sources.function(get_candles)
    rig.strategy = {"get_signal": get_signal, "interval": f"{place.interval}m"}
    handle = rig.kit(clock).live.background("COIN", **WHERE, paper=not live, fill=place.fill)
    over = asyncio.ensure_future(clock.over.wait())
    await asyncio.wait({over, handle.task}, return_when=asyncio.FIRST_COMPLETED)
    over.cancel()
    status = handle.status
    handle.cancel()
    await asyncio.wait({handle.task})
    if not handle.task.cancelled() and (error := handle.task.exception()) is not None:
        raise error
    return status


@pytest.mark.sampled
@pytest.mark.parametrize("seed", sample(SEEDS, 5, "market faults"))
async def test_a_run_trades_as_if_it_had_known_which_minutes_are_missing(tmp_path: Path, seed: int) -> None:
    place = Place(seed)
    trades, missed = expected(place)
    rig = Rig(tmp_path, bk.MemoryStore())
    await traded(rig, place, live=bool(seed % 3))
    assert made(rig, place) == trades, place.publishing
    told = [at for event in rig.of(bk.MinutesMissed) for at in minutes_of(event) if at < place.end_ms]
    assert told == missed, place.publishing
    assert not rig.of(bk.StrategyFailed, bk.OrderFailed, bk.StoreDegraded)


def made(rig: Rig, place: Place) -> list[Any]:
    """Its trades, without the minute that comes only to end the one before."""
    return [terms(trade) for trade in rig.trades() if trade.closed_at_ms < place.end_ms]


def minutes_of(event: bk.MinutesMissed) -> list[int]:
    return [event.first_ms + at * MINUTE_MS for at in range(event.count)]


@pytest.mark.sampled
@pytest.mark.parametrize("seed", sample(SEEDS[::6], 2, "market faults of a backtest"))
async def test_a_backtest_of_what_was_published_makes_the_same_trades(tmp_path: Path, seed: int) -> None:
    place = Place(seed)
    trades, _ = expected(place)
    rig = Rig(tmp_path, bk.MemoryStore())
    rows = place.publishing.rows(place.candles, place.end_ms)
    # The market goes on: where its last minutes are missing, the frame does not reach beyond the data.
    close = float(place.candles.close[-1])
    rows.append([place.end_ms, close, close, close, close, 1.0])

    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> Any:
        return [row for row in rows if since_ms <= (row[0] or 0) < since_ms + limit * MINUTE_MS]

    async def get_signal(ctx: bk.Context) -> bk.Signal | None:
        return place.signal(ctx.when_ms, ctx.price, (await ctx.candles("1m", WINDOW)).close)

    rig.source = bk.sources.function(get_candles)
    rig.strategy = {"get_signal": get_signal, "interval": f"{place.interval}m"}
    kit = rig.kit(None)
    kit.add_frame_schema("frame", start_date=place.begin_ms, end_date=place.end_ms)
    where: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "demo", "frame_name": "frame"}
    async for _ in kit.backtest.run("COIN", **where, fill=place.fill, gaps="fill"):
        pass
    assert made(rig, place) == trades
    assert place.publishing.missing


@pytest.mark.sampled
def test_the_seeds_meet_every_fault() -> None:
    met, trades, missed = set(), 0, 0
    seeds = SEEDS[: size(24, len(SEEDS))]
    for seed in seeds:
        place = Place(seed)
        met |= {place.publishing.fate(int(at)) for at in place.candles.timestamp}
        found, lost = expected(place)
        trades, missed = trades + len(found), missed + len(lost)
    assert {fate for fate, _ in met} == {"", "missing", "late", "revised", "garbled"}
    assert {garble for fate, garble in met if fate == "garbled"} >= {"none", "nan", "crossed", "twice", "early"}
    assert trades > 5 * len(seeds)
    assert missed > 3 * len(seeds)
