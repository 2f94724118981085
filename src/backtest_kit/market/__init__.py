"""What a strategy may see: candles from their source, checked, cached, aligned, and never from the future."""

from __future__ import annotations

from backtest_kit.market import sources

__all__ = ["sources"]
