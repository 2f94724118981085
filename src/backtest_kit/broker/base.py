"""`Broker`: the hooks between the engine and an exchange, their orders, and the errors they raise.

The engine decides, stores its intent with the number of the attempt, and then calls a hook; what the hook returns is
stored before anything else happens. After a crash, or after an error that leaves the outcome open, the engine calls
`find` before it sends the order again. So one client order id is never filled twice, whenever a process dies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final, Literal

import msgspec

from backtest_kit.broker.order_ids import NO_STORE
from backtest_kit.errors import BacktestKitError, UserError
from backtest_kit.model.event import Event
from backtest_kit.model.identity import Identity
from backtest_kit.model.position import Execution, Position, RestingEntry
from backtest_kit.model.signal import Direction

OrderKind = Literal[
    "open", "place", "activate", "cancel", "add", "reduce", "close", "move_stop", "move_take", "breakeven"
]
"""What an order is for. `place` rests a limit order, `activate` turns it into a position, `cancel` ends it."""


class OrderTransient(BacktestKitError):
    """It failed now, or its outcome is unknown (`outcome`): the order is looked up and tried again.

    Any other error counts as one with an unknown outcome.
    """


class OrderRejected(BacktestKitError):
    """The exchange rejects the order: too small, no funds, market closed. It is never sent again; an exit goes on under
    another id, once `find` has returned what was filled of this one."""


class OrderDeleted(BacktestKitError):
    """A position or an order is gone from the exchange: closed or cancelled there by another party."""


class Order(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One operation on an exchange."""

    kind: OrderKind
    client_order_id: str
    """32 lower-case hex digits, which every exchange takes (`backtest_kit.broker.order_ids`). `open`, `place` and
    `activate` share one; everything later in the life of the position has its own. The same operation has the same id
    at every attempt."""
    signal_id: str
    """Of the position or entry."""
    identity: Identity
    when_ms: int
    """The minute of the decision."""
    direction: Direction
    price: float
    """The price that the engine books if the exchange reports none: the current price of the decision, the limit
    price (`place`), the level that was touched (`close`)."""
    cost: float
    """Quote currency to put in (`open`, `place`, `activate`, `add`) or to take out at cost (`reduce`, `close`);
    0 for the others."""
    quantity: float | None = None
    """Base currency to take out, if the fills of the position have reported how much there is."""
    take_profit: float
    """The level in force once the order is done."""
    stop_loss: float
    """The level in force once the order is done."""
    reason: str = ""
    """Why a position closes or an entry is cancelled."""
    attempt: int = 0
    """0 at the first call. Above 0 the exchange may have the order already."""


class Fill(Execution, frozen=True, kw_only=True):
    """What an exchange did for an order, added up over its partial fills."""

    price: float
    """Average price."""
    cost: float
    """In quote currency, without fees: price times quantity."""
    quantity: float
    """In base currency, as received: without the fee of a purchase, if that was taken in base currency."""
    timestamp: int = 0
    """Of the last partial fill, epoch ms; 0 if the exchange did not report it."""
    reason: Literal["", "take_profit", "stop_loss", "closed"] = ""
    """The protective order that closed a position on the exchange."""

    @property
    def execution(self) -> Execution:
        """The part that is stored with the position."""
        return msgspec.convert(self, Execution, from_attributes=True)


class OrderReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an exchange reports about one client order id."""

    status: Literal["absent", "resting", "partly_filled", "filled", "cancelled", "rejected"]
    """`absent`: the exchange never received it, so it may be sent."""
    fill: Fill | None = None
    """The part that was filled so far."""


class VenueSignal(msgspec.Struct, frozen=True, kw_only=True):
    """The holdings and open orders of one signal on the exchange. Its client ids (`backtest_kit.broker.order_ids`) name
    the store that sent them."""

    store_id: str
    digest: str
    """Of the signal id, as in a client order id."""
    quantity: float = 0.0
    """Base currency bought and not sold again; 0 if the exchange keeps one position for all signals."""
    price_open: float | None = None
    """Average purchase price."""
    stop_loss: float | None = None
    """Trigger of the live protective stop."""
    client_order_ids: tuple[str, ...] = ()
    """Open orders."""


class VenuePosition(msgspec.Struct, frozen=True, kw_only=True):
    """The position of one symbol on the exchange: of a future the whole position, on a spot market only what orders of
    this program bought, without the owner's savings and manual orders."""

    symbol: str
    direction: Direction
    quantity: float
    """In base currency; 0 if there are only open orders."""
    price_open: float | None = None
    """Average entry price, if known."""
    stop_loss: float | None = None
    """Trigger of the live protective stop of this account, None without one."""
    client_order_ids: tuple[str, ...] = ()
    """Open orders on the symbol."""
    signals: tuple[VenueSignal, ...] = ()
    """Signals with holdings or open orders, the largest first."""


class Broker:
    """An exchange. Every hook is optional: by default it confirms the order as the engine decided it.

    A hook that returns has carried out the order. A `Fill` has price and amount; None leaves both as the engine decided
    them. Hooks raise `OrderTransient`, `OrderRejected` or `OrderDeleted`; with `outcome=Outcome.NOT_DONE` a transient
    error promises that the exchange has nothing of the order.
    """

    reports_fills: ClassVar[bool] = False
    """Whether fills have the exchange's own prices: they include slippage, which is not charged again."""
    notes: tuple[str, ...] = ()
    """Notes for people about this broker, shown with the status of the run."""
    store_id: str = NO_STORE
    """Id of the store whose orders the broker sends, 6 hex digits: part of every client order id. The live run sets it
    before `start`."""

    def account(self) -> str:
        """Identifies the account with its market: the same text for every broker of it and no other account, such as
        a digest of the API key, but never the key.

        On one machine, processes of one store share a symbol of an account, and another store is refused at its start.
        Empty: unknown; nothing is refused.
        """
        return ""

    async def start(self) -> None:
        """Connect and check that orders can be placed. Called once, before the first position is restored.

        Raises:
            UserError: credentials, symbol or account settings make trading impossible.
            RetryLater: the exchange does not answer.
        """

    async def stop(self) -> None:
        """Close connections. Idempotent. Orders and positions stay as they are."""

    async def find(self, order: Order) -> OrderReport:
        """Look up `order`. Called before it is sent again.

        A broker that sends orders must override it; one that only confirms has nothing to look up.
        """
        return OrderReport(status="absent")

    async def open_position(self, order: Order) -> Fill | None:
        """Enter now (`open`), with the protective orders; or confirm that a resting entry was filled (`activate`).

        For `activate`, if the exchange has not filled the entry yet: raise `OrderTransient` with NOT_DONE.
        """
        return None

    async def place_entry(self, order: Order) -> None:
        """Rest a limit order at `order.price`."""

    async def cancel_entry(self, order: Order) -> Fill | None:
        """Cancel a resting entry. Return the fill if it was too late: the position is open."""
        return None

    async def close_position(self, order: Order) -> Fill | None:
        """Close the whole position and cancel its protective orders. A position that is closed already is not an
        error: return the fill that closed it if the exchange reports it."""
        return None

    async def add_to_position(self, order: Order) -> Fill | None:
        """Buy more for `order.cost`."""
        return None

    async def reduce_position(self, order: Order) -> Fill | None:
        """Close `order.cost` of the position."""
        return None

    async def move_stop(self, order: Order) -> None:
        """Move the protective stop to `order.stop_loss` (`move_stop` and `breakeven`)."""

    async def move_take(self, order: Order) -> None:
        """Move the take profit to `order.take_profit`."""

    async def check_position(self, position: Position) -> Fill | None:
        """Called once a minute. None while the position is open, or the fill that closed it on the exchange.

        Raises:
            OrderDeleted: there is neither a position nor a fill.
        """
        return None

    async def check_entry(self, entry: RestingEntry) -> Fill | None:
        """Called once a minute. None while the limit order rests, or its fill.

        Raises:
            OrderDeleted: it neither rests nor was filled.
        """
        return None

    async def holdings(self, symbols: Sequence[str]) -> list[VenuePosition] | None:
        """The positions of `symbols`, at most one of each. Called once a minute, and before the first entry after a
        start: while the exchange holds something that the store does not know, nothing is opened.

        None if the broker cannot list them: then nothing is compared. After an error entries wait.
        """
        return None

    async def notify(self, event: Event) -> None:
        """Called after an event, for information only."""


SENDING: Final = (
    *("open_position", "place_entry", "cancel_entry", "close_position"),
    *("add_to_position", "reduce_position", "move_stop", "move_take"),
)
"""The hooks that send orders."""


def sends(broker: Broker) -> list[str]:
    """The hooks of `SENDING` that the broker overrides: without any, nothing is traded."""
    return [name for name in SENDING if _is_own(broker, name)]


def check_broker(broker: Broker) -> None:
    """Refuse a broker that sends orders and cannot look one up.

    Raises:
        UserError: it could send an order twice after a crash.
    """
    own = sends(broker)
    if own and not _is_own(broker, "find"):
        raise UserError(
            f"{type(broker).__name__} sends orders ({', '.join(own)}) and has no find() of its own: after a crash "
            "it would be unknown whether an order arrived, and it could be sent twice. Give it an async find(order) "
            "that looks order.client_order_id up on the exchange and returns an OrderReport"
        )


def _is_own(broker: Broker, name: str) -> bool:
    return getattr(getattr(broker, name), "__func__", None) is not getattr(Broker, name)
