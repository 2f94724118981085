"""`backtest-kit backtest`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final, cast

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from backtest_kit import default_kit, sources
from backtest_kit.cli.strategy_file import load_strategy_file, strategy_failure
from backtest_kit.engine.step import Fill
from backtest_kit.errors import UserError
from backtest_kit.market.sources import CandleSource
from backtest_kit.model.interval import iso
from backtest_kit.report import Results
from backtest_kit.run.backtest import BacktestHandle, Gaps

_REDRAW_S: Final = 0.1
_WIDTH_IN_FILES: Final = 120


def run_backtest(
    strategy_file: Path,
    symbols: Sequence[str],
    *,
    frame: str | None,
    candles: str | None,
    gaps: str,
    fill: str,
    dump: Path,
    strategy_name: str | None,
    exchange_name: str | None,
    trades_shown: int,
) -> None:
    """Load the file, replay every symbol, print the outcome and write the reports."""
    kit = default_kit
    kit.dump = dump
    load_strategy_file(strategy_file)
    strategy = _pick("strategy", strategy_name, [each.name for each in kit.list_strategy_schemas()], strategy_file)
    exchanges = [each.name for each in kit.list_exchange_schemas()]
    source: CandleSource | None
    if candles is not None:
        exchange = _pick("exchange", exchange_name, exchanges, strategy_file) if exchanges else "file"
        source = _file_source(candles)
        kit.add_exchange_schema(exchange, source=source, replace=True)
    else:
        exchange = _pick("exchange", exchange_name, exchanges, strategy_file)
        source = next((each.source for each in kit.list_exchange_schemas() if each.name == exchange), None)
    frame_name = _frame(frame, source, symbols[0], strategy_file)

    async def run_all() -> Results:
        handles = [
            kit.backtest.background(
                each,
                strategy_name=strategy,
                exchange_name=exchange,
                frame_name=frame_name,
                fill=cast(Fill, fill),
                gaps=cast(Gaps, gaps),
            )
            for each in dict.fromkeys(symbols)
        ]
        return await _watch(handles)

    try:
        results = asyncio.run(run_all())
    except Exception as error:
        raise strategy_failure(error, strategy_file) from error
    _show(results, trades_shown)


async def _watch(handles: Sequence[BacktestHandle]) -> Results:
    """Wait for all, with a bar for each on a terminal. The first failure ends the run."""
    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    everything = asyncio.gather(*handles)
    with bars:
        tasks = {bars.add_task(each.symbol, total=1.0): each for each in handles}
        while not everything.done():
            for task, handle in tasks.items():
                bars.update(task, completed=handle.progress)
            await asyncio.wait([everything], timeout=_REDRAW_S)
    return Results(await everything)


def _pick(kind: str, asked: str | None, registered: Sequence[str], strategy_file: Path) -> str:
    if asked is not None:
        return asked
    if len(registered) == 1:
        return registered[0]
    if not registered:
        raise UserError(
            f"strategy file {strategy_file} registers no {kind}: call backtest_kit.add_{kind}_schema in it"
            + (", or give --candles FILE" if kind == "exchange" else "")
        )
    raise UserError(f"strategy file {strategy_file} registers several: choose with --{kind} {' or '.join(registered)}")


def _file_source(candles: str) -> CandleSource:
    if candles.endswith(".parquet"):
        return sources.parquet(candles)
    return sources.csv(candles)


def _frame(asked: str | None, source: CandleSource | None, symbol: str, strategy_file: Path) -> str:
    """The name of the frame to replay; a range of dates is registered under its own text."""
    kit = default_kit
    registered = [each.name for each in kit.list_frame_schemas()]
    if asked is None and len(registered) == 1:
        return registered[0]
    if asked is None:
        there = asyncio.run(source.range(symbol)) if source else None
        example = "2022-01-01..2022-02-01" if there is None else "..".join(iso(each) for each in there)
        known = f"choose with --frame {' or '.join(registered)}, or give" if registered else "give"
        raise UserError(
            f"which frame? Strategy file {strategy_file} registers {len(registered)}: "
            f"{known} two dates such as --frame {example}"
        )
    if ".." in asked and asked not in registered:
        start, _, end = asked.partition("..")
        kit.add_frame_schema(asked, start_date=start, end_date=end)
    return asked


def _show(results: Results, trades_shown: int) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_IN_FILES)
    if trades_shown and results.trades:
        console.print(_trades_table(results, trades_shown))
    console.print(results.table())
    for remark in results.remarks():
        console.print(f"{remark}.", highlight=False)
    console.print(_origin(results), highlight=False)
    markdown, page = results.save_markdown(), results.save_html()
    console.print(f"Report: {markdown}\nCharts: {page}\nResults: {results.save()}", highlight=False, soft_wrap=True)


def _origin(results: Results) -> str:
    used, fetched = sum(each.candles_used for each in results), sum(each.candles_fetched for each in results)
    if not fetched:
        return f"Candles: all {used:,} from the cache."
    return f"Candles: {used:,}, {fetched:,} of them from the source."


def _trades_table(results: Results, shown: int) -> Table:
    trades = results.trades
    title = f"{len(trades)} trades" if len(trades) <= shown else f"The last {shown} of {len(trades)} trades"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("Symbol", "Side", "Opened", "Closed", "Reason"):
        table.add_column(heading, no_wrap=True)
    for heading in ("Open", "Close", "PnL %"):
        table.add_column(heading, no_wrap=True, justify="right")
    for trade in trades[-shown:]:
        table.add_row(
            Text(trade.symbol),
            trade.position,
            f"{trade.opened_at:%m-%d %H:%M}",
            f"{trade.closed_at:%m-%d %H:%M}",
            trade.close_reason,
            f"{trade.price_open:.6g}",
            f"{trade.price_close:.6g}",
            Text(f"{trade.pnl_pct:+.2f}", style="green" if trade.pnl_pct > 0 else "red"),
        )
    return table
