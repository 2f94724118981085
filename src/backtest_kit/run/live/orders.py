"""Orders of a live run, as values: which order a change of state needs, and its outcome.

Everything here is pure. An `Intent` is stored before its order is sent, and the outcome afterwards.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from backtest_kit.broker.base import Fill, Order, OrderKind, OrderReport
from backtest_kit.broker.order_ids import SignalIds, is_taken_over, store_of
from backtest_kit.engine.pnl import effective_price, remaining_cost
from backtest_kit.engine.position import close_trade, open_position
from backtest_kit.engine.step import Flat, Holding, Resting, Rules, State, Tick
from backtest_kit.model.event import (
    Change,
    EntryCancelled,
    Event,
    Lasting,
    PositionChanged,
    PositionClosed,
    PositionOpened,
)
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.position import CloseReason, Entry, Execution, Position, RestingEntry, Trade

ENTRIES: Final = ("open", "place")
"""Orders that open a position and may be dropped."""
OPENING: Final = ("open", "place", "activate", "add")
"""Orders that increase the risk."""
COMMANDS: Final = ("add", "reduce", "move_stop", "move_take", "breakeven")
"""Orders of commands: the strategy waits for their outcome."""
EXITS: Final = ("close", "cancel")
"""Orders that are repeated until they are carried out."""
KIND_OF: Final[dict[Change, OrderKind]] = {
    "reduced": "reduce",
    "added": "add",
    "stop_moved": "move_stop",
    "take_moved": "move_take",
    "breakeven": "breakeven",
}
"""The order that carries out a command."""
_PART_OF: Final[dict[OrderKind, str]] = {
    "open": "entries",
    "activate": "entries",
    "add": "entries",
    "reduce": "reductions",
}
"""The field of a position that an order adds to."""
_NUMBERS: Final = 2**23
"""Minutes, and so orders, that numbers distinguish: a client order id has room for twice as many."""
_SAME_QUANTITY: Final = 1e-9
_SAME_PRICE: Final = 1e-9


class Intent(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An order that is about to be sent, or was sent and has an unknown outcome."""

    order: Order
    target: State
    """The state once the order is carried out as decided."""
    events: tuple[Lasting, ...]
    """The events of that."""
    earlier: Fill | None = None
    """Of a close: the fills of earlier orders under other ids."""
    refused: bool = False
    """Whether the exchange has rejected an exit under this id: it is sent under another one, once its fills are
    known."""


def intended(
    before: State,
    after: State,
    events: tuple[Event, ...],
    tick: Tick,
    rules: Rules,
    number: int,
    *,
    store_id: str,
    quantities: bool,
) -> Intent | None:
    """The order for a change of state, or None if the exchange need not know of it.

    `number` counts the orders in the life of the position; `store_id` is part of the client order id. With
    `quantities`, the fills of the position have reported its size in base currency.
    """
    kind = _kind(before, after, events)
    if kind is None:
        return None
    held, cost, take, stop = _terms(kind, before, after)
    price = _booked(kind, held, events, tick)
    quantity = None
    if quantities and isinstance(held, Position) and kind in ("reduce", "close"):
        quantity = cost / effective_price(held.entries, held.reductions)
    order = Order(
        kind=kind,
        client_order_id=SignalIds(held.signal_id, store_id).order(kind, number),
        signal_id=held.signal_id,
        identity=rules.identity,
        when_ms=tick.when_ms,
        direction=held.side,
        price=price,
        cost=cost,
        quantity=quantity,
        take_profit=take,
        stop_loss=stop,
        reason=_reason(before, events),
    )
    return Intent(order=order, target=after, events=tuple(each for each in events if isinstance(each, Lasting)))


def numbered_from(state: State) -> int:
    """The first number of a position's orders. For a position that was taken over it is beyond all numbers that the
    previous store may have used for the same ids."""
    if not isinstance(state, Holding) or not is_taken_over(state.position.signal_id):
        return 0
    return state.position.opened_at_ms // MINUTE_MS % _NUMBERS


def _booked(kind: OrderKind, held: Position | RestingEntry, events: tuple[Event, ...], tick: Tick) -> float:
    """The price that the engine books if the exchange reports none."""
    if kind == "place":
        return held.price_open
    if kind in ("open", "activate", "add") and isinstance(held, Position):
        return held.entries[-1].price
    return next((event.trade.price_close for event in events if isinstance(event, PositionClosed)), tick.price)


def _kind(before: State, after: State, events: tuple[Event, ...]) -> OrderKind | None:
    if isinstance(before, Flat):
        return "open" if isinstance(after, Holding) else "place" if isinstance(after, Resting) else None
    if isinstance(before, Resting):
        return "activate" if isinstance(after, Holding) else "cancel" if isinstance(after, Flat) else None
    if isinstance(after, Flat):
        return "close"
    return next((KIND_OF[event.change] for event in events if isinstance(event, PositionChanged)), None)


def _terms(kind: OrderKind, before: State, after: State) -> tuple[Position | RestingEntry, float, float, float]:
    """The position or entry of the order, its cost, and the levels in force once it is done."""
    resting = after if isinstance(after, Resting) else before
    if isinstance(resting, Resting) and not isinstance(after, Holding):
        entry = resting.entry
        return entry, entry.cost if kind == "place" else 0.0, entry.price_take_profit, entry.price_stop_loss
    holding = after if isinstance(after, Holding) else before
    if not isinstance(holding, Holding):
        raise TypeError(f"{kind} is not a change of {before!r} to {after!r}")
    position = holding.position
    cost = 0.0
    if kind in ("open", "activate", "add"):
        cost = position.entries[-1].cost
    elif kind == "close":
        cost = remaining_cost(position.entries, position.reductions)
    elif kind == "reduce":
        cost = position.reductions[-1].cost_basis * position.reductions[-1].percent / 100
    return position, cost, position.take_profit, position.stop_loss


def _reason(before: State, events: tuple[Event, ...]) -> str:
    for event in events:
        if isinstance(event, PositionClosed):
            return event.trade.close_reason
        if isinstance(event, EntryCancelled):
            return event.reason
    return "user" if isinstance(before, Resting) and before.order == "activate" else ""


def retried(intent: Intent) -> Intent:
    """The same order at its next attempt."""
    order = msgspec.structs.replace(intent.order, attempt=intent.order.attempt + 1)
    return msgspec.structs.replace(intent, order=order)


def renamed(intent: Intent, number: int, fill: Fill | None = None) -> Intent:
    """The same order under a new id: the previous one is over on the exchange, which has filled `fill` of it."""
    order = intent.order
    client_order_id = SignalIds(order.signal_id, store_of(order.client_order_id)).order(order.kind, number)
    order = msgspec.structs.replace(order, client_order_id=client_order_id, attempt=0)
    return msgspec.structs.replace(intent, order=order, earlier=_together(intent.earlier, fill), refused=False)


def _together(one: Fill | None, other: Fill | None) -> Fill | None:
    """Two fills as one, at their average price; empty fills are ignored."""
    fills = [each for each in (one, other) if each is not None and each.quantity > 0 and each.price > 0]
    if len(fills) < 2:
        return fills[0] if fills else None
    first, last = fills
    if first.client_order_ids and set(first.client_order_ids) <= set(last.client_order_ids):
        return last  # for a close, some exchanges report all orders that took part in it
    quantity = first.quantity + last.quantity
    return msgspec.structs.replace(
        last,
        price=(first.price * first.quantity + last.price * last.quantity) / quantity,
        cost=first.cost + last.cost,
        quantity=quantity,
        fee=None if first.fee is None or last.fee is None else first.fee + last.fee,
        fee_currency="+".join(dict.fromkeys(filter(None, (first.fee_currency, last.fee_currency)))),
        client_order_ids=(*first.client_order_ids, *last.client_order_ids),
        order_ids=(*first.order_ids, *last.order_ids),
    )


def _whole_close(intent: Intent, fill: Fill | None, position: Position) -> Fill | None:
    """The fill of a close, with the fills of earlier orders; without a price, as the engine decided."""
    if intent.earlier is None:
        return fill
    if fill is None or fill.price <= 0:
        held = remaining_cost(position.entries, position.reductions) / effective_price(
            position.entries, position.reductions
        )
        rest, price = max(0.0, held - intent.earlier.quantity), intent.order.price
        fill = Fill(price=price, cost=rest * price, quantity=rest, client_order_ids=(intent.order.client_order_id,))
    return _together(intent.earlier, fill)


def renewed(intent: Intent, before: State, tick: Tick, rules: Rules) -> Intent:
    """The same order at a later minute, at the current price; a limit order keeps its price."""
    order = msgspec.structs.replace(intent.order, when_ms=tick.when_ms)
    if order.kind != "place":
        order = msgspec.structs.replace(order, price=tick.price)
    target, events = intent.target, tuple(_at(event, tick) for event in intent.events)
    if order.kind == "open" and isinstance(target, Holding):
        position = open_position(target.position.entry.at(tick.price), tick.when_ms, rules.settings)
        target, events = _with_position(target, position, events)
    elif order.kind == "close" and isinstance(before, Holding):
        events = tuple(_closed_by(event, before.position, tick.price, tick.when_ms, rules, None) for event in events)
    return msgspec.structs.replace(intent, order=order, target=target, events=events)


def _at(event: Lasting, tick: Tick) -> Lasting:
    return msgspec.structs.replace(event, when_ms=tick.when_ms, price=tick.price)


def judged(order: Order, report: OrderReport) -> Literal["done", "undone", "open"]:
    """Whether an order is done, will never be done, or is still open."""
    status, bought = report.status, report.fill is not None and report.fill.quantity > 0
    if order.kind == "cancel":
        return "done" if status in ("cancelled", "filled") else "undone"
    if status == "filled":
        return "done"
    if status in ("resting", "partly_filled") and order.kind in ("place", "activate"):
        # A resting order stays open until all of it is filled, or it is cancelled.
        return "done" if order.kind == "place" else "undone"
    if status == "resting":
        return "done" if order.kind in ("move_stop", "move_take", "breakeven") else "open"
    if status == "partly_filled":
        return "open"
    # An order that opens or changes a position counts for what it really bought or sold.
    return "done" if bought and order.kind != "close" else "undone"


def fitted(intent: Intent, fill: Fill | None, before: State, rules: Rules) -> tuple[State, tuple[Event, ...]]:
    """The state and the events of an order that was carried out, with the fill of the exchange."""
    order, target, events = intent.order, intent.target, intent.events
    closing = before.position if order.kind == "close" and isinstance(before, Holding) else None
    if closing is not None:
        fill = _whole_close(intent, fill, closing)
    fill = None if fill is None or fill.price <= 0 else _as_decided(order, fill)
    if order.kind == "cancel" and isinstance(before, Resting) and fill is not None:
        return _too_late(order, before, fill, rules)
    if closing is not None:
        if fill is None:
            return target, tuple(_as_sent(event, order) for event in events)
        execution = _execution(order, fill)
        return target, tuple(
            _closed_by(event, closing, fill.price, order.when_ms, rules, execution) for event in events
        )
    if isinstance(target, Holding):
        position = _filled(order, target.position, fill, rules)
        return _with_position(target, position, events)
    return target, events


def _execution(order: Order, fill: Fill | None, known: Execution | None = None) -> Execution:
    """How an order was executed; without a fill as `known`, and at least its id."""
    if fill is not None:
        known = fill.execution
    known = known or Execution()
    client_order_ids = known.client_order_ids or (order.client_order_id,)
    return msgspec.structs.replace(known, client_order_ids=client_order_ids)


def _as_decided(order: Order, fill: Fill) -> Fill:
    """The fill; a price or cost that differs in the last digits alone is taken as ordered."""
    if abs(fill.price - order.price) <= order.price * _SAME_PRICE:
        fill = msgspec.structs.replace(fill, price=order.price)
    if abs(fill.cost - order.cost) <= order.cost * _SAME_PRICE:
        fill = msgspec.structs.replace(fill, cost=order.cost)
    return fill


def _too_late(order: Order, before: Resting, fill: Fill, rules: Rules) -> tuple[State, tuple[Event, ...]]:
    """An entry that was filled before it could be cancelled: the position is open."""
    entry = before.entry.at(fill.price, fill.cost)
    position = open_position(entry, order.when_ms, rules.settings, _execution(order, fill))
    opened = PositionOpened(identity=order.identity, when_ms=order.when_ms, price=order.price, position=position)
    return Holding(position, before.last_slot_ms), (opened,)


def _filled(order: Order, position: Position, fill: Fill | None, rules: Rules) -> Position:
    """The position with the exchange's price and amount instead of the decided ones."""
    name = _PART_OF.get(order.kind)
    if name is None:
        return position
    *earlier, last = getattr(position, name)
    execution = _execution(order, fill, last.execution)
    if fill is None:
        part = msgspec.structs.replace(last, execution=execution)
        return msgspec.structs.replace(position, **{name: (*earlier, part)})
    if order.kind in ("open", "activate"):
        return open_position(position.entry.at(fill.price, fill.cost), position.opened_at_ms, rules.settings, execution)
    if order.kind == "add":
        bought = Entry(fill.price, fill.cost or last.cost, last.timestamp, execution)
        return msgspec.structs.replace(position, entries=(*earlier, bought))
    percent = last.percent
    held = last.cost_basis / effective_price(position.entries, earlier)
    wanted = held * percent / 100
    # Against all that was bought: of the dust that is left of a position, rounding is a large part.
    total = sum(entry.cost / entry.price for entry in position.entries)
    if fill.quantity > 0 and abs(fill.quantity - wanted) > total * _SAME_QUANTITY:
        percent = min(100.0, fill.quantity / held * 100)
    part = msgspec.structs.replace(last, price=fill.price, percent=percent, execution=execution)
    return msgspec.structs.replace(position, reductions=(*earlier, part))


def _with_position(
    target: Holding, position: Position, events: tuple[Lasting, ...]
) -> tuple[Holding, tuple[Lasting, ...]]:
    changed = tuple(
        msgspec.structs.replace(event, position=position)
        if isinstance(event, PositionOpened | PositionChanged)
        else event
        for event in events
    )
    return msgspec.structs.replace(target, position=position), changed


def _closed_by(
    event: Lasting, position: Position, price: float, when_ms: int, rules: Rules, execution: Execution | None
) -> Lasting:
    if not isinstance(event, PositionClosed):
        return event
    trade = event.trade
    again = close_trade(position, trade.close_reason, price, when_ms, rules.settings, trade.close_note, execution)
    return msgspec.structs.replace(event, trade=again, when_ms=when_ms)


def _as_sent(event: Lasting, order: Order) -> Lasting:
    """A close without a fill: only the order is known."""
    if not isinstance(event, PositionClosed):
        return event
    return msgspec.structs.replace(event, trade=msgspec.structs.replace(event.trade, execution=_execution(order, None)))


def closed(
    state: Holding, reason: CloseReason, price: float, tick: Tick, rules: Rules, fill: Fill | None = None
) -> tuple[Flat, tuple[Event, ...]]:
    """A position that was closed on the exchange."""
    execution = None if fill is None else fill.execution
    note = state.closing or ""
    trade: Trade = close_trade(state.position, reason, price, tick.when_ms, rules.settings, note, execution)
    event = PositionClosed(identity=rules.identity, when_ms=tick.when_ms, price=tick.price, trade=trade)
    return Flat(state.last_slot_ms, state.position.signal_id), (event,)


def cancelled(state: Resting, tick: Tick, rules: Rules) -> tuple[Flat, tuple[Event, ...]]:
    """An entry that was cancelled on the exchange."""
    event = EntryCancelled(
        identity=rules.identity, when_ms=tick.when_ms, price=tick.price, entry=state.entry, reason="user"
    )
    return Flat(state.last_slot_ms, state.entry.signal_id), (event,)


def activated(state: Resting, fill: Fill, tick: Tick, rules: Rules) -> tuple[Holding, tuple[Event, ...]]:
    """An entry that was filled on the exchange."""
    position = open_position(state.entry.at(fill.price, fill.cost), tick.when_ms, rules.settings, fill.execution)
    event = PositionOpened(identity=rules.identity, when_ms=tick.when_ms, price=tick.price, position=position)
    return Holding(position, state.last_slot_ms), (event,)


def dropped(intent: Intent) -> Flat:
    """The state after an order to open was given up: its signal id is used up."""
    return Flat(intent.target.last_slot_ms, signal_id_of(intent.target))


def signal_id_of(state: State) -> str:
    """The signal of a state, or the last one."""
    if isinstance(state, Holding):
        return state.position.signal_id
    return state.entry.signal_id if isinstance(state, Resting) else state.last_signal_id


def events_of(intent: Intent, state: State) -> tuple[Lasting, ...]:
    """The events of an intent whose outcome was already stored."""
    if isinstance(state, Holding):
        return _with_position(state, state.position, intent.events)[1]
    return tuple(_as_sent(event, intent.order) for event in intent.events)


def done_already(intent: Intent, state: State) -> bool:
    """Whether the outcome of an intent was already stored, and only the intent is left: a torn batch."""
    target = intent.target
    if type(state) is not type(target) or signal_id_of(state) != signal_id_of(target):
        return False
    if isinstance(state, Holding) and isinstance(target, Holding):
        mine, decided = state.position, target.position
        return (len(mine.entries), len(mine.reductions), mine.take_profit, mine.stop_loss) == (
            len(decided.entries),
            len(decided.reductions),
            decided.take_profit,
            decided.stop_loss,
        )
    return True
