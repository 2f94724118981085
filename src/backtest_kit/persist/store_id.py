"""The id of a store: it is part of every client order id, so that orders on an exchange say which store sent them.

It is made at the first live start and stays for the life of the store. A migration moves it: the source keeps a note
of where it went and refuses live starts, because two stores of one id would each take the other's orders for its own.
"""

from __future__ import annotations

from typing import Final

import msgspec

from backtest_kit.errors import Conflict, Damaged, UserError
from backtest_kit.persist.contracts import STORE_ID, STORE_ID_KEY
from backtest_kit.persist.store import ABSENT, ANY, Capability, Expect, Record, Store, Write
from backtest_kit.seams import SYSTEM, Seams

_DIGITS: Final = 6
RECLAIM: Final = "backtest-kit store reclaim --store ADDRESS"


class StoreId(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """What a store knows of its own id."""

    id: str
    """6 hex digits, not all of them 0."""
    moved_to: str = ""
    """The store that has it now; empty while it is this one."""


async def claim_store_id(store: Store, seams: Seams = SYSTEM) -> str:
    """The id of a store that orders are sent from, made where it has none. Two processes agree on one.

    Raises:
        Conflict: the id was moved to another store; the message names it and the way back.
        Damaged, OutOfSpace, RetryLater: as `Store.put`.
    """
    known = await read_store_id(store)
    if known is None:
        # Of two processes that start at once the second is refused here, and reads what the first has written.
        try:
            made = StoreId(_new_id(seams))
            await _write(store, made, ABSENT)
            return made.id
        except Conflict:
            known = await read_store_id(store)
            if known is None:
                raise
    if known.moved_to:
        raise Conflict(
            f"this store was moved to {known.moved_to}, which live trading has to use now: two stores with the same "
            f"positions would trade them twice. To go back to this one, stop using the other and run `{RECLAIM}`"
        )
    return known.id


def _new_id(seams: Seams) -> str:
    while not (made := seams.random_hex(_DIGITS)).strip("0"):
        continue  # all zeros would mean no store
    return made


async def read_store_id(store: Store) -> StoreId | None:
    """What a store knows of its id; None before its first live start.

    Raises:
        Damaged, RetryLater: as `Store.get`.
    """
    found = await store.get(STORE_ID, STORE_ID_KEY)
    return None if found is None or found.removed else _read(found)


async def require_movable_id(source: Store, target: Store) -> StoreId | None:
    """The id that a migration takes along, None where the source has none.

    Raises:
        UserError: the target has another id, or the source gave its own to another store.
    """
    mine, theirs = await read_store_id(source), await read_store_id(target)
    if mine is None:
        return None
    if theirs is not None and theirs.id != mine.id:
        raise UserError(
            f"the target has traded live itself, as store {theirs.id}, and the source as store {mine.id}: orders of "
            "one would be lost to the other. Name an empty target"
        )
    if theirs is None and mine.moved_to:
        raise UserError(
            f"the source was moved to {mine.moved_to} already: migrate that one, or, if it is lost, run `{RECLAIM}`"
        )
    return mine


async def move_store_id(moving: StoreId, source: Store, target: Store, target_name: str) -> None:
    """Give the id to the target, then note in the source where it is: a crash in between leaves it in both, and the
    migration, which is not complete before, goes on with this."""
    theirs = await read_store_id(target)
    if theirs is None or theirs.moved_to:  # it comes back to where it was before
        await _write(target, StoreId(moving.id), ABSENT if theirs is None else ANY)
    await _write(source, StoreId(moving.id, moved_to=target_name), ANY)


async def reclaim_store_id(store: Store) -> str:
    """Let a store trade live again after its id was moved; returns where it had gone.

    Raises:
        UserError: it was not moved.
    """
    known = await read_store_id(store)
    if known is None or not known.moved_to:
        raise UserError("this store was not moved: live trading can use it as it is")
    await _write(store, StoreId(known.id), ANY)
    return known.moved_to


async def place_of(store: Store) -> str:
    """The place of a store for people, and to tell it from a copy of it: a path, or what its server calls it."""
    return (await store.identity() or type(store).__name__).rstrip("/")


async def _write(store: Store, value: StoreId, expect: Expect) -> None:
    expect = expect if Capability.COMPARE_AND_SET in store.capabilities else ANY
    await store.put(Write(STORE_ID, STORE_ID_KEY, msgspec.to_builtins(value), expect=expect))


def _read(record: Record) -> StoreId:
    try:
        return msgspec.convert(record.value, StoreId)
    except msgspec.ValidationError as error:
        raise Damaged(f"the record of the store's id cannot be read: {error}") from None
