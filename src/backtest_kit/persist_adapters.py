"""The front door of each persistence contract of the default kit."""

from __future__ import annotations

from backtest_kit.default import default_kit

PersistCandleAdapter = default_kit.persistence.candle
PersistSignalAdapter = default_kit.persistence.signal
PersistScheduleAdapter = default_kit.persistence.schedule
PersistStrategyAdapter = default_kit.persistence.strategy
PersistRiskAdapter = default_kit.persistence.risk
PersistPartialAdapter = default_kit.persistence.partial
PersistBreakevenAdapter = default_kit.persistence.breakeven
PersistStorageAdapter = default_kit.persistence.storage
PersistNotificationAdapter = default_kit.persistence.notification
PersistLogAdapter = default_kit.persistence.log
PersistMeasureAdapter = default_kit.persistence.measure
PersistIntervalAdapter = default_kit.persistence.interval
PersistMemoryAdapter = default_kit.persistence.memory
PersistRecentAdapter = default_kit.persistence.recent
PersistStateAdapter = default_kit.persistence.state
PersistSessionAdapter = default_kit.persistence.session
