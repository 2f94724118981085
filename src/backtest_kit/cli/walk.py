"""`backtest-kit walk`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from backtest_kit import Walker, default_kit
from backtest_kit.cli.backtest import _WIDTH_IN_FILES, _file_source, _frame, _pick
from backtest_kit.cli.options import separated
from backtest_kit.cli.strategy_file import load_strategy_file, strategy_failure
from backtest_kit.engine.step import Fill
from backtest_kit.errors import BacktestKitError, UserError
from backtest_kit.report.comparison import Comparison
from backtest_kit.run.backtest import Gaps
from backtest_kit.run.walker import WalkProgress


def run_walk(
    strategy_file: Path,
    symbols: Sequence[str],
    *,
    metric: str,
    strategies: Sequence[str],
    frame: str | None,
    candles: str | None,
    gaps: str,
    fill: str,
    dump: Path,
    exchange_name: str | None,
) -> None:
    """Load the file, replay every strategy, print the ranking and write the reports."""
    kit = default_kit
    kit.dump = dump
    load_strategy_file(strategy_file)
    names = [each.name for each in kit.list_strategy_schemas()]
    if not names:
        raise UserError(f"strategy file {strategy_file} registers no strategy: call backtest_kit.add_strategy_schema")
    if strategies:
        # A name may have commas of its own, as one of a parameter set has.
        names = [name for given in strategies for name in ([given] if given in names else separated([given]))]
    sources = {each.name: each.source for each in kit.list_exchange_schemas()}
    if candles is None or sources:
        exchange = _pick("exchange", exchange_name, list(sources), strategy_file)
    else:
        exchange = exchange_name or "file"
    if candles is not None:
        sources[exchange] = _file_source(candles)
        kit.add_exchange_schema(exchange, source=sources[exchange], replace=True)
    frame_name = _frame(frame, sources.get(exchange), symbols[0], strategy_file)
    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    bar = bars.add_task("", total=len(names))

    def show(progress: WalkProgress) -> None:
        # The bar counts strategies: the fraction of the one that runs moves it on between two of them.
        bars.update(bar, description=progress.strategy_name, completed=progress.number - 1 + progress.fraction)

    try:
        with bars:
            comparison = asyncio.run(
                Walker.run(
                    symbols,
                    strategies=names,
                    exchange_name=exchange,
                    frame_name=frame_name,
                    metric=metric,
                    fill=cast(Fill, fill),
                    gaps=cast(Gaps, gaps),
                    on_progress=show,
                )
            )
    except BacktestKitError as error:
        raise strategy_failure(error, strategy_file) from error
    _show(comparison, strategy_file)


def _show(comparison: Comparison, strategy_file: Path) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_IN_FILES)
    console.print(comparison.table())
    for remark in comparison.remarks():
        console.print(f"{remark}.", highlight=False)
    markdown, page = comparison.save_markdown(), comparison.save_html()
    console.print(f"Report: {markdown}\nCharts: {page}", highlight=False, soft_wrap=True)
    if len(comparison.failures()) == len(comparison):
        raise UserError(
            f"every strategy failed; for where in your code: backtest-kit backtest {strategy_file} "
            f"--strategy {comparison[0].strategy_name!r} with the same options"
        )
