"""`Outbox`: which notifications one sink still has to get, and which process delivers the next one.

Each notification has a record for each sink (contract `delivery`): a claim, made by compare-and-set before the sink is
called, and a mark once the sink took it.

- Notifications without a mark are delivered, oldest first and one at a time. Of several processes with the store and
  the sink, one claims the oldest; the others wait for its mark.
- A process that dies between delivery and mark leaves its claim. Another process takes it over: immediately if the
  first one was on the same machine, otherwise after watching the claim unchanged for its whole `ttl`, on its own
  monotonic clock, as with leases. So a notification can be delivered twice and is never lost.
- The first process with a sink stores when that was (contract `sink`). Older notifications get a mark, by that time in
  every process that helps; then the sink counts as added.
- A start does not read all notifications. Sinks get them in order, so reading newest first ends when `LOOKBACK` in a
  row have a mark: older ones have one too, or were never for this sink. The `LOOKBACK` are there for notifications that
  a server shows late, when two processes write at the same time. One that was replaced by id has moved to the newest
  end: its mark holds, so it is not delivered again, but it does not count.
- Marks move with the notifications and are deleted with them.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress
from typing import Final

import msgspec

from backtest_kit.errors import Conflict
from backtest_kit.persist.codec import decode_as, encode
from backtest_kit.persist.contracts import DELIVERY, SINK
from backtest_kit.persist.holder import Holder, is_gone, this_process
from backtest_kit.persist.lease import keeps_claims
from backtest_kit.persist.store import Key, Record, Store, Write
from backtest_kit.records.notification import NOTIFICATION
from backtest_kit.records.scope import expectation
from backtest_kit.seams import SYSTEM, Seams

CHUNK: Final = 256
"""The most notifications that wait in memory; the others wait in the store."""
LOOKBACK: Final = 64
SETTLE_S: Final = 15.0
"""How long a notification can still show up behind newer ones: longer than a store retries a write."""


class Mark(msgspec.Struct, frozen=True, rename="camel"):
    """What is stored of a notification for a sink."""

    delivered_rev: int = 0
    """The revision of the notification that the sink took; 0 until then."""
    holder: Holder | None = None
    """The process that is delivering it."""


class Added(msgspec.Struct, frozen=True, rename="camel"):
    """What is stored of a sink."""

    added_ms: int
    """When it was first added: it gets what was written since."""
    is_complete: bool = False
    """Whether everything older has a mark."""


class Pending(msgspec.Struct):
    """A notification that has to be delivered."""

    record: Record
    mark: Record | None
    """What is stored of it for this sink."""


class Outbox:
    """The notifications that wait for one sink in one mode."""

    def __init__(
        self,
        notifications: Store,
        sink: str,
        added_ms: int,
        seams: Seams = SYSTEM,
        *,
        marks: Store | None = None,
    ) -> None:
        """`marks` is the store of the marks, if it is not that of the notifications."""
        self._store = notifications
        self._marks = marks or notifications
        self._sink = sink
        self._added_ms = added_ms
        self._is_added = False
        self._me: Final = this_process(0, seams)
        self._seams = seams
        self._claimed: Key | None = None
        self._watched: tuple[Key, int, float] = ((), 0, 0.0)
        """A claim of another process, its revision, and since when this process has seen it so."""
        self._known: dict[Key, int] = {}
        """The delivered revision of the newest notifications with a mark."""
        self._found: list[Pending] = []
        """The last result of a look for notifications without a mark."""
        self._settled_at = math.inf
        """When everything that was found last surely shows in its place."""
        self._is_settled = False
        """Whether a look since then has found nothing: then looking at the newest notification is enough."""
        self.is_shared: Final = keeps_claims(notifications) and keeps_claims(self._marks)
        """Whether other processes can write notifications for this sink, and deliver them."""

    async def add(self) -> None:
        """Add the sink to the store, unless it was added before, here or in another process. Raises as `Store.put`."""
        while not self._is_added:
            with suppress(Conflict):  # another process adds it as well: look again how far that is
                await self._add()

    async def _add(self) -> None:
        found = await self._marks.get(SINK, (self._sink,))
        added = Added(self._added_ms) if found is None else decode_as(Added, found.value)
        if found is None:
            found = await self._put_added(added, found)
        if not added.is_complete:
            older: list[Record] = []
            async for record in self._store.scan(NOTIFICATION, newest_first=True):
                if record.written_at < added.added_ms:
                    older.append(record)
                if len(older) == LOOKBACK:
                    break
            # Still incomplete: nothing was delivered yet, so none of these is for the sink, whatever clocks say.
            await self._put_added(added, found)
            marks = [self._write(Pending(record, None), Mark(record.rev)) for record in older]
            for result in await self._marks.put_each(marks):
                if isinstance(result, BaseException) and not isinstance(result, Conflict):
                    raise result
            await self._marks.put(Write(SINK, (self._sink,), encode(Added(added.added_ms, is_complete=True))))
        self._is_added = True

    async def _put_added(self, added: Added, before: Record | None) -> Record:
        expect = expectation(self._marks, before)
        return await self._marks.put(Write(SINK, (self._sink,), encode(added), expect=expect))

    async def pending(self) -> list[Pending]:
        """The oldest undelivered notifications, oldest first. Raises as `Store.scan`."""
        # A long backlog is expensive to list: once for each part, and not while another process delivers that.
        if still_pending := await self._without_mark():
            return still_pending
        if self._is_settled and await self._walk(1, limit=1) == []:
            return []
        now = self._seams.elapsed()
        found = await self._walk(LOOKBACK, limit=2 * LOOKBACK)
        if found is None:
            found = await self._walk(LOOKBACK, limit=None) or []
        self._is_settled = not found and now > self._settled_at
        if found or self._settled_at == math.inf:
            self._settled_at = now + SETTLE_S
        self._found = found
        return list(found)

    async def _without_mark(self) -> list[Pending]:
        """What was found before, from the first that is still undelivered and was not deleted."""
        for index, first in enumerate(self._found):
            first.mark = await self._marks.get(DELIVERY, self._key(first.record))
            if (
                not _mark(first.mark).delivered_rev
                and await self._store.get(NOTIFICATION, first.record.key) is not None
            ):
                self._found = self._found[index:]
                return list(self._found)
        self._found = []
        return []

    async def _walk(self, lookback: int, *, limit: int | None) -> list[Pending] | None:
        """Those without a mark among the newest `limit`, oldest first; None if there may be more behind them."""
        oldest: deque[Pending] = deque(maxlen=CHUNK)
        delivered = seen = 0
        async for record in self._store.scan(NOTIFICATION, newest_first=True, limit=limit):
            seen += 1
            key = self._key(record)
            mark = None if key in self._known else await self._marks.get(DELIVERY, key)
            delivered_rev = self._known.get(key) or _mark(mark).delivered_rev
            if not delivered_rev:
                delivered = 0
                oldest.append(Pending(record, mark))
                continue
            self._remember(key, delivered_rev)
            delivered += delivered_rev == record.rev
            if delivered == lookback:
                return list(reversed(oldest))
        return list(reversed(oldest)) if seen != limit else None

    async def claim(self, pending: Pending, ttl_s: float) -> bool:
        """Claim its delivery for this process, for `ttl_s`. False if another process is delivering it.

        Raises as `Store.put`.
        """
        if not self.is_shared:
            return True
        holder = _mark(pending.mark).holder
        if pending.mark is not None and holder is not None and self._lives(pending.mark, holder):
            return False
        self._claimed = self._key(pending.record)  # before the write, which may take place although it fails
        me = msgspec.structs.replace(self._me, since=self._seams.wall_ms(), ttl_ms=round(ttl_s * 1000))
        try:
            pending.mark = await self._marks.put(self._write(pending, Mark(holder=me)))
        except Conflict:
            self._claimed = None
            return False
        return True

    async def delivered(self, pending: Pending) -> None:
        """Mark it: the sink took it, or does not want it. Raises as `Store.put`."""
        try:
            await self._marks.put(self._write(pending, Mark(pending.record.rev)))
        except Conflict:
            return  # another process took the claim over: the next look shows its state
        self._claimed = None
        self._remember(self._key(pending.record), pending.record.rev)

    async def release(self) -> None:
        """Let another process deliver what this one has claimed. Raises as `Store.put`."""
        if self._claimed is None:
            return
        # Read anew: the outcome of the last write may be unknown.
        found = await self._marks.get(DELIVERY, self._claimed)
        holder = _mark(found).holder
        if found is not None and holder is not None and holder.owner == self._me.owner:
            expect = expectation(self._marks, found)
            await self._marks.put(Write(DELIVERY, found.key, encode(Mark()), expect=expect))
        self._claimed = None

    def _lives(self, mark: Record, holder: Holder) -> bool:
        """Whether another process is delivering it, as far as this one can tell."""
        if holder.owner == self._me.owner or is_gone(holder):
            return False
        key, rev, since = self._watched
        if (key, rev) != (mark.key, mark.rev):
            since = self._seams.elapsed()
            self._watched = (mark.key, mark.rev, since)
        return self._seams.elapsed() - since < holder.ttl_ms / 1000

    def _remember(self, key: Key, delivered_rev: int) -> None:
        self._known.pop(key, None)
        self._known[key] = delivered_rev
        if len(self._known) > 4 * LOOKBACK:
            del self._known[next(iter(self._known))]

    def _key(self, record: Record) -> Key:
        return self._sink, str(record.key[1])

    def _write(self, pending: Pending, mark: Mark) -> Write:
        expect = expectation(self._marks, pending.mark)
        return Write(DELIVERY, self._key(pending.record), encode(mark), expect=expect)


def _mark(record: Record | None) -> Mark:
    return Mark() if record is None else decode_as(Mark, record.value)
