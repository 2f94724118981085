"""`PaperBroker`: a venue that confirms everything."""

from __future__ import annotations

from backtest_kit.broker.base import Broker


class PaperBroker(Broker):
    """Confirms what the engine decided, at the engine's price; fees and slippage are those of the settings.

    It knows nothing between two calls, so there is nothing to lose: `find` answers `absent`, and an order
    that was under way at a crash is confirmed when it is sent again.
    """
