"""Parquet, Feather and Arrow IPC files. The pyarrow library is imported here and nowhere else, on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from backtest_kit.errors import UserError

PARQUET: Final = ".parquet"
IPC_FILES: Final = (".arrow", ".feather")
"""An Arrow IPC file under either of its names."""
IPC_STREAM: Final = ".arrows"
SUFFIXES: Final = (PARQUET, *IPC_FILES, IPC_STREAM)


def library(use: str) -> Any:
    """`pyarrow`. `use` says what it is needed for.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{use} needs pyarrow: pip install 'backtest-kit[arrow]'") from None
    return pyarrow


def read_table(path: Path) -> list[tuple[str, Any]]:
    """The name and the values of each column: numbers and times as numpy arrays, anything else as a list.

    A missing number is NaN, a missing time NaT. Times are UTC in the unit of the file.

    Raises:
        UserError: pyarrow is not installed.
        ValueError: the file is not what its suffix says; any but those of Arrow IPC counts as Parquet.
    """
    arrow = library(path.name)
    try:
        table = _reader(path.suffix)(path)
        return [(name, _values(arrow, table.column(at))) for at, name in enumerate(table.column_names)]
    except arrow.ArrowException as error:
        raise ValueError(str(error)) from error


def dump_table(columns: Mapping[str, Any], suffix: str) -> bytes:
    """The bytes of a file of columns, numpy arrays or lists, in the format that `suffix` names. Times are UTC.

    Raises:
        UserError: pyarrow is not installed.
    """
    arrow = library(f"writing a {suffix} file")
    table = arrow.table({name: _column(arrow, values) for name, values in columns.items()})
    sink = arrow.BufferOutputStream()
    if suffix == PARQUET:
        from pyarrow import parquet

        parquet.write_table(table, sink)
    else:
        new = arrow.ipc.new_stream if suffix == IPC_STREAM else arrow.ipc.new_file
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    return bytes(sink.getvalue())


def open_compressed(path: Path) -> Any:
    """A stream of the bytes of a file that Zstandard compressed.

    Raises:
        UserError: pyarrow is not installed.
    """
    return library(path.name).input_stream(str(path), compression="zstd")


def _reader(suffix: str) -> Callable[[Path], Any]:
    from pyarrow import ipc, parquet

    def read_file(path: Path) -> Any:
        with ipc.open_file(str(path)) as reader:
            return reader.read_all()

    def read_stream(path: Path) -> Any:
        with path.open("rb") as file, ipc.open_stream(file) as reader:
            return reader.read_all()

    if suffix in IPC_FILES:
        return read_file
    return read_stream if suffix == IPC_STREAM else lambda path: parquet.read_table(str(path))


def _values(arrow: Any, column: Any) -> Any:
    types, kind = arrow.types, column.type
    if types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if types.is_date(kind):
        column, kind = column.cast(arrow.timestamp("s")), arrow.timestamp("s")
    if types.is_timestamp(kind):
        # By their integers: with a zone or without one, Arrow counts them from the epoch in UTC.
        times = column.cast(arrow.int64()).fill_null(0).to_numpy().astype(f"datetime64[{kind.unit}]")
        times[column.is_null().to_numpy()] = np.datetime64("NaT")
        return times
    if types.is_decimal(kind) or (types.is_integer(kind) and column.null_count):
        column, kind = column.cast(arrow.float64(), safe=False), arrow.float64()
    if types.is_floating(kind):
        return column.cast(arrow.float64()).fill_null(float("nan")).to_numpy()
    return column.to_numpy() if types.is_integer(kind) else column.to_pylist()


def _column(arrow: Any, values: Any) -> Any:
    is_time = isinstance(values, np.ndarray) and values.dtype.kind == "M"
    return arrow.array(values, arrow.timestamp("ms", "UTC") if is_time else None)
