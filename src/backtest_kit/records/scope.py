"""`Scope`: what a record belongs to: a mode, a run, and a moment of that run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Final, Protocol, TypedDict
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

When = datetime | str | int

_HELD: Final[ContextVar[tuple[object, ...]]] = ContextVar("backtest_kit_records_held", default=())


class Written:
    """What one repetition of a backtest has written so far, and for which moment.

    Any other record of a later moment was left by an earlier repetition with the same run id.
    """

    __slots__ = ("__weakref__", "_when_ms")

    def __init__(self) -> None:
        self._when_ms: dict[tuple[str, Key], int] = {}

    def note(self, row: Contract, key: Key, when_ms: int) -> None:
        name = (row.name, key)
        self._when_ms[name] = max(when_ms, self._when_ms.get(name, when_ms))

    def later(self, row: Contract, key: Key, when_ms: int) -> int | None:
        """The moment of the latest write under a key, if it is later than a given moment."""
        latest_ms = self._when_ms.get((row.name, key), when_ms)
        return latest_ms if latest_ms > when_ms else None


class Scope:
    """The records of one run at one moment: records written for a later moment are not visible.

    A write does not replace them either, with one exception: a backtest that is repeated under its run id replaces what
    an earlier repetition left: records that are not in `written`.

    With history, the revision of the moment is read. If it is no longer kept, a run goes on as without
    history; a reader outside of a run (`is_outside`) gets an error, because None would look like an answer.

    `run_id` is that of a backtest, None live and on paper. Without `when_ms` there is no moment: everything is visible,
    and writes are visible at any time.
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
                f"run_id is {run_id!r} in mode {mode!r}: every backtest has its own records, so name its run "
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
        """The store of `row` for this run, chosen and created only at this call."""
        return self._persistence().store_for(row, self.mode, self.run_id)

    def sees(self, record: Record | None) -> bool:
        """Whether a record is visible at this moment: neither removed nor written for a later one."""
        return record is not None and not record.removed and not record.later_than(self.when_ms)

    async def read(self, row: Contract, key: Key) -> Record | None:
        """The record under `key` at this moment. Raises as `seen`."""
        return await self.seen(row, await self.store(row).get(row, key))

    async def seen(self, row: Contract, record: Record | None) -> Record | None:
        """A record that was found, as of this moment: with history, the revision of that moment.

        Raises:
            NotKept: that revision is no longer kept, and the reader is outside of a run.
            Others: as `Store.get`.
        """
        was = await self.as_it_was(row, record)
        return was if self.sees(was) else None

    async def as_it_was(self, row: Contract, record: Record | None) -> Record | None:
        """The same, including a removed record."""
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
        """Whether an earlier repetition of this run left a record for a moment that this one has not reached."""
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
        self._check(row, key)  # known without reading the store, whose speed limits a backtest
        return await self.put(store, write)

    async def remove(self, row: Contract, key: Key, beneath: Record | None = None) -> bool:
        """Mark the record under `key` as removed, and return whether one was visible.

        `beneath` is the record that is visible if there is none under `key`: the mark hides it. Raises as `write`.
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
        """Hold the turn of this process to change the record under `key`. Raises as `update`."""
        return self._turns.take(self.store(row), row, key)

    async def update(self, row: Contract, key: Key, change: Callable[[Record | None], Awaitable[Plain]]) -> Record:
        """Replace the record under `key` by the result of `change`; no other write comes in between.

        Updates of one key take turns in this process. If another process was faster, `change` is called again.

        Raises:
            LookAhead: the record is later than this moment.
            UserError: `change` updates the same key.
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
        """Do a write of this run, after checking the record that it replaces. Raises as `Store.put`."""
        if self._written is not None and write.when is not None:
            self._written.note(write.contract, write.key, write.when)
        return await store.put(write)

    def _check(self, row: Contract, key: Key, found: Record | None = None) -> None:
        """Raise `LookAhead` if the record under `key` is of this run and later than this moment."""
        if self.when_ms is None or row.durability is Durability.CACHE:
            return  # a newly cached answer is as good as the old one
        if self._written is not None:
            later_ms = self._written.later(row, key, self.when_ms)
        else:
            later_ms = found.when if found is not None and found.later_than(self.when_ms) else None
        if later_ms is not None:
            raise LookAhead(
                f"{row.name} {'/'.join(map(str, key))} is of {iso(later_ms)}, later than {iso(self.when_ms)}, the time "
                "of the context of this write: use the context of the newest minute "
                "(through kit.records: without when=)"
            )


class View(TypedDict, total=False):
    """What a reader outside of a run chooses: the records of a mode, those of which backtest, and as of when."""

    mode: Mode
    """"live" (default), "paper" or "backtest"."""
    run_id: str | None
    """Which backtest: `result.run_id`."""
    when: When | None
    """Records of later moments are not visible. Without it, everything is."""


class Scopes(Protocol):
    """Makes the scope of a view; `identity` is the strategy and market of the run that looks at itself."""

    def __call__(
        self,
        mode: Mode = "live",
        run_id: str | None = None,
        when: When | None = None,
        identity: Identity | None = None,
    ) -> Scope: ...


class _Turn:
    """The turn at one key."""

    __slots__ = ("__weakref__", "holder", "lock")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.holder: object = None


class Turns:
    """Updates of one key in one event loop, one after the other."""

    def __init__(self) -> None:
        # Weak: a turn exists while a task holds or awaits it, so none outlives its event loop.
        self._turns: WeakValueDictionary[tuple[object, ...], _Turn] = WeakValueDictionary()

    @asynccontextmanager
    async def take(self, store: Store, row: Contract, key: Key) -> AsyncIterator[None]:
        name = (asyncio.get_running_loop(), store, row.name, key)
        turn = self._turns.setdefault(name, _Turn())
        if turn.holder is not None and turn.holder in _HELD.get():
            raise UserError(
                f"an update of {row.name} {'/'.join(map(str, key))} waits for itself: the change function "
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
    """The revision that a write replacing `found` expects, if the store can check it."""
    if Capability.COMPARE_AND_SET not in store.capabilities:
        return ANY
    return ABSENT if found is None else found.rev


def strategy_owner(strategy_name: str, exchange_name: str, symbol: str) -> str:
    """The owner of a strategy's records on a symbol while no position is open: an id next to those of its signals."""
    return "@".join(quote(part, safe="") for part in (strategy_name, exchange_name, symbol))


def check_texts(texts: Iterable[tuple[str, object]]) -> None:
    """Raise `UserError` for the first (name, value) whose value is not a text, or is empty."""
    for name, value in texts:
        if not isinstance(value, str) or not value:
            raise UserError(f"{name} is {value!r}: give a text that is not empty")
