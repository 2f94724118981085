"""`backtest-kit live` and `backtest-kit paper`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from backtest_kit import default_kit
from backtest_kit.cli.choice import load_strategies, pick
from backtest_kit.cli.live_output import JsonOutput, Output, ViewOutput
from backtest_kit.cli.live_words import SHOWN, awaited
from backtest_kit.cli.strategy_file import strategy_failure
from backtest_kit.model.event import Event
from backtest_kit.model.identity import Mode
from backtest_kit.model.position import Trade
from backtest_kit.persist.upkeep import Status
from backtest_kit.run.live.runner import LiveHandle, LiveOptions, signals_stop
from backtest_kit.venue.client import connect

_LOOK_S: Final = 0.5
"""How often the state of the runs is shown."""
CANCELLED: Final = 130
"""Exit code after a second Ctrl-C."""


def run_live(
    strategy_file: Path,
    symbols: Sequence[str],
    *,
    mode: Mode,
    exchange_name: str | None,
    strategy_name: str | None,
    dump: Path,
    venue: str | None = None,
    allow_weak: bool = False,
    as_json: bool,
    rules: LiveOptions,
) -> int:
    """Load the file, trade every symbol until stopped, and print what happens; returns the exit code.

    Raises:
        Conflict: another process trades one of them, from the start or since.
        UserError: bad names, options, candles or credentials, or the store is not fit for live trading.
    """
    strategy = pick("strategy", strategy_name, load_strategies(strategy_file, dump / "emergency"), strategy_file)
    symbols = list(dict.fromkeys(symbols))
    exchange = _exchange(strategy_file, exchange_name, venue, f"{strategy} {' '.join(symbols)}", len(symbols))
    # The stores are checked below, so that its weak points can be shown.
    live: LiveOptions = {**rules, "paper": mode == "paper", "allow_weak": True}
    output = _output(f"{mode}  {strategy} on {exchange}", as_json=as_json)

    def start() -> list[LiveHandle]:
        return [
            default_kit.live.background(
                symbol,
                strategy_name=strategy,
                exchange_name=exchange,
                **live,
            )
            for symbol in symbols
        ]

    async def run_all() -> int:
        try:
            if mode == "live":
                await _check_stores(output, allow_weak=allow_weak)
            default_kit.on((Event,) if as_json else SHOWN, output.event)
            return await _trade(start(), output)
        finally:
            await default_kit.close()

    try:
        with output:
            output.say(f"{output.head}: {', '.join(symbols)}" + (f", at {venue}" if venue else ""))
            return asyncio.run(run_all())
    except (Exception, SystemExit) as error:
        raise strategy_failure(error, strategy_file) from error


def _exchange(strategy_file: Path, given: str | None, venue: str | None, bot: str, symbols: int) -> str:
    """The name of the exchange to trade on; a simulated one has a name of its own, and so a state of its own."""
    if venue is None:
        known = [each.name for each in default_kit.list_exchange_schemas()]
        return pick("exchange", given, known, strategy_file)
    client, name = connect(venue), "venue" if given is None else given
    clock = client.clock(bot, sleepers=symbols)
    default_kit.add_exchange_schema(name, source=client.source(), clock=clock, replace=True)
    return name


def _output(head: str, *, as_json: bool) -> Output:
    console = Console()
    if as_json:
        return JsonOutput(head)
    return ViewOutput(head, console) if console.is_terminal and sys.stdout.isatty() else Output(head)


async def _check_stores(output: Output, *, allow_weak: bool) -> None:
    """Refuse to trust live positions to stores that may lose them."""
    for reading in await default_kit.persistence.require_live_grade(allow_weak=allow_weak):
        if reading.status not in (Status.OK, Status.NEW):
            output.say(f"{reading.subject} is {reading.status.value}: {reading.detail} {reading.remedy}".rstrip())


async def _trade(handles: Sequence[LiveHandle], output: Output) -> int:
    """Wait for all runs. One that fails cancels the others: positions and orders stay as they are."""

    def stopping(count: int) -> None:
        if count > 1:
            output.say("exiting immediately; open positions are resumed at the next start")
            return
        for each in handles:
            if not each.done():
                output.say(f"stopping: {each.symbol} waits {awaited(each.status)}")
        output.say(
            "a second Ctrl-C or SIGTERM exits immediately; positions stay open and are resumed at the next start"
        )

    tasks = [each.task for each in handles]
    with signals_stop(handles, stopping):
        while not all(task.done() for task in tasks) and not any(map(_failed, tasks)):
            output.stand([each.status for each in handles])
            await asyncio.wait(tasks, timeout=_LOOK_S, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    output.stand([each.status for each in handles])
    for task in [task for task in tasks if _failed(task)]:
        task.result()
    return CANCELLED if any(task.cancelled() for task in tasks) else 0


def _failed(task: asyncio.Task[tuple[Trade, ...]]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None
