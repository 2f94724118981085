"""`CandleSeries`: candles as read-only columns, the only shape in which candles travel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from backtest_kit.errors import BadCandles

if TYPE_CHECKING:
    from numpy.typing import NDArray

FloatColumn: TypeAlias = "NDArray[np.float64]"
TimeColumn: TypeAlias = "NDArray[np.int64]"
BoolColumn: TypeAlias = "NDArray[np.bool_]"

COLUMNS: Final = ("timestamp", "open", "high", "low", "close", "volume")
PRICE_COLUMNS: Final = ("open", "high", "low", "close")
NO_TIME: Final = -(2**63)
"""Timestamp of a raw row whose own cannot be read."""


class CandleSeries:
    """Candles of one market and interval, a numpy column per field, oldest first.

    `timestamp` is the open time in epoch milliseconds (int64); `open`, `high`, `low`, `close` and
    `volume` are float64. The columns are read-only views: a series can be shared. It may have gaps and be
    unordered; `market.integrity` checks both.
    """

    __slots__ = ("close", "high", "low", "open", "timestamp", "volume")

    timestamp: TimeColumn
    open: FloatColumn
    high: FloatColumn
    low: FloatColumn
    close: FloatColumn
    volume: FloatColumn

    def __init__(
        self,
        timestamp: Any,
        open: Any,
        high: Any,
        low: Any,
        close: Any,
        volume: Any,
    ) -> None:
        """Take six columns of one length. Arrays of the right type are not copied.

        Raises:
            BadCandles: the columns are not of one length, or are not one-dimensional numbers.
        """
        length: int | None = None
        for name, column in zip(COLUMNS, (timestamp, open, high, low, close, volume), strict=True):
            try:
                array = np.asarray(column, dtype=np.int64 if name == "timestamp" else np.float64)
            except (TypeError, ValueError) as error:
                raise BadCandles(f"candle column {name!r} is not numeric: {error}") from None
            if array.ndim != 1:
                raise BadCandles(f"candle column {name!r} has {array.ndim} dimensions: give a flat column")
            if length is None:
                length = len(array)
            elif len(array) != length:
                raise BadCandles(f"candle column {name!r} has {len(array)} rows, 'timestamp' has {length}")
            view = array.view()
            view.flags.writeable = False
            setattr(self, name, view)

    @classmethod
    def trusted(
        cls,
        timestamp: TimeColumn,
        open: FloatColumn,
        high: FloatColumn,
        low: FloatColumn,
        close: FloatColumn,
        volume: FloatColumn,
    ) -> CandleSeries:
        """Take columns that are known to be of the right types and one length; they become read-only themselves.

        For reads of a strategy: the checks would cost more than the read.
        """
        series = object.__new__(cls)
        for column in (timestamp, open, high, low, close, volume):
            column.flags.writeable = False
        series.timestamp = timestamp
        series.open, series.high, series.low, series.close = open, high, low, close
        series.volume = volume
        return series

    @classmethod
    def empty(cls) -> CandleSeries:
        return cls((), (), (), (), (), ())

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[float]]) -> CandleSeries:
        """From rows of (timestamp, open, high, low, close, volume)."""
        columns = list(zip(*rows, strict=True))
        if columns and len(columns) != len(COLUMNS):
            raise BadCandles(f"a candle row has {len(columns)} fields: give {', '.join(COLUMNS)}")
        return cls(*columns) if columns else cls.empty()

    @classmethod
    def concat(cls, parts: Sequence[CandleSeries]) -> CandleSeries:
        """The parts one after the other; a single part is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls.empty()
        return cls.trusted(*(np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS))

    def columns(self) -> dict[str, TimeColumn | FloatColumn]:
        """The columns by name, in their fixed order."""
        return {name: getattr(self, name) for name in COLUMNS}

    def take(self, index: Any) -> CandleSeries:
        """The rows that a numpy index or mask selects."""
        return CandleSeries.trusted(*(getattr(self, name)[index] for name in COLUMNS))

    def between(self, start_ms: int, stop_ms: int) -> CandleSeries:
        """The rows that open in `[start_ms, stop_ms)`; the series must be sorted. No copy."""
        low, high = np.searchsorted(self.timestamp, (start_ms, stop_ms))
        return self[int(low) : int(high)]

    def __len__(self) -> int:
        return len(self.timestamp)

    def __getitem__(self, index: slice) -> CandleSeries:
        if not isinstance(index, slice):
            raise TypeError("index a CandleSeries with a slice, or one of its columns with a number")
        return self.take(index)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CandleSeries):
            return NotImplemented
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in COLUMNS)

    __hash__ = None  # type: ignore[assignment]  # compared by content, and columns have no stable hash

    def __repr__(self) -> str:
        if not len(self):
            return "CandleSeries(empty)"
        return f"CandleSeries({len(self)} candles, {self.timestamp[0]} .. {self.timestamp[-1]})"


def merge(stored: CandleSeries, offered: CandleSeries) -> tuple[CandleSeries, int]:
    """`stored` with the rows of `offered` that it lacks, ascending, and how many those were.

    The result shares no memory with `offered`: its caller may go on using the arrays.
    """
    if len(stored) and len(offered) and offered.timestamp.min() > stored.timestamp[-1]:
        new = offered  # the minute after, as a live run brings it
    else:
        new = offered.take(~np.isin(offered.timestamp, stored.timestamp))
    if not len(new):
        return stored, 0
    merged = CandleSeries.concat((stored, new))
    return merged.take(np.argsort(merged.timestamp, kind="stable")), len(new)
