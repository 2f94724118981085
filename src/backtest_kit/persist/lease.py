"""Who trades a position: one process at a time, by compare-and-set in the store itself.

What else only one process may do at a time, and no money depends on, is claimed in the same way.

A lease is a record that its owner rewrites every third of its `ttl`. No wall clock decides anything:

- A lease has lapsed for a process that has seen the same revision for a whole `ttl` of its own monotonic
  clock. If the revision moves meanwhile, the owner lives, and `acquire` gives up immediately.
- An owner on the same machine whose process is gone needs no waiting: a bot that was killed restarts immediately.
- The owner treats its lease as lapsed when a whole `ttl` of its own clock has passed since it began the last
  renewal that went through. What needs the lease then waits until the store answers and still names this owner.

If the old owner was only paused and wakes up, it is stopped twice. Before it sends an order it must `confirm` that
the lease is still its own. And the store rejects its writes: a takeover of a lease that was not released rewrites
every money record of the position, absent ones included, before `acquire` returns. A write of the old owner expects
the old revision and is refused with `Conflict`.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final
from urllib.parse import quote

import msgspec

from backtest_kit.errors import BacktestKitError, Conflict, Damaged, OutOfSpace, RetryLater, UserError
from backtest_kit.persist.contracts import CLAIM, CONTRACTS, LEASE, MIGRATION, MIGRATION_KEY, Contract, Durability
from backtest_kit.persist.holder import Holder, is_gone, this_process
from backtest_kit.persist.store import ABSENT, Capability, Key, Record, Store, Write
from backtest_kit.seams import SYSTEM, Seams

DEFAULT_TTL: Final = 15.0
"""Seconds after which a lease that is not renewed has lapsed."""

StoreOf = Callable[[Contract], Store]
"""Which store keeps a contract: `lambda row: persistence.store_for(row, "live")`."""

Watches = Callable[[Holder], bool]
"""Whether it is worth while to watch the lease of a process until it lapses, or is renewed."""

_GUARDED: Final = tuple(
    row
    for row in CONTRACTS.values()
    if row.durability is Durability.MONEY and row.key_fields[: len(LEASE.key_fields)] == LEASE.key_fields
)
"""Every money contract that belongs to one position. Risk is shared by positions, and compares anyway."""


class Lapsed(Conflict):
    """A lease has lapsed and its store does not answer: its owner is unknown."""


class Subject(msgspec.Struct, frozen=True):
    """What one process does at a time."""

    row: Contract
    key: Key
    what: str
    """How it is called, and in `doing` what is done to it: "BTCUSDT on binance by trend", "is traded by"."""
    doing: str
    remedy: str
    """What the caller can do when refused: "stop that process"."""

    def __str__(self) -> str:
        return self.what


class Lease:
    """A position that this process may trade, made by `acquire`; or what else it has claimed, made by `claim`."""

    def __init__(
        self, store: Store, subject: Subject, record: Record, holder: Holder, renewed_at: float, seams: Seams
    ) -> None:
        self.scope: Final = record.key
        self.subject: Final = subject
        self.holder: Final = holder
        self._store = store
        self._rev = record.rev
        self._renewed_at = renewed_at
        self._seams = seams

    @property
    def token(self) -> int:
        """Revision of the lease: grows with every renewal and every owner."""
        return self._rev

    @property
    def held(self) -> bool:
        """Whether the owner may still think so: false once a whole `ttl` has passed without a renewal."""
        return self._left() > 0

    def _left(self) -> float:
        """Seconds for which no other process can have it."""
        return self._renewed_at + self.holder.ttl_ms / 1000 - self._seams.elapsed()

    async def confirm(self) -> None:
        """Make sure that no other process has the lease: the last step before something that cannot be undone.

        A third of the `ttl` is left for that at least. Asks the store only where the last renewal is too long ago,
        as after this process was paused.

        Raises:
            Lapsed: the owner is unknown.
            Conflict: another process has it; stop.
        """
        if self._left() >= self.holder.ttl_ms / 3000:
            return
        try:
            await self.renew()
        except OutOfSpace:
            # A full disk takes no renewal of any process; the owner can still be read.
            await self._require_own()
        except RetryLater as error:
            if not self.held:
                raise Lapsed(
                    f"the lease of {self.subject} has lapsed and the store does not answer ({error}): nothing is "
                    "sent until it does, another process may have it"
                ) from error

    async def renew(self) -> None:
        """Prolong the lease by another `ttl`.

        Raises:
            Conflict: another process has it; stop.
            RetryLater: the store could not be asked; the lease is good for as long as `held` says.
        """
        started = self._seams.elapsed()
        await self._rewrite(self.holder)
        self._renewed_at = max(self._renewed_at, started)

    async def keep(self) -> None:
        """Renew permanently: run it next to the trading, and stop that when this raises.

        Raises:
            Lapsed: it could not be renewed in time. Another call goes on trying.
            Conflict: another process has the lease.
        """
        while True:
            await self._seams.sleep(self.holder.ttl_ms / 3000)
            try:
                await self.renew()
            except RetryLater as error:
                if not self.held:
                    raise Lapsed(
                        f"the lease of {self.subject} could not be renewed for {self.holder.ttl_ms / 1000:g} s "
                        f"({error}): this process stops, another one may have it"
                    ) from error

    async def release(self) -> None:
        """Give the lease back, so that the next owner need not wait. One that is lost already stays lost."""
        self._renewed_at = -math.inf
        try:
            await self._rewrite(msgspec.structs.replace(self.holder, released=True))
        except Conflict:
            return

    async def _rewrite(self, holder: Holder) -> None:
        if os.getpid() != self.holder.pid:
            raise Conflict(f"the lease of {self.subject} belongs to {self.holder}, not to its forks")
        while True:
            try:
                self._rev = (await self._store.put(_write(self.subject, holder, self._rev))).rev
                return
            except Conflict:
                # An earlier renewal whose outcome was unknown, or one at the same time, may have gone through.
                self._rev = (await self._require_own()).rev

    async def _require_own(self) -> Record:
        found = await self._store.get(self.subject.row, self.scope)
        if found is None or _holder(self.subject, found).owner != self.holder.owner:
            self._renewed_at = -math.inf
            raise await _refusal(self._store, self.subject) from None
        return found


async def acquire(store_of: StoreOf, scope: Key, *, ttl: float = DEFAULT_TTL, seams: Seams = SYSTEM) -> Lease:
    """The lease of the position `scope`: strategy, exchange, symbol.

    Returns immediately if the position is free, was released, or its owner died on this machine. Otherwise it
    watches the lease for at most the `ttl` that its owner chose.

    Raises:
        Conflict: another process owns it; the message names its pid, host and since when. Or the store is half
            of a migration, and does not have every position yet.
        UserError: the store does not support compare-and-set.
        Damaged, OutOfSpace, RetryLater: as `Store.put`.
    """
    store = _comparing(store_of, LEASE)
    await _require_migrated(store)
    lease, left = await _take(store, _position(scope), ttl, seams, lambda holder: True)
    if left is not None and not _holder(lease.subject, left).released:
        await _fence(store_of, scope)
    return lease


async def claim(
    store: Store,
    kind: str,
    names: Sequence[str],
    *,
    what: str,
    doing: str,
    remedy: str,
    ttl: float | None = None,
    watches: Watches = lambda holder: True,
    seams: Seams = SYSTEM,
) -> Lease:
    """The lease of something other than a position, called `names` among those of its `kind`.

    As `acquire`, but nothing that a former owner still writes is refused. A lease that may not have lapsed yet is
    watched if `watches` says so of its holder; else that is a refusal. The rest are the words for it, as in `Subject`.

    Raises:
        Conflict: another process has it; the message names its pid, host and since when.
        Damaged, OutOfSpace, RetryLater: as `Store.put`.
    """
    key = (kind, "@".join(quote(name, safe="") for name in names))
    subject = Subject(CLAIM, key, what, doing, remedy)
    ttl = DEFAULT_TTL if ttl is None else ttl
    return (await _take(store, subject, ttl, seams, watches))[0]


def keeps_claims(store: Store) -> bool:
    """Whether other processes may use `store` at the same time, and it can tell which of them was first."""
    return {Capability.SHARED, Capability.COMPARE_AND_SET} <= store.capabilities


async def _take(
    store: Store, subject: Subject, ttl: float, seams: Seams, watches: Watches
) -> tuple[Lease, Record | None]:
    """The lease, and what the owner before has left of it."""
    found = await store.get(subject.row, subject.key)
    if found is not None and not _holder(subject, found).released:
        found = await _wait(store, subject, found, seams, watches)
    holder = this_process(round(ttl * 1000), seams)
    started = seams.elapsed()
    taking = asyncio.ensure_future(store.put(_write(subject, holder, ABSENT if found is None else found.rev)))
    try:
        record = await asyncio.shield(taking)
    except Conflict:
        raise await _refusal(store, subject) from None
    except asyncio.CancelledError:
        if subject.row is CLAIM or found is None or _holder(subject, found).released:
            # No process would use it, and all others would wait for it to lapse. There is nothing to be fenced.
            await _give_up(store, subject, holder, taking)
        raise
    return Lease(store, subject, record, holder, started, seams), found


async def _require_migrated(store: Store) -> None:
    checkpoint = await store.get(MIGRATION, MIGRATION_KEY)
    if checkpoint is not None and not checkpoint.removed:
        raise Conflict(
            "the store is half of a migration and does not have every position yet: complete it with "
            "`backtest-kit store migrate SOURCE TARGET --resume` before trading"
        )


async def require_idle(store: Store, *, seams: Seams = SYSTEM) -> None:
    """Do nothing if no process trades a position that is in `store`.

    Returns immediately if every lease was released or its owner died on this machine; the others it watches,
    all together, for at most the `ttl` that their owners chose.

    Raises:
        Conflict: a process does; the message names its pid, host and since when.
        Damaged, RetryLater: as `Store.scan`.
    """
    try:
        async with asyncio.TaskGroup() as group:
            async for found in store.scan(LEASE):
                subject = _position(found.key)
                if not _holder(subject, found).released:
                    group.create_task(_wait(store, subject, found, seams))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def owners(store: Store) -> list[tuple[Key, Holder]]:
    """The positions in `store` whose lease was not released, with its owner, dead or alive.

    Raises:
        Damaged, RetryLater: as `Store.scan`.
    """
    found = [(record.key, _holder(_position(record.key), record)) async for record in store.scan(LEASE)]
    return [(scope, holder) for scope, holder in found if not holder.released]


class Sightings:
    """Which owners live, by what was seen of their leases: one that did not move for a `ttl` has lapsed."""

    def __init__(self, seams: Seams = SYSTEM) -> None:
        self._seams = seams
        self._seen: dict[Key, tuple[int, float]] = {}

    def living(self, found: Record) -> Holder | None:
        """The owner of a position's lease, unless it was released, has lapsed or its process of this machine is gone.

        Raises:
            Damaged: it is not a lease.
        """
        holder, now = _holder(_position(found.key), found), self._seams.elapsed()
        if holder.released or is_gone(holder):
            return None
        rev, since = self._seen.get(found.key, (-1, now))
        if rev != found.rev:
            self._seen[found.key] = found.rev, now
        elif now - since >= holder.ttl_ms / 1000:
            return None
        return holder


async def _give_up(store: Store, subject: Subject, holder: Holder, taking: asyncio.Future[Record]) -> None:
    """Release a lease that is just being taken."""
    with suppress(BacktestKitError):
        taken = await taking
        await store.put(_write(subject, msgspec.structs.replace(holder, released=True), taken.rev))


async def _wait(
    store: Store, subject: Subject, found: Record, seams: Seams, watches: Watches = lambda holder: True
) -> Record:
    """The record of a lease that is free to take now."""
    holder = _holder(subject, found)
    until = seams.elapsed() + holder.ttl_ms / 1000
    while not is_gone(holder) and (left := until - seams.elapsed()) > 0:
        if not watches(holder):
            raise await _refusal(store, subject)
        await seams.sleep(min(left, holder.ttl_ms / 10_000))
        now = await store.get(subject.row, subject.key)
        if now is None or now.rev != found.rev:
            if now is not None and _holder(subject, now).released:
                return now
            raise await _refusal(store, subject)
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


def _position(scope: Key) -> Subject:
    strategy, exchange, symbol = scope
    return Subject(LEASE, scope, f"{symbol} on {exchange} by {strategy}", "is traded by", "stop that process")


def _write(subject: Subject, holder: Holder, expect: int | str) -> Write:
    value = msgspec.to_builtins(holder)
    return Write(subject.row, subject.key, value, expect=ABSENT if isinstance(expect, str) else expect)


def _holder(subject: Subject, record: Record) -> Holder:
    try:
        return msgspec.convert(record.value, Holder)
    except msgspec.ValidationError as error:
        raise Damaged(f"the lease of {subject} is not one of this program: {error}") from None


async def _refusal(store: Store, subject: Subject) -> Conflict:
    found = await store.get(subject.row, subject.key)
    holder = None if found is None else _holder(subject, found)
    if holder is None or holder.released:
        return Conflict(f"{subject} was taken by another process meanwhile: try again")
    return Conflict(
        f"{subject} {subject.doing} {holder}: {subject.remedy}; "
        f"if it is dead, its lease lapses {holder.ttl_ms / 1000:g} s after its last renewal"
    )
