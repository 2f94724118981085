"""What a run remembers: one module for each record, the same in backtest, paper and live."""

from __future__ import annotations
