"""What a backend can do for an operator beyond keeping records. Optional: a store is complete without it.

File, SQLite and Mongo stores implement all of it, the memory store what lists and prunes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import msgspec

from backtest_kit.errors import UserError
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.quarantine import Quarantined
from backtest_kit.persist.store import Key, Record, SeriesKey


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong with a store, in plain words."""

    path: str
    """Where it is: relative to the root of the files, or as the quarantine names it."""
    problem: str
    blocks: bool = True
    """Whether something that was stored cannot be read for it; otherwise it is only worth knowing."""


@runtime_checkable
class Upkeep(Protocol):
    """A store that can be inspected and mended. Every method sees all namespaces."""

    async def check(self, *, deep: bool = False) -> list[Finding]:
        """Everything that is wrong, by path. Changes nothing.

        Every record is read, and the backend's own structures are verified; with `deep`, so is every candle.
        """
        ...

    async def quarantined(self) -> list[Quarantined]:
        """What is in quarantine, by path."""
        ...

    async def restore(self, path: str) -> Record | None:
        """Put what is in quarantine under `path` back as it is now, perhaps mended by hand, and free its key.

        Returns the record, or None for candles.

        Raises:
            UserError: nothing is called so, it cannot be put back, or it is still damaged.
        """
        ...

    async def drop(self, path: str) -> Quarantined:
        """Give up what is in quarantine under `path`, which frees its key.

        Raises:
            UserError: nothing is called so.
        """
        ...


@runtime_checkable
class AcceptsLoss(Protocol):
    """A store that notices when acknowledged writes are gone, and is not opened until an operator has decided."""

    async def accept_loss(self) -> str | None:
        """Go on with what is left. Returns what was lost, or None if nothing is missing, and then changes nothing.

        Raises:
            Damaged, RetryLater, UserError: the store cannot be opened even so.
        """
        ...


@runtime_checkable
class Prunes(Protocol):
    """A store that can forget. What it forgets was never written: the next write of the key is revision 1."""

    async def prune(self, contract: Contract, revisions: Mapping[Key, int]) -> int:
        """Forget every key that still has the revision given for it; return how many those were.

        What was written since, and what cannot be trusted, stays. A crash leaves a part of it forgotten.

        Raises:
            UserError: the contract is of money class, of which nothing is ever forgotten.
            RetryLater, OutOfSpace: not all of it was forgotten.
        """
        ...

    async def count(self, contract: Contract) -> int:
        """How many records of a contract `scan` would list, removed ones left out, without reading them."""
        ...

    async def forget(self) -> None:
        """Forget all that is in this namespace and in those below it. Nobody may be writing there.

        Raises:
            UserError: it is no namespace but the whole store.
        """
        ...


@runtime_checkable
class ListsNamespaces(Protocol):
    """A store that knows its namespaces."""

    async def namespaces(self) -> list[tuple[str, ...]]:
        """Every namespace below this one that has something in it, as the names that lead there."""
        ...


@runtime_checkable
class Identified(Protocol):
    """A store that can be told from every other one, however they are addressed."""

    async def identity(self) -> str | None:
        """The same for every object that has this store, and for no other; None while nothing is there. Makes nothing.

        Raises:
            RetryLater, UserError: the server cannot be asked.
        """
        ...


@runtime_checkable
class LeavesLoops(Protocol):
    """A store with connections of its own for each event loop."""

    async def leave_loop(self) -> None:
        """Close those of the running loop, which is about to end. What they still owe the server is written first."""
        ...


@runtime_checkable
class ListsSeries(Protocol):
    """A candle store that knows what it has."""

    async def series(self) -> list[SeriesKey]:
        """Every series that has candles."""
        ...


def require_prunable(contract: Contract) -> None:
    """Raise `UserError` if nothing of this contract may be forgotten."""
    if contract.durability is Durability.MONEY:
        raise UserError(f"{contract.name} is of money class: its records are never forgotten, write an empty value")


def require_namespace(inside: bool) -> None:
    """Raise `UserError` unless this is a namespace of a store."""
    if not inside:
        raise UserError("only a namespace can be forgotten as a whole, such as store.within('backtest-1')")
