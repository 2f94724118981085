"""What a backend can tell an operator beyond its records. Optional: a store is complete without it.

`SqliteStore` and `FileStore` implement `Upkeep`, and their candle stores `ListsSeries`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol, runtime_checkable

import msgspec

from backtest_kit.persist.quarantine import Quarantined
from backtest_kit.persist.store import SeriesKey


class Entry(msgspec.Struct, frozen=True):
    """One stored thing as an inspection finds it."""

    namespace: str
    """As the backend writes it; empty for live."""
    contract: str
    name: str
    """Its key as text, or as much of one as can be told."""
    size: int
    """Bytes that it takes, without what the backend adds."""
    removed: bool = False
    fault: str | None = None
    """What is wrong with it, in plain words."""


@runtime_checkable
class Upkeep(Protocol):
    """A store that can be inspected and mended by hand."""

    def audit(self, *, deep: bool = False) -> AsyncIterator[Entry]:
        """Everything in the backend, in every namespace, verified by reading it. Changes nothing.

        With `deep`, the structures of the backend and every candle file are verified as well.
        """
        ...

    async def namespaces(self) -> list[tuple[str, ...]]:
        """Every namespace that has something in it, as the names that lead there through `within`."""
        ...

    async def quarantined(self) -> list[Quarantined]:
        """What is in quarantine, by path."""
        ...

    async def restore(self, path: str) -> None:
        """Accept what is under `path` as it is now, perhaps mended by hand, and free its key.

        Raises:
            UserError: nothing in quarantine is called so.
            Damaged: it cannot be read even so; nothing has changed.
        """
        ...

    async def drop(self, path: str) -> None:
        """Give up what is under `path`, copies included, and free its key.

        Raises:
            UserError: nothing in quarantine is called so.
        """
        ...


@runtime_checkable
class ListsSeries(Protocol):
    """A candle store that knows what it has."""

    async def series(self) -> list[SeriesKey]:
        """Every series that has candles."""
        ...
