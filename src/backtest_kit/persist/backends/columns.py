"""The bytes of a candle month: a header, a checksum, and flat numpy columns.

    offset 0    8 bytes   magic, `BKCANDLE`
    offset 8    4 bytes   CRC-32 of every byte that follows it
    offset 12   4 bytes   length of the header
    offset 16             header: JSON, padded with spaces so that the columns begin at a multiple of 64
                          columns: one after the other, 8 bytes a row, little-endian

Numbers are little-endian. The header has the contract, the series, the schema version, the number of rows, and of each
column its name and numpy type, so that any program maps a column into memory with one call.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, Final

import msgspec
import numpy as np

from backtest_kit.errors import Damaged
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.persist.codec import SCHEMA_VERSION, NewerSchema
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import SeriesKey

CONTRACT: Final = CONTRACTS["candle"]
SUFFIX: Final = ".candles"

_MAGIC: Final = b"BKCANDLE"
_START: Final = struct.Struct("<8sII")
_CHECKED_FROM: Final = 12
_ALIGNMENT: Final = 64
_TYPES: Final = tuple((name, "<i8" if name == "timestamp" else "<f8") for name in COLUMNS)


class _Header(msgspec.Struct, frozen=True, rename="camel"):
    contract: str
    series: tuple[str, str, str]
    """Exchange, symbol, interval."""
    schema_version: int
    rows: int
    columns: tuple[tuple[str, str], ...]


def pack(series: SeriesKey, candles: CandleSeries) -> bytes:
    """The bytes of a file of these candles."""
    key = (series.exchange_name, series.symbol, series.interval)
    header = msgspec.json.encode(_Header(CONTRACT.name, key, SCHEMA_VERSION, len(candles), _TYPES))
    header += b" " * (-(_START.size + len(header)) % _ALIGNMENT)
    columns = (np.ascontiguousarray(getattr(candles, name), dtype=kind).data for name, kind in _TYPES)
    parts: list[bytes | memoryview] = [struct.pack("<I", len(header)), header, *columns]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join((_MAGIC, struct.pack("<I", checksum), *parts))


def verify(data: Any) -> None:
    """Do nothing if the bytes of a candle file are those that were written.

    Raises:
        Damaged: they are not.
    """
    _header_of(data)


def unpack(series: SeriesKey, data: Any) -> CandleSeries:
    """The candles in the bytes of a file; the columns are views of `data`.

    Raises:
        Damaged: the bytes are not those that were written, or belong to another series.
        NewerSchema: a newer version of this program wrote them.
    """
    header, offset = _header_of(data)
    if header.schema_version > SCHEMA_VERSION:
        raise NewerSchema(
            f"it was written by a newer version of this program (schema {header.schema_version}, "
            f"this one reads up to {SCHEMA_VERSION}): upgrade, the file is untouched"
        )
    if (header.contract, *header.series) != (CONTRACT.name, series.exchange_name, series.symbol, series.interval):
        found = "/".join((header.contract, *header.series))
        raise Damaged(f"it has {found}, found where candles of {series} belong")
    if header.columns != _TYPES or len(data) != offset + 8 * header.rows * len(_TYPES):
        raise Damaged("its columns are not those of candles")
    return CandleSeries(
        *(
            np.frombuffer(data, dtype=kind, count=header.rows, offset=offset + 8 * header.rows * at)
            for at, (_, kind) in enumerate(_TYPES)
        )
    )


def series_in(data: bytes) -> SeriesKey:
    """The series that a candle file belongs to. Raises as `verify`."""
    return SeriesKey(*_header_of(data)[0].series)


def _header_of(data: Any) -> tuple[_Header, int]:
    """The header of bytes whose checksum is right, and where the columns begin."""
    if len(data) < _START.size:
        raise Damaged("it is not a candle file of this program, or it was cut")
    magic, checksum, length = _START.unpack_from(data)
    if magic != _MAGIC:
        raise Damaged("it is not a candle file of this program, or its beginning was changed on the disk")
    with memoryview(data) as view:
        if zlib.crc32(view[_CHECKED_FROM:]) != checksum:
            raise Damaged("the checksum does not match: the file was cut or changed on the disk")
        offset = _START.size + length
        try:
            return msgspec.json.decode(bytes(view[_START.size : offset]), type=_Header), offset
        except msgspec.MsgspecError as error:
            raise Damaged(f"its header cannot be read: {error}") from None
