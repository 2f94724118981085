"""One write of one record: tried until it is known what became of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pymongo
from bson.int64 import Int64
from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from backtest_kit.errors import BacktestKitError, Outcome, RetryLater
from backtest_kit.persist.backends.mongo_client import Link
from backtest_kit.persist.backends.mongo_documents import (
    Change,
    Document,
    cache_name,
    expectation,
    matching,
    record_of_change,
    update_of,
)
from backtest_kit.persist.backends.mongo_errors import FAILURES, heals, may_have_happened
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.store import ABSENT, ANY, Expect, Record
from backtest_kit.persist.writing import decide

Read = Callable[[Contract, Document, Document | None], Awaitable[Record | None]]
"""The record in the document of that name, as it was found, once nothing holds it."""


class Putting:
    """One write, tried until it is known what became of it or the time is up."""

    def __init__(
        self, link: Link, change: Change, read: Read, writer: str | None = None, *, is_sent: bool = False
    ) -> None:
        self._read = read
        self._link = link
        self._change = change
        self._writer = writer or link.next_writer()
        self._doing = f"write a {change.contract.name}"
        self._is_sent = is_sent
        """Whether the server was sent the write and gave no answer."""
        self._first_tick = 0
        """That of the first attempt."""

    async def run(self) -> Record:
        patience = self._link.patience()
        while True:
            try:
                with pymongo.timeout(patience.left):
                    record = await self._attempt()
            except FAILURES as error:
                self._is_sent = self._is_sent or may_have_happened(error)
                if not heals(error) or patience.is_over:
                    outcome = Outcome.UNKNOWN if self._is_sent else Outcome.NOT_DONE
                    raise self._link.failure(error, self._doing, outcome) from error
                await patience.pause()
                continue
            except BacktestKitError as error:
                if self._is_sent:
                    error.outcome = Outcome.UNKNOWN
                raise
            if record is not None:
                return record
            if patience.is_over:
                raise RetryLater(f"cannot {self._doing}: other writers were first, again and again")

    async def _attempt(self) -> Record | None:
        """The record that stands now, or None if it must be tried again."""
        expect = expectation(self._change.write)
        if self._is_sent:
            found = await self._look()
            if found is not None and found.get("writer") == self._writer:
                return record_of_change(self._change, found["rev"])
            if expect == ANY:
                expect = self._guard(found)
        document = await self._update(expect)
        if document is None:
            return await self._refused()
        crashpoint("mongo.after_write")
        if self._change.contract.durability is not Durability.MONEY:
            self._link.has_unflushed = True
        if self._link.ids is not None:
            await self._link.ids.set({cache_name(self._change.contract, self._change.name): str(document["_id"])})
            crashpoint("mongo.after_cache")
        return record_of_change(self._change, document["rev"])

    async def _update(self, expect: Expect) -> Document | None:
        """The one round trip: id and new revision, or None if the document is not as expected."""
        collection = self._link.collection(self._change.contract)
        tick = self._link.next_tick()
        self._first_tick = self._first_tick or tick
        # A request may reach the server long after its connection was given up. Then it must not undo a later one.
        wanted = {**matching(self._change.name, expect), "tick": {"$not": {"$gte": Int64(tick)}}}
        crashpoint("mongo.before_write")
        try:
            return await collection.find_one_and_update(
                wanted,
                update_of(self._change, self._writer, tick),
                projection=["rev"],
                upsert=isinstance(expect, str),
                return_document=ReturnDocument.AFTER,
            )
        except DuplicateKeyError:
            return None

    async def _refused(self) -> Record | None:
        """Why the document is not as expected: a conflict, damage, or something that is over at the next attempt."""
        found = await self._look()
        if found is not None and found.get("writer") == self._writer:
            return record_of_change(self._change, found["rev"])
        self._link.saw_tick(found)
        contract = self._change.contract
        current = await self._read(contract, self._change.name, found)
        record, changed = decide(self._change.write, current)
        return None if changed else record

    async def _look(self) -> Document | None:
        return await self._link.collection(self._change.contract).find_one(self._change.name)

    def _guard(self, found: Document | None) -> Expect:
        """What must still hold for a write of unknown outcome to be sent again: nobody else was there meanwhile."""
        if found is None:
            return ABSENT
        if self._link.saw_tick(found) < self._first_tick:
            return int(found["rev"])
        raise RetryLater(
            f"cannot {self._doing}: the connection to MongoDB was lost, and another process has written the record "
            "since: read it again",
            outcome=Outcome.UNKNOWN,
        )
