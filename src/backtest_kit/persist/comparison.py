"""Two stores, compared by content: what moves from one to another, whatever their kinds."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Final

import msgspec

from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import iso
from backtest_kit.persist import walk
from backtest_kit.persist.contracts import MOVED, Contract
from backtest_kit.persist.operations import text_of
from backtest_kit.persist.store import Capability, Record, Store
from backtest_kit.persist.walk import Part

_DIGITS: Final = 16


class Sum(msgspec.Struct, frozen=True):
    """What one store has of a contract."""

    count: int
    """Of records, removed ones included, or of candles."""
    digest: str
    """Over keys, values, simulation times and removals in the order of writing: equal where those are."""


class Comparison(msgspec.Struct, frozen=True):
    """One contract in one namespace of both stores."""

    namespace: tuple[str, ...]
    contract: str
    source: Sum
    target: Sum
    difference: str | None = None
    """The first thing in which they differ, by name."""


async def compare_stores(
    source: Store, target: Store, *, on_part: Callable[[Part], None] = lambda part: None
) -> list[Comparison]:
    """Read all of both stores; what has nothing in either of them is left out. They are equal if no item has a
    `difference`.

    Raises:
        UserError: `source` cannot list its candles.
        Damaged, RetryLater: as `Store.scan`.
    """
    theirs = await walk.parts(target, candles=Capability.LISTING in target.capabilities)
    found: dict[tuple[tuple[str, ...], str], _Pair] = {}
    for part in sorted({*await walk.parts(source), *theirs}, key=lambda part: part.place):
        on_part(part)
        pair = found.setdefault((part.namespace, part.contract), _Pair())
        if part.series is None:
            await _compare_records(source, target, part, pair)
        else:
            await _compare_candles(source, target, part, pair)
    return [
        Comparison(namespace, contract, pair.source.sum, pair.target.sum, pair.difference)
        for (namespace, contract), pair in found.items()
        if pair.source.count or pair.target.count
    ]


class _Side:
    def __init__(self) -> None:
        self.count = 0
        self._digest = hashlib.sha256()

    def add(self, data: bytes, count: int = 1) -> None:
        self.count += count
        self._digest.update(data)

    @property
    def sum(self) -> Sum:
        return Sum(self.count, self._digest.hexdigest()[:_DIGITS])


class _Pair:
    def __init__(self) -> None:
        self.source, self.target = _Side(), _Side()
        self.difference: str | None = None

    def differ(self, what: str) -> None:
        self.difference = self.difference or what


async def _compare_records(source: Store, target: Store, part: Part, pair: _Pair) -> None:
    row = MOVED[part.contract]
    async with aclosing(walk.records(source, part)) as mine, aclosing(walk.records(target, part)) as theirs:
        async for here, there in _side_by_side(mine, theirs):
            contents = [None if record is None else walk.content_of(record) for record in (here, there)]
            for side, content in zip((pair.source, pair.target), contents, strict=True):
                if content is not None:
                    side.add(b"%d:%b" % (len(content), content))
            if contents[0] != contents[1]:
                pair.differ(_named(row, here, there))


def _named(row: Contract, here: Record | None, there: Record | None) -> str:
    mine, theirs = (None if record is None else text_of(row, record.key) for record in (here, there))
    if mine == theirs:
        return f"{mine} has another content"
    if theirs is None:
        return f"{mine} is missing from the target"
    if mine is None:
        return f"{theirs} is only in the target"
    return f"{mine} comes next in the source, {theirs} in the target"


async def _side_by_side(
    mine: AsyncIterator[Record], theirs: AsyncIterator[Record]
) -> AsyncIterator[tuple[Record | None, Record | None]]:
    while True:
        here, there = await anext(mine, None), await anext(theirs, None)
        if here is None and there is None:
            return
        yield here, there


async def _compare_candles(source: Store, target: Store, part: Part, pair: _Pair) -> None:
    named = False
    for start, stop in walk.ranges(part):
        here = await walk.read_candles(source, part, start, stop)
        there = await walk.read_candles(target, part, start, stop)
        if not named and (len(here) or len(there)):
            pair.source.add(str(part).encode(), 0)
            pair.target.add(str(part).encode(), 0)
            named = True
        mine, theirs = walk.rows_of(here), walk.rows_of(there)
        pair.source.add(mine, len(here))
        pair.target.add(theirs, len(there))
        if mine != theirs:
            pair.differ(f"{part} from {iso(_first_other(here, there))} on")


def _first_other(here: CandleSeries, there: CandleSeries) -> int:
    """The time of the first candle that is not the same on both sides."""
    common = min(len(here), len(there))
    for index in range(common):
        if walk.rows_of(here[index : index + 1]) != walk.rows_of(there[index : index + 1]):
            return int(min(here.timestamp[index], there.timestamp[index]))
    return int((here if len(here) > common else there).timestamp[common])
