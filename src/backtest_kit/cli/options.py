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
    list[str],
    typer.Option("--symbol", "-s", help="Symbols; separate several by commas, or repeat the option."),
]
Frame = Annotated[
    str | None,
    typer.Option(
        "--frame",
        "-f",
        metavar="NAME|START..END",
        help="A frame that the file registers, or two dates such as 2022-01-01..2022-02-01. "
        "Default: the only frame in the file.",
    ),
]
Candles = Annotated[
    str | None,
    typer.Option(
        "--candles",
        "-c",
        metavar="FILE",
        help="Read 1-minute candles from a .csv, .csv.gz, .parquet, .feather or .arrow file instead of the exchange "
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
        "--fill", metavar="vwap|ohlc", help="Trigger levels by the average price, or by the wicks (stop first)."
    ),
]
Dump = Annotated[Path, typer.Option("--dump", "-d", metavar="DIR", help="Directory for cached candles and reports.")]
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
    Path, typer.Option("--dump", "-d", metavar="DIR", help="Directory for state and candles, unless a store is bound.")
]
Trades = Annotated[int, typer.Option("--trades", min=0, metavar="N", help="Number of last trades to print.")]
StoreUrl = Annotated[
    str,
    typer.Option(
        "--store", envvar="CC_STORE", metavar="URL", help="The store: file:DIR, sqlite:FILE or mongodb://HOST/NAME."
    ),
]
DEFAULT_STORE = "file:./dump"
Namespace = Annotated[
    str, typer.Option("--namespace", metavar="NAME", help="A namespace, such as paper. Default: live trading.")
]
ContractName = Annotated[str, typer.Argument(help="A contract, such as signal, risk or log; `store du` lists them.")]
OnlySymbol = Annotated[str | None, typer.Option("--symbol", "-s", help="Only of this symbol.")]
OnlyStrategy = Annotated[str | None, typer.Option("--strategy", metavar="NAME", help="Only of this strategy.")]
Since = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help="Only from this time on, such as 2024-06-01T09:15.")
]
RecordMode = Annotated[str, typer.Option("--mode", metavar="live|paper", help="Records of live or of paper trading.")]
RunId = Annotated[str | None, typer.Option("--run", metavar="ID", help="Records of this backtest: `result.run_id`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one document per line.")]
QuarantinePath = Annotated[str, typer.Argument(help="The path that `store quarantine list` shows.")]


def separated(given: list[str]) -> list[str]:
    """The values of an option that is given several times, or once with commas, or both."""
    return [each.strip() for text in given for each in text.split(",")]


def replay_rules(fill: str, gaps: str, dirty: str | None) -> ReplayOptions:
    """The options of a replay, unchecked: the run checks them."""
    return cast("ReplayOptions", {"fill": fill, "gaps": gaps, "dirty": dirty})


def live_rules(fill: str, gaps: str, dirty: str | None, orphans: str = "alarm") -> LiveOptions:
    """The same of a live run."""
    return cast("LiveOptions", {"fill": fill, "gaps": gaps, "dirty": dirty, "orphans": orphans})
