"""What a backend can tell an operator beyond its records. Optional: a store is complete without it.

File and SQLite stores implement all of it, the memory store what lists.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import msgspec

from backtest_kit.persist.quarantine import Quarantined
from backtest_kit.persist.store import Record, SeriesKey


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
        """Everything that is wrong, by path, after reading every record. Changes nothing.

        With `deep`, every candle is read as well, and the backend's own structures are verified.
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
class ListsNamespaces(Protocol):
    """A store that knows its namespaces."""

    async def namespaces(self) -> list[tuple[str, ...]]:
        """Every namespace below this one that has something in it, as the names that lead there."""
        ...


@runtime_checkable
class ListsSeries(Protocol):
    """A candle store that knows what it has."""

    async def series(self) -> list[SeriesKey]:
        """Every series that has candles."""
        ...
