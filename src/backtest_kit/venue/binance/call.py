"""`Call`: one valid and authorized request to Binance's API."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from backtest_kit.venue.exchange import Exchange
from backtest_kit.venue.faults import Strike
from backtest_kit.venue.http import Answer
from backtest_kit.venue.journal import Cancel, Place
from backtest_kit.venue.orders import Kind, NewOrder, Refused, VenueOrder
from backtest_kit.venue.venue import Venue


class ApiError(Exception):
    """An error answer with Binance's code and text."""

    def __init__(self, code: int, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.answer = Answer({"code": code, "msg": message}, status)


class Call:
    """One valid and authorized request."""

    def __init__(self, venue: Venue, kind: Kind, params: dict[str, str], strike: Strike) -> None:
        self.venue = venue
        self.kind = kind
        self.params = params
        self.strike = strike
        self.account = ""

    @property
    def exchange(self) -> Exchange:
        return self.venue.exchanges[self.kind]

    def need(self, name: str) -> str:
        if not self.params.get(name):
            raise ApiError(-1102, f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed.")
        return self.params[name]

    def symbol(self) -> str:
        return self.exchange.market(self.need("symbol")).symbol

    def number(self, name: str) -> Decimal | None:
        if name not in self.params:
            return None
        try:
            number = Decimal(self.params[name])
        except InvalidOperation:
            number = Decimal("NaN")
        if not number.is_finite():
            raise ApiError(-1100, f"Illegal characters found in parameter '{name}'.")
        return number

    def whole(self, name: str) -> int | None:
        number = self.number(name)
        return None if number is None else int(number)

    def order_of(self, id_name: str, client_id_name: str) -> tuple[int | None, str | None]:
        order_id, client_order_id = self.whole(id_name), self.params.get(client_id_name)
        if order_id is None and not client_order_id:
            raise ApiError(-1102, f"Param '{client_id_name}' or '{id_name}' must be sent, but both were empty/null!")
        return order_id, client_order_id

    def place(self, new: NewOrder) -> VenueOrder:
        if self.strike.of("reject"):
            raise Refused("rejected", f"{new.client_order_id} is rejected by an injected fault")
        partial = self.strike.of("partial")
        action = Place(new, partial.fraction, partial.rest_expires) if partial else Place(new)
        order = self.venue.do(self.kind, self.account, action)
        assert order is not None  # noqa: S101  # placing returns the order
        return order

    def cancel(self, order: VenueOrder) -> VenueOrder:
        self.venue.do(self.kind, self.account, Cancel(order.symbol, order_id=order.id))
        return order
