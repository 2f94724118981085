"""What a live run does around its events, and about errors of the user's code."""

from __future__ import annotations

from typing import Final

from backtest_kit.broker.base import OrderKind
from backtest_kit.errors import Conflict, RetryLater
from backtest_kit.model.event import Event, Lasting, PositionClosed, StrategyFailed
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.position import Trade
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.run.live.alarms import Alarms
from backtest_kit.run.minute import RunHooks
from backtest_kit.run.run_state import RunState

_ONE_OUTAGE_MS: Final = 5 * MINUTE_MS
"""An error within this time of the last one is the same outage, which was reported."""


class LiveHooks(RunHooks):
    """Counts trades, passes crash points, and keeps a run going when the user's code raises."""

    def __init__(self, run_state: RunState, alarms: Alarms) -> None:
        self._run_state = run_state
        self._alarms = alarms
        self._unpublished: list[OrderKind] = []
        """Kinds of the orders whose events are not published yet."""
        self._publishing: Event | None = None
        self._undecided = -_ONE_OUTAGE_MS - 1, ""
        """The last minute at which something that the strategy needs was away, and what."""
        self.lost: Conflict | None = None
        """Set once another process has the position: this run must stop."""
        self.trades: list[Trade] = []

    def stop_if_lost(self) -> None:
        """
        Raises:
            Conflict: another process has the position.
        """
        if self.lost is not None:
            raise self.lost

    def order_done(self, kind: OrderKind) -> None:
        """The outcome of an order was stored; its events are published next."""
        self._unpublished.append(kind)

    def on_event(self, event: Event) -> None:
        self._publishing = event
        if isinstance(event, PositionClosed):
            self.trades.append(event.trade)

    def on_published(self, event: Event) -> None:
        self._publishing = None
        if self._unpublished and isinstance(event, Lasting):
            crashpoint(f"live.{self._unpublished.pop(0)}.after_emit")

    @property
    def undecided(self) -> str:
        """Why the strategy could not decide at this minute; it is called again at the next one. Empty if it could."""
        when_ms, reason = self._undecided
        return reason if when_ms == self._run_state.tick.when_ms else ""

    async def on_error(self, what: str, error: Exception) -> None:
        self.stop_if_lost()
        if what == "get_signal" and isinstance(error, RetryLater):
            (before_ms, _), now_ms = self._undecided, self._run_state.tick.when_ms
            self._undecided = now_ms, str(error)
            if now_ms - before_ms <= _ONE_OUTAGE_MS:
                return
        # A handler that fails on a StrategyFailed event would fail again on the event of that.
        self._alarms.user_failed(what, error, publish=not isinstance(self._publishing, StrategyFailed))
