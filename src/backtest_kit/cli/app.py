"""The command line: options and help here, the work in the module of each verb."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from backtest_kit.cli import options
from backtest_kit.cli.store_app import store_app
from backtest_kit.errors import BacktestKitError, Conflict, LookAhead, UserError

EXIT_BY_ERROR: tuple[tuple[type[BacktestKitError], int], ...] = (
    (UserError, 2),
    (LookAhead, 2),
    (Conflict, 3),
    (BacktestKitError, 1),
)

app = typer.Typer(
    name="backtest-kit",
    help="A trading engine that survives kill -9.",
    epilog="Start with: backtest-kit backtest --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line. Bad input ends with code 2 and a message, never with a traceback of ours."""
    from backtest_kit.cli.strategy_file import StrategyFileFailed

    try:
        app()
    except StrategyFileFailed as failure:
        sys.stderr.write(f"{failure}\n")
        sys.exit(2)
    except BacktestKitError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(next(code for kind, code in EXIT_BY_ERROR if isinstance(error, kind)))
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        import backtest_kit

        typer.echo(f"backtest-kit {backtest_kit.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A trading engine that survives kill -9."""


@app.command(
    epilog="Examples:\n\n"
    "  backtest-kit backtest examples/trend.py --symbol BTCUSDT\n\n"
    "  backtest-kit backtest trend.py --symbol BTCUSDT --candles btc-2022.csv.gz --frame 2022-01-02..2022-02-01\n\n"
    "  backtest-kit backtest trend.py --symbol BTCUSDT,ETHUSDT --candles 'data/{symbol}.parquet' --gaps fill"
)
def backtest(
    strategy_file: options.StrategyFile,
    symbol: options.Symbols,
    frame: options.Frame = None,
    candles: options.Candles = None,
    gaps: options.GapRule = "error",
    dirty: options.DirtyRule = None,
    fill: options.FillModel = "vwap",
    dump: options.Dump = Path("dump"),
    strategy: options.Strategy = None,
    exchange: options.Exchange = None,
    trades: options.Trades = 20,
) -> None:
    """Replay a strategy over candles and report its results.

    Prints a table, writes DIR/backtest/{strategy}.md, a self-contained .html with charts, and the results as
    .json, which `backtest-kit report` shows again.
    """
    from backtest_kit.cli.backtest import run_backtest

    run_backtest(
        strategy_file,
        options.separated(symbol),
        frame=frame,
        candles=candles,
        dump=dump,
        strategy_name=strategy,
        exchange_name=exchange,
        trades_shown=trades,
        rules=options.replay_rules(fill, gaps, dirty),
    )


@app.command(
    epilog="Examples:\n\n"
    "  backtest-kit walk examples/walk.py --symbol BTCUSDT,ETHUSDT\n\n"
    "  backtest-kit walk mine.py --symbol BTCUSDT --metric max_drawdown --strategies fast,slow"
)
def walk(
    strategy_file: options.StrategyFile,
    symbol: options.Symbols,
    metric: Annotated[
        str, typer.Option("--metric", "-m", metavar="NAME", help="The statistic to rank by, such as total_pnl.")
    ] = "sharpe_ratio",
    strategies: Annotated[
        list[str] | None,
        typer.Option(
            "--strategies",
            metavar="NAMES",
            help="Only these; separate several by commas, or repeat the option. Default: all in the file.",
        ),
    ] = None,
    frame: options.Frame = None,
    candles: options.Candles = None,
    gaps: options.GapRule = "error",
    dirty: options.DirtyRule = None,
    fill: options.FillModel = "vwap",
    dump: options.Dump = Path("dump"),
    exchange: options.Exchange = None,
) -> None:
    """Replay all strategies of a file over the same candles and rank them.

    Prints the ranking, writes DIR/walker/{frame} {metric}.md and a self-contained .html with charts.
    """
    from backtest_kit.cli.walk import run_walk

    run_walk(
        strategy_file,
        options.separated(symbol),
        metric=metric,
        strategies=strategies or [],
        frame=frame,
        candles=candles,
        dump=dump,
        exchange_name=exchange,
        rules=options.replay_rules(fill, gaps, dirty),
    )


@app.command(
    epilog="Examples:\n\n"
    "  backtest-kit report dump/backtest/trend.json\n\n"
    "  backtest-kit report 2023.json 2024.json --html both-years.html --trades 0"
)
def report(
    files: Annotated[
        list[Path], typer.Argument(metavar="RESULTS.json...", help="Files that `backtest-kit backtest` wrote.")
    ],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a self-contained page with charts.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write a Markdown report.")
    ] = None,
    trades: options.Trades = 20,
) -> None:
    """Show saved results again, without replaying; several files make one report."""
    from backtest_kit.cli.report import run_report

    run_report(files, html=html, markdown=markdown, trades_shown=trades)


@app.command(
    epilog="Examples:\n\n"
    "  backtest-kit paper mine.py --symbol BTCUSDT,ETHUSDT\n\n"
    "  backtest-kit paper examples/paper.py --symbol BTCUSDT --venue http://127.0.0.1:8899"
)
def paper(
    strategy_file: options.StrategyFile,
    symbol: options.Symbols,
    venue: Annotated[
        str | None,
        typer.Option("--venue", metavar="URL", help="Take candles and time from a simulated exchange at this address."),
    ] = None,
    exchange: options.Exchange = None,
    strategy: options.Strategy = None,
    dump: options.LiveDump = Path("dump"),
    fill: options.FillModel = "vwap",
    gaps: options.GapRule = "fill",
    dirty: options.DirtyRule = "repair",
    as_json: options.AsJson = False,
) -> None:
    """Trade on paper: real candles in real time; every order fills at the price that the engine decided.

    A terminal shows the state of every symbol; otherwise each event is one line. Ctrl-C or SIGTERM stops opening
    trades and waits for open positions to close. A second one exits immediately; positions stay open and are resumed
    at the next start, as after any crash.
    """
    from backtest_kit.cli.live import run_live

    raise typer.Exit(
        run_live(
            strategy_file,
            options.separated(symbol),
            mode="paper",
            exchange_name=exchange,
            strategy_name=strategy,
            dump=dump,
            venue=venue,
            as_json=as_json,
            rules=options.live_rules(fill, gaps, dirty),
        )
    )


@app.command(
    epilog="Examples:\n\n"
    "  backtest-kit live mine.py --symbol BTCUSDT\n\n"
    "  CC_STORE=sqlite:bot.db backtest-kit live mine.py --symbol BTCUSDT,ETHUSDT --orphans protect --json"
)
def live(
    strategy_file: options.StrategyFile,
    symbol: options.Symbols,
    exchange: options.Exchange = None,
    strategy: options.Strategy = None,
    dump: options.LiveDump = Path("dump"),
    fill: options.FillModel = "vwap",
    gaps: options.GapRule = "fill",
    dirty: options.DirtyRule = "repair",
    orphans: options.Orphans = "alarm",
    allow_weak: Annotated[
        bool, typer.Option("--allow-weak", help="Accept a store that `doctor --live` reports as weak.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Trade with real orders, through the broker of the file's exchange. Output and Ctrl-C work as in `paper`.

    Exit codes: 3 if another process trades a position, 2 for bad input, 130 after a second Ctrl-C.
    """
    from backtest_kit.cli.live import run_live

    raise typer.Exit(
        run_live(
            strategy_file,
            options.separated(symbol),
            mode="live",
            exchange_name=exchange,
            strategy_name=strategy,
            dump=dump,
            allow_weak=allow_weak,
            as_json=as_json,
            rules=options.live_rules(fill, gaps, dirty, orphans),
        )
    )


@app.command(
    epilog="Examples:\n\n"
    "  backtest-kit log --follow --symbol BTCUSDT --level warning\n\n"
    "  backtest-kit log --run 20240601-101500-1a2b3c4d -n 1000 > run.jsonl"
)
def log(
    follow: Annotated[bool, typer.Option("--follow", help="Keep running and print new lines.")] = False,
    symbol: options.OnlySymbol = None,
    strategy: options.OnlyStrategy = None,
    level: Annotated[
        str, typer.Option("--level", metavar="debug|info|warning|error", help="Only this level or higher.")
    ] = "info",
    since: options.Since = None,
    mode: options.RecordMode = "live",
    run: options.RunId = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="How many of the newest lines.")] = 50,
    as_json: options.AsJson = False,
    store: Annotated[
        str | None, typer.Option("--store", metavar="URL", help="The store of the log; by default the files in ./dump.")
    ] = None,
) -> None:
    """Show the log: readable on a terminal, otherwise one JSON document per line."""
    from backtest_kit.cli.log import run_log

    run_log(
        store,
        mode=mode,
        run_id=run,
        symbol=symbol,
        strategy_name=strategy,
        level=level,
        since=since,
        limit=limit,
        follow=follow,
        as_json=as_json,
    )


records_app = typer.Typer(
    help="Show the records of runs: signals, notifications, state, memory, the log.",
    no_args_is_help=True,
    epilog="Every command takes --store file:DIR or --store sqlite:FILE; the default is $CC_STORE or file:./dump.",
)
app.add_typer(records_app, name="records")


@records_app.command("ls", epilog="Example: backtest-kit records ls storage --symbol BTCUSDT --since 2024-06-01")
def records_ls(
    contract: Annotated[
        str | None, typer.Argument(help="Such as storage; without it, the number of records of each.")
    ] = None,
    symbol: options.OnlySymbol = None,
    strategy: options.OnlyStrategy = None,
    mode: options.RecordMode = "live",
    run: options.RunId = None,
    since: options.Since = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="How many records at most.")] = 50,
    as_json: options.AsJson = False,
    store: options.StoreUrl = options.DEFAULT_STORE,
) -> None:
    """List records, newest first."""
    from backtest_kit.cli.records import Filter, run_ls, since_ms

    run_ls(store, contract, mode, run, Filter(symbol, strategy, since_ms(since)), limit, as_json)


@records_app.command("show", epilog="Example: backtest-kit records show storage live/BTCUSDT-202406010915-1a2b3c4d")
def records_show(
    contract: Annotated[str, typer.Argument(help="Such as storage or notification.")],
    key: Annotated[str, typer.Argument(help="The whole key, as `records ls` shows it.")],
    mode: options.RecordMode = "live",
    run: options.RunId = None,
    as_json: options.AsJson = False,
    store: options.StoreUrl = options.DEFAULT_STORE,
) -> None:
    """Show one record whole."""
    from backtest_kit.cli.records import run_show

    run_show(store, contract, key, mode, run, as_json)


@app.command(
    epilog="Examples:\n\n"
    "  backtest-kit venue\n\n"
    "  backtest-kit venue --start 2024-01-01 --speed 60 --symbols BTCUSDT,SOLUSDT --state venue.jsonl\n\n"
    "  backtest-kit venue --candles btc-2022.csv.gz --symbols BTCUSDT --speed 600 "
    "--fault 'lose_response,endpoint=POST */order,chance=0.1,count=0'"
)
def venue(
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0 for any.")] = 8899,
    symbols: Annotated[
        list[str] | None,
        typer.Option("--symbols", "-s", help="Symbols to trade; separate several by commas. Default: BTCUSDT,ETHUSDT."),
    ] = None,
    candles: options.Candles = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of generated candles and of random faults.")] = 7,
    speed: Annotated[
        float,
        typer.Option("--speed", min=0, help="Speed relative to real time; 0: time moves only while all bots wait."),
    ] = 1.0,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            metavar="DATE",
            help="Start time. Default: now, at --speed 1 and with candles of today; else a day after the first candle.",
        ),
    ] = None,
    fee: Annotated[
        float, typer.Option("--fee", min=0, metavar="PCT", help="Fee, in percent of the traded value.")
    ] = 0.1,
    slippage: Annotated[
        float, typer.Option("--slippage", min=0, metavar="PCT", help="Slippage of market orders, in percent.")
    ] = 0.01,
    balance: Annotated[float, typer.Option("--balance", min=0, help="Balance of a new account, in USDT.")] = 100_000.0,
    client_ids: Annotated[
        Literal["open", "ever"],
        typer.Option(
            "--client-ids",
            help="How long a client order id stays in use: while its order is open, as on Binance, or permanently.",
        ),
    ] = "open",
    fault: Annotated[
        list[str] | None,
        typer.Option(
            "--fault", metavar="KIND,FIELD=VALUE...", help="A fault to inject; repeat the option for several."
        ),
    ] = None,
    publishing: Annotated[
        str | None,
        typer.Option("--publishing", metavar="FIELD=VALUE,...", help="Faults of candles: missing=0.02,..."),
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", metavar="FILE", help="Store orders in this file, and continue from it.")
    ] = None,
) -> None:
    """Serve a simulated exchange on this machine, to paper-trade against without a network.

    It serves Binance's API for spot and USDT futures, so ccxt trades on it, and an API of its own.
    """
    from backtest_kit.cli.venue import run_venue

    run_venue(
        port=port,
        symbols=options.separated(symbols or ["BTCUSDT,ETHUSDT"]),
        candles=candles,
        seed=seed,
        speed=speed,
        start=start,
        fee_pct=fee,
        slippage_pct=slippage,
        balance=balance,
        client_ids=client_ids,
        faults=fault or [],
        publishing=publishing,
        state=state,
    )


@app.command(
    epilog="Examples:\n\n"
    "  backtest-kit doctor\n\n"
    "  backtest-kit doctor --live --store 'mongodb://localhost/backtest-kit?directConnection=true'\n\n"
    "  backtest-kit doctor --json | jq '.readings[] | select(.status != \"ok\")'"
)
def doctor(
    store: options.StoreUrl = options.DEFAULT_STORE,
    live: Annotated[bool, typer.Option("--live", help="Check it for live trading: weak points fail too.")] = False,
    allow_weak: Annotated[bool, typer.Option("--allow-weak", help="With --live: accept weak points.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="How many times to measure each latency.")
    ] = 15,
) -> None:
    """Check the store, its servers or its disk, and report what is wrong and how to fix it. Changes nothing.

    Ends with code 1 if something must be fixed.
    """
    from backtest_kit.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(store, live=live, allow_weak=allow_weak, as_json=as_json, samples=samples))


app.add_typer(store_app, name="store")
