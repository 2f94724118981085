"""Writes of single documents: one round trip each, or one for many at once, and what to do when no answer comes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Final

from bson.int64 import Int64
from bson.objectid import ObjectId
from pymongo import InsertOne, ReturnDocument, UpdateOne
from pymongo.errors import BulkWriteError, DuplicateKeyError

from backtest_kit.errors import BacktestKitError, Outcome, RetryLater
from backtest_kit.persist.backends.mongo_client import Link
from backtest_kit.persist.backends.mongo_documents import (
    Change,
    Document,
    document_of,
    expectation,
    matching,
    record_of_change,
    update_of,
)
from backtest_kit.persist.backends.mongo_errors import FAILURES, Patience, heals, is_duplicate, may_have_happened
from backtest_kit.persist.backends.mongo_reading import cache_name, find_named, standing
from backtest_kit.persist.contracts import Durability
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.store import ABSENT, ANY, Expect, Record
from backtest_kit.persist.writing import decide

_MANY: Final = 250
"""Writes in one request: enough to forget the way to the server, few enough for one question about all of them."""


class Putting:
    """One write, tried until it is known what became of it or the time is up."""

    def __init__(self, link: Link, change: Change) -> None:
        self._link = link
        self._change = change
        self._writer = link.next_writer()
        self._doing = f"write a {change.contract.name}"
        self._is_sent = False
        """Whether the server was sent the write and gave no answer."""
        self._first_tick = 0
        """That of the first attempt."""
        self.inserted_as: ObjectId | None = None
        """The id of the document that the first attempt makes, if it is an insertion."""

    @property
    def change(self) -> Change:
        return self._change

    def operation(self, document: Document | None) -> InsertOne[Document] | UpdateOne:
        """The first attempt, as one of many in a request, where `document` is what there was a moment ago.

        What is new is inserted, which costs a server a fraction of an upsert. What is there is updated by its id: some
        planners search a whole namespace for a name with conditions beside it.
        """
        expect = expectation(self._change.write)
        self._link.saw_tick(document)
        self._first_tick = self._link.next_tick()
        if document is None and isinstance(expect, str):
            new = document_of(self._change, self._writer, self._first_tick)
            self.inserted_as = new["_id"]
            return InsertOne(new)
        identity = ObjectId() if document is None else document["_id"]
        wanted = {"_id": identity, **matching(self._change.name, expect), **_before(self._first_tick)}
        return UpdateOne(wanted, update_of(self._change, self._writer, self._first_tick))

    def was_sent(self) -> None:
        """It may have been done: `run` finds out what became of it first."""
        self._is_sent = True

    def record_in(self, found: Document | None) -> Record | None:
        """The record that stands, if `found` is what this write has made."""
        if found is None or found.get("writer") != self._writer:
            return None
        return record_of_change(self._change, found["rev"])

    async def run(self, patience: Patience | None = None) -> Record:
        patience = patience or self._link.patience()
        while True:
            saw_server = self._link.sees_server
            try:
                with self._link.attempt(patience):
                    record = await self._attempt()
            except FAILURES as error:
                self._is_sent = self._is_sent or may_have_happened(error)
                if not heals(error, saw_server=saw_server) or patience.is_over:
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
                outcome = Outcome.UNKNOWN if self._is_sent else Outcome.NOT_DONE
                raise RetryLater(f"cannot {self._doing}: other writers were first, again and again", outcome=outcome)
            await patience.pause()

    async def _attempt(self) -> Record | None:
        """The record that stands now, or None if it must be tried again."""
        expect = expectation(self._change.write)
        if self._is_sent:
            found = await self._look()
            if (record := self.record_in(found)) is not None:
                return record
            if expect == ANY:
                expect = self._guard(found)
        document = await self._update(expect) if self._change.may_change_it else None
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
        wanted = {**matching(self._change.name, expect), **_before(tick)}
        crashpoint("mongo.before_write")
        upsert = isinstance(expect, str)
        try:
            document: Document | None = await collection.find_one_and_update(
                wanted,
                update_of(self._change, self._writer, tick),
                upsert=upsert,
                return_document=ReturnDocument.AFTER,
            )
        except DuplicateKeyError:
            return None
        return await self._unshown(tick) if upsert and document is None else document

    async def _unshown(self, tick: int) -> Document | None:
        """What stands after an upsert that was done and answered without its document.

        MongoDB never answers so; some servers that speak its protocol do where the upsert met a document that another
        first writer had made a moment ago. To send the write once more would count it twice.
        """
        self.was_sent()
        found = await self._look()
        if found is None or self.record_in(found) is not None:
            return found
        rev = found.get("rev")
        if self._link.saw_tick(found) <= tick or not isinstance(rev, int) or rev < 2:
            return None
        # Another write stands on this one, whose revision was the one before it at the latest.
        return {"_id": found["_id"], "rev": rev - 1}

    async def _refused(self) -> Record | None:
        """Why the document is not as expected: a conflict, damage, or something that is over at the next attempt."""
        found = await self._look()
        if (record := self.record_in(found)) is not None:
            return record
        self._link.saw_tick(found)
        contract = self._change.contract
        current = await standing(self._link, contract, self._change.name, found)
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


class PuttingMany:
    """Writes of different keys, each of its own fate, in one request for each collection and questions around it."""

    def __init__(self, link: Link, changes: Sequence[Change]) -> None:
        self._link = link
        self._changes = changes

    async def run(self) -> list[Record | BaseException]:
        """For each what `Putting.run` returns or raises."""
        patience = self._link.patience()
        places = sorted(range(len(self._changes)), key=lambda place: self._changes[place].contract.name)
        groups = [list(group) for _, group in groupby(places, lambda place: self._changes[place].contract)]
        parts = [group[start : start + _MANY] for group in groups for start in range(0, len(group), _MANY)]
        done: dict[int, Record | BaseException] = {}
        for part in parts:
            puttings = [Putting(self._link, self._changes[place]) for place in part]
            done.update(zip(part, await self._put(puttings, patience), strict=True))
        return [done[place] for place in range(len(self._changes))]

    async def _put(self, puttings: Sequence[Putting], patience: Patience) -> list[Record | BaseException]:
        contract = puttings[0].change.contract
        collection = self._link.collection(contract)
        sent = [index for index, each in enumerate(puttings) if each.change.may_change_it]
        there = await self._found(puttings, sent, patience)
        operations = [puttings[index].operation(there.get(index)) for index in sent]
        inserted = {index: identity for index in sent if (identity := puttings[index].inserted_as) is not None}
        crashpoint("mongo.before_write")
        ids: dict[int, Any] = {}
        """Of the documents that are new. Their revision is 1, so nobody has to ask for it."""
        maybe = set(sent)
        """Those that may have been done. An answer counts the updates and does not name them."""
        try:
            with self._link.attempt(patience):
                if operations:
                    await collection.bulk_write(operations, ordered=False)
            ids = inserted
        except BulkWriteError as error:
            details = error.details or {}
            if is_duplicate(error) and not details.get("writeConcernErrors"):
                refused = {sent[each["index"]] for each in details["writeErrors"]}
                ids = {index: identity for index, identity in inserted.items() if index not in refused}
                maybe -= refused
        except FAILURES as error:
            if not may_have_happened(error):
                maybe.clear()
        for index in maybe:
            puttings[index].was_sent()
        crashpoint("mongo.after_write")
        if contract.durability is not Durability.MONEY:
            self._link.has_unflushed = True
        records = {index: record_of_change(puttings[index].change, 1) for index in ids}
        asked = [index for index in range(len(puttings)) if index not in ids]
        for index, document in (await self._found(puttings, asked, patience)).items():
            if (record := puttings[index].record_in(document)) is not None:
                records[index], ids[index] = record, document["_id"]
        if self._link.ids is not None:
            names = {index: cache_name(contract, puttings[index].change.name) for index in ids}
            await self._link.ids.set({names[index]: str(identity) for index, identity in ids.items()})
            crashpoint("mongo.after_cache")
        # What is not there as it was sent was refused, or is unknown: one by one it is found out.
        rest = [index for index in asked if index not in records]
        others = await asyncio.gather(*(puttings[index].run(patience) for index in rest), return_exceptions=True)
        done = {**records, **dict(zip(rest, others, strict=True))}
        return [done[index] for index in range(len(puttings))]

    async def _found(
        self, puttings: Sequence[Putting], asked: Sequence[int], patience: Patience
    ) -> dict[int, Document]:
        """Revision, writer and tick of the documents of those `asked` for, where there are any."""
        if not asked:
            return {}
        contract = puttings[0].change.contract
        names = [puttings[index].change.name for index in asked]
        fields = [*names[0], "rev", "writer", "tick"]
        try:
            read = await find_named(self._link, contract, names, f"write many {contract.collection}", patience, fields)
        except BacktestKitError:
            return {}  # each of them says it for itself, and asks once more if there is time
        return {index: document for index, document in zip(asked, read, strict=True) if document is not None}


def _before(tick: int) -> Document:
    """No later write stands. A request may reach the server long after its connection was given up, and must not
    undo that then."""
    return {"tick": {"$not": {"$gte": Int64(tick)}}}


def turn_of(change: Change) -> tuple[Any, ...]:
    return change.contract.name, *change.name.values()
