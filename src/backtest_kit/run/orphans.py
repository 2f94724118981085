"""What a venue holds that nobody watches, and what is watched that it does not hold."""

from __future__ import annotations

import logging
from typing import Literal, Protocol

from backtest_kit.broker.base import Broker, Holding as VenueHolding, Order
from backtest_kit.engine.position import open_position
from backtest_kit.engine.step import Flat, Holding
from backtest_kit.errors import Conflict
from backtest_kit.model.event import Event, OrphanFound, PositionOpened
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.position import RestingEntry
from backtest_kit.run.alarms import words_of
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
_NUMBERS = 1_000_000
"""What a suffix of a client order id counts to."""
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
    """

    def __init__(self, desk: Desk, broker: Broker, policy: OrphanPolicy, books: Books) -> None:
        self._desk = desk
        self._broker = broker
        self._policy = policy
        self._books = books
        self._told: tuple[What, str] | None = None
        self._tries = 0
        """How many stops were placed since one was last seen on the venue."""
        self._again_ms = 0
        """When the next one may be."""

    async def look(self) -> Event | None:
        """Ask the venue, and put right what the policy says; what was found, if it is news.

        Raises:
            Whatever the broker raises.
        """
        symbol = self._desk.rules.identity.symbol
        holdings = await self._broker.holdings([symbol])
        if holdings is None:
            return None
        held = next((each for each in holdings if each.symbol == symbol and each.quantity > 0), None)
        what = self._finding(held)
        if what is None and isinstance(self._desk.state, Flat) and any(_only_stop(each, symbol) for each in holdings):
            what = "left_stop"
        if held is None or held.stop_loss is not None:
            self._tries = self._again_ms = 0
        if what is None:
            self._told = None
            return None
        finding = (what, "" if held is None else held.direction)
        if finding == self._told and not self._is_due(held):
            return None
        try:
            next_step = _LEFT_STOP if what == "left_stop" else await self._act(held)
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

    def _finding(self, held: VenueHolding | None) -> What | None:
        state = self._desk.state
        if isinstance(state, Flat):
            return None if held is None else "foreign_position"
        if not isinstance(state, Holding):
            return None  # an entry that was filled just now is told by the next check
        if held is None or held.direction != state.position.position:
            return "missing_position"
        return "unprotected_position" if held.stop_loss is None else None

    def _is_due(self, held: VenueHolding | None) -> bool:
        """Whether a stop is to be placed again: one was, and there is none any more, or never was."""
        unprotected = held is not None and held.stop_loss is None
        return unprotected and self._policy != "alarm" and self._desk.tick.when_ms >= self._again_ms

    async def _protect(self, order: Order) -> None:
        self._again_ms = self._desk.tick.when_ms + min(2**self._tries, _LONGEST_WAIT) * MINUTE_MS
        self._tries += 1
        await self._books.protect(order)

    async def _act(self, held: VenueHolding | None) -> str:
        state, settings = self._desk.state, self._desk.rules.settings
        if self._policy == "alarm" or held is None:
            return "nothing is done, look at the venue"
        if isinstance(state, Holding):
            position = state.position
            await self._protect(self._order(position.signal_id, held, position.stop_loss, position.take_profit))
            return f"a stop was placed at {position.stop_loss:g}"
        stop, take = levels(held, self._desk.tick.price, settings)
        order = self._order(_signal_id(held, self._desk), held, stop, take)
        if held.stop_loss is None:
            await self._protect(order)
        if self._policy == "protect":
            return f"its stop is at {stop:g}, watched it is not"
        if self._books.stopping:
            return f"its stop is at {stop:g}, and it is not adopted, because the run is told to stop"
        self._desk.events += await self._books.adopt(*adopted(held, stop, take, state.last_slot_ms, self._desk))
        return f"it is the strategy's own now, stop at {stop:g}, take profit at {take:g}"

    def _order(self, signal_id: str, held: VenueHolding, stop: float, take: float) -> Order:
        tick = self._desk.tick
        return Order(
            kind="move_stop",
            client_order_id=f"{signal_id}-p{tick.when_ms // MINUTE_MS % _NUMBERS}",
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
