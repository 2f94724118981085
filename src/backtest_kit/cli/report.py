"""`backtest-kit report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from backtest_kit.cli.backtest import print_results
from backtest_kit.errors import UserError
from backtest_kit.report import Results


def run_report(files: Sequence[Path], *, html: Path | None, markdown: Path | None, trades_shown: int) -> None:
    """Load the results, print them as `backtest-kit backtest` did, and write the given reports."""
    twice = next((file for file in files if list(files).count(file) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice: its trades would count twice")
    results = Results([result for file in files for result in Results.load(file)])
    output = print_results(results, trades_shown)
    if markdown is not None:
        output.print(f"Report: {results.save_markdown(markdown)}", highlight=False, soft_wrap=True)
    if html is not None:
        output.print(f"Charts: {results.save_html(html)}", highlight=False, soft_wrap=True)
