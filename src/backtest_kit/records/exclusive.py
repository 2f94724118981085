"""`exclusive_run`: a run with an id of the user's own is replayed by one process at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from backtest_kit.model.identity import Identity
from backtest_kit.persist.holder import is_neighbour
from backtest_kit.persist.lease import claim, keeps_claims
from backtest_kit.persist.possession import release_quietly, renew_forever
from backtest_kit.persist.store import Store
from backtest_kit.seams import SYSTEM, Seams

TTL_S: Final = 60.0
"""Long, because a thousand runs at once have much to renew."""


@asynccontextmanager
async def exclusive_run(
    store: Store, run_id: str, identity: Identity, seams: Seams = SYSTEM
) -> AsyncIterator[asyncio.Task[None] | None]:
    """Own the run of a strategy on a symbol: two processes would overwrite each other's records.

    The task that it yields raises `Conflict` when the run is lost. It is None if no other process can have the run,
    because the store ends with this one.

    Raises:
        Conflict: another process replays it; the message names it.
        Damaged, OutOfSpace, RetryLater: as `Store.put`.
    """
    if not keeps_claims(store):
        yield None
        return
    async with AsyncExitStack() as stack:
        lease = await claim(
            store,
            "run",
            (run_id, *owned_by(identity)),
            what=f"run {run_id!r} of strategy {identity.strategy_name!r} for {identity.symbol}",
            doing="is already running in",
            ttl=TTL_S,
            seams=seams,
            watches=lambda holder: not is_neighbour(holder),  # one on this machine does not end in the next moment
            remedy="two at once would overwrite each other's records; wait for it, or choose another run_id",
        )
        stack.push_async_callback(release_quietly, lease)
        keeper = asyncio.create_task(renew_forever(lease), name=f"lease of run {run_id}")
        stack.push_async_callback(_ended, keeper)
        yield keeper


def owned_by(identity: Identity) -> tuple[str, str, str]:
    """The owner of state and memory of a run, in any frame."""
    return identity.strategy_name, identity.exchange_name, identity.symbol


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # retrieved, if the run ended before it could be raised
