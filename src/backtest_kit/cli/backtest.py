"""`backtest-kit backtest`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from backtest_kit import default_kit
from backtest_kit.cli.choice import choose, pick
from backtest_kit.cli.interrupt import run_until_interrupted
from backtest_kit.cli.printing import console
from backtest_kit.cli.strategy_file import strategy_failure
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.price import price_text
from backtest_kit.report import Results
from backtest_kit.run.replay.backtest import BacktestHandle, ReplayOptions

_REDRAW_S: Final = 0.1
WIDTH_IN_FILES: Final = 120


def run_backtest(
    strategy_file: Path,
    symbols: Sequence[str],
    *,
    frame: str | None,
    candles: str | None,
    dump: Path,
    strategy_name: str | None,
    exchange_name: str | None,
    trades_shown: int,
    rules: ReplayOptions,
) -> None:
    """Load the file, replay every symbol, print the outcome and write the reports."""
    kit = default_kit
    choice = choose(strategy_file, symbols[0], frame=frame, candles=candles, dump=dump, exchange_name=exchange_name)
    strategy = pick("strategy", strategy_name, choice.strategies, strategy_file)

    async def run_all() -> Results:
        handles = [
            kit.backtest.background(
                each,
                strategy_name=strategy,
                exchange_name=choice.exchange,
                frame_name=choice.frame,
                **rules,
            )
            for each in dict.fromkeys(symbols)
        ]
        return await _watch(handles)

    try:
        results = run_until_interrupted(run_all())
    except (Exception, SystemExit) as error:
        raise strategy_failure(error, strategy_file) from error
    _show(results, trades_shown)


async def _watch(handles: Sequence[BacktestHandle]) -> Results:
    """Wait for all, with a bar for each on a terminal. The first failure ends the run."""
    terminal = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=terminal,
        transient=True,
        disable=not terminal.is_terminal,
    )
    tasks = [each.task for each in handles]
    bar_of = {bars.add_task(each.symbol, total=1.0): each for each in handles}
    try:
        with bars:
            while not all(task.done() for task in tasks):
                for bar, handle in bar_of.items():
                    bars.update(bar, completed=handle.progress)
                await asyncio.wait(tasks, timeout=_REDRAW_S, return_when=asyncio.FIRST_EXCEPTION)
                if any(task.done() and task.exception() is not None for task in tasks):
                    break
    finally:
        # Also after an interrupt: every run ends here, and each error that is not raised below was looked at.
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    failure = next((each for each in outcomes if isinstance(each, Exception)), None)
    if failure is not None:
        raise failure
    return Results(task.result() for task in tasks)


def print_results(results: Results, trades_shown: int) -> Console:
    """Print the last trades, the statistics and the remarks; return the console, for what follows them."""
    output = console(WIDTH_IN_FILES)
    if trades_shown and results.trades:
        output.print(_trades_table(results, trades_shown))
    output.print(results.table())
    for remark in results.remarks():
        output.print(f"{remark}.", highlight=False)
    return output


def _show(results: Results, trades_shown: int) -> None:
    output = print_results(results, trades_shown)
    output.print(_origin(results), highlight=False)
    markdown, page = results.save_markdown(), results.save_html()
    output.print(f"Report: {markdown}\nCharts: {page}\nResults: {results.save()}", highlight=False, soft_wrap=True)


def _origin(results: Results) -> str:
    used, fetched = sum(each.candles_used for each in results), sum(each.candles_fetched for each in results)
    filled = sum(sum(each.gaps_filled.values()) for each in results)
    parts = {"from the source": fetched, "from the cache": used - fetched - filled, "filled": filled}
    shares = [f"{count:,} {origin}" for origin, count in parts.items() if count]
    return f"Candles: all {shares[0]}." if len(shares) == 1 else f"Candles: {used:,}, of them {', '.join(shares)}."


def _trades_table(results: Results, shown: int) -> Table:
    trades = results.trades
    title = f"{len(trades)} trades" if len(trades) <= shown else f"The last {shown} of {len(trades)} trades"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("Symbol", "Side", "Opened", "Held", "Reason"):
        table.add_column(heading, no_wrap=True)
    for heading in ("Open", "Close", "PnL %"):
        table.add_column(heading, no_wrap=True, justify="right")
    for trade in trades[-shown:]:
        hours, minutes = divmod((trade.closed_at_ms - trade.opened_at_ms) // MINUTE_MS, 60)
        table.add_row(
            Text(trade.symbol),
            trade.side,
            f"{trade.opened_at:%Y-%m-%d %H:%M}",
            f"{hours}h{minutes:02}",
            trade.close_reason,
            price_text(trade.price_open),
            price_text(trade.price_close),
            Text(f"{trade.pnl_pct:+.2f}", style="green" if trade.pnl_pct > 0 else "red"),
        )
    return table
