"""The default kit, and its methods as functions of the package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backtest_kit.kit import Kit

if TYPE_CHECKING:
    from backtest_kit.persist.adapters import CandleAdapter, ContractAdapter
    from backtest_kit.run.live.runner import LiveRunner

default_kit = Kit()

add_exchange_schema = default_kit.add_exchange_schema
add_frame_schema = default_kit.add_frame_schema
add_risk_schema = default_kit.add_risk_schema
add_strategy_schema = default_kit.add_strategy_schema
list_exchange_schemas = default_kit.list_exchange_schemas
list_frame_schemas = default_kit.list_frame_schemas
list_risk_schemas = default_kit.list_risk_schemas
list_strategy_schemas = default_kit.list_strategy_schemas
get_config = default_kit.get_config
set_config = default_kit.set_config
on = default_kit.on
cron = default_kit.cron
interval = default_kit.records.interval
measure = default_kit.records.measure
remove_cron = default_kit.remove_cron
Backtest = default_kit.backtest
Walker = default_kit.walker

Live: LiveRunner
PersistCandleAdapter: CandleAdapter
PersistSignalAdapter: ContractAdapter
PersistScheduleAdapter: ContractAdapter
PersistStrategyAdapter: ContractAdapter
PersistRiskAdapter: ContractAdapter
PersistPartialAdapter: ContractAdapter
PersistBreakevenAdapter: ContractAdapter
PersistStorageAdapter: ContractAdapter
PersistNotificationAdapter: ContractAdapter
PersistLogAdapter: ContractAdapter
PersistMeasureAdapter: ContractAdapter
PersistIntervalAdapter: ContractAdapter
PersistMemoryAdapter: ContractAdapter
PersistRecentAdapter: ContractAdapter
PersistStateAdapter: ContractAdapter
PersistSessionAdapter: ContractAdapter


def __getattr__(name: str) -> object:
    """What a backtest does not wait for: the live runner, and the front door of each contract in the table."""
    if name == "Live":
        return default_kit.live
    if name.startswith("Persist"):
        doors = default_kit.persistence.front_doors()
        if name in doors:
            return doors[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
