"""Everything that one store has, moved into another one of whatever kind, and the proof that it arrived.

Of the source only the record of its id is changed, at the end (see `store_id`). What the target gets has revisions and
wall-clock times of its own; keys, values, simulation times, removals and the order of writing are those of the source.
Leases stay behind.

While a migration is under way the target has a record of it (`contracts.MIGRATION`): which parts are complete, and
which record of the source was the newest in each. So a migration that was killed goes on with the first part that is
not complete; what is there of that one is compared with the source, not trusted. The record is removed at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Final, NoReturn

import msgspec
import numpy as np

from backtest_kit.errors import BacktestKitError, Conflict, Damaged, UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import iso
from backtest_kit.persist import walk
from backtest_kit.persist.codec import dump_value
from backtest_kit.persist.contracts import MIGRATION, MIGRATION_KEY, MOVED
from backtest_kit.persist.lease import require_idle
from backtest_kit.persist.operations import EVER, space_of, spaces, text_of
from backtest_kit.persist.store import ABSENT, ANY, Capability, Expect, Store, Write
from backtest_kit.persist.store_id import move_store_id, place_of, require_movable_id
from backtest_kit.persist.upkeep import Finding
from backtest_kit.persist.walk import Part

CHECKPOINT_SECONDS: Final = 1.0
"""How often a migration writes down which parts are complete: what is lost of it is only compared again."""

_MOST_PROBLEMS: Final = 20


class Moved(msgspec.Struct):
    """What became of one contract, in all namespaces together; each candle counts as one."""

    contract: str
    copied: int = 0
    present: int = 0
    """Was in the target already, and is the same."""


class Migration(msgspec.Struct, frozen=True):
    """What `migrate_store` did."""

    contracts: tuple[Moved, ...]
    """In the order of the table; what has nothing is left out."""
    left_out: tuple[Finding, ...]
    """What lies in the source and is not a record of it."""


class Progress(msgspec.Struct, frozen=True):
    """How far a migration has come."""

    part: Part
    """At which it is now."""
    number: int
    """Of that part, from 1."""
    parts: int
    """How many there are."""
    records: int
    """Copied by now."""
    candles: int


class _Complete(msgspec.Struct, frozen=True):
    part: Part
    count: int
    mark: str
    """Tells whether the source has been written to since, see `_mark`."""


async def migrate_store(
    source: Store,
    target: Store,
    *,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    source_to_mark: Store | None = None,
    target_name: str = "",
) -> Migration:
    """Write every record, in every namespace, and every candle of `source` to `target`.

    The target is empty, or has the beginning of what the source has; with `resume` it may also be one that an
    earlier call did not complete. No program may write to either of them meanwhile: stop the one that does. A
    source that was written to all the same is noticed at the end. A source that has traded live gives its id to the
    target as the last step, and refuses live starts from then on.

    Args:
        source_to_mark: the source, opened for writing, where `source` is not.
        target_name: what the source calls the target when it refuses a live start.

    Raises:
        UserError: `target` has something else, is half of another migration, has traded live itself, or a store
            cannot list what it has. Nothing was written.
        Damaged: something in `source` cannot be read; all of it is named, and nothing was written.
        Conflict: a process trades a position that is in one of them, it is named, and nothing was written; or
            the source was written to meanwhile, and what is in the target is not of one moment.
        OutOfSpace, RetryLater: as `Store.put`; call again with `resume` to go on.
    """
    left_out = await _require_movable(source, target)
    complete = await _checkpoint(source, target, resume)
    moving = await require_movable_id(source, target)
    mine, theirs = await walk.parts(source), await _parts_of_target(target)
    waiting = sorted({*mine, *theirs} - complete.keys(), key=lambda part: part.place)
    known = {*theirs} if Capability.LISTING in target.capabilities else {*mine, *theirs}
    present = {part: await _beginning(source, target, part) for part in waiting if part in known}
    work = _Work(source, target, complete, len(waiting), on_progress)
    with work.going_on_later():
        await work.write_down()
        for number, part in enumerate(waiting, 1):
            await work.copy(number, part, present.get(part, 0))
        await work.require_unchanged(mine)
        if moving is not None:
            await work.write_down()  # the source is not to be given up for what is not on the disk yet
            await move_store_id(moving, source_to_mark or source, target, target_name or await place_of(target))
        await work.finish()
    return Migration(work.summary(), left_out)


async def _require_movable(source: Store, target: Store) -> tuple[Finding, ...]:
    """What lies in `source` and is not moved, if nothing speaks against moving the rest."""
    if await _is_same(source, target):
        raise UserError("source and target are the same store: name two")
    if Capability.LISTING not in source.capabilities:
        raise UserError(
            f"{type(source).__name__} cannot list its namespaces and candles, so it cannot be proved that all is moved"
        )
    for store in (source, target):
        if Capability.ORDERED_SCAN not in store.capabilities:
            raise UserError(f"{type(store).__name__} cannot list what it has in order: migrate with another store")
    findings = await source.check(deep=True) if Capability.QUARANTINE in source.capabilities else []
    if blocking := [f"{finding.path}: {finding.problem}" for finding in findings if finding.blocks]:
        listed = "; ".join(blocking[:_MOST_PROBLEMS]) + ("; and more" if len(blocking) > _MOST_PROBLEMS else "")
        raise Damaged(
            f"nothing was moved, because {len(blocking)} of the source cannot be read: {listed}. `backtest-kit store "
            "get` puts what is damaged in quarantine, `... quarantine restore` or `... drop` decides about it"
        )
    for _, space in [*await spaces(source), *await spaces(target)]:
        await require_idle(space)
    return tuple(findings)


async def _is_same(source: Store, target: Store) -> bool:
    if source is target:
        return True
    identity = await source.identity()
    return identity is not None and identity == await target.identity()


async def _parts_of_target(target: Store) -> list[Part]:
    """What the target may have; of candles only if it can list them."""
    return await walk.parts(target, candles=Capability.LISTING in target.capabilities)


async def _beginning(source: Store, target: Store, part: Part) -> int:
    """How much of `part` the target has, if that is the beginning of what the source has.

    Raises:
        UserError: it has something else.
    """
    if part.series is not None:
        return await _shared_candles(source, target, part)
    count = 0
    async with aclosing(walk.records(target, part)) as theirs, aclosing(walk.records(source, part)) as mine:
        async for there in theirs:
            here = await anext(mine, None)
            if here is None or walk.content_of(here) != walk.content_of(there):
                _refuse(part, text_of(MOVED[part.contract], there.key))
            count += 1
    return count


async def _shared_candles(source: Store, target: Store, part: Part) -> int:
    count = 0
    for start, stop in walk.ranges(part):
        theirs = await walk.read_candles(target, part, start, stop)
        if len(theirs):
            mine = await walk.read_candles(source, part, start, stop)
            same = mine.take(np.isin(mine.timestamp, theirs.timestamp))
            if walk.rows_of(same) != walk.rows_of(theirs):
                _refuse(part, f"candles of {iso(int(theirs.timestamp[0]))} .. {iso(int(theirs.timestamp[-1]))}")
            count += len(theirs)
    return count


def _refuse(part: Part, what: str) -> NoReturn:
    raise UserError(
        f"nothing was written: the target has {part}: {what}, which is not what the source has there (or has now). "
        "Name an empty target"
    )


# -- the record of it in the target ----------------------------------------------------------------------


async def _checkpoint(source: Store, target: Store, resume: bool) -> dict[Part, _Complete]:
    """The parts that an earlier call completed, and that the source still has as they were.

    The others are compared: they may have grown since, or belong to another source.
    """
    found = await target.get(MIGRATION, MIGRATION_KEY)
    if found is None or found.removed:
        return {}
    if not resume:
        raise UserError(
            "the target is the half of a migration that was not completed: go on with --resume (resume=True), "
            "or name an empty target"
        )
    try:
        items = msgspec.convert(found.value, list[_Complete])
    except msgspec.ValidationError as error:
        raise Damaged(f"the checkpoint in the target is not one of this version: {error}; name an empty one") from None
    return {item.part: item for item in items if await _mark(source, item.part, item.mark) == item.mark}


async def _mark(source: Store, part: Part, known: str) -> str:
    """Shows whether a part was written to: it changes with every write, and empty without any.

    Of candles, where the first write wins, it is the last one from `known` on.
    """
    if part.series is None:
        return await _record_mark(source, part)
    return _candle_mark(await walk.read_candles(source, part, int(known.partition(":")[0]), EVER[1])) if known else ""


async def _record_mark(source: Store, part: Part) -> str:
    async with aclosing(walk.records(source, part, last=True)) as found:
        async for record in found:
            return walk.digest_of(dump_value([list(record.key), record.rev, record.written_at]))
    return ""


def _candle_mark(found: CandleSeries) -> str:
    return f"{found.timestamp[-1]}:{walk.digest_of(walk.rows_of(found[-1:]))}" if len(found) else ""


class _Work:
    """The copying itself, and how far it has come."""

    def __init__(
        self,
        source: Store,
        target: Store,
        complete: dict[Part, _Complete],
        parts: int,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._source, self._target = source, target
        self._complete = complete
        self._parts = parts
        self._on_progress = on_progress
        self._moved = {name: Moved(name) for name in MOVED}
        for item in complete.values():
            self._moved[item.part.contract].present += item.count
        self._marks = {part: item.mark for part, item in complete.items()}
        self._records = self._candles = 0
        self._written_down = 0.0

    @contextmanager
    def going_on_later(self) -> Iterator[None]:
        """What fails in the body says how far it came, and how to go on."""
        try:
            yield
        except BacktestKitError as error:
            note = (
                f"{error}; {self._records:,} records and {self._candles:,} candles were copied before: "
                "when that is set right, go on with --resume (resume=True)"
            )
            raise type(error)(note, outcome=error.outcome) from error

    async def copy(self, number: int, part: Part, present: int) -> None:
        """Copy what is not `present` of a part."""
        self._tell(number, part)
        self._moved[part.contract].present += present
        if part.series is None:
            # Taken before: what is written from now on makes another one.
            mark = await _record_mark(self._source, part)
            count = present + await self._copy_records(number, part, present)
        else:
            mark, count = await self._copy_candles(number, part)
        self._marks[part] = mark
        if mark:
            self._complete[part] = _Complete(part, count, mark)
        if time.monotonic() - self._written_down > CHECKPOINT_SECONDS:
            await self.write_down()

    async def write_down(self) -> None:
        """Make everything that was copied durable, and then the record of it."""
        await self._flush()
        value = msgspec.to_builtins(list(self._complete.values()))
        await self._target.put(Write(MIGRATION, MIGRATION_KEY, value))
        self._written_down = time.monotonic()

    async def require_unchanged(self, parts: list[Part]) -> None:
        """Make sure that the source is what it was when it was copied.

        Raises:
            Conflict: it was written to.
        """
        now = await walk.parts(self._source)
        changed = [part for part in now if part not in self._marks] + [
            part for part in parts if await _mark(self._source, part, self._marks[part]) != self._marks[part]
        ]
        if changed:
            raise Conflict(
                f"the source was written to while it was copied ({', '.join(map(str, changed[:_MOST_PROBLEMS]))}), so "
                "what is in the target is not of one moment: stop the program that does. What it added is moved by "
                "going on; what it changed takes an empty target"
            )

    async def finish(self) -> None:
        """Make everything durable, and remove the record of the migration."""
        await self._flush()
        await self._target.put(Write(MIGRATION, MIGRATION_KEY, None, removed=True))

    def summary(self) -> tuple[Moved, ...]:
        return tuple(moved for moved in self._moved.values() if moved.copied or moved.present)

    async def _copy_records(self, number: int, part: Part, present: int) -> int:
        """Copy the records behind the first ones; returns how many."""
        row, space = MOVED[part.contract], space_of(self._target, part.namespace)
        expect: Expect = ABSENT if Capability.COMPARE_AND_SET in space.capabilities else ANY
        waiting: list[Write] = []
        position = copied = size = 0

        async def put() -> None:
            nonlocal waiting, size, copied
            await walk.put_all(space, waiting)
            copied += len(waiting)
            self._records += len(waiting)
            self._moved[part.contract].copied += len(waiting)
            waiting, size = [], 0
            self._tell(number, part)

        async with aclosing(walk.records(self._source, part)) as found:
            async for record in found:
                position += 1
                if position <= present:
                    continue
                weight = len(dump_value(record.value))
                if waiting and (len(waiting) >= walk.BATCH_RECORDS or size + weight > walk.BATCH_BYTES):
                    await put()
                waiting.append(
                    Write(row, record.key, record.value, when=record.when, expect=expect, removed=record.removed)
                )
                size += weight
        if waiting:
            await put()
        return copied

    async def _copy_candles(self, number: int, part: Part) -> tuple[str, int]:
        """Copy a series; returns its mark, and how many candles it has."""
        mark, count = "", 0
        async for piece in walk.candles(self._source, part):
            added = await walk.write_candles(self._target, part, piece)
            mark = _candle_mark(piece)
            count += len(piece)
            self._candles += added
            self._moved[part.contract].copied += added
            self._tell(number, part)
        return mark, count

    async def _flush(self) -> None:
        """Make durable what may be group-committed or cached. A store opens again by itself."""
        if Capability.DURABLE in self._target.capabilities:
            await self._target.close()

    def _tell(self, number: int, part: Part) -> None:
        self._on_progress(Progress(part, number, self._parts, self._records, self._candles))
