"""Candles from CSV and Parquet files."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from backtest_kit.errors import UserError
from backtest_kit.market.integrity import check_order
from backtest_kit.market.sources.base import ANY_RANGE, CandleSource
from backtest_kit.market.sources.rows import epoch_ms, number
from backtest_kit.model.candle import COLUMNS, NO_TIME, CandleSeries, FloatColumn, TimeColumn
from backtest_kit.model.interval import MINUTE_MS, interval_ms

_ALIASES: Final = {
    "timestamp": ("timestamp", "time", "datetime", "date", "open_time", "opentime", "ts", "unix", "t"),
    "open": ("open", "o", "open_price"),
    "high": ("high", "h", "high_price"),
    "low": ("low", "l", "low_price"),
    "close": ("close", "c", "close_price"),
    "volume": ("volume", "vol", "v", "base_volume"),
}
"""Names of each column, the first one present is taken; compared in lower case with `_` for spaces."""

_KLINE_COLUMNS: Final = (
    *("open_time", "open", "high", "low", "close", "volume", "close_time", "quote_volume", "trades"),
    *("taker_base_volume", "taker_quote_volume", "ignore"),
)
"""The twelve columns of Binance's downloads, which have no header line."""

_EPOCH_UNITS: Final = (("s", 1e8, 1e11), ("ms", 1e11, 1e14), ("us", 1e14, 1e17), ("ns", 1e17, 1e19))
"""Magnitudes that tell the unit of an epoch: each begins in 1973, where the one below it reaches year 5138."""
_PER_SECOND: Final = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}

_Table = Any
"""A pyarrow.Table; pyarrow is imported when a file is read."""


def csv(path: str | Path) -> CandleSource:
    """1m candles from a CSV file, compressed or not (`.gz`, `.zst`, `.bz2`).

    Columns are found by their header, in any case and order: timestamp (or time, date, open_time ...),
    open, high, low, close, volume, or o, h, l, c, v. Timestamps are open times: ISO 8601, or epochs in
    s, ms, us or ns, each told by its magnitude. Downloads of Binance need no header. With a `symbol`
    column the rows of the asked symbol are served; with `{symbol}` in the path (`data/{symbol}.csv.gz`)
    every symbol has a file of its own; otherwise the file is that of whichever symbol is asked for.

    The file is read at the first request and kept. A file that cannot serve candles raises UserError.
    """
    return TableSource(path, _read_csv)


def parquet(path: str | Path) -> CandleSource:
    """1m candles from a Parquet file; columns as in `csv`."""
    return TableSource(path, _read_parquet)


class TableSource(CandleSource):
    cached = False
    page_limit = ANY_RANGE

    def __init__(self, path: str | Path, read: Callable[[Path], tuple[_Table, str, int]]) -> None:
        self._path = str(path)
        self._read = read
        self._files: dict[Path, _File] = {}
        # Of threads, since files are parsed in them: it makes one parse serve every concurrent request.
        self._lock = threading.Lock()

    async def fetch(self, symbol: str, interval: str, start_ms: int, stop_ms: int) -> CandleSeries:
        interval_ms(interval, ("1m",), what="interval of a candle file")
        return (await self._rows(symbol)).between(start_ms, stop_ms)

    async def verify(self, symbol: str) -> None:
        rows = await self._rows(symbol)
        file = self._files[self._path_of(symbol)]
        if file.complaint:
            raise UserError(f'{file.complaint}, or have bad rows repaired (dirty="repair")')
        check_order(rows.candles, what=str(file.path))

    async def range(self, symbol: str) -> tuple[int, int] | None:
        return (await self._rows(symbol)).range()

    async def _rows(self, symbol: str) -> _Rows:
        return await asyncio.to_thread(self._of_symbol, self._path_of(symbol), symbol)

    def _path_of(self, symbol: str) -> Path:
        return Path(self._path.replace("{symbol}", symbol))

    def _of_symbol(self, path: Path, symbol: str) -> _Rows:
        with self._lock:
            if path not in self._files:
                self._files[path] = _File(path, self._read)
            return self._files[path].rows(symbol)


class _Rows:
    """The rows of one symbol as the file has them."""

    def __init__(self, candles: CandleSeries) -> None:
        self.candles = candles
        # A row without a time belongs to where it stands.
        times = candles.timestamp
        self._times = np.where(times == NO_TIME, np.maximum.accumulate(times), times)
        self._ascending = bool((self._times[1:] >= self._times[:-1]).all())

    def between(self, start_ms: int, stop_ms: int) -> CandleSeries:
        if self._ascending:
            low, high = np.searchsorted(self._times, (start_ms, stop_ms))
            return self.candles[int(low) : int(high)]
        return self.candles.take((self._times >= start_ms) & (self._times < stop_ms))

    def range(self) -> tuple[int, int] | None:
        known = self._times[self._times != NO_TIME]
        return (int(known.min()), int(known.max()) + MINUTE_MS) if len(known) else None


class _File:
    """One parsed file: its rows, whole or by symbol.

    `complaint` names the first cell that cannot be read. It stands in the columns as NaN or NO_TIME.
    """

    def __init__(self, path: Path, read: Callable[[Path], tuple[_Table, str, int]]) -> None:
        self.path = path
        self.complaint = ""
        table, self._row_word, self._first_row = self._load(read)
        plain = [_plain(name) for name in table.column_names]
        twice = sorted({name for name in plain if plain.count(name) > 1})
        if twice:
            raise UserError(f"{path} has more than one column {', '.join(twice)}: keep one of each")
        found = dict(zip(plain, table.column_names, strict=True))
        names = self._column_names(table.column_names, found)
        if table.num_rows == 0:
            raise UserError(f"{path} has a header but no candle: give a file with rows")
        times = self._times(table[names["timestamp"]])
        self._series = CandleSeries(times, *(self._numbers(table[names[name]], names[name]) for name in COLUMNS[1:]))
        self._symbols: Any = np.asarray(table[found["symbol"]].to_pylist(), dtype=str) if "symbol" in found else None
        self._known: dict[str | None, _Rows] = {}

    def rows(self, symbol: str) -> _Rows:
        name = None if self._symbols is None else symbol
        if name not in self._known:
            series = self._series
            if name is not None:
                series = series.take(self._symbols == name)
                if not len(series):
                    known = ", ".join(np.unique(self._symbols).tolist()[:10])
                    raise UserError(f"{self.path} has no candle of {symbol}: its symbol column holds {known}")
            self._known[name] = _Rows(series)
        return self._known[name]

    def _load(self, read: Callable[[Path], tuple[_Table, str, int]]) -> tuple[_Table, str, int]:
        import pyarrow as pa

        path = self.path
        if path.is_dir():
            raise UserError(f"{path} is a directory: give the path of a candle file, or a pattern with {{symbol}}")
        try:
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty: give a file with candles")
            return read(path)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist (from {Path.cwd()}): correct the path of the candle file") from None
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{path} cannot be read as candles: {error!s:.300}") from error

    def _column_names(self, listed: Sequence[str], found: dict[str, str]) -> dict[str, str]:
        names = {column: found[alias] for column in COLUMNS for alias in reversed(_ALIASES[column]) if alias in found}
        missing = [column for column in COLUMNS if column not in names]
        if missing:
            shown = ", ".join(f"{name!r:.40}" for name in listed[:15])
            raise UserError(
                f"{self.path} lacks {', '.join(missing)}: a candle file needs the columns {', '.join(COLUMNS)} "
                f"(a header names them), and this one has {shown}"
            )
        return names

    def _numbers(self, column: Any, name: str) -> FloatColumn:
        import pyarrow as pa

        try:
            numbers: FloatColumn = column.cast(pa.float64(), safe=False).to_numpy()
        except pa.ArrowException:
            numbers = np.array([number(cell) for cell in column.to_pylist()])
        if not np.isfinite(numbers).all():
            self._complain(int(np.argmin(np.isfinite(numbers))), name, column, "give a finite number")
        return numbers

    def _times(self, column: Any) -> TimeColumn:
        import pyarrow as pa

        kind = column.type
        if pa.types.is_date(kind):
            column, kind = column.cast(pa.timestamp("s")), pa.timestamp("s")
        if pa.types.is_timestamp(kind):
            # Integers of the column's own unit; zone or none, Arrow counts them from the epoch in UTC.
            times = _to_ms(column.cast(pa.int64()).fill_null(0).to_numpy(), kind.unit)
            times = np.where(column.is_null().to_numpy(), NO_TIME, times)
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
            times = _epochs(column.fill_null(0).to_numpy())
        else:
            times = _times_of(column.to_pylist())
        unreadable = times == NO_TIME
        if unreadable.any():
            way_out = "write it as ISO 8601 or as an epoch in s, ms, us or ns"
            self._complain(int(np.argmax(unreadable)), "timestamp", column, way_out)
        if unreadable.all():
            raise UserError(self.complaint)
        return times

    def _complain(self, at: int, name: str, column: Any, way_out: str) -> None:
        cell = column[at].as_py()
        said = "is empty" if cell is None or cell == "" else f"is {cell!r:.60}"
        self.complaint = self.complaint or f"{self.path}, {self._row(at)}: {name!r} {said}: {way_out}"

    def _row(self, at: int) -> str:
        return f"{self._row_word} {at + self._first_row}"


def _epochs(values: Any) -> TimeColumn:
    """Epochs in ms, the unit of each told by its size: files of one market are joined that count in different ones."""
    times = np.full(len(values), NO_TIME, dtype=np.int64)
    for unit, least, most in _EPOCH_UNITS:
        rows = (values >= least) & (values < most)
        times[rows] = _to_ms(values[rows], unit)
    return times


def _to_ms(values: Any, unit: str) -> TimeColumn:
    """Parts of a millisecond are moved up, so that nothing is known too early."""
    per_second = _PER_SECOND[unit]
    if values.dtype.kind == "f":
        # A float has no more than its microseconds right.
        return epoch_ms(np.round(values * (1000 / per_second), 3))
    whole: TimeColumn = values.astype(np.int64)
    return whole * (1000 // per_second) if per_second <= 1000 else -(-whole // (per_second // 1000))


def _times_of(texts: Sequence[Any]) -> TimeColumn:
    numbers = np.array([number(text) for text in texts])
    times = _epochs(numbers)
    for at in np.flatnonzero(np.isnan(numbers)).tolist():
        times[at] = _iso_ms(texts[at])
    return times


def _iso_ms(text: Any) -> int:
    try:
        moment = datetime.fromisoformat(str(text).strip())
    except ValueError:
        return NO_TIME
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def _read_csv(path: Path) -> tuple[_Table, str, int]:
    """The table, what its rows are called in messages, and the number of the first."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    with pa.input_stream(str(path), compression="detect") as stream:
        first = stream.read(4096).split(b"\n", 1)[0].decode("utf-8-sig").strip()
    cells = first.split(",")
    headless = not any(math.isnan(number(cell)) for cell in cells)
    if headless and len(cells) != len(_KLINE_COLUMNS):
        raise ValueError(f"it has no header line: begin it with {','.join(COLUMNS)}")
    options = arrow_csv.ReadOptions(column_names=_KLINE_COLUMNS if headless else None)
    return arrow_csv.read_csv(str(path), read_options=options), "line", 1 if headless else 2


def _read_parquet(path: Path) -> tuple[_Table, str, int]:
    from pyarrow import parquet as arrow_parquet

    return arrow_parquet.read_table(str(path)), "row", 1


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_")
