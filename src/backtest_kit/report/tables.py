"""The tables of every report, as text: each table's columns are defined here once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, groupby
from typing import Final, NamedTuple, get_args

from backtest_kit.format import minutes, money, number, percent, price, signed_percent
from backtest_kit.model.decisions import Decisions
from backtest_kit.model.interval import MINUTE_MS, iso
from backtest_kit.model.position import CloseReason, Trade
from backtest_kit.model.repairs import describe_repairs
from backtest_kit.model.setup import Setup
from backtest_kit.report.statistics import Statistics, statistics_of
from backtest_kit.report.values import ResultSet, ResultValues
from backtest_kit.report.wording import PROFILE_LINES, STATISTIC_LINES, STATISTICS


def statistic_lines(results: ResultSet[ResultValues]) -> list[tuple[str, str]]:
    """(label, text) of every statistic of all trades together; the price profile only for a single market."""
    one_market = len({(result.exchange_name, result.symbol) for result in results}) == 1
    lines = (*STATISTIC_LINES, *PROFILE_LINES) if one_market else STATISTIC_LINES
    return [(line.label, line.of(results.stats)) for line in lines]


class Table(NamedTuple):
    """A table of texts; the first column is a name, the others are numbers."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    total: tuple[str, ...] | None = None


_BEFORE_MONEY: Final = ("total_count", "win_rate", "total_pnl")
_AFTER_MONEY: Final = ("sharpe_ratio", "max_drawdown", "profit_factor", "avg_duration")


def summary_table(results: ResultSet[ResultValues]) -> Table:
    """One row per result, the best Sharpe ratio first and the unknown ones last, and a total."""
    header = ("Symbol", *_shorts(_BEFORE_MONEY), "PnL (USD)", *_shorts(_AFTER_MONEY), "Frame end")
    names = result_names(results)
    return Table(
        header,
        [_summary_row(names[id(result)], result.stats, result.trades) for result in by_sharpe(results)],
        _summary_row("Total", results.stats, results.trades),
    )


def by_sharpe(results: ResultSet[ResultValues]) -> list[ResultValues]:
    """The best Sharpe ratio first, the unknown ones last."""
    return sorted(results, key=lambda result: (result.stats.sharpe_ratio is None, -(result.stats.sharpe_ratio or 0.0)))


def _shorts(fields: Sequence[str]) -> list[str]:
    return [STATISTICS[field].short for field in fields]


def _cells(fields: Sequence[str], stats: Statistics) -> list[str]:
    return [STATISTICS[field].cell(stats) for field in fields]


def result_names(results: Sequence[ResultValues]) -> dict[int, str]:
    """The name of each result, by its id(): its symbol, and more only if two share it."""
    symbols = [result.symbol for result in results]
    return {
        id(result): result.symbol
        if symbols.count(result.symbol) == 1
        else f"{result.symbol} ({result.strategy_name}, {result.exchange_name}, {result.frame_name})"
        for result in results
    }


def _summary_row(name: str, stats: Statistics, trades: Sequence[Trade]) -> tuple[str, ...]:
    return (
        name,
        *_cells(_BEFORE_MONEY, stats),
        money(math.fsum(trade.pnl_cost for trade in trades)),
        *_cells(_AFTER_MONEY, stats),
        str(sum(trade.close_reason == "frame_end" for trade in trades)),
    )


_OF_REASON: Final = ("win_rate", "avg_pnl", "total_pnl")


def reason_table(trades: Sequence[Trade]) -> Table:
    """One row per close reason that occurs."""
    order: list[str] = list(get_args(CloseReason))
    by_reason = sorted(trades, key=lambda trade: order.index(trade.close_reason))
    rows: list[tuple[str, ...]] = []
    for reason, group in groupby(by_reason, key=lambda trade: trade.close_reason):
        members = list(group)
        stats = statistics_of(members)
        rows.append(
            (
                reason,
                str(len(members)),
                *_cells(_OF_REASON, stats),
                money(math.fsum(trade.pnl_cost for trade in members)),
            )
        )
    return Table(("Close reason", "Count", *_shorts(_OF_REASON), "PnL (USD)"), rows)


def remarks(results: ResultSet[ResultValues]) -> list[str]:
    """Warnings about the figures, a sentence each."""
    sentences = []
    unfinished = [trade for trade in results.trades if trade.close_reason == "frame_end"]
    if unfinished:
        subject = "1 position was" if len(unfinished) == 1 else f"{len(unfinished)} positions were"
        total = signed_percent(math.fsum(trade.pnl_pct for trade in unfinished))
        sentences.append(f"{subject} still open at the end of the frame (close reason frame_end): {total}")
    names = result_names(results)
    sentences += [_never_entered(names[id(result)], result.decisions) for result in results if not result.trades]
    sentences += gap_remarks(results)
    sentences += [f"{names[id(result)]} was stopped at {iso(result.stop_ms)}" for result in results if result.stopped]
    for first, second in combinations(results, 2):
        if first.symbol != second.symbol and len(first.chart) and first.chart == second.chart:
            sentences.append(f"{names[id(first)]} and {names[id(second)]} traded the same candles")
    if len(results) > 1:
        sentences.append(
            "The drawdown of the total assumes that each trade uses the whole account, "
            "one after the other in order of close"
        )
    return [*sentences, *dict.fromkeys(_costs(result.setup) for result in results if result.setup.fill)]


def _never_entered(name: str, decisions: Decisions) -> str:
    """Why no position was closed, as far as the calls of the strategy show it."""
    if not decisions.called:
        return f"{name}: get_signal was never called, because no decision slot of the strategy begins inside the frame"
    parts = [f"get_signal was called {_times(decisions.called)}"]
    if decisions.returned_none:
        parts.append(f"it returned None {_times(decisions.returned_none)}")
    parts += [f"risk profile {risk!r} rejected {_signals(count)}" for risk, count in decisions.rejected.items()]
    if decisions.repeated:
        parts.append(f"{_signals(decisions.repeated)} had the id of the position before")
    for reason, count in decisions.cancelled.items():
        entries = "1 resting entry was" if count == 1 else f"{count:,} resting entries were"
        parts.append(f"{entries} cancelled ({reason})")
    return f"{name} has no trades: {'; '.join(parts)}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _signals(count: int) -> str:
    return "1 signal" if count == 1 else f"{count:,} signals"


def _costs(setup: Setup) -> str:
    changed = "".join(f", {name}={value:g}" for name, value in setup.settings.items())
    return (
        f"Fee {setup.fee_pct:g} % and slippage {setup.slippage_pct:g} % of each fill; fill model {setup.fill}{changed}"
    )


def gap_remarks(results: ResultSet[ResultValues]) -> list[str]:
    """A sentence for each symbol with minutes that were filled, and with rows that were repaired."""
    sentences = []
    names = result_names(results)
    for result in results:
        for symbol, count in sorted(result.gaps_filled.items()):
            asker = "" if symbol == result.symbol else f", read by {names[id(result)]},"
            subject = "1 missing minute" if count == 1 else f"{count:,} missing minutes"
            share = count / max(1, result.candles_used) * 100
            verb = "was" if count == 1 else "were"
            sentences.append(
                f"{subject} of {symbol}{asker} {verb} filled with flat candles of no volume ({share:.2g} % of all)"
            )
        for symbol, repairs in sorted(result.repairs.items()):
            asker = "" if symbol == result.symbol else f", read by {names[id(result)]},"
            sentences.append(f"Rows of {symbol}{asker} that were repaired: {describe_repairs(repairs)}")
    return sentences


class TradeColumn(NamedTuple):
    """One column of the trades table."""

    label: str
    text: Callable[[Trade], str]
    numeric: bool = True


TRADE_COLUMNS: Final = (
    TradeColumn("Signal ID", lambda trade: trade.signal_id, numeric=False),
    TradeColumn("Symbol", lambda trade: trade.symbol, numeric=False),
    TradeColumn("Position", lambda trade: trade.side, numeric=False),
    TradeColumn("Note", lambda trade: trade.note, numeric=False),
    TradeColumn("Open Price", lambda trade: price(trade.price_open)),
    TradeColumn("Close Price", lambda trade: price(trade.price_close)),
    TradeColumn("Take Profit", lambda trade: price(trade.price_take_profit)),
    TradeColumn("Stop Loss", lambda trade: price(trade.price_stop_loss)),
    TradeColumn("Original TP", lambda trade: price(trade.original_price_take_profit)),
    TradeColumn("Original SL", lambda trade: price(trade.original_price_stop_loss)),
    TradeColumn("Original Entry", lambda trade: price(trade.original_price_open)),
    TradeColumn("DCA Entries", lambda trade: str(len(trade.entries))),
    TradeColumn("Partial Closes", lambda trade: str(len(trade.reductions))),
    TradeColumn("PNL (net)", lambda trade: signed_percent(trade.pnl_pct)),
    TradeColumn("PNL (USD)", lambda trade: money(trade.pnl_cost)),
    TradeColumn("Partial Executed %", lambda trade: number(_executed_pct(trade), 2)),
    TradeColumn("Entries (list)", lambda trade: _entries(trade), numeric=False),
    TradeColumn("Partial Closes (list)", lambda trade: _reductions(trade), numeric=False),
    TradeColumn("Close Reason", lambda trade: trade.close_reason, numeric=False),
    TradeColumn("Duration (min)", lambda trade: minutes((trade.closed_at_ms - trade.opened_at_ms) / MINUTE_MS)),
    TradeColumn("Open Time", lambda trade: iso(trade.opened_at_ms), numeric=False),
    TradeColumn("Close Time", lambda trade: iso(trade.closed_at_ms), numeric=False),
    TradeColumn("Peak PNL", lambda trade: signed_percent(trade.peak_pct)),
    TradeColumn("Max DD PNL", lambda trade: signed_percent(trade.fall_pct)),
)


def trade_columns(results: ResultSet[ResultValues]) -> list[TradeColumn]:
    """The columns to show: the note only if a result asks for it."""
    show_note = any(result.show_note for result in results)
    return [column for column in TRADE_COLUMNS if show_note or column.label != "Note"]


def _executed_pct(trade: Trade) -> float:
    """How much of the total invested was closed before the end, in percent."""
    closed = math.fsum(reduction.percent / 100 * reduction.cost_basis for reduction in trade.reductions)
    return closed / trade.cost * 100 if trade.cost else 0.0


def _entries(trade: Trade) -> str:
    """Every entry if there are several: a single one is the open price."""
    if len(trade.entries) < 2:
        return ""
    return "; ".join(f"{entry.cost:.2f} @ {price(entry.price)}" for entry in trade.entries)


def _reductions(trade: Trade) -> str:
    return "; ".join(f"{percent(reduction.percent)} @ {price(reduction.price)}" for reduction in trade.reductions)


def heading(results: Sequence[ResultValues]) -> tuple[str, str]:
    """Title, and a line with exchange, frame and range."""

    def names(field: str) -> str:
        return ", ".join(dict.fromkeys(getattr(result, field) for result in results))

    if not results:
        return "Backtest", "No results"
    start, stop = min(result.start_ms for result in results), max(result.stop_ms for result in results)
    where = f"{names('exchange_name')}, {names('frame_name')} ({iso(start)} to {iso(stop)})"
    return f"Backtest: {names('strategy_name')}", where
