"""`Place`: up to where a sink has got everything, and which process delivers the rest.

Both are kept in the store, under the name of the sink and where it sends to. Of the processes that have the store
and such a sink one delivers what all of them tell; when it ends, or dies, another one goes on at the same place.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec

from backtest_kit.errors import BacktestKitError, Conflict
from backtest_kit.persist.codec import decode_as, encode
from backtest_kit.persist.lease import Lease, claim, keeps_claims
from backtest_kit.persist.possession import release_quietly, renew_forever
from backtest_kit.persist.store import Key, Record, Store, Write
from backtest_kit.persist.writing import now_ms
from backtest_kit.records.scope import expectation
from backtest_kit.records.state import STATE

OWNER: Final = "notification sinks"
"""Whose state the places of the sinks are; no signal is called so."""
PAUSE_S: Final = 1.0
"""After which a store that does not answer is asked for the lease again."""
LEAVE_S: Final = 5.0
"""How long a store may take to be given the lease back."""

_log = logging.getLogger(__name__)


class Reached(msgspec.Struct, frozen=True, rename="camel"):
    """The last notification that a sink has got."""

    since_ms: int
    """Wall clock: what was written before this sink was there is not for it."""
    last_id: str = ""
    lately: tuple[str, ...] = ()
    """The last ones that it has got, the oldest first: what lies between them and is none of them has come in late."""


class Place:
    """The place of one sink in one mode."""

    def __init__(self, store: Store, name: str, destination: str, tell: Callable[[], None]) -> None:
        """`tell` is called when this process is the one that delivers."""
        self._store = store
        self._name = name
        self._destination = destination
        self._tell = tell
        self._key: Key = (OWNER, f"{name} {destination}" if destination else name)
        self._born_ms = now_ms()
        self._record: Record | None = None
        self._lease: Lease | None = None
        self._known = asyncio.Event()
        """Whether anybody else delivers has been found out."""
        self._holding: asyncio.Task[None] | None = None
        self.is_shared: Final = keeps_claims(store)
        """Whether other processes may tell something that is to be delivered here."""

    async def find(self) -> Reached:
        """Where the sink is. One that was never there begins now. Raises as `Store.put`."""
        if self._record is None:
            record = await self._store.get(STATE, self._key)
            self._record = record if record is not None else await self._put(Reached(self._born_ms), None)
        return decode_as(Reached, self._record.value)

    async def move(self, reached: Reached) -> None:
        """Everything up to here was delivered.

        Raises:
            Conflict: another process has moved it meanwhile.
            Others: as `Store.put`.
        """
        found, self._record = self._record, None  # until it has gone through nobody knows what is there
        self._record = await self._put(reached, found)

    async def _put(self, reached: Reached, found: Record | None) -> Record:
        expect = expectation(self._store, found)
        return await self._store.put(Write(STATE, self._key, encode(reached), expect=expect))

    def start(self) -> None:
        """Try to be the process that delivers, until `leave`."""
        if self.is_shared and self._holding is None:
            self._known.clear()
            self._holding = asyncio.create_task(self._hold(), name=f"lease of notifications to {self._name}")

    async def is_mine(self) -> bool:
        """Whether this process is the one that delivers: to be asked before each delivery."""
        if not self.is_shared:
            return True
        if self._lease is None:
            return False
        try:
            await self._lease.confirm()
        except Conflict:
            self._lease = None
            return False
        return True

    async def known(self) -> None:
        """Wait until it has been found out whether another process delivers."""
        if self.is_shared:
            await self._known.wait()

    async def leave(self) -> None:
        """Let another process deliver."""
        task, self._holding = self._holding, None
        lease = self._lease
        try:
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        finally:
            if lease is not None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LEAVE_S):
                        await release_quietly(lease)

    async def _hold(self) -> None:
        """Have the lease, or wait for whoever has it, without end."""
        patient, failures = False, 0
        while True:
            try:
                self._lease = await self._claim(patient=patient)
                failures = 0
                self._record = None  # it may have been moved by whoever delivered before
                self._known.set()
                self._tell()
                await renew_forever(self._lease)
            except Conflict as error:
                if self._lease is not None or not patient:
                    _log.info("sink %s: another process delivers to it: %s", self._name, error)
                patient = True
            except Exception as error:  # whatever a store raises, it may answer later
                failures += 1
                if failures == 1 or failures % 60 == 0:
                    why = error if isinstance(error, BacktestKitError) else type(error).__name__
                    _log.warning("sink %s: nobody knows which process delivers to it: %s", self._name, why)
                self._known.set()
                await asyncio.sleep(PAUSE_S)
            finally:
                self._lease = None
                self._known.set()

    async def _claim(self, *, patient: bool) -> Lease:
        return await claim(
            self._store,
            "sink",
            (self._name, self._destination),
            what=f"sink {self._name!r}",
            doing="is delivered to by",
            remedy="this process goes on with it once that one has ended",
            watches=lambda holder: patient,
        )
