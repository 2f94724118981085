"""Whose a position on the venue is that the books of a run do not know: perhaps another strategy's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final, Protocol

import msgspec

from backtest_kit.broker.base import Holding
from backtest_kit.broker.order_ids import digest_of
from backtest_kit.errors import BacktestKitError
from backtest_kit.persist.codec import decode_as
from backtest_kit.persist.contracts import CONTRACTS, LEASE
from backtest_kit.persist.lease import Sightings, StoreOf
from backtest_kit.persist.store import Key, Plain
from backtest_kit.run.orders import Intent, signal_id_of

_HELD_BY: Final = {
    "signal": "holds a position",
    "schedule": "has a resting entry",
    "strategy": "has an order under way",
}


class _Held(msgspec.Struct, rename="camel"):
    """What a position and a resting entry have in common."""

    signal_id: str


class _Sending(msgspec.Struct):
    """What a book says of the order that is under way."""

    intent: Intent | None = None


class Claims(Protocol):
    """Who else may have what the venue holds."""

    async def of(self, held: Holding) -> str:
        """Who, in words; empty where nobody does."""
        ...


class StoredClaims:
    """What the stores say of other strategies: what they hold, and which of them are traded now.

    A strategy claims all of the exchange and symbol that it trades, and wherever it is the position whose stop bears
    the id of its signal. One that is dead and holds nothing claims nothing.
    """

    def __init__(self, store_of: StoreOf, scope: Key) -> None:
        self._store_of = store_of
        self._scope = scope
        self._sightings = Sightings()

    async def of(self, held: Holding) -> str:
        try:
            async for key, signal_id, how in self._books():
                if self._is_here(key) or (
                    signal_id and held.signal_id and digest_of(signal_id) == digest_of(held.signal_id)
                ):
                    return f"strategy {key[0]} {how} of {key[2]} on {key[1]}"
            async for found in self._store_of(LEASE).scan(LEASE):
                if self._is_here(found.key) and (holder := self._sightings.living(found)) is not None:
                    return f"strategy {found.key[0]} trades {found.key[2]} on {found.key[1]}: {holder}"
        except BacktestKitError as error:
            return f"nobody knows whose it is: {error}"
        return ""

    async def _books(self) -> AsyncIterator[tuple[Key, str, str]]:
        """Every other strategy that has something: where, of which signal, and what."""
        for name, how in _HELD_BY.items():
            row = CONTRACTS[name]
            async for found in self._store_of(row).scan(row):
                signal_id = _signal_id(name, found.value)
                if signal_id is not None and found.key != self._scope:
                    yield found.key, signal_id, how

    def _is_here(self, key: Key) -> bool:
        return key != self._scope and key[1:] == self._scope[1:]


def _signal_id(name: str, value: Plain) -> str | None:
    """The signal of what a record says is held or under way; None where it says of nothing."""
    if value is None:
        return None
    if name != "strategy":
        return decode_as(_Held, value).signal_id
    intent = decode_as(_Sending, value).intent
    return None if intent is None else signal_id_of(intent.target)
