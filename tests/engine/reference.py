"""The rules of a replay in plain Python, minute by minute: a second opinion that shares nothing with the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

MINUTE = 60_000
FEE, SLIPPAGE, PATIENCE = 0.1, 0.1, 120  # percent and percent of each fill; minutes that a resting entry waits
SAFE = 2 * (FEE + SLIPPAGE) + 0.2  # percent beyond the entry at which a stop may go there


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
class Rules:
    start: int
    stop: int
    slot: int = MINUTE
    grid: int = MINUTE
    fill: str = "vwap"
    add_anywhere: bool = False
    move_anywhere: bool = False


class Event(NamedTuple):
    kind: str  # scheduled, cancelled, opened, closed, or the name of a command
    when: int
    side: str
    price: float
    reason: str = ""  # of a command: accepted or refused
    note: str = ""
    earned: tuple[float, ...] = ()  # percent, money, percent at the peak, percent at the fall
    terms: tuple[float, ...] = ()  # begin, take, stop, effective entry; then all entries and partials


Command = tuple[str, float, str]  # name; a percent, a cost or a price; a note


class Held:
    """A resting entry (`opened` is None) or a position."""

    def __init__(self, wish: Wish, scheduled: int, price: float) -> None:
        self.wish, self.scheduled, self.sign = wish, scheduled, 1 if wish.side == "long" else -1
        self.take, self.stop, self.left = wish.take, wish.stop, wish.cost
        self.open = self.entry = price if wish.open is None else wish.open
        self.entries = [(self.open, wish.cost)]
        # (percent of what was held, price, cost held before it, entries made before it, entry price before it)
        self.partials: list[tuple[float, float, float, int, float]] = []
        self.opened: int | None = None
        self.peak = self.fall = (self.open, 0.0)  # (price, percent earned there)
        self.order, self.note = "", ""  # what the next minute begins with: close, cancel or activate

    def pnl(self, price: float) -> tuple[float, float]:
        """Percent of all that was put in, and in money: slippage on both fills, one entry fee, exits by weight."""
        slip, total = self.sign * SLIPPAGE / 100, sum(cost for _, cost in self.entries)
        parts = [(percent / 100 * cost / total, at, entry) for percent, at, cost, _, entry in self.partials]
        parts.append((1 - sum(weight for weight, _, _ in parts), price, self.entry))
        gains = fees = 0.0
        for weight, closed, opened in parts:
            bought, sold = opened * (1 + slip), closed * (1 - slip)
            gains += weight * self.sign * (sold - bought) / bought * 100
            fees += weight * sold / bought
        percent = gains - FEE * (1 + fees)
        return percent, percent / 100 * total

    def obey(self, command: Command, price: float, rules: Rules) -> str:
        """What is accepted changes something now, or is an order: what the next minute begins with."""
        (name, value, note), sign = command, self.sign
        now, to, take, stop, entry = (sign * each for each in (price, value, self.take, self.stop, self.entry))
        allowed = {
            "reduce": stop < now < take,
            "add": stop < now < take and (now < min(sign * at for at, _ in self.entries) or rules.add_anywhere),
            "move_stop": to < min(now, take) and (to > stop or rules.move_anywhere),
            "move_take": to > max(now, stop) and (to < take or rules.move_anywhere),
            "breakeven": stop < entry < take and now >= entry + self.entry * SAFE / 100,
        }
        if self.order or not allowed.get(name, True):
            return "refused"
        if name == "reduce":
            self.partials.append((value, price, self.left, len(self.entries), self.entry))
            self.left *= 1 - value / 100
            if self.left <= 1e-9 * sum(cost for _, cost in self.entries):
                self.order, self.note = "close", "full_partial_close"
        elif name == "add":  # the cost-weighted harmonic mean of what is held and what comes to it
            self.entry = (self.left + value) / (self.left / self.entry + value / price)
            self.left += value
            self.entries.append((price, value))
        elif name == "move_take":
            self.take = value
        elif name in ("move_stop", "breakeven"):
            self.stop = value if name == "move_stop" else self.entry
        else:
            self.order, self.note = name, note
        return "accepted"

    def terms(self) -> tuple[float, ...]:
        begin, deals = self.opened or self.scheduled, chain(*self.entries, *(part[:4] for part in self.partials))
        return (begin, self.take, self.stop, self.entry, *deals)

    def enter(self, when: int, price: float) -> Event:
        self.opened, self.order, self.open, self.entry = when, "", price, price
        self.entries = [(price, self.wish.cost)]
        self.peak, self.fall = (price, 0.0), (price, self.pnl(price)[0])
        return Event("opened", when, self.wish.side, price)

    def rest(self, last: Candle, price: float, when: int, rules: Rules) -> Event | None:
        sign, told = self.sign, self.order
        reached = sign * (last.low if sign > 0 else last.high)
        between = sign * self.stop < sign * price < sign * self.take
        for happens, reason in (
            (told == "cancel", "user"),
            (not told and when - self.scheduled >= PATIENCE * MINUTE, "timeout"),
            (not between if told else reached <= sign * self.stop, "price_reject"),
            (when == rules.stop, "frame_end"),
        ):
            if happens:
                return Event("cancelled", when, self.wish.side, self.open, reason)
        enters = told or reached <= sign * self.open
        return self.enter(when, price if told else self.open) if enters else None

    def hold(self, last: Candle, price: float, when: int, rules: Rules) -> Event | None:
        sign, wicks = self.sign, rules.fill == "ohlc"
        best, worst = (last.high, last.low)[::sign] if wicks else (price, price)
        take, stop, gap = sign * self.take, sign * self.stop, sign * last.open
        stopped = "trailing_stop" if stop > sign * self.entry + 1e-9 * self.entry else "stop_loss"
        outcomes = (
            (self.order == "close", "closed", price),
            (when - (self.opened or 0) >= self.wish.minutes * MINUTE, "time_expired", price),
            (sign * worst <= stop, stopped, sign * min(stop, gap) if wicks else self.stop),
            (sign * best >= take, "take_profit", sign * max(take, gap) if wicks else self.take),
            (when == rules.stop, "frame_end", price),
        )
        reason, at = next(((reason, at) for happens, reason, at in outcomes if happens), ("", price))
        gain, percent = sign * (at - self.entry), self.pnl(at)[0]
        if percent > self.peak[1] or (gain > 0 and self.peak == (self.open, 0)):
            self.peak = at, percent
        if percent < self.fall[1]:
            self.fall = at, percent
        if not reason:
            return None
        earned = *self.pnl(at), self.peak[1], self.fall[1]
        return Event("closed", when, self.wish.side, at, reason, self.note, earned, self.terms())


def price_at(market: dict[int, Candle], when: int) -> float:
    """The volume-weighted average of the last five closed minutes; without volume, the mean of their closes."""
    last = [market[when - k * MINUTE] for k in range(5, 0, -1)]
    volume = sum(candle.volume for candle in last)
    worth = sum((candle.high + candle.low + candle.close) / 3 * candle.volume for candle in last)
    return worth / volume if volume else sum(candle.close for candle in last) / 5


def replay(
    candles: Sequence[Candle],
    rules: Rules,
    decide: Callable[[dict[int, Candle], int, float], Wish | None],
    manage: Callable[[Held, int, float], Sequence[Command]],
) -> list[Event]:
    """Every event of a run over contiguous candles; both callables are given the minute and its price."""
    market, events = {candle.timestamp: candle for candle in candles}, list[Event]()
    held, used_slot, last_id = None, -1, None
    for when in range(rules.start, rules.stop + 1, MINUTE):
        # One transition per minute, then the commands, if anything is held after it.
        price, slot, event = price_at(market, when), when // rules.slot, None
        if held is not None:
            event = (held.hold if held.opened else held.rest)(market[when - MINUTE], price, when, rules)
        elif slot != used_slot and (when - rules.start) % rules.grid == 0 and when < rules.stop:
            used_slot, wish = slot, decide(market, when, price)
            if wish is not None and (wish.id is None or wish.id != last_id):
                held, last_id = Held(wish, when, price), wish.id
                now = held.sign * price <= held.sign * held.open
                event = held.enter(when, held.open) if now else Event("scheduled", when, wish.side, held.open)
        if event is not None:
            events.append(event)
            held = None if event.kind in ("cancelled", "closed") else held
        if held is not None:
            for command in manage(held, when, price):
                outcome = held.obey(command, price, rules)
                events.append(Event(command[0], when, held.wish.side, price, outcome, terms=held.terms()))
    return events
