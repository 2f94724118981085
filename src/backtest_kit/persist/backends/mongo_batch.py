"""Batches: one transaction where the server has them, an intent where it has not.

Both begin with reading the documents and judging every write, and both then insist on the very revisions
that were judged; when one has moved on meanwhile, the batch begins anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Final

from bson.objectid import ObjectId
from pymongo import UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import BulkWriteError
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference

from backtest_kit.errors import BacktestKitError, Damaged, Outcome, RetryLater
from backtest_kit.persist.backends import mongo_damage
from backtest_kit.persist.backends.mongo_client import ACKNOWLEDGED, JOURNALLED, Link
from backtest_kit.persist.backends.mongo_documents import (
    Change,
    Document,
    Planned,
    record_of,
    update_of,
)
from backtest_kit.persist.backends.mongo_errors import FAILURES, Patience, heals, is_duplicate
from backtest_kit.persist.backends.mongo_intents import carry_out, has_happened, settle
from backtest_kit.persist.backends.mongo_reading import find_named
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.store import Record
from backtest_kit.persist.writing import decide

_DOING: Final = "write a batch"
_ABORT_SECONDS: Final = 0.1
"""How long a server is told to forget a transaction, at least; the time of the batch may be up."""


class Batch:
    """Several writes of different keys, which happen together or not at all."""

    def __init__(self, link: Link, changes: Sequence[Change]) -> None:
        self._link = link
        # Writes to one collection travel together, in the order in which they were given.
        self._changes = sorted(changes, key=lambda change: change.contract.name)
        self._writer = link.next_writer()
        self._is_money = any(change.contract.durability is Durability.MONEY for change in changes)
        self._is_sent = False
        """Whether the server was told to decide and gave no answer."""
        self._first_tick = 0
        """Below every tick of its first attempt, and of none before."""
        self.done: list[Planned] = []
        """What was written."""

    async def run(self) -> None:
        """Do them.

        Raises:
            Conflict, Damaged, RetryLater, UserError, OutOfSpace: as `Store.batch`.
        """
        patience = self._link.patience()
        while not await self._attempt(patience):
            if patience.is_over:
                outcome = Outcome.UNKNOWN if self._is_sent else Outcome.NOT_DONE
                raise RetryLater(f"cannot {_DOING}: other writers were first, again and again", outcome=outcome)
            await patience.pause()
        if not self._is_money:
            self._link.has_unflushed = True

    async def _attempt(self, patience: Patience) -> bool:
        """True once they are done, False if they must be tried again."""
        try:
            if self._is_sent and not self._link.has_transactions:
                with self._link.within(patience.left):
                    if await has_happened(self._link, self._writer):
                        return True
            planned = await self._plan(patience)
            if not planned:
                return True
            self._first_tick = self._first_tick or self._link.next_tick()
            act = self._transact if self._link.has_transactions else self._carry_out
            is_done = await act(planned, patience)
            self.done = planned if is_done else []
            return is_done
        except FAILURES as error:
            if not heals(error) or patience.is_over:
                outcome = Outcome.UNKNOWN if self._is_sent else Outcome.NOT_DONE
                raise self._link.failure(error, _DOING, outcome) from error
            return False
        except BacktestKitError as error:
            if self._is_sent:
                error.outcome = Outcome.UNKNOWN
            raise

    async def _plan(self, patience: Patience) -> list[Planned]:
        """What there is to do, and at which revision of each document; nothing, if it turns out to be done."""
        groups = [list(group) for _, group in groupby(self._changes, lambda change: change.contract)]
        found = await asyncio.gather(*(self._documents(group, patience) for group in groups))
        documents = [document for group in found for document in group]
        if self._is_sent and self._was_done(documents):
            return []
        planned = []
        for change, document in zip(self._changes, documents, strict=True):
            document, current = await self._record(change, document, patience)
            self._link.saw_tick(document)
            _, changed = decide(change.write, current)
            if changed:
                identity = ObjectId() if document is None else document["_id"]
                planned.append(Planned(change, 0 if current is None else current.rev, identity))
        return planned

    async def _documents(self, group: Sequence[Change], patience: Patience) -> list[Document | None]:
        names = [change.name for change in group]
        return await find_named(self._link, group[0].contract, names, _DOING, patience)

    async def _record(
        self, change: Change, document: Document | None, patience: Patience
    ) -> tuple[Document | None, Record | None]:
        """A document that was read, or as it is once nothing holds it, and the record in it."""
        while document is not None and (hold := document.get("hold")):
            if "intent" not in hold:
                raise mongo_damage.blocked(self._link, change.contract, document)
            await settle(self._link, hold["intent"], change.contract, patience)
            (document,) = await self._documents([change], patience)
        if document is None or document.get("rev") == 0:
            return document, None
        try:
            return document, record_of(change.contract, document)
        except Damaged as error:
            raise await mongo_damage.block(self._link, change.contract, document, error) from None

    def _was_done(self, documents: Sequence[Document | None]) -> bool:
        if any(document is not None and document.get("writer") == self._writer for document in documents):
            return True
        # Had it been done, each would have a later tick than its first attempt, whoever wrote it since.
        if any(self._link.saw_tick(document) < self._first_tick for document in documents):
            return False
        raise RetryLater(
            f"cannot {_DOING}: the connection to MongoDB was lost, and another process has written its records "
            "since: read them again",
            outcome=Outcome.UNKNOWN,
        )

    async def _carry_out(self, planned: Sequence[Planned], patience: Patience) -> bool:
        self._is_sent = True
        with self._link.within(patience.left):
            is_done = await carry_out(self._link, planned, self._writer)
        self._is_sent = False
        return is_done

    async def _transact(self, planned: Sequence[Planned], patience: Patience) -> bool:
        async with self._link.mongo.start_session() as session:
            await session.start_transaction(
                read_concern=ReadConcern("snapshot"),
                write_concern=JOURNALLED if self._is_money else ACKNOWLEDGED,
                read_preference=ReadPreference.PRIMARY,
            )
            try:
                with self._link.within(patience.left):
                    if await self._write(planned, session):
                        crashpoint("mongo.after_transaction_writes")
                        await self._commit(session)
                        return True
            finally:
                # Not left to time: until then the server would keep others from these documents.
                if session.in_transaction:
                    with self._link.within(max(_ABORT_SECONDS, patience.left)):
                        await session.abort_transaction()
        return False

    async def _commit(self, session: AsyncClientSession) -> None:
        # Whatever the failure says: the driver asks again by itself, and a server that was started again since
        # knows nothing of the transaction that it had committed.
        self._is_sent = True
        await session.commit_transaction()
        self._is_sent = False

    async def _write(self, planned: Sequence[Planned], session: AsyncClientSession) -> bool:
        """False if a document was not as planned."""
        for contract, group in groupby(planned, lambda each: each.contract):
            updates = [self._update(each) for each in group]
            try:
                done = await _collection(self._link, contract).bulk_write(updates, session=session)
            except BulkWriteError as error:
                if is_duplicate(error):
                    return False
                raise
            if done.matched_count + done.upserted_count < len(updates):
                return False
        return True

    def _update(self, each: Planned) -> UpdateOne:
        changes = update_of(each.change, self._writer, self._link.next_tick())
        return UpdateOne(each.expected, changes, upsert=not each.rev)


def _collection(link: Link, contract: Contract) -> Any:
    """The documents of a contract for a transaction, whose concerns are its own."""
    return link.database[contract.collection]
