"""`backtest-kit report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from backtest_kit.cli.backtest import WIDTH_IN_FILES, trades_table
from backtest_kit.errors import UserError
from backtest_kit.report import Results


def run_report(files: Sequence[Path], *, html: Path | None, markdown: Path | None, trades_shown: int) -> None:
    """Load the results, print them as `backtest-kit backtest` did, and write the reports that are asked for."""
    twice = next((file for file in files if list(files).count(file) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice: its trades would count twice")
    results = Results([result for file in files for result in Results.load(file)])
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_IN_FILES)
    if trades_shown and results.trades:
        console.print(trades_table(results, trades_shown))
    console.print(results.table())
    for remark in results.remarks():
        console.print(f"{remark}.", highlight=False)
    if markdown is not None:
        console.print(f"Report: {results.save_markdown(markdown)}", highlight=False, soft_wrap=True)
    if html is not None:
        console.print(f"Charts: {results.save_html(html)}", highlight=False, soft_wrap=True)
