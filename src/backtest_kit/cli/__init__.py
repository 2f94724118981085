"""The `backtest-kit` command: one thin module per verb, each imported when it is called."""

from __future__ import annotations

from backtest_kit.cli.app import main

__all__ = ["main"]
