"""A lease for as long as a run needs it: renewed next to the work, which ends when the lease is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from backtest_kit.errors import BacktestKitError, OutOfSpace
from backtest_kit.persist.lease import Lapsed, Lease

_log = logging.getLogger("backtest_kit")


async def renew_forever(lease: Lease) -> None:
    """Renew the lease until this is cancelled.

    Raises:
        Conflict: another process has it, or it could not be renewed in time.
    """
    while True:
        try:
            await lease.keep()
        except OutOfSpace as error:
            # The store has compared the revision before it found no room: no other process has the lease.
            _log.warning("the lease could not be renewed, and is tried again: %s", error)


async def renew_through_lapses(lease: Lease) -> None:
    """Renew the lease until this is cancelled, also one that has lapsed because its store was away. For work that
    confirms the lease before each step that cannot be undone.

    Raises:
        Conflict: another process has it.
    """
    while True:
        with suppress(Lapsed):  # reported by the work, which confirms
            await renew_forever(lease)


async def release_quietly(lease: Lease) -> None:
    """Released, unless the store cannot be reached: it lapses then."""
    try:
        await lease.release()
    except BacktestKitError as error:
        _log.warning("the lease could not be released, it lapses by itself: %s", error)


async def beside(keeper: Coroutine[Any, Any, None], work: Coroutine[Any, Any, None]) -> None:
    """Do `work` while `keeper` goes on; an error of the keeper ends the work immediately, and is raised."""
    keeping, working = asyncio.ensure_future(keeper), asyncio.ensure_future(work)
    both = {keeping, working}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in both:
            each.cancel()
        while not (keeping.done() and working.done()):
            with suppress(asyncio.CancelledError):
                await asyncio.wait(both)
    if not keeping.cancelled() and (error := keeping.exception()) is not None:
        raise error
    working.result()
