"""Failures of a live run as events and as log lines."""

from __future__ import annotations

import logging

from backtest_kit.broker.base import Order
from backtest_kit.format import describe, error_text
from backtest_kit.model.event import Event, OrderFailed, StoreDegraded, StoreRecovered, StrategyFailed
from backtest_kit.run.run_state import RunState

_log = logging.getLogger("backtest_kit")


class Alarms:
    """Reports failures of this minute with the next events of the run."""

    def __init__(self, run_state: RunState) -> None:
        self._run_state = run_state
        self._identity = run_state.rules.identity
        self._settings = run_state.rules.settings
        self._silent = 0
        """How often in a row the exchange did not answer."""

    def order_failed(self, order: Order, reason: str, next_step: str, *, alarm: bool = False) -> None:
        """An order did not go through, or its outcome is unknown."""
        self._publish(
            OrderFailed(
                identity=self._identity,
                when_ms=self._run_state.tick.when_ms,
                kind=order.kind,
                client_order_id=order.client_order_id,
                attempt=order.attempt,
                reason=reason,
                next_step=next_step,
                alarm=alarm,
            )
        )

    def venue_silent(self, order_id: str, error: Exception) -> None:
        """The exchange did not report the state of an order, a position or an entry; too often is an alarm."""
        self._silent += 1
        self._publish(
            OrderFailed(
                identity=self._identity,
                when_ms=self._run_state.tick.when_ms,
                kind="check",
                client_order_id=order_id,
                attempt=self._silent - 1,
                reason=error_text(error),
                next_step="it is checked again at the next minute",
                alarm=self._silent > self._settings.CC_ORDER_CHECK_RETRY_ATTEMPTS,
            )
        )

    def venue_answered(self) -> None:
        """The exchange has answered."""
        self._silent = 0

    def user_failed(self, what: str, error: Exception, *, publish: bool) -> None:
        """The user's code raised; without `publish` it is only logged."""
        identity = self._identity
        event = StrategyFailed(identity=identity, when_ms=self._run_state.tick.when_ms, what=what, error=error)
        _log.error(
            "%s of %s: %s", identity.strategy_name, identity.symbol, describe(event), exc_info=error,
            extra={"event": event} if publish else None,
        )  # fmt: skip
        if publish:
            self._run_state.events.append(event)

    def store_changed(self, degraded: str, *, kept: bool) -> None:
        """The store rejects writes, for the given reason; or accepts them again, if that is empty."""
        identity, when_ms = self._identity, self._run_state.tick.when_ms
        event: Event = StoreRecovered(identity=identity, when_ms=when_ms)
        if degraded:
            event = StoreDegraded(identity=identity, when_ms=when_ms, reason=degraded, kept=kept)
        level = logging.ERROR if degraded else logging.WARNING
        _log.log(level, "%s: %s", identity.symbol, describe(event), extra={"event": event})
        self._run_state.events.append(event)

    def _publish(self, event: OrderFailed) -> None:
        level = logging.ERROR if event.alarm else logging.WARNING
        _log.log(level, "%s: %s", event.symbol, describe(event), extra={"event": event})
        self._run_state.events.append(event)
