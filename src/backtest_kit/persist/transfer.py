"""A store as one neutral file, and back: the way between any two backends.

The file has a JSON object per line: a head, everything in the order of `persist.walk`, candles as columns,
and a foot that counts them. Each line but the foot ends with `"digest"`, the SHA-256 of the
line up to the comma before it. Values stand there as backends have them (see `persist.codec`).

What is imported has revisions and wall-clock times of its new store; keys, values, simulation times,
removals and the order of writing are those of the old one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
import numpy as np

from backtest_kit.errors import BacktestKitError, Damaged, UserError
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.persist import walk
from backtest_kit.persist.codec import dump_value, parse
from backtest_kit.persist.contracts import MOVED, Durability, Kind
from backtest_kit.persist.files import Disk
from backtest_kit.persist.keys import check_key
from backtest_kit.persist.operations import text_of
from backtest_kit.persist.store import ABSENT, ANY, Capability, Expect, Record, SeriesKey, Store, Write
from backtest_kit.persist.store_id import adopt_store_id, read_store_id

FORMAT: Final = "backtest-kit store"
VERSION: Final = 1

_DIGEST: Final = b',"digest":"'
_CANDLES_PER_LINE: Final = 10_000
_CHUNK: Final = 500
_MOST_PROBLEMS: Final = 20


class _Head(msgspec.Struct, rename="camel"):
    store_id: str = ""
    """Of the store that was exported; empty where it had not traded live."""


class Counts(msgspec.Struct, frozen=True):
    """What was written, to a file or to a store."""

    records: int
    candles: int
    present: int = 0
    """Of an import: records that were there already, and are the same."""


class _Line(msgspec.Struct, rename="camel"):
    namespace: tuple[str, ...]
    contract: str
    key: list[str | int | bool]
    when: int | None = None
    removed: bool = False
    value: Any = None
    columns: dict[str, list[float]] | None = None


async def export_store(store: Store, file: str | os.PathLike[str], *, candles: bool = True) -> Counts:
    """Write every record, in every namespace, and every candle of `store` to `file`. Leases are left out.

    The file is complete or not there.

    Raises:
        UserError: `file` exists already or cannot be written, or the store cannot list what it has.
        Damaged, RetryLater: as `Store.scan`; `check` lists everything that is damaged.
    """
    target = Path(file)
    if await asyncio.to_thread(target.exists):
        raise UserError(f"{target} exists already: give the export another name, or remove it")
    part = target.with_name(f".tmp-{secrets.token_hex(6)}-{target.name}")
    records = rows = 0
    try:
        output = await asyncio.to_thread(part.open, "xb")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
    try:
        own = await read_store_id(store)
        lines = [_seal({"format": FORMAT, "version": VERSION} | ({"storeId": own.id} if own else {}))]
        async for fields, count in _everything(store, candles):
            lines.append(_seal(fields))
            records += not count
            rows += count
            if len(lines) >= _CHUNK or count:
                await asyncio.to_thread(output.writelines, lines)
                lines = []
        lines.append(dump_value({"end": True, "records": records, "candles": rows}) + b"\n")
        await asyncio.to_thread(_finish, output, lines, part, target)
    finally:
        output.close()
        part.unlink(missing_ok=True)
    return Counts(records, rows)


async def import_store(store: Store, file: str | os.PathLike[str]) -> Counts:
    """Write everything that `export_store` put into `file` to `store`.

    The whole file is verified first, and compared with what the store has: a record that is there with
    the same content is passed over, so an import that was interrupted is simply done again.

    Raises:
        UserError: the file is not a complete export, lines are damaged, or records are there with another
            content. The message names the lines; nothing was written.
        Conflict, OutOfSpace, RetryLater: as `Store.put`; the message says how far the import came.
    """
    source = Path(file)
    problems: list[str] = []
    foot: dict[str, Any] | None = None
    head, foreign = _Head(), False
    records = rows = 0
    async with aclosing(_lines(source, problems)) as lines:
        async for number, line in lines:
            if isinstance(line, dict):
                foot = line
                continue
            if isinstance(line, _Head):
                head = line
                continue
            foreign = foreign or (_holds_money(line) and await _is_of_other_store(store, head))
            records += line.columns is None
            rows += 0 if line.columns is None else len(line.columns["timestamp"])
            if await _is_other(store, line):
                problems.append(f"line {number}: {_name(line)} is there with another content")
            if len(problems) > _MOST_PROBLEMS:
                break
    if foot != {"end": True, "records": records, "candles": rows} and not problems:
        problems.append(f"it ends after {records} records and {rows} candles, and no foot says so: it was cut")
    if foreign:
        problems.append(
            f"it has positions of store {head.store_id}, and the target trades live under an id of its own, so that "
            "it would not know their orders on the exchange: import it into an empty store"
        )
    if problems:
        listed = "; ".join(problems[:_MOST_PROBLEMS]) + ("; and more" if len(problems) > _MOST_PROBLEMS else "")
        raise UserError(f"{source} was not imported, nothing was written: {listed}")
    return await _write_all(store, source)


async def _everything(store: Store, candles: bool) -> AsyncIterator[tuple[dict[str, Any], int]]:
    """The fields of every line, and how many candles are in it."""
    for part in await walk.parts(store, candles=candles):
        head: dict[str, Any] = {"namespace": list(part.namespace), "contract": part.contract}
        if part.series is None:
            async for record in walk.records(store, part):
                yield head | _fields(record), 0
            continue
        head["key"] = list(msgspec.structs.astuple(part.series))
        async for found in walk.candles(store, part):
            for start in range(0, len(found), _CANDLES_PER_LINE):
                line = found[start : start + _CANDLES_PER_LINE]
                columns = {name: column.tolist() for name, column in line.columns().items()}
                yield head | {"columns": columns}, len(line)


def _fields(record: Record) -> dict[str, Any]:
    return {
        "key": list(record.key),
        "when": record.when,
        "removed": record.removed,
        "value": record.value,
    }


def _seal(fields: dict[str, Any]) -> bytes:
    body = dump_value(fields)[:-1]
    return body + _DIGEST + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def _finish(output: BinaryIO, lines: list[bytes], part: Path, target: Path) -> None:
    output.writelines(lines)
    output.flush()
    os.fsync(output.fileno())
    disk = Disk()
    disk.rename(str(part), str(target))
    disk.sync_directory(str(target.parent))


async def _lines(source: Path, problems: list[str]) -> AsyncGenerator[tuple[int, _Head | _Line | dict[str, Any]]]:
    """Every sound line with its number, and the foot as a dict. The others go into `problems`."""
    try:
        file = await asyncio.to_thread(source.open, "rb")
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error
    try:
        number = 0
        while chunk := await asyncio.to_thread(lambda: list(islice(file, _CHUNK))):
            for data in chunk:
                number += 1
                try:
                    line = _open(number, data)
                except BacktestKitError as error:
                    problems.append(f"line {number}: {error}")
                    continue
                yield number, line
    finally:
        file.close()


def _open(number: int, data: bytes) -> _Head | _Line | dict[str, Any]:
    """One line, checked."""
    body, mark, digest = data.rpartition(_DIGEST)
    if not mark:
        foot = parse(data)
        if isinstance(foot, dict) and foot.get("end") is True:
            return foot
        raise Damaged("it has no digest")
    if digest != hashlib.sha256(body).hexdigest().encode() + b'"}\n':
        raise Damaged("its digest does not match: it was changed or cut")
    fields = parse(body + b"}")
    if number == 1:
        if fields.get("format") != FORMAT:
            raise Damaged("this is no export of a store")
        if fields.get("version", VERSION + 1) > VERSION:
            raise Damaged(
                f"it was written by a newer version of this program (format {fields.get('version')}): upgrade"
            )
        return msgspec.convert(fields, _Head)
    try:
        line = msgspec.convert(fields, _Line)
    except msgspec.ValidationError as error:
        raise Damaged(f"it is no record: {error}") from None
    row = MOVED.get(line.contract)
    if row is None:
        raise Damaged(f"no contract of this version is called {line.contract!r}")
    check_key(row, line.key, prefix=row.kind is Kind.SERIES)
    if row.kind is Kind.SERIES and (line.columns is None or tuple(line.columns) != COLUMNS):
        raise Damaged(f"its columns are not {', '.join(COLUMNS)}")
    return line


async def _write_all(store: Store, source: Path) -> Counts:
    records = rows = present = size = 0
    waiting: list[Write] = []
    space = store
    try:
        async for _, line in _lines(source, []):
            if isinstance(line, dict):
                continue
            if isinstance(line, _Head):
                if line.store_id:
                    await adopt_store_id(store, line.store_id)
                continue
            here, weight = walk.space_of(store, line.namespace), len(dump_value(line.value))
            is_full = len(waiting) >= walk.BATCH_RECORDS or size + weight > walk.BATCH_BYTES
            if waiting and (here is not space or is_full or line.columns is not None):
                await walk.put_all(space, waiting)
                records, size, waiting = records + len(waiting), 0, []
            space = here
            if line.columns is not None:
                rows += await here.candles.write(_series(line), CandleSeries(*line.columns.values()))
                continue
            row, key = MOVED[line.contract], tuple(line.key)
            if await here.get(row, key) is not None:
                present += 1
                continue
            expect: Expect = ABSENT if Capability.COMPARE_AND_SET in here.capabilities else ANY
            waiting.append(Write(row, key, line.value, when=line.when, expect=expect, removed=line.removed))
            size += weight
        await walk.put_all(space, waiting)
    except BacktestKitError as error:
        note = (
            f"{error}; {records} records and {rows} candles of {source} were imported before: import it again to go on"
        )
        raise type(error)(note, outcome=error.outcome) from error
    return Counts(records + len(waiting), rows, present)


def _holds_money(line: _Line) -> bool:
    """Whether a line is of a live position, or what else money depends on."""
    return not line.namespace and MOVED[line.contract].durability is Durability.MONEY and line.value is not None


async def _is_of_other_store(store: Store, head: _Head) -> bool:
    own = await read_store_id(store)
    return own is not None and bool(head.store_id) and own.id != head.store_id


async def _is_other(store: Store, line: _Line) -> bool:
    """Whether the store has something under the key of `line` that is not the same."""
    space = walk.space_of(store, line.namespace)
    if line.columns is not None:
        offered = CandleSeries(*line.columns.values())
        if not len(offered):
            return False
        here = await space.candles.read(_series(line), int(offered.timestamp[0]), int(offered.timestamp[-1]) + 1)
        common = np.isin(offered.timestamp, here.timestamp)
        return offered.take(common) != here.take(np.isin(here.timestamp, offered.timestamp))
    record = await space.get(MOVED[line.contract], tuple(line.key))
    if record is None:
        return False
    there = dump_value([record.value, record.when, record.removed])
    return there != dump_value([line.value, line.when, line.removed])


def _series(line: _Line) -> SeriesKey:
    return SeriesKey(*(str(part) for part in line.key))


def _name(line: _Line) -> str:
    return "/".join(
        (*(f"@{name}" for name in line.namespace), line.contract, text_of(MOVED[line.contract], tuple(line.key)))
    )
