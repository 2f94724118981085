"""Statistics of closed trades: one pure function over columns, and the equity curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from backtest_kit.errors import UserError
from backtest_kit.model.candle import FloatColumn, TimeColumn
from backtest_kit.model.interval import DAY_MS, MINUTE_MS
from backtest_kit.model.position import Trade
from backtest_kit.report.price_profile import Trend, finite, price_profile

MIN_TRADES: Final = 10
"""With fewer trades every ratio is N/A: their spread means nothing."""
MIN_SPAN_DAYS: Final = 14.0
"""A shorter span is not annualized."""
MAX_TRADES_PER_YEAR: Final = 365.0
MAX_YEARLY_PCT: Final = 100.0
RATIO_CAP: Final = 1000.0
EPSILON: Final = 1e-9
"""A denominator up to this counts as zero."""


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of closed trades; None is N/A. `r` is a trade's profit in percent, `n` their number.

    Percentages are in percent, durations in minutes. Fields marked (10) are N/A for fewer than ten
    trades. A result that is not finite is N/A.
    """

    total_count: int
    """n: trades with both times known (opened and closed after the epoch)."""
    win_count: int
    """Trades with r > 0."""
    loss_count: int
    """Trades with r < 0; a break-even trade is neither."""
    win_rate: float
    """wins / (wins + losses) x 100; 0 if there are neither."""
    avg_pnl: float | None
    """Mean of r."""
    total_pnl: float | None
    """Sum of r."""
    median_pnl: float | None
    """Median of r."""
    std_dev: float | None
    """Sample standard deviation (n - 1) of r (10)."""
    sharpe_ratio: float | None
    """avg_pnl / std_dev, per trade, risk-free rate 0 (10); N/A for std_dev <= 1e-9."""
    span_days: float | None
    """Days from the first opening to the last close."""
    trades_per_year: float | None
    """n / span_days x 365 (10); N/A for a span under 14 days or a value above 365."""
    annualized_sharpe_ratio: float | None
    """sharpe_ratio x sqrt(trades_per_year)."""
    equity_final: float | None
    """End of the equity curve that starts at 1; 0 once the account is blown."""
    max_drawdown: float | None
    """Largest fall of the equity curve below its peak, in percent of the peak; 100 if blown."""
    expected_yearly_returns: float | None
    """(equity_final ^ (trades_per_year / n) - 1) x 100; -100 if blown; N/A beyond +-100."""
    certainty_ratio: float | None
    """Average win (0 for none) / abs(average loss) (10); N/A without losses."""
    expectancy: float | None
    """wins / n x average win + losses / n x average loss (10)."""
    sortino_ratio: float | None
    """avg_pnl / sqrt(sum of r^2 over losses / n) (10); N/A without losses."""
    calmar_ratio: float | None
    """expected_yearly_returns / max_drawdown, within +-1000; N/A without a drawdown."""
    recovery_factor: float | None
    """(equity_final - 1) x 100 / max_drawdown, within +-1000 (10); N/A if blown or without a drawdown."""
    avg_peak_pnl: float | None
    """Mean of the best profit seen, over the trades that have it."""
    avg_fall_pnl: float | None
    """Mean of the worst profit seen, over the trades that have it."""
    avg_duration: float | None
    """Mean of close - opening."""
    avg_win_duration: float | None
    """Mean of close - opening over wins."""
    avg_loss_duration: float | None
    """Mean of close - opening over losses."""
    avg_consecutive_win_pnl: float | None
    """Mean over streaks of wins, in order of arrival, of the sum of r in the streak."""
    avg_consecutive_loss_pnl: float | None
    """Mean over streaks of losses, in order of arrival, of the sum of r in the streak."""
    profit_factor: float | None
    """Sum of wins / abs(sum of losses); N/A without wins or without losses."""
    avg_win: float | None
    """Mean of r over wins."""
    avg_loss: float | None
    """Mean of r over losses."""
    max_win_streak: int
    """Most wins in a row, in order of arrival; a break-even trade ends a streak."""
    max_loss_streak: int
    """Most losses in a row, in order of arrival; a break-even trade ends a streak."""
    peak_profit_pnl: float | None
    """Largest best profit seen by any trade."""
    max_drawdown_pnl: float | None
    """Smallest worst profit seen by any trade."""
    median_step_size: float | None
    """Median of abs(step) x 100; step = (c[i] - c[i-1]) / c[i-1] over closing prices in close order (10)."""
    buyer_pressure: float | None
    """Steps up / (steps up + steps down), 0..1 (10)."""
    seller_pressure: float | None
    """1 - buyer_pressure."""
    buyer_strength: float | None
    """Sum of steps up / sum of abs(steps), 0..1 (10)."""
    seller_strength: float | None
    """1 - buyer_strength."""
    pressure_imbalance: float | None
    """buyer_strength - seller_strength, -1..1."""
    trend_strength: float | None
    """Least-squares slope of ln(closing price) over days, x 100: percent per day (10)."""
    trend_confidence: float | None
    """R^2 of that line, 0..1 (10)."""
    trend: Trend | None
    """R^2 < 0.30 sideways; else abs(slope) < 0.25 x median_step_size neutral; else bullish or bearish."""


class EquityCurve(NamedTuple):
    """The account after each close, in order of close; it starts at 1 before the first."""

    closed_at_ms: TimeColumn
    equity: FloatColumn
    drawdown_pct: FloatColumn
    """Largest fall below the peak within the trade: at its worst price or at its close."""


class _Rows(NamedTuple):
    pnl: FloatColumn
    opened_at_ms: FloatColumn
    closed_at_ms: FloatColumn
    peak: FloatColumn
    fall: FloatColumn
    close_price: FloatColumn

    def take(self, index: Any) -> _Rows:
        return _Rows(*(column[index] for column in self))


def compute_statistics(
    *,
    pnl_pct: Any,
    opened_at_ms: Any,
    closed_at_ms: Any,
    peak_pct: Any = None,
    fall_pct: Any = None,
    close_price: Any = None,
) -> Statistics:
    """Statistics of closed trades, oldest first, one entry per trade in each column.

    Args:
        pnl_pct: profit in percent. A profit that is NaN is neither win nor loss and makes sums N/A.
        opened_at_ms, closed_at_ms: epoch milliseconds; a trade without both (0 or NaN) is left out.
        peak_pct, fall_pct: profit in percent at the best and the worst price; NaN where not known.
        close_price: closing prices of one market, for the price profile; NaN where not known.

    Raises:
        UserError: a column is not flat numbers, or they differ in length.
    """
    rows = _valid_rows(pnl_pct, opened_at_ms, closed_at_ms, peak_pct, fall_pct, close_price)
    with np.errstate(all="ignore"):
        numbers = {
            **_profits(rows),
            **_streaks(rows.pnl),
            **_durations(rows),
            **price_profile(rows.closed_at_ms, rows.close_price),
        }
        numbers |= _ratios(rows, numbers)
    return Statistics(**numbers)


def equity_curve(*, pnl_pct: Any, opened_at_ms: Any, closed_at_ms: Any, fall_pct: Any = None) -> EquityCurve:
    """The equity of one account that invests everything in each trade, one after the other in order of close.

    A trade multiplies the equity by 1 + r / 100. During the trade it reaches equity x (1 + fall / 100) where
    its worst profit `fall` is negative. An account that reaches 0 or less is blown and stays at 0.
    Overlapping trades count as if each invested the whole account, so their drawdown is
    overstated. Columns are those of `compute_statistics`.

    Raises:
        UserError: a column is not flat numbers, or they differ in length.
    """
    rows = _valid_rows(pnl_pct, opened_at_ms, closed_at_ms, None, fall_pct, None)
    with np.errstate(all="ignore"):
        return _equity(rows)


def statistics_of(trades: Sequence[Trade]) -> Statistics:
    """`compute_statistics` of trades, oldest first; closing prices count only if all are of one market."""
    one_market = len({(trade.exchange_name, trade.symbol) for trade in trades}) == 1
    return compute_statistics(
        pnl_pct=[trade.pnl_pct for trade in trades],
        opened_at_ms=[trade.opened_at_ms for trade in trades],
        closed_at_ms=[trade.closed_at_ms for trade in trades],
        peak_pct=[trade.peak_pct for trade in trades],
        fall_pct=[trade.fall_pct for trade in trades],
        close_price=[trade.price_close for trade in trades] if one_market else None,
    )


def equity_of(trades: Sequence[Trade]) -> EquityCurve:
    """`equity_curve` of trades, in any order."""
    return equity_curve(
        pnl_pct=[trade.pnl_pct for trade in trades],
        opened_at_ms=[trade.opened_at_ms for trade in trades],
        closed_at_ms=[trade.closed_at_ms for trade in trades],
        fall_pct=[trade.fall_pct for trade in trades],
    )


def _equity(rows: _Rows) -> EquityCurve:
    rows = rows.take(np.argsort(rows.closed_at_ms, kind="stable"))
    equity: FloatColumn = np.cumprod(1 + rows.pnl / 100, dtype=np.float64)
    before = np.concatenate(([1.0], equity))[:-1]
    trough = np.where(rows.fall < 0, before * (1 + rows.fall / 100), before)
    peak = np.maximum.accumulate(np.concatenate(([1.0], equity)))
    drawdown: FloatColumn = np.maximum((peak[:-1] - trough) / peak[:-1] * 100, (peak[1:] - equity) / peak[1:] * 100)
    blown = np.flatnonzero((trough <= 0) | (equity <= 0))
    if len(blown):
        equity[blown[0] :] = 0.0
        drawdown[blown[0] :] = 100.0
    return EquityCurve(rows.closed_at_ms.astype(np.int64), equity, drawdown)


def _valid_rows(*columns: Any) -> _Rows:
    names = ("pnl_pct", "opened_at_ms", "closed_at_ms", "peak_pct", "fall_pct", "close_price")
    arrays: list[FloatColumn] = []
    for name, column in zip(names, columns, strict=True):
        try:
            array = np.full(len(arrays[0]), np.nan) if column is None else np.asarray(column, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(f"column {name} is not numeric: {error}") from None
        if array.ndim != 1:
            raise UserError(f"column {name} has {array.ndim} dimensions: give a flat column")
        if arrays and len(array) != len(arrays[0]):
            raise UserError(f"column {name} has {len(array)} rows, pnl_pct has {len(arrays[0])}")
        arrays.append(array)
    rows = _Rows(*arrays)
    known = np.isfinite(rows.opened_at_ms) & np.isfinite(rows.closed_at_ms)
    return rows.take(known & (rows.opened_at_ms > 0) & (rows.closed_at_ms > 0))


def _profits(rows: _Rows) -> dict[str, Any]:
    pnl, peak, fall = rows.pnl, rows.peak[~np.isnan(rows.peak)], rows.fall[~np.isnan(rows.fall)]
    wins, losses = pnl[pnl > 0], pnl[pnl < 0]
    decisive = len(wins) + len(losses)
    lost = abs(losses.sum())
    return {
        "total_count": len(pnl),
        "win_count": len(wins),
        "loss_count": len(losses),
        "win_rate": len(wins) / decisive * 100 if decisive else 0.0,
        "avg_pnl": _mean(pnl),
        "total_pnl": finite(pnl.sum()) if len(pnl) else None,
        "median_pnl": finite(np.median(pnl)) if len(pnl) else None,
        "std_dev": finite(pnl.std(ddof=1)) if len(pnl) >= MIN_TRADES else None,
        "avg_win": _mean(wins),
        "avg_loss": _mean(losses),
        "profit_factor": finite(wins.sum() / lost) if len(wins) and lost > EPSILON else None,
        "avg_peak_pnl": _mean(peak),
        "avg_fall_pnl": _mean(fall),
        "peak_profit_pnl": finite(peak.max()) if len(peak) else None,
        "max_drawdown_pnl": finite(fall.min()) if len(fall) else None,
    }


def _ratios(rows: _Rows, known: dict[str, Any]) -> dict[str, Any]:
    n, average, deviation = len(rows.pnl), known["avg_pnl"], known["std_dev"]
    enough = n >= MIN_TRADES
    curve = _equity(rows)
    final = finite(curve.equity[-1]) if n else None
    drawdown = finite(curve.drawdown_pct.max()) if n else None
    span = (rows.closed_at_ms.max() - rows.opened_at_ms.min()) / DAY_MS if n else None
    per_year = _trades_per_year(n, span)
    sharpe = average / deviation if average is not None and deviation is not None and deviation > EPSILON else None
    yearly = _yearly(final, per_year, n)
    gain = (final - 1) * 100 if final and enough else None
    return {
        "span_days": finite(span),
        "trades_per_year": per_year,
        "sharpe_ratio": finite(sharpe),
        "annualized_sharpe_ratio": finite(sharpe * math.sqrt(per_year)) if sharpe is not None and per_year else None,
        "equity_final": final,
        "max_drawdown": drawdown,
        "expected_yearly_returns": yearly,
        "calmar_ratio": _capped(yearly, drawdown),
        "recovery_factor": _capped(gain, drawdown),
        **(_win_against_loss(rows.pnl, known) if enough else _NO_WIN_AGAINST_LOSS),
    }


_NO_WIN_AGAINST_LOSS: Final = {"certainty_ratio": None, "expectancy": None, "sortino_ratio": None}


def _win_against_loss(pnl: FloatColumn, known: dict[str, Any]) -> dict[str, Any]:
    n, wins, losses = len(pnl), known["win_count"], known["loss_count"]
    average_win = known["avg_win"] if wins else 0.0
    average_loss = known["avg_loss"] if losses else 0.0
    if known["avg_pnl"] is None or average_win is None or average_loss is None:
        return _NO_WIN_AGAINST_LOSS
    downside = finite(np.sqrt(np.square(pnl[pnl < 0]).sum() / n))
    return {
        "certainty_ratio": finite(average_win / abs(average_loss)) if abs(average_loss) > EPSILON else None,
        "expectancy": finite(wins / n * average_win + losses / n * average_loss),
        "sortino_ratio": finite(known["avg_pnl"] / downside) if downside is not None and downside > EPSILON else None,
    }


def _trades_per_year(n: int, span: float | None) -> float | None:
    if n < MIN_TRADES or span is None or span < MIN_SPAN_DAYS:
        return None
    per_year = float(n / span * 365)
    return per_year if per_year <= MAX_TRADES_PER_YEAR else None


def _yearly(final: float | None, per_year: float | None, n: int) -> float | None:
    if final is None or per_year is None:
        return None
    yearly = float((np.float64(final) ** (per_year / n) - 1) * 100)
    return yearly if abs(yearly) <= MAX_YEARLY_PCT else None


def _streaks(pnl: FloatColumn) -> dict[str, Any]:
    outcome = (pnl > 0).astype(np.int8) - (pnl < 0).astype(np.int8)
    starts = np.flatnonzero(np.diff(outcome, prepend=2))
    lengths = np.diff(starts, append=len(outcome))
    sums = np.add.reduceat(pnl, starts) if len(pnl) else pnl
    won, lost = outcome[starts] == 1, outcome[starts] == -1
    return {
        "avg_consecutive_win_pnl": _mean(sums[won]),
        "avg_consecutive_loss_pnl": _mean(sums[lost]),
        "max_win_streak": int(lengths[won].max(initial=0)),
        "max_loss_streak": int(lengths[lost].max(initial=0)),
    }


def _durations(rows: _Rows) -> dict[str, Any]:
    minutes = (rows.closed_at_ms - rows.opened_at_ms) / MINUTE_MS
    return {
        "avg_duration": _mean(minutes),
        "avg_win_duration": _mean(minutes[rows.pnl > 0]),
        "avg_loss_duration": _mean(minutes[rows.pnl < 0]),
    }


def _capped(numerator: float | None, drawdown: float | None) -> float | None:
    if numerator is None or drawdown is None or drawdown <= 0:
        return None
    return finite(min(RATIO_CAP, max(-RATIO_CAP, numerator / drawdown)))


def _mean(values: FloatColumn) -> float | None:
    return finite(values.mean()) if len(values) else None
