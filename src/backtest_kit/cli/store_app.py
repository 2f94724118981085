"""`backtest-kit store`: options and help here, the work in the module of each verb."""

from __future__ import annotations

from typing import Annotated

import typer

from backtest_kit.cli import options

store_app = typer.Typer(
    help="Show, check and move what is stored.",
    no_args_is_help=True,
    epilog="Every command but migrate takes --store file:DIR, sqlite:FILE or mongodb://HOST/NAME; the default is "
    "$CC_STORE or file:./dump.",
)
quarantine_app = typer.Typer(help="Records that could not be read, kept until you decide.", no_args_is_help=True)
store_app.add_typer(quarantine_app, name="quarantine")


@store_app.command(epilog="Example: backtest-kit store ls signal trend/binance")
def ls(
    contract: options.ContractName,
    prefix: Annotated[str, typer.Argument(help="Only keys that begin with these parts, separated by /.")] = "",
    store: options.StoreUrl = options.DEFAULT_STORE,
    namespace: options.Namespace = "",
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="How many records at most.")] = 50,
    removed: Annotated[bool, typer.Option("--removed", help="Show removed records as well.")] = False,
) -> None:
    """List the records of a contract, newest first."""
    from backtest_kit.cli.store import run_ls

    run_ls(store, namespace, contract, prefix, limit, removed)


@store_app.command(epilog="Example: backtest-kit store get signal trend/binance/BTCUSDT")
def get(
    contract: options.ContractName,
    key: Annotated[str, typer.Argument(help="The whole key, as `store ls` shows it.")],
    store: options.StoreUrl = options.DEFAULT_STORE,
    namespace: options.Namespace = "",
) -> None:
    """Show one record with its revision and times."""
    from backtest_kit.cli.store import run_get

    run_get(store, namespace, contract, key)


@store_app.command()
def du(store: options.StoreUrl = options.DEFAULT_STORE) -> None:
    """Show the records and the size of every contract."""
    from backtest_kit.cli.store import run_du

    run_du(store)


@store_app.command(epilog="Example: CC_RETENTION_LOG_DAYS=7 backtest-kit store compact")
def compact(store: options.StoreUrl = options.DEFAULT_STORE) -> None:
    """Delete records that are older than CC_RETENTION_* allows; `store du` shows them. Trading may go on."""
    from backtest_kit.cli.store import run_compact

    run_compact(store)


@store_app.command()
def check(
    store: options.StoreUrl = options.DEFAULT_STORE,
    deep: Annotated[bool, typer.Option("--deep", help="Read every candle too.")] = False,
    accept_loss: Annotated[
        bool,
        typer.Option("--accept-loss", help="Accept a database that has lost acknowledged writes, then check it."),
    ] = False,
) -> None:
    """Verify every record and explain what is wrong; exits with code 1 if anything is. Changes nothing."""
    from backtest_kit.cli.store import run_check

    raise typer.Exit(run_check(store, deep, accept_loss))


@store_app.command(epilog="Example: backtest-kit store migrate file:./dump sqlite:bot.db --verify")
def migrate(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The store to read, such as file:./dump.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The empty store to fill, such as sqlite:bot.db.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read and compare both afterwards; exits with code 1 if they differ.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a migration that was killed or failed.")] = False,
) -> None:
    """Copy everything from one store to another of any kind: to move, or as a backup. Stop your program first.
    If it has traded live, SOURCE refuses live starts afterwards (see `store reclaim`); nothing else in it changes."""
    from backtest_kit.cli.migrate import run_migrate

    raise typer.Exit(run_migrate(source, target, verify=verify, resume=resume))


@store_app.command(epilog="Example: backtest-kit store reclaim --store file:./dump")
def reclaim(store: options.StoreUrl = options.DEFAULT_STORE) -> None:
    """Trade live from a store again after `store migrate` moved it elsewhere. Stop using the other store first."""
    from backtest_kit.cli.store import run_reclaim

    run_reclaim(store)


@quarantine_app.command("list")
def quarantine_list(store: options.StoreUrl = options.DEFAULT_STORE) -> None:
    """Show what is in quarantine and why."""
    from backtest_kit.cli.store import run_quarantine_list

    run_quarantine_list(store)


@quarantine_app.command("restore")
def quarantine_restore(path: options.QuarantinePath, store: options.StoreUrl = options.DEFAULT_STORE) -> None:
    """Put a record back, perhaps repaired by hand, and free its key."""
    from backtest_kit.cli.store import run_quarantine_restore

    run_quarantine_restore(store, path)


@quarantine_app.command("drop")
def quarantine_drop(path: options.QuarantinePath, store: options.StoreUrl = options.DEFAULT_STORE) -> None:
    """Discard a record, which frees its key."""
    from backtest_kit.cli.store import run_quarantine_drop

    run_quarantine_drop(store, path)
