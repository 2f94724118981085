"""What keeps a live run from acting, whatever its strategy says."""

from __future__ import annotations


class RunFlags:
    """Set by the main loop, looked at before orders are sent."""

    def __init__(self) -> None:
        self.stopping = False
        """Whether nothing new is begun any more."""
        self.no_entry = "the exchange was not asked yet what it holds"
        """Why nothing may be opened or added to; empty while the exchange holds nothing unknown."""
        self.blind = False
        """Whether the price of this minute is unknown."""
        self.unpriced = False
        """Whether no price of the market is known at all, but those in the position state."""
