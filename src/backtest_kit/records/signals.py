"""`Storage` and `Recent`: every signal as it is now, and the last one of each strategy on a symbol."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Final, Literal, TypeVar, Unpack

from backtest_kit.errors import Damaged
from backtest_kit.model.event import (
    EntryCancelled,
    EntryScheduled,
    Event,
    Lasting,
    PositionChanged,
    PositionClosed,
    PositionOpened,
)
from backtest_kit.model.identity import Identity
from backtest_kit.model.inner import Inner
from backtest_kit.model.interval import to_datetime
from backtest_kit.model.position import OfSignal, Position, RestingEntry, Trade
from backtest_kit.persist.codec import decode_as, encode
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.store import Key, Plain, Record, Write, check_limit
from backtest_kit.records.scope import Scope, Scopes, View

S = TypeVar("S")
Status = Literal["scheduled", "opened", "closed", "cancelled"]

_OVER: Final = ("closed", "cancelled")
STORAGE: Final = CONTRACTS["storage"]
RECENT: Final = CONTRACTS["recent"]
_AHEAD: Final = 4
"""How many records are read for each one that is wanted, before all are."""


class StoredSignal(OfSignal, frozen=True):
    """A signal as it is now: its last event contains everything that happened to it."""

    event: Lasting

    entry = Inner[RestingEntry]("event.entry")
    """The entry; once the position is open, at the price and cost of its first fill."""
    updated_at_ms = Inner[int]("event.when_ms")
    """Simulation time of the event."""
    current_price = Inner[float]("event.price")

    @property
    def status(self) -> Status:
        return _STATUS[type(self.event)]

    @property
    def position(self) -> Position | None:
        """None while the entry rests, and once it was cancelled."""
        return None if isinstance(self.event, EntryScheduled | EntryCancelled) else self.event.position

    @property
    def trade(self) -> Trade | None:
        """None until it is closed."""
        return self.event.trade if isinstance(self.event, PositionClosed) else None

    @property
    def price_open(self) -> float:
        """Of the first entry, or the limit price of a resting one; of a closed position the effective entry price."""
        return self.entry.price_open if self.trade is None else self.trade.price_open

    @property
    def price_close(self) -> float | None:
        """None until it is closed."""
        return None if self.trade is None else self.trade.price_close

    @property
    def pnl_pct(self) -> float | None:
        """In percent after fees and slippage, once it is closed."""
        return None if self.trade is None else self.trade.pnl_pct

    @property
    def close_reason(self) -> str | None:
        """Why it was closed, or why its entry was cancelled."""
        if isinstance(self.event, EntryCancelled):
            return self.event.reason
        return None if self.trade is None else self.trade.close_reason

    @property
    def updated_at(self) -> datetime:
        return to_datetime(self.updated_at_ms)


_STATUS: Final[dict[type[Lasting], Status]] = {
    EntryScheduled: "scheduled",
    EntryCancelled: "cancelled",
    PositionOpened: "opened",
    PositionChanged: "opened",
    PositionClosed: "closed",
}


def stored_signal(value: Plain) -> StoredSignal:
    """The signal in a record of storage or recent.

    Raises:
        Damaged: it is not a signal.
    """
    return decode_as(StoredSignal, {"event": value})


def signal_writes(events: Iterable[Event]) -> list[Write]:
    """A write for each signal of `events`, and one for the last signal of each strategy on a symbol."""
    signals: dict[Key, Write] = {}
    last: dict[Key, Write] = {}
    for event in events:
        if isinstance(event, Lasting):
            identity, value = event.identity, encode(event)
            own, place = (identity.mode == "backtest", event.entry.signal_id), _recent_key(identity)
            signals[own] = Write(STORAGE, own, value, when=event.when_ms)
            last[place] = Write(RECENT, place, value, when=event.when_ms)
    return [*signals.values(), *last.values()]


class Storage:
    """Every signal with its latest state: `kit.records.storage`."""

    def __init__(self, scope: Scopes) -> None:
        self._scope = scope

    async def get(self, signal_id: str, **view: Unpack[View]) -> StoredSignal | None:
        """The signal with that id, or None. With `when`, one that has changed since is not visible.

        Raises:
            UserError: a backtest without its run id.
            Damaged, RetryLater: as `Store.get`.
        """
        scope = self._scope(**view)
        record = await scope.read(STORAGE, (scope.mode == "backtest", signal_id))
        return None if record is None else stored_signal(record.value)

    async def list(
        self,
        *,
        symbol: str | None = None,
        strategy_name: str | None = None,
        status: Status | None = None,
        limit: int | None = None,
        **view: Unpack[View],
    ) -> list[StoredSignal]:
        """The signals that match all of this, the last changed first; no more than `limit`.

        Raises:
            UserError: a backtest without its run id, or `limit` is below 0.
            Damaged, RetryLater: as `Store.scan`.
        """
        wanted = matching(symbol=symbol, strategy_name=strategy_name, status=status)
        scope = self._scope(**view)
        return await newest(scope, STORAGE, (scope.mode == "backtest",), stored_signal, wanted, limit)


class Recent:
    """The last signal of a strategy on a symbol: `kit.records.recent`."""

    def __init__(self, scope: Scopes) -> None:
        self._scope = scope

    async def get(
        self,
        *,
        symbol: str,
        strategy_name: str,
        exchange_name: str,
        frame_name: str = "",
        **view: Unpack[View],
    ) -> StoredSignal | None:
        """The last signal there, as it is now, or None. With `when`, later signals and changes are not visible.

        Raises:
            UserError: a backtest without its run id.
            Damaged, RetryLater: as `Store.get`.
        """
        scope = self._scope(**view)
        identity = Identity(symbol, strategy_name, exchange_name, frame_name, scope.mode)
        record = await scope.read(RECENT, _recent_key(identity))
        return None if record is None else stored_signal(record.value)


def matching(**fields: object) -> Callable[[object], bool]:
    """Whether a value has these fields; None matches any."""
    wanted = {name: value for name, value in fields.items() if value is not None}
    return lambda each: all(getattr(each, name) == value for name, value in wanted.items())


async def newest(
    scope: Scope, row: Contract, prefix: Key, read: Callable[[Plain], S], wanted: Callable[[S], bool], limit: int | None
) -> list[S]:
    """The visible records of a feed, decoded by `read` and filtered by `wanted`: newest first, no more than `limit`.

    Raises:
        UserError: `limit` is below 0.
        Damaged, RetryLater: as `Store.scan`.
    """
    check_limit(limit)
    if limit == 0:
        return []
    # Without a limit, some stores list every key first: a second for a million.
    for most in (None,) if limit is None else (_AHEAD * limit, None):
        found: list[S] = []
        count = 0
        async for record in scope.store(row).scan(row, prefix, limit=most, newest_first=True):
            count += 1
            if scope.sees(record) and wanted(each := read(record.value)):
                found.append(each)
                if len(found) == limit:
                    return found
        if most is None or count < most:
            break
    return found


def follows(write: Write, found: Record) -> bool:
    """Whether a write is newer than the record it would replace: by its time.

    But a signal that has ended stays ended, even if the clock was set back.
    """
    (signal_id, is_over), (found_id, was_over) = _outcome(write.value), _outcome(found.value)
    if signal_id == found_id and is_over != was_over:
        return is_over
    return not found.later_than(write.when)


def _outcome(value: Plain) -> tuple[str, bool]:
    """The signal id of a value, and whether the signal has ended; ("", False) if it cannot be read."""
    try:
        signal = stored_signal(value)
    except Damaged:
        return "", False
    return signal.signal_id, signal.status in _OVER


def _recent_key(identity: Identity) -> Key:
    return (
        identity.strategy_name,
        identity.exchange_name,
        identity.frame_name,
        identity.symbol,
        identity.mode == "backtest",
    )
