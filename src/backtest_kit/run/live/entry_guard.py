"""Nothing is opened until the store and the exchange agree: they are compared at every minute."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from backtest_kit.errors import Conflict
from backtest_kit.format import error_text
from backtest_kit.model.event import OrphanFound
from backtest_kit.persist.store import Key
from backtest_kit.run.live.flags import RunFlags
from backtest_kit.run.live.job import LiveJob
from backtest_kit.run.live.order_manager import OrderManager
from backtest_kit.run.live.orphans import Findings, OrphanGuard
from backtest_kit.run.live.position_state import PositionState
from backtest_kit.run.live.position_store import PositionStore
from backtest_kit.run.run_state import RunState

_log = logging.getLogger("backtest_kit")


class Neighbour(Protocol):
    """A run that trades the same symbol in this process."""

    job: LiveJob
    run_state: RunState
    position_store: PositionStore
    guard: OrphanGuard
    began: asyncio.Event


class EntryGuard:
    """Holds back the entries of one run. The first of the runs that trade its symbol reports what is found."""

    def __init__(
        self,
        guard: OrphanGuard,
        order_manager: OrderManager,
        flags: RunFlags,
        job: LiveJob,
        neighbours: Callable[[], Sequence[Neighbour]],
    ) -> None:
        """`neighbours` returns the runs that trade the symbol, this one included, in the order of their start."""
        self._guard = guard
        self._order_manager = order_manager
        self._flags = flags
        self._job = job
        self._neighbours = neighbours

    async def compare(self, when_ms: int, *, resending: bool = False) -> Findings | None:
        """Compare the store with the exchange. Entries wait until that has succeeded and nothing unknown is found.

        `resending`: a pending entry may be sent again. That happens only if the exchange has nothing of it, so it
        explains nothing of what the exchange holds.

        Raises:
            Conflict: another process has the position.
        """
        try:
            if resending:
                found = await self._guard.compare(
                    when_ms, lambda: {**self._position_states(), self._job.scope: self._order_manager.unsent}
                )
            else:
                found = await self._neighbours()[0].guard.compare_once(when_ms, self._position_states)
        except Conflict:
            raise
        except Exception as error:
            reason = f"the exchange and the store could not be compared: {error_text(error)}"
            if reason != self._flags.no_entry:
                _log.warning("nothing is opened for %s: %s", self._job.identity.symbol, reason)
            self._flags.no_entry = reason
            return None
        self._flags.no_entry = found.no_entry
        return found

    async def find_orphans(self, when_ms: int) -> OrphanFound | None:
        """Compare, and act on what is found by the policy of the first run; returns it if it is news.

        Raises:
            Conflict: another process has the position.
        """
        found, runs = await self.compare(when_ms), self._neighbours()
        if found is None or runs[0].guard is not self._guard:
            return None
        return await self._guard.report(found, [each.run_state for each in runs[1:]])

    def _position_states(self) -> dict[Key, PositionState]:
        """Those of the runs that have been read from the store by now."""
        return {
            each.job.scope: each.position_store.position_state for each in self._neighbours() if each.began.is_set()
        }
