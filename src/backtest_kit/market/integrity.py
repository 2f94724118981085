"""Checks candles: their values, their order, and missing minutes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import numpy as np

from backtest_kit.errors import BadCandles, UserError
from backtest_kit.model.candle import COLUMNS, NO_TIME, PRICE_COLUMNS, CandleSeries, FloatColumn, TimeColumn
from backtest_kit.model.interval import DAY_MS, INTERVAL_MS, MINUTE_MS, iso
from backtest_kit.model.price import price_text
from backtest_kit.settings import Settings

_WAY_OUT: Final = (
    'correct the source, choose a frame without it, or have bad rows repaired (dirty="repair", '
    "on the command line --dirty repair)"
)
_PLACES_SHOWN: Final = 3
_ODDS: Final = 1000
"""Rows of an illiquid market may lie on a coarser grid by chance; rarer than one in this many is not chance."""
_OFF_GRID: Final = 0.1
"""Which part of the rows may lie off that grid."""
_STRETCH_MS: Final = DAY_MS
"""How long rows must look like longer candles to count as such: a quiet night is shorter."""
_MINUTES_ONLY: Final = "give 1m candles, longer ones are made from them"

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Mask: TypeAlias = "NDArray[np.bool_]"


class Fault(NamedTuple):
    """A rule that every row must obey by itself."""

    kind: str
    column: str
    rule: str
    find: Callable[[CandleSeries], Mask]
    """The rows that break it."""


class Gaps(NamedTuple):
    """The missing minutes of a range: range i of them is `[start_ms[i], stop_ms[i])`, oldest first."""

    start_ms: TimeColumn
    stop_ms: TimeColumn

    @property
    def total(self) -> int:
        """How many minutes are missing."""
        return int((self.stop_ms - self.start_ms).sum()) // MINUTE_MS

    def __bool__(self) -> bool:
        return len(self.start_ms) > 0

    def describe(self, symbol: str) -> str:
        """`3 minutes of BTCUSDT are missing in 2 places: ...`, with the first places and their lengths."""
        count = len(self.start_ms)
        places = [
            _place(int(start), int(stop))
            for start, stop in zip(self.start_ms[:_PLACES_SHOWN], self.stop_ms[:_PLACES_SHOWN], strict=True)
        ]
        if count > _PLACES_SHOWN:
            places.append("...")
        where = "in 1 place" if count == 1 else f"in {count:,} places"
        is_are = "is" if self.total == 1 else "are"
        return f"{_minutes(self.total)} of {symbol} {is_are} missing {where}: {', '.join(places)}"


def check_candles(candles: CandleSeries, *, symbol: str, settings: Settings, step_ms: int = MINUTE_MS) -> None:
    """Refuse impossible candles. Gaps are not checked: see `find_gaps`.

    An open or close outside of `[low, high]` is tolerated on purpose: several exchanges publish such
    candles, and the price of a step is made of high, low and close.

    Raises:
        BadCandles: a value is not finite, a price is not above 0, a volume is below 0, high is below low,
            a price is below the typical price of the series divided by
            CC_GET_CANDLES_PRICE_ANOMALY_THRESHOLD_FACTOR, or as `check_order`.
    """
    check_order(candles, what=symbol, step_ms=step_ms)
    if not len(candles) or is_plausible(candles, settings):
        return
    for fault in FAULTS:
        wrong = fault.find(candles)
        if wrong.any():
            _refuse(candles, symbol, wrong, fault.column, f"{fault.rule}: {_WAY_OUT}")
    _check_level(candles, symbol, settings)


def check_order(candles: CandleSeries, *, what: str, step_ms: int = MINUTE_MS) -> None:
    """Refuse timestamps that are not whole steps, ascending and unique. `what` names the candles.

    Raises:
        BadCandles: naming the first offender.
    """
    times = candles.timestamp
    if not len(times) or (times[0] % step_ms == 0 and bool((times[1:] - times[:-1] == step_ms).all())):
        return
    untimed = int(np.count_nonzero(times == NO_TIME))
    if untimed:
        raise BadCandles(f"{what}: {untimed:,} of {len(times):,} candles have no readable timestamp: {_WAY_OUT}")
    steps, odd = np.divmod(times, step_ms)
    if odd.any():
        at = int(np.argmax(odd != 0))
        raise BadCandles(
            f"{what}: {np.count_nonzero(odd):,} of {len(times):,} candles do not open on a whole "
            f"{step_ms // 1000} s step, the first at {iso(int(times[at]))}: {_WAY_OUT}"
        )
    ahead = np.diff(steps) > 0
    if ahead.all():
        return
    at = int(np.argmin(ahead)) + 1
    before, here = int(times[at - 1]), int(times[at])
    fault = "appears twice" if here == before else f"comes after the candle of {iso(before)}"
    raise BadCandles(
        f"{what}: candles must be oldest first and unique, but {iso(here)} {fault} "
        f"({np.count_nonzero(~ahead):,} such places): {_WAY_OUT}"
    )


def find_gaps(candles: CandleSeries, start_ms: int, stop_ms: int) -> Gaps:
    """The minutes of `[start_ms, stop_ms)` that ordered 1m candles lack, as contiguous ranges."""
    if stop_ms <= start_ms:
        nothing = np.empty(0, dtype=np.int64)
        return Gaps(nothing, nothing)
    times = candles.between(start_ms, stop_ms).timestamp
    edges = np.concatenate(([start_ms - MINUTE_MS], times, [stop_ms]))
    broken = np.diff(edges) > MINUTE_MS
    return Gaps(edges[:-1][broken] + MINUTE_MS, edges[1:][broken])


def fill_gaps(candles: CandleSeries, start_ms: int, stop_ms: int) -> CandleSeries:
    """Every minute of `[start_ms, stop_ms)`: the missing ones flat at the previous close, with volume 0.

    The previous close may come from a candle before `start_ms`.

    Raises:
        UserError: there is no previous close for the first minute.
    """
    times = np.arange(start_ms, stop_ms, MINUTE_MS, dtype=np.int64)
    source = np.searchsorted(candles.timestamp, times, side="right") - 1
    if len(times) and (source[0] < 0 or not len(candles)):
        first = iso(int(candles.timestamp[0])) if len(candles) else "never"
        raise UserError(
            f"{iso(start_ms)} cannot be filled: the first candle is {first}, so there is no close before it"
        )
    present = candles.timestamp[source] == times
    close = candles.close[source]
    open_, high, low = (
        np.where(present, column[source], close) for column in (candles.open, candles.high, candles.low)
    )
    return CandleSeries(times, open_, high, low, close, np.where(present, candles.volume[source], 0.0))


def check_grid(times: TimeColumn, *, what: str) -> None:
    """Refuse rows that are spaced like candles of another length than a minute: filled up to minutes, each would show
    its close before its time. `what` names where they come from.

    Raises:
        UserError: naming the length.
    """
    spacing = np.diff(times)
    alike = np.count_nonzero(spacing == MINUTE_MS)
    if alike == len(spacing):
        return
    times = times[times != NO_TIME]
    if 2 * alike < len(spacing):
        _check_all(times, what)
    _check_stretches(times, what)


def _check_all(times: TimeColumn, what: str) -> None:
    spacing = np.diff(np.unique(times))
    if len(spacing) < 2:
        return
    usual_ms = int(np.median(spacing))
    if 2 * usual_ms < MINUTE_MS:
        raise UserError(f"{what} has a row every {usual_ms / 1000:g} s: give 1m candles")
    name = _grid_of(times, _ODDS)
    if name is not None:
        raise UserError(f"{what} has {name} candles: {_MINUTES_ONLY}")


def _check_stretches(times: TimeColumn, what: str) -> None:
    """Refuse candles of another length in a part of the rows: two files that were joined, or a source that changed."""
    apart = np.diff(times) != MINUTE_MS
    edges = np.flatnonzero(np.diff(np.concatenate(([False], apart, [False])).astype(np.int8)))
    firsts, lasts = edges[::2], edges[1::2]
    long = (lasts - firsts >= 2) & (times[lasts] - times[firsts] >= _STRETCH_MS)
    for first, last in zip(firsts[long].tolist(), lasts[long].tolist(), strict=True):
        # One of many stretches lies on a grid by chance more easily than one that is alone.
        name = _grid_of(times[first : last + 1], _ODDS * len(firsts))
        if name is not None:
            raise UserError(
                f"{what} has {name} candles from {iso(int(times[first]))} to {iso(int(times[last]))}: {_MINUTES_ONLY}"
            )


def _grid_of(times: TimeColumn, odds: float) -> str | None:
    """The length of the candles whose grid the rows lie on, if that is a chance of less than one in `odds`."""
    minutes = np.unique(whole_minutes(times)) // MINUTE_MS
    for name, step_ms in reversed(INTERVAL_MS.items()):
        steps = step_ms // MINUTE_MS
        # A few rows may lie off the grid of the others, such as the candle that was still open.
        off_grid = len(minutes) - int(np.bincount(minutes % steps).max())
        chance = (len(minutes) - off_grid - 1) * math.log(steps)
        if off_grid:
            chance -= off_grid * math.log(math.e * len(minutes) / off_grid)
        if steps > 1 and off_grid <= _OFF_GRID * len(minutes) and chance >= math.log(odds):
            return name
    return None


def whole_minutes(times: TimeColumn) -> TimeColumn:
    """Each time moved up to a whole minute."""
    minutes: TimeColumn = -(-times // MINUTE_MS) * MINUTE_MS
    return minutes


def is_plausible(candles: CandleSeries, settings: Settings) -> bool:
    """One cheap pass that good candles clear; others must be checked rule by rule. Needs at least one candle."""
    prices = [getattr(candles, name) for name in PRICE_COLUMNS]
    lowest = np.min([column.min() for column in prices])
    highest = np.max([column.max() for column in prices])
    factor = settings.CC_GET_CANDLES_PRICE_ANOMALY_THRESHOLD_FACTOR
    return bool(
        # NaN fails every comparison. The typical price is never above the highest, so the bound is safe.
        lowest > 0
        and highest < np.inf
        and lowest >= highest / factor
        and candles.volume.min() >= 0
        and candles.volume.max() < np.inf
        and (candles.high >= candles.low).all()
    )


def _not_finite(name: str) -> Fault:
    return Fault("not_finite", name, "every value must be finite", lambda candles: ~np.isfinite(getattr(candles, name)))


def _not_above_zero(name: str) -> Fault:
    return Fault("price", name, "prices must be above 0", lambda candles: getattr(candles, name) <= 0)


FAULTS: Final = (
    *map(_not_finite, COLUMNS[1:]),
    *map(_not_above_zero, PRICE_COLUMNS),
    Fault("volume", "volume", "volumes must not be negative", lambda candles: candles.volume < 0),
    Fault("range", "high", "high must not be below low", lambda candles: candles.high < candles.low),
)
"""The rules that every candle must obey."""


def _check_level(candles: CandleSeries, symbol: str, settings: Settings) -> None:
    """Refuse prices far below the typical one: exchanges publish such candles when their data are incomplete."""
    factor = settings.CC_GET_CANDLES_PRICE_ANOMALY_THRESHOLD_FACTOR
    typical = _typical_price(candles, settings.CC_GET_CANDLES_MIN_CANDLES_FOR_MEDIAN)
    least = typical / factor
    rule = (
        f"no price may be below {price_text(least)}, the typical {price_text(typical)} divided by "
        f"CC_GET_CANDLES_PRICE_ANOMALY_THRESHOLD_FACTOR = {factor}: raise this setting if the price is real, "
        f"otherwise {_WAY_OUT}"
    )
    for name in PRICE_COLUMNS:
        wrong = getattr(candles, name) < least
        if wrong.any():
            _refuse(candles, symbol, wrong, name, rule)


def _typical_price(candles: CandleSeries, least_for_median: int) -> float:
    """The upper median of all prices; the mean where candles are too few for a median."""
    prices: FloatColumn = np.concatenate([getattr(candles, name) for name in PRICE_COLUMNS])
    if len(candles) < least_for_median:
        return float(prices.mean())
    middle = len(prices) // 2
    return float(np.partition(prices, middle)[middle])


def _refuse(candles: CandleSeries, symbol: str, wrong: NDArray[np.bool_], column: str, rule: str) -> None:
    at = int(np.argmax(wrong))
    count = int(np.count_nonzero(wrong))
    others = "" if count == 1 else f" and in {count - 1:,} more candles"
    raise BadCandles(
        f"{symbol}: {column} is {getattr(candles, column)[at]:g} at {iso(int(candles.timestamp[at]))}"
        f"{others}, but {rule}"
    )


def _place(start_ms: int, stop_ms: int) -> str:
    length = (stop_ms - start_ms) // MINUTE_MS
    if length == 1:
        return f"{iso(start_ms)} (1 minute)"
    return f"{iso(start_ms)} .. {iso(stop_ms - MINUTE_MS)} ({_minutes(length)})"


def _minutes(count: int) -> str:
    return "1 minute" if count == 1 else f"{count:,} minutes"
