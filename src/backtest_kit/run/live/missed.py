"""Minutes in which a live run could not decide: counted one by one, reported once per gap."""

from __future__ import annotations

import logging

from backtest_kit.model.event import MinutesMissed
from backtest_kit.model.identity import Identity
from backtest_kit.model.interval import MINUTE_MS, iso

_log = logging.getLogger("backtest_kit")


class MissedMinutes:
    """Consecutive missed minutes are one gap. Its first is logged immediately; the event comes when it is over."""

    def __init__(self, identity: Identity) -> None:
        self.total = 0
        """All minutes missed in this run."""
        self.reason = ""
        """Why nothing is decided at the moment; empty while the run acts."""
        self._identity = identity
        self._first_ms = 0
        self._count = 0
        self._why = ""

    def add(self, first_ms: int, count: int, reason: str) -> None:
        """Minutes that passed without a decision, from `first_ms` on."""
        self.total += count
        self.reason = reason
        if not self._count:
            self._first_ms, self._why = first_ms, reason
            _log.warning("%s: no decision at %s: %s", self._identity.symbol, iso(first_ms), reason)
        self._count += count

    def over(self, when_ms: int) -> MinutesMissed | None:
        """The gap before this minute, or None."""
        self.reason = ""
        if not self._count:
            return None
        event = MinutesMissed(
            identity=self._identity, when_ms=when_ms, count=self._count, first_ms=self._first_ms, reason=self._why
        )
        self._count = 0
        last_ms = event.first_ms + (event.count - 1) * MINUTE_MS
        _log.warning(
            "%s: missed %s from %s to %s: %s", self._identity.symbol,
            "1 minute" if event.count == 1 else f"{event.count} minutes", iso(event.first_ms), iso(last_ms),
            event.reason, extra={"event": event},
        )  # fmt: skip
        return event
