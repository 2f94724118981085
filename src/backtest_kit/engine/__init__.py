"""Pure decisions: validation, profit, sizes, the state machine and its replay. No I/O and no clock."""

from backtest_kit.engine import sizing

__all__ = ["sizing"]
