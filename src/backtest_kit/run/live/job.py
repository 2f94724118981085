"""One live run, resolved."""

from __future__ import annotations

import msgspec

from backtest_kit.broker.base import Broker
from backtest_kit.engine.step import Rules
from backtest_kit.market.clock import Clock
from backtest_kit.market.fetch import GapRule
from backtest_kit.market.repair import DirtyRule
from backtest_kit.model.identity import Identity
from backtest_kit.persist.lease import DEFAULT_TTL
from backtest_kit.run.live.exchange_time import VenueTime
from backtest_kit.run.live.orphans import OrphanPolicy
from backtest_kit.run.schema import RiskSchema, StrategySchema
from backtest_kit.run.services import StoreCheck
from backtest_kit.settings import Settings


class LiveJob(msgspec.Struct, frozen=True, kw_only=True):
    """One live run, resolved: every name looked up, every option checked."""

    identity: Identity
    strategy: StrategySchema
    risks: tuple[RiskSchema, ...]
    settings: Settings
    rules: Rules
    broker: Broker
    time: VenueTime
    gaps: GapRule
    dirty: DirtyRule
    orphans: OrphanPolicy
    fitness: StoreCheck | None = None
    """Checks the stores before the start; None if they are trusted."""
    lease_ttl_s: float = DEFAULT_TTL
    """Seconds after which another machine may take the position of a process that is silent."""

    @property
    def clock(self) -> Clock:
        """The clock of the run."""
        return self.time.clock

    @property
    def scope(self) -> tuple[str, str, str]:
        """The key of the position's records."""
        return self.identity.strategy_name, self.identity.exchange_name, self.identity.symbol

    @property
    def place(self) -> tuple[str, str, str]:
        """Runs of the same mode, exchange and symbol share one position on the exchange."""
        return self.identity.mode, self.identity.exchange_name, self.identity.symbol
