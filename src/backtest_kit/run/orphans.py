"""What a venue holds that nobody watches, and what is watched that it does not hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from backtest_kit.broker.base import Broker, Holding as VenueHolding, Order
from backtest_kit.broker.order_ids import SignalIds
from backtest_kit.engine.pnl import effective_price, remaining_cost
from backtest_kit.engine.position import open_position
from backtest_kit.engine.step import Flat, Holding, Resting, State
from backtest_kit.errors import Conflict
from backtest_kit.model.event import Event, OrphanFound, PositionOpened
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.position import Position, RestingEntry
from backtest_kit.model.price import price_text
from backtest_kit.run.alarms import words_of
from backtest_kit.run.claims import Claims
from backtest_kit.run.desk import Desk
from backtest_kit.settings import Settings

OrphanPolicy = Literal["alarm", "adopt", "protect"]
What = Literal["foreign_position", "missing_position", "unprotected_position", "left_stop"]


class Books(Protocol):
    """What a run does for its guard."""

    @property
    def stopping(self) -> bool:
        """Whether nothing new is begun any more."""
        ...

    async def adopt(self, state: Holding, event: PositionOpened) -> tuple[Event, ...]:
        """Make a position the run's own, without an order; returns what is to be told."""
        ...

    async def protect(self, order: Order) -> None:
        """Place a stop on the venue."""
        ...


_FARTHEST_STOP_PCT = 20.0
_LONGEST_WAIT = 60
"""Minutes after which at the latest a stop is placed again that the venue does not show."""
_SLACK = 0.01
"""Of what is held on both sides: what rounding and fees may leave where it cancels out."""
_NUMBERS = 1_000_000
"""Orders that a client order id can count."""
_LEFT_STOP = "nothing is done, cancel it at the venue: it would close the next position there"
_log = logging.getLogger("backtest_kit")


class OrphanGuard:
    """Compares the books of one desk with what the venue holds of its symbol.

    Each finding is told once, until it is gone, and each stop that is placed. One that vanishes again is placed again,
    after 1, 2, 4, ... and at most 60 minutes in which none was seen. The policy says what is done beside telling:

    - "alarm": nothing.
    - "adopt": a position that nobody watches becomes the strategy's own. Its stop is the one on the venue, else
      CC_MAX_STOPLOSS_DISTANCE_PERCENT (20 % if that rule is off) from its entry price; its take profit lies as far
      on the other side, and it lives CC_MAX_SIGNAL_LIFETIME_MINUTES from now. An unprotected position gets its stop.
      A run that is told to stop adopts nothing, and does as for "protect".
    - "protect": a position without a live stop gets one on the venue: ours at its own level, one that nobody
      watches at that distance. Watched it is not.

    What another strategy claims is its own to see to: whatever the policy, it is told who that is, and nothing is done.
    So it is where strategies trade the symbol side by side: which of them a stop would be for nobody can tell.
    """

    def __init__(self, desk: Desk, broker: Broker, policy: OrphanPolicy, books: Books, claims: Claims) -> None:
        self._desk = desk
        self._broker = broker
        self._policy = policy
        self._books = books
        self._claims = claims
        self._told: tuple[What, str, str] | None = None
        self._tries = 0
        """How many stops were placed since one was last seen on the venue."""
        self._again_ms = 0
        """When the next one may be."""

    async def look(self, beside: Callable[[], Sequence[Desk] | None] = lambda: ()) -> Event | None:
        """Ask the venue, and put right what the policy says; what was found, if it is news.

        `beside` tells the desks of other strategies that trade the symbol side by side with this one, or None if
        something has changed meanwhile. The venue has one position of all of them: it is compared with the sum.

        Raises:
            Whatever the broker raises.
        """
        symbol = self._desk.rules.identity.symbol
        holdings = await self._broker.holdings([symbol])
        if holdings is None:
            return None
        held = next((each for each in holdings if each.symbol == symbol and each.quantity > 0), None)
        others = beside()
        if others is None:
            return None
        states = [self._desk.state, *(each.state for each in others)]
        what = _finding(held, states)
        flat = all(isinstance(each, Flat) for each in states)
        if what is None and flat and any(_only_stop(each, symbol) for each in holdings):
            what = "left_stop"
        if held is None or held.stop_loss is not None:
            self._tries = self._again_ms = 0
        if what is None:
            self._told = None
            return None
        claim = side_by_side([self._desk, *others]) if others else ""
        if held is not None and what == "foreign_position" and not claim:
            claim = await self._claim(held)
        finding = (what, "" if held is None else held.direction, claim)
        if finding == self._told and (claim or not self._is_due(held, what)):
            return None
        try:
            if what == "left_stop":
                next_step = _LEFT_STOP
            else:
                next_step = f"nothing is done, look at the venue: {claim}" if claim else await self._act(held, what)
        except Conflict:
            raise
        except Exception as error:
            next_step = f"no stop could be placed, which is tried again: {words_of(error)}"
        self._told = finding
        identity, tick = self._desk.rules.identity, self._desk.tick
        quantity = 0.0 if held is None else held.quantity
        found = OrphanFound(identity=identity, when_ms=tick.when_ms, what=what, quantity=quantity, next_step=next_step)
        _log.error(
            "%s of %s on %s: %s", what.replace("_", " "), symbol, identity.exchange_name, next_step,
            extra={"event": found},
        )  # fmt: skip
        return found

    async def _claim(self, held: VenueHolding) -> str:
        """Why nothing may be done about it now: somebody else has it for its own, or there is no price to go by."""
        if self._policy == "alarm":
            return ""
        return await self._claims.of(held) if self._desk.tick.price else "there are no candles yet"

    def _is_due(self, held: VenueHolding | None, what: What) -> bool:
        """Whether a stop is to be placed again: one was, and there is none any more, or never was."""
        unprotected = held is not None and held.stop_loss is None and what != "missing_position"
        return unprotected and self._policy != "alarm" and self._desk.tick.when_ms >= self._again_ms

    async def _protect(self, order: Order) -> None:
        self._again_ms = self._desk.tick.when_ms + min(2**self._tries, _LONGEST_WAIT) * MINUTE_MS
        self._tries += 1
        await self._books.protect(order)

    async def _act(self, held: VenueHolding | None, what: What) -> str:
        state, settings = self._desk.state, self._desk.rules.settings
        if self._policy == "alarm" or held is None or what == "missing_position":
            return "nothing is done, look at the venue"
        if isinstance(state, Holding):
            position = state.position
            await self._protect(self._order(position.signal_id, held, position.stop_loss, position.take_profit))
            return f"a stop was placed at {price_text(position.stop_loss)}"
        stop, take = levels(held, self._desk.tick.price, settings)
        order = self._order(_signal_id(held, self._desk), held, stop, take)
        if held.stop_loss is None:
            await self._protect(order)
        if self._policy == "protect":
            return f"its stop is at {price_text(stop)}, watched it is not"
        if self._books.stopping:
            return f"its stop is at {price_text(stop)}, and it is not adopted, because the run is told to stop"
        self._desk.events += await self._books.adopt(*adopted(held, stop, take, state.last_slot_ms, self._desk))
        return f"it is the strategy's own now, stop at {price_text(stop)}, take profit at {price_text(take)}"

    def _order(self, signal_id: str, held: VenueHolding, stop: float, take: float) -> Order:
        tick = self._desk.tick
        number = tick.when_ms // MINUTE_MS % _NUMBERS
        return Order(
            kind="move_stop",
            client_order_id=SignalIds(signal_id, self._broker.store_id).order("move_stop", number),
            signal_id=signal_id,
            identity=self._desk.rules.identity,
            when_ms=tick.when_ms,
            direction=held.direction,
            price=tick.price,
            cost=0.0,
            quantity=held.quantity,
            take_profit=take,
            stop_loss=stop,
            reason="unprotected",
        )


def side_by_side(desks: Sequence[Desk]) -> str:
    """That several strategies share one position on the venue, in words."""
    names = " and ".join(each.rules.identity.strategy_name for each in desks)
    return f"strategies {names} trade {desks[0].rules.identity.symbol} side by side"


def _finding(held: VenueHolding | None, states: Sequence[State]) -> What | None:
    """What is wrong with what the venue holds, by the sum of what the books say."""
    positions = [state.position for state in states if isinstance(state, Holding)]
    if not positions and any(isinstance(state, Resting) for state in states):
        return None  # an entry that was filled just now is told by the next check
    quantities = [_signed(each) for each in positions]
    net, slack = sum(quantities), sum(map(abs, quantities)) * _SLACK
    if abs(net) <= slack:
        return None if held is None or held.quantity <= slack else "foreign_position"
    if held is None or held.direction != ("long" if net > 0 else "short"):
        return "missing_position"
    return "unprotected_position" if held.stop_loss is None else None


def _signed(position: Position) -> float:
    """How much of the base currency is held by the books; below 0 of a short."""
    entries, reductions = position.entries, position.reductions
    quantity = remaining_cost(entries, reductions) / effective_price(entries, reductions)
    return quantity if position.position == "long" else -quantity


def _only_stop(held: VenueHolding, symbol: str) -> bool:
    return held.symbol == symbol and not held.quantity and held.stop_loss is not None


def levels(held: VenueHolding, price: float, settings: Settings) -> tuple[float, float]:
    """Stop and take profit of a position that came without them."""
    entry = held.price_open or price
    sign = 1.0 if held.direction == "long" else -1.0
    distance_pct = settings.CC_MAX_STOPLOSS_DISTANCE_PERCENT or _FARTHEST_STOP_PCT
    stop = held.stop_loss or entry * (1 - sign * distance_pct / 100)
    return stop, entry + (entry - stop)


def _signal_id(held: VenueHolding, desk: Desk) -> str:
    return held.signal_id or f"orphan-{desk.tick.when_ms // 1000}"


def adopted(held: VenueHolding, stop: float, take: float, slot_ms: int, desk: Desk) -> tuple[Holding, PositionOpened]:
    """The position that the strategy takes over, as of this minute."""
    identity, tick, settings = desk.rules.identity, desk.tick, desk.rules.settings
    price = held.price_open or tick.price
    entry = RestingEntry(
        signal_id=_signal_id(held, desk),
        symbol=identity.symbol,
        strategy_name=identity.strategy_name,
        exchange_name=identity.exchange_name,
        frame_name=identity.frame_name,
        position=held.direction,
        price_open=price,
        price_take_profit=take,
        price_stop_loss=stop,
        minutes=float(settings.CC_MAX_SIGNAL_LIFETIME_MINUTES),
        cost=held.quantity * price,
        scheduled_at_ms=tick.when_ms,
        note="found on the venue",
    )
    position = open_position(entry, tick.when_ms, settings)
    event = PositionOpened(identity=identity, when_ms=tick.when_ms, price=tick.price, position=position)
    return Holding(position, slot_ms), event
