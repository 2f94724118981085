"""`Committer`: the one thread of a file store that writes.

Requests wait in a queue and are taken as a group: lock, read what the keys hold, decide, journal, put in place, answer.
A lone money write needs no journal: its file and its directory are synced before the caller is answered. Several money
writes at once, and every batch, are one sync of the journal instead, and their files are renamed into place without
one. Requests that only touch feeds are one transaction of `feeds.db`. Reading is done from anywhere and needs no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Final, NamedTuple

from backtest_kit.errors import BacktestKitError, Outcome
from backtest_kit.persist.backends.file_feeds import FILE as FEEDS, FeedTransaction
from backtest_kit.persist.backends.file_paths import is_feed, is_log, namespace_of
from backtest_kit.persist.backends.file_root import GROUP_PATIENCE, Root
from backtest_kit.persist.codec import dump_record, dump_value, seal_text
from backtest_kit.persist.contracts import Durability
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.files import disk_error
from backtest_kit.persist.locks import Locked
from backtest_kit.persist.store import Key, Record, Write
from backtest_kit.persist.writing import decide

GROUP_LIMIT: Final = 128
PATIENCE_SECONDS: Final = 2.0
"""How long a write waits for a lock that another process keeps."""
LINGER_SECONDS: Final = 0.0004
"""How long a group waits for those who wrote in the last one: far less than the sync it saves them."""

Target = tuple[str, Key]


class Change:
    """One write, ready to be decided on."""

    __slots__ = ("in_feed", "in_log", "lock", "path", "target", "value", "write")

    def __init__(self, write: Write, path: str, value: bytes) -> None:
        """`path` is the file of a slot or bucket record, or names a log or the records of a feed."""
        self.write = write
        self.path = path
        self.value = value
        self.in_feed = is_feed(write.contract)
        self.in_log = is_log(write.contract)
        # The database takes one writer at a time.
        self.lock = FEEDS if self.in_feed else path
        self.target: Target = (path, write.key)


class Request:
    """What stands and falls together: all of `changes` or none. `answered` is done when it has its outcome."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self.changes = changes
        self.loop = asyncio.get_running_loop()
        self.answered: asyncio.Future[None] = self.loop.create_future()
        self.records: list[Record] = []
        self.error: BaseException | None = None
        self.locks = {change.lock for change in changes}
        self.only_feeds = self.locks == {FEEDS}
        self.is_money = any(change.write.contract.durability is Durability.MONEY for change in changes)
        self.give_up_at = 0.0
        """When it has waited long enough for a lock; 0 if it has not had to wait."""

    def outcome(self) -> list[Record]:
        """The records as they now stand. Raises what the request failed with."""
        if self.error is not None:
            raise self.error
        return self.records


class _Staged(NamedTuple):
    """A record that was decided on and is not stored yet."""

    change: Change
    record: Record
    dumped: bytes
    tick: int


class Committer:
    """Takes requests in the order of `submit` and carries them out.

    `inline`: in the thread of the caller, before `submit` returns.
    """

    def __init__(self, root: Root, *, inline: bool = False) -> None:
        self._root = root
        self._inline = inline
        # No SimpleQueue: up to Python 3.12 its get(timeout) never returns when the time runs out at the wrong moment.
        self._queue: deque[Sequence[Request] | Future[None]] = deque()
        self._arrival = threading.Condition()
        self._thread: threading.Thread | None = None
        self._last_size = 1
        self._parked: list[Request] = []

    def close(self) -> None:
        """Carry out what was submitted, close the root and end the thread; what is submitted later opens it again."""
        closing: Future[None] = Future()
        self.submit(closing)
        closing.result()

    def submit(self, item: Sequence[Request] | Future[None]) -> None:
        """Take requests of one caller, or a future that is done once the root is closed."""
        with self._arrival:
            self._queue.append(item)
            if self._thread is None and not self._inline:
                self._thread = threading.Thread(target=self._run, name="backtest-kit-write", daemon=True)
                self._thread.start()
            self._arrival.notify()
        while self._inline and (self._queue or self._parked):
            self._serve()

    # -- the thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._serve():
            pass

    def _serve(self) -> bool:
        """Carry out the next group; True if the store was closed and the thread is to end."""
        group, closing = self._take()
        self._carry_out(group)
        while closing is not None and self._parked:
            self._carry_out([])
        return closing is not None and self._closed(closing)

    def _closed(self, closing: Future[None]) -> bool:
        """Close the root; True if nothing has been submitted since, and the thread is to end."""
        failure: BaseException | None = None
        try:
            self._root.close()
        except BaseException as error:  # it is for the caller of close to see
            failure = error
        with self._arrival:
            ended = not self._queue
            if ended:
                self._thread = None
        if failure is not None:
            closing.set_exception(failure)
        else:
            closing.set_result(None)
        return ended

    def _take(self) -> tuple[list[Request], Future[None] | None]:
        group: list[Request] = []
        closing: Future[None] | None = None
        deadline, size = 0.0, 0
        while len(group) < GROUP_LIMIT:
            patience: float | None = 0.0
            if not group and not self._parked:
                patience = None
            elif group and size < self._last_size:
                deadline = deadline or time.monotonic() + LINGER_SECONDS
                patience = max(0.0, deadline - time.monotonic())
            item = self._next(patience)
            if item is None:
                break
            if isinstance(item, Future):
                closing = item
                break
            if not item[0].answered.cancelled():
                group += item
                size += 1
        self._last_size = size
        return group, closing

    def _next(self, patience: float | None) -> Sequence[Request] | Future[None] | None:
        """What has been submitted first; None if nothing is within `patience` seconds, if that is a number."""
        with self._arrival:
            if not self._queue and patience != 0:
                self._arrival.wait_for(lambda: self._queue, patience)
            return self._queue.popleft() if self._queue else None

    def _carry_out(self, group: list[Request]) -> None:
        """Commit `group`, behind those that wait for a lock, and answer all that are not waiting afterwards."""
        group, self._parked = [*self._parked, *group], []
        if not group:
            return
        failure: BaseException | None = None
        try:
            self._root.open()
            self._commit(group)
        except OSError as error:
            failure = disk_error(error, "write below", self._root.path)
        except BaseException as error:  # the callers wait: whatever it is, it is theirs to see
            failure = error
        served = [request for request in group if request not in self._parked]
        for request in served:
            request.error = request.error or failure
        _answer(served)
        self._root.syncer.tidy_up()

    def _free_to_go(self, group: list[Request], stuck: Locked | None = None) -> list[Request]:
        """Those of `group` that need neither the lock that is kept elsewhere nor the turn of one that waits.

        The others wait for the next group, so that a lock held elsewhere does not stop writes of other keys;
        those that have waited too long fail, all of them together.
        """
        waiting = {lock for request in self._parked for lock in request.locks}
        free = []
        for request in group:
            if request.locks.isdisjoint(waiting) and not (stuck and stuck.concerns(request.locks)):
                free.append(request)
                continue
            waiting |= request.locks
            now = time.monotonic()
            request.give_up_at = request.give_up_at or now + PATIENCE_SECONDS
            if stuck and now >= request.give_up_at:
                request.error = stuck.after(PATIENCE_SECONDS)
            else:
                self._parked.append(request)
        return free

    # -- a group -------------------------------------------------------------------------------------

    def _commit(self, group: list[Request]) -> None:
        group = self._free_to_go(group)
        if not group:
            return
        try:
            with self._root.locked({lock for request in group for lock in request.locks}, patient=False) as ticks:
                unfinished = self._root.is_left_unfinished()
                if not unfinished:
                    self._commit_locked(group, ticks)
        except (BacktestKitError, OSError) as error:
            outcome = error.outcome if isinstance(error, BacktestKitError) else Outcome.NOT_DONE
            if outcome is Outcome.UNKNOWN:
                raise
            if isinstance(error, Locked):
                self._commit(self._free_to_go(group, error))
                return
            if len(group) == 1:
                raise
            for request in group:  # it fails only those whom it concerns
                request.error, request.records = None, []
                try:
                    self._commit([request])
                except (BacktestKitError, OSError) as single:
                    request.error = _error_of(request, single)
        else:
            if unfinished:
                # Not under the locks, which it needs. What it brings is older than this group.
                self._root.recover()
                self._commit(group)

    def _commit_locked(self, group: list[Request], ticks: Iterator[int]) -> None:
        whole = [request for request in group if len(request.changes) > 1 and not request.only_feeds]
        if sum(request.is_money for request in group) > 1 or whole:
            # Feeds of a batch that has other records too are journalled, and so is what was written before and after
            # it in the same group; those of other groups lie apart from everything else.
            journalled = group if whole else [request for request in group if not request.only_feeds]
            self._commit_through_journal(journalled, ticks)
        else:
            journalled = []
            self._append_lines([request for request in group if request.changes[0].in_log], ticks)
            for request in group:
                if not request.only_feeds and not request.changes[0].in_log:
                    with _failing(request):
                        self._commit_alone(request, ticks)
        self._commit_feeds([request for request in group if request.only_feeds and request not in journalled], ticks)

    def _commit_alone(self, request: Request, ticks: Iterator[int]) -> None:
        """Carry out a request of one record file without the journal."""
        (change,) = request.changes
        staged, record = self._decide(change, {}, None, ticks)
        request.records.append(record)
        if staged is None:
            return
        slots, data = self._root.slots, seal_text(staged.dumped)
        durability = change.write.contract.durability
        if durability is Durability.MONEY:
            slots.write_durably(change.path, data, staged.tick)
            crashpoint("file.after_acknowledge")
        elif durability is Durability.RECORD:
            self._root.syncer.note(slots.write_successor(change.path, data, staged.tick), change.path)
        else:
            slots.write_unsynced(change.path, data, staged.tick)

    def _append_lines(self, group: list[Request], ticks: Iterator[int]) -> None:
        """Carry out requests of one line each, with one write to each log."""
        logs: dict[str, list[Request]] = {}
        for request in group:
            logs.setdefault(request.changes[0].path, []).append(request)
        for path, requests in logs.items():
            _, staged = self._decide_all(requests, None, ticks)
            if not staged:
                continue
            try:
                file = self._root.log.file_of_today(path)
                self._append(file, staged)
                self._root.syncer.note([f"{self._root.path}/{file}"])
            except OSError as error:
                for request in requests:
                    request.error = request.error or disk_error(error, "append to", path)

    def _append(self, file: str, lines: Sequence[_Staged]) -> None:
        row = lines[0].change.write.contract
        self._root.log.append(row, file, [(item.record, item.dumped) for item in lines])
        self._root.syncer.note(self._root.slots.unsynced(file))

    def _commit_feeds(self, group: list[Request], ticks: Iterator[int]) -> None:
        """Carry out requests that touch nothing but feeds, in one transaction."""
        if not group:
            return
        try:
            with self._root.feeds.transaction(GROUP_PATIENCE) as feeds:
                _, staged = self._decide_all(group, feeds, ticks)
                _write_rows(feeds, staged)
        except Locked as error:
            self._free_to_go(group, error)
        except BacktestKitError as error:
            # Not raised: what else was in the group is stored, and is not to be done again.
            for request in group:
                request.error, request.records = error, []
                if len(group) > 1 and error.outcome is Outcome.NOT_DONE:
                    request.error = None
                    self._commit_feeds([request], ticks)

    def _commit_through_journal(self, group: list[Request], ticks: Iterator[int]) -> None:
        with contextlib.ExitStack() as transaction:
            some = any(change.in_feed for request in group for change in request.changes)
            feeds = transaction.enter_context(self._root.feeds.transaction(GROUP_PATIENCE)) if some else None
            entries, staged = self._decide_all(group, feeds, ticks)
            if not staged:
                return
            lines: dict[str, list[_Staged]] = {}
            for item in staged:
                if item.change.in_log:
                    lines.setdefault(self._root.log.file_of_today(item.change.path), []).append(item)
            slots = [item for item in staged if not item.change.in_log and not item.change.in_feed]
            temps = self._root.slots.prepare([(each.change.path, seal_text(each.dumped), each.tick) for each in slots])
            try:
                with self._root.journal(entries, [*(item.change.path for item in slots), *lines]):
                    for path, temp in temps:
                        self._root.slots.put_in_place(path, temp)
                        crashpoint("journal.between_renames")
                    for file, items in lines.items():
                        self._append(file, items)
                    if feeds is not None:
                        _write_rows(feeds, staged)
                        transaction.close()  # commits: after that the entry in the journal may go
                    crashpoint("journal.after_apply")
            except BaseException:
                self._root.slots.discard(temps)
                raise

    def _decide_all(
        self, group: list[Request], feeds: FeedTransaction | None, ticks: Iterator[int]
    ) -> tuple[list[bytes], list[_Staged]]:
        """The entry of each request that holds changes, and the last state of every record in order of writing."""
        entries: list[bytes] = []
        staged: dict[Target, _Staged] = {}
        for request in group:
            with _failing(request):
                records, items = [], []
                for change in request.changes:
                    item, record = self._decide(change, staged, feeds, ticks)
                    records.append(record)
                    if item is not None:
                        items.append(item)
                request.records = records
                if items:
                    entries.append(_entry(items))
                for item in items:
                    staged.pop(item.change.target, None)  # written again, it moves to the end of the order
                    staged[item.change.target] = item
        return entries, list(staged.values())

    def _decide(
        self, change: Change, staged: dict[Target, _Staged], feeds: FeedTransaction | None, ticks: Iterator[int]
    ) -> tuple[_Staged | None, Record]:
        write = change.write
        row = write.contract
        if change.target in staged:
            current: Record | None = staged[change.target].record
        elif change.in_log:
            current = self._root.log.remembered(change.path, write.key)
        elif feeds is not None and change.in_feed:
            current = feeds.head(row, namespace_of(change.path), write.key)
        else:
            current = self._root.slots.load(row, write.key, change.path, locked=True, head=True)
        record, changed = decide(write, current)
        if not changed:
            return None, record
        return _Staged(change, record, dump_record(row, record, change.value), next(ticks)), record


def _write_rows(feeds: FeedTransaction, staged: Sequence[_Staged]) -> None:
    for item in staged:
        if item.change.in_feed:
            namespace = namespace_of(item.change.path)
            feeds.write(item.change.write.contract, namespace, item.record, item.dumped)


def _entry(items: list[_Staged]) -> bytes:
    changes = b",".join(
        b'{"path":%b,"tick":%d,"record":%b}' % (dump_value(item.change.path), item.tick, item.dumped) for item in items
    )
    return b'{"changes":[%b]}' % changes


@contextlib.contextmanager
def _failing(request: Request) -> Iterator[None]:
    """What fails in the body fails this request, and no other."""
    try:
        yield
    except (BacktestKitError, OSError) as error:
        request.error = _error_of(request, error)


def _error_of(request: Request, error: BacktestKitError | OSError) -> BacktestKitError:
    if isinstance(error, BacktestKitError):
        return error
    return disk_error(error, "write", ", ".join(change.path for change in request.changes))


def _answer(group: list[Request]) -> None:
    """Wake the callers: one call for all that wait in one loop."""
    waiting: dict[Any, list[Request]] = {}
    for request in group:
        waiting.setdefault(request.loop, []).append(request)
    for loop, requests in waiting.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed, no caller waits
            loop.call_soon_threadsafe(_wake, requests)


def _wake(requests: list[Request]) -> None:
    for request in requests:
        # A caller that was cancelled meanwhile does not wait any more: the write took place all the same.
        if not request.answered.done():
            request.answered.set_result(None)
