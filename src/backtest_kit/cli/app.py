"""The command line: options and help here, the work in the module of each verb."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from backtest_kit.errors import BacktestKitError, Conflict, LookAhead, UserError

EXIT_BY_ERROR: tuple[tuple[type[BacktestKitError], int], ...] = (
    (UserError, 2),
    (LookAhead, 2),
    (Conflict, 3),
    (BacktestKitError, 1),
)

app = typer.Typer(
    name="backtest-kit",
    help="A trading engine whose state you can kill and trust.",
    epilog="Start with: backtest-kit backtest --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line. Bad input ends with code 2 and a sentence, never with a traceback of ours."""
    from backtest_kit.cli.strategy_file import StrategyFailed

    try:
        app()
    except StrategyFailed as failure:
        sys.stderr.write(f"{failure}\n")
        sys.exit(2)
    except BacktestKitError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(next(code for kind, code in EXIT_BY_ERROR if isinstance(error, kind)))
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)


def _version(asked: bool) -> None:
    if asked:
        import backtest_kit

        typer.echo(f"backtest-kit {backtest_kit.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A trading engine whose state you can kill and trust."""


@app.command(
    epilog="Examples:\n\n"
    "  backtest-kit backtest examples/trend.py --symbol BTCUSDT\n\n"
    "  backtest-kit backtest trend.py --symbol BTCUSDT --candles btc-2022.csv.gz --frame 2022-01-02..2022-02-01\n\n"
    "  backtest-kit backtest trend.py --symbol BTCUSDT,ETHUSDT --candles 'data/{symbol}.parquet' --gaps fill"
)
def backtest(
    strategy_file: Annotated[
        Path, typer.Argument(metavar="STRATEGY.py", help="Your Python file; it calls backtest_kit.add_strategy_schema.")
    ],
    symbol: Annotated[
        list[str], typer.Option("--symbol", "-s", help="What to trade; several by commas, or give the option again.")
    ],
    frame: Annotated[
        str | None,
        typer.Option(
            "--frame",
            "-f",
            metavar="NAME|START..END",
            help="A frame that the file registers, or two dates such as 2022-01-01..2022-02-01. "
            "Default: the only frame of the file.",
        ),
    ] = None,
    candles: Annotated[
        str | None,
        typer.Option(
            "--candles",
            "-c",
            metavar="FILE",
            help="Take 1-minute candles from a .csv, .csv.gz or .parquet file instead of the exchange of the "
            "strategy file; '{symbol}' in the name stands for the symbol.",
        ),
    ] = None,
    gaps: Annotated[
        str, typer.Option("--gaps", metavar="error|fill", help="Missing minutes: refuse, or fill with flat candles.")
    ] = "error",
    fill: Annotated[
        str,
        typer.Option(
            "--fill", metavar="vwap|ohlc", help="Touch levels by the average price, or by the wicks (stop first)."
        ),
    ] = "vwap",
    dump: Annotated[
        Path, typer.Option("--dump", "-d", metavar="DIR", help="Where candles are cached and reports are written.")
    ] = Path("dump"),
    strategy: Annotated[
        str | None, typer.Option("--strategy", metavar="NAME", help="Which strategy, if the file registers several.")
    ] = None,
    exchange: Annotated[
        str | None, typer.Option("--exchange", metavar="NAME", help="Which exchange, if the file registers several.")
    ] = None,
    trades: Annotated[
        int, typer.Option("--trades", min=0, metavar="N", help="How many of the last trades to print.")
    ] = 20,
) -> None:
    """Replay a strategy over candles and report what it would have earned.

    Prints a table, writes DIR/backtest/{strategy}.md and a self-contained .html with charts.
    """
    from backtest_kit.cli.backtest import run_backtest

    run_backtest(
        strategy_file,
        [each.strip() for given in symbol for each in given.split(",")],
        frame=frame,
        candles=candles,
        gaps=gaps,
        fill=fill,
        dump=dump,
        strategy_name=strategy,
        exchange_name=exchange,
        trades_shown=trades,
    )
