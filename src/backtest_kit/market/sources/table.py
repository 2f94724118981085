"""Candles from CSV and Parquet files."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from backtest_kit.errors import UserError
from backtest_kit.market.integrity import check_order
from backtest_kit.market.sources.base import ANY_RANGE, CandleSource
from backtest_kit.model.candle import COLUMNS, CandleSeries, FloatColumn, TimeColumn
from backtest_kit.model.interval import INTERVAL_MS, MINUTE_MS, interval_ms

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
    s, ms, us or ns, told apart by their magnitude. Downloads of Binance need no header. With a `symbol`
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
        return (await self._candles(symbol)).between(start_ms, stop_ms)

    async def range(self, symbol: str) -> tuple[int, int]:
        times = (await self._candles(symbol)).timestamp
        return int(times[0]), int(times[-1]) + MINUTE_MS

    async def _candles(self, symbol: str) -> CandleSeries:
        path = Path(self._path.replace("{symbol}", symbol))
        return await asyncio.to_thread(self._of_symbol, path, symbol)

    def _of_symbol(self, path: Path, symbol: str) -> CandleSeries:
        with self._lock:
            if path not in self._files:
                self._files[path] = _File(path, self._read)
            return self._files[path].candles(symbol)


class _File:
    """One parsed file: its candles, whole or by symbol."""

    def __init__(self, path: Path, read: Callable[[Path], tuple[_Table, str, int]]) -> None:
        self._path = path
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
        self._checked: dict[str | None, CandleSeries] = {}

    def candles(self, symbol: str) -> CandleSeries:
        name = None if self._symbols is None else symbol
        if name not in self._checked:
            series = self._series
            if name is not None:
                series = series.take(self._symbols == name)
                if not len(series):
                    known = ", ".join(np.unique(self._symbols).tolist()[:10])
                    raise UserError(f"{self._path} has no candle of {symbol}: its symbol column holds {known}")
            check_order(series, what=str(self._path))
            self._check_spacing(series)
            self._checked[name] = series
        return self._checked[name]

    def _load(self, read: Callable[[Path], tuple[_Table, str, int]]) -> tuple[_Table, str, int]:
        import pyarrow as pa

        path = self._path
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
                f"{self._path} lacks {', '.join(missing)}: a candle file needs the columns {', '.join(COLUMNS)} "
                f"(a header names them), and this one has {shown}"
            )
        return names

    def _check_spacing(self, series: CandleSeries) -> None:
        """Say plainly that a file of longer candles is one, before all its minutes count as missing."""
        if len(series) < 3:
            return
        spacing = np.diff(series.timestamp)
        step_ms = int(spacing.min())
        name = next((name for name, length in INTERVAL_MS.items() if length == step_ms), None)
        if name not in (None, "1m") and not (spacing % step_ms).any():
            raise UserError(f"{self._path} holds {name} candles: give 1m candles, longer ones are made from them")

    def _numbers(self, column: Any, name: str) -> FloatColumn:
        import pyarrow as pa
        import pyarrow.compute as pc

        if column.null_count:
            at = pc.index(column.is_null(), True).as_py()
            raise UserError(f"{self._path}, {self._row(at)}: {name!r} is empty: give a number, or drop the row")
        try:
            numbers: FloatColumn = column.cast(pa.float64(), safe=False).to_numpy()
        except pa.ArrowException:
            texts = column.to_pylist()
            at = _first_odd(texts)
            raise UserError(f"{self._path}, {self._row(at)}: {name!r} is {texts[at]!r:.60}: give a number") from None
        return numbers

    def _times(self, column: Any) -> TimeColumn:
        import pyarrow as pa

        kind = column.type
        if column.null_count:
            at = column.is_null().to_pylist().index(True)
            raise UserError(f"{self._path}, {self._row(at)}: the timestamp is empty: give one, or drop the row")
        if pa.types.is_date(kind):
            column, kind = column.cast(pa.timestamp("s")), pa.timestamp("s")
        if pa.types.is_timestamp(kind):
            # Integers of the column's own unit; zone or none, Arrow counts them from the epoch in UTC.
            return self._to_ms(column.cast(pa.int64()).to_numpy(), kind.unit)
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            values = column.to_numpy()
            return self._to_ms(values, self._epoch_unit(values))
        texts = column.to_pylist()
        if _is_number(texts[0]):
            # Either every text is an epoch, or one that is none made texts of them all: name that one.
            return self._times(pa.chunked_array([self._numbers(column, "timestamp")]))
        return np.array([self._parse_time(at, text) for at, text in enumerate(texts)], dtype=np.int64)

    def _epoch_unit(self, values: Any) -> str:
        low, high = values.min(), values.max()
        for unit, least, most in _EPOCH_UNITS:
            if least <= low and high < most:
                return unit
        raise UserError(
            f"{self._path}: timestamps from {low} to {high} are not epochs of one unit (s, ms, us or ns): "
            f"write them all as epoch milliseconds or ISO 8601"
        )

    def _to_ms(self, values: Any, unit: str) -> TimeColumn:
        per_second = _PER_SECOND[unit]
        if values.dtype.kind == "f":
            milliseconds: TimeColumn = np.rint(values * (1000 / per_second)).astype(np.int64)
            return milliseconds
        whole: TimeColumn = values.astype(np.int64)
        if per_second <= 1000:
            return whole * (1000 // per_second)
        per_ms = per_second // 1000
        rest = whole % per_ms
        if rest.any():
            at = int(np.argmax(rest != 0))
            raise UserError(f"{self._path}, {self._row(at)}: timestamp {whole[at]} ({unit}) is no whole millisecond")
        return whole // per_ms

    def _parse_time(self, at: int, text: Any) -> int:
        try:
            moment = datetime.fromisoformat(str(text).strip())
        except ValueError:
            raise UserError(
                f"{self._path}, {self._row(at)}: the timestamp is {text!r:.60}: write it as ISO 8601 or as an epoch"
            ) from None
        return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)

    def _row(self, at: int) -> str:
        return f"{self._row_word} {at + self._first_row}"


def _read_csv(path: Path) -> tuple[_Table, str, int]:
    """The table, what its rows are called in messages, and the number of the first."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    with pa.input_stream(str(path), compression="detect") as stream:
        first = stream.read(4096).split(b"\n", 1)[0].decode("utf-8-sig").strip()
    cells = first.split(",")
    headless = all(map(_is_number, cells))
    if headless and len(cells) != len(_KLINE_COLUMNS):
        raise ValueError(f"it has no header line: begin it with {','.join(COLUMNS)}")
    options = arrow_csv.ReadOptions(column_names=_KLINE_COLUMNS if headless else None)
    return arrow_csv.read_csv(str(path), read_options=options), "line", 1 if headless else 2


def _read_parquet(path: Path) -> tuple[_Table, str, int]:
    from pyarrow import parquet as arrow_parquet

    return arrow_parquet.read_table(str(path)), "row", 1


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_")


def _first_odd(texts: Sequence[Any]) -> int:
    return next((at for at, text in enumerate(texts) if not _is_number(text)), 0)


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return True
