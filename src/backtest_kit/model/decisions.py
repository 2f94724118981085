"""What became of the calls of `get_signal`: why a strategy was never entered."""

from __future__ import annotations

import msgspec


class Decisions(msgspec.Struct, kw_only=True, rename="camel"):
    """Counts of one run, from its first minute on."""

    called: int = 0
    """How often `get_signal` was called: once in each slot in which nothing was held and the run was not paused."""
    returned_none: int = 0
    repeated: int = 0
    """Signals with the id of the position before, which are ignored."""
    rejected: dict[str, int] = {}
    """Signals that a risk profile has rejected, by the name of the profile."""
    cancelled: dict[str, int] = {}
    """Resting entries that ended without a fill, by the reason."""

    def count(self, kind: dict[str, int], name: str) -> None:
        """One more of a kind that has names."""
        kind[name] = kind.get(name, 0) + 1
