"""What a record was before: each revision is kept, under a key of its own, before another one replaces it.

A revision that was replaced can then be read as of a moment. The note of it is written first and the record second,
which compares: whatever is killed in between leaves a note that says what is still so. Nothing is kept of the first
write of a key, for nothing is replaced there.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

import msgspec

from backtest_kit.errors import Conflict, Damaged, UserError
from backtest_kit.model.interval import iso
from backtest_kit.persist.contracts import HISTORY, Contract, Durability, Kind, WriteRule
from backtest_kit.persist.keys import path_of
from backtest_kit.persist.store import ABSENT, ANY, Capability, Key, Record, Selection, Store, Write

_CORE: Final = frozenset(
    (
        Capability.DURABLE,
        Capability.SHARED,
        Capability.COMPARE_AND_SET,
        Capability.ATOMIC_BATCH,
        Capability.ORDERED_SCAN,
    )
)


class NotKept(UserError):
    """What a record was at a moment is not known, because its history does not go back that far."""


class _Note(msgspec.Struct, frozen=True, rename="camel"):
    value: Any
    written_at: int
    removed: bool


def check_history(row: Contract) -> None:
    """Raise `UserError` if records of a contract have no history."""
    if row.kind is Kind.SERIES or row.write_rule is not WriteRule.REPLACE or row.durability is not Durability.RECORD:
        raise UserError(
            f"no history is kept of {row.name}: only of records that are replaced, that are not a cache, and that "
            "no money depends on, such as state, session and memory"
        )


class RevisionStore(Store):
    """A store that keeps what it replaces."""

    def __init__(self, store: Store, row: Contract) -> None:
        if Capability.COMPARE_AND_SET not in store.capabilities or not store.keeps(HISTORY):
            raise UserError(
                f"history of {row.name} is to be kept in {type(store).__name__}, which cannot: it takes a store that "
                "compares revisions and keeps every contract. Bind one, or leave this out of keep_history"
            )
        self._store = store
        self._row = row
        self.candles = store.candles

    @property
    def capabilities(self) -> frozenset[Capability]:
        # What lies next to the records (namespaces, quarantine, what may be pruned) is asked of the store itself.
        return self._store.capabilities & _CORE

    async def open(self) -> None:
        await self._store.open()

    async def close(self) -> None:
        await self._store.close()

    async def get(self, contract: Contract, key: Key) -> Record | None:
        return await self._store.get(contract, key)

    async def put(self, write: Write) -> Record:
        """As `Store.put`; what is replaced is written down before."""
        while True:
            compared = await self._noted(write)
            try:
                return await self._store.put(compared)
            except Conflict:
                if write.expect != ANY:
                    raise

    async def batch(self, writes: Sequence[Write]) -> None:
        """As `Store.batch`; what is replaced is written down before."""
        while True:
            compared = [await self._noted(write) for write in writes]
            try:
                await self._store.batch(compared)
            except Conflict:
                if any(write.expect != ANY for write in writes):
                    raise
            else:
                return

    def select(self, wanted: Selection) -> AsyncGenerator[Record, None]:
        return self._store.select(wanted)

    def namespace(self, name: str) -> Store:
        return RevisionStore(self._store.namespace(name), self._row)

    async def as_of(self, contract: Contract, key: Key, when_ms: int) -> Record | None:
        """The record as it stood at a moment: its newest revision that is not of a later one, removed or not.

        Raises:
            NotKept: that is not known any more, or was before history was kept.
            Damaged, RetryLater: as `Store.get`.
        """
        return await self.before(contract, await self._store.get(contract, key), when_ms)

    async def before(self, contract: Contract, record: Record | None, when_ms: int) -> Record | None:
        """The same, of a record that was read already."""
        while record is not None and record.later_than(when_ms):
            if record.rev == 1:
                return None
            name = (contract.name, _text(contract, record.key), record.rev - 1)
            note = await self._store.get(HISTORY, name)
            if note is None:
                raise NotKept(
                    f"what {name[0]} {name[1]} was at {iso(when_ms)} is not kept: its history goes back to revision "
                    f"{record.rev} of {iso(record.when or 0)}, see CC_RETENTION_HISTORY_DAYS"
                )
            record = _revision(record.key, note)
        return record

    async def _noted(self, write: Write) -> Write:
        """`write`, once what it replaces is written down: it expects to find just that."""
        found = await self._store.get(write.contract, write.key)
        if found is not None:
            note = _Note(found.value, found.written_at, found.removed)
            key = (write.contract.name, _text(write.contract, found.key), found.rev)
            await self._store.put(Write(HISTORY, key, msgspec.to_builtins(note), when=found.when))
        if write.expect != ANY:
            return write
        return msgspec.structs.replace(write, expect=ABSENT if found is None else found.rev)


def _text(contract: Contract, key: Key) -> str:
    return "/".join(path_of(contract, key))


def _revision(key: Key, note: Record) -> Record:
    try:
        was = msgspec.convert(note.value, _Note)
    except msgspec.ValidationError as error:
        raise Damaged(f"history {'/'.join(map(str, note.key))} is not a revision of a record: {error}") from error
    rev = note.key[-1]
    return Record(key, was.value, int(rev), note.when, was.written_at, was.removed)
