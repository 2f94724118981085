"""`PaperBroker`: confirms every order."""

from __future__ import annotations

from backtest_kit.broker.base import Broker


class PaperBroker(Broker):
    """Confirms what the engine decided, at the engine's price; fees and slippage are those of the settings.

    It has no state: `find` answers `absent`, and an order that was pending at a crash is confirmed when it is sent
    again.
    """
