"""Who trades a position: one process at a time, by compare-and-set in the store itself.

A lease is a record that its owner rewrites every third of its `ttl`. Nobody's wall clock decides anything:

- A lease has lapsed for a process that has seen the same revision for a whole `ttl` of its own monotonic
  clock. If the revision moves meanwhile, the owner lives, and `acquire` gives up at once.
- An owner on the same machine whose process is gone needs no waiting: a bot that was killed restarts at once.
- The owner takes a lease for lapsed when a whole `ttl` of its own clock has passed since it began the last
  renewal that went through. It sends nothing from then on, until the store answers and still names it.

An owner that was paused and does not know it is stopped twice. Before it sends an order it must `confirm` that
nobody has taken the lease. And the store refuses what it writes: who takes a lease over
without its having been released rewrites every money record of the position, absent ones included, before
`acquire` returns. What the old owner still writes expects the old revision and is refused with `Conflict`.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from backtest_kit.errors import Conflict, Damaged, OutOfSpace, RetryLater, UserError
from backtest_kit.model.interval import iso
from backtest_kit.persist.contracts import CONTRACTS, LEASE, MIGRATION, MIGRATION_KEY, Contract, Durability
from backtest_kit.persist.store import ABSENT, Capability, Key, Record, Store, Write
from backtest_kit.persist.writing import now_ms

_ELAPSED: Final = getattr(time, "CLOCK_BOOTTIME", None)
DEFAULT_TTL: Final = 15.0
"""Seconds after which a lease that nobody renews has lapsed."""

StoreOf = Callable[[Contract], Store]
"""Which store keeps a contract: `lambda row: persistence.store_for(row, "live")`."""

_GUARDED: Final = tuple(
    row
    for row in CONTRACTS.values()
    if row.durability is Durability.MONEY and row.key_fields[: len(LEASE.key_fields)] == LEASE.key_fields
)
"""Every money contract that belongs to one position. Risk is shared by positions, and compares anyway."""


class Holder(msgspec.Struct, frozen=True, rename="camel"):
    """What is stored of an owner."""

    owner: str
    """Random, so that no two acquisitions are ever the same."""
    pid: int
    host: str
    since: int
    """Wall clock of the acquisition, epoch ms, for people."""
    ttl_ms: int
    machine: str
    """Boot and process namespace: where equal and not empty, `pid` names a process that can be looked for."""
    started: str
    """When the process started, in the words of its kernel: tells it from a later one of the same pid."""
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {iso(self.since // 1000 * 1000)}"


class Lease:
    """A position that this process may trade. Made by `acquire`."""

    def __init__(self, store: Store, record: Record, holder: Holder, renewed_at: float, clock: Clock) -> None:
        self.scope: Final = record.key
        self.holder: Final = holder
        self._store = store
        self._rev = record.rev
        self._renewed_at = renewed_at
        self._clock = clock

    @property
    def token(self) -> int:
        """Revision of the lease: grows with every renewal and every owner."""
        return self._rev

    @property
    def held(self) -> bool:
        """Whether the owner may still think so: false once a whole `ttl` has passed without a renewal."""
        return self._left() > 0

    def _left(self) -> float:
        """Seconds for which nobody else can have it."""
        return self._renewed_at + self.holder.ttl_ms / 1000 - self._clock.now()

    async def confirm(self) -> None:
        """Make sure that nobody else has the lease: the last thing before something that cannot be taken back.

        A third of the `ttl` is left for that at least. Asks the store only where the last renewal is too long ago,
        as after this process was paused.

        Raises:
            Conflict: another process has it; stop trading the position.
            RetryLater: nobody knows, because it has lapsed and the store does not answer; send nothing now.
        """
        if self._left() >= self.holder.ttl_ms / 3000:
            return
        try:
            await self.renew()
        except OutOfSpace:
            # A full disk takes no renewal, and nobody else's either; who has the lease can still be read.
            await self._require_own()
        except RetryLater as error:
            if not self.held:
                raise RetryLater(
                    f"the lease of {_name(self.scope)} has lapsed and the store does not answer ({error}): nothing is "
                    "sent until it does, another process may trade this position"
                ) from error

    async def renew(self) -> None:
        """Prolong the lease by another `ttl`.

        Raises:
            Conflict: another process has it; stop trading the position.
            RetryLater: the store could not be asked; the lease is good for as long as `held` says.
        """
        started = self._clock.now()
        await self._rewrite(self.holder)
        self._renewed_at = max(self._renewed_at, started)

    async def keep(self) -> None:
        """Renew for ever: run it beside the trading, and stop that when this raises.

        A store that does not answer is asked on; what may be done meanwhile `confirm` says.

        Raises:
            Conflict: another process has the lease.
        """
        while True:
            await self._clock.sleep(self.holder.ttl_ms / 3000)
            with suppress(RetryLater):
                await self.renew()

    async def release(self) -> None:
        """Give the lease back, so that the next owner need not wait. One that is lost already stays lost."""
        self._renewed_at = -math.inf
        try:
            await self._rewrite(msgspec.structs.replace(self.holder, released=True))
        except Conflict:
            return

    async def _rewrite(self, holder: Holder) -> None:
        if os.getpid() != self.holder.pid:
            raise Conflict(f"the lease of {_name(self.scope)} belongs to {self.holder}, not to its forks")
        while True:
            try:
                self._rev = (await self._store.put(_write(self.scope, holder, self._rev))).rev
                return
            except Conflict:
                # An earlier renewal whose outcome was unknown, or one at the same time, may have gone through.
                self._rev = (await self._require_own()).rev

    async def _require_own(self) -> Record:
        found = await self._store.get(LEASE, self.scope)
        if found is None or _holder(found).owner != self.holder.owner:
            self._renewed_at = -math.inf
            raise await _refusal(self._store, self.scope) from None
        return found


class Clock:
    """The elapsed time of this machine, also while it sleeps where the system counts that: others do not sleep."""

    def now(self) -> float:
        return time.clock_gettime(_ELAPSED) if _ELAPSED is not None else time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def acquire(store_of: StoreOf, scope: Key, *, ttl: float = DEFAULT_TTL, clock: Clock | None = None) -> Lease:
    """The lease of the position `scope`: strategy, exchange, symbol.

    Returns at once if the position is free, was released, or its owner died on this machine. Otherwise it
    watches the lease for at most the `ttl` that its owner chose.

    Raises:
        Conflict: another process owns it; the message names its pid, host and since when. Or the store is half
            of a migration, and does not have every position yet.
        UserError: the store has no compare-and-set.
        Damaged, OutOfSpace, RetryLater: as `Store.put`.
    """
    clock = clock or Clock()
    store = _comparing(store_of, LEASE)
    await _require_migrated(store)
    found = await store.get(LEASE, scope)
    if found is not None and not _holder(found).released:
        found = await _wait(store, found, clock)
    holder = Holder(
        owner=secrets.token_hex(16),
        pid=os.getpid(),
        host=socket.gethostname(),
        since=now_ms(),
        ttl_ms=round(ttl * 1000),
        machine=_machine(),
        started=_state_of(os.getpid())[1],
    )
    started = clock.now()
    try:
        record = await store.put(_write(scope, holder, ABSENT if found is None else found.rev))
    except Conflict:
        raise await _refusal(store, scope) from None
    if found is not None and not _holder(found).released:
        await _fence(store_of, scope)
    return Lease(store, record, holder, started, clock)


async def _require_migrated(store: Store) -> None:
    checkpoint = await store.get(MIGRATION, MIGRATION_KEY)
    if checkpoint is not None and not checkpoint.removed:
        raise Conflict(
            "the store is half of a migration and does not have every position yet: complete it with "
            "`backtest-kit store migrate SOURCE TARGET --resume` before trading"
        )


async def require_idle(store: Store, *, clock: Clock | None = None) -> None:
    """Do nothing if no process trades a position that is in `store`.

    Returns at once if every lease was released or its owner died on this machine; the others it watches, all
    at once, for at most the `ttl` that their owners chose.

    Raises:
        Conflict: a process does; the message names its pid, host and since when.
        Damaged, RetryLater: as `Store.scan`.
    """
    clock = clock or Clock()
    try:
        async with asyncio.TaskGroup() as group:
            async for found in store.scan(LEASE):
                if not _holder(found).released:
                    group.create_task(_wait(store, found, clock))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def owners(store: Store) -> list[tuple[Key, Holder]]:
    """The positions in `store` of which nobody has released the lease, with whoever took it, dead or alive.

    Raises:
        Damaged, RetryLater: as `Store.scan`.
    """
    found = [(record.key, _holder(record)) async for record in store.scan(LEASE)]
    return [(scope, holder) for scope, holder in found if not holder.released]


class Sightings:
    """Which owners live, by what was seen of their leases: one that did not move for a `ttl` has lapsed."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or Clock()
        self._seen: dict[Key, tuple[int, float]] = {}

    def living(self, found: Record) -> Holder | None:
        """The owner of a lease, unless it was released, has lapsed or its process of this machine is gone.

        Raises:
            Damaged: it is no lease.
        """
        holder, now = _holder(found), self._clock.now()
        if holder.released or _is_gone(holder):
            return None
        rev, since = self._seen.get(found.key, (-1, now))
        if rev != found.rev:
            self._seen[found.key] = found.rev, now
        elif now - since >= holder.ttl_ms / 1000:
            return None
        return holder


async def _wait(store: Store, found: Record, clock: Clock) -> Record:
    """The record of a lease that is free to take now."""
    holder = _holder(found)
    until = clock.now() + holder.ttl_ms / 1000
    while not _is_gone(holder) and (left := until - clock.now()) > 0:
        await clock.sleep(min(left, holder.ttl_ms / 10_000))
        now = await store.get(LEASE, found.key)
        if now is None or now.rev != found.rev:
            if now is not None and _holder(now).released:
                return now
            raise await _refusal(store, found.key)
    return found


async def _fence(store_of: StoreOf, scope: Key) -> None:
    """Move on the revision of every money record of `scope`.

    A record per signal that the old owner makes afterwards is not caught, but means nothing: it belongs to
    a signal that it can no longer write.
    """
    for row in _GUARDED:
        store = _comparing(store_of, row)
        keys = [scope]
        if row.key_fields != LEASE.key_fields:
            listable = Capability.ORDERED_SCAN in store.capabilities
            records = store.scan(row, scope, include_removed=True) if listable else None
            keys = [] if records is None else [record.key async for record in records]
        for key in keys:
            await _move_on(store, row, key)


async def _move_on(store: Store, row: Contract, key: Key) -> None:
    while True:
        found = await store.get(row, key)
        if found is None:
            write = Write(row, key, None, expect=ABSENT)
        else:
            write = Write(row, key, found.value, when=found.when, expect=found.rev, removed=found.removed)
        try:
            await store.put(write)
            return
        except Conflict:
            continue


def _comparing(store_of: StoreOf, row: Contract) -> Store:
    store = store_of(row)
    if Capability.COMPARE_AND_SET not in store.capabilities:
        raise UserError(
            f"the store of {row.name} has no compare-and-set, so it cannot keep two processes apart: "
            "bind another one for live trading"
        )
    return store


def _write(scope: Key, holder: Holder, expect: int | str) -> Write:
    return Write(LEASE, scope, msgspec.to_builtins(holder), expect=ABSENT if isinstance(expect, str) else expect)


def _holder(record: Record) -> Holder:
    try:
        return msgspec.convert(record.value, Holder)
    except msgspec.ValidationError as error:
        raise Damaged(f"the lease of {_name(record.key)} is not one of this program: {error}") from None


async def _refusal(store: Store, scope: Key) -> Conflict:
    found = await store.get(LEASE, scope)
    holder = None if found is None else _holder(found)
    if holder is None or holder.released:
        return Conflict(f"{_name(scope)} was taken by another process meanwhile: try again")
    return Conflict(
        f"{_name(scope)} is traded by {holder}: stop that process; "
        f"if it is dead, its lease lapses {holder.ttl_ms / 1000:g} s after its last renewal"
    )


def _name(scope: Key) -> str:
    strategy, exchange, symbol = scope
    return f"{symbol} on {exchange} by {strategy}"


def _is_gone(holder: Holder) -> bool:
    """Whether the owner is a process of this machine that has ended."""
    if not holder.machine or holder.machine != _machine():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    state, started = _state_of(holder.pid)
    return bool(state) and (state in "ZX" or started != holder.started)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _state_of(pid: int) -> tuple[str, str]:
    """State letter and start time of a process; both empty where the kernel does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
