"""`BrokerDesk`: carries out a broker's operations at a venue, one whole operation at a time.

The orders of a position are a group, named by the id of its entry: what opens it, adds, reduces, protects it.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Final, Literal

import msgspec

from backtest_kit.broker.base import Fill, Order, OrderReport, VenuePosition
from backtest_kit.broker.order_ids import NO_STORE, SignalIds
from backtest_kit.errors import Outcome
from backtest_kit.model.signal import Direction
from backtest_kit.venue.account import ZERO
from backtest_kit.venue.exchange import Exchange
from backtest_kit.venue.faults import Strike
from backtest_kit.venue.holdings import holding_of
from backtest_kit.venue.http import Answer, Request
from backtest_kit.venue.journal import Cancel, FillReference, Place
from backtest_kit.venue.orders import Kind, NewOrder, OrderType, Refused, Side, VenueOrder
from backtest_kit.venue.venue import Venue

FillAt = Literal["venue", "reference"]


class Wish(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The request of a broker."""

    account: str
    kind: Kind
    fill_at: FillAt
    order: Order | None = None
    store_id: str = NO_STORE
    """The store that sends the orders."""
    signal_id: str = ""
    """Of the position or entry to check."""
    direction: Direction = "long"
    """Of the position to check."""
    since_ms: int = 0
    """When it was opened or adopted."""
    symbol: str = ""
    symbols: tuple[str, ...] = ()


class Problem(msgspec.Struct, frozen=True):
    """Why an operation failed."""

    error: Literal["rejected", "transient", "deleted"]
    message: str
    outcome: Literal["NOT_DONE", "UNKNOWN"] = Outcome.NOT_DONE.name


class _Failed(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class BrokerDesk:
    """Answers `POST /broker/{operation}`."""

    def __init__(self, venue: Venue) -> None:
        self._venue = venue

    async def answer(self, request: Request, strike: Strike) -> Answer:
        operation = _OPERATIONS.get(request.path.removeprefix("/broker/"))
        if operation is None or request.method != "POST":
            return Answer({"error": f"{request.method} {request.path} is not served here"}, 404)
        try:
            wish = msgspec.json.decode(request.body, type=Wish)
        except msgspec.MsgspecError as error:
            return Answer(Problem("rejected", f"{request.path} got a body that it cannot read: {error}"), 400)
        async with self._venue.at_now():
            try:
                return Answer(operation(_Job(self._venue, wish, strike)))
            except _Failed as failed:
                return Answer(failed.problem, 409)
            except Refused as refused:
                if refused.reason == "duplicate_id":
                    # Perhaps the same order, duplicated on the way: a look-up finds out.
                    return Answer(Problem("transient", str(refused), "UNKNOWN"), 409)
                return Answer(Problem("rejected", str(refused)), 409)


class _Job:
    """One operation, inside one moment of the venue."""

    def __init__(self, venue: Venue, wish: Wish, strike: Strike) -> None:
        self._venue = venue
        self._wish = wish
        self._strike = strike
        self._exchange: Exchange = venue.exchanges[wish.kind]
        self._account = wish.account
        self._at_reference = wish.fill_at == "reference"

    # Operations

    def find(self) -> OrderReport:
        order = self._known(self._order.client_order_id)
        if order is None:
            return OrderReport(status="absent")
        fill = self._fill(order) if order.filled else None
        if order.status == "expired" and fill is not None:
            # This is final; but a close is not done while a position is left.
            left = self._order.kind == "close" and self._held(self._group())
            return OrderReport(status="cancelled" if left else "filled", fill=fill)
        status: Literal["resting", "partly_filled", "filled", "cancelled"] = (
            "filled"
            if order.status == "filled"
            else "cancelled"
            if not order.is_open
            else "partly_filled"
            if order.filled
            else "resting"
        )
        return OrderReport(status=status, fill=fill)

    def open(self) -> Fill:
        return self._enter(protect=True)

    def add(self) -> Fill:
        return self._enter(protect=False)

    def place(self) -> None:
        wanted = self._order
        self._refuse_on_purpose()
        price = _number(wanted.price)
        if self._at_reference:
            quantity = _exact(_number(wanted.cost) / price)
            self._do(self._new(_side(wanted.direction), "reference", quantity=quantity, price=price))
            return
        market = self._exchange.market(self._symbol)
        price = market.round_price(price)
        quantity = market.round_quantity(_number(wanted.cost) / price)
        entry = self._do(self._new(_side(wanted.direction), "limit", quantity=quantity, price=price))
        self._protect(entry.client_order_id)

    def activate(self) -> Fill:
        """The fill of a resting entry; with fill_at="reference" it is filled now, as the engine decided."""
        wanted = self._order
        entry = self._known(wanted.client_order_id)
        if self._at_reference:
            if entry is None or entry.is_open:
                self._refuse_on_purpose()
            if entry is None:
                return self._enter(protect=False)
            if entry.is_open:
                self._fill_reference(entry, _exact(_number(wanted.cost) / _number(wanted.price)))
            return self._filled(entry)
        if entry is None:
            raise _Failed(Problem("rejected", f"{wanted.client_order_id} does not rest here: nothing can be activated"))
        return self._filled(entry)

    def cancel(self) -> Fill | None:
        group = self._group()
        entry = self._known(group)
        if entry is None:
            return None
        if entry.is_open:
            self._refuse_on_purpose()
            self._venue.do(self._wish.kind, self._account, Cancel(entry.symbol, order_id=entry.id))
        if entry.filled:
            return self._fill(entry)
        self._drop_protection(group)
        return None

    def reduce(self) -> Fill:
        return self._leave(whole=False)

    def close(self) -> Fill | None:
        group = self._group()
        if not self._held(group) and self._known(self._order.client_order_id) is None:
            self._drop_protection(group)
            # With fill_at="reference" it closes as decided, even if reductions left nothing to close.
            return None if self._at_reference else self._closing_fill(group)
        return self._leave(whole=True)

    def move(self) -> None:
        """Move the protection to the level of the order. Idempotent."""
        wanted, group = self._order, self._group()
        if self._at_reference or self._known(wanted.client_order_id) is not None:
            return
        if not self._held(group):
            raise _Failed(Problem("rejected", f"{group} has no position here: there is nothing to protect"))
        self._refuse_on_purpose()
        kind: OrderType = "take" if wanted.kind == "move_take" else "stop"
        price = wanted.take_profit if kind == "take" else wanted.stop_loss
        for order in self._protection(group):
            if order.type == kind:
                self._venue.do(self._wish.kind, self._account, Cancel(order.symbol, order_id=order.id))
        self._do(self._protective(wanted.client_order_id, kind, price, group))

    def check_position(self) -> Fill | None:
        group = self._group()
        if self._held(group):
            return None
        fill = self._closing_fill(group)
        if fill is None:
            raise _Failed(
                Problem("deleted", f"{self._wish.signal_id} has no position here, and nothing of it was filled")
            )
        return fill

    def check_entry(self) -> Fill | None:
        entry = self._known(self._group())
        if entry is not None and entry.is_open:
            return None
        if entry is not None and entry.filled:
            return self._fill(entry)
        raise _Failed(Problem("deleted", f"the entry {self._wish.signal_id} does not rest here and was not filled"))

    def holdings(self) -> list[VenuePosition]:
        held = [holding_of(self._exchange, self._account, symbol) for symbol in self._wish.symbols]
        return [each for each in held if each is not None]

    # Steps

    @property
    def _order(self) -> Order:
        if self._wish.order is None:
            raise _Failed(Problem("rejected", "no order was sent with it"))
        return self._wish.order

    @property
    def _symbol(self) -> str:
        return self._order.identity.symbol if self._wish.order else self._wish.symbol

    def _enter(self, *, protect: bool) -> Fill:
        wanted, group = self._order, self._group()
        self._refuse_on_purpose()
        if self._at_reference:
            price = _number(wanted.price)
            quantity = _exact(_number(wanted.cost) / price)
            order = self._do(self._new(_side(wanted.direction), "reference", quantity=quantity, price=price))
            self._fill_reference(order, quantity)
        else:
            new = self._new(_side(wanted.direction), "market", cost=_number(wanted.cost))
            order = self._do(new)
            if protect and (order.filled or order.is_open):
                self._protect(group)
        return self._filled(order)

    def _leave(self, *, whole: bool) -> Fill:
        wanted, group = self._order, self._group()
        held = abs(self._held(group))
        if not held:
            raise _Failed(Problem("rejected", f"{group} has no position here"))
        self._refuse_on_purpose()
        quantity = held
        if not whole and wanted.quantity is not None:
            quantity = min(held, _exact(_number(wanted.quantity)))
        elif not whole:
            quantity = min(held, _exact(_number(wanted.cost) / self._average_entry(group)))
        side = _side("short" if wanted.direction == "long" else "long")
        if self._at_reference:
            order = self._do(self._new(side, "reference", quantity=quantity, price=_number(wanted.price), reduce=True))
            self._fill_reference(order, quantity)
        else:
            # A full close includes the rest that is less than a lot.
            rounded = None if whole else self._exchange.market(self._symbol).round_quantity(quantity)
            order = self._do(self._new(side, "market", quantity=rounded, reduce=True))
        fill = self._filled(order)
        if whole and self._held(group):
            raise _Failed(Problem("transient", f"{order.client_order_id} has closed a part of {group}", "UNKNOWN"))
        return fill

    def _new(
        self,
        side: Side,
        kind: OrderType,
        *,
        quantity: Decimal | None = None,
        cost: Decimal | None = None,
        price: Decimal | None = None,
        reduce: bool = False,
    ) -> NewOrder:
        return NewOrder(
            symbol=self._symbol,
            side=side,
            type=kind,
            client_order_id=self._order.client_order_id,
            quantity=quantity,
            cost=cost,
            price=price,
            reduce_only=reduce,
            group=self._group(),
        )

    def _protect(self, group: str) -> None:
        """Place both levels as orders that close whatever the group holds when they trigger."""
        self._do(self._protective(self._ids.stop(0), "stop", self._order.stop_loss, group))
        self._do(self._protective(self._ids.take(0), "take", self._order.take_profit, group))

    def _protective(self, client_order_id: str, kind: OrderType, price: float, group: str) -> NewOrder:
        return NewOrder(
            symbol=self._symbol,
            side=_side("short" if self._order.direction == "long" else "long"),
            type=kind,
            client_order_id=client_order_id,
            trigger=self._exchange.market(self._symbol).round_price(_number(price)),
            reduce_only=True,
            protects=True,
            group=group,
        )

    def _do(self, new: NewOrder) -> VenueOrder:
        partial = None if new.protects or new.type == "reference" else self._strike.of("partial")
        action = Place(new, partial.fraction, partial.rest_expires) if partial else Place(new)
        order = self._venue.do(self._wish.kind, self._account, action)
        assert order is not None  # noqa: S101  # placing returns the order
        return order

    def _fill_reference(self, order: VenueOrder, quantity: Decimal) -> None:
        """Fill it completely; an injected partial fill is final, because no market fills the rest."""
        if (partial := self._strike.of("partial")) is not None:
            quantity = _exact(quantity * partial.fraction)
        action = FillReference(order.client_order_id, _number(self._order.price), quantity)
        self._venue.do(self._wish.kind, self._account, action)

    def _drop_protection(self, group: str) -> None:
        for order in self._protection(group):
            self._venue.do(self._wish.kind, self._account, Cancel(order.symbol, order_id=order.id))

    def _refuse_on_purpose(self) -> None:
        if self._strike.of("reject"):
            raise Refused("rejected", f"{self._order.client_order_id} is rejected by an injected fault")

    # What is known

    def _known(self, client_order_id: str) -> VenueOrder | None:
        try:
            return self._exchange.find(self._account, client_order_id=client_order_id)
        except Refused:
            return None

    @property
    def _ids(self) -> SignalIds:
        wish = self._wish
        return SignalIds(wish.order.signal_id if wish.order else wish.signal_id, wish.store_id)

    def _group(self) -> str:
        return self._ids.entry

    def _of_account(self) -> list[VenueOrder]:
        return [
            order
            for order in self._exchange.orders.values()
            if order.account == self._account and order.symbol == self._symbol and order.group
        ]

    def _held(self, group: str) -> Decimal:
        return self._exchange.held(self._account, self._symbol, group)

    def _protection(self, group: str) -> list[VenueOrder]:
        orders = self._exchange.open_orders(self._account, self._symbol)
        return [order for order in orders if order.protects and order.group == group]

    def _average_entry(self, group: str) -> Decimal:
        entries = [order for order in self._of_account() if order.group == group and not order.reduce_only]
        return sum((order.filled_cost for order in entries), ZERO) / sum((order.filled for order in entries), ZERO)

    def _closing_fill(self, group: str) -> Fill | None:
        """The fill of the last order that reduced the group, its own or a foreign one. A group without an entry was
        adopted: foreign orders count since then."""
        mine = [order for order in self._of_account() if order.group == group and order.filled]
        opened = [order for order in mine if not order.reduce_only]
        if not opened and not self._wish.since_ms:
            return None
        direction = self._wish.direction if self._wish.order is None else self._order.direction
        side = _side("short" if direction == "long" else "long")
        others = [
            order
            for order in self._exchange.orders.values()
            if order.account == self._account
            and order.symbol == self._symbol
            and order.filled
            and order.side == side
            and (not order.group and order.id > opened[-1].id if opened else order.updated_ms >= self._wish.since_ms)
        ]
        closing = [order for order in mine if order.reduce_only] + others
        return self._fill(max(closing, key=lambda order: (order.updated_ms, order.id))) if closing else None

    def _filled(self, order: VenueOrder) -> Fill:
        """The fill of an order that is done; a problem if it is still open, or nothing was filled."""
        if order.is_open:
            outcome: Literal["NOT_DONE", "UNKNOWN"] = "UNKNOWN" if order.filled else "NOT_DONE"
            raise _Failed(Problem("transient", f"{order.client_order_id} is {order.status} and still open", outcome))
        if not order.filled:
            raise _Failed(Problem("rejected", f"{order.client_order_id} is {order.status}, and nothing was filled"))
        return self._fill(order)

    def _fill(self, order: VenueOrder) -> Fill:
        reasons: dict[str, Literal["take_profit", "stop_loss"]] = {"take": "take_profit", "stop": "stop_loss"}
        foreign: Literal["", "closed"] = "closed" if not order.group else ""
        market = self._exchange.markets[order.symbol]
        received, charged = order.filled - order.fee_in_base, order.type != "reference"
        return Fill(
            price=float(order.average_price),
            cost=float(order.average_price * received),
            quantity=float(received),
            fee=float(order.fee) if charged else None,
            fee_currency=(market.base if order.fee_in_base else market.quote) if charged else "",
            client_order_ids=(order.client_order_id,),
            order_ids=(str(order.id),),
            timestamp=order.updated_ms,
            reason=reasons.get(order.type, foreign),
        )


def _side(direction: Direction) -> Side:
    return "buy" if direction == "long" else "sell"


def _number(number: float) -> Decimal:
    return Decimal(repr(number))


def _exact(quantity: Decimal) -> Decimal:
    """Rounded so that sums of such quantities are exact: closing what was added up leaves nothing."""
    return quantity.quantize(Decimal("1e-12"))


_OPERATIONS: Final[dict[str, Callable[[_Job], object]]] = {
    "find": _Job.find,
    "open": _Job.open,
    "place": _Job.place,
    "activate": _Job.activate,
    "cancel": _Job.cancel,
    "add": _Job.add,
    "reduce": _Job.reduce,
    "close": _Job.close,
    "move": _Job.move,
    "check-position": _Job.check_position,
    "check-entry": _Job.check_entry,
    "holdings": _Job.holdings,
}
