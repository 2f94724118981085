"""Results as one JSON file with its format and a checksum, to be shown again without replaying."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from backtest_kit.errors import Damaged, RetryLater, UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.codec import decode, dump_value, encode, parse
from backtest_kit.report.values import ResultValues

FORMAT: Final = "backtest-kit results"
VERSION: Final = 1


R = TypeVar("R", bound=ResultValues)


class _File(msgspec.Struct, rename="camel"):
    format: str
    version: int
    crc32: str
    results: msgspec.Raw


def dump_results(results: Sequence[ResultValues]) -> bytes:
    """`{"format", "version", "crc32", "results"}` on one line; the checksum is of the text of `results`.

    Names are camelCase, times epoch milliseconds, charts columns. The path of reports is left out: it belongs to the
    machine, not to the result.

    Raises:
        UserError: a name or a note is not valid text.
    """
    plain = msgspec.to_builtins(list(results), enc_hook=_to_builtins)
    for result in plain:
        del result["reportPath"]
    body = dump_value(encode(plain, "results"))
    return msgspec.json.encode(_File(FORMAT, VERSION, _checksum(body), msgspec.Raw(body))) + b"\n"


def load_results(path: Path, kind: type[R]) -> list[R]:
    """Read what `dump_results` wrote to `path`; reports of it are saved next to the file. Blocks on the disk.

    Raises:
        UserError: the file does not exist, or has no results.
        Damaged: the file was cut, changed, or is of a newer version. It stays as it is.
        RetryLater: it could not be read.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(
            f"{path} is not a file: give one that Results.save or `backtest-kit backtest` wrote, such as trend.json"
        ) from None
    except OSError as error:
        raise RetryLater(f"{path} could not be read: {error.strerror or error}") from error
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if FORMAT.encode() in data[:100]:
            raise Damaged(f"{path} is truncated or changed: {error}. Run the backtest again") from None
        raise UserError(f"{path} does not hold results of a backtest: {error}") from None
    if file.format != FORMAT:
        raise UserError(f"{path} holds {file.format!r:.60}, not {FORMAT!r}")
    if file.version != VERSION:
        raise Damaged(f"{path} is of version {file.version}, this program reads {VERSION}: use a newer backtest-kit")
    body = bytes(file.results)
    if file.crc32 != _checksum(body):
        raise Damaged(f"{path} was changed on the disk or edited by hand: its checksum does not match its results")
    try:
        plain = [{**result, "reportPath": path.parent} for result in decode(parse(body))]
        return [msgspec.convert(each, kind, dec_hook=_from_builtins) for each in plain]
    except (msgspec.ValidationError, TypeError) as error:
        raise Damaged(f"{path} holds results that this version cannot read: {error}") from None


def _checksum(body: bytes) -> str:
    return f"{zlib.crc32(body):08x}"


def _to_builtins(value: Any) -> Any:
    if isinstance(value, CandleSeries):
        return {name: column.tolist() for name, column in value.columns().items()}
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"a {type(value).__name__} in a result")


def _from_builtins(kind: type, value: Any) -> Any:
    if kind is CandleSeries:
        return CandleSeries(**value)
    if kind is Path:
        return value
    raise NotImplementedError(f"a {kind.__name__} in a result")
