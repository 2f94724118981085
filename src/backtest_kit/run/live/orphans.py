"""Orphans: positions and orders that only the exchange or only the store knows. Found, reported, acted on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, Protocol

import msgspec

from backtest_kit.broker.base import Broker, Order, VenuePosition, VenueSignal
from backtest_kit.broker.order_ids import ENTRY, OrderId, SignalIds, taken_over
from backtest_kit.engine.position import open_position
from backtest_kit.engine.step import Flat, Holding
from backtest_kit.errors import Conflict
from backtest_kit.format import error_text
from backtest_kit.model.event import Event, OrphanFound, PositionOpened
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.position import RestingEntry
from backtest_kit.model.price import price_text
from backtest_kit.model.signal import Direction, Signal
from backtest_kit.persist.store import Key
from backtest_kit.run.live.account_lock import plain_symbol
from backtest_kit.run.live.other_positions import OtherPositions, claim_of
from backtest_kit.run.live.position_state import PositionState
from backtest_kit.run.live.reconcile import Difference, Known, What, compare, known_of
from backtest_kit.run.run_state import RunState
from backtest_kit.settings import Settings

OrphanPolicy = Literal["alarm", "adopt", "protect"]
PositionStatesOf = Callable[[], Mapping[Key, PositionState]]


class GuardedRun(Protocol):
    """What a run does for its `OrphanGuard`."""

    @property
    def stopping(self) -> bool:
        """Whether the run opens nothing more."""
        ...

    async def adopt(self, state: Holding, event: PositionOpened) -> tuple[Event, ...]:
        """Make a position the run's own, without an order; returns what happened."""
        ...

    async def protect(self, order: Order) -> None:
        """Place a stop on the exchange."""
        ...


_FARTHEST_STOP_PCT: Final = 20.0
_LONGEST_WAIT: Final = 60
"""The longest pause, in minutes, before a stop that the exchange does not show is placed again."""
_NUMBERS: Final = 1_000_000
"""Orders that a client order id can count."""
_LISTED_AFTER_MS: Final = 2 * MINUTE_MS
"""Exchanges list orders and positions with a delay: what was ordered this recently raises no alarm yet."""
_log = logging.getLogger("backtest_kit")


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one minute."""

    when_ms: int
    held: VenuePosition | None = None
    difference: Difference | None = None
    settled: bool = True
    """Whether the exchange has had time to list the last orders."""
    claim: str = ""
    """The other strategy of the store that has a position or an order on the symbol, or trades it now."""

    @property
    def no_entry(self) -> str:
        """Why nothing may be opened; empty if entries are allowed."""
        found = self.difference
        return f"{found.reason}: {found.way_out}" if found is not None and found.no_entry else ""


class Orphan(msgspec.Struct, frozen=True, kw_only=True):
    """A position that no strategy of the store manages."""

    symbol: str
    direction: Direction
    quantity: float
    price_open: float | None
    stop_loss: float | None
    signal_id: str
    """Its orders are found under this id once it is taken over; empty if it has none."""


class OrphanGuard:
    """Compares the position of one symbol in the store with the one on the exchange.

    While the exchange holds something unknown, nothing is opened there. Each finding is reported once, and so is each
    stop that is placed. A stop that vanishes is placed again, after 1, 2, 4, ... and at most 60 minutes without one.
    The policy decides what else is done:

    - "alarm": nothing.
    - "adopt": an unknown position becomes the strategy's own. Its stop is the one on the exchange, else
      CC_MAX_STOPLOSS_DISTANCE_PERCENT (20 % if that rule is off) from its entry price; its take profit lies as far
      on the other side, and it lives CC_MAX_SIGNAL_LIFETIME_MINUTES from now. An unprotected position gets its stop.
      A run that is stopping adopts nothing, and does as for "protect".
    - "protect": a position without a live stop gets one on the exchange: ours at its own level, an unknown one
      at that distance. It is not managed.

    If another strategy of the store has something on the symbol, or trades it now, nothing is done about what is
    unknown, and the alarm names that strategy: the position may be its own.
    """

    def __init__(
        self, run_state: RunState, broker: Broker, policy: OrphanPolicy, run: GuardedRun, others: OtherPositions
    ) -> None:
        self._run_state = run_state
        self._symbol = run_state.rules.identity.symbol
        self._broker = broker
        self._policy = policy
        self._run = run
        self._others = others
        self._lock = asyncio.Lock()
        self._last: Findings | None = None
        self._seen: What | None = None
        """The finding of the previous minute."""
        self._reported: tuple[object, str] | None = None
        """The last report, and what was done."""
        self._tries = 0
        """How many stops were placed since one was last seen on the exchange."""
        self._again_ms = 0
        """When the next one may be."""

    async def compare_once(self, when_ms: int, position_states: PositionStatesOf) -> Findings:
        """The comparison of a minute: one for all runs that trade the symbol side by side. As `compare`."""
        async with self._lock:
            # It also serves the runs that act later in this minute: their orders since then are in the store, and other
            # orders are found by the next comparison. The position of a run that began since was read from the store.
            if self._last is None or self._last.when_ms != when_ms:
                self._last = await self.compare(when_ms, position_states)
            return self._last

    async def compare(self, when_ms: int, position_states: PositionStatesOf) -> Findings:
        """Read the position on the exchange and compare.

        Args:
            when_ms: the minute.
            position_states: returns those that this process has in memory; the others are read from the store.

        Raises:
            Damaged, RetryLater: the position state of another strategy cannot be read.
            Exception: what the broker raises.
        """
        store_id = self._broker.store_id
        before = position_states()
        holdings = await self._broker.holdings([self._symbol])
        if holdings is None:
            return Findings(when_ms=when_ms)
        after = position_states()
        held = next((each for each in holdings if each.symbol == self._symbol), None)
        # Orders may have been sent and filled during the request: what holds before or after it is known.
        known = Known()
        for key in {**before, **after}:
            known += known_of(before.get(key, after.get(key, PositionState())), store_id) | known_of(
                after.get(key, before.get(key, PositionState())), store_id
            )
        difference, claim = compare(self._symbol, held, known, store_id), ""
        if difference is not None and difference.what != "unprotected_position":
            # Read only now: in an ordinary minute this process knows everything.
            others = await self._others.read({**before, **after})
            known, claim = self._with(others, known, held)
            difference = compare(self._symbol, held, known, store_id)
            if difference is not None and not claim and self._policy != "alarm":
                claim = await self._others.trader({**before, **after})
        settled = known.changed_ms < 0 or when_ms - known.changed_ms >= _LISTED_AFTER_MS
        return Findings(when_ms=when_ms, held=held, difference=difference, settled=settled, claim=claim)

    def _with(self, others: Mapping[Key, PositionState], known: Known, held: VenuePosition | None) -> tuple[Known, str]:
        """What is known including other strategies, and what one of them has there, in words."""
        claim, identity, symbol = "", self._run_state.rules.identity, plain_symbol(self._symbol)
        signals = {(each.store_id, each.digest) for each in held.signals} if held is not None else set()
        for key, other in others.items():
            known_there = known_of(other, self._broker.store_id)
            same_name = key[1] == identity.exchange_name and plain_symbol(str(key[2])) == symbol
            # An account may be traded under two exchange names: its orders show that.
            if same_name or known_there.signals & signals:
                known += known_there
                claim = claim or claim_of(key, other)
        return known, claim

    async def report(self, found: Findings, others: Sequence[RunState]) -> OrphanFound | None:
        """Act on a finding by the policy; returns the event if it is new.

        Args:
            found: the result of `compare`.
            others: the run states of other strategies that trade the symbol in this process.

        Raises:
            Conflict: another process has the position.
        """
        difference, seen = found.difference, self._seen
        self._seen = None if difference is None else difference.what
        orphan = None if difference is None else self._orphan(difference)
        if difference is None or orphan is None or orphan.stop_loss is not None:
            self._tries = self._again_ms = 0
        if difference is None:
            self._reported = None
            return None
        claim = side_by_side([self._run_state, *others]) if others else found.claim
        if self._waits(found, difference, seen, bool(others)):
            return None
        if difference.what == "foreign_position" and not claim and not self._run_state.tick.price:
            claim = "there are no candles yet"
        finding = (difference.what, found.held and found.held.direction, claim, _signals(difference))
        known = self._reported is not None and self._reported[0] == finding
        if known and (claim or not self._is_due(difference, orphan)):
            return None
        try:
            done = f"nothing is done: {claim}" if claim else await self._act(difference, orphan)
        except Conflict:
            raise
        except Exception as error:
            done = f"no stop could be placed, it is tried again: {error_text(error)}"
        if self._reported == (finding, done) and orphan is not None and orphan.stop_loss is not None:
            return None
        self._reported = finding, done
        return self._news(found, difference, done)

    def _waits(self, found: Findings, difference: Difference, seen: What | None, crowded: bool) -> bool:
        """Whether the next minute has to confirm it: exchanges list new orders late, and between two requests of this
        minute the position may have been closed, or another run may have acted."""
        if difference.what == "unprotected_position" and not crowded:
            return False
        if not found.settled:
            return True
        return (crowded or difference.what == "missing_position") and seen != difference.what

    def _news(self, found: Findings, difference: Difference, done: str) -> OrphanFound:
        identity = self._run_state.rules.identity
        if isinstance(self._run_state.state, Flat) and difference.no_entry:
            done = f"{done}; nothing is opened on {self._symbol} until then: {difference.way_out}"
        event = OrphanFound(
            identity=identity,
            when_ms=self._run_state.tick.when_ms,
            what=difference.what,
            quantity=0.0 if found.held is None else found.held.quantity,
            reason=difference.reason,
            next_step=done,
        )
        _log.error(
            "%s on %s: %s; %s", difference.what.replace("_", " "), identity.exchange_name, event.reason, done,
            extra={"event": event},
        )  # fmt: skip
        return event

    def _orphan(self, difference: Difference) -> Orphan | None:
        """The position that can get a stop or be adopted: of one signal, if the exchange distinguishes signals."""
        held = difference.held
        if held is None or not held.quantity or difference.what not in ("foreign_position", "unprotected_position"):
            return None
        parts = [each for each in difference.foreign if each.quantity]
        naked = [each for each in parts if each.stop_loss is None]
        part: VenuePosition | VenueSignal = held
        named = [*difference.foreign]
        if parts:
            part = naked[0] if naked and self._policy == "protect" else parts[0]
            named = [part]
        signal = named[0] if len(named) == 1 else None
        return Orphan(
            symbol=held.symbol,
            direction=held.direction,
            quantity=part.quantity,
            price_open=part.price_open,
            stop_loss=part.stop_loss,
            signal_id="" if signal is None else taken_over(OrderId(signal.store_id, signal.digest, ENTRY, 0)),
        )

    def _is_due(self, difference: Difference, orphan: Orphan | None) -> bool:
        """Whether to act again: there is still no stop, or it may be adopted now."""
        if orphan is None or self._policy == "alarm":
            return False
        if orphan.stop_loss is None:
            return self._run_state.tick.when_ms >= self._again_ms
        return self._policy == "adopt" and difference.what == "foreign_position" and self._may_adopt

    @property
    def _may_adopt(self) -> bool:
        return isinstance(self._run_state.state, Flat) and not self._run.stopping

    async def _act(self, difference: Difference, orphan: Orphan | None) -> str:
        """Act by the policy; returns what was done, in words."""
        state, settings = self._run_state.state, self._run_state.rules.settings
        if orphan is None or self._policy == "alarm":
            return "nothing is done"
        if isinstance(state, Holding):
            if difference.what != "unprotected_position":
                return "nothing is done: the strategy has its own position there"
            position = state.position
            await self._protect(self._order(position.signal_id, orphan, position.stop_loss, position.take_profit))
            return f"a stop was placed at {price_text(position.stop_loss)}"
        stop, take = levels(orphan, self._run_state.tick.price, settings)
        signal_id = orphan.signal_id or f"orphan-{self._run_state.tick.when_ms // 1000}"
        if orphan.stop_loss is None:
            await self._protect(self._order(signal_id, orphan, stop, take))
        if self._policy == "protect":
            return f"its stop is at {price_text(stop)}, and it is not managed"
        if not self._may_adopt:
            why = "the run is stopping" if self._run.stopping else "an entry rests there"
            return f"its stop is at {price_text(stop)}, and it is not adopted: {why}"
        events = await self._run.adopt(*adopted(orphan, signal_id, stop, take, state.last_slot_ms, self._run_state))
        self._run_state.events += events
        if not events:
            return f"its stop is at {price_text(stop)}, and it is adopted once the pending order is done"
        return f"it is the strategy's own now, stop at {price_text(stop)}, take profit at {price_text(take)}"

    async def _protect(self, order: Order) -> None:
        self._again_ms = self._run_state.tick.when_ms + min(2**self._tries, _LONGEST_WAIT) * MINUTE_MS
        self._tries += 1
        await self._run.protect(order)

    def _order(self, signal_id: str, orphan: Orphan, stop: float, take: float) -> Order:
        tick = self._run_state.tick
        number = tick.when_ms // MINUTE_MS % _NUMBERS
        return Order(
            kind="move_stop",
            client_order_id=SignalIds(signal_id, self._broker.store_id).order("move_stop", number),
            signal_id=signal_id,
            identity=self._run_state.rules.identity,
            when_ms=tick.when_ms,
            direction=orphan.direction,
            price=tick.price,
            cost=0.0,
            quantity=orphan.quantity,
            take_profit=take,
            stop_loss=stop,
            reason="unprotected",
        )


def side_by_side(run_states: Sequence[RunState]) -> str:
    """The strategies that share one position on the exchange, in words."""
    names = " and ".join(each.rules.identity.strategy_name for each in run_states)
    return f"strategies {names} trade {run_states[0].rules.identity.symbol} side by side"


def _signals(difference: Difference) -> set[tuple[str, str]]:
    """The unknown signals of a difference. A stop that was placed for an unknown position does not change them."""
    whole = difference.what == "foreign_position"
    return {(each.store_id, each.digest) for each in difference.foreign if each.quantity or not whole}


def levels(orphan: Orphan, price: float, settings: Settings) -> tuple[float, float]:
    """Stop and take profit of a position that came without them."""
    entry = orphan.price_open or price
    sign = 1.0 if orphan.direction == "long" else -1.0
    distance_pct = settings.CC_MAX_STOPLOSS_DISTANCE_PERCENT or _FARTHEST_STOP_PCT
    stop = orphan.stop_loss or entry * (1 - sign * distance_pct / 100)
    return stop, entry + (entry - stop)


def adopted(
    orphan: Orphan, signal_id: str, stop: float, take: float, slot_ms: int, run_state: RunState
) -> tuple[Holding, PositionOpened]:
    """The position that the strategy takes over, as of this minute."""
    identity, tick, settings = run_state.rules.identity, run_state.tick, run_state.rules.settings
    price = orphan.price_open or tick.price
    entry = RestingEntry(
        identity=identity,
        signal=Signal(
            orphan.direction,
            take,
            stop,
            price_open=price,
            minutes=float(settings.CC_MAX_SIGNAL_LIFETIME_MINUTES),
            cost=orphan.quantity * price,
            note="found on the exchange",
            id=signal_id,
        ),
        scheduled_at_ms=tick.when_ms,
    )
    position = open_position(entry, tick.when_ms, settings)
    event = PositionOpened(identity=identity, when_ms=tick.when_ms, price=tick.price, position=position)
    return Holding(position, slot_ms), event
