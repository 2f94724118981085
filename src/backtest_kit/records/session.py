"""`Session`: what a strategy has computed for a symbol and would have to compute again after a restart."""

from __future__ import annotations

from typing import Final

from backtest_kit.model.identity import Identity
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.records.scope import Scope
from backtest_kit.records.state import Slot

_SESSION: Final = CONTRACTS["session"]


class Session(Slot):
    """One value for each strategy, exchange, frame, symbol and mode, with or without a position."""

    def __init__(self, scope: Scope, identity: Identity) -> None:
        key = (
            identity.strategy_name,
            identity.exchange_name,
            identity.frame_name,
            identity.symbol,
            identity.mode == "backtest",
        )
        super().__init__(scope, _SESSION, (key,))
