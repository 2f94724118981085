"""What a command runs: a strategy, an exchange and a frame of the user's file."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from backtest_kit import default_kit, sources
from backtest_kit.arrow import SUFFIXES
from backtest_kit.cli.strategy_file import load_strategy_file
from backtest_kit.errors import UserError
from backtest_kit.market.sources import CandleSource
from backtest_kit.model.interval import MINUTE_MS, iso


class Choice(NamedTuple):
    """What a replay takes: names that are registered in the default kit."""

    strategies: list[str]
    exchange: str
    frame: str


def choose(
    strategy_file: Path,
    symbol: str,
    *,
    frame: str | None,
    candles: str | None,
    dump: Path,
    exchange_name: str | None,
) -> Choice:
    """Load the file and choose what to run.

    Raises:
        UserError: it registers too little, or too much to choose from; or `dump` cannot be written to.
    """
    kit = default_kit
    strategies = load_strategies(strategy_file, dump / "backtest")
    known = {each.name: each.source for each in kit.list_exchange_schemas()}
    if candles is not None and exchange_name is None:
        # Named after the file: the exchange of the strategy file has not made these candles.
        exchange = Path(candles).name
    else:
        exchange = pick("exchange", exchange_name, list(known), strategy_file)
        if candles is None and exchange not in known:
            raise UserError(f"exchange {exchange!r} is not registered (registered: {', '.join(known)})")
    if candles is not None:
        known[exchange] = file_source(candles)
        kit.add_exchange_schema(exchange, source=known[exchange], replace=True)
    return Choice(strategies, exchange, _frame(frame, known[exchange], symbol, strategy_file))


def load_strategies(strategy_file: Path, folder: Path) -> list[str]:
    """Load the file, with everything kept under the directory in which `folder` lies, and name its strategies.

    Raises:
        UserError: it registers none, or `folder` cannot be made or written to.
    """
    _make_folder(folder)
    default_kit.dump = folder.parent
    load_strategy_file(strategy_file)
    strategies = [each.name for each in default_kit.list_strategy_schemas()]
    if not strategies:
        pick("strategy", None, strategies, strategy_file)
    return strategies


def pick(kind: str, given: str | None, registered: Sequence[str], strategy_file: Path) -> str:
    if given is not None:
        return given
    if len(registered) == 1:
        return registered[0]
    if not registered:
        raise UserError(
            f"strategy file {strategy_file} registers no {kind}: call backtest_kit.add_{kind}_schema in it"
            + (", or give --candles FILE" if kind == "exchange" else "")
        )
    raise UserError(f"strategy file {strategy_file} registers several: choose with --{kind} {' or '.join(registered)}")


def _make_folder(folder: Path) -> None:
    """Fail before the work, not after it, if its results cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--dump {folder.parent} cannot be written to ({error.strerror}): name another directory"
        ) from None


def file_source(candles: str) -> CandleSource:
    return sources.arrow(candles) if Path(candles).suffix in SUFFIXES else sources.csv(candles)


def _frame(given: str | None, source: CandleSource, symbol: str, strategy_file: Path) -> str:
    """The name of the frame to replay; a range of dates is registered under its own text."""
    kit = default_kit
    registered = [each.name for each in kit.list_frame_schemas()]
    if given is None and len(registered) == 1:
        return registered[0]
    if given is None:
        there = asyncio.run(source.range(symbol))
        lead_ms = kit.get_config().CC_AVG_PRICE_CANDLES_COUNT * MINUTE_MS
        example = "2022-01-01..2022-02-01" if there is None else f"{iso(there[0] + lead_ms)}..{iso(there[1])}"
        known = f"choose with --frame {' or '.join(registered)}, or give" if registered else "give"
        raise UserError(
            f"no frame given, and strategy file {strategy_file} registers {len(registered)}: "
            f"{known} two dates such as --frame {example}"
        )
    if ".." in given and given not in registered:
        start, _, end = given.partition("..")
        kit.add_frame_schema(given, start_date=start, end_date=end)
    elif given not in registered:
        known = f"{', '.join(registered)}, or " if registered else ""
        raise UserError(f"frame {given!r} is not registered: give {known}two dates such as 2022-01-01..2022-02-01")
    return given
