"""The `backtest-kit` command: one thin module per verb, each imported when it is called."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is only being imported ends it without a traceback."""
    try:
        from backtest_kit.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


__all__ = ["main"]
