"""The positions of the other strategies in the store, whether their processes run or not."""

from __future__ import annotations

from collections.abc import Collection

from backtest_kit.engine.step import Flat, Holding
from backtest_kit.model.identity import Mode
from backtest_kit.persist.binding import Persistence
from backtest_kit.persist.contracts import CONTRACTS, LEASE
from backtest_kit.persist.lease import Sightings
from backtest_kit.persist.store import Key
from backtest_kit.run.live.known_records import KnownRecords
from backtest_kit.run.live.position_state import PositionState
from backtest_kit.run.live.position_store import read_position_state


class OtherPositions:
    """The position states of other strategies, and which of them are traded now."""

    def __init__(self, persistence: Persistence, mode: Mode, scope: Key) -> None:
        self._persistence, self._mode, self._scope = persistence, mode, scope
        self._sightings = Sightings(persistence.seams)

    async def read(self, but: Collection[Key]) -> dict[Key, PositionState]:
        """All by their keys, without those in `but`.

        Raises:
            Damaged: one of them cannot be trusted.
            RetryLater: the store does not answer.
        """
        row = CONTRACTS["strategy"]
        found = [each.key async for each in self._persistence.store_for(row, self._mode).scan(row)]
        keys = [key for key in found if key not in but]
        return {key: await read_position_state(KnownRecords(self._persistence, self._mode), key) for key in keys}

    async def trader(self, but: Collection[Key]) -> str:
        """The strategy that a process trades on the same exchange and symbol now, in words; empty if none.

        Raises:
            Damaged, RetryLater: as `read`.
        """
        async for found in self._persistence.store_for(LEASE, self._mode).scan(LEASE):
            if found.key[1:] != self._scope[1:] or found.key in but:
                continue
            holder = self._sightings.living(found)
            if holder is not None:
                return f"strategy {found.key[0]} trades {found.key[2]} on {found.key[1]}: {holder}"
        return ""


def claim_of(key: Key, found: PositionState) -> str:
    """What a strategy has on the exchange, in words; empty if nothing."""
    if found.intent is not None:
        has = "has a pending order"
    elif isinstance(found.state, Flat):
        return ""
    else:
        has = "holds a position" if isinstance(found.state, Holding) else "has a resting entry"
    return f"strategy {key[0]} {has} of {key[2]} on {key[1]}"
