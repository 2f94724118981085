"""`Broker`: the hooks between the engine and a venue, the orders that pass there, and the errors they raise.

The engine decides first and writes its intent down, with the number of the attempt, before it calls a
hook; what the hook returns is written down before anything else happens. After a crash, or after an error
that leaves the outcome open, the engine asks `find` what became of the order before it sends it again. So
one client order id is never filled twice, whatever dies when.
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
    """It failed now, or it is unknown whether it worked (`outcome`): the order is looked up and tried again.

    Any error that is none of these three counts as one whose outcome is unknown.
    """


class OrderRejected(BacktestKitError):
    """The venue refuses the order for good: too small, no funds, market closed. It is never sent again; what has to be
    closed goes on under another id, once `find` has said what was filled of this one."""


class OrderDeleted(BacktestKitError):
    """What the engine believes to be on the venue is gone: closed or cancelled there by another party."""


class Order(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One operation on a venue."""

    kind: OrderKind
    client_order_id: str
    """32 lower-case hex digits, which every exchange takes (`backtest_kit.broker.order_ids`). `open`, `place` and
    `activate` share one; everything later in the life of the position has its own. The same operation has the same id
    at every attempt."""
    signal_id: str
    """Of the position or entry that the order is about."""
    identity: Identity
    when_ms: int
    """The minute of the decision."""
    direction: Direction
    price: float
    """What the engine books it at where the venue reports no price: the current price of the decision, the limit
    price (`place`), the level that was touched (`close`)."""
    cost: float
    """Quote currency to put in (`open`, `place`, `activate`, `add`) or to take out at cost (`reduce`, `close`);
    0 for the others."""
    quantity: float | None = None
    """Base currency to take out, where the fills of the position said how much is held."""
    take_profit: float
    """The level in force once the order is done."""
    stop_loss: float
    """The level in force once the order is done."""
    reason: str = ""
    """Why a position closes or an entry is cancelled."""
    attempt: int = 0
    """0 at the first call. Above 0 the venue may know the order already."""


class Fill(Execution, frozen=True, kw_only=True):
    """What a venue did for an order, added up over its partial fills."""

    price: float
    """Average price."""
    cost: float
    """In quote currency, without fees: price times quantity."""
    quantity: float
    """In base currency, as it has come in: where the fee of a purchase was taken out of it, what was left."""
    timestamp: int = 0
    """Of the last partial fill, epoch ms; 0 where the venue did not report it."""
    reason: Literal["", "take_profit", "stop_loss", "closed"] = ""
    """Of what the venue closed by itself: which protective order did it."""

    @property
    def execution(self) -> Execution:
        """What of it is kept with the position."""
        return msgspec.convert(self, Execution, from_attributes=True)


class OrderReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a venue knows of one client order id."""

    status: Literal["absent", "resting", "partly_filled", "filled", "cancelled", "rejected"]
    """`absent`: the venue never received it, so that it may be sent."""
    fill: Fill | None = None
    """What was filled so far."""


class VenueSignal(msgspec.Struct, frozen=True, kw_only=True):
    """What the orders of one signal hold, or still want, on the exchange: by their client order ids
    (`backtest_kit.broker.order_ids`), so that it is known which store sent them."""

    store_id: str
    digest: str
    """Of the signal id, as in a client order id."""
    quantity: float = 0.0
    """Base currency that they bought and did not sell again; 0 where the exchange keeps one position of all signals."""
    price_open: float | None = None
    """Average price of what they bought."""
    stop_loss: float | None = None
    """Trigger of the live protective stop."""
    client_order_ids: tuple[str, ...] = ()
    """Open orders."""


class VenuePosition(msgspec.Struct, frozen=True, kw_only=True):
    """What the exchange holds of one symbol as far as it counts: of a future the whole position, on a spot market only
    what orders of this program bought. The owner's savings and orders made by hand are not part of it."""

    symbol: str
    direction: Direction
    quantity: float
    """In base currency; 0 where only open orders are left."""
    price_open: float | None = None
    """Average entry price, where it is known."""
    stop_loss: float | None = None
    """Trigger of the live protective stop of this account, None where there is none."""
    client_order_ids: tuple[str, ...] = ()
    """Open orders on the symbol."""
    signals: tuple[VenueSignal, ...] = ()
    """Those that hold something there or have open orders, the one that holds most first."""


class Broker:
    """A venue. Every hook is optional: what is not overridden confirms the order as the engine decided it.

    A hook that returns has done what it was asked. A `Fill` says at what price and for how much; None leaves
    both as the engine decided them. Hooks raise `OrderTransient`, `OrderRejected` or `OrderDeleted`; with
    `outcome=Outcome.NOT_DONE` a transient error promises that the venue has nothing of the order.
    """

    reports_fills: ClassVar[bool] = False
    """Whether fills carry the venue's own prices: slippage is in them already, and is not charged again."""
    notes: tuple[str, ...] = ()
    """Notes for people about this broker, shown with the status of the run."""
    store_id: str = NO_STORE
    """Id of the store whose orders the broker sends, 6 hex digits: part of every client order id. The live run sets it
    before `start`."""

    def account(self) -> str:
        """Identifies the account with its market: the same text for every broker of it and no other account, such as
        a digest of the API key, but never the key.

        On one machine, processes of one store share a symbol of an account, and another store is refused at its start.
        Empty: unknown, and nothing is refused.
        """
        return ""

    async def start(self) -> None:
        """Connect and check that orders can be placed. Called once, before the first position is restored.

        Raises:
            UserError: credentials, symbol or account settings make trading impossible.
            RetryLater: the venue does not answer.
        """

    async def stop(self) -> None:
        """Close connections. Idempotent. Orders and positions stay as they are."""

    async def find(self, order: Order) -> OrderReport:
        """What became of `order`: asked before it is sent again.

        A broker that sends orders must override it; one that only confirms has nothing to look up.
        """
        return OrderReport(status="absent")

    async def open_position(self, order: Order) -> Fill | None:
        """Enter now (`open`), with the protective orders; or confirm that a resting entry was filled (`activate`).

        For `activate` where the venue has not filled the entry yet: `OrderTransient` with NOT_DONE.
        """
        return None

    async def place_entry(self, order: Order) -> None:
        """Rest a limit order at `order.price`."""

    async def cancel_entry(self, order: Order) -> Fill | None:
        """Cancel a resting entry. A fill says that it was too late: the position is open."""
        return None

    async def close_position(self, order: Order) -> Fill | None:
        """Close everything that is held and its protective orders. A position that is flat already is no error:
        return the fill that closed it if the venue reports it."""
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
        """Once a minute: None while the venue holds the position, or the fill by which it was closed there.

        Raises:
            OrderDeleted: the venue holds nothing and knows no fill either.
        """
        return None

    async def check_entry(self, entry: RestingEntry) -> Fill | None:
        """Once a minute: None while the limit order rests, or its fill.

        Raises:
            OrderDeleted: it neither rests nor was filled.
        """
        return None

    async def holdings(self, symbols: Sequence[str]) -> list[VenuePosition] | None:
        """What the exchange holds of `symbols`, at most one position of each. Called once a minute, and before the
        first entry after a start: while it holds something that the store does not know, nothing is opened.

        None if the broker cannot list it: then nothing is compared. An error makes entries wait.
        """
        return None

    async def notify(self, event: Event) -> None:
        """Called after an event, for information only."""


SENDING: Final = (
    *("open_position", "place_entry", "cancel_entry", "close_position"),
    *("add_to_position", "reduce_position", "move_stop", "move_take"),
)
"""The hooks that change something at a venue."""


def sends(broker: Broker) -> list[str]:
    """Which of the hooks that change something at a venue are the broker's own: without any, nothing is traded."""
    return [name for name in SENDING if _is_own(broker, name)]


def check_broker(broker: Broker) -> None:
    """Refuse a broker that sends orders and cannot look one up.

    Raises:
        UserError: it would send twice what was under way at a crash.
    """
    own = sends(broker)
    if own and not _is_own(broker, "find"):
        raise UserError(
            f"{type(broker).__name__} sends orders ({', '.join(own)}) and has no find() of its own: after a crash "
            "it would be unknown whether an order arrived, and it could be sent twice. Give it an async find(order) "
            "that looks order.client_order_id up at the venue and returns an OrderReport"
        )


def _is_own(broker: Broker, name: str) -> bool:
    return getattr(getattr(broker, name), "__func__", None) is not getattr(Broker, name)
