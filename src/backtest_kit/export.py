"""Columns as a file of a format that other programs read, named by its suffix."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from backtest_kit import arrow
from backtest_kit.errors import UserError
from backtest_kit.persist.atomic import write_atomic

CSV: Final = ".csv"


def export(path: str | Path, columns: Mapping[str, Any]) -> Path:
    """Write columns, numpy arrays or lists, and return the path. Times are UTC. Blocks on the disk.

    Raises:
        UserError: the suffix names no known format, or pyarrow, which all formats but CSV need, is not installed.
        OutOfSpace, RetryLater: the file could not be written; an existing file is unchanged.
    """
    path = Path(path)
    if path.suffix == CSV:
        data = _csv(columns)
    elif path.suffix in arrow.SUFFIXES:
        data = arrow.dump_table(columns, path.suffix)
    else:
        raise UserError(f"{path} has the suffix {path.suffix!r}: use one of {', '.join((CSV, *arrow.SUFFIXES))}")
    write_atomic(path, data)
    return path


def _csv(columns: Mapping[str, Any]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*map(_cells, columns.values()), strict=True))
    return text.getvalue().encode()


def _cells(values: Any) -> Any:
    if not isinstance(values, np.ndarray):
        return values
    return np.datetime_as_string(values, timezone="UTC") if values.dtype.kind == "M" else values.tolist()
