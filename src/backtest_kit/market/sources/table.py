"""Candles from files that are tables: found by name, parsed once, served by range."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from backtest_kit.errors import UserError
from backtest_kit.market.integrity import check_order
from backtest_kit.market.sources.base import ANY_RANGE, CandleSource
from backtest_kit.model.candle import COLUMNS, NO_TIME, CandleSeries
from backtest_kit.model.interval import MINUTE_MS, interval_ms

SYMBOL: Final = "symbol"
"""The column that some files have next to those of candles."""
_ALIASES: Final = {
    "timestamp": ("timestamp", "time", "datetime", "date", "open_time", "opentime", "ts", "unix", "t"),
    "open": ("open", "o", "open_price"),
    "high": ("high", "h", "high_price"),
    "low": ("low", "l", "low_price"),
    "close": ("close", "c", "close_price"),
    "volume": ("volume", "vol", "v", "base_volume"),
}
"""Names of each column, the first one present is taken; compared in lower case with `_` for spaces."""

Columns: TypeAlias = Mapping[str, Any]
"""Numpy columns of a part of a file: those of candles, and `SYMBOL` if there is one."""


class Table(NamedTuple):
    """The rows of a file in its order. A cell that cannot be read is NaN, or NO_TIME."""

    candles: CandleSeries
    symbols: Any
    """The symbol of each row; None if the file has no such column."""
    complaint: str
    """The first cell that cannot be read, in words."""

    @classmethod
    def of(cls, path: Path, parts: Sequence[Columns], complaint: str) -> Table:
        """Put the parts of a file together.

        Raises:
            UserError: there is no row, or no time can be read.
        """
        if not parts:
            raise UserError(f"{path} has a header but no candle: give a file with rows")
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if (whole["timestamp"] == NO_TIME).all():
            raise UserError(complaint)
        symbols = whole.pop(SYMBOL, None)
        return cls(CandleSeries(**whole), symbols, complaint)


def find_columns(path: Path, listed: Sequence[str]) -> dict[str, int]:
    """Where each column of candles stands among those of a file, and that of symbols if there is one.

    Raises:
        UserError: one is missing, or stands there twice.
    """
    plain = [name.strip().lower().replace(" ", "_") for name in listed]
    twice = sorted({name for name in plain if plain.count(name) > 1})
    if twice:
        raise UserError(f"{path} has more than one column {', '.join(twice)}: keep one of each")
    aliases = {**_ALIASES, SYMBOL: (SYMBOL,)}
    found = {name: plain.index(alias) for name in aliases for alias in reversed(aliases[name]) if alias in plain}
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        shown = ", ".join(f"{name!r:.40}" for name in listed[:15])
        raise UserError(
            f"{path} lacks {', '.join(missing)}: a candle file needs the columns {', '.join(COLUMNS)} "
            f"(a header names them), and this one has {shown}"
        )
    return found


def bad_cell(path: Path, row: str, name: str, cell: Any, *, number: bool) -> str:
    """What is wrong with a cell that has no number, or no time, and the way out."""
    plain = cell.item() if isinstance(cell, np.generic) else cell
    said = "is empty" if plain is None or plain == "" else f"is {plain!r:.60}"
    way_out = "give a finite number" if number else "write it as ISO 8601 or as an epoch in s, ms, us or ns"
    return f"{path}, {row}: {name!r} {said}: {way_out}"


class TableSource(CandleSource):
    """Serves the table that `read` returns. `read` raises UserError, or OSError and ValueError for a wrong file."""

    cached = False
    page_limit = ANY_RANGE

    def __init__(self, path: str | Path, read: Callable[[Path], Table]) -> None:
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
        # A row without a time keeps its place.
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
    """One parsed file: its rows, whole or by symbol."""

    def __init__(self, path: Path, read: Callable[[Path], Table]) -> None:
        self.path = path
        self._table = self._load(read)
        self.complaint = self._table.complaint
        self._known: dict[str | None, _Rows] = {}

    def rows(self, symbol: str) -> _Rows:
        name = None if self._table.symbols is None else symbol
        if name not in self._known:
            candles, symbols, _ = self._table
            if name is not None:
                candles = candles.take(symbols == name)
                if not len(candles):
                    known = ", ".join(np.unique(symbols).tolist()[:10])
                    raise UserError(f"{self.path} has no candle of {symbol}: its symbol column holds {known}")
            self._known[name] = _Rows(candles)
        return self._known[name]

    def _load(self, read: Callable[[Path], Table]) -> Table:
        path = self.path
        if path.is_dir():
            raise UserError(f"{path} is a directory: give the path of a candle file, or a pattern with {{symbol}}")
        try:
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty: give a file with candles")
            return read(path)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist (from {Path.cwd()}): correct the path of the candle file") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as candles: {error!s:.300}") from error
