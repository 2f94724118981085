"""Client order ids: the names of our orders on an exchange, and the owner of an order found there.

A client order id is 32 lower-case hex digits. They fit every known rule: OKX wants letters and
digits only and 32 at most, Kraken a UUID (with or without dashes) or 18 characters, Binance 36 characters.

    digits   0-1    mark of this scheme
             2-7    store that sent the order
             8-21   digest of the signal id
             22-23  kind of the order, as the ASCII code of a letter
             24-31  number of the order among those of its kind
"""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Final, NamedTuple

from backtest_kit.errors import UserError

NO_STORE: Final = "000000"
"""Of orders that were sent without a store: paper trading, hooks that are called directly."""
ENTRY, ADD, REDUCE, CLOSE, CANCEL, MOVE_STOP, MOVE_TAKE = "earcnst"
STOP, TAKE, EXIT = "pqx"
"""A protective stop, a resting take profit, and a market order that leaves a position which cannot be protected."""
KINDS: Final = frozenset((ENTRY, ADD, REDUCE, CLOSE, CANCEL, MOVE_STOP, MOVE_TAKE, STOP, TAKE, EXIT))
_KIND_OF_ORDER: Final = {
    "open": ENTRY,
    "place": ENTRY,
    "activate": ENTRY,
    "cancel": CANCEL,
    "add": ADD,
    "reduce": REDUCE,
    "close": CLOSE,
    "move_stop": MOVE_STOP,
    "breakeven": MOVE_STOP,
    "move_take": MOVE_TAKE,
}
_MARK: Final = "bc"
_LARGEST: Final = 2**32 - 1
_DIGEST_LENGTH: Final = 14
PARTS: Final = 256
"""Orders of the engine take every 256th number: those after it are for the parts in which an order is sent."""
_TAKEN_OVER: Final = re.compile(r"venue-([0-9a-f]{6})([0-9a-f]{14})")
_WRITTEN: Final = re.compile(r"-([a-z])([0-9]*)")


class OrderId(NamedTuple):
    """A client order id, taken apart."""

    store_id: str
    """6 hex digits."""
    digest: str
    """14 hex digits, of the signal id."""
    kind: str
    """One of `KINDS`."""
    number: int
    """0 to 2**32 - 1."""

    def __str__(self) -> str:
        """The id as the exchange gets it.

        Raises:
            UserError: the number does not fit.
        """
        if not 0 <= self.number <= _LARGEST:
            raise UserError(
                f"order number {self.number} of kind {self.kind!r} does not fit in a client order id "
                f"(0 to {_LARGEST}): close the position, the next one counts from 0"
            )
        return f"{_MARK}{self.store_id}{self.digest}{ord(self.kind):02x}{self.number:08x}"

    def part(self, number: int) -> OrderId:
        """The id of a part of this order; part 0 is the order itself.

        Raises:
            UserError: an order has fewer parts.
        """
        if not 0 <= number < PARTS:
            raise UserError(f"part {number} of order {self}: an order has at most {PARTS} parts")
        return self._replace(number=self.number + number)


def parse(client_order_id: str | None) -> OrderId | None:
    """A client order id taken apart; None if it is not of this scheme.

    Dashes and upper-case letters are accepted: exchanges that treat an id as a UUID write it that way.
    """
    digits = (client_order_id or "").replace("-", "").lower()
    if len(digits) != 32 or not digits.startswith(_MARK) or not set(digits) <= set("0123456789abcdef"):
        return None
    kind = chr(int(digits[22:24], 16))
    if kind not in KINDS:
        return None
    return OrderId(digits[2:8], digits[8:22], kind, int(digits[24:], 16))


def digest_of(signal_id: str) -> str:
    """What stands for a signal id in the client order ids of its orders."""
    taken_over = _TAKEN_OVER.fullmatch(signal_id)
    return taken_over[2] if taken_over else sha256(signal_id.encode()).hexdigest()[:_DIGEST_LENGTH]


def taken_over(order_id: OrderId) -> str:
    """A signal id under which the orders next to `order_id` are found.

    The signal id that they were sent for cannot be read from them; it is not needed to go on with the position.
    """
    return f"venue-{order_id.store_id}{order_id.digest}"


def is_taken_over(signal_id: str) -> bool:
    """Whether it was made by `taken_over`."""
    return _TAKEN_OVER.fullmatch(signal_id) is not None


class SignalIds:
    """The client order ids of one signal: the same at every start, so that its orders are found after a crash."""

    def __init__(self, signal_id: str, store_id: str = NO_STORE) -> None:
        """
        Args:
            signal_id: any text. One made by `taken_over` names the store that sent the orders as well.
            store_id: the store that sends the orders, 6 hex digits.
        """
        taken = _TAKEN_OVER.fullmatch(signal_id)
        self.signal_id = signal_id
        self.store_id, self.digest = (taken[1], taken[2]) if taken else (store_id, digest_of(signal_id))

    @property
    def entry(self) -> str:
        return self._id(ENTRY, 0)

    def stop(self, number: int) -> str:
        """The id of a protective stop."""
        return self._id(STOP, number)

    def take(self, number: int) -> str:
        """The id of a take profit that rests on the exchange."""
        return self._id(TAKE, number)

    def exit(self, number: int) -> str:
        """The id of a market order that leaves a position which cannot be protected."""
        return self._id(EXIT, number)

    def order(self, kind: str, number: int) -> str:
        """The id of an order of the engine, by its `Order.kind`; `number` counts the orders of the position."""
        letter = _KIND_OF_ORDER[kind]
        return self.entry if letter == ENTRY else self._id(letter, number * PARTS)

    def of(self, client_order_id: str, part: int = 0) -> str:
        """The id of a part of an order of the engine; part 0 is the order itself.

        Args:
            client_order_id: the order's id, or as people write it: the signal id with `-`, a letter of `KINDS` and
                a number after it.
            part: counts from 0 if one order of the engine takes several on the exchange.

        Raises:
            UserError: it is not an id of this signal.
        """
        order_id = parse(client_order_id) or self._written(client_order_id)
        if order_id is None or not self._is_ours(order_id):
            raise UserError(f"{client_order_id!r} is not a client order id of signal {self.signal_id!r}")
        return str(order_id.part(part))

    def kind(self, venue_id: str | None) -> str | None:
        """The kind of an order by its client id; None if it belongs to something else."""
        order_id = parse(venue_id)
        return order_id.kind if order_id and self._is_ours(order_id) else None

    def stop_number(self, venue_id: str | None) -> int | None:
        """The number of a protective stop by its client id; None for another order."""
        order_id = parse(venue_id)
        return order_id.number if order_id and order_id.kind == STOP and self._is_ours(order_id) else None

    def _is_ours(self, order_id: OrderId) -> bool:
        return (order_id.store_id, order_id.digest) == (self.store_id, self.digest)

    def _written(self, name: str) -> OrderId | None:
        suffix = name.removeprefix(self.signal_id)
        if not suffix:
            return OrderId(self.store_id, self.digest, ENTRY, 0)
        written = _WRITTEN.fullmatch(suffix)
        if written is None or written[1] not in KINDS:
            return None
        return OrderId(self.store_id, self.digest, written[1], int(written[2] or 0) * PARTS)

    def _id(self, kind: str, number: int) -> str:
        return str(OrderId(self.store_id, self.digest, kind, number))


def store_of(client_order_id: str) -> str:
    """The store that sent an order; `NO_STORE` if unknown."""
    order_id = parse(client_order_id)
    return order_id.store_id if order_id else NO_STORE
