"""What stops a live run from acting on its strategy."""

from __future__ import annotations


class RunFlags:
    """Set by the main loop, checked before orders are sent."""

    def __init__(self) -> None:
        self.stopping = False
        """Whether the run opens nothing more."""
        self.no_entry = "store and exchange were not compared yet"
        """Why nothing may be opened or added to; empty while the exchange holds nothing unknown."""
        self.blind = False
        """Whether the price of this minute is unknown."""
        self.unpriced = False
        """Whether the only known prices are those in the position state."""
