"""Profit and effective price, with slippage, fees, added entries and partial closes.

The formulas are those of backtest-kit: slippage moves both fills against the position, the entry fee is
paid once, the exit fee by weight, and everything added to or taken from a position is weighted by cost.
A fee that the exchange reported takes the place of CC_PERCENT_FEE, order by order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from backtest_kit.errors import BacktestKitError
from backtest_kit.model.position import Entry, Reduction
from backtest_kit.model.signal import Direction
from backtest_kit.settings import Settings

_OVERSOLD_ABSOLUTE: Final = 0.001
_OVERSOLD_RELATIVE: Final = 1e-8


def effective_price(entries: Sequence[Entry], reductions: Sequence[Reduction] = ()) -> float:
    """The cost-weighted harmonic mean entry price of the open part, without slippage.

    Without reductions: sum(cost) / sum(cost / price). A reduction takes its share of cost and quantity
    alike, so it moves nothing by itself, but it lowers the weight of what came before it.
    """
    if len(entries) == 1:
        return entries[0].price
    return _effective_prices(entries, reductions)[-1]


def _effective_prices(entries: Sequence[Entry], reductions: Sequence[Reduction]) -> list[float]:
    """The effective price just before each reduction, and last the one of today."""
    prices: list[float] = []
    cost = quantity = 0.0
    taken = 0
    for reduction in reductions:
        for entry in entries[taken : reduction.entry_count]:
            cost += entry.cost
            quantity += entry.cost / entry.price
        taken = reduction.entry_count
        price = cost / quantity
        prices.append(price)
        cost = reduction.cost_basis * (1 - reduction.percent / 100)
        quantity = cost / price
    added = entries[taken:]
    if quantity == 0 and not added:
        return [*prices, prices[-1]]
    cost += math.fsum(entry.cost for entry in added)
    quantity += math.fsum(entry.cost / entry.price for entry in added)
    return [*prices, cost / quantity]


def remaining_cost(entries: Sequence[Entry], reductions: Sequence[Reduction] = ()) -> float:
    """The cost still held: what the last reduction left, and every entry after it."""
    if not reductions:
        return math.fsum(entry.cost for entry in entries)
    last = reductions[-1]
    left = last.cost_basis * (1 - last.percent / 100)
    return left + math.fsum(entry.cost for entry in entries[last.entry_count :])


def closed_pct(entries: Sequence[Entry], reductions: Sequence[Reduction]) -> float:
    """How much of all that was ever put in has been taken out, in percent of cost."""
    closed = math.fsum(reduction.cost_basis * reduction.percent / 100 for reduction in reductions)
    return closed / math.fsum(entry.cost for entry in entries) * 100


def profit(
    position: Direction,
    entries: Sequence[Entry],
    reductions: Sequence[Reduction],
    price: float,
    settings: Settings,
) -> tuple[float, float]:
    """Profit if all that is held were closed at `price`: (percent of all cost, quote currency).

    Raises:
        BacktestKitError: the reductions took out more than was ever put in; the record is corrupt.
    """
    return result(position, entries, reductions, price, settings)[:2]


def result(
    position: Direction,
    entries: Sequence[Entry],
    reductions: Sequence[Reduction],
    price: float,
    settings: Settings,
    close_fee: float | None = None,
) -> tuple[float, float, float]:
    """As `profit`, and the fees in quote currency; `close_fee` is that of the close, if the exchange reported it.

    Raises:
        BacktestKitError: as `profit`.
    """
    rate, slip = settings.CC_PERCENT_FEE, settings.CC_PERCENT_SLIPPAGE / 100
    total = entries[0].cost if len(entries) == 1 else math.fsum(entry.cost for entry in entries)
    if not reductions:
        gains, ratio = _leg(position, effective_price(entries), price, slip)
        paid = _in_percent(close_fee, total, rate * ratio)
    else:
        opened = _effective_prices(entries, reductions)
        closed = [reduction.cost_basis * reduction.percent / 100 for reduction in reductions]
        oversold = math.fsum(closed) - total
        if oversold > max(_OVERSOLD_ABSOLUTE, total * _OVERSOLD_RELATIVE):
            raise BacktestKitError(f"the partial closes took out {oversold:g} more than the {total:g} that was put in")
        weights = [*(part / total for part in closed), (total - math.fsum(closed)) / total]
        prices = [*(reduction.price for reduction in reductions), price]
        charged = [*map(_charged, reductions), close_fee]
        gains = paid = 0.0
        for weight, price_open, price_close, fee in zip(weights, opened, prices, charged, strict=True):
            gain, ratio = _leg(position, price_open, price_close, slip)
            gains += weight * gain
            paid += _in_percent(fee, total, rate * weight * ratio)
    bought = [_in_percent(_charged(entry), total, rate * entry.cost / total) for entry in entries]
    paid += bought[0] if len(bought) == 1 else math.fsum(bought)
    pct = gains - paid
    return pct, pct / 100 * total, paid / 100 * total


def _charged(part: Entry | Reduction) -> float | None:
    """The fee in quote currency as the exchange reported it."""
    return None if part.execution is None else part.execution.fee


def _in_percent(fee: float | None, total: float, modelled: float) -> float:
    """A fee in percent of all cost: as it was charged, or else as the settings say."""
    return modelled if fee is None else fee / total * 100


def _leg(position: Direction, price_open: float, price_close: float, slip: float) -> tuple[float, float]:
    """Gain in percent after slippage, and the ratio of closing to opening value that the exit fee is paid on."""
    sign = 1.0 if position == "long" else -1.0
    bought, sold = price_open * (1 + sign * slip), price_close * (1 - sign * slip)
    return sign * (sold - bought) / bought * 100, sold / bought
