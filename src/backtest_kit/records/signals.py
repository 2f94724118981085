"""`Storage` and `Recent`: every signal as it is now, and the last one of each strategy on a symbol."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Final, Literal, TypeVar

import msgspec

from backtest_kit.model.event import (
    EntryCancelled,
    EntryScheduled,
    Event,
    Identity,
    Mode,
    PositionChanged,
    PositionClosed,
    PositionOpened,
)
from backtest_kit.model.interval import to_datetime
from backtest_kit.model.position import Direction, Position, RestingEntry, Trade
from backtest_kit.persist.codec import decode_as, encode
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.store import Key, Plain, Record, Write, check_limit
from backtest_kit.records.scope import Scope

S = TypeVar("S", bound=msgspec.Struct)
Status = Literal["scheduled", "opened", "closed", "cancelled"]
ScopeOf = Callable[[Mode, str | None, datetime | str | int | None], Scope]

_OVER: Final = ("closed", "cancelled")
STORAGE: Final = CONTRACTS["storage"]
RECENT: Final = CONTRACTS["recent"]
_AHEAD: Final = 4
"""How many records are looked through for each that is asked for, before all are."""


class StoredSignal(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A signal with all that became of it so far. Prices are those in force; percentages are in percent."""

    signal_id: str
    symbol: str
    strategy_name: str
    exchange_name: str
    frame_name: str
    status: Status
    position: Direction
    price_open: float
    """Of the first entry, or what a resting entry waits for; once it is closed, the effective price of all entries."""
    price_take_profit: float
    price_stop_loss: float
    original_price_open: float
    original_price_take_profit: float
    original_price_stop_loss: float
    minutes: float | None
    """Longest life of the position, `math.inf` for none; None once it is closed."""
    cost: float
    """All that was ever put in, in quote currency."""
    total_entries: int
    total_reductions: int
    scheduled_at_ms: int
    opened_at_ms: int | None = None
    closed_at_ms: int | None = None
    updated_at_ms: int
    """Simulation time of the event that this is the state after."""
    current_price: float
    pnl_pct: float | None = None
    """After fees and slippage, once it is closed."""
    pnl_cost: float | None = None
    peak_pct: float | None = None
    fall_pct: float | None = None
    close_reason: str | None = None
    """Why it was closed, or why its entry was cancelled."""
    note: str = ""
    close_note: str = ""

    @property
    def updated_at(self) -> datetime:
        return to_datetime(self.updated_at_ms)


def signal_after(event: Event) -> StoredSignal | None:
    """The signal as it is after `event`, or None if that is about no signal."""
    match event:
        case EntryScheduled():
            return _resting(event.entry, "scheduled", event.when_ms, event.price)
        case EntryCancelled():
            return _resting(event.entry, "cancelled", event.when_ms, event.price, event.reason)
        case PositionOpened() | PositionChanged():
            return _open(event.position, event.when_ms, event.price)
        case PositionClosed():
            return _closed(event.trade, event.when_ms, event.price)
        case _:
            return None


def signal_writes(events: Iterable[Event]) -> list[Write]:
    """One write for each signal that `events` are about, and one for the last of each strategy on a symbol."""
    signals: dict[Key, Write] = {}
    last: dict[Key, Write] = {}
    for event in events:
        signal = signal_after(event)
        if signal is None:
            continue
        value, when_ms, identity = encode(signal), event.when_ms, event.identity
        own, place = (identity.mode == "backtest", signal.signal_id), _recent_key(identity)
        signals[own] = Write(STORAGE, own, value, when=when_ms)
        last[place] = Write(RECENT, place, value, when=when_ms)
    return [*signals.values(), *last.values()]


class Storage:
    """Every signal with its latest state: `kit.records.storage`."""

    def __init__(self, scope: ScopeOf) -> None:
        self._scope = scope

    async def get(
        self,
        signal_id: str,
        *,
        mode: Mode = "live",
        run_id: str | None = None,
        when: datetime | str | int | None = None,
    ) -> StoredSignal | None:
        """The signal of that id, or None. With `when`, one that has changed since is not there.

        Raises:
            UserError: a backtest without its run id.
            Damaged, RetryLater: as `Store.get`.
        """
        return _signal(await self._scope(mode, run_id, when).read(STORAGE, (mode == "backtest", signal_id)))

    async def list(
        self,
        *,
        symbol: str | None = None,
        strategy_name: str | None = None,
        status: Status | None = None,
        limit: int | None = None,
        mode: Mode = "live",
        run_id: str | None = None,
        when: datetime | str | int | None = None,
    ) -> list[StoredSignal]:
        """The signals that are all of this, the one that changed last first; no more than `limit`.

        Raises:
            UserError: a backtest without its run id, or `limit` is below 0.
            Damaged, RetryLater: as `Store.scan`.
        """

        def wanted(signal: StoredSignal) -> bool:
            return (
                symbol in (None, signal.symbol)
                and strategy_name in (None, signal.strategy_name)
                and status in (None, signal.status)
            )

        scope = self._scope(mode, run_id, when)
        return await newest(scope, STORAGE, (mode == "backtest",), StoredSignal, wanted, limit)


class Recent:
    """The last signal of a strategy on a symbol: `kit.records.recent`."""

    def __init__(self, scope: ScopeOf) -> None:
        self._scope = scope

    async def get(
        self,
        *,
        symbol: str,
        strategy_name: str,
        exchange_name: str,
        frame_name: str = "",
        mode: Mode = "live",
        run_id: str | None = None,
        when: datetime | str | int | None = None,
    ) -> StoredSignal | None:
        """The last signal there, as it is now, or None. With `when`, one that came or changed later is not there.

        Raises:
            UserError: a backtest without its run id.
            Damaged, RetryLater: as `Store.get`.
        """
        identity = Identity(symbol, strategy_name, exchange_name, frame_name, mode)
        return _signal(await self._scope(mode, run_id, when).read(RECENT, _recent_key(identity)))


async def newest(
    scope: Scope, row: Contract, prefix: Key, kind: type[S], wanted: Callable[[S], bool], limit: int | None
) -> list[S]:
    """What this moment sees of a feed as far as it is `wanted`, the newest first; no more than `limit`, of 0 none.

    Raises:
        UserError: `limit` is below 0.
        Damaged, RetryLater: as `Store.scan`.
    """
    check_limit(limit)
    if limit == 0:
        return []
    # Where the end is not told, some stores look at the name of every record first: a second for a million.
    for most in (None,) if limit is None else (_AHEAD * limit, None):
        found: list[S] = []
        count = 0
        async for record in scope.store(row).scan(row, prefix, limit=most, newest_first=True):
            count += 1
            if scope.sees(record) and wanted(each := decode_as(kind, record.value)):
                found.append(each)
                if len(found) == limit:
                    return found
        if most is None or count < most:
            break
    return found


def follows(write: Write, found: Record) -> bool:
    """Whether a write says what came after what is there: by its time.

    But a signal that is over stays over, and is so from then on, although the clock was set back meanwhile.
    """
    (signal_id, is_over), (found_id, was_over) = _outcome(write.value), _outcome(found.value)
    if signal_id == found_id and is_over != was_over:
        return is_over
    return not found.later_than(write.when)


def _outcome(value: Plain) -> tuple[Plain, bool]:
    """Of which signal a value is, and whether that is over."""
    fields = value if isinstance(value, dict) else {}
    return fields.get("signalId"), fields.get("status") in _OVER


def _signal(record: Record | None) -> StoredSignal | None:
    if record is None:
        return None
    return decode_as(StoredSignal, record.value)


def _recent_key(identity: Identity) -> Key:
    return (
        identity.strategy_name,
        identity.exchange_name,
        identity.frame_name,
        identity.symbol,
        identity.mode == "backtest",
    )


def _resting(
    entry: RestingEntry, status: Status, when_ms: int, price: float, reason: str | None = None
) -> StoredSignal:
    return StoredSignal(
        signal_id=entry.signal_id,
        symbol=entry.symbol,
        strategy_name=entry.strategy_name,
        exchange_name=entry.exchange_name,
        frame_name=entry.frame_name,
        status=status,
        position=entry.position,
        price_open=entry.price_open,
        price_take_profit=entry.price_take_profit,
        price_stop_loss=entry.price_stop_loss,
        original_price_open=entry.price_open,
        original_price_take_profit=entry.price_take_profit,
        original_price_stop_loss=entry.price_stop_loss,
        minutes=entry.minutes,
        cost=entry.cost,
        total_entries=0,
        total_reductions=0,
        scheduled_at_ms=entry.scheduled_at_ms,
        closed_at_ms=when_ms if status == "cancelled" else None,
        updated_at_ms=when_ms,
        current_price=price,
        close_reason=reason,
        note=entry.note,
    )


def _open(position: Position, when_ms: int, price: float) -> StoredSignal:
    return StoredSignal(
        signal_id=position.signal_id,
        symbol=position.symbol,
        strategy_name=position.strategy_name,
        exchange_name=position.exchange_name,
        frame_name=position.frame_name,
        status="opened",
        position=position.position,
        price_open=position.price_open,
        price_take_profit=position.take_profit,
        price_stop_loss=position.stop_loss,
        original_price_open=position.price_open,
        original_price_take_profit=position.price_take_profit,
        original_price_stop_loss=position.price_stop_loss,
        minutes=position.minutes,
        cost=position.cost,
        total_entries=len(position.entries),
        total_reductions=len(position.reductions),
        scheduled_at_ms=position.scheduled_at_ms,
        opened_at_ms=position.opened_at_ms,
        updated_at_ms=when_ms,
        current_price=price,
        peak_pct=position.peak.pnl_pct,
        fall_pct=position.fall.pnl_pct,
        note=position.note,
    )


def _closed(trade: Trade, when_ms: int, price: float) -> StoredSignal:
    return StoredSignal(
        signal_id=trade.signal_id,
        symbol=trade.symbol,
        strategy_name=trade.strategy_name,
        exchange_name=trade.exchange_name,
        frame_name=trade.frame_name,
        status="closed",
        position=trade.position,
        price_open=trade.price_open,
        price_take_profit=trade.price_take_profit,
        price_stop_loss=trade.price_stop_loss,
        original_price_open=trade.original_price_open,
        original_price_take_profit=trade.original_price_take_profit,
        original_price_stop_loss=trade.original_price_stop_loss,
        minutes=None,
        cost=trade.cost,
        total_entries=len(trade.entries),
        total_reductions=len(trade.reductions),
        scheduled_at_ms=trade.scheduled_at_ms,
        opened_at_ms=trade.opened_at_ms,
        closed_at_ms=trade.closed_at_ms,
        updated_at_ms=when_ms,
        current_price=price,
        pnl_pct=trade.pnl_pct,
        pnl_cost=trade.pnl_cost,
        peak_pct=trade.peak_pct,
        fall_pct=trade.fall_pct,
        close_reason=trade.close_reason,
        note=trade.note,
        close_note=trade.close_note,
    )
