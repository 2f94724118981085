"""`backtest-kit walk`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from backtest_kit import Walker
from backtest_kit.cli.backtest import WIDTH_IN_FILES
from backtest_kit.cli.choice import choose
from backtest_kit.cli.interrupt import run_until_interrupted
from backtest_kit.cli.options import separated
from backtest_kit.cli.printing import console
from backtest_kit.cli.strategy_file import strategy_failure
from backtest_kit.errors import BacktestKitError, UserError
from backtest_kit.report.comparison import Comparison
from backtest_kit.run.replay.backtest import ReplayOptions
from backtest_kit.run.replay.walker import WalkProgress


def run_walk(
    strategy_file: Path,
    symbols: Sequence[str],
    *,
    metric: str,
    strategies: Sequence[str],
    frame: str | None,
    candles: str | None,
    dump: Path,
    exchange_name: str | None,
    rules: ReplayOptions,
) -> None:
    """Load the file, replay every strategy, print the ranking and write the reports."""
    choice = choose(strategy_file, symbols[0], frame=frame, candles=candles, dump=dump, exchange_name=exchange_name)
    names = choice.strategies
    if strategies:
        # A name may have commas of its own, as one of a parameter set has.
        names = [name for given in strategies for name in ([given] if given in names else separated([given]))]
    terminal = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=terminal,
        transient=True,
        disable=not terminal.is_terminal,
    )
    bar = bars.add_task("", total=len(names))

    def show(progress: WalkProgress) -> None:
        # The bar counts strategies: the fraction of the one that runs moves it on between two of them.
        bars.update(bar, description=progress.strategy_name, completed=progress.number - 1 + progress.fraction)

    try:
        with bars:
            comparison = run_until_interrupted(
                Walker.run(
                    symbols,
                    strategies=names,
                    exchange_name=choice.exchange,
                    frame_name=choice.frame,
                    metric=metric,
                    on_progress=show,
                    **rules,
                )
            )
    except BacktestKitError as error:
        raise strategy_failure(error, strategy_file) from error
    _show(comparison, strategy_file)


def _show(comparison: Comparison, strategy_file: Path) -> None:
    output = console(WIDTH_IN_FILES)
    output.print(comparison.table())
    for remark in comparison.remarks():
        output.print(f"{remark}.", highlight=False)
    markdown, page = comparison.save_markdown(), comparison.save_html()
    output.print(f"Report: {markdown}\nCharts: {page}", highlight=False, soft_wrap=True)
    if len(comparison.failures()) == len(comparison):
        raise UserError(
            f"every strategy failed; for where in your code: backtest-kit backtest {strategy_file} "
            f"--strategy {comparison[0].strategy_name!r} with the same options"
        )
