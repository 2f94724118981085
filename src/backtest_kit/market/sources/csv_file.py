"""Candles from CSV files."""

from __future__ import annotations

import bz2
import csv as cells_of
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from backtest_kit import arrow
from backtest_kit.market.sources.base import CandleSource
from backtest_kit.market.sources.rows import number
from backtest_kit.market.sources.table import SYMBOL, Columns, Table, TableSource, bad_cell, find_columns
from backtest_kit.market.sources.times import time_of, times_of
from backtest_kit.model.candle import COLUMNS, NO_TIME

_KLINE_COLUMNS: Final = (
    *("open_time", "open", "high", "low", "close", "volume", "close_time", "quote_volume", "trades"),
    *("taker_base_volume", "taker_quote_volume", "ignore"),
)
"""The twelve columns of Binance's downloads, which have no header line."""

_OPENERS: Final[dict[str, Callable[[Path], Any]]] = {
    "": lambda path: path.open("rb"),
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": arrow.open_compressed,
}
_BATCH: Final = 16_384
"""Lines that are parsed together."""
_WIDTH: Final = 40
"""Letters of a time or a symbol; a batch with longer ones is parsed cell by cell."""
_LETTER: Final = 4
"""Bytes of a letter, at most."""


def csv(path: str | Path) -> CandleSource:
    """1m candles from a CSV file, compressed or not (`.gz`, `.bz2`, `.xz`; `.zst` with the extra `arrow`).

    Columns are found by their header, in any case and order: timestamp (or time, date, open_time ...),
    open, high, low, close, volume, or o, h, l, c, v. Timestamps are open times: ISO 8601, or epochs in
    s, ms, us or ns, recognized by its magnitude. Downloads of Binance need no header. With a `symbol`
    column the rows of the requested symbol are served; with `{symbol}` in the path (`data/{symbol}.csv.gz`)
    every symbol has a file of its own; otherwise the file serves any symbol.

    The file is read at the first request and kept. A file that cannot serve candles raises UserError.
    """
    return TableSource(path, _read_csv)


def _read_csv(path: Path) -> Table:
    try:
        with (
            _OPENERS.get(path.suffix, _OPENERS[""])(path) as stream,
            io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as lines,
        ):
            return _parse(path, lines)
    except (EOFError, zlib.error, lzma.LZMAError, cells_of.Error) as error:
        raise ValueError(str(error)) from error


def _parse(path: Path, lines: Iterator[str]) -> Table:
    line, first = next(((at, line) for at, line in enumerate(lines, 1) if not line.isspace()), (1, ""))
    header = _cells(first)
    if not any(np.isnan(number(cell)) for cell in header):
        if len(header) != len(_KLINE_COLUMNS):
            raise ValueError(f"it has no header line: begin it with {','.join(COLUMNS)}")
        header, lines = list(_KLINE_COLUMNS), chain((first,), lines)
    else:
        line += 1
    parser = _Parser(path, header)
    while batch := list(islice(lines, _BATCH)):
        parser.add(line, batch)
        line += len(batch)
    return parser.table()


class _Parser:
    """Takes the lines of a file batch by batch; only the columns of candles are kept of them."""

    def __init__(self, path: Path, header: Sequence[str]) -> None:
        self._path = path
        self._header = header
        self._places = find_columns(path, header)
        self._parts: list[Columns] = []
        self._complaint = ""

    def add(self, line: int, lines: list[str]) -> None:
        """Lines of which the first has the number `line`."""
        first = next((text for text in lines if not text.isspace()), None)
        if first is not None:
            self._parts.append(self._together(first, lines) or self._one_by_one(line, lines))

    def table(self) -> Table:
        return Table.of(self._path, self._parts, self._complaint)

    def _together(self, first: str, lines: list[str]) -> Columns | None:
        """Valid lines; None if one has an unreadable cell, or another number of cells than the header."""
        try:
            rows = np.loadtxt(lines, self._types(first), comments=None, delimiter=",", quotechar='"', ndmin=1)
        except ValueError:
            return None
        columns = {name: np.ascontiguousarray(rows[f"f{at}"]) for name, at in self._places.items()}
        texts = [
            column.view(np.uint8).reshape(len(rows), -1) for column in columns.values() if column.dtype.kind in "SU"
        ]
        if any(letters[:, -_LETTER:].any() for letters in texts):
            return None  # longer than its column
        columns["timestamp"] = times_of(columns["timestamp"])
        sound = all(np.isfinite(columns[name]).all() for name in COLUMNS[1:])
        return columns if sound and not (columns["timestamp"] == NO_TIME).any() else None

    def _types(self, line: str) -> Any:
        """Of each cell of a line; one that is not wanted can be any text."""
        types = ["U1"] * len(self._header)
        for name, at in self._places.items():
            types[at] = f"U{_WIDTH}" if name == SYMBOL else "f8"
        cells = _cells(line)
        at = self._places["timestamp"]
        if at < len(cells) and np.isnan(number(cells[at])):
            types[at] = f"S{_WIDTH}"
        return np.dtype([(f"f{at}", kind) for at, kind in enumerate(types)])

    def _one_by_one(self, line: int, lines: list[str]) -> Columns:
        rows = [self._row(at, text) for at, text in enumerate(lines, line) if not text.isspace()]
        columns = zip(*rows, strict=True)
        kinds = {"timestamp": np.int64, SYMBOL: np.str_}
        return {
            name: np.array(column, dtype=kinds.get(name, np.float64))
            for name, column in zip(self._places, columns, strict=True)
        }

    def _row(self, line: int, text: str) -> list[Any]:
        cells = _cells(text)
        if len(cells) != len(self._header):
            # No cell of it can be trusted: which one is missing is not known.
            found = f"{len(cells)} cell{'s' * (len(cells) != 1)} where the header has {len(self._header)}"
            self._complain(f"{self._path}, line {line}: {found} ({text.rstrip()!r:.80}): correct the line")
            return [{"timestamp": NO_TIME, SYMBOL: ""}.get(name, float("nan")) for name in self._places]
        return [self._value(line, name, cells[at]) for name, at in self._places.items()]

    def _value(self, line: int, name: str, cell: str) -> Any:
        if name == SYMBOL:
            return cell
        value = time_of(cell) if name == "timestamp" else number(cell)
        if value == NO_TIME or not np.isfinite(value):
            self._complain(
                bad_cell(self._path, f"line {line}", self._header[self._places[name]], cell, number=name != "timestamp")
            )
        return value

    def _complain(self, complaint: str) -> None:
        self._complaint = self._complaint or complaint


def _cells(line: str) -> list[str]:
    return next(cells_of.reader((line,)), [])
