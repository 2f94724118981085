"""The options that several commands share, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from backtest_kit.run.live.runner import LiveOptions
    from backtest_kit.run.replay.backtest import ReplayOptions

StrategyFile = Annotated[
    Path, typer.Argument(metavar="STRATEGY.py", help="Your Python file; it calls backtest_kit.add_strategy_schema.")
]
Symbols = Annotated[
    list[str], typer.Option("--symbol", "-s", help="What to trade; several by commas, or give the option again.")
]
Frame = Annotated[
    str | None,
    typer.Option(
        "--frame",
        "-f",
        metavar="NAME|START..END",
        help="A frame that the file registers, or two dates such as 2022-01-01..2022-02-01. "
        "Default: the only frame of the file.",
    ),
]
Candles = Annotated[
    str | None,
    typer.Option(
        "--candles",
        "-c",
        metavar="FILE",
        help="Take 1-minute candles from a .csv, .csv.gz, .parquet, .feather or .arrow file instead of the exchange "
        "of the strategy file; '{symbol}' in the name stands for the symbol.",
    ),
]
GapRule = Annotated[
    str, typer.Option("--gaps", metavar="error|fill", help="Missing minutes: refuse, or fill with flat candles.")
]
DirtyRule = Annotated[
    str | None,
    typer.Option(
        "--dirty",
        metavar="refuse|repair",
        help="Bad rows: refuse, or sort them, move them up to the next whole minute, and count the minutes of the "
        "others as missing. Backtests repair with --gaps fill, otherwise refuse; live runs repair.",
    ),
]
FillModel = Annotated[
    str,
    typer.Option(
        "--fill", metavar="vwap|ohlc", help="Touch levels by the average price, or by the wicks (stop first)."
    ),
]
Dump = Annotated[
    Path, typer.Option("--dump", "-d", metavar="DIR", help="Where candles are cached and reports are written.")
]
Exchange = Annotated[
    str | None, typer.Option("--exchange", metavar="NAME", help="Which exchange, if the file registers several.")
]
Strategy = Annotated[
    str | None, typer.Option("--strategy", metavar="NAME", help="Which strategy, if the file registers several.")
]
Orphans = Annotated[
    str,
    typer.Option(
        "--orphans",
        metavar="alarm|adopt|protect",
        help="A position that the store does not know, or without a stop on the exchange: report it, make it the "
        "strategy's own, or place a stop. Nothing is opened while it is unknown.",
    ),
]
LiveDump = Annotated[
    Path, typer.Option("--dump", "-d", metavar="DIR", help="Where state and candles are kept, unless a store is bound.")
]
Trades = Annotated[int, typer.Option("--trades", min=0, metavar="N", help="How many of the last trades to print.")]
StoreUrl = Annotated[
    str,
    typer.Option(
        "--store", envvar="CC_STORE", metavar="URL", help="Which store: file:DIR, sqlite:FILE or mongodb://HOST/NAME."
    ),
]
DEFAULT_STORE = "file:./dump"
Namespace = Annotated[
    str, typer.Option("--namespace", metavar="NAME", help="Such as paper; without it, the records of live trading.")
]
ContractName = Annotated[str, typer.Argument(help="Such as signal, risk or log; `store du` shows which there are.")]
OnlySymbol = Annotated[str | None, typer.Option("--symbol", "-s", help="Only of this symbol.")]
OnlyStrategy = Annotated[str | None, typer.Option("--strategy", metavar="NAME", help="Only of this strategy.")]
Since = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help="Only from this moment on, such as 2024-06-01T09:15.")
]
RecordMode = Annotated[str, typer.Option("--mode", metavar="live|paper", help="Of live trading, or on paper.")]
RunId = Annotated[str | None, typer.Option("--run", metavar="ID", help="Of this run of a backtest: `result.run_id`.")]
AsJson = Annotated[bool, typer.Option("--json", help="A line of JSON for each, for programs.")]
QuarantinePath = Annotated[str, typer.Argument(help="The path that `store quarantine list` shows.")]


def separated(given: list[str]) -> list[str]:
    """The values of an option that is given several times, or once with commas, or both."""
    return [each.strip() for text in given for each in text.split(",")]


def replay_rules(fill: str, gaps: str, dirty: str | None) -> ReplayOptions:
    """The options of a replay as they were given: the run checks them."""
    return cast("ReplayOptions", {"fill": fill, "gaps": gaps, "dirty": dirty})


def live_rules(fill: str, gaps: str, dirty: str | None, orphans: str = "alarm") -> LiveOptions:
    """The same of a live run."""
    return cast("LiveOptions", {"fill": fill, "gaps": gaps, "dirty": dirty, "orphans": orphans})
