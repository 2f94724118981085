"""Candles in MongoDB: a document each, of which the first one written stays permanently."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import bson
import numpy as np
from bson import ObjectId
from bson.int64 import Int64
from pymongo.asynchronous.cursor import AsyncCursor
from pymongo.errors import BulkWriteError

from backtest_kit.errors import BacktestKitError, Damaged, Outcome
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.persist.backends.mongo.connection import Connection
from backtest_kit.persist.backends.mongo.documents import Document
from backtest_kit.persist.backends.mongo.server import is_duplicate
from backtest_kit.persist.candle_cache import CandleCache
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.store import CandleStore, SeriesKey

_CHUNK: Final = 2_000
"""Candles in one request: enough to hide the round trip, few enough not to block the event loop."""
_ANSWER: Final = 10_000
"""Candles in one answer: a slow server must be able to send it before the socket times out."""
_CANDLE: Final = CONTRACTS["candle"]
_PROJECTION: Final = {"_id": False, **dict.fromkeys(COLUMNS, True)}

_HEADS: Final = [b"\x12timestamp\0", *(b"\x01%b\0" % name.encode() for name in COLUMNS[1:])]
"""Type and name of each field, as BSON has them before its value."""
_ROW: Final = np.dtype(
    [
        ("length", "<i4"),
        *(
            part
            for name, head in zip(COLUMNS, _HEADS, strict=True)
            for part in ((f"{name} head", "u1", len(head)), (name, "<i8" if name == "timestamp" else "<f8"))
        ),
        ("end", "u1"),
    ]
)
"""A document as this program writes it and MongoDB sends it: all have the same length."""

Opened = Callable[[], Awaitable[Connection]]


class MongoCandleStore(CandleStore):
    """The candles of one namespace."""

    def __init__(self, opened: Opened, namespace: str, cache: CandleCache) -> None:
        """`opened` returns the open connection of the running loop."""
        self._opened = opened
        self._namespace = namespace
        self._cache = cache

    async def read(self, series: SeriesKey, start_ms: int, stop_ms: int) -> CandleSeries:
        return await self._cache.read((self._namespace, series), start_ms, stop_ms, partial(self._read, series))

    async def _read(self, series: SeriesKey, start_ms: int, stop_ms: int) -> CandleSeries:
        connection = await self._opened()
        wanted = {**self._name(series), "timestamp": {"$gte": Int64(start_ms), "$lt": Int64(stop_ms)}}

        def cursor() -> AsyncCursor[Any]:
            return connection.collection(_CANDLE).find_raw_batches(
                wanted, _PROJECTION, sort=[("timestamp", 1)], batch_size=_ANSWER
            )

        batches = await connection.ask_all(f"read candles of {series.symbol}", cursor, 1)
        return CandleSeries.concat([_columns(batch, series) for batch in batches if batch])

    async def write(self, series: SeriesKey, candles: CandleSeries) -> int:
        connection = await self._opened()
        return await connection.finish(self._write(connection, series, candles)) if len(candles) else 0

    async def series(self) -> list[SeriesKey]:
        connection = await self._opened()
        found: list[tuple[str, ...]] = [()]
        for field in _CANDLE.key_fields[:-1]:
            # One field of the index after the other: the server skips from one distinct value to the next.
            names = [dict(zip(_CANDLE.key_fields, known, strict=False)) for known in found]
            questions = [
                partial(connection.collection(_CANDLE).distinct, field, {"namespace": self._namespace, **name})
                for name in names
            ]
            answers = await asyncio.gather(*(connection.ask("list the series of candles", each) for each in questions))
            found = [(*known, value) for known, values in zip(found, answers, strict=True) for value in values]
        return sorted((SeriesKey(*each) for each in found), key=str)

    async def _write(self, connection: Connection, series: SeriesKey, candles: CandleSeries) -> int:
        doing = f"write candles of {series.symbol}"
        name = self._name(series)
        written = 0
        # One writer of a series at a time: of two with the same candles, one is first with all of them.
        async with connection.turns.hold([(_CANDLE.name, self._namespace, series)]):
            stored = await connection.ask_all(doing, partial(_stored, connection, name, candles), _ANSWER)
            new = candles.take(~np.isin(candles.timestamp, [each["timestamp"] for each in stored]))
            for start in range(0, len(new), _CHUNK):
                try:
                    connection.has_unflushed = True
                    written += await connection.ask(doing, _Insertion(connection, name, new[start : start + _CHUNK]))
                except BacktestKitError as error:
                    if written:
                        error.outcome = Outcome.UNKNOWN
                    raise
                crashpoint("mongo.between_candles")
        return written

    def _name(self, series: SeriesKey) -> Document:
        values = (series.exchange_name, series.symbol, series.interval)
        return {"namespace": self._namespace, **dict(zip(_CANDLE.key_fields, values, strict=False))}


class _Insertion:
    """One request with candles, which may be sent again if no answer comes.

    Each candle has its `_id` before it is sent: by that it is recognised if a request without an answer stored it.
    """

    def __init__(self, connection: Connection, name: Document, candles: CandleSeries) -> None:
        self._connection, self._name, self._candles = connection, name, candles
        self._documents = _documents(name, candles)
        self._is_sent = False

    async def __call__(self) -> int:
        """How many of them were not there."""
        missing = self._documents
        if self._is_sent:
            stored = await self._ids()
            missing = [each for each in missing if each["timestamp"] not in stored]
        self._is_sent = True
        try:
            if missing:
                await self._connection.collection(_CANDLE).insert_many(missing, ordered=False)
        except BulkWriteError as error:
            # The unique index rejects candles that another process was first with.
            refused = (error.details or {}).get("writeErrors", ())
            if not is_duplicate(error) or any(each.get("code") != refused[0]["code"] for each in refused):
                raise
        else:
            if len(missing) == len(self._documents):
                return len(missing)
        stored = await self._ids()
        return sum(stored.get(each["timestamp"]) == each["_id"] for each in self._documents)

    async def _ids(self) -> dict[int, ObjectId]:
        found = await _stored(self._connection, self._name, self._candles, with_ids=True).to_list()
        return {each["timestamp"]: each["_id"] for each in found}


def _documents(name: Document, candles: CandleSeries) -> list[Document]:
    columns = (candles.timestamp.tolist(), *(column.tolist() for column in list(candles.columns().values())[1:]))
    return [
        {"_id": ObjectId(), **name, "timestamp": Int64(timestamp), **dict(zip(COLUMNS[1:], prices, strict=True))}
        for timestamp, *prices in zip(*columns, strict=True)
    ]


def _stored(
    connection: Connection, name: Document, candles: CandleSeries, *, with_ids: bool = False
) -> AsyncCursor[Document]:
    """The candles that exist in the span of `candles`; without ids, the index alone answers."""
    span = {"$gte": Int64(candles.timestamp[0]), "$lte": Int64(candles.timestamp[-1])}
    wanted, fields = {**name, "timestamp": span}, {"_id": with_ids, "timestamp": True}
    return connection.collection(_CANDLE).find(wanted, fields, batch_size=_ANSWER)


def _columns(batch: bytes, series: SeriesKey) -> CandleSeries:
    """The columns of a batch of documents, without decoding each of them if all have the layout of `_ROW`.

    Another program, or a server that is not MongoDB, may have another order of fields.
    """
    if len(batch) % _ROW.itemsize == 0:
        rows = np.frombuffer(batch, _ROW)
        ours = np.frombuffer(_template(), _ROW)[0]
        fixed = [field for field in _ROW.names or () if field not in COLUMNS]
        if all((rows[field] == ours[field]).all() for field in fixed):
            return CandleSeries.trusted(*(rows[name].astype(rows[name].dtype.newbyteorder("=")) for name in COLUMNS))
    found = bson.decode_all(batch)
    for document in found:
        if not _is_candle(document):
            raise Damaged(f"a candle of {series.symbol} is {document!r:.120}: correct or delete that document")
    return CandleSeries.from_rows([[document[name] for name in COLUMNS] for document in found])


def _is_candle(document: Document) -> bool:
    return isinstance(document.get("timestamp"), int) and all(
        isinstance(document.get(name), int | float) and not isinstance(document[name], bool) for name in COLUMNS
    )


def _template() -> bytes:
    return bson.encode({"timestamp": Int64(0), **dict.fromkeys(COLUMNS[1:], 0.0)})
