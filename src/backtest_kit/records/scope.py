"""`Scope`: what a record belongs to, which is a mode, a run of it and a moment of that run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import quote
from weakref import WeakValueDictionary

import msgspec

from backtest_kit.errors import Conflict, LookAhead, UserError
from backtest_kit.model.interval import iso
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.history import NotKept, RevisionStore
from backtest_kit.persist.store import ABSENT, ANY, Capability, Expect, Key, Plain, Record, Store, Write

if TYPE_CHECKING:
    from backtest_kit.model.identity import Identity, Mode
    from backtest_kit.persist.binding import Persistence

_HELD: Final[ContextVar[tuple[object, ...]]] = ContextVar("backtest_kit_records_held", default=())


class Written:
    """What one repetition of a backtest has written so far, and for which moment.

    Whatever else is there of a later moment was left by an earlier repetition under the same run id.
    """

    __slots__ = ("__weakref__", "_when_ms")

    def __init__(self) -> None:
        self._when_ms: dict[tuple[str, Key], int] = {}

    def note(self, row: Contract, key: Key, when_ms: int) -> None:
        name = (row.name, key)
        self._when_ms[name] = max(when_ms, self._when_ms.get(name, when_ms))

    def later(self, row: Contract, key: Key, when_ms: int) -> int | None:
        """The moment of the latest write under a key, if that is later than a moment."""
        latest_ms = self._when_ms.get((row.name, key), when_ms)
        return latest_ms if latest_ms > when_ms else None


class Scope:
    """The records of one run as they are at one moment: what was written for a later one is not there.

    Nor does a write replace it, with one exception: a backtest that is repeated under its run id replaces what an
    earlier repetition has left, as far as this one is known by what it has `written`.

    Where history is kept, what was there at the moment is seen. A run that finds it not kept any more goes on as
    without history; whoever looks from outside (`is_outside`) gets an error, for None would be taken for an answer.

    `run_id` is that of a backtest, None live and on paper. Without `when_ms` there is no moment: everything is
    seen, and what is written is seen at any time.
    """

    __slots__ = ("_is_outside", "_persistence", "_turns", "_written", "mode", "run_id", "when_ms")

    def __init__(
        self,
        persistence: Callable[[], Persistence],
        turns: Turns,
        mode: Mode,
        run_id: str | None,
        when_ms: int | None = None,
        written: Written | None = None,
        *,
        is_outside: bool,
    ) -> None:
        if (mode == "backtest") != bool(run_id):
            raise UserError(
                f"run_id is {run_id!r} in mode {mode!r}: every backtest has records of its own, so name its run "
                "(`result.run_id`); live and paper have one each, and no run id"
            )
        self._persistence = persistence
        self._turns = turns
        self._written = written
        self._is_outside = is_outside
        self.mode = mode
        self.run_id = run_id
        self.when_ms = when_ms

    def at(self, when_ms: int | None) -> Scope:
        """The same run at another moment."""
        return Scope(
            self._persistence,
            self._turns,
            self.mode,
            self.run_id,
            when_ms,
            self._written,
            is_outside=self._is_outside,
        )

    def store(self, row: Contract) -> Store:
        """The store that keeps `row` for this run. It is chosen, and made, at this call and no earlier."""
        return self._persistence().store_for(row, self.mode, self.run_id)

    def sees(self, record: Record | None) -> bool:
        """Whether there is a record at this moment: one that was neither removed nor written for a later one."""
        return record is not None and not record.removed and not record.later_than(self.when_ms)

    async def read(self, row: Contract, key: Key) -> Record | None:
        """The record under `key` as far as this moment sees it. Raises as `seen`."""
        return await self.seen(row, await self.store(row).get(row, key))

    async def seen(self, row: Contract, record: Record | None) -> Record | None:
        """What this moment sees of a record that was found: where history is kept of it, what it was then.

        Raises:
            NotKept: that is not known any more, and somebody looks from outside of a run.
            Others: as `Store.get`.
        """
        was = await self.as_it_was(row, record)
        return was if self.sees(was) else None

    async def as_it_was(self, row: Contract, record: Record | None) -> Record | None:
        """The same, also if it was removed then."""
        store = self.store(row)
        if self.when_ms is not None and isinstance(store, RevisionStore):
            try:
                record = await store.before(row, record, self.when_ms)
            except NotKept:
                if self._is_outside:
                    raise
                return None
        return None if record is None or record.later_than(self.when_ms) else record

    def is_left(self, row: Contract, record: Record) -> bool:
        """Whether an earlier repetition of this run has left a record for a moment that this one has not come to."""
        if self.when_ms is None or self._written is None or not record.later_than(self.when_ms):
            return False
        return self._written.later(row, record.key, self.when_ms) is None

    async def write(self, row: Contract, key: Key, value: Plain) -> Record:
        """Replace what is under `key`, unless it is later than this moment.

        Raises:
            LookAhead: it is.
            Others: as `Store.put`.
        """
        store = self.store(row)
        write = Write(row, key, value, when=self.when_ms)
        while self.when_ms is not None and self._written is None and row.durability is not Durability.CACHE:
            found = await store.get(row, key)
            self._check(row, key, found)
            try:
                return await store.put(msgspec.structs.replace(write, expect=expectation(store, found)))
            except Conflict:
                continue
        self._check(row, key)  # what is known without a look at the store, which sets the pace of a backtest
        return await self.put(store, write)

    async def remove(self, row: Contract, key: Key, beneath: Record | None = None) -> bool:
        """Mark the record under `key` as removed, and return whether this moment saw one.

        `beneath` shows where there is none under `key`: the mark hides it then. Raises as `write`.
        """
        store = self.store(row)
        while True:
            found = await store.get(row, key)
            self._check(row, key, found)
            was = await self.as_it_was(row, found)
            seen = beneath if was is None else was
            if seen is None or seen.removed:
                return False
            write = Write(row, key, seen.value, when=self.when_ms, expect=expectation(store, found), removed=True)
            try:
                await self.put(store, write)
            except Conflict:
                continue
            return True

    def turn(self, row: Contract, key: Key) -> AbstractAsyncContextManager[None]:
        """Be the only one of this process who changes the record under `key`. Raises as `update`."""
        return self._turns.take(self.store(row), row, key)

    async def update(self, row: Contract, key: Key, change: Callable[[Record | None], Awaitable[Plain]]) -> Record:
        """Replace the record under `key` by what `change` makes of it; no other writer comes between the two.

        Updates of one key take turns in this process. If another process was faster, `change` is called again.

        Raises:
            LookAhead: what is there is later than this moment.
            UserError: `change` updates the key that it is called for.
            Others: as `Store.get` and `Store.put`, and what `change` raises.
        """
        store = self.store(row)
        async with self.turn(row, key):
            while True:
                found = await store.get(row, key)
                self._check(row, key, found)
                value = await change(await self.seen(row, found))
                write = Write(row, key, value, when=self.when_ms, expect=expectation(store, found))
                try:
                    return await self.put(store, write)
                except Conflict:
                    continue

    async def put(self, store: Store, write: Write) -> Record:
        """Do a write of this run, which has made sure what it replaces. Raises as `Store.put`."""
        if self._written is not None and write.when is not None:
            self._written.note(write.contract, write.key, write.when)
        return await store.put(write)

    def _check(self, row: Contract, key: Key, found: Record | None = None) -> None:
        """Raise `LookAhead` if what is under `key` is later than this moment, and of this run."""
        if self.when_ms is None or row.durability is Durability.CACHE:
            return  # what is cached again is as good as what was
        if self._written is not None:
            later_ms = self._written.later(row, key, self.when_ms)
        else:
            later_ms = found.when if found is not None and found.later_than(self.when_ms) else None
        if later_ms is not None:
            raise LookAhead(
                f"{row.name} {'/'.join(map(str, key))} is of {iso(later_ms)}, later than {iso(self.when_ms)}, the time "
                "of the context that is to replace it: write with the context of the newest minute "
                "(through kit.records: without when=)"
            )


class Scopes(Protocol):
    """Makes the scope of a mode, of a run of it and of a moment of that run; `identity` says whose the run is."""

    def __call__(
        self, mode: Mode, run_id: str | None = None, when: int | None = None, identity: Identity | None = None, /
    ) -> Scope: ...


class _Turn:
    """Whose turn it is at one key."""

    __slots__ = ("__weakref__", "holder", "lock")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.holder: object = None


class Turns:
    """Updates of one key in one event loop, one after the other."""

    def __init__(self) -> None:
        # Weak: a turn lives while someone holds or awaits it, so none outlives its event loop.
        self._turns: WeakValueDictionary[tuple[object, ...], _Turn] = WeakValueDictionary()

    @asynccontextmanager
    async def take(self, store: Store, row: Contract, key: Key) -> AsyncIterator[None]:
        name = (asyncio.get_running_loop(), store, row.name, key)
        turn = self._turns.setdefault(name, _Turn())
        if turn.holder is not None and turn.holder in _HELD.get():
            raise UserError(
                f"an update of {row.name} {'/'.join(map(str, key))} waits for itself: the function it was given "
                "updates the same record; let it return the new value instead"
            )
        async with turn.lock:
            turn.holder = token = object()
            held = _HELD.set((*_HELD.get(), token))
            try:
                yield
            finally:
                _HELD.reset(held)
                turn.holder = None


def expectation(store: Store, found: Record | None) -> Expect:
    """What a write that replaces `found` expects, where the store can check it."""
    if Capability.COMPARE_AND_SET not in store.capabilities:
        return ANY
    return ABSENT if found is None else found.rev


def strategy_owner(strategy_name: str, exchange_name: str, symbol: str) -> str:
    """Who owns what a strategy keeps on a symbol while it holds nothing: an id beside those of its signals."""
    return "@".join(quote(part, safe="") for part in (strategy_name, exchange_name, symbol))


def check_texts(texts: Iterable[tuple[str, object]]) -> None:
    """Raise `UserError` for the first (name, value) whose value is no text, or an empty one."""
    for name, value in texts:
        if not isinstance(value, str) or not value:
            raise UserError(f"{name} is {value!r}: give a text that is not empty")
