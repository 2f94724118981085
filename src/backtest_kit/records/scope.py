"""`Scope`: what a record belongs to, which is a mode, a run of it and a moment of that run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import quote
from weakref import WeakValueDictionary

from backtest_kit.errors import Conflict, UserError
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.history import HistoryStore, NotKept
from backtest_kit.persist.store import ABSENT, ANY, Capability, Expect, Key, Plain, Record, Store, Write

if TYPE_CHECKING:
    from backtest_kit.model.event import Mode
    from backtest_kit.persist.binding import Persistence

_HELD: Final[ContextVar[tuple[object, ...]]] = ContextVar("backtest_kit_records_held", default=())


class Scope:
    """The records of one run as they are at one moment: what was written for a later one is not there.

    `run_id` is that of a backtest, None live and on paper. Without `when_ms` there is no moment: everything is
    seen, and what is written is seen at any time.
    """

    __slots__ = ("_persistence", "_turns", "mode", "run_id", "when_ms")

    def __init__(
        self,
        persistence: Callable[[], Persistence],
        turns: Turns,
        mode: Mode,
        run_id: str | None,
        when_ms: int | None = None,
    ) -> None:
        if (mode == "backtest") != bool(run_id):
            raise UserError(
                f"run_id is {run_id!r} in mode {mode!r}: every backtest has records of its own, so name its run "
                "(`result.run_id`); live and paper have one each, and no run id"
            )
        self._persistence = persistence
        self._turns = turns
        self.mode = mode
        self.run_id = run_id
        self.when_ms = when_ms

    def at(self, when_ms: int | None) -> Scope:
        """The same run at another moment."""
        return Scope(self._persistence, self._turns, self.mode, self.run_id, when_ms)

    def store(self, row: Contract) -> Store:
        """The store that keeps `row` for this run. It is chosen, and made, at this call and no earlier."""
        return self._persistence().store_for(row, self.mode, self.run_id)

    def sees(self, record: Record | None) -> bool:
        """Whether there is a record at this moment: one that was neither removed nor written for a later one."""
        return record is not None and not record.removed and not record.later_than(self.when_ms)

    async def read(self, row: Contract, key: Key) -> Record | None:
        """The record under `key` as far as this moment sees it. Raises as `Store.get`."""
        return await self.seen(row, await self.store(row).get(row, key))

    async def seen(self, row: Contract, record: Record | None) -> Record | None:
        """What this moment sees of a record that was found: where history is kept of it, what it was then."""
        store = self.store(row)
        if self.when_ms is not None and isinstance(store, HistoryStore):
            try:
                record = await store.before(row, record, self.when_ms)
            except NotKept:
                return None
        return record if self.sees(record) else None

    async def write(self, row: Contract, key: Key, value: Plain) -> Record:
        """Replace what is under `key`, whatever it is. Raises as `Store.put`."""
        return await self.store(row).put(Write(row, key, value, when=self.when_ms))

    async def remove(self, row: Contract, key: Key) -> bool:
        """Mark the record under `key` as removed, and return whether this moment saw one. Raises as `Store.put`."""
        store = self.store(row)
        while True:
            found = await store.get(row, key)
            seen = await self.seen(row, found)
            if seen is None:
                return False
            write = Write(row, key, seen.value, when=self.when_ms, expect=expectation(store, found), removed=True)
            try:
                await store.put(write)
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
            UserError: `change` updates the key that it is called for.
            Others: as `Store.get` and `Store.put`, and what `change` raises.
        """
        store = self.store(row)
        async with self.turn(row, key):
            while True:
                found = await store.get(row, key)
                value = await change(await self.seen(row, found))
                write = Write(row, key, value, when=self.when_ms, expect=expectation(store, found))
                try:
                    return await store.put(write)
                except Conflict:
                    continue


class Scopes(Protocol):
    """Makes the scope of a mode, of a run of it and of a moment of that run."""

    def __call__(self, mode: Mode, run_id: str | None = None, when: int | None = None, /) -> Scope: ...


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
