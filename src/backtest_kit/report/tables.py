"""What every report shows, as text: the columns, the labels and the formats, each written down once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

from backtest_kit.model.interval import MINUTE_MS, iso
from backtest_kit.model.position import CloseReason, Trade
from backtest_kit.report.statistics import Statistics, statistics_of

if TYPE_CHECKING:
    from backtest_kit.report.result import BacktestResult, Results

NOT_AVAILABLE: Final = "N/A"


def price(value: float) -> str:
    """A price with the decimals its size asks for: 2 from 1 up, 4 from 0.1, 6 from 0.01, else 8."""
    return _number(value, price_decimals(value))


def price_decimals(value: float) -> int:
    size = abs(value)
    return 2 if size >= 1 or size == 0 else 4 if size >= 0.1 else 6 if size >= 0.01 else 8


def money(value: float | None) -> str:
    return _number(value, 2, signed=True)


def signed_percent(value: float | None) -> str:
    return _with_unit(_number(value, 2, signed=True))


def percent(value: float | None) -> str:
    return _with_unit(_number(value, 2))


def ratio(value: float | None) -> str:
    return _number(value, 3)


def minutes(value: float | None) -> str:
    return _number(value, 1)


def _negated_percent(value: float | None) -> str:
    return percent(None if value is None else -value)


def _share(value: float | None) -> str:
    return percent(None if value is None else value * 100)


def _plain(value: object) -> str:
    return NOT_AVAILABLE if value is None else str(value)


def _number(value: float | None, decimals: int, *, signed: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return NOT_AVAILABLE
    rounded = round(value, decimals) + 0.0  # adding 0.0 turns -0.0 into 0.0
    return f"{'+' if signed and rounded > 0 else ''}{rounded:.{decimals}f}"


def _with_unit(text: str) -> str:
    return text if text == NOT_AVAILABLE else f"{text} %"


class Line(NamedTuple):
    """One statistic of a report."""

    label: str
    field: str
    text: Callable[[Any], str]


STATISTIC_LINES: Final = (
    Line("Trades", "total_count", _plain),
    Line("Wins", "win_count", _plain),
    Line("Losses", "loss_count", _plain),
    Line("Win rate", "win_rate", percent),
    Line("Average PnL", "avg_pnl", signed_percent),
    Line("Total PnL", "total_pnl", signed_percent),
    Line("Median PnL", "median_pnl", signed_percent),
    Line("Standard deviation", "std_dev", percent),
    Line("Sharpe ratio", "sharpe_ratio", ratio),
    Line("Annualized Sharpe ratio", "annualized_sharpe_ratio", ratio),
    Line("Sortino ratio", "sortino_ratio", ratio),
    Line("Calmar ratio", "calmar_ratio", ratio),
    Line("Recovery factor", "recovery_factor", ratio),
    Line("Certainty ratio", "certainty_ratio", ratio),
    Line("Profit factor", "profit_factor", ratio),
    Line("Expectancy", "expectancy", signed_percent),
    Line("Expected yearly returns", "expected_yearly_returns", signed_percent),
    Line("Equity at the end", "equity_final", ratio),
    Line("Max drawdown", "max_drawdown", _negated_percent),
    Line("Span (days)", "span_days", minutes),
    Line("Trades per year", "trades_per_year", minutes),
    Line("Average win", "avg_win", signed_percent),
    Line("Average loss", "avg_loss", signed_percent),
    Line("Longest win streak", "max_win_streak", _plain),
    Line("Longest loss streak", "max_loss_streak", _plain),
    Line("Average win streak PnL", "avg_consecutive_win_pnl", signed_percent),
    Line("Average loss streak PnL", "avg_consecutive_loss_pnl", signed_percent),
    Line("Average peak PnL", "avg_peak_pnl", signed_percent),
    Line("Average fall PnL", "avg_fall_pnl", signed_percent),
    Line("Highest peak PnL", "peak_profit_pnl", signed_percent),
    Line("Deepest fall PnL", "max_drawdown_pnl", signed_percent),
    Line("Average duration (min)", "avg_duration", minutes),
    Line("Average win duration (min)", "avg_win_duration", minutes),
    Line("Average loss duration (min)", "avg_loss_duration", minutes),
)
"""Every statistic but the price profile, which only one market has."""

PROFILE_LINES: Final = (
    Line("Trend", "trend", _plain),
    Line("Trend strength per day", "trend_strength", signed_percent),
    Line("Trend confidence (R²)", "trend_confidence", ratio),
    Line("Median step", "median_step_size", percent),
    Line("Buyer pressure", "buyer_pressure", _share),
    Line("Seller pressure", "seller_pressure", _share),
    Line("Buyer strength", "buyer_strength", _share),
    Line("Seller strength", "seller_strength", _share),
    Line("Pressure imbalance", "pressure_imbalance", ratio),
)


def statistic_lines(results: Results) -> list[tuple[str, str]]:
    """(label, text) of every statistic of all trades together; the price profile where there is one market."""
    one_market = len({(result.exchange_name, result.symbol) for result in results}) == 1
    lines = (*STATISTIC_LINES, *PROFILE_LINES) if one_market else STATISTIC_LINES
    return [(line.label, line.text(getattr(results.stats, line.field))) for line in lines]


class Table(NamedTuple):
    """A table of texts; the first column is a name, the others are numbers."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    total: tuple[str, ...] | None = None


def summary_table(results: Results) -> Table:
    """One row per result, the best Sharpe ratio first and the unknown ones last, and a total."""
    header = (
        "Symbol",
        "Trades",
        "Win rate %",
        "Total PnL %",
        "PnL (USD)",
        "Sharpe",
        "Max DD %",
        "Profit factor",
        "Avg min",
        "Frame end",
    )
    ranked = sorted(results, key=lambda result: _unknown_last(result.stats.sharpe_ratio))
    names = result_names(results)
    return Table(
        header,
        [_summary_row(names[id(result)], result.stats, result.trades) for result in ranked],
        _summary_row("Total", results.stats, results.trades),
    )


def result_names(results: Sequence[BacktestResult]) -> dict[int, str]:
    """What to call each result, by its id(): its symbol, and more only where two share it."""
    symbols = [result.symbol for result in results]
    return {
        id(result): result.symbol
        if symbols.count(result.symbol) == 1
        else f"{result.symbol} ({result.strategy_name}, {result.exchange_name}, {result.frame_name})"
        for result in results
    }


def _unknown_last(sharpe: float | None) -> tuple[bool, float]:
    return sharpe is None, -(sharpe or 0.0)


def _summary_row(name: str, stats: Statistics, trades: Sequence[Trade]) -> tuple[str, ...]:
    return (
        name,
        str(stats.total_count),
        _number(stats.win_rate, 2),
        _number(stats.total_pnl, 2, signed=True),
        money(math.fsum(trade.pnl_cost for trade in trades)),
        ratio(stats.sharpe_ratio),
        _number(None if stats.max_drawdown is None else -stats.max_drawdown, 2),
        ratio(stats.profit_factor),
        minutes(stats.avg_duration),
        str(sum(trade.close_reason == "frame_end" for trade in trades)),
    )


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
                _number(stats.win_rate, 2),
                _number(stats.avg_pnl, 2, signed=True),
                _number(stats.total_pnl, 2, signed=True),
                money(math.fsum(trade.pnl_cost for trade in members)),
            )
        )
    return Table(("Close reason", "Count", "Win rate %", "Avg PnL %", "Total PnL %", "PnL (USD)"), rows)


def remarks(results: Results) -> list[str]:
    """What a reader must know before he trusts the figures, a sentence each."""
    sentences = []
    unfinished = [trade for trade in results.trades if trade.close_reason == "frame_end"]
    if unfinished:
        subject = "1 position was" if len(unfinished) == 1 else f"{len(unfinished)} positions were"
        total = signed_percent(math.fsum(trade.pnl_pct for trade in unfinished))
        sentences.append(f"{subject} still open at the end of the frame (close reason frame_end): {total}")
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
        if result.stopped:
            sentences.append(f"{names[id(result)]} was stopped at {iso(result.stop_ms)}")
    for first, second in combinations(results, 2):
        if first.symbol != second.symbol and len(first.chart) and first.chart == second.chart:
            sentences.append(f"{names[id(first)]} and {names[id(second)]} traded the very same candles")
    if len(results) > 1:
        sentences.append(
            "The drawdown of the total takes each trade with the whole account, one after the other in order of close"
        )
    return sentences


class TradeColumn(NamedTuple):
    """One column of the trades table."""

    label: str
    text: Callable[[Trade], str]
    numeric: bool = True


TRADE_COLUMNS: Final = (
    TradeColumn("Signal ID", lambda trade: trade.signal_id, numeric=False),
    TradeColumn("Symbol", lambda trade: trade.symbol, numeric=False),
    TradeColumn("Position", lambda trade: trade.position, numeric=False),
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
    TradeColumn("Partial Executed %", lambda trade: _number(_executed_pct(trade), 2)),
    TradeColumn("Partial Closes (list)", lambda trade: _reductions(trade), numeric=False),
    TradeColumn("Close Reason", lambda trade: trade.close_reason, numeric=False),
    TradeColumn("Duration (min)", lambda trade: minutes((trade.closed_at_ms - trade.opened_at_ms) / MINUTE_MS)),
    TradeColumn("Open Time", lambda trade: iso(trade.opened_at_ms), numeric=False),
    TradeColumn("Close Time", lambda trade: iso(trade.closed_at_ms), numeric=False),
    TradeColumn("Peak PNL", lambda trade: signed_percent(trade.peak_pct)),
    TradeColumn("Max DD PNL", lambda trade: signed_percent(trade.fall_pct)),
)


def trade_columns(results: Results) -> list[TradeColumn]:
    """The columns to show: the note only where a result asks for it."""
    show_note = any(result.show_note for result in results)
    return [column for column in TRADE_COLUMNS if show_note or column.label != "Note"]


def _executed_pct(trade: Trade) -> float:
    """How much of all that was put in had been closed before the end, in percent."""
    closed = math.fsum(reduction.percent / 100 * reduction.cost_basis for reduction in trade.reductions)
    return closed / trade.cost * 100 if trade.cost else 0.0


def _reductions(trade: Trade) -> str:
    return "; ".join(f"{percent(reduction.percent)} @ {price(reduction.price)}" for reduction in trade.reductions)


def heading(results: Sequence[BacktestResult]) -> tuple[str, str]:
    """Title, and a line with exchange, frame and range."""

    def names(field: str) -> str:
        return ", ".join(dict.fromkeys(getattr(result, field) for result in results))

    if not results:
        return "Backtest", "No results"
    start, stop = min(result.start_ms for result in results), max(result.stop_ms for result in results)
    where = f"{names('exchange_name')}, {names('frame_name')} ({iso(start)} to {iso(stop)})"
    return f"Backtest: {names('strategy_name')}", where
