"""The rules of a replay in plain Python, minute by minute: a second opinion that shares nothing with the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MINUTE = 60_000


class Candle(NamedTuple):
    timestamp: int
    open: float
    high: float
    low: float
    close: float
    volume: float


@dataclass
class Wish:
    side: str
    take: float
    stop: float
    open: float | None = None
    minutes: float = 1440
    cost: float = 100
    id: str | None = None


@dataclass
class Held:
    """A resting entry (`opened` is None) or a position. Levels, entries and partials may be changed while it lasts."""

    wish: Wish
    scheduled: int
    open: float
    take: float
    stop: float
    entries: list[tuple[float, float]]  # (price, cost)
    opened: int | None = None
    partials: list[tuple[float, float, float, int]] = field(default_factory=list)
    # (percent of what was held, price, cost held before it, entries made before it)
    peak: tuple[float, float] = (0, 0)  # (price, percent earned there)
    fall: tuple[float, float] = (0, 0)

    def __post_init__(self) -> None:
        self.sign = 1 if self.wish.side == "long" else -1


class Event(NamedTuple):
    kind: str  # scheduled, cancelled, opened or closed
    when: int
    side: str
    price: float
    reason: str = ""
    pnl_pct: float = 0
    pnl_cost: float = 0
    peak_pct: float = 0
    fall_pct: float = 0
    opened: int | None = None


@dataclass
class Rules:
    start: int
    stop: int
    slot: int = MINUTE
    grid: int = MINUTE
    fill: str = "vwap"
    fee: float = 0.1
    slippage: float = 0.1
    patience: int = 120  # minutes that a resting entry waits


def price_at(market: dict[int, Candle], when: int) -> float:
    """The volume-weighted average of the last five closed minutes; without volume, the mean of their closes."""
    last = [market[when - k * MINUTE] for k in range(5, 0, -1)]
    volume = worth = closes = 0.0
    for candle in last:
        volume += candle.volume
        worth += (candle.high + candle.low + candle.close) / 3 * candle.volume
        closes += candle.close
    return worth / volume if volume > 0 else closes / 5


def effective_prices(held: Held) -> list[float]:
    """The cost-weighted harmonic mean before each partial, and last the one of now."""
    prices: list[float] = []
    cost, quantity, taken = 0.0, 0.0, 0
    for percent, _, basis, count in [*held.partials, (0.0, 0.0, 0.0, len(held.entries))]:
        for price, paid in held.entries[taken:count]:
            cost, quantity = cost + paid, quantity + paid / price
        taken = count
        prices.append(cost / quantity if quantity else prices[-1])
        cost = basis * (1 - percent / 100)
        quantity = cost / prices[-1]
    return prices


def pnl(held: Held, price: float, rules: Rules) -> tuple[float, float]:
    """Percent of all that was put in, and the same in money: slippage on both fills, one entry fee, exits by weight."""
    slip, total = rules.slippage / 100, sum(cost for _, cost in held.entries)
    parts = [(percent / 100 * basis / total, at) for percent, at, basis, _ in held.partials]
    parts.append((1 - sum(weight for weight, _ in parts), price))
    gains = fees = 0.0
    for (weight, closed), opened in zip(parts, effective_prices(held), strict=True):
        bought, sold = opened * (1 + held.sign * slip), closed * (1 - held.sign * slip)
        gains += weight * held.sign * (sold - bought) / bought * 100
        fees += weight * sold / bought
    percent = gains - rules.fee * (1 + fees)
    return percent, percent / 100 * total


def closes(market: dict[int, Candle], when: int, minutes: int, count: int) -> list[float]:
    """The closes of the last `count` candles of so many minutes that have closed by then."""
    end = when - when % (minutes * MINUTE)
    return [market[end - k * minutes * MINUTE - MINUTE].close for k in range(count - 1, -1, -1)]


def replay(
    candles: Sequence[Candle], rules: Rules, decide: Callable[[dict[int, Candle], int, float], Wish | None]
) -> list[Event]:
    """Every event of a run over contiguous candles; `decide` is given all of them, the minute and its price."""
    market = {candle.timestamp: candle for candle in candles}
    events: list[Event] = []
    held: Held | None = None
    used_slot, last_id = -1, None
    for when in range(rules.start, rules.stop + 1, MINUTE):
        # One transition per minute. A command at a minute acts on `held` after it; one that ends or opens
        # something is the first thing that the next minute does.
        if held is None:
            slot = when // rules.slot
            if slot == used_slot or (when - rules.start) % rules.grid or when == rules.stop:
                continue
            used_slot = slot
            price = price_at(market, when)
            wish = decide(market, when, price)
            if wish is not None and (wish.id is None or wish.id != last_id):
                at = price if wish.open is None else wish.open
                held = Held(wish, when, at, wish.take, wish.stop, [(at, wish.cost)])
                now = held.sign * price <= held.sign * at
                events.append(_open(held, when, rules) if now else Event("scheduled", when, wish.side, at))
            continue
        event = (_rest if held.opened is None else _hold)(held, market, when, rules)
        if event is not None:
            events.append(event)
            if event.kind != "opened":
                last_id, held = held.wish.id, None
    return events


def _open(held: Held, when: int, rules: Rules) -> Event:
    held.opened = when
    held.peak, held.fall = (held.open, 0.0), (held.open, pnl(held, held.open, rules)[0])
    return Event("opened", when, held.wish.side, held.open)


def _rest(held: Held, market: dict[int, Candle], when: int, rules: Rules) -> Event | None:
    last = market[when - MINUTE]
    reached = held.sign * (last.low if held.wish.side == "long" else last.high)
    if when - held.scheduled >= rules.patience * MINUTE:
        return Event("cancelled", when, held.wish.side, held.open, "timeout")
    if reached <= held.sign * held.stop:
        return Event("cancelled", when, held.wish.side, held.open, "price_reject")
    if when == rules.stop:
        return Event("cancelled", when, held.wish.side, held.open, "frame_end")
    return _open(held, when, rules) if reached <= held.sign * held.open else None


def _hold(held: Held, market: dict[int, Candle], when: int, rules: Rules) -> Event | None:
    assert held.opened is not None
    price, last, sign = price_at(market, when), market[when - MINUTE], held.sign
    best, worst = (price, price) if rules.fill == "vwap" else (last.high, last.low)[::sign]
    reason, at = "", price
    if when - held.opened >= held.wish.minutes * MINUTE:
        reason = "time_expired"
    elif sign * worst <= sign * held.stop:
        reason, at = "stop_loss", held.stop
        if rules.fill == "ohlc":
            at = sign * min(sign * held.stop, sign * last.open)
    elif sign * best >= sign * held.take:
        reason, at = "take_profit", held.take
        if rules.fill == "ohlc":
            at = sign * max(sign * held.take, sign * last.open)
    elif when == rules.stop:
        reason = "frame_end"
    seen = at if reason else price
    entry = effective_prices(held)[-1]
    if sign * seen > max(sign * entry, sign * held.peak[0]):
        held.peak = seen, pnl(held, seen, rules)[0]
    if sign * seen < min(sign * entry, sign * held.fall[0]):
        held.fall = seen, pnl(held, seen, rules)[0]
    if not reason:
        return None
    percent, money = pnl(held, at, rules)
    return Event("closed", when, held.wish.side, at, reason, percent, money, held.peak[1], held.fall[1], held.opened)
