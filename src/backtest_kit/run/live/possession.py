"""The right to trade a position: the lease of the store, and for real orders the lock of the account."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, TypeVar

from backtest_kit.errors import RetryLater
from backtest_kit.persist.binding import Persistence
from backtest_kit.persist.contracts import LEASE
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.lease import Lease, acquire
from backtest_kit.persist.possession import release_quietly
from backtest_kit.persist.store_id import claim_store_id
from backtest_kit.run.live.account_lock import account_locked
from backtest_kit.run.live.job import LiveJob

T = TypeVar("T")
_AGAIN_S: Final = 1.0
"""The pause before a store or an exchange that is away is tried again."""
_log = logging.getLogger("backtest_kit")


class Patience:
    """Tries each step of a start again for as long as a store or the exchange is away or too slow."""

    def __init__(self, symbol: str) -> None:
        self._symbol = symbol
        self.reason = ""
        """Why the start waits; empty while it does not."""

    async def __call__(self, step: Callable[[], Awaitable[T]]) -> T:
        """What the step returns. Raises what it raises, but `RetryLater`."""
        while True:
            try:
                result = await step()
            except RetryLater as error:
                if not self.reason:
                    _log.warning("the start of %s waits: %s", self._symbol, error)
                self.reason = str(error)
            else:
                self.reason = ""
                return result
            await asyncio.sleep(_AGAIN_S)


@asynccontextmanager
async def possessed(job: LiveJob, persistence: Persistence, patience: Patience) -> AsyncIterator[Lease]:
    """Own the position while the block runs.

    Raises:
        Conflict: another process trades it, or another store trades the symbol of the account.
        Damaged, OutOfSpace: as `Store.put`.
    """
    mode = job.identity.mode
    async with AsyncExitStack() as stack:
        lease = await patience(
            lambda: acquire(
                lambda row: persistence.store_for(row, mode), job.scope, ttl=job.lease_ttl_s, seams=persistence.seams
            )
        )
        stack.push_async_callback(release_quietly, lease)
        crashpoint("live.start.after_lease")
        if mode == "live":
            await patience(lambda: stack.enter_async_context(_account(job, persistence)))
        yield lease


@asynccontextmanager
async def _account(job: LiveJob, persistence: Persistence) -> AsyncIterator[None]:
    """The right to send orders from this store: they carry its id, and no other store of this machine trades the
    symbol of the account."""
    store = persistence.store_for(LEASE, "live")
    # After the lease, which a store refuses until its migration is complete: it gets its id from the migration.
    job.broker.store_id = await claim_store_id(store, persistence.seams)
    async with account_locked(
        job.broker.account(),
        job.identity.symbol,
        store=store,
        store_id=job.broker.store_id,
        strategy_name=job.identity.strategy_name,
    ):
        yield
