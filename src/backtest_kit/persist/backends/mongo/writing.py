"""Writes of records: one at a time, many in one request, and several in one transaction.

The unique index decides every race. A write names itself in its document (`writer`), so when no answer comes it is
found out by reading whether it was done, and it is sent again only if no other write came in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple

from bson.int64 import Int64
from bson.objectid import ObjectId
from pymongo import InsertOne, ReturnDocument, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import BulkWriteError, DuplicateKeyError
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference

from backtest_kit.errors import BacktestKitError, Outcome, RetryLater
from backtest_kit.persist.backends.mongo.connection import ACKNOWLEDGED, JOURNALLED, Connection, Deadline
from backtest_kit.persist.backends.mongo.documents import (
    Change,
    Document,
    document_of,
    expectation,
    matching,
    record_of_change,
    update_of,
)
from backtest_kit.persist.backends.mongo.reading import cache_name, find_named, record_in
from backtest_kit.persist.backends.mongo.server import FAILURES, is_duplicate, is_transient, may_have_happened
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.store import ABSENT, ANY, Expect, Record
from backtest_kit.persist.writing import decide

_BULK: Final = 250
"""Writes in one request: enough to hide the round trip, few enough for one query about all of them."""
_ABORT_SECONDS: Final = 0.1
"""Least time for the server to abort a transaction; the time of the batch may be up."""


class Upsert:
    """One write, tried until its outcome is known or the time is up."""

    def __init__(self, connection: Connection, change: Change) -> None:
        self._connection = connection
        self.change: Final = change
        self._writer = connection.next_writer()
        self._doing = f"write a {change.contract.name}"
        self._is_sent = False
        """Whether the write was sent and got no answer."""
        self._first_tick = 0
        """That of the first attempt."""
        self.inserted_as: ObjectId | None = None
        """The `_id` of the document that the first attempt inserts, if it does."""

    def operation(self, document: Document | None) -> InsertOne[Document] | UpdateOne:
        """The first attempt as one of many in a request. `document` is what was there a moment ago."""
        expect = expectation(self.change.write)
        self._connection.saw_tick(document)
        self._first_tick = self._connection.next_tick()
        if document is None and isinstance(expect, str):
            # An insert costs a server a fraction of an upsert.
            new = document_of(self.change, self._writer, self._first_tick)
            self.inserted_as = new["_id"]
            return InsertOne(new)
        # By `_id`: with conditions beside the name, some planners scan the whole namespace.
        identity = ObjectId() if document is None else document["_id"]
        wanted = {"_id": identity, **matching(self.change.name, expect), **_before(self._first_tick)}
        return UpdateOne(wanted, update_of(self.change, self._writer, self._first_tick))

    def was_sent(self) -> None:
        """It may have been done: `run` first finds that out."""
        self._is_sent = True

    def record_in(self, found: Document | None) -> Record | None:
        """The record that stands, if this write made it."""
        if found is None or found.get("writer") != self._writer:
            return None
        return record_of_change(self.change, found["rev"])

    async def run(self, deadline: Deadline | None = None) -> Record:
        deadline = deadline or self._connection.deadline()
        while True:
            saw_server = self._connection.sees_server
            try:
                with self._connection.attempt(deadline):
                    record = await self._attempt()
            except FAILURES as error:
                self._is_sent = self._is_sent or may_have_happened(error)
                if not is_transient(error, saw_server=saw_server) or deadline.is_over:
                    raise self._connection.failure(error, self._doing, self._outcome) from error
                await deadline.pause()
                continue
            except BacktestKitError as error:
                if self._is_sent:
                    error.outcome = Outcome.UNKNOWN
                raise
            if record is not None:
                return record
            if deadline.is_over:
                raise RetryLater(f"cannot {self._doing}: too many other writers, try again", outcome=self._outcome)
            await deadline.pause()

    @property
    def _outcome(self) -> Outcome:
        return Outcome.UNKNOWN if self._is_sent else Outcome.NOT_DONE

    async def _attempt(self) -> Record | None:
        """The record that stands now, or None to try again."""
        expect = expectation(self.change.write)
        if self._is_sent:
            found = await self._look()
            if (record := self.record_in(found)) is not None:
                return record
            if expect == ANY:
                expect = self._unchanged_since(found)
        document = await self._update(expect) if self.change.may_change_it else None
        if document is None:
            return await self._rejected()
        crashpoint("mongo.after_write")
        if self.change.contract.durability is not Durability.MONEY:
            self._connection.has_unflushed = True
        if self._connection.ids is not None:
            await self._connection.ids.set({cache_name(self.change.contract, self.change.name): str(document["_id"])})
            crashpoint("mongo.after_cache")
        return record_of_change(self.change, document["rev"])

    async def _update(self, expect: Expect) -> Document | None:
        """The one round trip: `_id` and new revision, or None if the document is not as expected."""
        collection = self._connection.collection(self.change.contract)
        tick = self._connection.next_tick()
        self._first_tick = self._first_tick or tick
        wanted = {**matching(self.change.name, expect), **_before(tick)}
        crashpoint("mongo.before_write")
        upsert = isinstance(expect, str)
        try:
            document: Document | None = await collection.find_one_and_update(
                wanted,
                update_of(self.change, self._writer, tick),
                upsert=upsert,
                return_document=ReturnDocument.AFTER,
            )
        except DuplicateKeyError:
            return None
        return await self._document_of_upsert(tick) if upsert and document is None else document

    async def _document_of_upsert(self, tick: int) -> Document | None:
        """What stands after an upsert that was done and answered without its document.

        MongoDB never answers so. Other servers do, where the upsert met a document that another first writer made a
        moment before. Sent once more, the write would be counted twice.
        """
        self.was_sent()
        found = await self._look()
        if found is None or self.record_in(found) is not None:
            return found
        rev = found.get("rev")
        if self._connection.saw_tick(found) <= tick or not isinstance(rev, int) or rev < 2:
            return None
        # Another write followed this one, whose revision is the one before it or an earlier one.
        return {"_id": found["_id"], "rev": rev - 1}

    async def _rejected(self) -> Record | None:
        """Why the document is not as expected: `Conflict`, `Damaged`, or None for what the next attempt may solve."""
        found = await self._look()
        if (record := self.record_in(found)) is not None:
            return record
        self._connection.saw_tick(found)
        current = await record_in(self._connection, self.change.contract, found)
        record, changed = decide(self.change.write, current)
        return None if changed else record

    async def _look(self) -> Document | None:
        return await self._connection.collection(self.change.contract).find_one(self.change.name)

    def _unchanged_since(self, found: Document | None) -> Expect:
        """The expectation with which a write of unknown outcome may be sent again: no one wrote since it was sent."""
        if found is None:
            return ABSENT
        if self._connection.saw_tick(found) < self._first_tick:
            return int(found["rev"])
        raise RetryLater(
            f"cannot {self._doing}: the connection to MongoDB was lost, and another process has written the record "
            "since: read it again",
            outcome=Outcome.UNKNOWN,
        )


def _before(tick: int) -> Document:
    """No later write stands. A request may reach the server long after its connection was given up, and must not undo
    that write then."""
    return {"tick": {"$not": {"$gte": Int64(tick)}}}


class BulkUpsert:
    """Independent writes of different keys: one request for each collection, and queries before and after it."""

    def __init__(self, connection: Connection, changes: Sequence[Change]) -> None:
        self._connection = connection
        self._changes = changes

    async def run(self) -> list[Record | BaseException]:
        """For each what `Upsert.run` returns or raises."""
        deadline = self._connection.deadline()
        places = sorted(range(len(self._changes)), key=lambda place: self._changes[place].contract.name)
        groups = [list(group) for _, group in groupby(places, lambda place: self._changes[place].contract)]
        parts = [group[start : start + _BULK] for group in groups for start in range(0, len(group), _BULK)]
        done: dict[int, Record | BaseException] = {}
        for part in parts:
            upserts = [Upsert(self._connection, self._changes[place]) for place in part]
            done.update(zip(part, await self._run(upserts, deadline), strict=True))
        return [done[place] for place in range(len(self._changes))]

    async def _run(self, upserts: Sequence[Upsert], deadline: Deadline) -> list[Record | BaseException]:
        """Results of writes to one collection."""
        sent = [index for index, each in enumerate(upserts) if each.change.may_change_it]
        there = await self._found(upserts, sent, deadline)
        ids = await self._send(upserts, {index: upserts[index].operation(there.get(index)) for index in sent}, deadline)
        # What was inserted has revision 1; all others are read, because an answer does not name what it updated.
        records = {index: record_of_change(upserts[index].change, 1) for index in ids}
        unread = [index for index in range(len(upserts)) if index not in ids]
        for index, document in (await self._found(upserts, unread, deadline)).items():
            if (record := upserts[index].record_in(document)) is not None:
                records[index], ids[index] = record, document["_id"]
        if self._connection.ids is not None:
            names = {index: cache_name(upserts[index].change.contract, upserts[index].change.name) for index in ids}
            await self._connection.ids.set({names[index]: str(identity) for index, identity in ids.items()})
            crashpoint("mongo.after_cache")
        # What does not stand as it was sent was rejected or is unknown: that is found out one by one.
        rest = [index for index in unread if index not in records]
        others = await asyncio.gather(*(upserts[index].run(deadline) for index in rest), return_exceptions=True)
        done = {**records, **dict(zip(rest, others, strict=True))}
        return [done[index] for index in range(len(upserts))]

    async def _send(
        self, upserts: Sequence[Upsert], operations: dict[int, InsertOne[Document] | UpdateOne], deadline: Deadline
    ) -> dict[int, Any]:
        """Send the request, and return the `_id` of each document that was certainly inserted."""
        contract = upserts[0].change.contract
        sent = list(operations)
        inserted = {index: identity for index in sent if (identity := upserts[index].inserted_as) is not None}
        certain: dict[int, Any] = {}
        maybe_done = set(sent)
        crashpoint("mongo.before_write")
        try:
            with self._connection.attempt(deadline):
                if operations:
                    await self._connection.collection(contract).bulk_write([*operations.values()], ordered=False)
            certain = inserted
        except BulkWriteError as error:
            details = error.details or {}
            if is_duplicate(error) and not details.get("writeConcernErrors"):
                rejected = {sent[each["index"]] for each in details["writeErrors"]}
                certain = {index: identity for index, identity in inserted.items() if index not in rejected}
                maybe_done -= rejected
        except FAILURES as error:
            if not may_have_happened(error):
                maybe_done.clear()
        for index in maybe_done:
            upserts[index].was_sent()
        crashpoint("mongo.after_write")
        if contract.durability is not Durability.MONEY:
            self._connection.has_unflushed = True
        return certain

    async def _found(self, upserts: Sequence[Upsert], asked: Sequence[int], deadline: Deadline) -> dict[int, Document]:
        """Revision, writer and tick of the documents of those `asked` for, where there are any."""
        if not asked:
            return {}
        contract = upserts[0].change.contract
        names = [upserts[index].change.name for index in asked]
        fields = [*names[0], "rev", "writer", "tick"]
        doing = f"write many {contract.collection}"
        try:
            read = await find_named(self._connection, contract, names, doing, deadline, fields)
        except BacktestKitError:
            return {}  # each of them raises its own error, after another attempt if there is time
        return {index: document for index, document in zip(asked, read, strict=True) if document is not None}


class _Planned(NamedTuple):
    """A write of a transaction, and the document on which it was decided."""

    change: Change
    rev: int
    """The revision that the document must have; 0 where there is none."""
    identity: ObjectId
    """Its `_id`, or the one that it will get."""

    @property
    def contract(self) -> Contract:
        return self.change.contract


class Transaction:
    """Several writes of different keys, all or nothing.

    The documents are read and every write is decided before the transaction begins. In it, the updates insist on the
    revisions that were read; if one has changed, everything begins anew.
    """

    def __init__(self, connection: Connection, changes: Sequence[Change]) -> None:
        self._connection = connection
        # Writes to one collection travel together, in the order in which they were given.
        self._changes = sorted(changes, key=lambda change: change.contract.name)
        self._writer = connection.next_writer()
        self._is_money = any(change.contract.durability is Durability.MONEY for change in changes)
        self._doing = "write a batch"
        self._is_sent = False
        """Whether a commit was sent and got no answer."""
        self._first_tick = 0
        """Below every tick of the first attempt, and above all before it."""
        self.ids: dict[str, str] = {}
        """The `_id` of each document that was written, by its name in Redis."""

    async def run(self) -> None:
        """Raises as `Store.batch`."""
        deadline = self._connection.deadline()
        while not await self._attempt(deadline):
            if deadline.is_over:
                raise RetryLater(f"cannot {self._doing}: too many other writers, try again", outcome=self._outcome)
            await deadline.pause()
        if not self._is_money:
            self._connection.has_unflushed = True

    @property
    def _outcome(self) -> Outcome:
        return Outcome.UNKNOWN if self._is_sent else Outcome.NOT_DONE

    async def _attempt(self, deadline: Deadline) -> bool:
        """True once they are done, False to try again."""
        try:
            planned = await self._plan(deadline)
            if not planned:
                return True
            self._first_tick = self._first_tick or self._connection.next_tick()
            is_done = await self._transact(planned, deadline)
        except FAILURES as error:
            if not is_transient(error) or deadline.is_over:
                raise self._connection.failure(error, self._doing, self._outcome) from error
            return False
        except BacktestKitError as error:
            if self._is_sent:
                error.outcome = Outcome.UNKNOWN
            raise
        if is_done:
            self.ids = {cache_name(each.contract, each.change.name): str(each.identity) for each in planned}
        return is_done

    async def _plan(self, deadline: Deadline) -> list[_Planned]:
        """What there is to do, and at which revision of each document; nothing if it turns out to be done."""
        groups = [list(group) for _, group in groupby(self._changes, lambda change: change.contract)]
        found = await asyncio.gather(*(self._documents(group, deadline) for group in groups))
        documents = [document for group in found for document in group]
        if self._is_sent and self._was_done(documents):
            return []
        planned = []
        for change, document in zip(self._changes, documents, strict=True):
            current = await record_in(self._connection, change.contract, document)
            self._connection.saw_tick(document)
            _, changed = decide(change.write, current)
            if changed:
                identity = ObjectId() if document is None else document["_id"]
                planned.append(_Planned(change, 0 if current is None else current.rev, identity))
        return planned

    async def _documents(self, group: Sequence[Change], deadline: Deadline) -> list[Document | None]:
        names = [change.name for change in group]
        return await find_named(self._connection, group[0].contract, names, self._doing, deadline)

    def _was_done(self, documents: Sequence[Document | None]) -> bool:
        if any(document is not None and document.get("writer") == self._writer for document in documents):
            return True
        # Had it been done, each document would have a later tick than the first attempt, whoever wrote it since.
        if any(self._connection.saw_tick(document) < self._first_tick for document in documents):
            return False
        raise RetryLater(
            f"cannot {self._doing}: the connection to MongoDB was lost, and another process has written its records "
            "since: read them again",
            outcome=Outcome.UNKNOWN,
        )

    async def _transact(self, planned: Sequence[_Planned], deadline: Deadline) -> bool:
        async with self._connection.mongo.start_session() as session:
            await session.start_transaction(
                read_concern=ReadConcern("snapshot"),
                write_concern=JOURNALLED if self._is_money else ACKNOWLEDGED,
                read_preference=ReadPreference.PRIMARY,
            )
            try:
                with self._connection.within(deadline.left):
                    if await self._write(planned, session):
                        crashpoint("mongo.after_transaction_writes")
                        await self._commit(session)
                        return True
            finally:
                # Not left to a timeout of the server: until then it would keep others from these documents.
                if session.in_transaction:
                    with self._connection.within(max(_ABORT_SECONDS, deadline.left)):
                        await session.abort_transaction()
        return False

    async def _commit(self, session: AsyncClientSession) -> None:
        # Unknown whatever the error says: the driver repeats a commit by itself, and a server that was restarted
        # in between may know nothing of the transaction that it has committed.
        self._is_sent = True
        await session.commit_transaction()
        self._is_sent = False

    async def _write(self, planned: Sequence[_Planned], session: AsyncClientSession) -> bool:
        """False if a document was not as planned."""
        for contract, group in groupby(planned, lambda each: each.contract):
            updates = [self._update(each) for each in group]
            # Without the concerns of a contract: in a transaction, those of the transaction count.
            collection = self._connection.database[contract.collection]
            try:
                done = await collection.bulk_write(updates, session=session)
            except BulkWriteError as error:
                if is_duplicate(error):
                    return False
                raise
            if done.matched_count + done.upserted_count < len(updates):
                return False
        return True

    def _update(self, each: _Planned) -> UpdateOne:
        wanted = matching({"_id": each.identity, **each.change.name}, each.rev or ABSENT)
        changes = update_of(each.change, self._writer, self._connection.next_tick())
        return UpdateOne(wanted, changes, upsert=not each.rev)


def turn_of(change: Change) -> tuple[Any, ...]:
    """What writes of the same document queue at."""
    return change.contract.name, *change.name.values()
